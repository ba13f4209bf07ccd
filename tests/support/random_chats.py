"""Random chats on real engines without threads: turns, stops, failures, undo, pins, resume; an oracle looks on."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

import streamchat.conversation.rollback as rollbacks
from streamchat.base import events as ev
from streamchat.base import requests as rq
from streamchat.base.errors import ConfigError
from streamchat.cache import checkpoint
from streamchat.cache.dtype import set_cache_dtype
from streamchat.cache.layers.codes import QUANTIZED
from streamchat.config.loader import Configuration
from streamchat.config.settings import Settings
from streamchat.engine.jobs import JobQueue
from streamchat.engine.owner import Owner
from streamchat.models.load import LoadedModel
from streamchat.sessions import recorder
from streamchat.store.store import Store
from tests.support import families
from tests.support.chat_oracle import TOLERANCE, Oracle, Tokens, indices, ledger, require
from tests.support.random_plans import Plan, Step
from tests.support.tiny import tiny_model
from tests.support.toy_tokenizer import CHATML, VOCABULARY, toy_tokenizer

TOLERANCES = {"": TOLERANCE, "int8": 0.25, "int4": None}
"""Largest difference of a logit, by how keys and values are stored; None if nothing can be said."""


@cache
def model_of(family: str) -> Any:
    """One tiny model a family, of two layers; chats use it one after another."""
    if family.startswith("mistral"):
        return families.build(family, vocab_size=VOCABULARY, num_hidden_layers=2)
    return tiny_model(family, vocab_size=VOCABULARY, num_hidden_layers=2)


@cache
def _reference_of(family: str) -> Any:
    """The same weights, under no hook."""
    return copy.deepcopy(model_of(family))


class Crash(BaseException):
    """The process ended."""


@dataclass
class Machine:
    """What goes wrong, and when."""

    stop: tuple[str, int] = ("", 0)
    forwards: int = 0
    tokens: int = 0
    """Of the running reply."""
    prompt_over: bool = False
    fired: bool = False

    def arm(self, stop: tuple[str, int]) -> None:
        """For one step."""
        self.stop, self.fired = stop, False
        self.forwards = self.tokens = 0
        self.prompt_over = False

    def cancelled(self) -> bool:
        """What the engine asks before a forward."""
        what, count = self.stop
        if what == "prompt" and not self.prompt_over and self.forwards >= count:
            self.fired = True
        if what == "reply" and self.prompt_over and self.tokens >= count:
            self.fired = True
        return self.fired and what in ("prompt", "reply")

    def before_layer(self, *_: Any) -> None:
        """In the middle of a forward: earlier layers have its tokens."""
        self.forwards += 1
        if self.stop[0] == "memory" and not self.fired and self.forwards >= self.stop[1]:
            self.fired = True
            raise torch.OutOfMemoryError("no memory left, as planned")


class PlannedStop(threading.Event):
    """Set when the plan says so."""

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self._machine = machine

    def is_set(self) -> bool:
        """Asked before each forward."""
        return self._machine.cancelled()


class ScriptedSampler:
    """Samples what the chat's script says."""

    def __init__(self, chat: RandomChat) -> None:
        self._chat = chat
        chat.machine.prompt_over = True

    def __call__(self, *_: Any) -> int:
        self._chat.machine.tokens += 1
        return self._chat.script.pop(0) if self._chat.script else self._chat.tokenizer.eos_token_id


