"""`streamchat bench --decode --profile`: where the time of one token goes, by kind of operation."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from streamchat.benchmarks.decode import EndlessReply
from streamchat.decode.native_step import CompiledStep
from streamchat.kernels.operations import ATTEND, STORE, Operation

TOP = 20
"""Maximum number of PyTorch operations that are listed."""
_KINDS = {ATTEND: "attention", STORE: "storing keys and values"}
_BITS = {4: "int4", 8: "int8", 16: "bfloat16", 32: "float32"}


def profile_token(stream: EndlessReply, repeats: int) -> dict[str, float]:
    """Return milliseconds per token by operation: compiled kernels by kind if the model has them, else PyTorch's."""
    step = compiled_step(stream.model)
    return profile_operations(stream, repeats) if step is None else measure_parts(stream, step, repeats)


def compiled_step(model: Any) -> CompiledStep | None:
    """Return the step of compiled kernels that `install` gave `model`, if any."""
    step = getattr(model.forward, "step", None)
    return step if isinstance(step, CompiledStep) else None


def measure_parts(stream: EndlessReply, step: CompiledStep, repeats: int = 100) -> dict[str, float]:
    """Return median milliseconds of the whole token and of its operations by kind, each kind measured alone."""
    token = 1000 * statistics.median(stream.decode(repeats))
    threads = torch.get_num_threads()
    kernels, made = step._kernels, step.program(1, True, threads)
    logits = made.new_logits()  # the last operation writes there
    whole = list(made.operations)
    kinds: dict[str, list[Operation]] = {}
    for each in whole:
        kinds.setdefault(_KINDS.get(each.kind) or f"products, {_BITS[each.each.product.matrices[0].bits]}", []).append(
            each
        )
    found = {"token": token}
    for name, operations in [("kernels, all", whole), *kinds.items()]:
        part = (Operation * len(operations))(*operations)
        times = []
        for _ in range(repeats):
            started = time.perf_counter()
            kernels.run(part, threads)
            times.append(time.perf_counter() - started)
        found[f"{name} ({len(part)})"] = 1000 * statistics.median(times)
    del logits
    return found


def profile_operations(stream: EndlessReply, repeats: int) -> dict[str, float]:
    """Return the milliseconds per token of the slowest PyTorch operations, with their calls per token."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        stream.decode(repeats)
    rows = sorted(profiled.key_averages(), key=lambda row: -row.self_cpu_time_total)
    return {f"{row.key} ({row.count / repeats:.1f})": row.self_cpu_time_total / 1000 / repeats for row in rows[:TOP]}
