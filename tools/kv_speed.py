"""Compares decoding with keys and values in several dtypes, in turn on one thread: `python -m tools.kv_speed`.

Prints the median processor time of a token, and the speed relative to the first dtype.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache

from streamchat.cache.layers.codes import QUANTIZED, CacheDtype
from streamchat.cache.layers.layer import LayerRotation, StreamingLayer
from streamchat.decode.install import is_compiled
from streamchat.kernels.library import why_unavailable
from streamchat.models.load import load_model

DTYPES: dict[str, CacheDtype] = {"bfloat16": torch.bfloat16, "float32": torch.float32, **QUANTIZED}


def decoder(model: Any, dtype: CacheDtype, cached: int, steps: int) -> Callable[[], float]:
    """Return a function that decodes a token after `cached` others and returns the seconds of processor time."""
    count = len(DynamicCache(config=model.config).layers)
    layers = [StreamingLayer(cached + steps + 1, LayerRotation(), dtype) for _ in range(count)]
    step, generator = model.forward.step, torch.Generator().manual_seed(0)
    step(torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1, dtype=torch.long), layers)
    for layer in layers:
        layer.reserve_slots(cached - 1)
        assert layer.storage is not None
        for stored in layer.storage.both:
            states = stored.read(0, 1).float()
            stored.write(0, torch.randn(*states.shape[:2], cached, states.shape[3], generator=generator))

    def run() -> float:
        ids, positions = torch.full((1, 1), 5), torch.full((1, 1), layers[0].length)
        started = time.thread_time()
        step(ids, positions, layers)
        return time.thread_time() - started

    return run


@torch.inference_mode()
def main() -> None:
    """Print one line per number of cached tokens and dtype."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="default")
    parser.add_argument("--weights", default="auto")
    parser.add_argument("--cached", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["bfloat16", *QUANTIZED])
    args = parser.parse_args()
    torch.set_num_threads(1)
    loaded = load_model(args.model, device="cpu", weights=args.weights)
    if not is_compiled(loaded.model):
        raise SystemExit(f"no compiled kernels decode for {loaded.name}: {why_unavailable('auto')}")
    print(f"{loaded.name}, {loaded.dtype}, {loaded.weights} weights, {torch.backends.cpu.get_cpu_capability()}")
    for cached in args.cached:
        runs = {name: decoder(loaded.model, DTYPES[name], cached, args.steps) for name in args.dtypes}
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(args.steps):
            for name, run in runs.items():
                times[name].append(run())
        first = statistics.median(next(iter(times.values())))
        for name, each in times.items():
            median = statistics.median(each)
            print(f"{cached:6,} cached, {name:>9}: {1e3 * median:6.2f} ms, {first / median:.2f}x", flush=True)


if __name__ == "__main__":
    main()
