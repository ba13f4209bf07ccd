"""Measures products of the compiled kernels and of PyTorch on one thread: `python -m tools.product_speed`.

Prints billions of multiplications per second, the fastest of several runs in CPU time. For lower instruction
sets, set CC="gcc -mno-avx512f -mno-avxvnni", and ATEN_CPU_CAPABILITY=avx2 and ONEDNN_MAX_CPU_ISA=AVX2 for PyTorch.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch

from streamchat.kernels.library import load_kernels, why_unavailable
from streamchat.quantization.weights import Kind, quantize

SHAPES = ((576, 576), (1536, 576), (576, 1536), (2048, 2048), (8192, 2048))
"""Rows and columns: matrices of the default model, and of one with 1.7 billion weights."""
COUNTS = (1, 4, 32, 64, 128, 256)
KINDS: tuple[Kind, ...] = ("int4", "int8")
SECONDS = 0.3
"""Time for one figure."""


def main() -> None:
    """Print one line for each shape and number of vectors."""
    parser = argparse.ArgumentParser(prog="tools.product_speed", description="Measure products on one thread.")
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS, help="numbers of vectors")
    counts = parser.parse_args().counts
    torch.set_num_threads(1)
    kernels = load_kernels("auto")
    if kernels is None:
        parser.error(str(why_unavailable("auto")))
    print(f"{'rows x columns':>14} {'vectors':>7} {'int4':>8} {'int8':>8} {'float32':>8} {'bfloat16':>8}")
    for rows, columns in SHAPES:
        weight = torch.randn(rows, columns)
        quantized = [quantize(weight, kind, kernels) for kind in KINDS]
        for count in counts:
            x = torch.randn(count, columns)
            products: list[Callable[[], object]] = [partial(each.multiply, x) for each in quantized]
            for dtype in (torch.float32, torch.bfloat16):
                products.append(partial(torch.nn.functional.linear, x.to(dtype), weight.to(dtype)))
            speeds = [rows * columns * count / least_time(each) / 1e9 for each in products]
            print(f"{f'{rows} x {columns}':>14} {count:7}", *(f"{speed:8.1f}" for speed in speeds), flush=True)


def least_time(call: Callable[[], object]) -> float:
    """Return the least CPU time of `call` in seconds."""
    least, stop = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < stop:
        started = time.thread_time()
        call()
        least = min(least, time.thread_time() - started)
    return least


if __name__ == "__main__":
    with torch.inference_mode():
        main()
