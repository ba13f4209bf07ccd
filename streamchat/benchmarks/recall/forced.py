"""A conversation whose replies are given token by token, so that each can be scored with and without recalled turns."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from streamchat.base import events as ev
from streamchat.benchmarks.attached import attached
from streamchat.cache.evicted import EvictedTokens
from streamchat.cache.eviction.policy import Run
from streamchat.config.loader import Configuration
from streamchat.conversation.assemble import assemble
from streamchat.conversation.log import TurnRecord
from streamchat.models.load import LoadedModel

Way = Literal["off", "text", "by hand", "on"]
"""How the turn with the answer is put back in context: not at all, quoted, recalled by number, or automatically."""


@dataclass
class Scores:
    """How likely a forced reply was."""

    nats: list[float] = field(default_factory=list)
    """-log p of each token."""
    is_first: list[bool] = field(default_factory=list)
    """Whether each token was the most likely one."""
    ttft_s: float = 0.0
    cpu_s: float = 0.0
    """CPU time of the calling thread for the turn; it depends less on other programs."""
    recalled: tuple[int, ...] = ()


class _ForcedSampler:
    """Returns the given ids one after the other, and scores them."""

    def __init__(self, ids: Sequence[int], scores: Scores) -> None:
        self._ids, self._scores = iter(ids), scores

    def __call__(self, logits: torch.Tensor, recent: Any) -> int:
        token = next(self._ids)
        logs = torch.log_softmax(logits.float(), dim=-1)
        self._scores.nats.append(-float(logs[token]))
        self._scores.is_first.append(int(logs.argmax()) == token)
        return token


class ForcedChat:
    """A conversation on a model that several conversations share. All that it evicts is kept in memory.

    Args:
        configuration: The settings.
        loaded: The model.
        cache_size: The cache budget in tokens.
    """

    def __init__(self, configuration: Configuration, loaded: LoadedModel, cache_size: int) -> None:
        settings = replace(
            configuration.settings, cache_size=cache_size, speculation="off", loop_guard="off", auto_recall="off"
        )
        self.tokenizer = loaded.tokenizer
        self.events: list[ev.Event] = []
        assembled = assemble(replace(configuration, settings=settings), loaded, self.events.append, lambda *_: None)
        self.conversation = assembled.conversation
        self._evicted: list[EvictedTokens] = []
        self.conversation.find_evicted = self._find
        self._collect()
        self.conversation.close()

    def _collect(self) -> None:
        if self.conversation.cache.history is not None:
            self.conversation.cache.history.on_evicted = self._evicted.append

    def _find(self, wanted: Sequence[Run]) -> list[EvictedTokens]:
        return [
            tokens
            for tokens in self._evicted
            if any(a < stop and first < b for first, stop in tokens.runs for a, b in wanted)
        ]

    @property
    def tokens(self) -> int:
        """Tokens fed so far."""
        return len(self.conversation.log)

    def start_over(self) -> None:
        """Clear the conversation."""
        with attached(self.conversation):
            self.conversation.start_over(self.conversation.encoder.format)
            self._evicted.clear()

    def say(self, message: str, reply: str) -> TurnRecord:
        """Add a turn with a given reply."""
        with attached(self.conversation):
            self.conversation.run_turn(message, lambda: False, reply)
            self.conversation.auto_recall.prepare(replace(self.conversation.settings, auto_recall="on"))
        return self.conversation.log.turns[-1]

    def score(self, message: str, reply: str, way: Way = "off", turn: int = 0, most: int = 0) -> Scores:
        """Reply to `message` with `reply`, score its tokens, and undo the turn.

        Args:
            message: The user's message.
            reply: The reply.
            way: How an evicted turn is put back in context.
            turn: The turn, for 'text' and 'by hand'.
            most: Maximum tokens of the reply; 0 for all.
        """
        chat, scores = self.conversation, Scores()
        ids = self.tokenizer(reply, add_special_tokens=False)["input_ids"]
        ids = ids[:most] if most else ids
        before, kept = chat.settings, len(self._evicted)
        chat.settings = replace(before, auto_recall="on" if way == "on" else "off", max_new_tokens=len(ids))
        sampler, chat.sampler = chat.sampler, lambda *_: _ForcedSampler(ids, scores)
        number = len(chat.log.turns) + 1
        try:
            with attached(self.conversation):
                if way == "text":
                    chat.run_turn(
                        f"Remember what I said:\n\n> {chat.log.turns[turn - 1].text}", lambda: False, "Noted."
                    )
                started = time.thread_time()
                outcome = chat.run_turn(message, lambda: False, recall=(turn,) if way == "by hand" else ())
                scores.cpu_s = time.thread_time() - started
                scores.ttft_s, scores.recalled = outcome.speed.ttft_s or 0.0, chat.log.turns[-1].recalled
                chat.undo(number)
        finally:
            chat.settings, chat.sampler = before, sampler
            del self._evicted[kept:]  # their indices will be other tokens'
        return scores
