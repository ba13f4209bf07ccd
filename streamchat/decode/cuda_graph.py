"""A step captured once as a CUDA graph and replayed for each token or prompt: one launch instead of hundreds."""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from streamchat.cache.layers.layer import StreamingLayer
from streamchat.cache.logits import logit_distance
from streamchat.decode.static import Inputs
from streamchat.decode.static import bind as bind_one
from streamchat.decode.static_prompt import bind_prompt
from streamchat.decode.static_slots import Buffers, bits_of

_log = logging.getLogger(__name__)

STEADY = 8
"""Consecutive tokens on the same buffers before a step is captured: a capture takes a few hundred milliseconds."""
ANY_IDS = 32
"""A captured prompt step is checked with ids below this number, which every vocabulary has."""
WARM_UPS = 3
"""Runs before the capture, in which libraries choose kernels and allocate workspaces."""
LIMITS = {torch.float32: 5e-3}
"""By dtype: largest accepted difference between two ways to compute logits, in standard deviations of the logits."""
ROUNDED_LIMIT = 0.3
"""The same for 16-bit models, where each way rounds differently: up to 0.13 between two attention implementations of
transformers (default model, 74 tokens), 0.4 and more for a position that is always 0. Also for keys and values that are
codes: two ways round some numbers to different codes."""


Run = Callable[[], Tensor]
"""Computes (1, 1, vocabulary) logits."""
Bind = Callable[[Any, Inputs, Sequence[Buffers], torch.dtype], Run]
"""Binds a step to its inputs and the buffers of a cache; see `streamchat.decode.static.bind`."""
Record = Callable[[Run], Run]
"""Captures the device work of a run. Returns a function that repeats that work on the same addresses and returns the
tensor with the result, which the next replay overwrites. It holds no reference to the run."""


