"""The archive of sessions by itself: what it opens, closes, records, and writes, and when; on stand-ins."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import ANY, Mock, call

import pytest

from streamchat.base import events as ev
from streamchat.base.errors import ConfigError, StoreError
from streamchat.sessions import archive as module
from streamchat.sessions.archive import Archive
from tests.support.turn_figures import stats_of

REFUSED = StoreError("the disk is full")
STARTED = ev.TurnStarted(1, "hello", 3)


def finished(turn: int = 1, rolled_back: bool = False) -> ev.TurnFinished:
    return ev.TurnFinished(stats_of(turn), "stop", "reply", rolled_back=rolled_back)


class Desk:
    """An archive whose store, recorder, archive of evicted tokens and upkeep note their calls in one list."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
        self.events: list[ev.Event] = []
        self.made = Mock()
        self.store, self.recorder, self.evicted = self.made.store, self.made.recorder, self.made.evicted
        self.upkeep, self.identities = self.made.upkeep, Mock()
        self.store.is_user_database = True
        self.store.is_replaced = False
        self.recorder.store, self.recorder.session = self.store, "s1"
        self.identities.of = lambda active: ("identity", active)
        self.active: Any = SimpleNamespace(conversation=SimpleNamespace(log=SimpleNamespace(turns=["a turn"])))
        self.open_store = Mock(return_value=self.store)
        self.new_evicted = Mock(return_value=self.evicted)
        monkeypatch.setattr("streamchat.sessions.recorder.Recorder", Mock(return_value=self.recorder))
        monkeypatch.setattr("streamchat.sessions.evicted_archive.EvictedArchive", self.new_evicted)
        monkeypatch.setattr(module, "Upkeep", Mock(return_value=self.upkeep))
        monkeypatch.setattr("streamchat.sessions.fork.captured", lambda *given: ("captured", *given))
        monkeypatch.setattr("streamchat.sessions.snapshot.save", lambda path, saved: self.made.saved(path, saved))
        self.archive = Archive(self.open_store, self.events.append, identities=self.identities, **options)

    @property
    def identity(self) -> tuple[str, Any]:
        return "identity", self.active

    @property
    def captured(self) -> tuple[Any, ...]:
        return "captured", "s1", self.active.conversation, self.identity

    def calls(self) -> list[Any]:
        """The calls since the last time."""
        found = list(self.made.mock_calls)
        self.made.reset_mock()
        return found


@pytest.fixture
def desk(monkeypatch: pytest.MonkeyPatch) -> Desk:
    desk = Desk(monkeypatch)
    desk.archive.open(required=False)
    desk.calls()
    return desk


# --- opening and closing -------------------------------------------------------------------------------------------


