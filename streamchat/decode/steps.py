"""The steps that compute new tokens, and which one a device gets; needs no torch."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from streamchat.base.devices import device_type, is_spread
from streamchat.config.settings import Decode

COMPILED, OPERATIONS = "compiled kernels", "PyTorch operations"
FUSED, GRAPH = "fused kernels", "captured graph"
PLAIN = "transformers"
NOT_SUPPORTED = "the kernels do not support the model"
MEANINGS: dict[Decode, tuple[str, ...]] = {
    "auto": (COMPILED, OPERATIONS, FUSED, GRAPH, PLAIN),
    "fused": (COMPILED, FUSED),
    "graph": (OPERATIONS, GRAPH),
    "plain": (PLAIN,),
}
"""Setting -> the steps that it means, on a CPU and on a GPU."""


@dataclass(frozen=True)
class StepReport:
    """The step that runs."""

    name: str
    """`COMPILED`, `OPERATIONS`, `FUSED`, `GRAPH` or `PLAIN`."""
    reason: str = ""
    """Why no faster step runs; '' if this is the fastest."""

    @property
    def text(self) -> str:
        """`captured graph: decode = graph`."""
        return f"{self.name}: {self.reason}" if self.reason else self.name

    def note(self, decode: Decode) -> str:
        """Return a sentence for the user if `decode` named another step; '' if it runs."""
        if self.name in MEANINGS[decode]:
            return ""
        return f"decode = {decode} is not available here ({self.reason}), so new tokens are computed by {self.name}."


def fused_obstacle() -> str:
    """Return why no model on a GPU has fused kernels here; '' if models may have them."""
    return "" if importlib.util.find_spec("triton") is not None else "Triton is not installed"


def expected_step(device: str, decode: Decode, no_kernels: str = "") -> StepReport:
    """Return which step a model on `device` is expected to get, if it has all of them; without loading one."""
    if decode == "plain":
        return StepReport(PLAIN, "decode = plain")
    if is_spread(device):
        return StepReport(PLAIN, "the layers are on several devices")
    kind = device_type(device)
    if kind not in ("cpu", "cuda"):
        return StepReport(PLAIN, f"there is no step for {kind}")
    fast, slow, obstacle = (COMPILED, OPERATIONS, no_kernels) if kind == "cpu" else (FUSED, GRAPH, fused_obstacle())
    reason = "decode = graph" if decode == "graph" else obstacle
    return StepReport(slow, reason) if reason else StepReport(fast)