class CudaRecorder:
    """See `Record`: captures CUDA graphs on `device`.

    They share one memory pool: they never run at the same time, and each result is read before the next replay. All
    warm-ups and captures use one stream of `device`: libraries keep a workspace for every stream, and PyTorch's own
    stream for captures is on the device that it was first used for.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: Any = None
        self._pool: Any = None
        self._in_pool = weakref.WeakSet[Run]()

    def __call__(self, run: Run) -> Run:
        with torch.cuda.device(self.device):
            if self._stream is None:
                self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                for _ in range(WARM_UPS):
                    run()
            current.wait_stream(self._stream)
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # as the capture does: the difference is what the capture takes
            before = torch.cuda.memory_reserved()
            replay = self._recorded(run)
            _log.info("a captured step took %d bytes of device memory", torch.cuda.memory_reserved() - before)
        return replay

    def _recorded(self, run: Run) -> Run:
        if not self._in_pool:  # PyTorch refuses a pool whose graphs are all gone
            self._pool = torch.cuda.graph_pool_handle()
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # thread_local: allow memory queries from other threads during capture
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                result = run()
        except BaseException:
            # PyTorch leaves the current stream at that of the capture, and may take the pool for one in use
            torch.cuda.set_stream(current)
            self._in_pool = weakref.WeakSet()
            raise

        def replay() -> Tensor:
            with torch.cuda.device(self.device):
                graph.replay()
            return result

        self._in_pool.add(replay)
        return replay


class CapturedStep:
    """A static step that is captured for the buffers of a cache, and then replayed.

    A step of one token is captured after `STEADY` consecutive tokens, one of several when `record_used` is called.

    The first call on a cache of a format is also computed by the plain forward, to check the step; each capture is
    checked against the step. Any failure is logged once and disables the step: from then on every call returns None.

    Args:
        step: What `bind` takes: `static_step(model)`, or `prompt_step(model)` for a `length` above 1.
        device: Where the model is.
        dtype: The model's.
        record: Captures the step.
        length: Tokens of the step; it serves up to as many.
        bind: Binds the step to buffers; None for that of `length`.
        name: What the step is called in the log.
    """

    def __init__(
        self,
        step: Any,
        device: torch.device,
        dtype: torch.dtype,
        record: Record,
        length: int = 1,
        bind: Bind | None = None,
        name: str = "a captured step",
    ) -> None:
        self._step, self._dtype, self._record = step, dtype, record
        self.length, self.name = length, name
        self._inputs = Inputs(device, length)
        self._bind = bind or (bind_one if length == 1 else bind_prompt)
        # weak: a deleted cache must free its memory
        self._seen: list[weakref.ref[Tensor]] = []
        self._format: tuple[torch.dtype, ...] = ()
        self._tokens = 0
        self._replay: Run | None = None
        self._checked: set[tuple[torch.dtype, ...]] = set()
        """Formats of caches for which the step was compared with the plain forward."""
        self._pending_check: tuple[Tensor, Run] | None = None
        self.failed = ""
        """Why the step is disabled; '' while it works."""

    def __call__(self, ids: Tensor, positions: Tensor, layers: Sequence[StreamingLayer]) -> Tensor | None:
        """Append the (1, n) tokens to `layers` and return the (1, 1, vocabulary) logits of the last one.

        Returns None if the plain forward must run; the layers are unchanged then, and its logits must be passed to
        `resolve_check`.
        """
        self._pending_check = None
        if self.failed:
            return None
        try:
            return self._next(ids, positions, layers)
        except Exception as error:  # whatever a driver or a library raises, the plain forward still works
            self.give_up(f"{type(error).__name__}: {error}")
            return None

    def resolve_check(self, plain: Tensor) -> Tensor:
        """Return the (1, 1, vocabulary) logits of a call for which the step returned None, given the plain forward's.

        If a check was pending and passes, logits and cache are the step's, as for all later tokens: a conversation
        continues bit for bit the same, wherever it was resumed.
        """
        pending, self._pending_check = self._pending_check, None
        if pending is None:
            return plain
        logits, run = pending
        try:
            error = logit_distance(logits, plain)
            if error <= self._limit:
                with torch.inference_mode(False), torch.no_grad():
                    run()
                self._checked.add(self._format)
                return logits
            self.give_up(f"its logits are {error:.2g} standard deviations from those of the plain forward")
        except Exception as failure:
            self.give_up(f"{type(failure).__name__}: {failure}")
        return plain

    def record_used(self, layers: Sequence[StreamingLayer]) -> None:
        """Capture the step for the buffers of `layers` if it has served them and is not captured; takes about 0.3 s.

        The contents of the buffers do not change, not even in free slots.
        """
        if self.failed or not self._is_checked or self._replay is not None or not self._tokens:
            return
        buffers = _buffers(layers)
        slot = None if buffers is None or not self._follows(buffers) else _open_slots(layers, self.length)
        if buffers is None or slot is None:
            return
        try:
            with torch.inference_mode(False), torch.no_grad():
                self._record_unused(buffers, layers[0].start, slot)
        except Exception as error:
            self.give_up(f"{type(error).__name__}: {error}")

    def _record_unused(self, buffers: list[Buffers], start: int, slot: int) -> None:
        """Capture the step and check it with ids that do not stay in `buffers`."""
        length = self.length
        free = [tensor.narrow(2, slot, length) for pair in buffers for tensor in pair]
        before = [tensor.clone() for tensor in free]
        run = self._bind(self._step, self._inputs, buffers, self._dtype)
        self._replay = self._record_with_zeros(run, slot)
        index = torch.arange(length)[None]
        self._inputs.fill(index % ANY_IDS, slot - start + index, start, slot)
        self._check_replay(run)
        for tensor, old in zip(free, before, strict=True):
            tensor.copy_(old)

    def _next(self, ids: Tensor, positions: Tensor, layers: Sequence[StreamingLayer]) -> Tensor | None:
        count = ids.shape[1]
        buffers = _buffers(layers)
        if buffers is None or layers[0].length + count > layers[0].cache_size:
            return None
        if not self._follows(buffers):
            tensors = [tensor for pair in buffers for tensor in pair]
            self._seen, self._tokens, self._replay = [weakref.ref(tensor) for tensor in tensors], 0, None
            self._format = tuple(tensor.dtype for tensor in buffers[0])
        slot = _open_slots(layers, self.length)
        if slot is None:
            return None
        with torch.inference_mode(False), torch.no_grad():
            run = self._bind(self._step, self._inputs, buffers, self._dtype)
            self._tokens += 1
            if self.length == 1 and self._is_checked and self._replay is None and self._tokens >= STEADY:
                self._replay = self._record_with_zeros(run, slot)
                self._inputs.fill(ids, positions, layers[0].start, slot)
                self._check_replay(run)
                if self.failed:
                    return None
            self._inputs.fill(ids, positions, layers[0].start, slot)
            logits = run() if self._replay is None else self._replay().clone()
        if not self._is_checked:
            self._pending_check = logits, run
            return None
        for layer in layers:
            layer.reserve_slots(count)
        return logits

    def _check_replay(self, run: Run) -> None:
        """Give up if the captured step does not compute what the step computes from the current inputs."""
        assert self._replay is not None
        error = logit_distance(self._replay(), run())
        if not error <= self._limit:
            self.give_up(f"a replay's logits are {error:.2g} standard deviations from those of the step")

    @property
    def _is_checked(self) -> bool:
        """Whether the step was compared with the plain forward, for caches of the latest format."""
        return self._format in self._checked

    @property
    def _limit(self) -> float:
        """Largest accepted difference of the logits for the latest buffers, in standard deviations."""
        return ROUNDED_LIMIT if any(map(bits_of, self._format)) else LIMITS.get(self._dtype, ROUNDED_LIMIT)

    def _follows(self, buffers: list[Buffers]) -> bool:
        """Return whether the latest call had these buffers."""
        tensors = [tensor for pair in buffers for tensor in pair]
        return len(tensors) == len(self._seen) and all(r() is t for r, t in zip(self._seen, tensors, strict=True))

    def _record_with_zeros(self, run: Run, slot: int) -> Run:
        """Capture `run` with other inputs than those of the check that follows; writes to free slots only."""
        zero = torch.zeros_like(self._inputs.ids)
        self._inputs.fill(zero, zero, slot, slot)
        return self._record(run)

    def captured_for(self, layers: Sequence[StreamingLayer]) -> Run:
        """Return the step captured for the next slot of `layers`, which must be free; for measurements."""
        buffers, inputs = _buffers(layers), Inputs(self._inputs.ids.device)
        assert buffers is not None
        ids = torch.zeros(1, 1, dtype=torch.long)
        with torch.inference_mode(False), torch.no_grad():
            inputs.fill(ids, ids + layers[0].length, layers[0].start, layers[0].end)
            run = self._bind(self._step, inputs, buffers, self._dtype)
            return functools.partial(_replayed, self._record(run), run)

    def give_up(self, reason: str) -> None:
        """Disable the step, and log why."""
        self.failed, self._replay, self._pending_check = reason, None, None
        what = "decoding" if self.length == 1 else f"prompts of up to {self.length} tokens are computed"
        _log.warning("%s without %s: %s", what, self.name, reason)


def _replayed(replay: Run, _: Run) -> Tensor:
    """Repeat a captured run; the run itself keeps its tensors."""
    return replay()


def _buffers(layers: Sequence[StreamingLayer]) -> list[Buffers] | None:
    """Return the buffers of one row of all layers; None if there are others, or none yet."""
    buffers = [found for layer in layers if (found := layer.buffers) is not None]
    return None if len(buffers) < len(layers) or buffers[0][0].shape[0] != 1 else buffers


def _open_slots(layers: Sequence[StreamingLayer], count: int) -> int | None:
    """Return the first of `count` free slots, the same in all layers; None if layers differ or have fewer."""
    spans = {(layer.start, layer.end) for layer in layers}
    # a forward that failed halfway has moved some layers to the front and not others
    slots = {layer.open_slot(count, front=len(spans) > 1) for layer in layers}
    slot = min(slots)
    return slot if len(slots) == 1 and slot + count <= layers[0].slots else None
