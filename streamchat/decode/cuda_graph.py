"""The decode step recorded once as a CUDA graph and replayed for each token: one launch instead of hundreds."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from streamchat.cache.layers.layer import StreamingLayer
from streamchat.decode.eager import Step
from streamchat.decode.static import Inputs, bound

_log = logging.getLogger(__name__)

STEADY = 8
"""Tokens in a row on the same buffers before a recording is made: it costs some hundred milliseconds."""
WARM_UPS = 3
"""Runs before the recording, in which libraries choose kernels and allocate what they keep."""
LIMITS = {torch.float32: 5e-3}
"""By dtype: how far logits may be from those they are checked by, in standard deviations of these."""
ROUNDED_LIMIT = 0.3
"""The same for 16-bit models, where each way to compute rounds differently: up to 0.13 between two kinds of attention
of transformers (default model, 74 tokens), 0.4 and more with a position that is always 0."""


Run = Callable[[], Tensor]
"""Computes (1, 1, vocabulary) logits."""


class Graphs(Protocol):
    """What records a step."""

    def record(self, run: Run) -> Run:
        """Record what `run` does on the device.

        Returns a function that does the same again, on the same addresses, and returns the tensor with the result,
        which the next replay overwrites. `run` itself is not kept.
        """
        ...


class CudaGraphs:
    """CUDA graphs of `device`, each with a memory pool of its own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def record(self, run: Run) -> Run:
        """See `Graphs`."""
        with torch.cuda.device(self._device):
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            current = torch.cuda.current_stream()
            side.wait_stream(current)
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    run()
            current.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # thread_local: other threads may go on asking how much memory is free
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                result = run()

        def replay() -> Tensor:
            with torch.cuda.device(self._device):
                graph.replay()
            return result

        return replay


class CapturedStep:
    """A static step, recorded for the buffers of one cache once tokens come in a row, and then replayed.

    The very first token is computed by the plain forward too, and a recording is compared with the step itself.
    Anything that goes wrong is logged once and ends it: from then on every call returns None.
    """

    def __init__(self, step: Step, device: torch.device, dtype: torch.dtype, graphs: Graphs) -> None:
        self._step, self._dtype, self._graphs = step, dtype, graphs
        self._inputs = Inputs(device)
        # not kept alive: a cache that is gone gives its memory back
        self._seen: list[weakref.ref[Tensor]] = []
        self._tokens = 0
        self._replay: Run | None = None
        self._checked = False
        self._claim: tuple[Tensor, Run] | None = None
        self.failed = ""
        """Why it is out of use; '' while it is not."""

    def __call__(self, ids: Tensor, positions: Tensor, layers: Sequence[StreamingLayer]) -> Tensor | None:
        """Append the token to `layers` and return its (1, 1, vocabulary) logits; None leaves it to the plain forward.

        Where it returns None the layers hold what they held, and `settle` must get what the plain forward returns.
        """
        self._claim = None
        if self.failed:
            return None
        try:
            return self._next(ids, positions, layers)
        except Exception as error:  # whatever a driver or a library says, the plain forward is there
            self._give_up(f"{type(error).__name__}: {error}")
            return None

    def settle(self, plain: Tensor) -> Tensor:
        """The logits of a token for which None was returned, (1, 1, vocabulary), given those of the plain forward.

        Where these were to check the step and agree, logits and cache are the step's, as those of all later tokens: a
        conversation goes on to the bit the same, wherever it was taken up again.
        """
        claim, self._claim = self._claim, None
        if claim is None:
            return plain
        logits, run = claim
        try:
            error = _distance(logits, plain)
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
        if len(tensors) != len(self._seen) or any(r() is not t for r, t in zip(self._seen, tensors, strict=True)):
            self._seen, self._tokens, self._replay = [weakref.ref(tensor) for tensor in tensors], 0, None
        slot = _open_slots(layers)
        if slot is None:
            return None
        with torch.inference_mode(False), torch.no_grad():
            run = bound(self._step, self._inputs, buffers, self._dtype)
            self._tokens += 1
            if self._checked and self._replay is None and self._tokens >= STEADY:
                self._replay = self._record(run, slot)
                self._inputs.fill(ids, positions, layers[0].start, slot)
                error = _distance(self._replay(), run())
                if not error <= LIMITS.get(self._dtype, ROUNDED_LIMIT):
                    self._give_up(f"replayed, its logits are {error:.2g} standard deviations from its own")
                    return None
            self._inputs.fill(ids, positions, layers[0].start, slot)
            logits = run() if self._replay is None else self._replay().clone()
        if not self._checked:
            self._claim = logits, run
            return None
        for layer in layers:
            layer.claim(1)
        return logits

    def _record(self, run: Run, slot: int) -> Run:
        """A recording, made with other inputs than those it will be checked with; writes nothing but the free slot."""
        nothing = torch.zeros_like(self._inputs.ids)
        self._inputs.fill(nothing, nothing, slot, slot)
        return self._graphs.record(run)

    def _give_up(self, reason: str) -> None:
        self.failed, self._replay, self._claim = reason, None, None
        _log.warning("tokens are decoded without a captured step: %s", reason)


def _distance(found: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference, in standard deviations of `expected`."""
    found, expected = found.float(), expected.float()
    return float((found - expected).square().mean().sqrt() / expected.std())


def _open_slots(layers: Sequence[StreamingLayer]) -> int | None:
    """The free slot, the same in all layers; None where there is none: some hold more than others."""
    spans = {(layer.start, layer.end) for layer in layers}
    # a forward that failed half-way leaves layers that were moved and others that were not
    slots = {layer.open_slot(front=len(spans) > 1) for layer in layers}
    return slots.pop() if len(slots) == 1 else None
