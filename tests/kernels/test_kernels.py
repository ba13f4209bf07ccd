"""What the compiled kernels compute: right to the rounding of their formats, whoever does the tasks."""

from __future__ import annotations

import ctypes
import functools
import itertools
import multiprocessing
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from streamchat.kernels import build, operations
from streamchat.kernels.library import load_kernels
from streamchat.kernels.operations import (
    GELU,
    GELU_TANH,
    RELU,
    RELU2,
    SILU,
    SOFTCAP,
    Attention,
    Experts,
    Matrix,
    Norm,
    Operation,
    attend,
    product,
    program,
    route,
)
from streamchat.quantization.codes import int4_codes, int8_codes
from streamchat.quantization.weights import Kind, quantize
from tests.support.kernels import FORMATS, needs_kernels, noise


def stands_for(weight: Tensor, kind: Kind) -> Tensor:
    """The float64 matrix that the codes and scales of `weight` mean, computed without the kernels."""
    if kind == "int8":
        codes, steps = int8_codes(weight)
        return (codes.double() * steps.double().unsqueeze(-1)).reshape(weight.shape)
    codes, scales = int4_codes(weight)
    scale, minimum = (part.double().unsqueeze(-1) for part in scales.unbind(-1))
    return (codes * scale + minimum).reshape(weight.shape)


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
    first = quantized.matrix()
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
def test_infinite_and_very_large_numbers_have_the_limits_of_the_functions() -> None:
    large = [1e15, 1e20, 1e38]
    x = torch.tensor([[*large, *(-each for each in large), *[0.5] * 10]])
    gate = torch.eye(16)
    for function, expected in (
        (SILU, torch.nn.functional.silu(x)),
        (GELU, torch.nn.functional.gelu(x)),
        (GELU_TANH, torch.nn.functional.gelu(x, approximate="tanh")),
        (SOFTCAP, 5 * (x / 5).tanh()),
    ):
        out = torch.zeros(1, 16)
        run(multiply(x, gate, out=out, function=function, softcap=5.0))
        torch.testing.assert_close(out, expected, rtol=2e-6, atol=2e-6)
    out, infinite, signs = torch.zeros(1, 2), torch.tensor([[float("inf")]]), torch.tensor([[1.0], [-1.0]])
    run(multiply(infinite, signs, out=out, function=SOFTCAP, softcap=5.0))
    assert out.tolist() == [[5.0, -5.0]]


def routed(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The experts of one token, and their shares."""
    count = logits.shape[1]
    x, weights = noise(1, 16), torch.zeros(count, 2 * 16, 16)
    shares, chosen = torch.zeros(1, top_k), torch.zeros(1, top_k, dtype=torch.int32)
    matrix = Matrix(weights.data_ptr(), None, 16, 32)
    rows, factors = [torch.zeros(2, 16) for _ in range(3)], torch.zeros(1)
    experts = Experts(
        *[matrix] * 3,
        Norm(),
        *(each.data_ptr() for each in (x, logits, rows[0], *rows)),
        *(each.data_ptr() for each in (shares, factors, chosen)),
        columns=16,
        logits_stride=count,
        num_experts=count,
        top_k=top_k,
        count=1,
        function=SILU,
    )
    run(route(experts))
    return chosen, shares


@needs_kernels
def test_an_expert_with_a_logit_of_minus_infinity_has_no_share() -> None:
    logits = torch.tensor([[1.0, float("-inf"), 2.0]])
    chosen, shares = routed(logits, 2)
    assert chosen.tolist() == [[2, 0]]
    torch.testing.assert_close(shares, logits.softmax(-1)[:, [2, 0]])


@needs_kernels
def test_no_expert_is_chosen_twice_if_logits_are_not_numbers() -> None:
    """The vectors of a token would be read twice, where there is only one."""
    for values in itertools.product((float("nan"), 1.0, 9.0, 0.0), repeat=5):
        chosen, _ = routed(torch.tensor([values]), 4)
        assert len(set(chosen[0].tolist())) == 4
        assert set(chosen[0].tolist()) <= set(range(5))


@needs_kernels
def test_a_sum_is_written_for_an_input_that_is_used_as_it_is() -> None:
    x, identity = noise(3, 24), torch.eye(24)
    out, total = torch.empty(3, 24), torch.full((3, 24), float("nan"))
    run(multiply(x, identity, out=out, sum=total.data_ptr()))
    assert torch.equal(out, x)
    assert torch.equal(total, x)


@needs_kernels
@pytest.mark.usefixtures("compiled_kernels")
def test_operations_of_no_tokens_are_skipped() -> None:
    """In a process that may hang."""
    process = multiprocessing.get_context("spawn").Process(target=run_empty_operations, daemon=True)
    process.start()
    process.join(120)
    assert process.exitcode == 0


def run_empty_operations() -> None:
    x, identity, out = noise(1, 64), torch.eye(64), torch.zeros(1, 64)
    nothing = multiply(x[:0], identity, out=out)
    for threads in (1, 3):
        run(nothing, threads=threads)
        run(nothing, multiply(x, identity, out=out), nothing, nothing, threads=threads)
        assert torch.equal(out, x)


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
@pytest.mark.usefixtures("compiled_kernels")
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
    assert [name for _, name in structures] == ["Matrix", "Norm", "Attention", "Product", "Experts"]
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
    for source in sorted(build.SOURCES.iterdir(), key=lambda path: path.name != "operations.h"):
        for body in re.findall(r"enum \{([^}]*)\}", source.read_text(encoding="utf-8")):
            following = 0
            for member in body.split(","):
                name, _, value = member.partition("=")
                words = [str(numbers.get(word, word)) for word in value.split()]
                if words and not all(word.isdigit() or word == "+" for word in words):
                    break  # it depends on the processor
                following = sum(int(word) for word in words if word != "+") if words else following
                numbers[name.strip()] = following
                following += 1
    numbers["MAX_HEAD_DIM"] = numbers["MAX_DIM"]
    constants = {name: value for name, value in vars(operations).items() if name.isupper() and isinstance(value, int)}
    assert len(constants) == 29
    assert constants.items() <= numbers.items()
