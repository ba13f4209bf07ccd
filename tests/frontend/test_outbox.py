"""The queue between a front end and the engine: nothing is lost, nothing is sent twice, the order stays."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from streamchat.base import events as ev
from streamchat.frontend.outbox import Message, Outbox, Phase, SendResult


def message(text: str) -> Message:
    return Message(f"typed {text}", text)


def texts(outbox: Outbox) -> list[str]:
    return [each.message.text for each in outbox.queue]


class Started:
    """An idle outbox and what it has sent."""

    def __init__(self) -> None:
        self.sent: list[str] = []
        self.outbox = Outbox(self.sent.append)
        self.outbox.idle()

    def ended(self) -> None:
        self.outbox.idle()
        self.outbox.send_next()


def test_messages_are_sent_one_after_the_other() -> None:
    run = Started()
    results = [run.outbox.offer(message(text)) for text in "abc"]
    assert results == [SendResult.SENT, SendResult.QUEUED, SendResult.QUEUED]
    assert (run.sent, texts(run.outbox)) == (["a"], ["b", "c"])
    run.ended()
    assert (run.sent, texts(run.outbox)) == (["a", "b"], ["c"])
    run.ended()
    run.ended()
    assert (run.sent, texts(run.outbox), run.outbox.phase) == (["a", "b", "c"], [], Phase.IDLE)


def test_held_messages_wait_and_a_new_one_goes_first() -> None:
    run = Started()
    for text in "abc":
        run.outbox.offer(message(text))
    run.outbox.hold()
    run.ended()
    assert (run.sent, run.outbox.phase) == (["a"], Phase.IDLE)
    assert run.outbox.offer(message("d")) is SendResult.SENT
    assert run.outbox.offer(message("e")) is SendResult.QUEUED  # a reply is in progress
    assert texts(run.outbox) == ["e", "b", "c"]
    run.ended()
    run.ended()
    assert (run.sent, texts(run.outbox)) == (["a", "d", "e"], ["b", "c"])
    run.outbox.resume()
    run.outbox.send_next()
    run.ended()
    assert run.sent == ["a", "d", "e", "b", "c"]


def test_an_edited_message_keeps_its_place_and_is_waited_for() -> None:
    run = Started()
    for text in "abcd":
        run.outbox.offer(message(text))
    assert run.outbox.edit(1) == "typed c"
    run.ended()  # b goes
    run.ended()
    assert (run.sent, run.outbox.phase, run.outbox.edited) == (["a", "b"], Phase.IDLE, 0)
    assert run.outbox.offer(message("C")) is SendResult.SENT
    run.ended()
    assert run.sent == ["a", "b", "C", "d"]


def test_an_edit_that_ends_without_change_lets_the_queue_go_on() -> None:
    run = Started()
    run.outbox.offer(message("a"))
    run.outbox.offer(message("b"))
    run.outbox.edit(0)
    run.ended()
    assert run.sent == ["a"]
    run.outbox.end_edit()
    assert run.outbox.send_next() == "b"


def test_the_first_held_message_is_sent_after_an_edit_and_others_stay() -> None:
    run = Started()
    for text in "abc":
        run.outbox.offer(message(text))
    run.outbox.hold()
    run.ended()
    run.outbox.edit(1)
    assert run.outbox.offer(message("C")) is SendResult.QUEUED
    run.outbox.edit(0)
    assert run.outbox.offer(message("B")) is SendResult.SENT
    assert (run.sent, texts(run.outbox)) == (["a", "B"], ["C"])
    assert run.outbox.queue[0].held


def test_a_failed_engine_keeps_what_waits_and_what_it_was_answering() -> None:
    run = Started()
    for text in "abc":
        run.outbox.offer(message(text))
    run.outbox.failed()
    assert texts(run.outbox) == ["a", "b", "c"]
    assert run.outbox.offer(message("d")) is SendResult.REFUSED
    run.outbox.resume()
    run.ended()
    assert (run.sent, run.outbox.phase) == (["a"], Phase.FAILED)


def test_the_message_of_a_turn_comes_back_as_it_was_typed() -> None:
    run = Started()
    run.outbox.offer(Message("see @f", "see the file"))
    assert run.outbox.typed("see the file") == "see @f"
    assert run.outbox.typed("other") == "other"


def test_a_command_keeps_the_engine_busy_until_its_event() -> None:
    run = Started()
    run.outbox.begin_command(lambda event: isinstance(event, ev.SummaryReady))
    assert run.outbox.offer(message("a")) is SendResult.QUEUED
    assert not run.outbox.is_done(ev.Notice("no"))
    assert run.outbox.is_done(ev.SummaryReady("", (0, 0)))
    assert not run.outbox.is_done(ev.SummaryReady("", (0, 0)))


class OutboxMachine(RuleBasedStateMachine):
    """Any order of what users and engines do, compared with plain lists."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[str] = []
        self.outbox = Outbox(self._send)
        self.count = 0
        self.alive: set[str] = set()
        """Texts that were offered, and neither sent, nor removed, nor replaced by an edit."""
        self.running: str | None = None

    def _send(self, text: str) -> None:
        assert self.running is None, f"{text} is sent while {self.running} runs"
        assert text in self.alive, f"{text} was sent before, or removed"
        self.alive.remove(text)
        self.sent.append(text)
        self.running = text

    def _new(self) -> Message:
        self.count += 1
        return message(str(self.count))

    @initialize(ready=st.booleans())
    def load(self, ready: bool) -> None:
        if ready:
            self.outbox.idle()

    @rule(count=st.integers(1, 4))
    def offer(self, count: int) -> None:
        for _ in range(count):
            self._offer(self._new())

    def _offer(self, new: Message) -> None:
        """A message is sent at once, takes the place of the edited one, or goes before those that are held."""
        before, edited, sent = self.outbox.queue, self.outbox.edited, len(self.sent)
        idle = self.outbox.phase is Phase.IDLE
        self.alive.add(new.text)
        result = self.outbox.offer(new)
        expected = [each.message.text for each in before]
        if result is SendResult.REFUSED:
            assert self.outbox.phase is Phase.FAILED
            self.alive.remove(new.text)
            assert texts(self.outbox) == expected
            return
        if edited is not None:
            self.alive.remove(expected[edited])
            expected[edited] = new.text
        else:
            expected.insert([each.held for each in before].count(False), new.text)
        at = expected.index(new.text)
        if idle and at == 0:
            assert (result, self.sent[sent:]) == (SendResult.SENT, [expected.pop(0)])
        else:
            assert (result, self.sent[sent:]) == (SendResult.QUEUED, [])
            assert self.outbox.queue[at].held == (edited is not None and before[at].held and at > 0)
        assert texts(self.outbox) == expected
        assert self.outbox.edited is None

    @precondition(lambda self: self.running is not None or self.outbox.phase is Phase.LOADING)
    @rule(roll_back=st.booleans())
    def end(self, roll_back: bool) -> None:
        """The turn ends, or the model is loaded. A turn that is rolled back holds the queue and returns its message."""
        text, self.running = self.running, None
        if text is not None and roll_back:
            assert self.outbox.typed(text) == f"typed {text}"
            self.outbox.hold()
            self.outbox.put_back(message(text))
            self.sent.remove(text)
            self.alive.add(text)
            assert texts(self.outbox)[0] == text
        self.outbox.idle()
        self._advance()

    def _advance(self) -> None:
        """What is sent is the first of the queue, and only if it is neither held nor edited."""
        before, first = texts(self.outbox), next(iter(self.outbox.queue), None)
        blocked = first is None or first.held or self.outbox.edited == 0 or self.outbox.phase is not Phase.IDLE
        sent = self.outbox.send_next()
        assert sent == (None if blocked else before[0])
        assert texts(self.outbox) == (before if blocked else before[1:])

    @precondition(lambda self: self.outbox.queue)
    @rule(data=st.data())
    def edit(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.outbox.queue) - 1))
        assert self.outbox.edit(index) == f"typed {texts(self.outbox)[index]}"
        assert self.outbox.edited == index

    @rule()
    def end_edit(self) -> None:
        self.outbox.end_edit()
        assert self.outbox.edited is None
        self._advance()

    @precondition(lambda self: self.outbox.queue)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        before, edited = texts(self.outbox), self.outbox.edited
        index = data.draw(st.integers(0, len(before) - 1))
        dropped = self.outbox.drop(index).text
        assert dropped == before[index]
        self.alive.remove(dropped)
        assert texts(self.outbox) == before[:index] + before[index + 1 :]
        if edited is not None:
            assert self.outbox.edited == (None if edited == index else edited - (index < edited))
        self._advance()

    @precondition(lambda self: len(self.outbox.queue) > 6)
    @rule()
    def clear(self) -> None:
        before = texts(self.outbox)
        assert [each.text for each in self.outbox.clear()] == before
        self.alive -= set(before)
        assert (self.outbox.queue, self.outbox.edited) == ((), None)

    @rule()
    def hold(self) -> None:
        before = texts(self.outbox)
        self.outbox.hold()
        assert (texts(self.outbox), self.outbox.waiting) == (before, 0)

    @rule()
    def resume(self) -> None:
        before = texts(self.outbox)
        self.outbox.resume()
        assert (texts(self.outbox), self.outbox.waiting) == (before, len(before))
        self._advance()

    @precondition(lambda self: self.running is None)
    @rule()
    def load_another_model(self) -> None:
        self.outbox.loading()

    @precondition(lambda self: self.count > 20)
    @rule()
    def fail(self) -> None:
        text, self.running = self.running, None
        self.outbox.failed()
        if text is not None:
            self.sent.remove(text)
            self.alive.add(text)
            assert texts(self.outbox)[0] == text
        assert self.outbox.send_next() is None
        self.outbox.idle()  # an event that was on its way
        self.outbox.resume()
        assert self.outbox.send_next() is None

    @invariant()
    def nothing_is_lost_and_held_messages_are_last(self) -> None:
        queue = texts(self.outbox)
        assert sorted(queue) == sorted(self.alive)
        assert len(set(self.sent)) == len(self.sent)
        held = [each.held for each in self.outbox.queue]
        assert held == sorted(held)
        assert self.outbox.waiting == held.count(False)


TestOutbox = OutboxMachine.TestCase
TestOutbox.settings = settings(stateful_step_count=30)
