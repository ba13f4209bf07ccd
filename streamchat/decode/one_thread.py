"""Operations on the logits of one token that run on the calling thread only.

PyTorch divides an operation on more than 32,768 numbers among its OpenMP threads. For the logits of one token, that
saves microseconds, but these threads spin afterwards and take the cores from the threads of the compiled kernels. On a
CPU, NumPy is used instead, which has no threads for this. On other devices, these are PyTorch's operations.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

CHUNK = 16_384
"""Numbers per operation: few enough for one thread of PyTorch, and for the processor's caches."""
GROUP = 64
"""Scores that `top_scores` represents by their maximum."""


@contextmanager
def calling_thread_only() -> Iterator[None]:
    """Let PyTorch compute on the calling thread only inside the block: for many short copies on a busy machine.

    Each copy would wait for all of PyTorch's threads, also for one that another program has taken the core of. Does
    nothing without OpenMP: other backends cannot change the number of threads once they run.
    """
    if not _has_openmp():
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@cache
def _has_openmp() -> bool:
    return "backend: OpenMP" in torch.__config__.parallel_info()


def copy(values: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a contiguous copy of `values`, of any shape, in `dtype`."""
    if not _is_on_cpu(values):
        return values.to(dtype, copy=True)
    copied = torch.empty(values.shape, dtype=dtype)
    if values.dtype == torch.float32:
        np.copyto(copied.numpy(), values.detach().numpy())
        return copied
    # NumPy lacks some dtypes, such as bfloat16
    for target, source in zip(*(torch.split(each.reshape(-1), CHUNK) for each in (copied, values)), strict=True):
        target.copy_(source)
    return copied


def maximum(logits: Tensor) -> float:
    """Return the largest of (n,) logits; NaN if any is NaN."""
    return float(_array(logits).max()) if _is_on_cpu(logits) else float(logits.max())


def argmax(logits: Tensor) -> int:
    """Return the index of the largest of (n,) logits."""
    return int(_array(logits).argmax()) if _is_on_cpu(logits) else int(logits.argmax())


def divide(scores: Tensor, divisor: float) -> None:
    """Divide (n,) float32 scores in place."""
    quotients: Any = scores.numpy() if _is_on_cpu(scores) else scores
    with np.errstate(all="ignore"):  # infinity without a warning, as PyTorch
        quotients /= divisor


def logsumexp(scores: Tensor) -> Tensor:
    """Return log(sum(exp(scores))) of (n,) float32 scores, as a scalar."""
    if not _is_on_cpu(scores):
        return scores.logsumexp(-1)
    array = scores.numpy()
    largest = array.max()
    if not np.isfinite(largest):
        return torch.tensor(largest)
    with np.errstate(over="ignore"):  # two finite numbers may be too far apart
        total = sum(float(np.exp(array[at : at + CHUNK] - largest).sum()) for at in range(0, len(array), CHUNK))
    return torch.tensor(largest + np.log(total), dtype=torch.float32)


def top_scores(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` largest of (n,) float32 scores in descending order, and their indices, as `Tensor.topk` does.

    `topk` looks at all scores one by one. Here, the maxima of groups give a bound that few scores reach.
    """
    groups = len(scores) // GROUP
    if _is_on_cpu(scores) and count < groups:
        array = scores.numpy()
        largest = array[: GROUP * groups].reshape(GROUP, groups).max(0)
        bound = np.partition(largest, -count)[-count]  # reached by `count` scores or more
        candidates = torch.from_numpy(np.flatnonzero(array >= bound))
        values, order = scores[candidates].topk(min(count + 1, len(candidates)))
        if bool((values[1:] < values[:-1]).all()):
            return values[:count], candidates[order[:count]]
    # the order of equal scores is PyTorch's
    return scores.topk(count)


def _is_on_cpu(values: Tensor) -> bool:
    return values.device.type == "cpu" and type(values) is Tensor  # NumPy does not accept subclasses


def _array(logits: Tensor) -> Any:
    return (logits.detach() if logits.dtype == torch.float32 else copy(logits)).numpy()
