"""Turns on a living cache: what is fed, evicted, stopped and taken back. Ids are compared, not only counts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import pytest
import torch
from torch import Tensor

from streamchat.base import events as ev
from streamchat.base.errors import ConfigError, EvictionPlanError, TurnError
from streamchat.cache.eviction.policy import CacheView, Cut
from streamchat.conversation.conversation import Conversation
from streamchat.conversation.sampling import REPETITION_WINDOW
from tests.support import toy_tokenizer as toy
from tests.support.scripted_model import make_chat
from tests.support.toy_tokenizer import CHATML, THINKING

pytestmark = pytest.mark.smoke

EMOJI = "👨‍👩‍👧"


def rendered(chat: Any, turns: list[tuple[str, str]]) -> list[int]:
    """Ids of the whole conversation as the template renders it."""
    messages = []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    text = chat.tokenizer.apply_chat_template(messages, tokenize=False)
    ids: list[int] = chat.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def test_the_cache_holds_the_rendered_conversation_and_turns_feed_only_their_own_tokens() -> None:
    chat = make_chat()
    turns = [("What is the capital?", "Paris."), ("And then?", f"The sea {EMOJI}."), ("Thanks", "Welcome")]
    for i, (question, answer) in enumerate(turns):
        before = len(chat.conversation.log)
        outcome = chat.say(question, answer)
        assert outcome.reply == answer
        assert outcome.finish_reason == "stop"
        assert chat.cached == rendered(chat, turns[: i + 1])
        fed = sum(len(ids) for ids in chat.fed)
        assert fed == len(chat.conversation.log) - before
        assert chat.of(ev.TurnStarted)[-1].prompt_tokens == outcome.prompt_tokens
        chat.fed.clear()
        chat.check()
    assert "".join(event.text for event in chat.of(ev.TextDelta)) == "".join(answer for _, answer in turns)


def test_a_template_that_drops_thinking_from_history_is_never_rendered_again() -> None:
    chat = make_chat(template=THINKING)
    chat.say("one", "first")
    chat.say("two", "second")
    assert chat.cached_text == (
        "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nfirst<|im_end|>\n"
        "<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nsecond<|im_end|>\n"
    )


@pytest.mark.parametrize("name", ["CHATML", "INSIDE", "OPEN_REASONING", "CHANNELS", "HEADINGS", "LINES"])
def test_replies_that_are_given_stand_where_the_template_puts_them(name: str) -> None:
    chat = make_chat(template=getattr(toy, name))
    messages = []
    for question, answer in [("Name a color.", "Blue."), ("Another.", " Red.\n"), ("Thanks", "<b>You're</b> welcome")]:
        chat.conversation.run_turn(question, lambda: False, reply=answer)
        chat.check()
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        more = [*messages, {"role": "user", "content": "More?"}]
        rendered = chat.tokenizer.apply_chat_template(more, add_generation_prompt=True, return_dict=False)
        following = chat.conversation.encoder.encoded("More?", False, previous=answer).prompt
        assert chat.cached + following == rendered
    assert chat.conversation.log.turns[-1].reply == "<b>You're</b> welcome"


def test_each_turn_has_the_time_it_began_at() -> None:
    chat = make_chat(template=toy.CLOCK)
    begun = datetime.now()
    chat.say("one", "first")
    between = datetime.now()
    chat.say("two", "second")
    times = re.findall(r"user \[(.*?)\]", chat.cached_text)
    assert len(times) == 2
    assert f"{begun:%H:%M:%S.%f}" < times[0] < f"{between:%H:%M:%S.%f}" < times[1]


def test_whole_turns_leave_between_turns_oldest_first() -> None:
    chat = make_chat(cache_size=200, max_new_tokens=20, system_prompt="Finish every answer with PLUM.")
    head = chat.conversation.cache.prefix
    for i in range(12):
        chat.say(f"question number {i}", f"answer {i}")
        chat.check()
        text = chat.cached_text
        assert text.startswith("<|im_start|>system\nFinish every answer with PLUM.<|im_end|>\n<|im_start|>user\n")
        assert text.endswith(f"answer {i}<|im_end|>\n")
        # what is left of the conversation is its last turns, whole
        left = text.count("question number")
        assert (
            chat.cached[head:]
            == chat.conversation.log.ids[len(chat.conversation.log) - len(chat.cached) + head :].tolist()
        )
        assert text.count("<|im_start|>user") == left == text.count("<|im_start|>assistant")
    evictions = chat.of(ev.TokensEvicted)
    gone = [turn for event in evictions for turn in event.turns_gone]
    assert gone == list(range(1, len(gone) + 1))
    assert len(gone) > 5
    assert all(event.trigger == "between_turns" and event.turns == event.turns_gone for event in evictions)
    assert all(event.cache_len_before - event.count == event.cache_len_after for event in evictions)
    assert chat.conversation.state().first_visible_turn == gone[-1] + 1


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize("factor", [1, 3])
def test_no_layer_is_ever_over_budget(monkeypatch: pytest.MonkeyPatch, family: str, factor: int) -> None:
    """A prompt and a reply each larger than the cache, watched inside every forward."""
    chat = make_chat(cache_size=64, family=family, max_new_tokens=1000)
    cache = chat.conversation.cache
    seen: list[int] = []
    update = cache.update

    def watched(*args: Any, **kwargs: Any) -> Any:
        result = update(*args, **kwargs)
        seen.append(result[0].shape[-2])
        return result

    monkeypatch.setattr(cache, "update", watched)
    storage = [layer.storage_bytes for layer in cache.streaming_layers]
    outcome = chat.say("word " * 64 * factor, [70] * 64 * factor + [2])
    assert outcome.new_tokens == 64 * factor
    assert max(seen) <= 64
    chat.check()
    assert [layer.storage_bytes for layer in cache.streaming_layers] == storage
    triggers = {event.trigger for event in chat.of(ev.TokensEvicted)}
    assert triggers >= {"prefill", "decode"}


def test_token_level_cuts_begin_at_whole_characters_and_messages() -> None:
    chat = make_chat(cache_size=64)
    prefix = chat.conversation.cache.prefix
    checked = 0

    def check(event: ev.Event) -> None:
        nonlocal checked
        if isinstance(event, ev.TokensEvicted):
            window = chat.conversation.log.ids_at(chat.conversation.cache.ledger.runs)[prefix:]
            if window:
                text = chat.tokenizer.decode(window)
                assert not text.startswith("\N{REPLACEMENT CHARACTER}")
                assert not text.startswith(("user\n", "\n"))
                checked += 1

    chat.conversation._emit = check
    chat.say("Привет мир " * 20, "ж" * 60)
    assert checked > 5


@pytest.mark.parametrize("evict", ["oldest-turns", "oldest-tokens"])
def test_the_paper_s_rolling_window_is_a_choice(evict: str) -> None:
    chat = make_chat(cache_size=128, evict=evict, max_new_tokens=10)
    for i in range(8):
        chat.say(f"question {i}", f"answer {i}")
        chat.check()
    window = chat.tokenizer.decode(chat.cached[chat.conversation.cache.prefix :])
    assert window.startswith("<|im_start|>user\n") == (evict == "oldest-turns")


# Evicted runs as the versions before policies were objects had them, for evict = turns and evict = tokens.
EVICTED_BEFORE = {
    "oldest-turns": [
        *((13, 51), (51, 111), (111, 193), (193, 280), (280, 367), (367, 454), (454, 487), (487, 523), (523, 557)),
        (557, 589),
    ],
    "oldest-tokens": [
        *((13, 45), (45, 77), (77, 109), (109, 141), (141, 173), (173, 205), (205, 237), (237, 269), (269, 301)),
        *((301, 333), (333, 454), (454, 487), (487, 523), (523, 557), (557, 589)),
    ],
}


@pytest.mark.parametrize("evict", EVICTED_BEFORE)
def test_oldest_first_evicts_what_earlier_versions_did(monkeypatch: pytest.MonkeyPatch, evict: str) -> None:
    chat = make_chat(cache_size=160, evict=evict, max_new_tokens=60)
    for i in range(6):
        chat.say(f"question number {i}", "green hills " * (1 + 2 * i))
    chat.say("why is it? " * 30, "so it is")
    assert [event.runs for event in chat.of(ev.TokensEvicted)] == [(run,) for run in EVICTED_BEFORE[evict]]


class Greedy:
    """Evicts everything, sinks included."""

    name = "greedy"

    def plan(self, view: CacheView) -> list[Cut]:
        return [Cut(0, len(view.ledger))]


def test_a_policy_with_a_bad_plan_costs_one_turn_and_names_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = make_chat(cache_size=128, max_new_tokens=10)
    chat.say("first", "reply")
    before, policy = chat.cached, chat.conversation.cache.policy
    chat.conversation.cache.policy = Greedy()
    with pytest.raises(EvictionPlanError, match="the eviction policy greedy made a plan that evicts sink or pinned"):
        chat.say("word " * 200, "never")
    assert chat.cached == before
    assert len(chat.conversation.log.turns) == 1
    chat.conversation.cache.policy = policy
    chat.say("word " * 200, "goes on")
    chat.check()


# --- stopping -------------------------------------------------------------------------------------------------


def state_of(chat: Any) -> tuple[Any, ...]:
    cache = chat.conversation.cache
    keys = [layer.keys.clone() for layer in cache.streaming_layers]
    return chat.cached, len(chat.conversation.log), cache.turn_starts[:], cache.next_position, keys


def test_a_stop_while_reading_takes_the_turn_back() -> None:
    chat = make_chat(cache_size=1024)
    chat.say("first", "reply")
    before = state_of(chat)
    calls = iter([False, True])
    outcome = chat.say("word " * 100, "never", lambda: next(calls))
    assert (outcome.finish_reason, outcome.rolled_back, outcome.reply) == ("cancelled", True, "")
    after = state_of(chat)
    assert after[:4] == before[:4]
    assert all(torch.equal(a, b) for a, b in zip(after[4], before[4], strict=True))
    assert len(chat.conversation.log.turns) == 1
    chat.say("second", "goes on")
    assert chat.cached == rendered(chat, [("first", "reply"), ("second", "goes on")])


@pytest.mark.parametrize("after", [1, 2, 3, 4, 5, 6, 7, 8])
def test_a_stop_in_a_reply_keeps_what_was_shown_and_closes_the_turn(after: int) -> None:
    """At any token, also in the middle of a character: cache, transcript and screen say the same."""
    chat = make_chat()
    count = 0

    def cancelled() -> bool:
        nonlocal count
        count += 1
        return count > 1 + after  # one question is asked before the prompt is read

    outcome = chat.say("hi", f"ab{EMOJI}cd", cancelled)
    shown = "".join(event.text for event in chat.of(ev.TextDelta))
    assert outcome.finish_reason == "cancelled"
    assert outcome.reply == shown
    assert "\N{REPLACEMENT CHARACTER}" not in shown
    assert chat.cached == rendered(chat, [("hi", shown)])
    chat.check()
    chat.say("and", "more")
    assert chat.cached == rendered(chat, [("hi", shown), ("and", "more")])


def test_a_reply_ends_at_its_limit_without_a_broken_character() -> None:
    for limit in range(1, 9):
        chat = make_chat(max_new_tokens=limit)
        outcome = chat.say("hi", f"a{EMOJI}b")
        assert outcome.finish_reason == "length"
        assert outcome.new_tokens == limit
        assert "\N{REPLACEMENT CHARACTER}" not in outcome.reply
        assert chat.cached == rendered(chat, [("hi", outcome.reply)])


@pytest.mark.parametrize("end", [0, 1, 2])
def test_every_end_token_ends_the_reply(end: int) -> None:
    """The listed ones, and the one that would open the next message."""
    chat = make_chat()
    chat.conversation.model.generation_config.eos_token_id = [0, 2]
    chat.conversation.start_over(chat.conversation.encoder.format)
    ids = chat.tokenizer("fine", add_special_tokens=False)["input_ids"]
    outcome = chat.say("hi", [*ids, end, 70, 70])
    assert (outcome.reply, outcome.finish_reason) == ("fine", "stop")
    assert chat.cached == rendered(chat, [("hi", "fine")])


def test_a_stop_string_inside_a_token_leaves_neither_screen_nor_cache() -> None:
    chat = make_chat(template=None, max_new_tokens=50)
    outcome = chat.say("Hi", " I am fine.\nUser: and you?")
    assert outcome.reply == "I am fine."
    assert outcome.finish_reason == "stop"
    assert chat.cached_text == "User: Hi\nAssistant: I am fine.\n"
    chat.check()
    chat.say("Good", " Yes")
    assert chat.cached_text == "User: Hi\nAssistant: I am fine.\nUser: Good\nAssistant: Yes\n"


def test_text_before_a_stop_string_in_the_same_token_stays() -> None:
    from dataclasses import replace

    chat = make_chat()
    chat.conversation.start_over(replace(chat.conversation.encoder.format, stop_strings=("ris",)))
    ids = chat.tokenizer("The capital of France is Paris", add_special_tokens=False)["input_ids"]
    assert len(ids) < 12  # 'Paris' or its parts are tokens of the toy tokenizer
    outcome = chat.say("Where?", [*ids, 70])
    assert outcome.reply == "The capital of France is Pa"
    assert chat.cached_text.endswith("<|im_start|>assistant\nThe capital of France is Pa<|im_end|>\n")
    chat.check()


# --- failures -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_running_out_of_memory_takes_the_turn_back_and_the_chat_goes_on(
    monkeypatch: pytest.MonkeyPatch, layer: int
) -> None:
    chat = make_chat()
    chat.say("first", "reply")
    before = state_of(chat)
    broken = chat.conversation.model.model.layers[layer].mlp
    with monkeypatch.context() as patch:

        def fail(*args: Any) -> None:
            raise torch.OutOfMemoryError("tried to allocate 20 GiB")

        patch.setattr(broken, "forward", fail)
        with pytest.raises(TurnError, match=r"out of memory in turn 2 .*--cache-size"):
            chat.say("word " * 30, "never")
    assert state_of(chat)[:4] == before[:4]
    chat.check()
    chat.say("second", "works")
    assert chat.cached == rendered(chat, [("first", "reply"), ("second", "works")])


def test_output_that_is_not_a_number_is_said() -> None:
    chat = make_chat()
    chat.conversation.model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(TurnError, match="NaN/inf logits"):
        chat.say("hi", "x")
    chat.check()


def test_the_sampler_is_an_argument_and_sees_recent_text_without_control_tokens() -> None:
    chat = make_chat()
    chat.say("hi", "hello")
    seen: list[Any] = []

    class Watching:
        def __init__(self, *given: Any) -> None:
            seen.append(given)

        def __call__(self, logits: Tensor, recent: Sequence[int]) -> int:
            seen.append(list(recent))
            return int(chat.tokenizer.eos_token_id)

    conversation = chat.conversation
    conversation.close()  # one hook per model
    again = Conversation(
        conversation.model,
        chat.tokenizer,
        conversation.cache.fit,
        conversation.encoder.format,
        conversation.settings,
        64,
        chat.events.append,
        Watching,
    )
    again.run_turn("ab", lambda: False)
    assert seen[0] == (again.settings, torch.device("cpu"), again._generator, None)
    text = chat.tokenizer.decode(seen[1])
    assert "ab" in text
    assert "<|im_" not in text
    again.run_turn("ab" * REPETITION_WINDOW, lambda: False)
    assert 0 < len(seen[3]) < REPETITION_WINDOW


def test_a_system_prompt_that_leaves_no_window_is_refused_with_both_numbers() -> None:
    with pytest.raises(
        ConfigError, match=r"the system prompt \(\d\d+ tokens\) leaves 0 of cache_size = 64.*at least \d+"
    ):
        make_chat(cache_size=64, system_prompt="very long instructions " * 10)
    chat = make_chat(cache_size=64)
    chat.say("hi", "x")
    before = chat.cached
    from streamchat.conversation.template.format import choose_format

    with pytest.raises(ConfigError):
        chat.conversation.start_over(choose_format(chat.tokenizer, "auto", "very long instructions " * 10))
    assert chat.cached == before


def test_starting_over_forgets_everything_but_the_system_prompt() -> None:
    chat = make_chat(template=CHATML)
    fresh = chat.cached
    chat.say("hi", "x")
    chat.conversation.start_over(chat.conversation.encoder.format)
    assert chat.cached == fresh
    assert chat.say("again", "y").turn == 1
    chat.check()


def test_the_hook_is_removed_at_the_end() -> None:
    chat = make_chat()
    hooks = chat.conversation.model._forward_pre_hooks
    assert len(hooks) == 2  # the test's own and ours
    chat.conversation.close()
    assert len(hooks) == 1


def test_a_reply_whose_close_does_not_fit_into_a_full_cache_is_rolled_back_with_a_sentence() -> None:
    chat = make_chat(cache_size=80, on_full="stop", max_new_tokens=60)
    before = chat.conversation.cache.length
    broken = [119, 244] * 30  # bytes of unfinished characters; each replacement character takes three tokens
    with pytest.raises(TurnError, match="the end of the reply to turn 1 does not fit") as refusal:
        chat.say("hello", broken)
    assert refusal.value.failure == "cache_full"
    assert chat.conversation.cache.length == before
    chat.check()
    assert chat.say("hi", "hello").reply == "hello"


def test_a_chat_that_must_not_forget_stops_with_both_numbers() -> None:
    chat = make_chat(cache_size=80, on_full="stop", max_new_tokens=60)
    outcomes, refusal = [], ""
    while not refusal:
        try:
            outcomes.append(chat.say("once upon a time", [40] * 60))
        except TurnError as error:
            refusal = str(error)
        chat.check()
    assert re.match(
        r"the cache is full: turn \d+ needs at least \d+ tokens, and \d+ of 80 are free; use /clear", refusal
    )
    assert [outcome.finish_reason for outcome in outcomes] == ["length"] * len(outcomes)
    assert outcomes[-1].new_tokens < 60
    assert chat.of(ev.TokensEvicted) == []
    chat.conversation.start_over(chat.conversation.encoder.format)
    assert chat.say("hi", "hello").reply == "hello"
