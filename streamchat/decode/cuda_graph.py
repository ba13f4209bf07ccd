"""The decode step recorded once as a CUDA graph and replayed for each token: one launch instead of hundreds."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from streamchat.cache.layers.layer import StreamingLayer
from streamchat.cache.logits import logit_distance
from streamchat.decode.eager import Step
from streamchat.decode.static import Inputs, bind

_log = logging.getLogger(__name__)

STEADY = 8
"""Consecutive tokens on the same buffers before a step is recorded: recording takes a few hundred milliseconds."""
WARM_UPS = 3
"""Runs before the recording, in which libraries choose kernels and allocate workspaces."""
LIMITS = {torch.float32: 5e-3}
"""By dtype: largest accepted difference between two ways to compute logits, in standard deviations of the logits."""
ROUNDED_LIMIT = 0.3
"""The same for 16-bit models, where each way rounds differently: up to 0.13 between two attention implementations of
transformers (default model, 74 tokens), 0.4 and more for a position that is always 0."""


Run = Callable[[], Tensor]
"""Computes (1, 1, vocabulary) logits."""
Record = Callable[[Run], Run]
"""Records the device work of a run. Returns a function that repeats that work on the same addresses and returns the
tensor with the result, which the next replay overwrites. It holds no reference to the run."""


def record_cuda_graph(device: torch.device, run: Run) -> Run:
    """See `Record`: a CUDA graph on `device`, with its own memory pool."""
    with torch.cuda.device(device):
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        current = torch.cuda.current_stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                run()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # thread_local: allow memory queries from other threads during capture
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = run()

    def replay() -> Tensor:
        with torch.cuda.device(device):
            graph.replay()
        return result

    return replay


class CapturedStep:
    """A static step that is recorded for the buffers of a cache after `STEADY` consecutive tokens, and then replayed.

    The first token is also computed by the plain forward, to check the step; each recording is checked against the
    step. Any failure is logged once and disables the step: from then on every call returns None.
    """

    def __init__(self, step: Step, device: torch.device, dtype: torch.dtype, record: Record) -> None:
        self._step, self._dtype, self._record = step, dtype, record
        self._inputs = Inputs(device)
        # weak: a deleted cache must free its memory
        self._buffers: list[weakref.ref[Tensor]] = []
        self._tokens = 0
        self._replay: Run | None = None
        self._checked = False
        self._pending_check: tuple[Tensor, Run] | None = None
        self.failed = ""
        """Why the step is disabled; '' while it works."""

    def __call__(self, ids: Tensor, positions: Tensor, layers: Sequence[StreamingLayer]) -> Tensor | None:
        """Append the token to `layers` and return its (1, 1, vocabulary) logits; None if the plain forward must run.

        If it returns None, the layers are unchanged, and the plain forward's logits must be passed to `resolve_check`.
        """
        self._pending_check = None
        if self.failed:
            return None
        try:
            return self._next(ids, positions, layers)
        except Exception as error:  # whatever a driver or a library raises, the plain forward still works
            self._give_up(f"{type(error).__name__}: {error}")
            return None

    def resolve_check(self, plain: Tensor) -> Tensor:
        """Return the (1, 1, vocabulary) logits of a token for which the step returned None, given the plain forward's.

        If a check was pending and passes, logits and cache are the step's, as for all later tokens: a conversation
        continues bit for bit the same, wherever it was resumed.
        """
        pending, self._pending_check = self._pending_check, None
        if pending is None:
            return plain
        logits, run = pending
        try:
            error = logit_distance(logits, plain)
            if error <= LIMITS.get(self._dtype, ROUNDED_LIMIT):
                with torch.inference_mode(False), torch.no_grad():
                    run()
                self._checked = True
                return logits
            self._give_up(f"its logits are {error:.2g} standard deviations from those of the plain forward")
        except Exception as failure:
            self._give_up(f"{type(failure).__name__}: {failure}")
        return plain

    def _next(self, ids: Tensor, positions: Tensor, layers: Sequence[StreamingLayer]) -> Tensor | None:
        buffers = [layer.buffers for layer in layers if layer.buffers is not None]
        if len(buffers) < len(layers) or buffers[0][0].shape[0] != 1 or layers[0].length >= layers[0].cache_size:
            return None
        tensors = [tensor for pair in buffers for tensor in pair]
        if len(tensors) != len(self._buffers) or any(r() is not t for r, t in zip(self._buffers, tensors, strict=True)):
            self._buffers, self._tokens, self._replay = [weakref.ref(tensor) for tensor in tensors], 0, None
        slot = _open_slots(layers)
        if slot is None:
            return None
        with torch.inference_mode(False), torch.no_grad():
            run = bind(self._step, self._inputs, buffers, self._dtype)
            self._tokens += 1
            if self._checked and self._replay is None and self._tokens >= STEADY:
                self._replay = self._record_with_zeros(run, slot)
                self._inputs.fill(ids, positions, layers[0].start, slot)
                error = logit_distance(self._replay(), run())
                if not error <= LIMITS.get(self._dtype, ROUNDED_LIMIT):
                    self._give_up(f"a replay's logits are {error:.2g} standard deviations from those of the step")
                    return None
            self._inputs.fill(ids, positions, layers[0].start, slot)
            logits = run() if self._replay is None else self._replay().clone()
        if not self._checked:
            self._pending_check = logits, run
            return None
        for layer in layers:
            layer.reserve_slots(1)
        return logits

    def _record_with_zeros(self, run: Run, slot: int) -> Run:
        """Record `run` with other inputs than those of the check that follows; writes to the free slot only."""
        zero = torch.zeros_like(self._inputs.ids)
        self._inputs.fill(zero, zero, slot, slot)
        return self._record(run)

    def _give_up(self, reason: str) -> None:
        self.failed, self._replay, self._pending_check = reason, None, None
        _log.warning("decoding without a captured step: %s", reason)


def _open_slots(layers: Sequence[StreamingLayer]) -> int | None:
    """Return the free slot, the same in all layers; None if layers differ in length."""
    spans = {(layer.start, layer.end) for layer in layers}
    # a forward that failed halfway has moved some layers to the front and not others
    slots = {layer.open_slot(front=len(spans) > 1) for layer in layers}
    return slots.pop() if len(slots) == 1 else None