@dataclass
class RandomChat:
    """Carries a plan out. Use `run`."""

    plan: Plan
    folder: Path
    machine: Machine = field(default_factory=Machine)
    script: list[int] = field(default_factory=list)
    owner: Owner | None = None
    events: list[ev.Event] = field(default_factory=list)
    fed: int = 0
    """Tokens read in this step."""
    checked: int = 0
    """Steps after which logits were compared."""
    at: int = 0
    """Number of the step that runs."""
    paging: int = 0
    """The turn that is to be paged in."""
    paged: int = 0
    """Turns that were paged in."""
    recalled: int = 0
    """Replies for which turns were recalled."""
    _watching: bool = False
    _hidden: bool = False
    _running: int = 0

    def __post_init__(self) -> None:
        self.model, self.tokenizer = model_of(self.plan.family), toy_tokenizer(CHATML)
        self.size = self.plan.size
        self.settings = Settings(
            cache_size=self.size,
            evict=self.plan.evict,
            on_full=self.plan.on_full,
            system_prompt=self.plan.system,
            max_new_tokens=400,
            loop_guard="off",
            seed=1,
            snapshot_turns=3,
            archive=self.plan.archive,
            auto_recall=self.plan.auto_recall,
        )
        rotates = self.plan.family not in ("gpt2", "falcon_h1")
        tokens = Tokens(_reference_of(self.plan.family), rotates)
        self.oracle = Oracle(tokens, self.tokenizer, self.plan.evict.startswith("oldest-"))
        self.recompute = self.plan.family == "gpt2"
        self.moves = rotates
        self.store_in(self.plan.kv_dtype)
        self.latest: int | None = None
        """The turn that ended last and was not followed by an undo, a resume, or a lack of memory."""

    def store_in(self, kv_dtype: str) -> None:
        """Caches store keys and values like this from now on."""
        self.kv_dtype = kv_dtype
        set_cache_dtype(self.model, QUANTIZED.get(kv_dtype, self.model.dtype))
        self.oracle.tolerance = TOLERANCES[kv_dtype]
        if not kv_dtype and self.plan.archive == "int8":
            self.oracle.tolerance = TOLERANCES["int8"]  # of turns that were paged in

    @property
    def conversation(self) -> Any:
        """The one on the engine."""
        assert self.owner is not None
        return self.owner.conversation

    # --- beginning and ending ---------------------------------------------------------------------------------

    def run(self) -> None:
        """The whole plan.

        Raises:
            Fault: A rule does not hold.
        """
        with self._patched():
            self.open(None)
            try:
                for step in self.plan.steps:
                    self.at += 1
                    self.take(step)
                    self.look()
            finally:
                self.close()

    def open(self, session: str | None) -> None:
        """An engine, on a new conversation or a saved one."""
        loaded = LoadedModel(self.model, self.tokenizer, "tiny", "tests", "cpu", "float32", cache_dtype=self.kv_dtype)
        configuration = Configuration(self.settings, {"cache_size": "--cache-size"}, None)
        database = self.folder / "chats.db"
        self.jobs = JobQueue()
        self.owner = Owner(
            configuration, lambda *_: loaded, self.hear, lambda *_: None, lambda: Store(database), self.jobs
        )
        self._watching = False
        self.owner.host.start(session)
        self._watching = True
        if session is None:
            self.started_over()

    def started_over(self) -> None:
        """A new conversation: the oracle takes its system block."""
        oracle, conversation = self.oracle, self.conversation
        oracle.tokens.clear()
        block = conversation.log.ids.tolist()
        oracle.budget, oracle.sinks, oracle.system = self.size, self.settings.num_sink_tokens, len(block)
        prompt = self.settings.system_prompt or "Be kind."
        oracle.rendered_system = f"<|im_start|>system\n{prompt}<|im_end|>\n"
        oracle.tokens.log = block
        oracle.prefilled(list(range(len(block))))
        oracle.said, oracle.starts, oracle.pinned = [], [], set()
        oracle.held_before, oracle.compressions_before, oracle.damaged = {}, {}, False
        oracle.recalled, oracle.recalled_before, oracle.past = [], {}, {}
        self.latest = None

    def close(self) -> None:
        """Leave in order."""
        self.machine.arm(("", 0))
        if self.owner is not None:
            self.owner.host.end()
        self.owner = None

    @contextmanager
    def _patched(self) -> Iterator[None]:
        """Forwards are watched, memory runs out as planned."""
        chat = self

        def capture(cache: Any) -> checkpoint.CacheCheckpoint:
            if chat.machine.stop[0] == "copy":
                chat.machine.fired = True
                raise torch.OutOfMemoryError("no memory for a copy, as planned")
            return checkpoint.capture(cache)

        scarce = SimpleNamespace(capture=capture, restore=checkpoint.restore)
        layers = next(m for m in self.model.modules() if isinstance(m, torch.nn.ModuleList))
        handles = [
            self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True, prepend=True),
            self.model.register_forward_hook(self._after_forward, with_kwargs=True),
            layers[1].register_forward_pre_hook(self.machine.before_layer),
        ]
        try:
            with (
                patch.object(rollbacks, "checkpoint", scarce),
                patch.object(recorder, "BATCH_S", 0.0),
            ):
                yield
        finally:
            for handle in handles:
                handle.remove()

    # --- what is seen -----------------------------------------------------------------------------------------

    def _before_forward(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self._ids = kwargs["input_ids"][0].tolist()

    def _after_forward(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if not self._watching:
            return
        self.fed += len(self._ids)
        cache = self.conversation.cache
        longest = max(cache.lengths)
        require(longest <= self.size, f"{longest} tokens in a layer during a forward, of {self.size}")
        if self._running:
            tokens = self.oracle.tokens
            tokens.cut(len(tokens.held) + len(self._ids) - longest)
            tokens.feed(self._ids)

    def hear(self, event: ev.Event) -> None:
        """Every event, as it happens."""
        self.events.append(event)
        if isinstance(event, ev.ModelReady):
            self.conversation.sampler = lambda *_: ScriptedSampler(self)
        if not self._watching or self._hidden:
            return
        oracle = self.oracle
        match event:
            case ev.TurnStarted(turn=number):
                watching, self._watching = self._watching, False
                oracle.begin_turn(self.conversation, number)
                self._watching, self._running = watching, number
                self.fed = 0
            case ev.TextDelta() if self.machine.stop[0] == "crash" and self.machine.tokens >= self.machine.stop[1]:
                raise Crash
            case ev.TokensEvicted():
                if event.trigger == "page_in" and self._running:
                    oracle.recalled = indices(self.conversation.cache.recalled)  # which turns they are is told next
                elif event.trigger == "page_in":
                    oracle.pinned.add(self.paging)  # what is still there of it stays
                    oracle.recalled = []  # there may be no room for both
                oracle.evicted(event)
            case ev.TurnPagedIn():
                oracle.paged_in(event)
                self.paged += 1
            case ev.TurnsRecalled():
                oracle.turns_recalled(self.conversation, event, self.settings.recall_share)
                self.recalled += 1
            case ev.TurnFinished():
                self.finished(event)
            case ev.TurnUndone():
                exact = self.latest == event.turn
                self.latest, self._running = None, 0
                oracle.damaged |= self.machine.stop[0] == "memory" and self.machine.fired
                oracle.undone(self.conversation, event, self.fed, exact)
            case ev.TurnPinned(turn=number, pinned=pinned):
                (oracle.pinned.add if pinned else oracle.pinned.discard)(number)
            case _:
                pass

    def finished(self, event: ev.TurnFinished) -> None:
        """A turn is over."""
        oracle, started, self._running = self.oracle, self._running, 0
        if not event.rolled_back:
            oracle.said.append((event.text, event.reply))
            self.latest = None if self.lacked_a_copy else started
            if self.lacked_a_copy:
                oracle.moments.pop(started, None)
            return
        if started:
            oracle.turn_failed(self.conversation, started, exact=not self.lacked_a_copy)
            if self.lacked_a_copy:
                self.latest = None

    @property
    def lacked_a_copy(self) -> bool:
        """There was no memory for a checkpoint in this step."""
        return self.machine.stop[0] == "copy" and self.machine.fired

    def look(self) -> None:
        """Check everything."""
        self.oracle.check(self.conversation)
        self._check_store()
        self._watching = False
        self.checked += self.oracle.check_logits(self.conversation, self.recompute)
        self._watching = True

    def _check_store(self) -> None:
        assert self.owner is not None
        recorder = self.owner.archive.recorder
        if recorder is None or recorder.session is None:
            return
        saved = recorder.store.load(recorder.session)
        log, cache = self.conversation.log, self.conversation.cache
        require([(t.text, t.reply) for t in saved.turns] == self.oracle.said, "saved turns", saved.turns[-1:])
        require([i for t in saved.turns for i in t.ids] == log.ids.tolist()[self.oracle.system :], "saved ids")
        require(indices(saved.info.held) == ledger(self.conversation), "saved as held", saved.info.held)
        require(saved.info.pins == cache.pins, "saved pins", saved.info.pins, "and not", cache.pins)
        require(saved.info.compressions == cache.compression_count, "saved compressions", saved.info.compressions)

    # --- what is done -----------------------------------------------------------------------------------------

    def take(self, step: Step) -> None:
        """Carry one step out."""
        self.machine.arm(step.stop)
        recorder.BATCH_S = 0.0 if step.stop[0] == "crash" else 1e9  # a crash leaves what was written until then
        self.fed = 0
        if self.plan.rebases and self.moves:
            self.conversation.cache.position_limit = 2 * self.size
        ids = self.tokenizer(step.reply, add_special_tokens=False)["input_ids"] if step.reply else []
        self.script[:] = [*ids, self.tokenizer.eos_token_id]
        try:
            getattr(self, f"do_{step.kind}")(step)
        except Crash:
            self.crashed(step)
        finally:
            self.machine.arm(("", 0))

    def _send(self, request: rq.Request) -> None:
        """What the engine's thread does with a request."""
        assert self.owner is not None
        self.jobs.put(request)
        job = self.jobs.get(0)
        assert job is not None
        job.cancelled = PlannedStop(self.machine)
        self.owner.handle(job)

    def do_turn(self, step: Step) -> None:
        """A message."""
        self._send(rq.Submit(step.text))

    def do_quote(self, step: Step) -> None:
        """A message with a given reply, pinned."""
        stays = len(self.oracle.said)
        self._pinning(
            lambda: self._send(rq.Quote(step.text, "Noted.", pin=True)), lambda: len(self.oracle.said) > stays
        )

    def do_keep(self, step: Step) -> None:
        """Page an evicted turn in, or quote it."""
        oracle, stays = self.oracle, len(self.oracle.said)
        here = set(oracle.tokens.held)
        numbers = range(1, stays + 1)
        evicted = [n for n in numbers if not here.issuperset(range(oracle.starts[n - 1], oracle.stop_of(n)))]
        chosen = evicted or list(numbers)
        self.paging = chosen[step.turn % len(chosen)] if chosen else 0
        request = rq.Quote(step.text, "Noted.", pin=True, turn=self.paging)
        self._pinning(lambda: self._send(request), lambda: len(self.oracle.said) > stays)

    def do_undo(self, step: Step) -> None:
        """Take the newest turn back."""
        self._send(rq.Undo())

    def do_retry(self, step: Step) -> None:
        """Another try."""
        self._replace(rq.Retry())

    def do_edit(self, step: Step) -> None:
        """Another message in place of the newest."""
        self._replace(rq.Edit(step.text))

    def _replace(self, request: rq.Retry | rq.Edit) -> None:
        count = len(self.oracle.said)
        if count in self.oracle.pinned:
            self._pinning(lambda: self._send(request), lambda: len(self.oracle.said) == count)
        else:
            self._send(request)
            require(count not in self.oracle.pinned, "turn", count, "is pinned, and its forerunner was not")

    def do_reopen(self, step: Step) -> None:
        """Have the newest message back, change it, send it."""
        count = len(self.oracle.said)
        was_pinned = count in self.oracle.pinned
        self._send(rq.Undo(to_edit=True))
        self.fed = 0
        if was_pinned:
            self._pinning(lambda: self._send(rq.Submit(step.text)), lambda: len(self.oracle.said) == count)
        else:
            self._send(rq.Submit(step.text))

    def _pinning(self, do: Callable[[], None], stays: Callable[[], bool]) -> None:
        """The turn that comes is pinned, unless it does not stay or there is no room."""
        at = len(self.events)
        do()
        number = len(self.oracle.said)
        if stays() and number not in self.oracle.pinned:
            why = [event.text for event in self.events[at:] if isinstance(event, ev.Notice)]
            require(any("pinning turn" in text or "cannot be pinned" in text for text in why), number, "is not pinned")

    def do_pin(self, step: Step) -> None:
        """Keep a turn."""
        oracle, number = self.oracle, min(step.turn, len(self.oracle.said))
        held = oracle.tokens.held
        tokens = [i for i in held[oracle.sinks :] if number and oracle.turn_of(i) == number]
        free = self.size - len(oracle.retained(held)) - len(tokens)
        allowed = tokens and number not in oracle.pinned and free >= max(8, self.size // 4)
        self._send(rq.Pin(number))
        require(not allowed or number in oracle.pinned, "turn", number, "was not pinned")

    def do_unpin(self, step: Step) -> None:
        """Let a turn leave again."""
        number = min(step.turn, len(self.oracle.said))
        self._send(rq.Unpin(number))
        require(number not in self.oracle.pinned, "turn", number, "is still pinned")

    def do_compact(self, step: Step) -> None:
        """A summary, which changes nothing."""
        self._hidden = True
        try:
            self._send(rq.Compact())
        finally:
            self._hidden = False

    def do_clear(self, step: Step) -> None:
        """Begin anew."""
        self._start_over(None)

    def do_system(self, step: Step) -> None:
        """Begin anew with another system prompt."""
        self._start_over("Be short.")

    def _start_over(self, system_prompt: str | None) -> None:
        assert self.owner is not None
        at, self._watching = len(self.events), False
        self._send(rq.Clear() if system_prompt is None else rq.SetSystemPrompt(system_prompt))
        self._watching = True
        if any(isinstance(event, ev.ConversationCleared) for event in self.events[at:]):
            self.settings = replace(self.settings, system_prompt=self.owner.host.settings.system_prompt)
            self.started_over()

    def do_resume(self, step: Step) -> None:
        """Leave, and come back with another budget."""
        assert self.owner is not None
        session = self.owner.archive.session
        self.close()
        self._reopen(session, step)

    def crashed(self, step: Step) -> None:
        """The process ended inside a reply; another one goes on."""
        owner, oracle = self.owner, self.oracle
        assert owner is not None
        session, number, self._running = owner.archive.session, self._running, 0
        self.conversation.close()
        recorder_: Any = owner.archive.recorder
        recorder_._lock.release()
        recorder_.store.close()
        oracle.tokens = oracle.moments.pop(number).tokens  # all that is sure to be saved
        self._reopen(session, step, cut=number)

    def _reopen(self, session: str | None, step: Step, cut: int = 0) -> None:
        oracle, before = self.oracle, self.size
        self.machine.arm(("", 0))
        self.latest = None
        if session is None:
            self.open(None)
            return
        if step.kv_dtype:
            self.store_in(step.kv_dtype)
        if not step.snapshot:
            (self.folder / "snapshots" / f"{session}.safetensors").unlink(missing_ok=True)
        try:
            self._open_at(session, step.size)
        except ConfigError:
            require(oracle.system + 8 > step.size, "could not be resumed at", step.size)
            self.close()
            self._open_at(session, before)
        self.resumed(cut)

    def _open_at(self, session: str, size: int) -> None:
        self.size = self.oracle.budget = size
        self.settings = replace(self.settings, cache_size=size)
        self.events.clear()
        self.open(session)

    def resumed(self, cut: int) -> None:
        """Compare with what was left."""
        oracle, conversation = self.oracle, self.conversation
        [event] = [event for event in self.events if isinstance(event, ev.ConversationResumed)]
        after, held = ledger(conversation), oracle.tokens.held
        oracle.recalled, oracle.recalled_before = [], {}
        if cut and len(conversation.log.turns) < cut:
            require(event.restored_message, "the message of turn", cut, "is lost")
            oracle.starts.pop()
            oracle.held_before.pop(cut)
            cut = 0
        if cut:
            self._adopt_cut_turn(cut)
            require(len(after) <= self.size, "resumed with", len(after))
            oracle.unpin_for_room(sorted({*held, *after}))
        else:
            oracle.unpin_for_room(held)
            oracle.check_fit(held, after, "resume")
            require(len(held) > self.size or after == held, "not all is back")
            require(event.prefilled in (0, len(after)), "read again", event.prefilled, "of", len(after))
        if event.prefilled:
            oracle.prefilled(after)
            if any(isinstance(event, ev.TokensEvicted) for event in self.events):
                oracle.tokens.lose_track()
        else:
            require(not cut and after == held, "a snapshot of another moment was used")

    def _adopt_cut_turn(self, number: int) -> None:
        """A turn that was cut off by a crash: what the store had of it is taken as it is."""
        oracle, log = self.oracle, self.conversation.log
        turn = log.turns[-1]
        require(turn.number == number, "the cut turn", number, "is not there")
        require(log.ids.tolist()[: turn.start] == oracle.tokens.log, "earlier turns have other ids")
        oracle.said.append((turn.text, turn.reply))
        oracle.tokens.log = log.ids.tolist()


def fault_of(chosen: Plan, folder: Path) -> tuple[Exception | None, int]:
    """The fault that a plan shows, if any, and after how many steps logits were compared."""
    chat = RandomChat(chosen, folder)
    try:
        chat.run()
    except Exception as error:
        error.add_note(f"in step {chat.at}")
        return error, chat.checked
    return None, chat.checked
