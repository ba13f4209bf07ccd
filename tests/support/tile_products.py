"""A product of the fused kernels with random quantized weights."""

from __future__ import annotations

import torch
from torch import Tensor

from streamchat.decode.fused.step import FusedStep
from streamchat.decode.spec import ModelSpec, NormSpec
from streamchat.decode.static import Inputs
from streamchat.kernels.operations import SCALE_MIN, SUPER_32
from streamchat.quantization.layouts import LAYOUTS, Coded, LayoutName, tiles, weights_of
from streamchat.quantization.linear import QuantizedLinear
from streamchat.quantization.weights import QuantizedWeight

ROWS, COLUMNS = 40, 256


def random_tiles(name: LayoutName, device: torch.device) -> QuantizedWeight:
    """Return a matrix of 40 x 256 weights; its last tile is padded."""
    layout, rows = LAYOUTS[name], ROWS
    random = torch.Generator().manual_seed(2)

    def numbers(low: int, high: int, dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=random).to(dtype)

    def halves(*shape: int) -> Tensor:
        return (0.02 * torch.randn(shape, generator=random)).half()

    codes = (
        numbers(0, 16, torch.uint8, rows, 8, 32) if layout.bits == 4 else numbers(-128, 128, torch.int8, rows, 8, 32)
    )
    if layout.scales >= SUPER_32:
        limits = (0, 64, torch.uint8) if layout.scales == SUPER_32 else (-128, 128, torch.int8)
        coded = Coded(codes, [numbers(*limits, rows, 8) for _ in range(2)], [halves(rows, 1), halves(rows, 1)])
    else:
        coded = Coded(codes, [halves(rows, 8) for _ in range(1 + (layout.scales == SCALE_MIN))])
    return QuantizedWeight(name, tiles(layout, coded).to(device), torch.empty(0), rows, None)


@torch.no_grad()
def product_with_tiles(name: LayoutName, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return a product after a norm, and what it should be, in float32."""
    layout, rows, columns = LAYOUTS[name], ROWS, COLUMNS
    random = torch.Generator().manual_seed(3)
    weight = random_tiles(name, device)
    layer = QuantizedLinear(torch.nn.Linear(columns, rows, bias=False, dtype=dtype, device=device), weight)
    norm = NormSpec(torch.rand(columns, generator=random).to(device), None, 1e-5, False)
    embedding = torch.nn.Embedding(9, columns).requires_grad_(False).to(device, dtype)
    spec = ModelSpec(embedding, (), (), norm, layer, dtype)
    inputs = Inputs(device)
    inputs.fill(torch.tensor([[4]]), torch.zeros(1, 1, dtype=torch.long), 0, 0)
    found = FusedStep(spec, device).run(inputs, [])[0, 0]
    x = torch.nn.functional.rms_norm(embedding.weight[4].float(), (columns,), norm.weight, norm.eps)
    expected = weights_of(layout, weight.data).view(-1, columns)[:rows] @ x
    return found, expected
