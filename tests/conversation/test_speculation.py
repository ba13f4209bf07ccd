"""Replies with speculation are those without it, and nobody sees a rejected proposal."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from streamchat.base import events as ev
from streamchat.base.errors import TurnError
from streamchat.cache.positions.strategy import choose_fit
from streamchat.config.settings import Settings
from streamchat.conversation.conversation import Conversation
from streamchat.conversation.feeder import Feeder
from streamchat.conversation.generation import Generation
from streamchat.conversation.log import TokenLog, TurnRecord
from streamchat.conversation.sampling import Sampler
from streamchat.conversation.speculation import ngrams
from streamchat.conversation.speculation import speculator as speculators
from streamchat.conversation.speculation.costs import ForwardCosts
from streamchat.conversation.speculation.speculator import Speculator
from streamchat.conversation.template.format import choose_format
from streamchat.decode.install import install, tokens_at_once, uninstall
from streamchat.kernels.library import load_kernels
from tests.support import families
from tests.support.kernels import needs_kernels
from tests.support.scripted_model import make_chat
from tests.support.tiny import tiny_model
from tests.support.toy_tokenizer import CHATML, CONTROL, VOCABULARY, toy_tokenizer

FAMILIES = ("llama", "gpt_neox", "qwen3", "mistral_window_16", "gemma3_window_16")
MESSAGES = ("the sea and the dragon", "tell me of the sea and the dragon again", "and the sea")


@functools.cache
def model_of(family: str) -> Any:
    """One float32 model per family, with compiled kernels."""
    model = families.build(family, vocab_size=VOCABULARY)
    assert install(model, load_kernels("auto"))
    return model


class Unending(Sampler):
    """Samples no control tokens: random models would end most replies early."""

    def __call__(self, logits: Tensor, recent: Any) -> int:
        control = torch.tensor(toy_tokenizer(CHATML).convert_tokens_to_ids(CONTROL))
        return super().__call__(logits.clone().index_fill_(0, control, -1e9), recent)


@dataclass
class Talk:
    """What a conversation did, and what its events showed."""

    chat: Conversation
    replies: list[str] = field(default_factory=list)
    evictions: list[tuple[Any, ...]] = field(default_factory=list)
    deltas: list[str] = field(default_factory=list)
    seen: list[int] = field(default_factory=list)
    """Length of the log at each event."""

    def hear(self, event: ev.Event) -> None:
        """Require that every observer sees cache, log, and text in agreement."""
        if isinstance(event, ev.TokensEvicted):
            evicted = (event.count, event.token_range, event.turns, event.trigger)
            self.evictions.append((*evicted, event.cache_len_before, event.cache_len_after))
        elif isinstance(event, ev.TextDelta):
            self.deltas.append(event.text)
            cache = self.chat.cache
            assert cache.ledger.next_index == len(self.chat.log)
            assert cache.lengths == [cache.length] * len(cache.layers)
            assert self.chat.shown == "".join(self.deltas)
            assert self.chat.state().tokens_seen == len(self.chat.log)
            self.seen.append(len(self.chat.log))

    def say(self, message: str) -> str:
        self.deltas.clear()
        outcome = self.chat.run_turn(message, lambda: False)
        assert outcome.reply == "".join(self.deltas)
        self.replies.append(outcome.reply)
        return outcome.reply


def talk_on(model: Any, mode: str, cache_size: int = 256, template: str | None = CHATML, **settings: Any) -> Talk:
    tokenizer = toy_tokenizer(template)
    chosen: Any = {"temperature": 0.0, "seed": 3, "max_new_tokens": 60, "loop_guard": "off"} | settings
    own = Settings(speculation=mode, cache_size=cache_size, **chosen)  # type: ignore[arg-type]
    talk: Talk
    chat_format = choose_format(tokenizer, "auto", own.system_prompt)
    fit = choose_fit(model, check_eviction=False)
    chat = Conversation(model, tokenizer, fit, chat_format, own, cache_size, lambda event: talk.hear(event), Unending)
    talk = Talk(chat)
    return talk


def both(model: Any, messages: tuple[str, ...] = MESSAGES, **settings: Any) -> tuple[Talk, Talk]:
    """The same conversation without and with speculation."""
    talks = []
    for mode in ("off", "auto"):
        talk = talk_on(model, mode, **settings)
        for message in messages:
            talk.say(message)
        talk.chat.close()
        talks.append(talk)
    return talks[0], talks[1]


@pytest.fixture(autouse=True)
def _eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Propose up to 7 tokens at every match, even of one token, whatever that costs: many of them are rejected."""
    monkeypatch.setattr(ngrams, "LENGTHS", (4, 2, 1))
    monkeypatch.setattr(speculators, "MIN_RATE", 0.0)
    monkeypatch.setattr(ForwardCosts, "known", True)
    monkeypatch.setattr(Speculator, "_best_count", lambda self, matched, most: min(most, 7))


