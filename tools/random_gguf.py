"""A GGUF file of random weights in the shape of a known model, to measure speed without that model.

    python -m tools.random_gguf --shape smollm2-1.7b --type Q4_K_M --out random.gguf

The tokenizer and the chat template are copied from the default model's GGUF file. Weights are random blocks of the
type, written tensor by tensor; what the model generates is nonsense.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from streamchat.base.errors import StreamchatError
from streamchat.models.bundled.default import default_gguf, ensure_default_model

DEVIATION = 0.02
"""Standard deviation of the weights."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a model of the Llama architecture with tied embeddings."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    inner: int
    """Width of the MLP."""
    context: int = 8192
    rope_base: float = 130_000.0


SHAPES = {
    "smollm2-135m": Shape(576, 30, 9, 3, 1536, rope_base=100_000.0),
    "smollm2-1.7b": Shape(2048, 24, 32, 32, 8192),
    "llama-3.2-1b": Shape(2048, 16, 32, 8, 8192, rope_base=500_000.0),
}
TYPES = ("Q4_0", "Q4_1", "Q4_K_M", "Q8_0")
FILE_TYPES = {"Q4_0": 2, "Q4_1": 3, "Q4_K_M": 15, "Q8_0": 7}
"""`general.file_type` of each."""


def main(argv: Sequence[str] | None = None) -> int:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--type", choices=TYPES, default="Q4_1", help="weights (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, help="GGUF file with the tokenizer (default: the default model's)")
    args = parser.parse_args(argv)
    try:
        if args.tokenizer is None:
            ensure_default_model()
        write(args.out, SHAPES[args.shape], args.type, args.tokenizer or default_gguf(), name=args.shape)
    except StreamchatError as error:
        print(f"random_gguf: {error}", file=sys.stderr)
        return int(error.exit_code)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"{args.out}: {args.out.stat().st_size / 1e6:,.1f} MB")
    return 0


