"""Runs a target on one input and finds faults."""

from __future__ import annotations

import re
import resource
import sys
import time
import traceback
from dataclasses import dataclass

from tools.fuzz.target import Target

MAX_SECONDS = 5.0
"""CPU time for one input. Instrumented code is several times slower than the same code in use."""
MAX_BYTES = 400_000_000
"""Growth of the peak memory of the process by one input."""
MAX_SENTENCE = 2_000
_NO_SENTENCE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_UNIT = 1 if sys.platform == "darwin" else 1024


@dataclass(frozen=True)
class Fault:
    """Something that must not happen."""

    kind: str
    """The name of an exception, 'slow', 'memory' or 'sentence'."""
    place: str
    """The innermost function of streamchat in the traceback, or of the target."""
    text: str

    @property
    def identity(self) -> tuple[str, str]:
        """What two inputs with the same fault have in common."""
        return self.kind, self.place

    def __str__(self) -> str:
        return f"{self.kind} in {self.place}: {self.text}"


def find_fault(target: Target, data: bytes, *, timed: bool = True) -> Fault | None:
    """Run `target` on `data` and return what is wrong; None if nothing is.

    Args:
        target: What to run.
        data: The input.
        timed: Whether to limit the CPU time. Set it to False if other threads run at the same time.
    """
    peak, start = _peak_bytes(), time.process_time()
    try:
        target.run(data)
        fault = None
    except target.refusals as error:
        fault = _unfit_sentence(error)
    except (KeyboardInterrupt, MemoryError):
        raise
    except BaseException as error:  # SystemExit as well: a parser must not end the process
        fault = Fault(type(error).__name__, _place(error), str(error)[:300])
    seconds, grown = time.process_time() - start, _peak_bytes() - peak
    if fault is None and timed and seconds > MAX_SECONDS:
        return Fault("slow", target.name, f"{seconds:.1f} s of CPU time for {len(data):,} bytes")
    if fault is None and grown > MAX_BYTES:
        return Fault("memory", target.name, f"{grown:,} bytes for {len(data):,} bytes of input")
    return fault


def _unfit_sentence(error: Exception) -> Fault | None:
    text = str(error)
    if not text.strip():
        why = "it is empty"
    elif found := _NO_SENTENCE.search(text):
        why = f"it has the character {found[0]!r}"
    elif len(text) > MAX_SENTENCE:
        why = f"it has {len(text):,} characters"
    else:
        return None
    return Fault("sentence", _place(error), f"{why}: {text[:200]!r}")


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/streamchat/" in frame.filename.replace("\\", "/")]
    frame = (ours or frames)[-1]
    module = re.sub(r".*/(?:streamchat|site-packages|tools)/", "", frame.filename.replace("\\", "/"))
    return f"{module}:{frame.name}"


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _UNIT