def assert_same(plain: Talk, talk: Talk) -> None:
    """Require the same text, ids, evictions, contents, and random stream."""
    assert talk.replies == plain.replies
    assert talk.chat.log.ids == plain.chat.log.ids
    assert talk.evictions == plain.evictions
    assert talk.chat.cache.compression_count == plain.chat.cache.compression_count
    assert talk.chat.cache.ledger == plain.chat.cache.ledger
    assert talk.chat.cache.turn_starts == plain.chat.cache.turn_starts
    assert torch.equal(talk.chat.rng_state, plain.chat.rng_state)
    for layer, expected in zip(talk.chat.cache.streaming_layers, plain.chat.cache.streaming_layers, strict=True):
        assert layer.next_position == expected.next_position
        state, wanted = layer.state(), expected.state()
        assert state.keys() == wanted.keys()
        for name, tensor in state.items():
            torch.testing.assert_close(tensor, wanted[name], atol=2e-4, rtol=2e-4)


@needs_kernels
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"repetition_penalty": 1.0},
        {"temperature": 0.3, "repetition_penalty": 1.0},
        {"temperature": 0.4, "repetition_penalty": 1.3, "top_p": 0.8, "top_k": 12},
        {"cache_size": 64, "repetition_penalty": 1.0},
        {"cache_size": 64, "temperature": 0.3, "repetition_penalty": 1.02},
        {"cache_size": 200, "on_full": "stop", "repetition_penalty": 1.0},
        {"max_new_tokens": 10, "repetition_penalty": 1.0},
    ],
    ids=lambda settings: " ".join(f"{name}={value}" for name, value in settings.items()) or "defaults",
)
def test_replies_are_those_without_speculation(family: str, settings: dict[str, Any]) -> None:
    messages = MESSAGES[: 1 if settings.get("on_full") else 3]
    plain, talk = both(model_of(family), messages, **settings)
    assert_same(plain, talk)
    assert plain.chat.speculator.proposed == 0
    assert talk.chat.speculator.proposed > 0
    assert talk.chat.log.ids[: talk.seen[-1]] == plain.chat.log.ids[: talk.seen[-1]]
    if settings.get("cache_size") == 64:
        assert "decode" in {trigger for *_, trigger, _, _ in plain.evictions}


@needs_kernels
@pytest.mark.parametrize("family", ["llama", "mistral_window_16"])
def test_some_proposals_are_accepted_and_some_are_rejected(family: str) -> None:
    talk = both(model_of(family), repetition_penalty=1.0)[1]
    assert 0 < talk.chat.speculator.accepted < talk.chat.speculator.proposed


@needs_kernels
def test_undo_and_the_turns_after_it_are_those_without_speculation() -> None:
    ends = []
    for mode in ("off", "auto"):
        talk = talk_on(model_of("llama"), mode, cache_size=96, temperature=0.3, repetition_penalty=1.0)
        for message in MESSAGES:
            talk.say(message)
        talk.chat.undo()
        talk.say("the dragon, then")
        talk.chat.undo()
        talk.chat.undo()
        talk.say(MESSAGES[1])
        assert talk.replies[-1] == talk.replies[1]
        talk.chat.close()
        ends.append(talk)
    assert_same(*ends)


