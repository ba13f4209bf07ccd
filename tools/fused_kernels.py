"""Compiles the fused kernels of a decode step, and prints what they use: `python -m tools.fused_kernels`.

Needs Triton (`pip install triton`, on Linux), but no GPU: the kernels are compiled for compute capability 8.0 and 9.0,
at the shapes of models of 135M to 8B parameters; with `--kv-dtype`, for a cache in 8 or 4 bits. Each line has the
registers of a thread, the bytes that it spills to memory, and the shared memory of a program. Exits with 1 if a kernel
spills.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from streamchat.cache.layers.codes import QUANTIZED as KV_DTYPES
from streamchat.cache.layers.codes import CacheDtype
from streamchat.cache.layers.storage import new_storage
from streamchat.decode.fused.sizes import Sizes
from streamchat.decode.fused.step import sizes_for
from streamchat.decode.spec import BY_HEAD, AttentionSpec, BlockSpec, MlpSpec, ModelSpec, NormSpec, separate
from streamchat.decode.static import Inputs
from streamchat.kernels.operations import GROUP, TILE
from streamchat.quantization.layouts import LAYOUTS, LayoutName
from streamchat.quantization.linear import QuantizedLinear
from streamchat.quantization.weights import QuantizedWeight

CAPABILITIES = ((8, 0), (9, 0))
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
}
"""Triton's names."""
META = torch.device("meta")
SLOTS = 2560
"""Slots of a cache with a budget of 2,048 tokens."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a model."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    is_neox: bool = False
    layers: int = 30


SHAPES = {
    "135M": Shape(576, 1536, 9, 3, 64, 49152),
    "410M": Shape(1024, 4096, 16, 16, 64, 50304, is_neox=True, layers=24),
    "1.7B": Shape(2048, 8192, 32, 32, 64, 49152, layers=24),
    "270M": Shape(640, 2048, 4, 1, 256, 262144, layers=18),
    "8B": Shape(4096, 14336, 32, 8, 128, 128256, layers=32),
}


def main() -> int:
    """Compile and print; return 1 if a kernel spills."""
    parser = argparse.ArgumentParser(prog="tools.fused_kernels", description="Compile the fused kernels for GPUs.")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="models (default: all)")
    parser.add_argument("--weights", choices=("native", "int8", "int4"), default="native", help="(default: native)")
    parser.add_argument(
        "--no-overlap", action="store_true", help="kernels that start when the one before them has ended"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of the model")
    parser.add_argument("--kv-dtype", choices=("native", *KV_DTYPES), default="native", help="of the cache")
    args = parser.parse_args()
    print("| GPU | model | kernel | programs | rows x columns | registers | spilled bytes | shared bytes |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    spilled = 0
    for capability in CAPABILITIES:
        for name in args.shapes:
            spec = spec_of(SHAPES[name], getattr(torch, args.dtype), args.weights)
            sizes = sizes_for(capability)
            sizes = replace(sizes, overlap=sizes.overlap and not args.no_overlap)
            for launch, what in launches(spec, sizes, KV_DTYPES.get(args.kv_dtype)):
                used = compile_launch(launch, capability)
                spilled += used.spilled
                block = block_of(launch)
                print(
                    f"| sm_{capability[0]}{capability[1]} | {name} | {what} | {used.programs} | {block} | "
                    f"{used.registers} | {used.spilled} | {used.shared} |",
                    flush=True,
                )
    return 1 if spilled else 0


@dataclass(frozen=True)
class Used:
    """What a compiled kernel uses."""

    programs: int
    registers: int
    spilled: int
    """Bytes per thread."""
    shared: int
    """Bytes per program."""


def spec_of(shape: Shape, dtype: torch.dtype, weights: str, device: torch.device = META, layers: int = 1) -> ModelSpec:
    """Return a model of some layers, without memory, or with random weights on another device."""

    def linear(columns: int, rows: int, is_head: bool = False) -> nn.Linear:
        bias = shape.is_neox and not is_head
        if weights == "native":
            plain = nn.Linear(columns, rows, bias=bias, dtype=dtype, device=device).requires_grad_(False)
            if device != META:
                plain.weight.normal_(std=0.5 * columns**-0.5)
            return plain
        plain = nn.Linear(columns, rows, bias=bias, dtype=dtype, device=META)
        if bias:
            plain.bias = nn.Parameter(torch.zeros(rows, dtype=dtype, device=device), requires_grad=False)
        name: LayoutName = "int8" if is_head or weights == "int8" else "int4"
        layout = LAYOUTS[name]
        shape_of_data = -(-rows // TILE), columns // layout.columns, layout.unit_bytes
        # bytes so small that the scales among them are finite
        data = torch.randint(0, 4, shape_of_data, dtype=torch.uint8, device=device)
        return QuantizedLinear(plain, QuantizedWeight(name, data, torch.empty(0), rows, None))

    def norm() -> NormSpec:
        weight = torch.ones(shape.hidden, device=device)
        return NormSpec(weight, torch.zeros_like(weight) if shape.is_neox else None, 1e-5, shape.is_neox)

    def rotary(x: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        width = shape.head_dim // 4 if shape.is_neox else shape.head_dim
        return x.new_ones(1, 1, width), x.new_zeros(1, 1, width)

    heads, kv_heads, dim, hidden = shape.heads, shape.kv_heads, shape.head_dim, shape.hidden

    def block() -> BlockSpec:
        if shape.is_neox:
            qkv: tuple[nn.Module, ...] = (linear(hidden, 3 * heads * dim),)
            mlp = MlpSpec((linear(hidden, shape.intermediate),), "gelu", linear(shape.intermediate, hidden))
        else:
            qkv = tuple(linear(hidden, count * dim) for count in (heads, kv_heads, kv_heads))
            up = (linear(hidden, shape.intermediate), linear(hidden, shape.intermediate))
            mlp = MlpSpec(up, "silu", linear(shape.intermediate, hidden))
        layout = BY_HEAD if shape.is_neox else separate(heads, kv_heads)
        attention = AttentionSpec(qkv, layout, heads, kv_heads, dim, dim**-0.5, linear(heads * dim, hidden))
        return BlockSpec(norm(), attention, norm(), mlp, parallel=shape.is_neox)

    blocks = tuple(block() for _ in range(layers))
    embedding = nn.Embedding(shape.vocabulary, hidden, dtype=dtype, device=device).requires_grad_(False)
    return ModelSpec(embedding, (rotary,), blocks, norm(), linear(hidden, shape.vocabulary, is_head=True), dtype)


def launches(spec: ModelSpec, sizes: Sizes, kv_dtype: CacheDtype | None = None) -> Iterator[tuple[Any, str]]:
    """Yield the launches of a model of one layer, with all arguments, and a name for each.

    Args:
        spec: The model.
        sizes: How the work is divided.
        kv_dtype: Of the cache; None for that of the model.
    """
    from streamchat.decode.fused.program import FusedProgram

    program, attention = FusedProgram(spec, sizes), spec.blocks[0].attention
    like = torch.empty(1, attention.num_kv_heads, 0, attention.head_dim, device=META)
    buffers = new_storage(like, like, SLOTS, kv_dtype or spec.dtype).buffers
    logits = torch.empty(program.vocabulary, device=META)
    found = list(program.calls(Inputs(META), [buffers], logits))
    names = ("embed", "qkv", "attention", "output", "up", "down", "head")
    for (launch, changing), what in zip(found, names, strict=True):
        launch.arguments |= changing
        yield launch, what


def block_of(launch: Any) -> str:
    """Return the size of the block that a program reads at once."""
    arguments = launch.arguments
    if "GROUPS" in arguments:
        return f"{TILE} x {GROUP * arguments['GROUPS']}"
    rows = arguments.get("ROWS") or (arguments.get("BLOCK") if "DIM" in arguments else 1)
    columns = arguments["DIM"] if "DIM" in arguments else arguments["BLOCK"]
    return f"{rows} x {columns}"


def compile_launch(launch: Any, capability: tuple[int, int]) -> Used:
    """Compile the kernel of a launch with its arguments."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = launch.kernel
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, parameter in enumerate(kernel.params):
        value = launch.arguments[parameter.name]
        is_one = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or is_one:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        else:
            signature[parameter.name] = type_of(value)
            is_multiple = isinstance(value, int) and value % 16 == 0 and not parameter.do_not_specialize
            if isinstance(value, Tensor) or is_multiple:
                attributes[index,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    compiled = triton.compile(source, target=target, options=launch.options)
    registers, spilled = resources(compiled.asm["cubin"])
    programs = 1
    for count in launch.grid:
        programs *= count
    return Used(programs, registers, spilled, compiled.metadata.shared)


def type_of(value: Any) -> str:
    """Return Triton's name of the type of an argument."""
    if isinstance(value, Tensor):
        names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64"}
        return (
            "*" + (names | {torch.int32: "i32", torch.int16: "i16", torch.uint8: "u8", torch.int8: "i8"})[value.dtype]
        )
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def resources(cubin: bytes) -> tuple[int, int]:
    """Return registers, and spilled bytes, per thread of a compiled kernel."""
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        printed = subprocess.run(
            [program, "--dump-resource-usage", file.name], stdout=subprocess.PIPE, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+).*? LOCAL:(\d+)", printed)
    if found is None:
        raise ValueError(f"cuobjdump printed no registers: {printed}")
    return int(found[1]), int(found[2]) + int(found[3])


if __name__ == "__main__":
    sys.exit(main())
