"""The loop guard: what counts as a loop, and that a reply that loops ends as one, wherever its tokens come from."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from streamchat.base import events as ev
from streamchat.config.settings import LoopGuard
from streamchat.conversation.loops import LONGEST, REPEATS, SMALL_MODEL, TOKENS, LoopWatch, is_guarded
from tests.support.scripted_model import make_chat
from tools.loops import legitimate_texts, stopped_at

WORDS = range(10, 50)


def ends_in_loop(ids: Sequence[int]) -> bool:
    """Compare whole cycles at the end of the text."""
    for period in range(1, LONGEST + 1):
        length = max(REPEATS * period, TOKENS)
        end = ids[-length:]
        if len(end) == length and all(end[at] == end[at - period] for at in range(period, length)):
            return True
    return False


def test_a_loop_is_what_whole_cycles_show() -> None:
    for seed in range(8):
        chance, watch, ids = random.Random(seed), LoopWatch(), list[int]()
        cycle = [chance.randrange(3) for _ in range(chance.choice([1, 2, 3, 7, 20, 21, 22, 40, 90]))]
        text = [chance.randrange(3) for _ in range(30)] + cycle * 700
        text[200] = 9  # the loop starts again
        for token in text[:700]:
            ids.append(token)
            assert watch.is_loop_with(token) == ends_in_loop(ids), (seed, len(ids))


@pytest.mark.parametrize(("period", "needed"), [(1, TOKENS), (2, TOKENS), (40, 6 * 40), (LONGEST, 6 * LONGEST)])
def test_short_cycles_need_more_repeats_than_sentences(period: int, needed: int) -> None:
    ids = list(range(period)) * 700
    assert stopped_at(ids, REPEATS, TOKENS) == needed


def test_a_cycle_that_is_too_long_is_not_seen() -> None:
    assert stopped_at(list(range(LONGEST + 1)) * 20, REPEATS, TOKENS) is None


def test_text_that_repeats_for_good_reasons_is_no_loop() -> None:
    """By characters and by words; `python -m tools.loops` reads the same texts in the tokens of a model."""
    texts = legitimate_texts()
    for name, text in texts.items():
        words = [hash(word) for word in text.split(" ")]
        assert stopped_at(words, REPEATS, TOKENS) is None, name
    assert stopped_at([ord(letter) for letter in texts["multiplication table"]], REPEATS, TOKENS) is None
    assert stopped_at([ord(letter) for letter in "ha " * 200], REPEATS, TOKENS) is not None


@pytest.mark.parametrize(
    ("setting", "parameters", "expected"),
    [("auto", SMALL_MODEL - 1, True), ("auto", SMALL_MODEL, False), ("on", SMALL_MODEL, True), ("off", 1, False)],
)
def test_small_models_are_guarded_by_default(setting: LoopGuard, parameters: int, expected: bool) -> None:
    assert is_guarded(setting, parameters) == expected


# --- in a conversation ------------------------------------------------------------------------------------------------


def test_a_reply_that_loops_ends_and_the_conversation_goes_on() -> None:
    chat = make_chat(cache_size=96, max_new_tokens=400, loop_guard="auto")
    start, cycle = [30, 31, 32], [40, 41, 42, 43, 44, 45, 46, 47]
    outcome = chat.say("tell me", start + cycle * 60)
    assert (outcome.finish_reason, outcome.new_tokens) == ("loop", len(start) + TOKENS)
    assert outcome.reply == "".join(event.text for event in chat.of(ev.TextDelta))
    assert not outcome.rolled_back
    assert any(event.trigger == "decode" for event in chat.of(ev.TokensEvicted))
    chat.check()
    assert chat.say("and now?", "Fine.").reply == "Fine."
    chat.check()


def test_without_the_guard_it_runs_to_the_limit() -> None:
    chat = make_chat(max_new_tokens=200, loop_guard="off")
    outcome = chat.say("tell me", [40, 41] * 100)
    assert (outcome.finish_reason, outcome.new_tokens) == ("length", 200)


def test_each_reply_is_watched_by_itself() -> None:
    chat = make_chat(max_new_tokens=TOKENS - 1, loop_guard="on")
    for _ in range(3):
        assert chat.say("again", [40] * TOKENS).finish_reason == "length"


def test_a_looping_reply_is_undone_as_any_other() -> None:
    chat = make_chat(max_new_tokens=400, loop_guard="on")
    chat.say("first", "One.")
    before = list(chat.conversation.log.ids)
    assert chat.say("second", [40] * 300).finish_reason == "loop"
    chat.conversation.undo()
    assert list(chat.conversation.log.ids) == before
    chat.check()


def test_the_cycle_is_the_shortest_that_occurs_twice_at_the_end() -> None:
    for seed in range(6):
        chance, watch, ids = random.Random(seed), LoopWatch(), list[int]()
        cycle = [chance.randrange(3) for _ in range(chance.choice([1, 2, 3, 7, 20]))]
        for token in [chance.randrange(3) for _ in range(20)] + cycle * 8:
            ids.append(token)
            watch.is_loop_with(token)
            assert watch.cycle == shortest_cycle(ids), (seed, len(ids))


def shortest_cycle(ids: Sequence[int]) -> tuple[int, int]:
    """Compare whole cycles at the end of the text."""
    for period in range(1, min(LONGEST, len(ids) // 2) + 1):
        end, times = ids[-period:], 1
        while ids[len(ids) - (times + 1) * period : len(ids) - times * period] == end:
            times += 1
        if times > 1:
            return period, times
    return 0, 0