@needs_kernels
def test_a_rejected_proposal_leaves_every_layer_as_if_it_had_not_been_fed() -> None:
    found = []
    for proposals in ([], [7, 8, 9]):
        talk = talk_on(model_of("gemma3_window_16"), "off", cache_size=64, repetition_penalty=1.0)
        talk.say(MESSAGES[0])
        feeder, cache = talk.chat.feeder, talk.chat.cache
        assert cache.compression_count > 0  # there are copies of retained tokens
        cache.make_room(30)
        for token in (5, 11, 5):
            logits = feeder.forward_proposals(token, proposals)
            assert cache.length == len(cache.ledger) == cache.lengths[0]
            feeder.drop_rejected()
        assert cache.lengths == [cache.length] * len(cache.layers)
        states = [layer.state() for layer in cache.streaming_layers]
        found.append((logits[0], states, list(cache.ledger), list(feeder.log.ids), cache.next_position))
        talk.chat.close()
    plain, rolled_back = found
    assert rolled_back[2:] == plain[2:]
    torch.testing.assert_close(rolled_back[0], plain[0], atol=1e-4, rtol=1e-4)
    for state, expected in zip(rolled_back[1], plain[1], strict=True):
        assert state.keys() == expected.keys() == {"keys", "values", "original_keys", "original_values"}
        for name, tensor in state.items():
            torch.testing.assert_close(tensor, expected[name], atol=1e-4, rtol=1e-4)


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the forward pass of transformers verify proposals, so that a scripted model can speculate."""
    monkeypatch.setattr(speculators, "tokens_at_once", lambda model: 8)


@pytest.mark.usefixtures("wide")
def test_a_repeated_reply_needs_fewer_forwards_and_feeds_the_same_ids() -> None:
    reply = "a long story about the sea, and the dragon that once upon a time was there"
    chats = {mode: make_chat(speculation=mode) for mode in ("off", "auto")}
    forwards = {}
    for mode, chat in chats.items():
        for number in range(2):
            assert chat.say(f"tell {number}", reply).reply == reply
            chat.check()
        chat.fed.clear()
        assert chat.say("again", reply).reply == reply
        chat.check()
        forwards[mode] = len(chat.fed)
        assert "".join(event.text for event in chat.of(ev.TextDelta)) == 3 * reply
    assert chats["auto"].conversation.log.ids == chats["off"].conversation.log.ids
    assert 3 * forwards["auto"] < forwards["off"]


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("ending", [" a story\nUser: me", " a story\nUs", " a story\nUser:", " a\nUser"])
def test_stop_strings_end_a_reply_inside_of_proposals(ending: str) -> None:
    chats = {mode: make_chat(template=None, speculation=mode) for mode in ("off", "auto")}
    outcomes = {}
    for mode, chat in chats.items():
        chat.conversation.log.append([])
        for _ in range(2):
            ids = chat.tokenizer(f" once upon a time{ending} there was", add_special_tokens=False)["input_ids"]
            chat.conversation.run_turn("x", lambda: False, reply="once upon a time a story\nUser: me there was")
            outcomes[mode] = chat.say("the sea", [*ids, chat.tokenizer.eos_token_id])
            chat.check()
    assert outcomes["auto"].reply == outcomes["off"].reply
    assert outcomes["auto"].new_tokens == outcomes["off"].new_tokens
    assert outcomes["auto"].finish_reason == "stop"
    assert chats["auto"].conversation.log.ids == chats["off"].conversation.log.ids
    assert chats["auto"].conversation.speculator.accepted > 0


@pytest.mark.usefixtures("wide")
def test_a_stopped_reply_keeps_what_was_shown_and_undo_removes_it() -> None:
    reply = "a long story about the sea, and the dragon that once upon a time was there"
    chat = make_chat(speculation="auto")
    chat.say("tell", reply)
    before = chat.cached
    shown = len(chat.of(ev.TextDelta))
    outcome = chat.say("again", reply, cancelled=lambda: len(chat.of(ev.TextDelta)) > shown + 2)
    assert outcome.finish_reason == "cancelled"
    assert 0 < len(outcome.reply) < len(reply)
    assert chat.conversation.speculator.accepted > 0
    chat.check()
    assert chat.cached_text.endswith(f"assistant\n{outcome.reply}<|im_end|>\n")
    chat.conversation.undo()
    chat.check()
    assert chat.cached == before


@pytest.mark.usefixtures("wide")
def test_a_failure_between_proposals_rolls_the_turn_back(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = make_chat(speculation="auto")
    chat.say("tell", "once upon a time there was a little girl")
    before = chat.cached
    forward = Feeder.forward_proposals

    def broken(self: Feeder, token: int, proposals: list[int]) -> Tensor:
        logits = forward(self, token, proposals).clone()
        if len(proposals) > 2:
            logits[2] = float("nan")
        return logits

    monkeypatch.setattr(Feeder, "forward_proposals", broken)
    with pytest.raises(TurnError, match="NaN"):
        chat.say("again", "once upon a time there was a little girl")
    chat.check()
    assert chat.cached == before


@pytest.mark.usefixtures("wide")
def test_control_tokens_are_not_proposed() -> None:
    chat = make_chat(speculation="auto")
    for number in range(3):
        chat.say(f"number {number}", "Paris")
    control = chat.conversation.encoder.control_ids
    replies = [ids for ids in chat.fed if len(ids) < 9]
    assert chat.conversation.speculator.accepted > 0
    assert not any(token in control for ids in replies if ids[0] not in control for token in ids[:-2])


def test_forwards_with_proposals_are_exact_where_positions_move(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rebase happens at the token at which it would happen without proposals."""
    monkeypatch.setattr(speculators, "tokens_at_once", lambda model: 8)
    model = tiny_model("llama", vocab_size=VOCABULARY)
    talks = []
    for mode in ("off", "auto"):
        talk = talk_on(model, mode, cache_size=64, repetition_penalty=1.0, max_new_tokens=150)
        talk.chat.cache.position_limit = 150
        for message in MESSAGES:
            talk.say(message)
        talk.chat.close()
        talks.append(talk)
    assert_same(*talks)
    assert talks[1].chat.speculator.accepted > 0


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon_h1"])
def test_models_without_a_short_path_for_several_tokens_do_not_speculate(family: str) -> None:
    model = tiny_model(family, vocab_size=VOCABULARY)
    if family == "llama":
        assert install(model, None)  # torch operations serve one token
        assert tokens_at_once(model) == 1
    talk = talk_on(model, "auto", repetition_penalty=1.0)
    for message in MESSAGES:
        talk.say(message)
    assert not talk.chat.speculator.is_supported
    assert talk.chat.speculator.proposed == 0