def test_opening_makes_recorder_and_archive_and_starts_the_upkeep_once(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(monkeypatch)
    assert (desk.archive.session, desk.archive.can_save, desk.archive.changed) == (None, True, False)
    desk.archive.open(required=False)
    desk.archive.open(required=True)
    desk.open_store.assert_called_once_with()
    assert desk.calls() == [call.upkeep.start_if_due()]
    assert desk.new_evicted.call_args.args[0] is desk.store.evicted
    assert desk.archive.session == "s1"
    assert desk.events == []


def test_closing_ends_what_was_opened_in_order(desk: Desk) -> None:
    desk.archive.close()
    order = [call.evicted.close(), call.recorder.close_session(), call.upkeep.stop(), call.store.close()]
    assert desk.calls() == order
    assert (desk.archive.recorder, desk.archive.session) == (None, None)
    desk.archive.close()
    desk.archive.record(finished())
    assert desk.calls() == []


@pytest.mark.parametrize(("is_user_database", "upkeep"), [(True, False), (False, True), (False, False)])
def test_only_the_users_database_is_maintained_and_only_if_wanted(
    monkeypatch: pytest.MonkeyPatch, is_user_database: bool, upkeep: bool
) -> None:
    desk = Desk(monkeypatch, upkeep=upkeep)
    desk.store.is_user_database = is_user_database
    desk.archive.open(required=False)
    desk.archive.record(finished())
    desk.archive.close()
    assert not any("upkeep" in str(each) for each in desk.calls())


def test_deferred_saving_needs_no_store_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(monkeypatch, is_deferred=True)
    desk.archive.open(required=False)
    desk.open_store.assert_not_called()
    desk.archive.open(required=True)
    desk.open_store.assert_called_once_with()


def test_without_a_store_nothing_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(monkeypatch)
    archive = Archive(None, desk.events.append)
    assert not archive.can_save
    archive.open(required=True)
    for each in (STARTED, finished()):
        archive.record(each)
    archive.start(desk.active)
    archive.record_undo(1)
    archive.record_status(Mock(), Mock())
    archive.snapshot(desk.active)
    archive.flush_and_snapshot(desk.active)
    archive.leave(desk.active)
    archive.abandon()
    archive.close()
    assert (archive.recorder, archive.session, archive.is_lost) == (None, None, False)
    assert (archive.marks(1, 2), archive.unclean_exit_notice()) == ({}, "")
    assert desk.events == []


def test_a_store_that_cannot_be_opened_is_said_or_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(monkeypatch)
    desk.open_store.side_effect = REFUSED
    with pytest.raises(StoreError, match="the disk is full"):
        desk.archive.open(required=True)
    assert desk.events == []
    desk.archive.open(required=False)
    assert desk.events == [
        ev.SavingChanged(False),
        ev.Notice("This conversation is not saved: the disk is full", "warning"),
    ]
    assert desk.archive.recorder is None


@pytest.mark.parametrize(("seconds", "tries"), [(0.99, 4), (1.0, 1)])
def test_a_store_that_refuses_at_once_is_tried_after_each_turn_and_said_once(
    monkeypatch: pytest.MonkeyPatch, seconds: float, tries: int
) -> None:
    desk, now = Desk(monkeypatch), [0.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def refuse() -> None:
        now[0] += seconds
        raise REFUSED

    desk.open_store.side_effect = refuse
    desk.archive.open(required=False)
    desk.archive.start(desk.active)
    for number in (1, 2, 3):
        desk.archive.record(STARTED)
        desk.archive.record(finished(number))
    assert desk.open_store.call_count == tries
    assert [type(event) for event in desk.events] == [ev.SavingChanged, ev.Notice]
    assert desk.calls() == []


def test_a_store_that_opens_later_gets_the_conversation_from_its_first_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(monkeypatch)
    desk.open_store.side_effect = [REFUSED, desk.store]
    desk.archive.open(required=False)
    desk.archive.start(desk.active)
    desk.events.clear()
    desk.archive.record(STARTED)
    assert desk.calls() == []
    desk.archive.record(finished())
    assert desk.calls()[:5] == [
        call.upkeep.start_if_due(),
        call.recorder.start(desk.active.conversation, desk.identity),
        call.evicted.attach(desk.active.conversation, desk.identity, ANY),
        call.recorder.record_all(),
        call.evicted.flush(),
    ]
    assert desk.archive.changed
    assert desk.events == [
        ev.SavingChanged(True),
        ev.Notice("The conversation is saved now, from its first turn on."),
    ]
    desk.archive.record(finished(2))
    assert desk.open_store.call_count == 2
    assert call.recorder.record(finished(2)) in desk.calls()


def test_a_conversation_without_a_session_is_not_said_to_be_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(monkeypatch)
    desk.open_store.side_effect = [REFUSED, desk.store]
    desk.recorder.session = None
    desk.archive.open(required=False)
    desk.archive.start(desk.active)
    desk.events.clear()
    desk.archive.record(finished())
    assert desk.events == [ev.SavingChanged(True)]  # a recorder that fails takes it back


def test_a_model_that_was_replaced_is_not_saved_later(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(monkeypatch)
    desk.open_store.side_effect = [REFUSED, desk.store]
    desk.archive.open(required=False)
    desk.archive.start(desk.active)
    desk.archive.release_model()
    desk.identities.release_model.assert_called_once_with()
    desk.archive.record(finished())
    assert desk.open_store.call_count == 1


# --- recording ------------------------------------------------------------------------------------------------------


def test_a_new_conversation_is_recorded_and_its_evictions_archived(desk: Desk) -> None:
    desk.archive.changed = True
    desk.archive.start(desk.active)
    assert not desk.archive.changed
    desk.recorder.start.assert_called_once_with(desk.active.conversation, desk.identity)
    conversation, identity, session = desk.evicted.attach.call_args.args
    assert (conversation, identity, session()) == (desk.active.conversation, desk.identity, "s1")
    desk.recorder.session = "s2"
    assert session() == "s2"


def test_saving_that_starts_later_records_all_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(monkeypatch, is_deferred=True)
    desk.archive.start_saving(desk.active)
    assert [str(each).split("(")[0] for each in desk.calls()] == [
        "call.upkeep.start_if_due",
        "call.recorder.start",
        "call.evicted.attach",
        "call.recorder.record_all",
    ]
    assert desk.archive.changed
    desk.archive.start_saving(desk.active)  # it is saved already
    assert (desk.calls(), desk.events) == ([], [])


def test_saving_that_cannot_start_is_an_error_of_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(monkeypatch)
    Archive(None, desk.events.append).start_saving(desk.active)
    desk.open_store.side_effect = REFUSED
    desk.archive.start_saving(desk.active)
    assert desk.events == [
        ev.Notice("Sessions are not saved in this run.", "error"),
        ev.Notice("the disk is full", "error"),
    ]
    assert (desk.calls(), desk.archive.changed) == ([], False)


PAGED_IN = ev.TurnPagedIn(2, 10, 0.1, ev.CacheState())


@pytest.mark.parametrize(
    ("event", "evicted", "upkeep"),
    [
        (STARTED, [], []),
        (finished(3), [call.evicted.flush()], [call.upkeep.start_if_due()]),
        (finished(3, rolled_back=True), [call.evicted.undone(3)], [call.upkeep.start_if_due()]),
        (PAGED_IN, [call.evicted.flush()], []),
    ],
)
def test_each_event_is_recorded_before_its_evictions_and_the_upkeep(
    desk: Desk, event: ev.Event, evicted: list[Any], upkeep: list[Any]
) -> None:
    desk.archive.record(event)
    assert desk.calls() == [call.recorder.record(event), *evicted, *upkeep]


def test_notices_of_the_writer_are_emitted_after_a_turn_in_order(desk: Desk) -> None:
    tell = desk.new_evicted.call_args.args[1]
    tell("one.")
    tell("two.")
    desk.archive.record(STARTED)
    assert desk.events == []
    desk.archive.record(finished())
    desk.archive.record(finished())
    assert desk.events == [ev.Notice("one.", "warning"), ev.Notice("two.", "warning")]


def test_an_undo_drops_pages_before_it_is_recorded(desk: Desk) -> None:
    desk.archive.record_undo(4)
    assert desk.calls() == [call.evicted.undone(4), call.recorder.record_undo(4)]
    assert desk.archive.changed


def test_live_figures_go_to_the_recorder(desk: Desk) -> None:
    desk.archive.record_status("sample", "info")  # type: ignore[arg-type]
    assert desk.calls() == [call.recorder.record_status("sample", "info")]


def test_the_title_of_a_saved_session_changes(desk: Desk) -> None:
    desk.store.rename = Mock(return_value="A title")
    desk.archive.set_title("  A   title")
    desk.store.rename.assert_called_once_with("s1", "  A   title")
    assert desk.events.pop() == ev.Notice("title changed to “A title”")
    for error in (ConfigError("no title"), StoreError("no disk")):
        desk.store.rename.side_effect = error
        desk.archive.set_title("x")
        assert desk.events.pop() == ev.Notice(str(error), "warning")
    desk.recorder.session = None
    desk.archive.set_title("x")
    assert desk.events == [ev.Notice("The title cannot change: this conversation is not saved.", "warning")]
    assert desk.store.rename.call_count == 3


# --- snapshots ------------------------------------------------------------------------------------------------------


def test_a_snapshot_is_written_once_per_change(desk: Desk) -> None:
    desk.store.snapshot_path = lambda session: Path(f"{session}.cache")
    desk.archive.snapshot(desk.active)
    assert desk.calls() == []
    desk.archive.changed = True
    desk.made.saved = Mock(side_effect=lambda *_: desk.made.was_saving(desk.archive.saving.is_set()))
    desk.archive.snapshot(desk.active)
    desk.archive.snapshot(desk.active)
    desk.made.saved.assert_called_once_with(Path("s1.cache"), desk.captured)
    desk.made.was_saving.assert_called_once_with(True)
    assert (desk.archive.changed, desk.archive.saving.is_set()) == (False, False)


def test_nothing_is_written_without_a_session_or_a_turn(desk: Desk) -> None:
    desk.archive.changed = True
    desk.recorder.session = None
    desk.archive.snapshot(desk.active)
    desk.recorder.session = "s1"
    desk.active.conversation.log.turns.clear()
    desk.archive.snapshot(desk.active)
    assert desk.calls() == []
    assert desk.archive.changed


def test_no_snapshot_is_written_for_a_database_that_was_replaced(desk: Desk) -> None:
    desk.archive.changed = desk.store.is_replaced = True
    desk.made.saved = Mock()
    desk.archive.snapshot(desk.active)
    desk.made.saved.assert_not_called()
    assert desk.events == []


def test_a_snapshot_that_fails_is_said_and_due_again(desk: Desk) -> None:
    desk.archive.changed = True
    desk.made.saved = Mock(side_effect=REFUSED)
    desk.archive.snapshot(desk.active)
    assert desk.events == [ev.Notice("the disk is full; resuming will need a prefill", "warning")]
    assert (desk.archive.changed, desk.archive.saving.is_set()) == (True, False)


def test_a_snapshot_that_fails_otherwise_is_not_being_saved_any_more(desk: Desk) -> None:
    desk.archive.changed = True
    desk.made.saved = Mock(side_effect=RuntimeError("a shape is wrong"))
    with pytest.raises(RuntimeError, match="a shape is wrong"):
        desk.archive.snapshot(desk.active)
    assert not desk.archive.saving.is_set()


def test_a_server_writes_snapshots_with_its_own_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    later: list[tuple[str, Any]] = []
    desk = Desk(monkeypatch, write=lambda session, save: later.append((session, save)))
    desk.store.snapshot_path = lambda session: Path(f"{session}.cache")
    desk.archive.open(required=True)
    desk.calls()
    desk.archive.changed = True
    desk.archive.flush_and_snapshot(desk.active)
    assert desk.calls() == [call.recorder.flush()]
    [(session, save)] = later
    assert session == "s1"
    save()
    assert desk.calls() == [call.saved(Path("s1.cache"), desk.captured)]


def test_flush_needs_no_conversation(desk: Desk) -> None:
    desk.archive.changed = True
    desk.archive.flush_and_snapshot(None)
    assert desk.calls() == [call.recorder.flush()]


# --- leaving --------------------------------------------------------------------------------------------------------


def leaving(desk: Desk) -> list[str]:
    """The calls of `leave`, by name."""
    desk.recorder.leave_session.return_value = desk.made.closed
    desk.archive.leave(desk.active)
    return [str(each).split("(")[0].removeprefix("call.") for each in desk.calls()]


def test_leaving_saves_the_cache_before_the_session_is_unlocked(desk: Desk) -> None:
    desk.archive.changed = True
    assert leaving(desk) == ["recorder.flush", "store.snapshot_path", "recorder.leave_session", "saved", "closed"]
    assert not desk.archive.changed


@pytest.mark.parametrize("reason", ["unchanged", "no turn"])
def test_leaving_a_session_that_needs_no_snapshot_closes_it(desk: Desk, reason: str) -> None:
    desk.archive.changed = reason != "unchanged"
    if reason == "no turn":
        desk.active.conversation.log.turns.clear()
    assert leaving(desk) == ["recorder.flush", "recorder.leave_session", "closed"]


def test_leaving_without_a_session_captures_nothing(desk: Desk) -> None:
    desk.archive.changed = True
    desk.recorder.session = None
    assert leaving(desk) == ["recorder.flush", "recorder.leave_session", "closed"]


def test_a_session_is_unlocked_although_its_snapshot_fails(desk: Desk) -> None:
    desk.archive.changed = True
    desk.made.saved = Mock(side_effect=REFUSED)
    assert leaving(desk)[-1] == "closed"
    assert len(desk.events) == 1


@pytest.mark.parametrize(
    ("session", "has_failed", "owns", "is_lost"),
    [
        ("s1", False, True, False),
        ("s1", True, True, True),
        ("s1", False, False, True),
        (None, True, False, True),
        (None, False, False, False),
    ],
)
def test_a_session_is_lost_that_could_not_be_saved_or_has_another_owner(
    desk: Desk, session: str | None, has_failed: bool, owns: bool, is_lost: bool
) -> None:
    desk.recorder.session, desk.recorder.has_failed = session, has_failed
    desk.store.owns = Mock(return_value=owns)
    assert desk.archive.is_lost is is_lost
    desk.archive.changed = True
    desk.archive.abandon()
    desk.recorder.abandon_session.assert_called_once_with()
    assert not desk.archive.changed


# --- saved sessions -------------------------------------------------------------------------------------------------


def latest(desk: Desk, monkeypatch: pytest.MonkeyPatch, *, opened_by: int | None, is_open: bool = False) -> str:
    """The notice about the latest session of 3 turns."""
    info = SimpleNamespace(id="s0", opened_by=opened_by, turns=3)
    desk.store.sessions = Mock(return_value=[info])
    monkeypatch.setattr("streamchat.store.lock.is_open", lambda folder, latest: is_open)
    notice = desk.archive.unclean_exit_notice()
    desk.store.sessions.assert_called_once_with(limit=1)
    return notice


def test_an_unclean_exit_is_said_once(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = "The last session was not closed properly; /resume s0 resumes it (3 turns)."
    assert latest(desk, monkeypatch, opened_by=17) == expected
    desk.store.mark_closed.assert_called_once_with("s0")


def test_a_session_that_is_closed_or_open_elsewhere_is_not_mentioned(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert latest(desk, monkeypatch, opened_by=None) == ""
    assert latest(desk, monkeypatch, opened_by=17, is_open=True) == ""
    desk.store.sessions = Mock(return_value=[])
    assert desk.archive.unclean_exit_notice() == ""
    desk.store.sessions.side_effect = REFUSED
    assert desk.archive.unclean_exit_notice() == ""
    desk.store.mark_closed.assert_not_called()


def test_saved_marks_are_those_of_the_session_or_none(desk: Desk) -> None:
    desk.store.marks = Mock(return_value={2: "mark"})
    found: Any = desk.archive.marks(2, 5)
    assert found == {2: "mark"}
    desk.store.marks.assert_called_once_with("s1", 2, 5)
    desk.store.marks.side_effect = REFUSED
    assert desk.archive.marks(2, 5) == {}
    desk.recorder.session = None
    assert desk.archive.marks(2, 5) == {}
    assert desk.store.marks.call_count == 2


def test_a_fork_is_made_of_what_is_completely_saved(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamchat.sessions.fork.fork", desk.made.fork)
    desk.made.fork.return_value = "forked"
    assert desk.archive.fork(desk.active, 2, 3) == "forked"
    assert desk.calls() == [
        call.recorder.flush(),
        call.evicted.drain(),
        call.fork(desk.store, "s1", desk.active.conversation, desk.identity, 2, 3),
    ]
    desk.recorder.is_saved = False
    with pytest.raises(StoreError, match="could not be saved, so nothing is forked"):
        desk.archive.fork(desk.active, 2, 3)
    desk.recorder.session = None
    with pytest.raises(ConfigError, match="this conversation is not saved, so it cannot be forked"):
        desk.archive.fork(desk.active, 2, 3)
    assert desk.calls() == [call.recorder.flush()]


def test_claiming_locks_the_session(desk: Desk) -> None:
    desk.store.lock_session = Mock(return_value=("info", "lock"))
    claimed: Any = desk.archive.claim("s7")
    desk.store.lock_session.assert_called_once_with("s7")
    assert (claimed.info, claimed.lock) == ("info", "lock")


# --- restoring ------------------------------------------------------------------------------------------------------


class Restored:
    """What a restored session returns, and the calls that restored it."""

    def __init__(
        self, desk: Desk, monkeypatch: pytest.MonkeyPatch, damage: tuple[str, ...] = (), **result: Any
    ) -> None:
        values: dict[str, Any] = {
            "rewritten": False,
            "cut_turn": 0,
            "cut_reply": [],
            "message_back": "",
            "reason": "",
            "read_again": 0,
        }
        self.result: Any = SimpleNamespace(**(values | result), unpinned=(), seconds=1.0)
        ends = {1: "stop", 2: "cancelled"}
        turns = tuple(SimpleNamespace(number=number, finish_reason=end, stats=None) for number, end in ends.items())
        self.stored: Any = SimpleNamespace(damage=damage, turns=turns, info="info")
        claimed: Any = SimpleNamespace(info=SimpleNamespace(id="s9", is_imported=True), lock="lock")
        self.claimed = claimed
        desk.store.load = Mock(return_value=self.stored)
        desk.store.newest_snapshot = lambda session: f"{session}.cache"
        desk.active.conversation.close_cut_reply = desk.made.close_cut_reply
        monkeypatch.setattr("streamchat.sessions.resume.resume", desk.made.resume)
        desk.made.resume.return_value = self.result
        self.found: Any = desk.archive.restore_into(desk.active, claimed)
        desk.store.load.assert_called_once_with("s9")
        desk.evicted.attach.assert_called_once()
        self.calls = [each for each in desk.calls() if each[0] not in ("store.load", "evicted.attach")]


def test_a_session_is_restored_with_its_identity_and_lock(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    restored = Restored(desk, monkeypatch)
    assert restored.found == (restored.stored, restored.result)
    conversation, identity = desk.active.conversation, desk.identity
    assert restored.calls == [
        call.resume(conversation, restored.stored, identity, "s9.cache"),
        call.recorder.adopt(conversation, identity, "lock", rewrite=False, adopt_model=True),
    ]
    assert not desk.archive.changed


def test_a_damaged_session_is_repaired_first(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    restored = Restored(desk, monkeypatch, ("turn 2",))
    assert restored.calls[0] == call.store.repair_session(restored.stored)


def test_a_reply_that_was_cut_is_closed_and_recorded(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    restored = Restored(desk, monkeypatch, cut_turn=3, cut_reply=[7, 8])
    assert restored.calls[2:] == [call.close_cut_reply([7, 8]), call.recorder.record_cut_reply(3)]
    assert desk.archive.changed


def test_a_message_without_a_reply_is_undone(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    restored = Restored(desk, monkeypatch, message_back="hello")
    assert restored.calls[2:] == [call.evicted.undone(2), call.recorder.record_undo(2)]


@pytest.mark.parametrize("rewritten", [False, True])
def test_pages_of_other_ids_are_dropped(desk: Desk, monkeypatch: pytest.MonkeyPatch, rewritten: bool) -> None:
    restored = Restored(desk, monkeypatch, rewritten=rewritten, reason="the tokenizer is another one")
    assert restored.calls[1].kwargs["rewrite"] is rewritten
    assert restored.calls[2:] == ([call.evicted.undone(0)] if rewritten else [])
    assert desk.archive.changed


def test_the_event_of_a_restored_session_has_its_figures(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    restored = Restored(desk, monkeypatch, cut_turn=5, read_again=7, message_back="hello", reason="it is new")
    desk.store.load = Mock(return_value=restored.stored)
    desk.active.conversation.cache = SimpleNamespace(cache_size=64)
    event = ev.ConversationResumed("s9", "Title", (), ev.CacheState(), Mock(), "", 0.0)
    given: list[Any] = []

    def made(*args: Any) -> ev.ConversationResumed:
        given.append(args)
        return event

    monkeypatch.setattr(module, "resumed_event", made)
    monkeypatch.setattr(module, "resume_notices", lambda *args: [args])
    found, notices = cast(Any, desk.archive.restore(desk.active, restored.claimed))
    assert given == [(desk.active, "info", {1: None, 2: None}, {5, 2})]
    assert (found.prefilled, found.restored_message, found.title) == (7, "hello", "Title")
    assert 0 < found.seconds < 1000
    assert notices == [(restored.stored, restored.result, 64)]


def test_the_active_conversation_is_described_with_its_saved_figures(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "resumed_event", lambda *args: args)
    desk.store.stats = Mock(return_value=[stats_of(1).as_dict(), None, {"damaged": 1}, stats_of(4).as_dict()])
    desk.store.find = Mock(return_value="info")
    described: Any = desk.archive.describe(desk.active)
    assert described == (desk.active, "info", {1: stats_of(1), 4: stats_of(4)}, set())
    desk.store.stats.assert_called_once_with("s1")
    desk.recorder.session = None
    described = desk.archive.describe(desk.active)
    assert described == (desk.active, None, {}, set())
