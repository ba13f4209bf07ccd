"""A conversation between turns and after failures: what an undo, a rewind, a new format, and a lack of memory leave."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from streamchat.base import events as ev
from streamchat.base.errors import ConfigError, TurnError
from streamchat.conversation import conversation as module
from streamchat.conversation.generation import _require_finite, require_room
from streamchat.conversation.log import TurnStart
from streamchat.conversation.rollback import UndoResult
from streamchat.conversation.summarize import summarize
from streamchat.store.records import CacheMark
from tests.support.scripted_model import Chat, make_chat


def talk(turns: int = 3, **settings: Any) -> Chat:
    chat = make_chat(**({"cache_size": 256, "max_new_tokens": 16, "seed": 3} | settings))
    for number in range(1, turns + 1):
        chat.say(f"question {number}", f"the answer {number}")
    return chat


def facts(chat: Chat) -> dict[str, Any]:
    conversation = chat.conversation
    cache = conversation.cache
    return {
        "ids": conversation.log.ids.tolist(),
        "turns": [(turn.number, turn.start, turn.end, turn.text) for turn in conversation.log.turns],
        "runs": list(cache.ledger.runs),
        "pins": cache.pins,
        "starts": list(cache.turn_starts),
        "generator": conversation.rng_state.tolist(),
        "speed": conversation.speed,
        "muted": conversation.is_muted,
    }


def test_an_undo_restores_speed_and_generator_unless_the_latter_shall_stay() -> None:
    chat = talk(2)
    conversation = chat.conversation
    before = facts(chat)
    for restore in (True, False):
        chat.say("one more", "and its reply")
        conversation._generator.manual_seed(77)
        conversation.undo(restore_rng=restore)
        assert facts(chat) == before | ({} if restore else {"generator": conversation.rng_state.tolist()})
        assert (conversation.rng_state.tolist() == before["generator"]) is restore


def test_the_generator_starts_again_from_the_seed_of_the_settings() -> None:
    conversation = talk(0).conversation
    first = conversation.rng_state
    conversation._generator.manual_seed(77)
    conversation.reseed()
    assert torch.equal(conversation.rng_state, first)
    conversation.rng_state = torch.Generator().manual_seed(5).get_state()
    assert torch.equal(conversation.rng_state, torch.Generator().manual_seed(5).get_state())


def test_what_could_not_be_restored_is_emitted(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = talk(2)
    undone = UndoResult(missing=5, unpinned=(1,))
    monkeypatch.setattr(chat.conversation.rollback, "undo", lambda turn, *, pins_of_then: undone)
    chat.events.clear()
    assert chat.conversation.undo() is undone
    assert [event.text[:10] for event in chat.of(ev.Notice)] == ["Turn 1 is ", "Out of mem"]


def test_an_undo_by_number_removes_that_turn_and_all_later_ones() -> None:
    chat = talk(1)
    before = facts(chat)
    for _ in range(3):
        chat.say("one more", "and its reply")
    chat.conversation.undo(2)
    assert facts(chat) == before
    chat.conversation.log.turns[0].before = None
    with pytest.raises(ConfigError, match="turn 1 is too old to undo; only the last 64 turns can be undone"):
        chat.conversation.undo()
    assert facts(chat) == before


# --- rewind ---------------------------------------------------------------------------------------------------------


def test_a_rewind_undoes_later_turns_and_pins() -> None:
    chat = talk(2)
    before = facts(chat)
    chat.say("one more", "and its reply")
    chat.conversation.set_pin(1, True)
    chat.say("one more", "and its reply")
    chat.conversation.rewind(2, {})
    assert facts(chat) == before


def test_a_rewind_behind_the_reach_of_undo_uses_the_saved_marks() -> None:
    chat, other = talk(4), talk(4)
    turns = chat.conversation.log.turns
    marks = {turn.number: turn.before.cache for turn in turns if turn.before is not None}
    for turn in turns[:3]:
        turn.before = None
    chat.conversation.rewind(2, marks)
    assert [turn.before is None for turn in chat.conversation.log.turns] == [False, False]
    assert chat.conversation.log.turns[1].before == TurnStart(marks[2])
    other.conversation.rewind(2, {})
    assert chat.conversation.cache.ledger.runs == other.conversation.cache.ledger.runs
    assert len(chat.conversation.log) == len(other.conversation.log)


def test_a_rewind_without_any_mark_prefills_everything_that_fits() -> None:
    chat = talk(4)
    turns = chat.conversation.log.turns
    stop = turns[2].start
    turns[2].before = None
    result = chat.conversation.rewind(2, {})
    assert chat.conversation.cache.ledger.runs == [(0, stop)]
    assert (len(chat.conversation.log), len(chat.conversation.log.turns), result.missing) == (stop, 2, 0)


def test_marks_replace_none_that_is_known() -> None:
    chat = talk(4)
    known = chat.conversation.log.turns[1].before
    chat.conversation.rewind(3, {2: CacheMark(), 4: CacheMark()})
    assert chat.conversation.log.turns[1].before is known


def test_the_mark_of_a_full_cache() -> None:
    chat = talk(3)
    conversation, turns = chat.conversation, chat.conversation.log.turns
    system, first, second = conversation.system_tokens, turns[0].start, turns[1].start
    conversation.cache.compression_count = 7
    assert conversation.full_mark(2) == CacheMark(((0, turns[2].start),), ((0, system),), (first, second), 7)
    everything = CacheMark(((0, len(conversation.log)),), ((0, system),), (first, second, turns[2].start), 7)
    assert conversation.full_mark(3) == everything
    assert conversation.full_mark(0) == CacheMark(((0, first),), ((0, system),), (), 7)
    empty = talk(0, template=None, system_prompt="").conversation
    if not empty.system_tokens:
        assert empty.full_mark(0) == CacheMark((), (), (), 0)


# --- formats --------------------------------------------------------------------------------------------------------


def test_another_format_is_for_later_turns_only() -> None:
    chat = talk(1)
    conversation = chat.conversation
    before, ids = conversation.encoder.format, conversation.log.ids.tolist()
    assert conversation.change_format(replace(before, generation="<|im_end|>\n<|im_start|>other\n")) is False
    assert conversation.log.ids.tolist() == ids
    chat.say("And?", "So.")
    newest = conversation.log.turns[-1]
    assert "<|im_start|>other\n" in chat.tokenizer.decode(conversation.log.ids[newest.start :].tolist())


def test_a_format_with_another_start_begins_again_if_there_are_no_turns() -> None:
    chat = talk(0)
    conversation = chat.conversation
    other = replace(conversation.encoder.format, system_open="<|im_start|>system\nHello. ")
    assert conversation.change_format(other) is True
    assert chat.tokenizer.decode(conversation.log.ids.tolist()).startswith("<|im_start|>system\nHello. ")
    assert conversation.cache.pins == ((0, conversation.system_tokens),)
    chat.say("one", "two")
    ids = conversation.log.ids.tolist()
    assert conversation.change_format(replace(other, system_open="<|im_start|>system\nBye. ")) is False
    assert conversation.log.ids.tolist() == ids
    assert conversation.encoder.format.system_open == other.system_open


def test_starting_over_forgets_everything() -> None:
    chat = talk(2)
    conversation = chat.conversation
    fresh = talk(0)
    conversation.set_pin(1, True)
    conversation.speculator.proposed = 5
    conversation.start_over(conversation.encoder.format)
    for name in ("ids", "turns", "runs", "pins", "starts", "speed", "muted"):
        assert facts(chat)[name] == facts(fresh)[name], name
    assert (conversation.system_tokens, conversation.speculator.proposed) == (fresh.conversation.system_tokens, 0)
    conversation.start_over(conversation.encoder.format, prefill=False)
    assert (len(conversation.log), conversation.cache.length, conversation.cache.pins) == (0, 0, ())
    assert conversation.system_tokens == fresh.conversation.system_tokens


def test_a_start_that_does_not_fit_changes_nothing() -> None:
    chat = talk(1, cache_size=64)
    before = facts(chat)
    encoder = chat.conversation.encoder
    with pytest.raises(ConfigError, match="the system prompt"):
        chat.conversation.start_over(replace(encoder.format, system_prompt="word " * 80))
    assert facts(chat) == before
    assert chat.conversation.encoder is encoder


# --- muted turns, logits, texts -------------------------------------------------------------------------------------


def test_a_muted_turn_emits_nothing_and_everything_is_as_before_it() -> None:
    chat = talk(2)
    conversation, before = chat.conversation, facts(chat)
    own, count = conversation.settings, len(chat.events)
    other = replace(own, temperature=0.1)

    def hidden() -> None:
        with conversation.muted(other):
            assert (conversation.is_muted, conversation.settings) == (True, other)
            chat.say("hidden", "text")
            conversation.undo()
            raise ValueError("stop here")

    with pytest.raises(ValueError, match="stop here"):
        hidden()
    assert (conversation.settings, len(chat.events)) == (own, count)
    assert facts(chat) == before
    chat.say("shown", "text")
    assert len(chat.events) > count


def test_the_next_logits_leave_cache_and_log_as_they_are() -> None:
    chat = talk(2)
    before = facts(chat)
    first = chat.conversation.next_logits().clone()
    assert torch.allclose(chat.conversation.next_logits(), first, atol=2e-5, rtol=0)
    assert facts(chat) == before


def test_the_text_of_ids_is_what_a_reply_shows() -> None:
    chat = talk(0)
    ids = chat.tokenizer("  Hello there", add_special_tokens=False)["input_ids"]
    assert chat.conversation.text_of(ids) == "Hello there"
    assert chat.conversation.text_of([*ids, chat.tokenizer.eos_token_id]) == "Hello there"
    chat.conversation.stop_strings = ("llo",)
    assert chat.conversation.text_of(ids) == "He"
    assert chat.conversation.shown == ""
    chat.say("Hi", "Good day")
    assert chat.conversation.shown == "Good day"


def test_a_closed_conversation_no_longer_watches_its_model() -> None:
    chat = talk(1)
    conversation = chat.conversation
    count = len(conversation.model._forward_pre_hooks)
    conversation.close()
    assert len(conversation.model._forward_pre_hooks) == count - 1
    conversation.reopen()
    chat.say("again", "fine")
    chat.check()


def test_the_captured_steps_are_those_of_the_model_and_its_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    conversation: Any = talk(0).conversation
    recorded = list[Any]()
    monkeypatch.setattr(module, "record_used", lambda *given: recorded.append(given))
    monkeypatch.setattr(module, "recorded_step", lambda model: ("the step of", model))
    conversation.record_steps()
    assert recorded == [(conversation.model, conversation.cache)]
    assert conversation.recorded_step == ("the step of", conversation.model)


# --- failures -------------------------------------------------------------------------------------------------------


def failing(chat: Chat, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> TurnError | BaseException:
    """What a turn raises whose prefill raises `error`; nothing else may have changed."""
    before = facts(chat)

    def feed(*_: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(chat.conversation.feeder, "feed", feed)
        with pytest.raises(BaseException) as raised:  # noqa: PT011 - its type is what is tested
            chat.say("one more", "text")
    assert facts(chat) == before
    return raised.value


def test_a_turn_without_memory_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    released: list[Any] = []
    monkeypatch.setattr(module, "release_memory", released.append)
    found = failing(talk(1), monkeypatch, MemoryError())
    assert isinstance(found, TurnError)
    assert found.failure == "out_of_memory"
    assert str(found).startswith("out of memory in turn 2 (")
    assert str(found).endswith(" tokens); it was rolled back; try a shorter message or a smaller --cache-size")
    assert released == [torch.device("cpu")]


def test_other_errors_of_a_turn_are_raised_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError("a shape is wrong")
    assert failing(talk(1), monkeypatch, error) is error


def test_values_that_are_not_finite_are_replaced_before_and_after_the_undo(monkeypatch: pytest.MonkeyPatch) -> None:
    chat, calls = talk(1), list[str]()
    cache, undo = chat.conversation.cache, chat.conversation.undo
    monkeypatch.setattr(cache, "replace_not_finite", lambda: calls.append("replace"))

    def noted() -> UndoResult:
        calls.append("undo")
        return undo()

    monkeypatch.setattr(chat.conversation, "undo", noted)
    failing(chat, monkeypatch, TurnError("the model produced NaN", "not_finite"))
    assert calls == ["replace", "undo", "replace"]
    calls.clear()
    failing(chat, monkeypatch, TurnError("the cache is full", "cache_full"))
    assert calls == ["undo"]


def test_a_turn_that_is_stopped_in_its_prompt_is_rolled_back(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = talk(1)
    before = facts(chat)
    outcome = chat.say("one more", "text", lambda: True)
    assert (outcome.turn, outcome.reply, outcome.finish_reason, outcome.rolled_back) == (2, "", "cancelled", True)
    assert outcome.prompt_tokens > 0
    assert facts(chat) == before


def paging(chat: Chat, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> list[Any]:
    """The prefills after a page-in that raises `error`."""
    prefilled: list[Any] = []

    def fail(*_: Any) -> None:
        chat.conversation.cache.pins = ((0, 200),)
        raise error

    monkeypatch.setattr(module, "page_in_turn", fail)
    monkeypatch.setattr(chat.conversation.feeder, "prefill_runs", lambda *given: prefilled.append(given))
    return prefilled


def test_paging_in_without_memory_prefills_what_is_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = talk(2)
    pins = chat.conversation.cache.pins
    prefilled = paging(chat, monkeypatch, MemoryError())
    with pytest.raises(ConfigError, match="turn 1 cannot be paged in: not enough memory"):
        chat.conversation.page_in(1)
    assert chat.conversation.cache.pins == pins
    assert prefilled == [(chat.conversation.cache.ledger.runs, len(chat.conversation.log))]


def test_paging_in_that_fails_otherwise_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = talk(2)
    prefilled = paging(chat, monkeypatch, RuntimeError("a shape is wrong"))
    with pytest.raises(RuntimeError, match="a shape is wrong"):
        chat.conversation.page_in(1)
    assert prefilled == []


def test_with_on_full_stop_nothing_is_recalled_and_a_full_cache_is_said() -> None:
    chat = talk(1, on_full="stop", cache_size=64)
    cache: Any = chat.conversation.cache
    cache.recalled = ((5, 6),)
    chat.script[:] = [chat.tokenizer.eos_token_id]
    chat.conversation.run_turn("x", lambda: False, recall=[1])
    assert cache.recalled == ()
    assert [notice.text for notice in chat.of(ev.Notice)] == [
        "No turn was recalled: with on_full = stop, nothing may be evicted."
    ]
    before = facts(chat)
    with pytest.raises(
        TurnError, match=r"^the cache is full: turn 3 needs at least \d+ tokens, and \d+ of 64 are free"
    ):
        chat.say("a long message, " * 20, "text")
    assert facts(chat) == before


def test_the_room_of_a_turn_is_its_prompt_one_token_and_the_close() -> None:
    conversation = talk(1).conversation
    cache, encoder = conversation.cache, conversation.encoder
    most = cache.cache_size - cache.length - 1 - len(encoder.close())
    require_room(cache, encoder, 2, most)
    with pytest.raises(TurnError, match=f"turn 2 needs at least {most + 2 + len(encoder.close())} tokens") as raised:
        require_room(cache, encoder, 2, most + 1)
    assert raised.value.failure == "cache_full"


@pytest.mark.parametrize(
    ("value", "is_finite"), [(0.0, True), (-torch.inf, True), (torch.inf, False), (torch.nan, False)]
)
def test_logits_may_be_minus_infinity_and_nothing_else(value: float, is_finite: bool) -> None:
    logits = torch.zeros(9)
    logits[3] = value
    if is_finite:
        assert _require_finite(logits) is logits
    else:
        with pytest.raises(TurnError, match="NaN/inf logits") as raised:
            _require_finite(logits)
        assert raised.value.failure == "not_finite"


def test_a_given_reply_is_shown_and_counted() -> None:
    chat = talk(1)
    chat.events.clear()
    outcome = chat.conversation.run_turn("What is it?", lambda: False, reply="A sea.")
    turn = chat.conversation.log.turns[-1]
    assert (outcome.turn, outcome.reply, outcome.finish_reason, outcome.new_tokens) == (2, "A sea.", "stop", 0)
    assert outcome.prompt_tokens == turn.prompt_end - turn.start  # type: ignore[operator]
    assert (turn.reply, turn.end, turn.given) == ("A sea.", len(chat.conversation.log), True)
    assert [delta.text for delta in chat.of(ev.TextDelta)] == ["A sea."]


def test_a_generated_reply_is_counted_and_timed() -> None:
    chat = talk(1)
    outcome = chat.say("What is it?", "A sea, and more of it.")
    turn = chat.conversation.log.turns[-1]
    reply = chat.tokenizer("A sea, and more of it.", add_special_tokens=False)["input_ids"]
    assert (outcome.turn, outcome.finish_reason, outcome.new_tokens) == (2, "stop", len(reply))
    assert outcome.prompt_tokens == turn.prompt_end - turn.start  # type: ignore[operator]
    assert outcome.speed is chat.conversation.speed
    assert 0 < outcome.speed.ttft_s < 1000  # type: ignore[operator]
    assert outcome.speed.decode_tps > 0  # type: ignore[operator]
    assert chat.say("And?", [chat.tokenizer.eos_token_id]).speed.decode_tps is None


def test_a_summary_names_the_turns_and_leaves_nothing() -> None:
    chat = talk(4)
    before, notices = facts(chat), list[ev.Event]()
    ids = chat.tokenizer("They talked.", add_special_tokens=False)["input_ids"]
    chat.script[:] = [*ids, chat.tokenizer.eos_token_id]
    ready = summarize(chat.conversation, lambda: False, notices.append)
    assert (ready.text, ready.turns) == ("They talked.", (1, 2))
    assert notices == [ev.Notice("Summarizing turns 1 to 2, next to be evicted …")]
    assert facts(chat) == before