@needs_kernels
def test_replies_with_dry_are_those_without_speculation() -> None:
    """The penalties of each token follow from the accepted ones, not from proposals."""
    plain, fast = both(model_of("llama"), repetition_penalty=1.0, dry_multiplier=1.0, dry_sequence_breakers="")
    assert fast.replies == plain.replies
    assert fast.chat.speculator.proposed > fast.chat.speculator.accepted
    undamped, _ = both(model_of("llama"), repetition_penalty=1.0)
    assert undamped.replies != plain.replies


@needs_kernels
def test_the_setting_turns_it_off_from_the_next_turn_on() -> None:
    talk = talk_on(model_of("llama"), "auto", repetition_penalty=1.0)
    talk.say(MESSAGES[0])
    proposed = talk.chat.speculator.proposed
    assert proposed > 0
    talk.chat.settings = replace(talk.chat.settings, speculation="off")
    talk.say(MESSAGES[1])
    assert talk.chat.speculator.proposed == proposed
    talk.chat.start_over(talk.chat.encoder.format)
    assert talk.chat.speculator.proposed == talk.chat.speculator.accepted == 0
    talk.chat.close()


def test_sampled_tokens_keep_their_distribution() -> None:
    """Replies of one to three tokens, drawn with two proposals, against their exact probabilities."""
    rows = torch.tensor([[0.5, 0.2, 1.0, -1.0], [-0.3, 0.9, 0.1, 0.0], [1.2, 0.0, 0.3, 0.7]])
    proposals, temperature = [2, 1], 0.8
    chances = torch.softmax(rows.double() / temperature, -1)
    expected: dict[tuple[int, ...], float] = {(a,): float(chances[0, a]) for a in range(4) if a != 2}
    expected |= {(2, b): float(chances[0, 2] * chances[1, b]) for b in range(4) if b != 1}
    expected |= {(2, 1, c): float(chances[0, 2] * chances[1, 1] * chances[2, c]) for c in range(4)}
    settings = Settings(temperature=temperature, repetition_penalty=1.0, top_p=1.0)
    sampler = Sampler(settings, torch.device("cpu"), torch.Generator().manual_seed(1))
    log = TokenLog()
    feeder: Any = SimpleNamespace(log=log, accept=lambda token: log.append([token]), drop_rejected=lambda: None)
    text: Any = SimpleNamespace(ended_by=lambda token: False, push=lambda token: "", stopped=False)
    encoder: Any = SimpleNamespace(control_ids=())
    turn = TurnRecord(1, 0, 0)
    generation = Generation(feeder, encoder, turn, text, settings, lambda event: None, lambda: False, 0.0)
    count, found = 20_000, Counter[tuple[int, ...]]()
    for _ in range(count):
        ids: list[int] = []
        generation._accept(rows, proposals, ids, sampler)
        found[tuple(ids)] += 1
    assert found.keys() == expected.keys()
    for reply, chance in expected.items():
        assert abs(found[reply] / count - chance) < 5 * (chance * (1 - chance) / count) ** 0.5, reply


def test_uninstalled_models_stop_speculating() -> None:
    model = families.build("llama", vocab_size=VOCABULARY)
    install(model, load_kernels("auto"))
    talk = talk_on(model, "auto")
    assert talk.chat.speculator.is_supported == (load_kernels("auto") is not None)
    uninstall(model)
    assert not talk.chat.speculator.is_supported
