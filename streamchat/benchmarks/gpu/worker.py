"""The process that measures the cases of `bench --gpu`: one job as JSON on stdin, one line of JSON per result.

A case that fails is a row with its error. An error of the device itself spoils everything after it in the process, so
the process ends with `BROKEN`, and the supervisor starts another one for the other cases.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from streamchat.base.errors import StreamchatError
from streamchat.base.progress import silent
from streamchat.benchmarks.figures import failure_text
from streamchat.benchmarks.gpu.bandwidth import COPIED, copy_bandwidth
from streamchat.benchmarks.gpu.cases import MODEL, Case, Row
from streamchat.benchmarks.gpu.measure import Sizes, Subject, measure_case, measure_flatness
from streamchat.benchmarks.gpu.shapes import SHAPES, random_model
from streamchat.benchmarks.loading import device_name
from streamchat.cache.positions.strategy import choose_fit
from streamchat.config.settings import Settings
from streamchat.models.checked_fit import choose_checked_fit
from streamchat.models.device import free_unused_memory
from streamchat.models.load import load_from_settings
from streamchat.models.quantize.gpu import replace_linear_layers
from streamchat.models.quiet import quiet

BROKEN = 75
"""Exit code after an error of the device."""
DTYPES = {"auto": torch.bfloat16, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""The setting -> the dtype of random weights on a GPU."""
Send = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Job:
    """What one process measures."""

    settings: dict[str, Any]
    device: str
    cases: list[Case]
    first: int
    """Number of the first case, for the lines."""
    sizes: Sizes
    seconds: float
    """Time after which no further case is started."""
    bandwidth: float | None = None
    """Bytes per second, if an earlier process measured them."""
    tokens: int = 0
    """Length of the reply whose tenths are compared, after the cases; 0 = none."""
    flat_shape: str = MODEL
    """The model of that reply."""

    def as_json(self) -> str:
        """Return the job as one line."""
        return json.dumps(asdict(self))

    @classmethod
    def of(cls, line: str) -> Job:
        """Return the job that `as_json` wrote."""
        found = json.loads(line)
        cases, sizes = [Case(**case) for case in found["cases"]], Sizes(**found["sizes"])
        return cls(**{**found, "cases": cases, "sizes": sizes})


class Bench:
    """Runs a job; keeps the latest model.

    Args:
        job: What to measure.
        send: Called with each result.
    """

    def __init__(self, job: Job, send: Send) -> None:
        self._job, self._send = job, send
        self._settings = Settings(**job.settings)
        self._loaded: tuple[str, str, str] | None = None
        self._subject: Subject | None = None

    def run(self) -> int:
        """Measure everything; return the exit code."""
        job, deadline = self._job, time.monotonic() + self._job.seconds
        bandwidth = job.bandwidth
        if bandwidth is None:
            bandwidth = copy_bandwidth(job.device, COPIED)
        self._send({"bandwidth": bandwidth, "gpu": device_name(job.device)})
        for number, case in enumerate(job.cases, job.first):
            if time.monotonic() > deadline:
                return 0
            self._send({"started": number})
            row, is_broken = self._row(case, bandwidth)
            self._send({"row": asdict(row)})
            if is_broken:
                return BROKEN
        if job.tokens:
            self._flat()
        return 0

    def _row(self, case: Case, bandwidth: float) -> tuple[Row, bool]:
        """Return the row of a case, and whether the device is out of order."""
        try:
            with quiet():
                return measure_case(
                    case, self._subject_of(case.shape, case.weights, case.kind), self._job.sizes, bandwidth
                ), False
        except Exception as error:  # whatever a kernel, a compiler or a library raises is the row's own
            name = self._subject.name if self._subject is not None else ""
            if isinstance(error, torch.OutOfMemoryError):
                self._drop()
            return Row(case, name, error=failure_text(error)), is_device_error(error)

    def _subject_of(self, shape: str, weights: str, kind: str) -> Subject:
        """Return the model of a case; the one before is freed first.

        How weights are quantized depends on the kind: in tiles for the fused kernels, else with torchao.
        """
        wanted = shape, weights, "" if weights == "native" else kind
        if self._loaded == wanted and self._subject is not None:
            return self._subject
        self._drop()
        device = self._job.device
        if shape == MODEL:
            loaded = load_from_settings(
                self._settings, silent, device=device, weights="native", decode="plain", kv_dtype="native"
            )
            self._subject = Subject(loaded.model, choose_checked_fit(loaded.model), loaded.name, device)
        else:
            model: Any = random_model(shape, device, DTYPES[self._settings.dtype])
            if weights != "native":
                precision: Any = weights
                decode: Any = kind
                replace_linear_layers(model, precision, decode)
            self._subject = Subject(model, choose_fit(model), SHAPES[shape][0], device)
        self._loaded = wanted
        return self._subject

    def _drop(self) -> None:
        self._subject = self._loaded = None
        if "torch._dynamo" in sys.modules:
            # compiled forwards keep graphs and their memory, and count against the limit of those of a class
            torch._dynamo.reset()
        gc.collect()
        free_unused_memory()

    def _flat(self) -> None:
        """Measure the tenths of a long reply of the first model."""
        try:
            with quiet():
                subject = self._subject_of(self._job.flat_shape, "native", "")
                for tenth in measure_flatness(subject, self._job.sizes, self._job.tokens):
                    self._send({"tenth": asdict(tenth), "model": subject.name})
        except Exception as error:
            self._send({"flat_error": failure_text(error)})


def is_device_error(error: BaseException | None) -> bool:
    """Return whether an error, or one that caused it, leaves the device unusable for the process."""
    broken: Any = getattr(torch, "AcceleratorError", ())
    while error is not None:
        if isinstance(error, broken) or "CUDA error" in str(error) or "device-side assert" in str(error):
            return not isinstance(error, torch.OutOfMemoryError | StreamchatError)
        error = error.__cause__ or error.__context__
    return False


def main() -> int:
    """Run the job of stdin. Results are written to stdout, and whatever else is printed to stderr."""
    results = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)

    def send(line: dict[str, Any]) -> None:
        results.write(json.dumps(line) + "\n")
        results.flush()

    return Bench(Job.of(sys.stdin.readline()), send).run()


if __name__ == "__main__":
    sys.exit(main())
