"""The compiled kernels: right to the rounding of their formats, built once, and never in the way where they fail."""

from __future__ import annotations

import ctypes
import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from streamchat.base import paths
from streamchat.decode.families.registry import model_spec
from streamchat.decode.install import install, uninstall
from streamchat.decode.native_step import MAX_PROGRAMS, CompiledStep, kernels_support
from streamchat.kernels import build, library, operations, platforms, sealed
from streamchat.kernels.build import KernelsUnavailableError
from streamchat.kernels.library import load_kernels, why_unavailable
from streamchat.kernels.operations import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    GELU,
    GELU_TANH,
    RELU,
    RELU2,
    SILU,
    SOFTCAP,
    Attention,
    Matrix,
    Norm,
    Operation,
    attend,
    product,
    program,
)
from streamchat.models.load import load_model
from streamchat.quantization.codes import int4_codes, int8_codes
from streamchat.quantization.linear import quantized_layers
from streamchat.quantization.replace import groups, quantize_group, replace
from streamchat.quantization.weights import BITS, Kind, quantize
from tests.support.decode_models import cache_of, counted_calls, make, stream
from tests.support.families import text
from tests.support.models_help import save, tiny_llama
from tests.support.tiny import fresh_model

needs_kernels = pytest.mark.skipif(load_kernels("auto") is None, reason=why_unavailable("auto"))


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


FORMATS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}


# --- what they compute -----------------------------------------------------------------------------------------


def stands_for(weight: Tensor, kind: Kind) -> Tensor:
    """The float64 matrix that the codes and scales of `weight` mean, computed without the kernels."""
    if kind == "int8":
        codes, steps = int8_codes(weight)
        return (codes.double() * steps.double().unsqueeze(-1)).reshape(weight.shape)
    codes, scales = int4_codes(weight)
    scale, zero = (part.double().unsqueeze(-1) for part in scales.unbind(-1))
    return ((codes - 8) * scale + zero).reshape(weight.shape)


@needs_kernels
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("count", [1, 2, 5, 9, 50, 103])
@pytest.mark.parametrize(("rows", "columns"), [(16, 32), (48, 96), (192, 576), (576, 1536)])
def test_products_are_exact_but_for_the_rounding_of_the_vector(kind: Kind, count: int, rows: int, columns: int) -> None:
    weight, x = noise(rows, columns), noise(count, columns, seed=2)
    x[0, 3] = 40.0  # as the large numbers of some channels
    packed = quantize(weight, kind, load_kernels("auto"))
    assert packed.tiled
    meant = stands_for(weight, kind)
    # half a step of each group's 16 bits, times the weights of the group
    steps = (x.view(count, -1, 32).abs().amax(-1) / 32767).repeat_interleave(32, 1)
    allowed = 0.51 * steps.double() @ meant.abs().T
    found = packed.multiply(x)
    assert ((found - x.double() @ meant.T).abs() <= allowed + 1e-5 * meant.abs().sum(1).max()).all()


@needs_kernels
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_a_number_shows_in_every_row(kind: Kind, value: float) -> None:
    x = noise(1, 64)
    x[0, 40] = value
    assert not torch.isfinite(quantize(noise(32, 64), kind, load_kernels("auto")).multiply(x)).any()


@needs_kernels
def test_a_vector_of_zeros_gives_zeros() -> None:
    for kind in ("int8", "int4"):
        assert not quantize(noise(32, 64), kind, load_kernels("auto")).multiply(torch.zeros(2, 64)).any()


def run(*operations: Operation, threads: int = 2) -> None:
    compiled = load_kernels("auto")
    assert compiled is not None
    compiled.run(program(operations), threads)


def multiply(x: Tensor, *matrices: Tensor, out: Tensor, **members: Any) -> Operation:
    """The product of `x` with float32 matrices; keep all of them alive."""
    count, columns = x.shape
    given = [Matrix(each.data_ptr(), rows=each.shape[0], bits=32) for each in matrices]
    members = {"x": x.data_ptr(), "out": out.data_ptr(), "out_stride": out.shape[1]} | members
    return product(*given, columns=columns, count=count, **members)


