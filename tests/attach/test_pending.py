"""What becomes of the requests of a front end whose connection was lost."""

from __future__ import annotations

from streamchat.attach.pending import PendingRequests
from streamchat.base import events as ev
from streamchat.base.requests import Compact, CountTokens, Edit, Quote, Request, Retry, Submit, Undo
from streamchat.engine.missing_turn import missing_turn


def resumed(*texts: str, restored: str = "") -> ev.ConversationResumed:
    """A state with these turns."""
    info = ev.ModelInfo("tiny", "", "cpu", "float32", 1, 1, 64, 64, 4, 0, "sdpa", "template")
    turns = tuple(ev.SavedTurn(number, text, "reply") for number, text in enumerate(texts, 1))
    return ev.ConversationResumed("abc", "", turns, ev.CacheState(), info, "", 0.0, restored_message=restored)


def pending(*requests: Request, received: int = 0) -> PendingRequests:
    made = PendingRequests()
    for request in requests:
        made.add(request)
    made.received(received)
    return made


def ends(made: PendingRequests, *events: ev.Event, unfinished: tuple[int, ...] = ()) -> list[tuple[str, bool]]:
    """(message, whether it is given back) of each turn whose end is made up."""
    found = made.ends_before(events, unfinished)
    return [(event.text, event.rolled_back) for event in found if isinstance(event, ev.TurnFinished)]


def test_a_message_that_the_session_does_not_have_is_given_back() -> None:
    made = pending(Submit("known"), Submit("lost"), Edit("restored"), received=3)
    assert ends(made, resumed("known", restored="restored")) == [("", False), ("lost", True), ("", False)]
    assert not made.busy


def test_turns_that_still_run_or_were_not_received_are_not_ended() -> None:
    made = pending(Submit("running"), Submit("not received"), received=1)
    assert ends(made, resumed(), unfinished=(1,)) == []
    assert made.busy
    assert [asked.number for asked in made.unreceived()] == [2]
    assert made.unreceived_texts == ["not received"]


def test_turns_without_an_own_message_are_ended_without_one() -> None:
    made = pending(Retry(), Quote("quoted", "Noted.", True), Compact(), received=3)
    found = made.ends_before((resumed("a"),), ())
    assert found == [missing_turn(""), missing_turn(""), ev.SummaryReady("", (0, 0))]


def test_own_turns_are_told_from_those_of_others() -> None:
    made = pending(Undo(), Submit("mine"), Submit("mine, too"))
    assert made.is_own(missing_turn("mine, too"))
    assert not made.is_own(missing_turn("of another"))
    assert made.busy
    assert made.is_own(missing_turn("mine"))
    assert not made.busy


def test_a_turn_that_is_paged_in_ends_the_quote_of_it() -> None:
    made = pending(Quote("two", "Noted.", True, turn=2), Quote("three", "Noted.", True, turn=3))
    for turn, is_busy in ((1, True), (3, True), (2, False)):
        made.paged_in(ev.TurnPagedIn(turn, 10, 0.1, ev.CacheState()))
        assert made.busy == is_busy


def test_a_count_that_was_lost_is_ended() -> None:
    """A pipe waits for it."""
    made = pending(CountTokens("counted"), CountTokens("lost"), CountTokens("not received"), received=2)
    made.counted(ev.TextCounted("counted", 3))
    assert made.ends_before((resumed(),), ()) == [ev.TextCounted("lost", 0)]
    assert made.ends_before((resumed(),), ()) == []
