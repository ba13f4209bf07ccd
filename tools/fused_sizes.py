"""Measures the fused kernels with other block sizes, on one GPU: `python -m tools.fused_sizes`.

A decode step of a model with random weights is captured as a CUDA graph for each variant, on a cache with 1,024 live
slots. One line of JSON per variant: milliseconds per token, bytes of weights and cache per second, and the distance of
the logits from those of the defaults, in units of their spread. A variant that does not compile or run is a line with
its error. The best variant of each shape comes last; `streamchat/decode/fused/sizes.py` has the defaults.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from streamchat.cache.logits import logit_distance
from streamchat.decode.cuda_graph import CudaRecorder
from streamchat.decode.fused.step import FusedStep, sizes_of
from streamchat.decode.spec import ModelSpec
from streamchat.decode.static import Inputs
from streamchat.quantization.linear import QuantizedLinear
from tools.fused_kernels import SHAPES, SLOTS, Shape, spec_of

LIVE = 1024
"""Cached tokens."""
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "no overlap": {"overlap": False},
    "4 waves": {"waves": 4.0},
    "1 wave": {"waves": 1.0},
    "tile 2048": {"tile": 2048},
    "tile 8192": {"tile": 8192},
    "8 warps, tile 8192": {"product_warps": 8, "tile": 8192},
    "8 rows": {"max_rows": 8},
    "2 warps, tile 2048": {"product_warps": 2, "tile": 2048},
    "attention 128": {"attention_block": 128},
    "attention 32": {"attention_block": 32},
    "attention 8 warps": {"attention_warps": 8},
    "attention 3 stages": {"attention_stages": 3},
    "64 slots per program": {"least_slots": 64},
    "256 slots per program": {"least_slots": 256},
    "tile groups 8": {"tile_groups": 8},
    "tile groups 32": {"tile_groups": 32},
}
"""Changes of the sizes, by name."""


@dataclass(frozen=True)
class Found:
    """A variant of a shape."""

    shape: str
    weights: str
    variant: str
    ms_per_token: float | None = None
    gb_per_second: float | None = None
    distance: float | None = None
    error: str = ""


def main() -> int:
    """Measure and print; return 1 if the defaults fail."""
    parser = argparse.ArgumentParser(prog="tools.fused_sizes", description="Measure block sizes of the fused kernels.")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["135M", "410M", "1.7B", "8B"])
    parser.add_argument("--weights", choices=("native", "int8", "int4"), default="native", help="(default: native)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="(default: all)")
    parser.add_argument("--device", default="cuda", help="(default: cuda)")
    parser.add_argument("--tokens", type=int, default=100, help="tokens per measurement (default: 100)")
    args = parser.parse_args()
    device, failed = torch.device(args.device), False
    for name in args.shapes:
        found: list[Found] = []
        for each in measure_shape(name, SHAPES[name], args.weights, args.variants, device, args.tokens):
            print(json.dumps(asdict(each)), flush=True)
            found.append(each)
        failed |= any(each.error for each in found if each.variant == "default")
        timed = [each for each in found if each.ms_per_token is not None]
        if timed:
            print(f"{name}: {min(timed, key=lambda each: each.ms_per_token or 0.0).variant} is the fastest", flush=True)
    return 1 if failed else 0


@torch.inference_mode()
def measure_shape(
    name: str, shape: Shape, weights: str, variants: list[str], device: torch.device, tokens: int
) -> Iterator[Found]:
    """Yield the figures of each variant."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    spec = spec_of(shape, dtype, weights, device, shape.layers)
    size = 1, shape.kv_heads, SLOTS, shape.head_dim
    buffers = [(torch.randn(size, dtype=dtype, device=device), torch.randn(size, dtype=dtype, device=device))]
    buffers += [tuple(each.clone() for each in buffers[0]) for _ in spec.blocks[1:]]  # type: ignore[misc]
    inputs, expected = Inputs(device), None
    ids, positions = torch.tensor([[7]]), torch.tensor([[LIVE]])
    inputs.fill(ids, positions, 100, 100 + LIVE)
    moved = bytes_per_token(spec, shape)
    for variant in variants:
        found = Found(name, weights, variant)
        try:
            step = FusedStep(spec, device, replace(sizes_of(device), **VARIANTS[variant]))
            replay = recorded(step, inputs, buffers, device)
            logits = replay().clone()
            expected = logits if expected is None else expected
            seconds = seconds_per_run(replay, device, tokens)
            distance = max(logit_distance(logits, expected), logit_distance(replay(), expected))
            yield replace(found, ms_per_token=1000 * seconds, gb_per_second=moved / seconds / 1e9, distance=distance)
        except Exception as error:  # whatever a compiler or a driver raises is this variant's own
            yield replace(found, error=f"{type(error).__name__}: {error}"[:300])


def recorded(step: FusedStep, inputs: Inputs, buffers: Any, device: torch.device) -> Callable[[], Tensor]:
    """Return the step as a CUDA graph; as it is on a CPU."""

    def run() -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            return step.run(inputs, buffers)

    return CudaRecorder(device)(run) if device.type == "cuda" else run


def seconds_per_run(run: Callable[[], Tensor], device: torch.device, runs: int) -> float:
    """Return the seconds of one run: the least of three measurements."""
    best = float("inf")
    for _ in range(3):
        wait(device)
        started = time.perf_counter()
        for _ in range(runs):
            run()
        wait(device)
        best = min(best, (time.perf_counter() - started) / runs)
    return best


def wait(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def bytes_per_token(spec: ModelSpec, shape: Shape) -> int:
    """Return the bytes of the weights and of the live slots, which a token reads once."""
    layers = spec.linear_layers
    weights = sum(each.quantized.nbytes if isinstance(each, QuantizedLinear) else each.weight.nbytes for each in layers)
    cached: int = 2 * LIVE * shape.kv_heads * shape.head_dim * spec.dtype.itemsize * len(spec.blocks)
    return int(weights) + cached


if __name__ == "__main__":
    sys.exit(main())
