"""Dequantizes tiles: rows of an embedding, or a whole matrix."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from streamchat.kernels.library import Kernels
from streamchat.kernels.operations import BFLOAT16, FLOAT16, FLOAT32, TILE, Matrix
from streamchat.quantization.layouts import Layout, weights_of

FORMATS = {torch.bfloat16: BFLOAT16, torch.float16: FLOAT16, torch.float32: FLOAT32}
"""Number formats of the kernels."""
WEIGHTS_TOGETHER = 1 << 20
"""Weights that are converted together; their float32 copies fit the caches."""


ON_A_GPU = 1 << 24
"""The same on a GPU, which needs few launches more than it needs caches: 64 MiB of float32."""


def rows_together(columns: int, weights: int = WEIGHTS_TOGETHER) -> int:
    """Return how many rows of a matrix are converted together: whole tiles, of about as many weights."""
    return max(1, weights // columns // TILE) * TILE


def chunks(layout: Layout, data: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield the rows of a matrix of tiles in order, (some, columns) each, dequantized on its device.

    A GPU only runs operations for it; the host does not wait for them, so that they can be recorded.
    """
    step = rows_together(columns, WEIGHTS_TOGETHER if data.device.type == "cpu" else ON_A_GPU)
    for first in range(0, rows, step):
        stop = min(first + step, rows)
        part = weights_of(layout, data[first // TILE : -(-stop // TILE)])
        yield part.view(-1, columns)[: stop - first].to(dtype)


def dequantize(
    layout: Layout, data: Tensor, rows: int, columns: int, dtype: torch.dtype, kernels: Kernels | None
) -> Tensor:
    """Return the (rows, columns) weights of tiles, on their device; on a CPU, with all threads."""
    if data.device.type != "cpu":
        whole, done = torch.empty(rows, columns, dtype=dtype, device=data.device), 0
        for chunk in chunks(layout, data, rows, columns, dtype):
            whole[done : done + len(chunk)] = chunk
            done += len(chunk)
        return whole
    with torch.inference_mode(False):  # the other threads are not in inference mode, and write to it
        out = torch.empty(rows, columns, dtype=dtype)
    step = rows_together(columns)

    def fill(first: int) -> None:
        stop = min(first + step, rows)
        if kernels is not None and dtype in FORMATS:
            matrix = Matrix(data.data_ptr(), None, rows, layout.bits, layout.scales)
            kernels.dequantize(matrix, columns, None, first, stop - first, FORMATS[dtype], out[first:stop].data_ptr())
            return
        part = weights_of(layout, data[first // TILE : -(-stop // TILE)])
        out[first:stop] = part.view(-1, columns)[: stop - first]

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(fill, range(0, rows, step)))
    return out


def rows_at(
    layout: Layout, data: Tensor, ids: Tensor, columns: int, dtype: torch.dtype, kernels: Kernels | None
) -> Tensor:
    """(n,) ids -> (n, columns): rows of the matrix of tiles. The ids are not checked."""
    count = len(ids)
    if kernels is not None and dtype in FORMATS:
        out, numbers = torch.empty(count, columns, dtype=dtype), ids.to(torch.int64).contiguous()
        matrix = Matrix(data.data_ptr(), None, TILE * len(data), layout.bits, layout.scales)
        kernels.dequantize(matrix, columns, numbers.data_ptr(), 0, count, FORMATS[dtype], out.data_ptr())
        return out
    rows = weights_of(layout, data[ids // TILE])
    return rows[torch.arange(count, device=ids.device), ids % TILE].to(dtype)
