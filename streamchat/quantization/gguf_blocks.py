"""Blocks of GGUF files as tiles."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type

from streamchat.kernels.operations import TILE
from streamchat.quantization.weights import CHUNK, QuantizedWeight, quantize

SERVED = {
    Type.Q4_0: "int8", Type.Q4_1: "int4", Type.Q5_0: "int8", Type.Q5_1: "int8", Type.Q8_0: "int8",
    Type.Q4_K: "int4", Type.Q5_K: "int8", Type.Q6_K: "int8",
}


def tiles_of_gguf(data: Any, type: Any, order: Any, kernels: Any) -> QuantizedWeight:
    kind = SERVED[type]
    if order is not None:
        data = data[order]
    rows = len(data)
    if rows % 16:
        kind = "int8"
    columns = gguf.quant_shape_from_byte_shape(data.shape, type)[1]
    step = max(1, CHUNK // columns // TILE) * TILE
    parts = [
        quantize(torch.from_numpy(gguf.dequantize(np.ascontiguousarray(data[at : at + step]), type)), kind, kernels, tiled=True)
        for at in range(0, rows, step)
    ]
    return QuantizedWeight(kind, torch.cat([part.data for part in parts]), parts[0].scales, rows, kernels)
