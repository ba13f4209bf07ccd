"""The token log: which turn an index belongs to, and what a cut leaves."""

from __future__ import annotations

import pytest

from streamchat.conversation.log import TokenLog, TurnRecord


def a_log() -> TokenLog:
    """A system block of 3 tokens, turns at [3, 10), [10, 18), and a running one from 18 on."""
    log = TokenLog()
    log.append(range(100, 120))
    log.turns = [TurnRecord(1, 3, 4, end=10), TurnRecord(2, 10, 11, end=18), TurnRecord(3, 18, 19)]
    return log


def test_a_new_turn_has_no_texts_and_a_new_log_no_index() -> None:
    turn = a_log().turns[0]
    assert (turn.text, turn.reply, turn.given, turn.recalled) == ("", "", False, ())
    assert (a_log().unchanged, len(TokenLog())) == (0, 0)


@pytest.mark.parametrize(
    ("run", "turns"),
    [
        ((0, 3), []),
        ((0, 4), [1]),
        ((3, 4), [1]),
        ((9, 10), [1]),
        ((9, 11), [1, 2]),
        ((10, 18), [2]),
        ((10, 19), [2, 3]),
        ((17, 18), [2]),
        ((18, 19), [3]),
        ((500, 501), [3]),  # it has no end yet
        ((0, 500), [1, 2, 3]),
    ],
)
def test_the_turns_that_have_tokens_in_a_run(run: tuple[int, int], turns: list[int]) -> None:
    assert [turn.number for turn in a_log().turns_touching(*run)] == turns


def test_a_finished_turn_has_no_tokens_behind_its_end() -> None:
    log = a_log()
    log.turns[2].end = 20
    assert log.turns_touching(20, 30) == []
    assert [turn.number for turn in log.turns_touching(19, 30)] == [3]


@pytest.mark.parametrize(("index", "number"), [(0, 1), (3, 1), (4, 2), (10, 2), (11, 3), (18, 3), (19, 4)])
def test_the_first_turn_that_starts_at_or_after_an_index(index: int, number: int) -> None:
    assert a_log().first_turn_from(index) == number


def test_ids_at_runs_are_in_order() -> None:
    assert a_log().ids_at([(0, 2), (17, 20)]) == [100, 101, 117, 118, 119]
    assert a_log().ids_at([]) == []


def test_a_cut_removes_ids_and_what_was_unchanged_of_them() -> None:
    log = a_log()
    log.unchanged = 12
    log.cut(15)
    assert (log.ids.tolist(), log.unchanged) == (list(range(100, 115)), 12)
    log.cut(7)
    assert (len(log), log.unchanged) == (7, 7)


def test_clear_leaves_nothing() -> None:
    log = a_log()
    log.unchanged = 12
    log.clear()
    assert (len(log), log.turns, log.unchanged) == (0, [], 0)
