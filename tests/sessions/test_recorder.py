"""The recorder by itself: what each event writes, when, and what is written again after a failure."""

from __future__ import annotations

from array import array
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, call

import pytest

from streamchat.base import events as ev
from streamchat.base.errors import StoreError
from streamchat.config.settings import Settings
from streamchat.conversation.log import TokenLog, TurnRecord, TurnStart
from streamchat.sessions import recorder as module
from streamchat.sessions.recorder import Recorder
from streamchat.store.records import CacheMark, ModelIdentity, StoredEviction, StoredTurn
from tests.support.turn_figures import stats_of

IDENTITY = ModelIdentity("/models/tiny", "tiny", "float32", "f", "t")
MARK, EARLIER = CacheMark(((0, 30),), ((0, 2),)), CacheMark(((0, 2),))
DELTA = ev.TextDelta(1, "x")
INFO = ev.ModelInfo("tiny", "tests", "cpu", "float32", 1, 4, 64, 64, 4, 0, "sdpa", "template")
SAVED_AGAIN = "The conversation is saved again, including everything since the failure."


class Desk:
    """A recorder of a conversation whose turns have 10 tokens each, after a system block of 2."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(module, "time", SimpleNamespace(time=lambda: 1e9 + self.now, monotonic=lambda: self.now))
        self.log = TokenLog(array("i", [1, 2]))
        self.settings = Settings(model="tiny", temperature=0.5)
        conversation: Any = SimpleNamespace(
            log=self.log,
            rollback=SimpleNamespace(mark=lambda: MARK),
            system_tokens=2,
            settings=self.settings,
            shown="so far",
        )
        self.conversation = conversation
        self.store, self.events = Mock(), list[ev.Event]()
        self.store.path = Path("conversations.db")
        self.store.is_replaced = False
        self.store.create_locked.return_value = self.lock = Mock(session="s1")
        self.recorder = Recorder(self.store, self.events.append, labels={"label": "x"})
        self.recorder.start(conversation, IDENTITY)

    @property
    def saved_settings(self) -> dict[str, Any]:
        return asdict(self.settings) | {"model": "/models/tiny", "adapter": "", "label": "x"}

    def begin(self) -> int:
        """A turn starts; return its number."""
        number = len(self.log.turns) + 1
        at = 2 + 10 * (number - 1)
        self.log.append(range(at, at + 6))
        turn = TurnRecord(number, at, at + 1, at + 4, text=f"question {number}", before=TurnStart(EARLIER))
        self.log.turns.append(turn)
        self.now += 1
        self.recorder.record(ev.TurnStarted(number, turn.text, 4))
        return number

    def finish(self) -> int:
        """The running turn ends."""
        turn = self.log.turns[-1]
        self.log.append(range(turn.start + 6, turn.start + 10))
        turn.end, turn.reply = turn.start + 10, f"answer {turn.number}"
        self.now += 1
        self.recorder.record(ev.TurnFinished(stats_of(turn.number), "length", turn.reply))
        return turn.number

    def turn(self) -> int:
        self.begin()
        return self.finish()

    def undo(self) -> int:
        """The newest turn is undone."""
        turn = self.log.turns.pop()
        self.log.cut(turn.start)
        self.recorder.record_undo(turn.number)
        return turn.number

    def written(self) -> list[dict[str, Any]]:
        """What was written since the last time."""
        found = [each.kwargs for each in self.store.write.call_args_list]
        self.store.write.reset_mock()
        return found

    def numbers(self) -> list[list[int]]:
        """The turns of each write."""
        return [[turn.number for turn in each["turns"]] for each in self.written()]

    def fail(self, *methods: str) -> None:
        for name in methods or ("write",):
            getattr(self.store, name).side_effect = StoreError("the disk is full")

    def work(self) -> None:
        for name in ("write", "change", "mark_closed", "create_locked", "write_live"):
            getattr(self.store, name).side_effect = None


@pytest.fixture
def desk(monkeypatch: pytest.MonkeyPatch) -> Desk:
    return Desk(monkeypatch)


def stored(number: int, *, done: bool = True, started: float = 101.0, finished: float | None = None) -> StoredTurn:
    at = 2 + 10 * (number - 1)
    return StoredTurn(
        number,
        f"question {number}",
        f"answer {number}" if done else "so far",
        at,
        at + 1,
        at + 4,
        array("i", range(at, at + (10 if done else 6))),
        EARLIER,
        "done" if done else "running",
        1e9 + started,
        None if finished is None else 1e9 + finished,
        stats_of(number).as_dict() if done else None,
        "length" if done else None,
    )


# --- the session ----------------------------------------------------------------------------------------------------


def test_without_a_conversation_nothing_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    store, events = Mock(), list[ev.Event]()
    recorder = Recorder(store, events.append)
    recorder.record(ev.TurnStarted(1, "hello", 3))
    recorder.record_all()
    recorder.flush()
    recorder.close_session()
    recorder.abandon_session()
    assert (store.mock_calls, events, recorder.session) == ([], [], None)


def test_the_first_turn_creates_the_session(desk: Desk) -> None:
    recorder: Any = desk.recorder
    recorder.record_all()
    recorder.record(ev.TurnPinned(1, True, 3, ev.CacheState()))
    desk.store.create_locked.assert_not_called()
    assert not recorder.is_saved
    desk.begin()
    args = ("question 1", IDENTITY, desk.saved_settings, array("i", [1, 2]))
    desk.store.create_locked.assert_called_once_with(*args)
    assert desk.events == [ev.SessionOpened("s1")]
    assert recorder.session == "s1"
    first = {"turns": [stored(1, done=False)], "cache": MARK, "evictions": [], "undone_from": None}
    assert desk.written() == [first | {"identity": None, "system_ids": array("i", [1, 2]), "is_opened": False}]
    assert not recorder.is_saved  # the turn runs
    desk.finish()
    [second] = desk.written()
    assert second["turns"] == [stored(1, finished=102.0)]
    assert recorder.is_saved
    desk.turn()
    desk.store.create_locked.assert_called_once()
    assert desk.numbers() == [[2], [2]]


def test_a_conversation_that_was_not_saved_is_written_with_all_its_turns(desk: Desk) -> None:
    desk.recorder.close_session()
    for _ in range(3):
        desk.turn()
    assert desk.numbers() == []
    desk.recorder.start(desk.conversation, IDENTITY)
    desk.recorder.record_all()
    assert desk.numbers() == [[1, 2, 3]]


def test_closing_marks_and_unlocks_and_forgets(desk: Desk) -> None:
    desk.turn()
    desk.recorder.close_session()
    desk.store.mark_closed.assert_called_once_with("s1")
    desk.lock.release.assert_called_once_with()
    assert (desk.recorder.session, desk.recorder.is_saved, len(desk.events)) == (None, False, 1)
    desk.written()
    desk.begin()
    assert desk.written() == []


def test_leaving_closes_with_a_store_of_its_own(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Mock()
    own.__enter__ = lambda self: own
    own.__exit__ = lambda self, *error: own.closed()
    opened = Mock(return_value=own)
    monkeypatch.setattr(module, "Store", opened)
    desk.turn()
    close = desk.recorder.leave_session()
    assert desk.recorder.session is None
    opened.assert_not_called()
    desk.lock.release.assert_not_called()
    close()
    opened.assert_called_once_with(Path("conversations.db"))
    assert own.mock_calls == [call.mark_closed("s1"), call.closed()]
    desk.lock.release.assert_called_once_with()


def test_leaving_unlocks_although_closing_fails(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "Store", Mock(side_effect=StoreError("the disk is full")))
    desk.turn()
    desk.recorder.leave_session()()
    desk.lock.release.assert_called_once_with()
    desk.recorder.leave_session()()  # without a session there is nothing to close
    desk.lock.release.assert_called_once_with()


def test_leaving_creates_no_database_in_the_place_of_a_deleted_one(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Mock()
    monkeypatch.setattr(module, "Store", opened)
    desk.turn()
    desk.store.is_replaced = True
    desk.recorder.leave_session()()
    opened.assert_not_called()
    desk.lock.release.assert_called_once_with()


def test_abandoning_unlocks_without_a_write(desk: Desk) -> None:
    desk.turn()
    desk.fail()
    desk.begin()
    assert desk.recorder.has_failed
    desk.written()
    desk.recorder.abandon_session()
    assert (desk.written(), desk.recorder.session, desk.recorder.has_failed) == ([], None, False)
    desk.store.mark_closed.assert_not_called()
    desk.lock.release.assert_called_once_with()


# --- a resumed session ----------------------------------------------------------------------------------------------


def resumed(desk: Desk, *, rewrite: bool = False, adopt_model: bool = False) -> Any:
    """Adopt the session s2 with a conversation of 2 turns; return its lock."""
    for _ in range(2):
        desk.turn()
    desk.store.reset_mock()
    lock = Mock(session="s2")
    other = ModelIdentity("/models/other", "other")
    desk.recorder.adopt(desk.conversation, other, lock, rewrite=rewrite, adopt_model=adopt_model)
    return lock


def test_a_resumed_session_is_told_its_model_and_that_it_is_open(desk: Desk) -> None:
    lock = resumed(desk)
    desk.lock.release.assert_called_once_with()  # of the session before
    desk.store.mark_closed.assert_called_once_with("s1")
    assert desk.recorder.session == "s2"
    [write] = desk.written()
    identity = ModelIdentity("/models/other", "other")
    assert (write["turns"], write["identity"], write["is_opened"]) == ([], identity, True)
    desk.store.set_model.assert_not_called()
    assert desk.recorder.is_saved
    desk.turn()
    assert [(each["identity"], each["is_opened"]) for each in desk.written()] == [(None, False)] * 2
    desk.recorder.close_session()
    lock.release.assert_called_once_with()


def test_other_ids_are_written_again(desk: Desk) -> None:
    resumed(desk, rewrite=True)
    assert desk.numbers() == [[1, 2]]


def test_an_imported_session_gets_model_and_settings_before_its_fingerprint(desk: Desk) -> None:
    resumed(desk, adopt_model=True)
    names = [each[0] for each in desk.store.mock_calls]
    assert names.index("set_model") < names.index("write")
    session, identity, settings = desk.store.set_model.call_args.args
    assert (session, identity.model, settings["model"]) == ("s2", "/models/other", "/models/other")
    assert settings["temperature"] == 0.5


def test_a_conversation_that_goes_on_with_its_own_session_is_not_closed(desk: Desk) -> None:
    desk.turn()
    desk.recorder.adopt(desk.conversation, IDENTITY, Mock(session="s1"), rewrite=False)
    desk.store.mark_closed.assert_not_called()
    desk.lock.release.assert_not_called()


def test_an_empty_session_has_nothing_to_write_again(desk: Desk) -> None:
    desk.recorder.adopt(desk.conversation, IDENTITY, Mock(session="s2"), rewrite=True)
    assert desk.numbers() == [[]]
    assert desk.recorder.is_saved


def test_what_a_resumed_session_could_not_be_told_is_told_later(desk: Desk) -> None:
    desk.turn()
    desk.fail()
    desk.recorder.adopt(desk.conversation, IDENTITY, Mock(session="s2"), rewrite=False)
    assert not desk.recorder.is_saved
    desk.work()
    desk.written()
    desk.recorder.flush()
    assert [each["is_opened"] for each in desk.written()] == [True]
    assert desk.recorder.is_saved


# --- events ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seconds", "writes"), [(0.49, 0), (0.5, 1)])
def test_a_reply_is_written_in_batches(desk: Desk, seconds: float, writes: int) -> None:
    desk.begin()
    desk.written()
    desk.now += seconds
    desk.recorder.record(DELTA)
    assert desk.numbers() == [[1]] * writes
    desk.recorder.record(DELTA)
    assert desk.numbers() == []
    desk.now += 0.5
    desk.recorder.record(DELTA)
    assert desk.numbers() == [[1]]


EVICTED = ev.TokensEvicted(5, (2, 7), (1,), (1,), 60, 55, "prefill", runs=((2, 7),))


def test_evictions_are_written_with_the_next_turn_once(desk: Desk) -> None:
    desk.recorder.record(EVICTED)  # before any turn
    desk.begin()
    assert [each["evictions"] for each in desk.written()] == [[]]
    desk.recorder.record(EVICTED)
    assert desk.written() == []
    desk.finish()
    desk.turn()
    expected = StoredEviction(1, 1e9 + 101, "prefill", ((2, 7),), 60, 55)
    assert [each["evictions"] for each in desk.written()] == [[expected], [], []]


def test_pins_and_paged_in_turns_are_written_at_once(desk: Desk) -> None:
    desk.turn()
    desk.written()
    desk.recorder.record(ev.TurnPinned(1, True, 3, ev.CacheState()))
    desk.recorder.record(ev.TurnPagedIn(1, 3, 0.1, ev.CacheState()))
    desk.recorder.record(ev.Notice("anything"))
    assert desk.numbers() == [[], []]


def test_changed_settings_are_written_at_once(desk: Desk) -> None:
    desk.recorder.record(ev.SettingChanged("temperature", 0.5))
    desk.turn()  # a new session has the current settings
    desk.store.change.assert_not_called()
    desk.recorder.record(ev.SettingChanged("temperature", 0.75))
    desk.store.change.assert_called_once_with("s1", [("temperature", 0.75)], desk.saved_settings)
    desk.turn()
    desk.store.change.assert_called_once()


def test_a_turn_that_was_rolled_back_is_undone(desk: Desk) -> None:
    desk.turn()
    desk.begin()
    desk.log.cut(desk.log.turns.pop().start)
    desk.written()
    desk.recorder.record(ev.TurnFinished(stats_of(2), "error", "", rolled_back=True))
    [write] = desk.written()
    assert (write["undone_from"], write["turns"]) == (2, [])
    desk.turn()
    assert [each["undone_from"] for each in desk.written()] == [None, None]


def test_an_undo_takes_what_was_not_written_of_its_turns(desk: Desk) -> None:
    desk.turn()
    desk.fail()
    desk.recorder.record(EVICTED)
    for _ in range(2):
        desk.begin()
        desk.recorder.record(EVICTED)
        desk.finish()
    assert (desk.undo(), desk.undo()) == (3, 2)
    assert list(desk.recorder._times) == [1]
    desk.work()
    desk.written()
    desk.recorder.flush()
    [write] = desk.written()
    assert (write["undone_from"], write["turns"]) == (2, [])
    assert [eviction.turn for eviction in write["evictions"]] == [1]


def test_an_undo_keeps_older_turns_to_be_written(desk: Desk) -> None:
    desk.fail()
    desk.turn()
    desk.turn()
    desk.undo()
    desk.work()
    desk.written()
    desk.turn()
    [first, second] = desk.written()
    assert [turn.number for turn in first["turns"]] == [1, 2]
    assert [turn.number for turn in second["turns"]] == [2]


def test_times_are_those_of_the_turn_and_are_dropped_behind_it(desk: Desk) -> None:
    desk.turn()
    assert desk.recorder.started_at(1) == 1e9 + 101
    desk.turn()
    desk.begin()
    assert list(desk.recorder._times) == [3]
    desk.recorder._times.clear()  # of a turn that this process did not start
    desk.written()
    desk.finish()
    [write] = desk.written()
    assert (write["turns"][0].started, write["turns"][0].finished) == (1e9 + 106, 1e9 + 106)


def test_a_reply_that_was_cut_off_is_recorded_as_cancelled(desk: Desk) -> None:
    desk.turn()
    desk.written()
    desk.now += 5
    desk.recorder.record_cut_reply(1)
    [write] = desk.written()
    [turn] = write["turns"]
    assert (turn.started, turn.finished, turn.stats, turn.finish_reason) == (1e9 + 107, 1e9 + 107, None, "cancelled")


# --- failures -------------------------------------------------------------------------------------------------------


def test_a_failure_is_said_once_and_everything_is_written_when_it_works(desk: Desk) -> None:
    recorder: Any = desk.recorder
    desk.turn()
    desk.events.clear()
    desk.fail()
    desk.turn()
    desk.turn()
    said = ev.Notice("This conversation is currently not saved: the disk is full", "warning")
    assert desk.events == [ev.SavingChanged(False), said]
    assert recorder.has_failed
    desk.work()
    desk.written()
    desk.begin()
    assert desk.numbers() == [[2, 3, 4]]
    assert desk.events[2:] == [ev.SavingChanged(True), ev.Notice(SAVED_AGAIN)]
    assert not recorder.has_failed
    desk.finish()
    assert len(desk.events) == 4


def test_a_session_that_cannot_be_created_is_created_later(desk: Desk) -> None:
    desk.fail("create_locked")
    desk.turn()
    assert [type(event) for event in desk.events] == [ev.SavingChanged, ev.Notice]
    desk.work()
    desk.turn()
    assert desk.numbers() == [[1, 2], [2]]
    assert desk.events[2:] == [ev.SessionOpened("s1"), ev.SavingChanged(True), ev.Notice(SAVED_AGAIN)]


@pytest.mark.parametrize("lost", ["turn", "setting", "undo"])
def test_what_is_lost_with_a_session_is_said(desk: Desk, lost: str) -> None:
    desk.turn()
    desk.fail("write", "change")
    if lost == "turn":
        desk.turn()
    elif lost == "setting":
        desk.recorder.record(ev.SettingChanged("temperature", 0.75))
    else:
        desk.undo()
    desk.events.clear()
    desk.recorder.close_session()
    assert desk.events == [ev.Notice("The latest changes of the session s1 could not be saved.", "warning")]
    desk.work()
    desk.recorder.start(desk.conversation, IDENTITY)
    desk.turn()
    assert desk.events[-2:] == [ev.SavingChanged(True), ev.Notice("The conversation is saved again.")]


def test_a_session_whose_close_fails_has_lost_nothing(desk: Desk) -> None:
    desk.turn()
    desk.events.clear()
    desk.fail("mark_closed")
    desk.recorder.close_session()
    assert [type(event) for event in desk.events] == [ev.SavingChanged, ev.Notice]
    desk.lock.release.assert_called_once_with()
    desk.work()
    desk.recorder.start(desk.conversation, IDENTITY)
    desk.turn()
    assert desk.events[-1] == ev.Notice(SAVED_AGAIN)


def test_flush_writes_only_what_is_pending(desk: Desk) -> None:
    desk.recorder.flush()
    desk.turn()
    desk.written()
    desk.recorder.flush()
    assert desk.written() == []
    desk.fail("change")
    desk.recorder.record(ev.SettingChanged("temperature", 0.75))
    desk.work()
    desk.recorder.flush()
    assert desk.numbers() == [[]]
    assert desk.store.change.call_count == 2
    assert desk.recorder.is_saved


# --- live figures ---------------------------------------------------------------------------------------------------


def sample(busy: bool) -> ev.StatusSampled:
    return ev.StatusSampled(ev.CacheState(), ev.MemoryState(1), busy=busy)


@pytest.mark.parametrize(
    ("was_busy", "busy", "due"), [(False, False, 15.0), (False, True, 1.0), (True, True, 1.0), (True, False, 1.0)]
)
def test_live_figures_are_written_once_a_second_in_a_reply(desk: Desk, was_busy: bool, busy: bool, due: float) -> None:
    desk.turn()
    desk.recorder._last_live, desk.recorder._was_busy = desk.now, was_busy
    desk.now += due - 0.25
    desk.recorder.record_status(sample(busy), INFO)
    desk.store.write_live.assert_not_called()
    desk.now += 0.25
    desk.recorder.record_status(sample(busy), INFO)
    desk.store.write_live.assert_called_once_with("s1", asdict(sample(busy)) | {"info": asdict(INFO)})
    assert (desk.recorder._last_live, desk.recorder._was_busy) == (desk.now, busy)


def test_live_figures_need_a_session_and_fail_silently(desk: Desk) -> None:
    desk.recorder.record_status(sample(True), INFO)
    desk.store.write_live.assert_not_called()
    desk.turn()
    desk.events.clear()
    desk.fail("write_live")
    desk.recorder.record_status(sample(True), INFO)
    desk.store.write_live.assert_called_once()
    assert (desk.events, desk.recorder.has_failed) == ([], False)