def write(path: Path, shape: Shape, kind: str, tokenizer: Path, *, name: str) -> None:
    """Write a GGUF file.

    Args:
        path: The file, which is replaced.
        shape: Sizes of the model.
        kind: One of `TYPES`.
        tokenizer: A GGUF file with the tokenizer.
        name: Name of the model in the file.
    """
    fields = {key: value for key, value in gguf.GGUFReader(tokenizer).fields.items() if key.startswith("tokenizer.")}
    vocabulary = len(fields["tokenizer.ggml.tokens"].data)
    tensors = list(_tensors(shape, kind, vocabulary))
    writer = gguf.GGUFWriter(path, "llama")
    _add_sizes(writer, shape, kind, vocabulary, name)
    for key, field in fields.items():
        sub_type = field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(key, field.contents(), field.types[0], sub_type=sub_type)
    for tensor, rows, columns, type_ in tensors:
        width = _bytes_per_row(columns, type_)
        sizes, dtype = ((rows, width), np.dtype(np.uint8)) if rows else ((columns,), np.dtype(np.float32))
        writer.add_tensor_info(tensor, sizes, dtype, max(rows, 1) * width, type_ if rows else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    random = np.random.default_rng(0)
    for _, rows, columns, type_ in tensors:
        blocks = columns // gguf.GGML_QUANT_SIZES[type_][0]
        data = BLOCKS[type_](random, rows * blocks) if rows else np.ones(columns, np.float32)
        writer.write_tensor_data(data)
    writer.close()


def _add_sizes(writer: gguf.GGUFWriter, shape: Shape, kind: str, vocabulary: int, name: str) -> None:
    writer.add_name(f"{name}, random weights")
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.inner)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_rope_dimension_count(shape.hidden // shape.heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocabulary)
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _tensors(shape: Shape, kind: str, vocabulary: int) -> Iterator[tuple[str, int, int, Type]]:
    """Yield name, rows, columns and type of each tensor, with the types that llama.cpp chooses; rows = 0 is a norm."""
    mixed = kind == "Q4_K_M"
    plain = Type.Q4_K if mixed else Type[kind]
    kv_width = shape.hidden // shape.heads * shape.kv_heads
    # tied to the output layer, which needs more bits
    yield "token_embd.weight", vocabulary, shape.hidden, Type.Q6_K if mixed else Type.Q8_0
    for number in range(shape.layers):
        finer = Type.Q6_K if mixed and _gets_more_bits(number, shape.layers) else plain
        block = f"blk.{number}"
        yield f"{block}.attn_norm.weight", 0, shape.hidden, Type.F32
        yield f"{block}.attn_q.weight", shape.hidden, shape.hidden, plain
        yield f"{block}.attn_k.weight", kv_width, shape.hidden, plain
        yield f"{block}.attn_v.weight", kv_width, shape.hidden, finer
        yield f"{block}.attn_output.weight", shape.hidden, shape.hidden, plain
        yield f"{block}.ffn_norm.weight", 0, shape.hidden, Type.F32
        yield f"{block}.ffn_gate.weight", shape.inner, shape.hidden, plain
        yield f"{block}.ffn_up.weight", shape.inner, shape.hidden, plain
        yield f"{block}.ffn_down.weight", shape.hidden, shape.inner, finer
    yield "output_norm.weight", 0, shape.hidden, Type.F32


def _gets_more_bits(layer: int, layers: int) -> bool:
    """Return whether Q4_K_M stores some weights of this layer in Q6_K: the first and last eighth, and each third."""
    first = layers // 8
    return layer < first or layer >= 7 * layers // 8 or (layer - first) % 3 == 2


def _bytes_per_row(columns: int, type_: Type) -> int:
    block, size = gguf.GGML_QUANT_SIZES[type_]
    if columns % block:
        raise ValueError(f"{columns} columns are not a multiple of {block}, the block of {type_.name}")
    return columns // block * size


# --- blocks of random weights, with a standard deviation of DEVIATION -----------------------------------------------

SPREAD_4 = math.sqrt((30 * (16**2 - 1) / 12 + 2 * 7.5**2) / 32)
"""Standard deviation of 32 codes of 4 bits: 30 random ones, the smallest and the largest."""


def _spread(levels: int) -> float:
    """Return the standard deviation of random codes from 0 to levels - 1."""
    return math.sqrt((levels**2 - 1) / 12)


def _half(value: float, count: int) -> Any:
    return np.full(count, value, np.float16).view(np.uint8).reshape(count, 2)


def _bytes(random: np.random.Generator, count: int, width: int) -> Any:
    return random.integers(0, 256, (count, width), np.uint8)


def _pairs(random: np.random.Generator, count: int) -> Any:
    """Return the codes of 32 weights: 0 and 15 are among them, as quantization makes them."""
    pairs = _bytes(random, count, 16)
    pairs[:, 0] = 0xF0
    return pairs


def _q8_0(random: np.random.Generator, count: int) -> Any:
    return np.hstack([_half(DEVIATION / _spread(256), count), _bytes(random, count, 32)])


def _q4_0(random: np.random.Generator, count: int) -> Any:
    return np.hstack([_half(DEVIATION / SPREAD_4, count), _pairs(random, count)])


def _q4_1(random: np.random.Generator, count: int) -> Any:
    scale = DEVIATION / SPREAD_4
    return np.hstack([_half(scale, count), _half(-7.5 * scale, count), _pairs(random, count)])


def _q4_k(random: np.random.Generator, count: int) -> Any:
    scale = DEVIATION / SPREAD_4 / 32
    # eight scales and eight minimums of 6 bits, all 32
    packed = np.tile(np.array([160] * 8 + [0] * 4, np.uint8), (count, 1))
    codes = _bytes(random, count, 128)
    codes[:, ::32], codes[:, 1::32] = 0x00, 0xFF  # 0 and 15 in each group of 32
    return np.hstack([_half(scale, count), _half(7.5 * scale, count), packed, codes])


def _q6_k(random: np.random.Generator, count: int) -> Any:
    scales = np.full((count, 16), 32, np.uint8)
    return np.hstack([_bytes(random, count, 192), scales, _half(DEVIATION / _spread(64) / 32, count)])


BLOCKS: dict[Type, Callable[[np.random.Generator, int], Any]] = {
    Type.Q8_0: _q8_0,
    Type.Q4_0: _q4_0,
    Type.Q4_1: _q4_1,
    Type.Q4_K: _q4_k,
    Type.Q6_K: _q6_k,
}
"""Type -> function that returns (count, bytes) random blocks."""


if __name__ == "__main__":
    sys.exit(main())
