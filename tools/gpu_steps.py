"""Compares decode steps on one GPU with the forward of transformers: `python -m tools.gpu_steps`.

Tiny models of the families, token by token over evictions: one line of JSON for each model, dtype and step, with the
distance of its logits from those of the forward of transformers in float32, in units of their spread, and that of the
same forward in the dtype itself. Families that have no such step on a GPU are left out. Some models also have lines for
keys and values in 8 and 4 bits, which all three cache in these bits. A comparison that ends the process, as an error of
the device may, costs one line: the others continue in a new process. Exits with 1 if a line has an error or a distance
above its limit.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from streamchat.benchmarks.figures import failure_text
from streamchat.benchmarks.gpu.worker import BROKEN, is_device_error
from streamchat.cache.dtype import cache_dtype, set_cache_dtype
from streamchat.cache.layers.codes import QUANTIZED as KV_DTYPES
from streamchat.cache.logits import logit_distance
from streamchat.cache.positions.strategy import choose_fit
from streamchat.cache.streaming import StreamingCache
from streamchat.decode.install import install, uninstall
from streamchat.decode.report import step_report
from streamchat.decode.steps import MEANINGS
from tests.support.decode_models import KNOWN, make, stream
from tests.support.families import build, text
from tests.support.gpus import stand_in
from tests.support.short_path_families import AVAILABLE, WITHOUT_FUSED, WITHOUT_RECORDED

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
BUDGET, PROMPT, TOKENS = 64, 40, 120
EXACT, ROUNDED = {"native": 1e-3, "int8": 0.01, "int4": 0.1}, {"native": 0.1, "int8": 0.1, "int4": 0.5}
"""Limits of the distance, in float32 and in 16 bits. A number on the border of two codes may get either."""
QUANTIZED: dict[str, tuple[str, dict[str, Any]]] = {
    "heads of 64": ("llama", {"head_dim": 64}),
    "heads of 80": ("llama", {"head_dim": 80}),
    "heads of 128": ("llama", {"head_dim": 128}),
    "heads of 256": ("llama", {"head_dim": 256}),
    "heads of 20": ("llama", {"head_dim": 20}),
    "partial rotary": ("gpt_neox", {}),
    "window": ("mistral_window_16", {"sliding_window": 5}),
    "norms of heads": ("qwen3", {}),
    "copied keys": ("falcon_new", {}),
}
"""Models that are also compared with keys and values in 8 and 4 bits: a family, and changes of its configuration."""
OF_OTHER_DTYPES = 2
"""How many of them are compared in other dtypes than the first."""
NOISE = 2.0
"""In 16 bits, a step may also be so many times as far from float32 as the forward of transformers is."""


@dataclass(frozen=True)
class Comparison:
    """One line."""

    model: str
    dtype: str
    decode: str
    kv_dtype: str = "native"
    step: str = ""
    """The step that ran."""
    distance: float | None = None
    forward_distance: float | None = None
    """Of the forward of transformers in the same dtype."""
    limit: float | None = None
    error: str = ""

    @property
    def passed(self) -> bool:
        """Whether the step is correct."""
        return not self.error and self.distance is not None and self.limit is not None and self.distance <= self.limit


def comparisons(
    kinds: Sequence[str], dtypes: Sequence[str], models: Sequence[str], kv_dtypes: Sequence[str] = ("native",)
) -> list[Comparison]:
    """Return what to compare, without figures; all models of the first dtype come first."""
    missing = {"fused": WITHOUT_FUSED, "graph": WITHOUT_RECORDED}
    found = []
    for kind, dtype in itertools.product(kinds, dtypes):
        if "native" in kv_dtypes:
            found += [Comparison(model, dtype, kind) for model in models if model not in missing[kind]]
        bits = [kv_dtype for kv_dtype in kv_dtypes if kv_dtype != "native"]
        quantized = list(QUANTIZED)[: OF_OTHER_DTYPES if dtype != dtypes[0] else None]
        found += [Comparison(model, dtype, kind, each) for each in bits for model in quantized]
    return found


def tiny_model(name: str) -> Any:
    """Return the seeded float32 model of that name, with an attention that transformers has for it."""
    if name in KNOWN:
        return make(name)
    family, changes = QUANTIZED.get(name, (name, {}))
    return build(family, "eager" if family.startswith("gemma2") else "sdpa", **changes)


def compare(wanted: Comparison, device: str, is_stand_in: bool) -> Comparison:
    """Return `wanted` with its figures."""
    dtype = DTYPES[wanted.dtype]
    model = tiny_model(wanted.model).to(device, dtype)
    exact = copy.deepcopy(model).float()
    for each in (model, exact):
        set_cache_dtype(each, KV_DTYPES.get(wanted.kv_dtype, each.dtype))
    fit = choose_fit(model, check_eviction=False)
    ids = text(TOKENS).to(device)

    def logits(of: Any) -> torch.Tensor:
        cache = StreamingCache(of.config, fit, cache_size=BUDGET, num_sink_tokens=4, dtype=cache_dtype(of))
        return stream(of, cache, ids, PROMPT)[PROMPT:].float()

    expected = logits(exact)
    forward_distance = 0.0 if dtype == torch.float32 else logit_distance(logits(model), expected)
    decode: Any = wanted.decode
    if is_stand_in:
        stand_in().install(model)
    else:
        install(model, None, decode=decode)
    found = logits(model)
    report = step_report(model, decode)
    uninstall(model)
    limit = EXACT[wanted.kv_dtype]
    if dtype != torch.float32:
        limit = max(ROUNDED[wanted.kv_dtype], NOISE * forward_distance)
    error = "" if report.name in MEANINGS[decode] else f"not available: {report.reason}"
    return replace(
        wanted,
        step=report.text,
        distance=logit_distance(found, expected),
        forward_distance=forward_distance,
        limit=limit,
        error=error,
    )


def run_all(wanted: Sequence[Comparison], device: str, is_stand_in: bool) -> int:
    """Print a line for each; return `BROKEN` if the device is out of order, else 1 if one failed."""
    code = 0
    for each in wanted:
        try:
            found = compare(each, device, is_stand_in)
        except Exception as error:  # whatever a kernel or its compiler raises is the line's own
            found = replace(each, error=failure_text(error))
            code = BROKEN if is_device_error(error) else 1
        code = code or int(not found.passed)
        print(json.dumps(asdict(found) | {"passed": found.passed}), flush=True)
        if code == BROKEN:
            break
    return code


def supervise(command: Sequence[str], wanted: Sequence[Comparison]) -> int:
    """Run `command` for all comparisons, again from the next one on whenever it ends early; return 1 if one failed."""
    done, code = 0, 0
    while done < len(wanted):
        started = done
        numbers = f"{done}:{len(wanted)}"
        with subprocess.Popen([*command, "--numbers", numbers], stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            for line in child.stdout:
                print(line, end="", flush=True)
                done += 1
        ended = child.wait()
        code = code or int(ended != 0)
        if done < len(wanted) and ended != BROKEN:
            cut = replace(wanted[done], error=f"the process ended with exit code {ended}")
            print(json.dumps(asdict(cut) | {"passed": False}), flush=True)
            done += 1
        if done == started:
            return 1
    return code


def main() -> int:
    """Compare everything in child processes, or some comparisons in this one."""
    parser = argparse.ArgumentParser(prog="tools.gpu_steps", description="Compare decode steps on one GPU.")
    parser.add_argument("--kinds", nargs="+", default=["fused"], choices=["fused", "graph"], help="default: fused")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES), help="default: all")
    parser.add_argument("--models", nargs="+", help="default: all families with a short path")
    parser.add_argument(
        "--kv-dtypes", nargs="+", default=list(EXACT), choices=list(EXACT), help="of keys and values (default: all)"
    )
    parser.add_argument("--device", default="cuda", help="where the models run (default: cuda)")
    parser.add_argument("--stand-in", action="store_true", help="a CPU that records operations instead of graphs")
    parser.add_argument("--numbers", help=argparse.SUPPRESS)
    args = parser.parse_args()
    models = args.models or [*KNOWN, *(name for name in AVAILABLE if name not in KNOWN)]
    wanted = comparisons(args.kinds, args.dtypes, models, args.kv_dtypes)
    if args.numbers is None:
        return supervise([sys.executable, "-m", "tools.gpu_steps", *sys.argv[1:]], wanted)
    first, last = map(int, args.numbers.split(":"))
    code = run_all(wanted[first:last], "cpu" if args.stand_in else args.device, args.stand_in)
    sys.stdout.flush()
    if code == BROKEN:
        os._exit(BROKEN)  # the device may hang in its destructors
    return code


if __name__ == "__main__":
    sys.exit(main())
