"""The log of a resumed session, and whether its ids fit the model."""

from __future__ import annotations

from array import array
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from streamchat.conversation.log import TokenLog
from streamchat.sessions.resume import ResumeResult, _fill_log, _fits_the_model, _turn_starts
from streamchat.store.records import CacheMark, SessionInfo, StoredSession, StoredTurn

VOCABULARY = 100


def turns(*states: Any) -> tuple[StoredTurn, ...]:
    """Turns of 5 ids each, behind a system block of 3."""
    return tuple(
        StoredTurn(i + 1, f"m{i}", f"r{i}", 3 + 5 * i, 4 + 5 * i, 6 + 5 * i, array("i", range(5)), CacheMark(), state)
        for i, state in enumerate(states)
    )


def session(*given: StoredTurn, system: list[int] = [7, 8, 9], **about: Any) -> StoredSession:  # noqa: B006 - only read
    named: dict[str, Any] = dict.fromkeys(("title", "model", "model_name", "dtype", "fingerprint"), "")
    named |= {"id": "s1", "created": 0.0, "updated": 0.0, "settings": {}, "tokenizer": "t", "held": ((0, 8),)}
    return StoredSession(SessionInfo(**(named | about)), array("i", system), given)


@pytest.mark.parametrize(
    ("states", "ends"),
    [((), []), (("running",), [None]), (("done",), [8]), (("done", "running"), [8, None]), (("done",) * 2, [8, 13])],
)
def test_the_log_has_all_ids_and_only_a_running_turn_has_no_end(
    states: tuple[str, ...], ends: list[int | None]
) -> None:
    log = TokenLog(array("i", [1]))
    conversation: Any = SimpleNamespace(log=log, system_tokens=0)
    _fill_log(conversation, array("i", [7, 8, 9]), turns(*states))
    assert log.ids.tolist() == [7, 8, 9, *list(range(5)) * len(states)]
    assert conversation.system_tokens == 3
    assert [turn.end for turn in log.turns] == ends
    assert [turn.reply_start for turn in log.turns] == [6 + 5 * i for i in range(len(states))]


def test_a_snapshot_needs_no_reason_and_gives_no_message_back() -> None:
    assert ResumeResult(1.0) == ResumeResult(1.0, 0, "", 0, (), "", False, ())


@pytest.mark.parametrize("count", [1, 2, 3])
def test_turns_can_be_cut_where_the_newest_one_could(count: int) -> None:
    given = [
        replace(turn, before=CacheMark(turn_starts=tuple(range(turn.number)))) for turn in turns(*["done"] * count)
    ]
    conversation: Any = SimpleNamespace(log=range(3 + 5 * count), cache=SimpleNamespace(num_sink_tokens=2))
    starts = [*range(count), 3 + 5 * (count - 1)]
    assert _turn_starts(conversation, given, session(*given)) == starts
    assert _turn_starts(conversation, [], session()) == []


def test_ids_beyond_the_vocabulary_do_not_fit() -> None:
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=VOCABULARY))
    conversation: Any = SimpleNamespace(model=SimpleNamespace(config=config))
    [first, second] = turns("done", "done")
    assert _fits_the_model(conversation, session(first, second))
    for ids in ([1, VOCABULARY], [VOCABULARY, 1], [VOCABULARY + 1]):
        other = StoredTurn(2, "", "", 8, 9, 11, array("i", ids))
        assert not _fits_the_model(conversation, session(first, other))
        assert not _fits_the_model(conversation, session(first, system=ids))
        assert _fits_the_model(conversation, session(first, other, tokenizer=""))  # they are not used
    assert _fits_the_model(conversation, session(StoredTurn(1, "", "", 8, 9, 11, array("i", [VOCABULARY - 1]))))
    assert not _fits_the_model(conversation, session(first, second, held=()))  # none is cached
    assert _fits_the_model(conversation, session(*turns("running"), held=()))
    assert not _fits_the_model(conversation, session(*turns("done", "running"), held=()))
    assert _fits_the_model(conversation, session(system=[]))
