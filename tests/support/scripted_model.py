"""A real tiny model whose sampled ids come from a script: cache, positions and templates are real, words are chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from streamchat.base import events as ev
from streamchat.cache.positions.strategy import Verdict, choose_fit
from streamchat.config.settings import Settings
from streamchat.conversation.assemble import format_from_settings
from streamchat.conversation.conversation import Conversation
from streamchat.conversation.generation import TurnOutcome
from tests.support.tiny import tiny_model
from tests.support.toy_tokenizer import CHATML, VOCABULARY, toy_tokenizer

E = TypeVar("E", bound=ev.Event)


@dataclass
class Chat:
    """A conversation with its events, and what it was fed."""

    conversation: Conversation
    tokenizer: Any
    events: list[ev.Event] = field(default_factory=list)
    fed: list[list[int]] = field(default_factory=list)
    script: list[int] = field(default_factory=list)

    def say(self, text: str, reply: str | Sequence[int], cancelled: Callable[[], bool] = lambda: False) -> TurnOutcome:
        """One turn in which the model samples the ids of `reply` (text, then the end token) or these ids."""
        if isinstance(reply, str):
            ids = self.tokenizer(reply, add_special_tokens=False)["input_ids"]
            self.script[:] = [*ids, self.tokenizer.eos_token_id]
        else:
            self.script[:] = reply
        return self.conversation.run_turn(text, cancelled)

    @property
    def cached(self) -> list[int]:
        """The ids that are in the cache, by ledger and log."""
        return self.conversation.log.ids_at(self.conversation.cache.ledger.runs)

    @property
    def cached_text(self) -> str:
        """What the model still sees."""
        return str(self.tokenizer.decode(self.cached))

    def of(self, kind: type[E]) -> list[E]:
        """Events of one class."""
        return [event for event in self.events if isinstance(event, kind)]

    def check(self) -> None:
        """What must hold at every moment between turns."""
        cache, log = self.conversation.cache, self.conversation.log
        assert len(log) == cache.ledger.next_index
        assert cache.lengths == [cache.length] * len(cache.layers)
        assert cache.length <= cache.cache_size
        assert cache.length == cache.ledger.next_index - cache.tokens_evicted
        assert list(cache.ledger)[: cache.prefix] == list(range(cache.prefix))


def make_chat(
    *,
    cache_size: int = 256,
    template: str | None = CHATML,
    family: str = "llama",
    control: Sequence[str] = (),
    added: Sequence[str] = (),
    eos: str | Sequence[str] | None = None,
    **settings: Any,
) -> Chat:
    """A conversation on a tiny model, its sampler replaced by the script.

    Args:
        control: More control tokens, which decoding drops.
        added: More added tokens, which are text.
        eos: End tokens that the model lists; the first is the tokenizer's.
    """
    tokenizer = toy_tokenizer(template)
    tokenizer.add_tokens(list(control), special_tokens=True)
    tokenizer.add_tokens(list(added))
    model = tiny_model(family, vocab_size=VOCABULARY + len(control) + len(added))
    if eos is not None:
        names = [eos] if isinstance(eos, str) else list(eos)
        tokenizer.eos_token = names[0]
        model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(names)
    unguarded: Any = {"loop_guard": "off"}  # scripts may repeat as they like
    chosen = Settings(cache_size=cache_size, **(unguarded | settings))
    events: list[ev.Event] = []
    script: list[int] = []
    fed: list[list[int]] = []

    class ScriptedSampler:
        def __init__(self, *args: Any) -> None:
            pass

        def __call__(self, logits: Any, recent: Any) -> int:
            return script.pop(0)

    def watch(module: Any, args: Any, kwargs: Any) -> None:
        fed.append(kwargs["input_ids"][0].tolist())

    model.register_forward_pre_hook(watch, with_kwargs=True)

    conversation = Conversation(
        model,
        tokenizer,
        choose_fit(model, verdict=Verdict(absolute_limit=None)),
        format_from_settings(tokenizer, chosen),
        chosen,
        cache_size,
        events.append,
        ScriptedSampler,
    )
    fed.clear()
    return Chat(conversation, tokenizer, events, fed, script)
