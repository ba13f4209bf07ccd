"""Taking back: a conversation in which a turn was undone equals one in which it never was, to the bit."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch

from streamchat.base.errors import CacheError, ConfigError, TurnError
from streamchat.cache import checkpoint
from streamchat.cache.arguments import cache_keyword
from streamchat.cache.hook import StreamingHook
from streamchat.cache.positions.fit import fit_positions
from streamchat.cache.positions.strategy import Verdict, choose_fit, make_cache
from tests.support.scripted_model import Chat, make_chat
from tests.support.tiny import random_ids, tiny_model

pytestmark = pytest.mark.smoke

LONG = "and then, " * 20
FAMILIES = ["llama", "gpt_neox", "gpt2", "falcon_h1"]


def facts(chat: Chat) -> dict[str, Any]:
    """Everything that must be equal."""
    conversation = chat.conversation
    cache = conversation.cache
    return {
        "ids": conversation.log.ids.tolist(),
        "turns": [
            (t.number, t.start, t.message_start, t.reply_start, t.end, t.text, t.reply) for t in conversation.log.turns
        ],
        "runs": cache.ledger.runs,
        "next": cache.ledger.next_index,
        "pins": cache.pins,
        "starts": cache.turn_starts,
        "compressions": cache.compression_count,
        "evicted": cache.tokens_evicted,
        "segments": conversation.state().segments,
        "generator": conversation._generator.get_state().tolist(),
        "speed": (conversation.speed.ttft_s is None, conversation.speed.decode_tps is None),
    }


def tensors(chat: Chat) -> dict[str, torch.Tensor]:
    return checkpoint.capture(chat.conversation.cache).tensors


def same_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], exactly: bool = True) -> None:
    # a float32 copy of the sinks is taken at the first eviction: whether it is there yet changes nothing
    keys = {name for name in one | other if "original" not in name}
    for name in keys:
        if exactly:
            assert torch.equal(one[name], other[name]), name
        else:
            torch.testing.assert_close(one[name], other[name], atol=2e-5, rtol=0)


def talk(family: str, *, size: int = 128, turns: int = 5, **settings: Any) -> Chat:
    chat = make_chat(cache_size=size, family=family, max_new_tokens=400, seed=3, **settings)
    for number in range(turns):
        chat.say(f"question {number}", f"the answer {number}")
    return chat


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("question", "answer"),
    [("x", "y"), ("a longer question, " * 3, "short"), (LONG, "after a long prompt"), ("why?", LONG), (LONG, LONG)],
    ids=["small", "evicts", "long prompt", "long reply", "all gone"],
)
def test_an_undone_turn_never_happened(family: str, question: str, answer: str) -> None:
    chat, other = talk(family), talk(family)
    expected = facts(other)
    chat.say(question, answer)
    if len(question + answer) > 50:
        assert chat.conversation.cache.compression_count > expected["compressions"]
    taken = chat.conversation.undo()
    assert taken.read_again == 0
    assert facts(chat) == expected
    same_tensors(tensors(chat), tensors(other))
    chat.check()
    # and both go on alike, through further evictions
    for number in range(4):
        for each in (chat, other):
            each.say(f"and {number}?", f"so {number}, and more of it")
    assert facts(chat) == facts(other)
    same_tensors(tensors(chat), tensors(other))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_turns_further_back_are_restored_or_read_again_and_the_cost_is_told(family: str) -> None:
    chat, other = talk(family), talk(family)
    expected = facts(other)
    for number in range(3):
        chat.say(f"a longer question {number}, " * 3, "short")
    taken = [chat.conversation.undo() for _ in range(3)]
    assert taken[0].read_again == 0
    if family in ("llama", "gpt_neox"):  # the cache records its changes
        assert all(each.read_again == 0 for each in taken)
        same_tensors(tensors(chat), tensors(other))
    else:  # there is one copy, of the latest turn that evicted: no state can be cut, or no token moved
        assert any(each.read_again > 0 for each in taken[1:])
    assert facts(chat) == expected
    chat.check()


@pytest.mark.parametrize("evict", ["oldest-turns", pytest.param("keep-first-turn", marks=pytest.mark.slow)])
def test_each_of_the_last_64_turns_is_undone_to_the_bit(evict: str) -> None:
    chat = make_chat(cache_size=128, max_new_tokens=400, evict=evict)
    conversation = chat.conversation
    conversation.cache.position_limit = 400  # so that some of them rebase
    saved = []
    for number in range(70):
        saved.append((deepcopy(facts(chat)), tensors(chat)))
        chat.say(f"question {number}", "and then, " * 8 if number % 23 == 7 else f"is {number}")
        if number % 9 == 3:
            conversation.set_pin(number + 1, True)
            conversation.set_pin(number + 1, False)
    assert conversation.cache.compression_count > 50
    for number in range(70, 6, -1):
        for _ in range(number % 3):
            if number % 5 == 0 and 50 < number < 70:  # and what comes after is undone again
                chat.say("one more", "and its reply")
        undone = conversation.undo(number)
        assert undone.read_again == 0, number
        before, cached = saved[number - 1]
        assert facts(chat) == before
        same_tensors(tensors(chat), cached)
    with pytest.raises(ConfigError, match="too old"):
        conversation.undo()


@pytest.mark.parametrize("broken", [1, 2])
def test_an_eviction_that_fails_halfway_through_the_layers_is_repaired(
    broken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = talk("llama", turns=8)
    expected = deepcopy(facts(chat))
    layer = chat.conversation.cache.streaming_layers[broken]

    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(layer, "drop_slots", fail)
    with pytest.raises(TurnError, match="out of memory"):
        chat.say(LONG, "an answer")
    monkeypatch.undo()
    assert facts(chat) == expected
    chat.check()
    chat.say("is all well?", "it is")
    chat.check()


def test_pins_made_since_stay_and_those_of_the_turn_go() -> None:
    chat = talk("llama", turns=3, size=256)
    chat.say("a", "b")
    chat.conversation.set_pin(2, True)
    chat.conversation.set_pin(4, True)
    chat.conversation.undo()
    pinned = [segment.turn for segment in chat.conversation.state().segments if segment.pinned and segment.turn]
    assert set(pinned) == {2}
    chat.check()


def test_nothing_to_take_back_is_said() -> None:
    chat = talk("llama", turns=1)
    chat.conversation.undo()
    with pytest.raises(ConfigError, match="nothing to undo yet"):
        chat.conversation.undo()


def test_only_so_many_turns_can_be_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamchat.conversation.rollback.REACH", 3)
    chat = talk("llama", turns=6)
    for _ in range(3):
        chat.conversation.undo()
    with pytest.raises(ConfigError, match="turn 3 is too old to undo"):
        chat.conversation.undo()
    assert len(chat.conversation.log.turns) == 3


def test_a_given_reply_is_fed_like_a_generated_one() -> None:
    chat, other = talk("llama", turns=1), talk("llama", turns=1)
    chat.say("What is it?", "A sea.")
    other.conversation.run_turn("What is it?", lambda: False, reply="A sea.")
    assert facts(chat)["ids"] == facts(other)["ids"]
    assert facts(chat)["turns"] == facts(other)["turns"]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_gives_the_same_logits_in_another_cache(family: str) -> None:
    """Also through further evictions and a rebase of positions, which need the unrotated sinks."""
    model = tiny_model(family)
    make = partial(make_cache, model, cache_size=48, num_sink_tokens=4)
    fit = choose_fit(model, verdict=Verdict(absolute_limit=None)) if family == "gpt2" else fit_positions(model)
    ids = random_ids(400)

    def logits(cache: Any, count: int, at: int) -> torch.Tensor:
        out = []
        with StreamingHook(model, cache), torch.inference_mode():
            for token in range(at, at + count):
                step = model(input_ids=ids[:, token : token + 1], use_cache=True, **{cache_keyword(model): cache})
                out.append(step.logits[0, -1])
        return torch.stack(out)

    one = make(fit)
    one.position_limit = 150  # so that a rebase comes soon
    logits(one, 120, 0)
    taken = checkpoint.capture(one)
    assert taken.length == one.length > 30
    assert taken.nbytes > 0
    other = make(fit)
    other.position_limit = 150
    if other.fed_tokens is not None:
        other.fed_tokens.append(ids[:, :120])
    checkpoint.restore(other, taken)
    assert (other.length, other.lengths, other.compression_count) == (one.length, one.lengths, one.compression_count)
    assert torch.equal(logits(other, 150, 120), logits(one, 150, 120))


def test_more_than_the_budget_is_not_read_again() -> None:
    """Reading evicts nothing: what is read again was fitted before."""
    chat = talk("llama", turns=5)
    before = facts(chat)
    with pytest.raises(CacheError, match="129 tokens to prefill do not fit into a cache of 128"):
        chat.conversation.feeder.prefill_runs([(0, 129)], 129)
    assert facts(chat) == before


def test_ids_of_tokens_that_were_cut_are_forgotten_though_all_of_them_had_been_evicted() -> None:
    """A model that reads again takes ids by log index."""
    model = tiny_model("gpt2")
    cache = make_cache(model, choose_fit(model, verdict=Verdict(absolute_limit=None)), cache_size=32, num_sink_tokens=4)
    with StreamingHook(model, cache), torch.inference_mode():
        for start in range(0, 60, 10):
            model(input_ids=random_ids(60)[:, start : start + 10], use_cache=True, **{cache_keyword(model): cache})
    first = cache.ledger.runs[-1][0]
    assert first > 20
    assert cache.crop_from(20) == cache.ledger.next_index + len(range(first, 60)) - 20
    assert cache.fed_tokens is not None
    assert len(cache.fed_tokens) == cache.ledger.next_index == 20


def test_a_checkpoint_of_another_shape_is_refused() -> None:
    model = tiny_model("llama")
    fit = fit_positions(model)
    cache = make_cache(model, fit, cache_size=64, num_sink_tokens=4)
    with StreamingHook(model, cache), torch.inference_mode():
        model(input_ids=random_ids(40), use_cache=True, **{cache_keyword(model): cache})
    taken = checkpoint.capture(cache)
    small = make_cache(model, fit, cache_size=32, num_sink_tokens=4)
    with pytest.raises(CacheError, match="40 tokens in 3 layers does not fit into a cache of 32 in 3"):
        checkpoint.restore(small, taken)
    assert small.length == 0
