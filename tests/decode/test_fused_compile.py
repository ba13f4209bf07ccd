"""The fused kernels compile for a GPU, with everything that models need, and spill no registers."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from streamchat.cache.layers.codes import QUANTIZED as KV_DTYPES
from streamchat.decode.families.registry import model_spec
from streamchat.decode.fused.step import sizes_for
from streamchat.decode.spec import ModelSpec, NormSpec
from streamchat.decode.static import Inputs
from streamchat.quantization.layouts import LAYOUTS, LayoutName
from streamchat.quantization.linear import QuantizedLinear
from streamchat.quantization.weights import QuantizedWeight
from tests.support.fused_families import FUSED, build_fused
from tests.support.interpreter import IS_ON
from tools.fused_kernels import META, SHAPES, compile_launch, launches, spec_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None or IS_ON, reason="needs Triton, not interpreted; see .ci/check"
    ),
]
CAPABILITY = (9, 0)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compile_all(spec: ModelSpec, buffers: Any, device: torch.device) -> int:
    """Compile each different kernel of a model once; returns how many there are."""
    from streamchat.decode.fused.program import FusedProgram

    program = FusedProgram(spec, sizes_for(CAPABILITY))
    compiled = set()
    logits = torch.empty(program.vocabulary, device=device)
    for launch, changing in program.calls(Inputs(device), buffers, logits):
        launch.arguments |= changing
        kinds = {k: v.dtype if isinstance(v, torch.Tensor) else v for k, v in launch.arguments.items()}
        if str(kinds) not in compiled:
            compiled.add(str(kinds))
            assert compile_launch(launch, CAPABILITY).spilled == 0
    return len(compiled)


@pytest.mark.parametrize("what", FUSED)
def test_every_family_compiles(what: str) -> None:
    spec = model_spec(build_fused(what).to(torch.bfloat16))
    assert spec is not None
    shapes = [(1, block.attention.num_kv_heads, 24, block.attention.head_dim) for block in spec.blocks]
    buffers = [(torch.zeros(shape, dtype=spec.dtype), torch.zeros(shape, dtype=spec.dtype)) for shape in shapes]
    assert compile_all(spec, buffers, torch.device("cpu")) >= 6


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("shape", ["135M", "8B"])
def test_attention_to_codes_compiles(shape: str, kv_dtype: str) -> None:
    spec = spec_of(SHAPES[shape], torch.bfloat16, "native")
    found = {what: launch for launch, what in launches(spec, sizes_for(CAPABILITY), KV_DTYPES[kv_dtype])}
    assert compile_launch(found["attention"], CAPABILITY).spilled == 0


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_of_tiles_compiles(name: LayoutName) -> None:
    layout, columns, rows = LAYOUTS[name], 2048, 4096
    data = torch.empty(rows // 16, columns // layout.columns, layout.unit_bytes, dtype=torch.uint8, device=META)
    plain = nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16, device=META)
    layer = QuantizedLinear(plain, QuantizedWeight(name, data, torch.empty(0), rows, None))
    norm = NormSpec(torch.empty(columns, device=META), None, 1e-5, False)
    embedding = nn.Embedding(9, columns, dtype=torch.bfloat16, device=META)
    assert compile_all(ModelSpec(embedding, (), (), norm, layer, torch.bfloat16), [], META) == 2


def test_what_is_compiled_at_load_serves_caches_of_any_size() -> None:
    """A number that is 1 or a multiple of 16 would make Triton compile again, during a chat."""
    from streamchat.decode.fused.kernels import attend

    assert [each.name for each in attend.params if each.do_not_specialize] == ["slots", "splits"]
