"""Which session a history continues, decided by the digests of its turns."""

from __future__ import annotations

import pytest

from streamchat.server.calls import Exchange
from streamchat.server.known import MAX_KNOWN, KnownSession, KnownSessions, ReplyId, stamp_of, turn_key

PAST = [Exchange(f"message {number}", f"reply {number}") for number in range(100)]


def session_with(*numbers: int, scope: str = "") -> KnownSession:
    """A saved session with these of the exchanges."""
    session = KnownSession(None, scope)
    session.set_turns(turn_key(str(PAST[number].message), PAST[number].reply) for number in numbers)
    return session


def known(*sessions: KnownSession) -> KnownSessions:
    found = KnownSessions()
    for session in sessions:
        found.add(session)
    return found


@pytest.mark.parametrize(
    ("history", "turns", "exchanges", "is_whole"),
    [
        (PAST[:10], 10, 10, True),
        (PAST[:3], 3, 3, True),
        (PAST[8:10], 10, 2, False),
        (PAST[5:8], 8, 3, False),
        ([Exchange(None, "reply 7"), *PAST[8:10]], 10, 3, False),
        ([Exchange(None, "reply 0"), *PAST[1:10]], 10, 10, False),
        ([Exchange(None, "reply 0"), *PAST[1:4]], 4, 4, False),
        ([*PAST[:4], Exchange("an edit", "its reply")], 4, 4, True),
        ([*PAST[5:9], Exchange("message 9", "repl")], 9, 4, False),
        ([Exchange(" message 0\n", "\treply 0 ")], 1, 1, True),
        ([Exchange("message 0", "<think>\nhm\n</think>\n\nreply 0")], 1, 1, True),
    ],
)
def test_what_matches(history: list[Exchange], turns: int, exchanges: int, is_whole: bool) -> None:
    session = session_with(*range(10))
    match = known(session, session_with(50, 51)).match(history, None, "")
    assert match is not None
    assert match.session is session
    assert (match.turns, match.exchanges, match.is_whole) == (turns, exchanges, is_whole)


@pytest.mark.parametrize(
    "history",
    [
        [],
        PAST[9:10],
        [Exchange("message 0", "another")],
        [Exchange("another", "reply 0")],
        [PAST[8], PAST[7]],
        [PAST[7], PAST[9]],
        [*PAST[:2], PAST[3], PAST[2]][2:],
    ],
)
def test_what_does_not_match(history: list[Exchange]) -> None:
    assert known(session_with(*range(10))).match(history, None, "") is None


def test_a_reply_that_was_cut_off_in_its_reasoning_is_an_empty_one_for_the_client() -> None:
    session = session_with(0, 1)
    session.add_turn(turn_key("message 2", "<think>\nlet me see"))
    match = known(session).match([*PAST[:2], Exchange("message 2", "")], None, "")
    assert match is not None
    assert (match.turns, match.exchanges) == (3, 3)


def test_turns_that_cannot_be_undone_do_not_match() -> None:
    """The last 64 can: turn 36 of 100 is the oldest to continue after."""
    session = session_with(*range(100))
    assert known(session).match(PAST[:36], None, "") is not None
    assert known(session).match(PAST[:35], None, "") is None
    assert known(session).match(PAST[20:35], None, "") is None


def test_an_end_of_two_conversations_matches_neither() -> None:
    one, other = session_with(1, 8, 9), session_with(2, 8, 9)
    assert known(one, other).match(PAST[8:10], None, "") is None
    match = known(one, other).match([PAST[2], *PAST[8:10]], None, "")
    assert match is not None
    assert match.session is other


def test_branches_of_one_conversation_match_the_one_that_ends_there() -> None:
    longer, branch = session_with(1, 2, 8, 9, 10), session_with(1, 2, 8, 9)
    match = known(branch, longer).match(PAST[8:10], None, "")
    assert match is not None
    assert match.session is branch


def test_scope_and_system_prompt_must_be_the_same() -> None:
    sessions = known(session_with(0, 1, scope="a"))
    assert sessions.match(PAST[:2], None, "") is None
    assert sessions.match(PAST[:2], "Be kind.", "a") is None
    assert sessions.match(PAST[:2], None, "a") is not None


def test_saved_sessions_are_dropped_when_there_are_too_many() -> None:
    sessions = known(*(KnownSession(None, id=f"s{number}") for number in range(MAX_KNOWN + 10)))
    assert len(list(sessions)) == MAX_KNOWN
    assert "s0" not in sessions
    assert f"s{MAX_KNOWN + 9}" in sessions


def test_ids_are_read_as_they_are_written() -> None:
    id_ = ReplyId("abcdef", 12, stamp_of(1700000000.123456))
    assert ReplyId.parse(str(id_)) == ReplyId.parse(f"resp_{id_}") == id_
    for text in ("", "abcdef", "abcdef_1", "abcdef_x_1", "ABC_1_1", "abcdef_1_1_1", "abcdef_1_é"):
        assert ReplyId.parse(text) is None


@pytest.mark.parametrize("saved", ["xvzt3p", "x00000", "abc123"])
def test_a_saved_session_may_have_an_id_that_begins_with_x(saved: str) -> None:
    assert KnownSession(None, id=saved).is_saved
    assert not KnownSession(None).is_saved
