"""What all tests on a GPU share. Each runs on a stand-in everywhere, and on CUDA with `pytest -m gpu`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.support.gpus import TestedGpu, real_gpu, stand_in

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA, and torch finds none here")


@pytest.fixture(autouse=True)
def _exact_products() -> Iterator[None]:
    """float32 products without TF32, as on a CPU."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(params=["stand-in", pytest.param("cuda", marks=[pytest.mark.gpu, NEEDS_CUDA])])
def gpu(request: pytest.FixtureRequest) -> TestedGpu:
    """The stand-in, so that a test that no machine runs cannot rot, and the real one."""
    return real_gpu() if request.param == "cuda" else stand_in()
