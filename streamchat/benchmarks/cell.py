"""One cell of a sweep: a model, a method and a text. Runs in a worker process."""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from streamchat.benchmarks.figures import failure_text
from streamchat.benchmarks.methods.registry import Method
from streamchat.benchmarks.texts import Document
from streamchat.cache.token_ids import input_device

if TYPE_CHECKING:
    from streamchat.cache.positions.fit import PositionFit
    from streamchat.models.load import LoadedModel

DECODE_STEPS = 24
"""Single tokens that are timed at the end of the text, when the cache is fullest."""


@dataclass(frozen=True)
class ModelChoice:
    """Model to load, with its settings as text."""

    name: str
    device: str
    dtype: str
    attention: str
    kernels: str = "auto"


@dataclass(frozen=True)
class Cell:
    """Inputs of one result."""

    model: ModelChoice
    method: Method
    document: str
    digest: str
    """SHA-256 of the text."""
    max_tokens: int
    chunk: int

    @property
    def id(self) -> str:
        """Id that is the same for the same inputs."""
        inputs = asdict(self)
        if self.model.kernels == "auto":
            del inputs["model"]["kernels"]  # results from before the setting existed are continued
        inputs["policy"] = inputs.pop("method")  # its name in sweeps that earlier versions saved
        text = json.dumps(inputs, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def name(self) -> str:
        """Display name."""
        return f"{self.model.name}, {self.method.name}, {self.document}"


def digest_of(document: Document) -> str:
    """Return the SHA-256 of the text."""
    return hashlib.sha256(document.text.encode("utf-8", "surrogatepass")).hexdigest()


def run_cell(cell: Cell, document: Document, threads: int) -> dict[str, Any]:
    """Return the figures of a cell, or {"error": message}. The model stays loaded for the next cell of this process.

    Args:
        cell: What to measure.
        document: Its text.
        threads: Number of torch threads in this process; 0 = leave unchanged.
    """
    try:
        return _measure(cell, document, threads)
    except Exception as error:  # an error in one cell must not stop the others
        return {"error": failure_text(error)}


def _measure(cell: Cell, document: Document, threads: int) -> dict[str, Any]:
    import numpy as np
    import torch

    from streamchat.benchmarks.memory_estimate import check_memory
    from streamchat.benchmarks.methods.stream import open_stream
    from streamchat.benchmarks.score import score
    from streamchat.benchmarks.texts import tokenize
    from streamchat.models.quantize.weight_storage import stored_bytes
    from streamchat.models.quiet import quiet

    if threads:
        torch.set_num_threads(threads)
    loaded, fit = _model(cell.model)
    tokens = tokenize(document, loaded.tokenizer, cell.max_tokens)
    if len(tokens.ids) < 2:
        return {"error": f"{document.name} has fewer than two tokens"}
    model, method = loaded.model, cell.method
    with quiet():
        check_memory([method], len(tokens.ids), loaded, cell.chunk)
        device: Any = input_device(model)
        ids = torch.tensor(tokens.ids, device=device)
        started = time.perf_counter()
        with open_stream(method, model, fit, cell.chunk) as stream:
            scores = score(stream, ids)
            seconds = time.perf_counter() - started
            times = []
            if stream.limit is None:
                for token in ids[:DECODE_STEPS]:
                    step_started = time.perf_counter()
                    stream.feed(token[None])[-1, 0].item()  # waits for the device
                    times.append(time.perf_counter() - step_started)
    losses = scores.losses[np.isfinite(scores.losses)]
    return {
        "loss": float(losses.sum()),
        "scored": len(losses),
        "unscorable": scores.unscorable,
        "tokens": len(tokens.ids),
        "of": tokens.total,
        "longest_cache": scores.longest,
        "kv_bytes": scores.kv_bytes,
        "weight_bytes": stored_bytes(model),
        "seconds": seconds,
        "decode_ms": 1000 * statistics.median(times) if times else None,
        "ran_in": f"{loaded.dtype} on {loaded.device}",
    }


_loaded_model: list[tuple[ModelChoice, LoadedModel, PositionFit]] = []
"""The model that is loaded in this process, if any."""


def _model(spec: ModelChoice) -> tuple[LoadedModel, PositionFit]:
    from streamchat.models.checked_fit import choose_checked_fit
    from streamchat.models.load import load_model
    from streamchat.models.quiet import quiet

    if not _loaded_model or _loaded_model[0][0] != spec:
        _loaded_model.clear()
        loaded = load_model(
            spec.name, device=spec.device, dtype=spec.dtype, attention=spec.attention, kernels=spec.kernels
        )
        with quiet():
            _loaded_model.append((spec, loaded, choose_checked_fit(loaded.model)))
    return _loaded_model[0][1], _loaded_model[0][2]
