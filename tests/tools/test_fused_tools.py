"""The programs that compile and measure the fused kernels."""

from __future__ import annotations

import pytest
import torch

from streamchat.decode.fused.sizes import Sizes
from streamchat.decode.fused.step import supports
from tests.support.interpreter import needs_interpreter, patch_once
from tools import fused_sizes
from tools.fused_kernels import META, SHAPES, Shape, spec_of
from tools.fused_sizes import VARIANTS, bytes_per_token, measure_shape

SMALL = Shape(64, 96, 4, 2, 16, 70, layers=1)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("weights", ["native", "int8", "int4"])
def test_the_kernels_compute_the_shapes_that_are_compiled(name: str, weights: str) -> None:
    assert supports(spec_of(SHAPES[name], torch.bfloat16, weights))


def test_the_bytes_of_a_token_are_those_of_its_weights_and_its_cache() -> None:
    shape = SHAPES["8B"]
    spec = spec_of(shape, torch.bfloat16, "native", META, shape.layers)
    assert bytes_per_token(spec, shape) == pytest.approx(2 * (8.03e9 - 128256 * 4096) + 1024 * 131072, rel=0.01)


def test_variants_are_sizes() -> None:
    for changes in VARIANTS.values():
        assert Sizes(**changes)


@needs_interpreter
@pytest.mark.parametrize("weights", ["native", "int4"])
def test_variants_are_measured_and_compared(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VARIANTS, "overlap", {"overlap": True})
    monkeypatch.setattr(fused_sizes, "SLOTS", 192)
    monkeypatch.setattr(fused_sizes, "LIVE", 80)
    patch_once()
    found = list(measure_shape("small", SMALL, weights, ["default", "8 rows", "overlap"], torch.device("cpu"), 1))
    assert [each.variant for each in found] == ["default", "8 rows", "overlap"]
    for each in found[:2]:
        assert not each.error
        assert each.distance is not None
        assert each.distance < 1e-5
        assert each.ms_per_token
    assert found[2].error  # needs a GPU
    assert found[2].ms_per_token is None