@needs_kernels
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_one_product_may_have_quantized_and_other_matrices_in_any_order(kind: Kind) -> None:
    quantized, plain, x = (
        quantize(noise(32, 64), kind, load_kernels("auto")),
        noise(5, 64, seed=3),
        noise(2, 64, seed=2),
    )
    first = Matrix(quantized.data.data_ptr(), None, 32, BITS[kind])
    second = Matrix(plain.data_ptr(), None, 5, 32)
    expected = torch.cat([quantized.multiply(x), x @ plain.T], dim=1)
    for matrices, order in (((first, second), range(37)), ((second, first), [*range(32, 37), *range(32)])):
        out = torch.empty(2, 37)
        members = {"x": x.data_ptr(), "out": out.data_ptr(), "out_stride": 37, "count": 2}
        run(product(*matrices, columns=64, **members))
        torch.testing.assert_close(out, expected[:, list(order)], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@needs_kernels
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize(("heads", "queries", "dim"), [(3, 3, 64), (2, 1, 64), (1, 8, 128), (2, 35, 80), (5, 2, 64)])
@pytest.mark.parametrize(("held", "spans"), [(0, 1), (0, 3), (1, 2), (63, 2), (64, 1), (200, 4)])
@pytest.mark.parametrize("tokens", [1, 3, 5, 70])
def test_attention_is_that_of_a_plain_softmax(
    dtype: torch.dtype, heads: int, queries: int, dim: int, held: int, spans: int, tokens: int
) -> None:
    compiled = load_kernels("auto")
    assert compiled is not None
    slots, width = held + tokens + 2, dim // 2
    keys, values = noise(heads, slots, dim, seed=2).to(dtype), noise(heads, slots, dim, seed=3).to(dtype)
    # scores far apart: the running maximum moves, and most shares vanish
    qkv = noise(tokens, heads * (queries + 2), dim)
    qkv[:, : heads * queries] *= 3
    angles = noise(tokens, width // 2, seed=6).repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()
    before = keys.clone(), values.clone()
    partial = torch.empty(compiled.attention_partial(tokens, heads, queries, dim, spans))
    first = [qkv[:, at:].data_ptr() for at in (0, heads * queries, heads * (queries + 1))]
    attention = Attention(
        *first,
        cos=cos.data_ptr(),
        sin=sin.data_ptr(),
        keys=keys.data_ptr(),
        values=values.data_ptr(),
        partial=partial.data_ptr(),
        query_stride=queries * dim,
        key_stride=dim,
        value_stride=dim,
        token_stride=qkv.stride(0),
        head_stride_bytes=slots * dim * dtype.itemsize,
        cached=held,
        tokens=tokens,
        rotary_dim=width,
        num_kv_heads=heads,
        num_kv_groups=queries,
        head_dim=dim,
        format=FORMATS[dtype],
        spans=spans,
        scale=dim**-0.5,
    )
    out, identity = torch.empty(tokens, heads * queries * dim), torch.eye(heads * queries * dim)
    run(*attend(attention), multiply(out, identity, out=out, attention=ctypes.pointer(attention)))

    def turned(x: Tensor) -> Tensor:
        """(tokens, heads, dim)"""
        part = x[..., :width]
        half = torch.cat([-part[..., width // 2 :], part[..., : width // 2]], dim=-1)
        return torch.cat([part * cos[:, None] + half * sin[:, None], x[..., width:]], dim=-1)

    q, k, v = torch.split(qkv, [heads * queries, heads, heads], dim=1)
    new = turned(k).to(dtype).transpose(0, 1), v.to(dtype).transpose(0, 1)
    for buffer, old, fresh in zip((keys, values), before, new, strict=True):
        torch.testing.assert_close(buffer[:, held : held + tokens], fresh, rtol=2**-7, atol=1e-6)
        assert torch.equal(buffer[:, :held], old[:, :held])
        assert torch.equal(buffer[:, held + tokens :], old[:, held + tokens :])
    for t in range(tokens):
        seen = keys[:, : held + t + 1].double(), values[:, : held + t + 1].double()
        scores = turned(q)[t].double().view(heads, queries, dim) @ seen[0].transpose(1, 2) * dim**-0.5
        expected = (scores.softmax(-1) @ seen[1]).view(-1)
        torch.testing.assert_close(out[t].double(), expected, rtol=0, atol=2e-5)


@needs_kernels
def test_activations_and_norms_are_those_of_torch() -> None:
    x, identity = torch.linspace(-30, 30, 99)[None], torch.eye(99)
    factors = torch.diag(noise(99))
    functions = {
        SILU: torch.nn.functional.silu(x),
        GELU: torch.nn.functional.gelu(x),
        GELU_TANH: torch.nn.functional.gelu(x, approximate="tanh"),
        RELU: x.relu(),
        RELU2: x.relu().square(),
        SOFTCAP: 5 * (x / 5).tanh(),
    }
    for function, expected in functions.items():
        out = torch.empty(1, 99)
        run(multiply(x, identity, out=out, function=function, softcap=5.0))
        torch.testing.assert_close(out, expected, rtol=2e-6, atol=2e-6)
        run(multiply(x, identity, factors, out=out, function=function, gated=1, softcap=5.0))
        gate = x @ factors.T
        torch.testing.assert_close(out, expected * gate, rtol=2e-6, atol=2e-6 * float(gate.abs().max()))
    rows, added, weight, identity = noise(40, 72), noise(40, 72, seed=3), noise(72, seed=2), torch.eye(72)
    for is_layer_norm in (0, 1):
        out, total = torch.empty(40, 72), torch.empty(40, 72)
        norm = Norm(weight.data_ptr(), None, 1e-5, is_layer_norm)
        run(multiply(rows, identity, out=out, added=added.data_ptr(), sum=total.data_ptr(), norm=norm))
        plain = torch.nn.functional.layer_norm if is_layer_norm else torch.nn.functional.rms_norm
        assert torch.equal(total, rows + added)
        torch.testing.assert_close(out, plain(rows + added, (72,), weight, eps=1e-5), rtol=1e-5, atol=1e-5)


@needs_kernels
@pytest.mark.parametrize("is_layer_norm", [0, 1])
def test_what_is_added_may_be_normalized_and_scaled_first(is_layer_norm: int) -> None:
    rows, added, more, weight, identity = *(noise(40, 72, seed=seed) for seed in (1, 2, 3)), noise(72), torch.eye(72)
    out, total = torch.empty(40, 72), torch.empty(40, 72)
    norm = Norm(weight.data_ptr(), None, 1e-5, is_layer_norm)
    members = {"added": added.data_ptr(), "more": more.data_ptr(), "sum": total.data_ptr(), "added_scale": 0.22}
    run(multiply(rows, identity, out=out, added_norm=norm, **members))
    plain = torch.nn.functional.layer_norm if is_layer_norm else torch.nn.functional.rms_norm
    expected = rows + 0.22 * plain(added, (72,), weight, eps=1e-5) + 0.22 * more
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(out, total)


@needs_kernels
def test_values_that_are_not_numbers_pass_through_every_function() -> None:
    x, identity = torch.full((1, 16), float("nan")), torch.eye(16)
    for function in (SILU, GELU, GELU_TANH, RELU, RELU2, SOFTCAP):
        out = torch.zeros(1, 16)
        run(multiply(x, identity, out=out, function=function, softcap=5.0))
        assert out.isnan().all()


@needs_kernels
def test_every_number_of_16_bits_is_read_as_torch_reads_it() -> None:
    codes = torch.arange(-(1 << 15), 1 << 15).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        values, out = codes.view(dtype), torch.empty(1, 1 << 16)
        one = torch.ones(1, 1)
        matrix = Matrix(values.data_ptr(), rows=1 << 16, bits=16, format=FORMATS[dtype])
        run(product(matrix, x=one.data_ptr(), out=out.data_ptr(), out_stride=1 << 16, columns=1, count=1))
        torch.testing.assert_close(out[0], values.float(), rtol=0, atol=0, equal_nan=True)


@needs_kernels
@pytest.mark.parametrize("dtype", FORMATS)
def test_keys_and_values_are_rounded_as_torch_rounds_them(dtype: torch.dtype) -> None:
    """Ties, subnormal numbers, those just below and above the largest, and NaN."""
    tiny = torch.arange(0, 40) * 2.0**-26
    ties = 1 + torch.arange(0, 40) * 2.0**-12
    large = torch.tensor([65504.0, 65519.9, 65520.0, 65536.0, 1e9, 3.4e38, float("inf"), float("nan")])
    values = torch.cat([tiny, ties, large, noise(168).exp()])
    values = torch.cat([values, -values, noise(512 - 2 * len(values))]).view(2, 256)
    keys, stored = torch.zeros(2, 1, 256, dtype=dtype), torch.zeros(2, 1, 256, dtype=dtype)
    partial = torch.empty(100_000)
    attention = Attention(
        query=values.data_ptr(),
        key=values.data_ptr(),
        value=values.data_ptr(),
        keys=keys.data_ptr(),
        values=stored.data_ptr(),
        partial=partial.data_ptr(),
        key_stride=256,
        value_stride=256,
        head_stride_bytes=256 * dtype.itemsize,
        tokens=1,
        num_kv_heads=2,
        num_kv_groups=1,
        head_dim=256,
        format=FORMATS[dtype],
        spans=1,
        scale=1.0,
    )
    run(*attend(attention))
    for found in (keys, stored):
        torch.testing.assert_close(found[:, 0], values.to(dtype), rtol=0, atol=0, equal_nan=True)


@needs_kernels
def test_results_do_not_depend_on_who_does_which_task() -> None:
    """Also while other threads run programs of their own, and with more threads than there are cores."""
    x, weights = noise(1, 64), [noise(64, 64, seed=i) / 8 for i in range(30)]

    def chain(threads: int) -> Tensor:
        rows = [x, *(torch.empty(1, 64) for _ in weights)]
        steps = zip(rows, weights, rows[1:], strict=False)
        run(*(multiply(before, matrix, out=after) for before, matrix, after in steps), threads=threads)
        return rows[-1]

    expected = chain(1)
    torch.testing.assert_close(expected, functools.reduce(lambda row, matrix: row @ matrix.T, weights, x))
    with ThreadPoolExecutor(3) as pool:
        assert all(torch.equal(found, expected) for found in pool.map(chain, [1, 2, 3, 7] * 50))


@needs_kernels
def test_a_forked_process_has_threads_of_its_own() -> None:
    code = (
        "import multiprocessing, tests.kernels.test_kernels as t; t.chain_of_threads(); "
        "process = multiprocessing.get_context('fork').Process(target=t.chain_of_threads); "
        "process.start(); process.join(60); raise SystemExit(process.exitcode)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0


def chain_of_threads() -> None:
    x, identity, out = noise(1, 64), torch.eye(64), torch.empty(1, 64)
    for _ in range(20):
        run(multiply(x, identity, out=out), threads=3)
        assert torch.equal(out, x)


def run_on_the_team(folder: Path, compiler: str, source: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """Compiles a program with the team under a sanitizer, and runs it."""
    if not shutil.which(compiler):
        pytest.skip(f"{compiler} is not installed")
    program = folder / "program"
    sources = [str(Path(__file__).parent / source), str(build.SOURCES / "team.c")]
    given = ["-std=gnu11", "-O1", "-g", "-pthread", f"-I{build.SOURCES}", *flags]
    built = subprocess.run(
        [compiler, *given, *sources, "-o", str(program)], capture_output=True, text=True, check=False
    )
    if any(words in built.stderr for words in ("cannot find", "unrecognized", "unknown option")):
        pytest.skip(f"{compiler} does not know {flags}")
    assert built.returncode == 0, built.stderr
    return subprocess.run([str(program)], capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
@needs_kernels
@pytest.mark.parametrize("compiler", ["gcc", "clang"])
@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_the_team_has_no_races(tmp_path: Path, sanitizer: str, compiler: str) -> None:
    done = run_on_the_team(tmp_path, compiler, "team_stress.c", f"-fsanitize={sanitizer}")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
@needs_kernels
@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_a_fork_amid_the_allocation_of_scratch_memory_does_no_harm(tmp_path: Path, compiler: str) -> None:
    """The child would use, or free again, what the parent had just freed."""
    done = run_on_the_team(tmp_path, compiler, "team_fork.c", "-fsanitize=address", "-Wl,--wrap=aligned_alloc")
    assert (done.returncode, done.stderr) == (0, "")


def test_structures_and_constants_are_those_of_the_sources() -> None:
    """What Python repeats of the C code: members with their order and types, and numbers."""
    header = (build.SOURCES / "operations.h").read_text(encoding="utf-8")
    types: dict[str, Any] = {"int": ctypes.c_int, "long": ctypes.c_long, "float": ctypes.c_float}
    structures = re.findall(r"typedef struct \{([^{}]*)\} (\w+);", header)
    structures = [each for each in structures if each[1] != "Moments"]  # never passed by Python
    assert [name for _, name in structures] == ["Matrix", "Norm", "Attention", "Product"]
    for body, name in structures:
        members: list[tuple[str, Any]] = []
        for declaration in body.strip().removesuffix(";").split(";"):
            kind, names = declaration.replace("const ", "").split(None, 1)
            own: Any = types.get(kind, getattr(operations, kind, None))
            for star, member, size in re.findall(r"(\*?)(\w+)(?:\[(\d+)\])?", names):
                pointer = ctypes.POINTER(own) if kind == "Attention" else ctypes.c_void_p
                members.append((member, pointer if star else own * int(size) if size else own))
        assert getattr(operations, name)._fields_ == members
    numbers: dict[str, int] = {}
    for source in build.SOURCES.iterdir():
        for body in re.findall(r"enum \{([^}]*)\}", source.read_text(encoding="utf-8")):
            for at, member in enumerate(body.split(",")):
                name, _, value = member.partition("=")
                numbers[name.strip()] = int(value or at)
    numbers["MAX_HEAD_DIM"] = numbers["MAX_DIM"]
    constants = {name: value for name, value in vars(operations).items() if name.isupper() and isinstance(value, int)}
    assert len(constants) == 17
    assert {4: numbers["INT4_BLOCK"], 8: numbers["INT8_BLOCK"]} == operations.BLOCK_BYTES
    assert constants.items() <= numbers.items()


# --- in a model ------------------------------------------------------------------------------------------------


@needs_kernels
def test_the_setting_chooses_between_them_and_pytorchs(tmp_path: Path) -> None:
    save(tiny_llama(), tmp_path / "model")
    for choice, expected in (("auto", True), ("torch", False), ("auto", True)):
        loaded = load_model(str(tmp_path / "model"), device="cpu", weights="int8", kernels=choice)
        assert isinstance(loaded.model.forward.step, CompiledStep) == expected  # type: ignore[attr-defined]
        found = {layer.quantized.kernels for layer in quantized_layers(loaded.model).values()} | {loaded.kernels}
        assert found == {load_kernels(choice)}
        assert (None in found) != expected


@pytest.mark.parametrize(
    ("change", "served"),
    [
        ({}, True),
        ({"hidden_act": "gelu"}, True),
        ({"hidden_act": "gelu_pytorch_tanh"}, True),
        ({"hidden_act": "gelu_new"}, True),
        ({"hidden_act": "relu"}, True),
        ({"hidden_act": "relu2"}, True),
        ({"hidden_act": "mish"}, False),
        ({"head_dim": 512}, False),
        ({"num_attention_heads": 32, "num_key_value_heads": 1, "head_dim": 4}, True),
    ],
)
def test_models_that_they_do_not_serve_are_known(change: dict[str, Any], served: bool) -> None:
    from transformers import LlamaConfig

    sizes = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 1}
    model = fresh_model(LlamaConfig(**(sizes | {"num_attention_heads": 4} | change)))
    described = model_spec(model)
    assert (described is not None and kernels_support(described)) == served
    if described is None:  # its activation is not known
        return
    half = model_spec(model.to(torch.float16))
    assert half is not None
    assert kernels_support(half) == served


@pytest.mark.slow
@needs_kernels
def test_the_number_of_threads_may_change_between_tokens() -> None:
    model = make("llama, three heads of queries to one of keys")
    ids, before = text(40), torch.get_num_threads()
    expected = stream(model, cache_of(model, 24), ids, 10)
    install(model, load_kernels("auto"))
    cache = cache_of(model, 24)
    pieces = [stream(model, cache, ids[:, :10], 10)]
    try:
        for i in range(10, 40):
            torch.set_num_threads(1 + i % 3)
            pieces.append(stream(model, cache, ids[:, i : i + 1], 1))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(torch.cat(pieces), expected, rtol=0, atol=1e-4)


@needs_kernels
def test_a_step_that_was_built_in_inference_mode_serves_outside_of_it() -> None:
    from streamchat.cache.arguments import cache_keyword
    from streamchat.cache.hook import StreamingHook

    model, ids = make("llama"), text(14)
    expected = stream(model, cache_of(model, 24), ids, 10)
    install(model, load_kernels("auto"))
    cache = cache_of(model, 24)
    stream(model, cache, ids[:, :12], 10)
    with torch.no_grad(), StreamingHook(model, cache):
        for i in (12, 13):
            found = model(input_ids=ids[:, i : i + 1], use_cache=True, **{cache_keyword(model): cache}).logits
    torch.testing.assert_close(found[0], expected[13:], rtol=0, atol=1e-4)


@needs_kernels
@pytest.mark.parametrize("name", ["llama", "llama, biases", "qwen3", "gpt_neox", "gpt_neox, one after the other"])
def test_a_few_tokens_at_once_are_what_they_are_one_by_one_and_in_the_plain_forward(name: str) -> None:
    model, ids = make(name), text(90)
    pieces = [12, 3, 8, 1, 2, 7, 5, 8, 4, 1, 1, 6, 8, 8, 8, 8]
    assert sum(pieces) == 90
    expected_cache, cache = cache_of(model, 48), cache_of(model, 48)
    expected = []
    at = 0
    for size in pieces:
        expected.append(stream(model, expected_cache, ids[:, at : at + size], size))
        at += size
    install(model, load_kernels("auto"))
    seen = counted_calls(model)
    at = 0
    for size, wanted in zip(pieces, expected, strict=True):
        found = stream(model, cache, ids[:, at : at + size], size)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
        at += size
    assert seen == pieces[1:]  # the first one is too long for a model that is not packed
    assert cache.lengths == expected_cache.lengths
    for ours, theirs in zip(cache.streaming_layers, expected_cache.streaming_layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, rtol=0, atol=1e-4)
        torch.testing.assert_close(ours.values, theirs.values, rtol=0, atol=1e-4)


@needs_kernels
@pytest.mark.parametrize(("kind", "dtype", "at_once"), [("int4", torch.float32, 256), ("int8", torch.float32, 256)])
def test_a_prompt_is_computed_with_the_weights_that_decode(kind: Kind, dtype: torch.dtype, at_once: int) -> None:
    """A chunk of a prompt gives what its tokens give one by one; both round a vector in the same way."""
    compiled, ids = load_kernels("auto"), text(120)
    model = make("llama").to(dtype)
    replace(model, {group: quantize_group(model, group, its, compiled) for group, its in groups(model, kind).items()})
    install(model, compiled)
    assert model.forward.step.max_tokens == at_once
    expected = stream(model, cache_of(model, 160), ids, 1)
    seen = counted_calls(model)
    found = stream(model, cache_of(model, 160), ids, 118)
    assert seen == [118, 1, 1]
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)  # a step of 16 bits may go the other way


@needs_kernels
def test_chunks_that_pytorch_multiplies_faster_are_left_to_it() -> None:
    compiled, sizes = load_kernels("auto"), dict[str, int]()
    for kind in ("int4", "int8", None):
        model = make("llama").to(torch.bfloat16)
        if kind is not None:
            replace(
                model,
                {group: quantize_group(model, group, its, compiled) for group, its in groups(model, kind).items()},
            )
        install(model, compiled)
        sizes[str(kind)] = model.forward.step.max_tokens
    assert sizes == {"int4": 256, "int8": 256, "None": 8}


@needs_kernels
def test_programs_of_many_lengths_are_not_all_kept() -> None:
    compiled, ids = load_kernels("auto"), text(80)
    model = make("llama")
    replace(model, {group: quantize_group(model, group, its, compiled) for group, its in groups(model, "int8").items()})
    install(model, compiled)
    for size in range(1, 81):
        stream(model, cache_of(model, 96), ids[:, :size], size)
    assert len(model.forward.step._programs) == MAX_PROGRAMS < 80


@needs_kernels
def test_logits_are_given_for_the_tokens_that_are_asked_for() -> None:
    from streamchat.cache.arguments import cache_keyword
    from streamchat.cache.hook import StreamingHook

    model, ids = make("llama"), text(7)
    expected = stream(model, cache_of(model, 24), ids, 7)
    install(model, load_kernels("auto"))
    for keep, count in ((0, 7), (1, 1), (3, 3), (None, 7)):
        cache = cache_of(model, 24)
        with torch.inference_mode(), StreamingHook(model, cache):
            out = model(input_ids=ids, use_cache=True, logits_to_keep=keep, **{cache_keyword(model): cache})
        torch.testing.assert_close(out.logits[0], expected[-count:], rtol=0, atol=1e-4)
        assert cache.length == 7


@needs_kernels
def test_memory_does_not_grow_with_the_lengths_that_are_met() -> None:
    model = make("llama")
    install(model, load_kernels("auto"))
    step = model.forward.step
    cache, ids = cache_of(model, 48), text(36)
    for size in (8, 1, 2, 3, 4, 5, 6, 7):
        stream(model, cache, ids[:, :size], size)
    total = sum(buffer.numel() for buffer in step._workspace._buffers.values())
    assert len(step._programs) == 8
    # one set for a single token, one for up to eight
    widest = max(buffer.numel() for buffer in step._workspace._buffers.values())
    assert total < 8 * widest


@needs_kernels
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.2), (torch.float16, 0.02)])
def test_a_cache_may_have_16_bits_while_the_model_has_32(dtype: torch.dtype, tolerance: float) -> None:
    model, ids = make("llama"), text(34)
    expected = stream(model, cache_of(model, 24), ids, 10)[10:]
    install(model, load_kernels("auto"))
    cache = cache_of(model, 24)
    stream(model, cache, ids[:, :10], 10)
    convert(cache, dtype)
    found = stream(model, cache, ids[:, 10:], 1)
    assert cache.streaming_layers[0].keys is not None
    assert cache.streaming_layers[0].keys.dtype == dtype
    assert 0 < (found - expected).abs().max() < tolerance * expected.std()


def convert(cache: Any, dtype: torch.dtype) -> None:
    """Changes the format of the keys and values."""
    for layer in cache.streaming_layers:
        layer._buffers = tuple(buffer.to(dtype) for buffer in layer._buffers or ())


@needs_kernels
def test_a_cache_of_another_number_format_is_refused() -> None:
    from streamchat.base.errors import CacheError

    model, ids = make("llama"), text(14)
    install(model, load_kernels("auto"))
    cache = cache_of(model, 24)
    stream(model, cache, ids[:, :10], 10)
    convert(cache, torch.float64)
    with pytest.raises(CacheError, match="float64"):
        stream(model, cache, ids[:, 10:11], 1)


@needs_kernels
def test_a_cache_of_other_heads_is_refused() -> None:
    """The kernels would read beyond its end."""
    from streamchat.base.errors import CacheError

    model, ids = make("llama"), text(14)
    install(model, load_kernels("auto"))
    cache = cache_of(model, 24)
    stream(model, cache, ids[:, :10], 10)
    for layer in cache.streaming_layers:
        layer._buffers = tuple(buffer[:, :1] for buffer in layer._buffers or ())  # type: ignore[assignment]
    with pytest.raises(CacheError, match="1 key heads of 32"):
        stream(model, cache, ids[:, 10:11], 1)


@needs_kernels
def test_a_step_in_bfloat16_is_nearer_to_float32_than_the_plain_forward(default_model_home: None) -> None:
    whole = load_model("default", device="cpu", dtype="float32")
    half = load_model("default", device="cpu", dtype="bfloat16")
    text = "The river ran past the mill, and the wheel turned. In the evening the men sat down by the fire. " * 4
    ids = whole.tokenizer(text, return_tensors="pt")["input_ids"]
    exact = stream(whole.model, cache_of(whole.model, 256), ids, 16)[16:]

    def error() -> float:
        logits = stream(half.model, cache_of(half.model, 256), ids, 16)[16:].float()
        return float(((logits - exact).square().mean(-1).sqrt() / exact.std(-1)).median())

    step = error()
    uninstall(half.model)
    assert step < 0.02
    assert step < 0.8 * error()


# --- building --------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache folder, and nothing loaded yet; returns where the kernels will be."""
    monkeypatch.setenv("STREAMCHAT_HOME", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(library, "_loaded", functools.cache(library._loaded.__wrapped__))
    return paths.cache_dir() / "kernels"


def compiler(folder: Path, body: str) -> str:
    """A program in the place of a compiler."""
    path = folder / "fakecc"
    path.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


@pytest.mark.slow
@needs_kernels
def test_they_are_compiled_once(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = build.library().path
    assert made.parent == fresh
    assert [path.name for path in fresh.iterdir()] == [made.name]
    monkeypatch.setattr(build, "_compile", lambda *_: pytest.fail("compiled again"))
    assert build.library().path == made
    assert load_kernels("auto") is not None


@pytest.mark.slow
@needs_kernels
def test_cc_may_have_words_of_its_own(fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gcc = build.find_compiler()[0]
    monkeypatch.setenv("CC", compiler(tmp_path, 'test "$1" = --through && shift && exec "$@"') + f" --through {gcc}")
    assert build.library().path.is_file()
    monkeypatch.setenv("CC", "no-such-compiler -m64")
    with pytest.raises(KernelsUnavailableError, match=r"no-such-compiler.*gcc"):
        build.library()


@pytest.mark.slow
@needs_kernels
def test_they_are_used_also_where_new_files_are_writable_by_a_group(fresh: Path) -> None:
    before = os.umask(0o002)
    try:
        assert build.library().path.stat().st_mode & 0o777 == 0o700
        assert build.library().path.is_file()
    finally:
        os.umask(before)


@needs_kernels
def test_other_sources_another_compiler_or_processor_make_another_library(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gcc = build.find_compiler()
    first = build._digest(gcc)
    assert build._digest(gcc) == first
    assert build._digest([compiler(tmp_path, "true")]) != first
    with monkeypatch.context() as patch:
        patch.setattr(platforms, "processor_features", lambda: "another one")
        assert build._digest(gcc) != first
    sources = tmp_path / "source"
    sources.mkdir()
    for path in build.SOURCES.iterdir():
        (sources / path.name).write_bytes(path.read_bytes() + (b"\n" if path.name == "common.h" else b""))
    monkeypatch.setattr(build, "SOURCES", sources)
    assert build._digest(gcc) != first


def test_without_a_compiler_the_reason_is_told_and_models_run(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert load_kernels("auto") is None
    assert "gcc" in why_unavailable("auto")
    save(tiny_llama(), tmp_path / "model")
    loaded = load_model(str(tmp_path / "model"), device="cpu", weights="int8")
    assert loaded.weights == "int8"
    assert not fresh.exists()


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("echo 'x.c:1: error: no such luck' >&2; exit 1", "no such luck"),
        ("exit 0", "cannot be stored"),  # says that it worked, and made nothing
        ("while [ $# -gt 1 ]; do shift; done; echo rubbish > $1", "failed its check"),
    ],
)
def test_a_compiler_that_fails_is_told(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: str, reason: str
) -> None:
    monkeypatch.setenv("CC", compiler(tmp_path, body))
    with pytest.raises(KernelsUnavailableError, match=reason):
        build.library()
    assert not list(fresh.iterdir())
    assert load_kernels("auto") is None


@pytest.mark.slow
@needs_kernels
@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("attention.c", "x[d] * cos[d] - x[d + half] * sin[d]", "x[d] * cos[d] + x[d + half] * sin[d]"),
        ("attention.c", "total += share * sum[at];", "total += sum[at];"),
        ("round.h", "float sum = scale * (float)round_group", "float sum = (float)round_group"),
        ("tiles.h", "floats_of_bits(shift_left(pairs, 16))", "floats_of_bits(pairs)"),
        ("tiles.h", "block + INT8_CODES + 2 * row", "block + INT8_CODES - 32 + 2 * row"),
        ("tiles.h", "32 * (4 * i + j) + 2 * row", "32 * (4 * j + i) + 2 * row"),
        (
            "tiles.h",
            "scale, to_floats(lane_sums(sums[n])) * all_floats(scales[n])",
            "scale, to_floats(lane_sums(sums[n]))",
        ),
        ("span.h", "sum[i] = sum[i] * fade + total;", "sum[i] = sum[i] + total;"),
        ("rows.c", "if (n->bias)", "if (0)"),
        ("rows.c", "EACH(gelu_tanh(x[i]));", "EACH(gelu(x[i]));"),
        ("rows.c", "return x < 0.0f ? 0.0f : x;", "return x;"),
        ("rows.c", "EACH(relu(x[i]) * relu(x[i]));", "EACH(relu(x[i]));"),
        ("rows.c", "EACH(capped(x[i], softcap));", "break;"),
        ("common.h", "return cap * __builtin_copysignf", "return __builtin_copysignf"),
        ("common.h", "size + 0x38800000u) - 0x1p-14f", "size + 0x38800000u)"),
        ("common.h", "bits_of(float_of(size) + 0.5f) - 0x3f000000u", "0x3c00u"),
        ("products.c", "if (p->more)", "if (0)"),
        ("products.c", "p->added_norm.weight ? to : added, p->added_scale", "added, p->added_scale"),
        ("products.c", "p->more + (first + n) * columns, p->added_scale", "p->more + (first + n) * columns, 1.0f"),
        ("products.c", "to : added, p->added_scale", "to : added, 1.0f"),
        ("products.c", "m->format == FLOAT16", "0"),
        ("attention.c", "else if (format == FLOAT16) {", "else if (0) {"),
        ("attention.c", "source * a->key_stride", "source * a->value_stride"),
        ("attention.c", "source * a->value_stride", "source * a->key_stride"),
        ("attention.c", "h / copies * a->query_stride", "(long)h / copies * a->num_kv_groups * a->head_dim"),
        ("attention.c", "copies = a->repeats + 1", "copies = 1"),
        ("attention.c", "source = h / (a->repeats + 1)", "source = h"),
        ("attention.c", "a->is_interleaved ? rotate_pairs : rotate", "rotate"),
        ("attention.h", "a->window && stop > a->window", "0"),
        ("attend_many.c", "first + j < b->starts[n]", "0"),
        ("attend_many.c", "if (a->softcap > 0.0f)", "if (0)"),
        ("attend_many.c", "if (format == FLOAT16)", "if (0)"),
        ("attention.c", "a->clip <= 0.0f", "1"),
        ("attention.c", "if (cap > 0.0f)", "if (0)"),
        ("attention.c", "index * a->norm_stride", "0"),
        ("attention.c", "a->norms_whole ?", "0 ?"),
        ("attention.c", "done += MAX_QUERIES", "done += 100"),
        ("team.c", "team.tasks - (int)left, team.threads", "0, team.threads"),
        ("run.c", "for (long i = 0;", "*(volatile int *)0 = 1; for (long i = 0;"),  # crashes
    ],
)
def test_kernels_that_compute_something_else_are_refused(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, file: str, old: str, new: str
) -> None:
    sources = tmp_path / "source"
    sources.mkdir()
    for path in build.SOURCES.iterdir():
        text = path.read_text(encoding="utf-8")
        if path.name == file:
            assert old in text
            text = text.replace(old, new)
        (sources / path.name).write_text(text, encoding="utf-8")
    monkeypatch.setattr(build, "SOURCES", sources)
    with pytest.raises(KernelsUnavailableError, match="failed its check"):
        build.library()
    assert not list(fresh.iterdir())


@pytest.mark.slow
@needs_kernels
def test_a_folder_that_others_can_write_is_refused_at_the_first_start_too(fresh: Path) -> None:
    fresh.mkdir(parents=True)
    for mode in (0o777, 0o770):
        fresh.chmod(mode)
        with pytest.raises(KernelsUnavailableError, match="writable by others"):
            build.library()
        assert not list(fresh.iterdir())
    fresh.chmod(0o700)
    assert build.library().path.is_file()
    fresh.chmod(0o777)
    with pytest.raises(KernelsUnavailableError, match="writable by others"):
        build.library()


@pytest.mark.slow
@needs_kernels
def test_a_folder_above_may_be_writable_by_a_group(fresh: Path) -> None:
    """As folders are where the umask is 002."""
    fresh.parent.mkdir(parents=True)
    fresh.parent.chmod(0o775)
    assert build.library().path.is_file()


def zero_tail(content: bytes) -> bytes:
    return content[: len(content) // 2] + bytes(len(content) - len(content) // 2)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "one byte": lambda content: b"x",
    "cut": lambda content: content[:5000],
    "without its end": lambda content: content[:-1],
    "a zeroed tail": zero_tail,
    "all zeros": lambda content: bytes(len(content)),
    "another bit": lambda content: content[:9000] + bytes([content[9000] ^ 1]) + content[9001:],
    "more": lambda content: content + b"x",
    "rubbish": lambda content: b"rubbish" * 1000,
}


@pytest.mark.slow
@needs_kernels
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_library_is_made_again(fresh: Path, whole: bytes, damage: str) -> None:
    """Loaded as they are, these end the process (SIGBUS, SIGSEGV), or turn the kernels off for good."""
    path = build.library_path()
    path.parent.mkdir(parents=True, mode=0o700)
    damaged = DAMAGE[damage](whole)
    path.write_bytes(damaged)
    path.chmod(0o700)
    assert build.library().path == path
    assert path.read_bytes()[:4] == whole[:4]
    assert path.read_bytes() != damaged
    assert load_kernels("auto") is not None
    assert [each.name for each in fresh.iterdir()] == [path.name]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The contents of an undamaged library."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STREAMCHAT_HOME", str(tmp_path_factory.mktemp("whole")))
        patch.delenv("CC", raising=False)
        return build.library().path.read_bytes()


@pytest.mark.slow
@needs_kernels
def test_what_is_not_our_file_is_made_again(
    fresh: Path, whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link, a pipe, a file that others may write, a library of other sources under this name."""
    path = build.library_path()
    path.parent.mkdir(parents=True, mode=0o700)
    elsewhere = tmp_path / "elsewhere.so"
    elsewhere.write_bytes(whole)
    made: list[Path] = []

    def compiled(_: object, to: Path) -> None:
        made.append(to)
        to.write_bytes(whole[:-32])

    monkeypatch.setattr(build, "_compile", compiled)
    path.symlink_to(elsewhere)
    assert build.library().path.is_file()
    assert not path.is_symlink()
    path.unlink()
    os.mkfifo(path)
    assert build.library().path.is_file()
    path.chmod(0o777)
    build.library()
    assert path.stat().st_mode & 0o777 == 0o700
    assert len(made) == 3
    build.library()
    assert len(made) == 3
    descriptor = os.open(path, os.O_RDWR | os.O_TRUNC)
    os.write(descriptor, whole[:-32])
    sealed.seal(descriptor, "another name")
    os.close(descriptor)
    build.library()
    assert len(made) == 4


@pytest.mark.slow
@needs_kernels
def test_what_is_loaded_is_what_was_checked(fresh: Path, tmp_path: Path) -> None:
    """Also where somebody puts another file under the name in between."""
    made = build.library()
    made.path.unlink()
    made.path.write_bytes(b"not a library")
    assert made.load().run


@pytest.mark.slow
@needs_kernels
def test_an_end_without_an_error_does_not_pass_the_check(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What runs in the place of the check may end well, and say so, without having looked at the kernels."""
    for body in ("exit 0", "seq 16", "echo ok"):
        monkeypatch.setattr("sys.executable", compiler(tmp_path, body))
        with pytest.raises(KernelsUnavailableError, match="did not run"):
            build.library()
        assert not list(fresh.iterdir())


@pytest.mark.slow
@needs_kernels
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux")
def test_a_library_is_on_the_disk_before_it_has_its_name(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = []
    fsync, replace = os.fsync, Path.replace

    def note_sync(descriptor: int) -> None:
        order.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def note_replace(path: Path, to: Path) -> Path:
        order.append(("rename", str(path)))
        return replace(path, to)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "replace", note_replace)
    build.library()
    made = order[0][1]
    assert order == [("sync", made), ("rename", made), ("sync", str(fresh))]


@pytest.mark.slow
@needs_kernels
def test_two_processes_make_them_at_once(fresh: Path) -> None:
    code = (
        "from streamchat.kernels import library; assert library.load_kernels('auto'), library.why_unavailable('auto')"
    )
    running = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [each.wait(timeout=120) for each in running] == [0, 0]
    assert [path.name for path in fresh.iterdir()] == [build.library_path().name]
    assert load_kernels("auto") is not None


def test_a_compiler_is_looked_for_in_absolute_folders_only(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("gcc", "cc"):
        (tmp_path / name).write_text("#!/bin/sh\ntouch ran\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.chdir(tmp_path)
    for relative in (".", "", "./", "../" + tmp_path.name):
        monkeypatch.setenv("PATH", f"{relative}{os.pathsep}/nowhere")
        with pytest.raises(KernelsUnavailableError, match="no C compiler"):
            build.find_compiler()
    monkeypatch.setenv("CC", "./gcc -m64")  # named by the user
    assert build.find_compiler() == [str(tmp_path / "gcc"), "-m64"]


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "win32")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("started something"))
    with pytest.raises(KernelsUnavailableError, match="Linux"):
        build.library()


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="needs a folder that cannot be written to")
def test_a_folder_that_cannot_be_written_to_is_told(fresh: Path) -> None:
    fresh.parent.mkdir(parents=True)
    fresh.parent.chmod(0o500)
    with pytest.raises(KernelsUnavailableError, match="cannot be stored"):
        build.library()
