"""GGUF files keep their codes: converted without a loss, mapped into memory, and served without native weights."""

from __future__ import annotations

import copy
import errno
import os
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    modeling_gguf_pytorch_utils,
)

from streamchat.base.errors import ModelNotFoundError, UnsupportedModelError
from streamchat.base.progress import silent
from streamchat.cache.logits import logit_distance
from streamchat.decode.install import is_compiled, tokens_at_once
from streamchat.kernels.library import load_kernels, why_unavailable
from streamchat.models import device as devices
from streamchat.models.checked_fit import choose_checked_fit
from streamchat.models.folder import TILES, inspect
from streamchat.models.gguf import convert
from streamchat.models.gguf.convert import converted_copy
from streamchat.models.gguf.tokenizer import read_saved
from streamchat.models.load import load_model
from streamchat.models.quantize.weight_storage import stored_bytes, stored_tensors
from streamchat.models.served import build_native, build_served
from streamchat.models.staging import models_dir, read_manifest
from streamchat.models.tile_file import ALIGNMENT, StoredMatrix, TileWriter, read_tiles
from streamchat.quantization.gguf_blocks import SERVED, tiles_of_gguf
from streamchat.quantization.linear import always_quantized, quantized_layers
from streamchat.quantization.matrix import QuantizedMatrix
from tests.support.gguf_models import FAMILIES, SIZES, TOKENS, Choose, write_family
from tests.support.models_help import write_gguf

needs_kernels = pytest.mark.skipif(bool(why_unavailable("auto")), reason="no compiled kernels here")
CLOSE = 2e-3
"""Root mean square difference of logits, in units of their spread: the rounding of activations."""


def everywhere(kind: Type) -> Choose:
    return lambda name: kind


def mixed(name: str) -> Type:
    """As llama.cpp mixes types: more bits for some layers and the table."""
    if name == "token_embd.weight":
        return Type.Q6_K
    return Type.Q5_K if "ffn_down" in name or "attn_v" in name else Type.Q4_K


def reference(folder: Path, meant: dict[str, torch.Tensor]) -> Any:
    """The float32 model of `folder`'s config with the weights that the file means."""
    library: Any = AutoModelForCausalLM
    model = library.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    tools: Any = modeling_gguf_pytorch_utils
    names = tools.get_gguf_hf_weights_map(model, tools.TensorProcessor())
    weights = {names[name]: tensor for name, tensor in meant.items() if name in names}
    if "output.weight" in meant:
        weights["lm_head.weight"] = meant["output.weight"]
    result = model.load_state_dict(weights, strict=False)
    assert not result.unexpected_keys
    assert set(result.missing_keys) <= {"lm_head.weight"}
    model.tie_weights()
    return model.eval()


def served(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    kernels = load_kernels("auto")
    assert kernels is not None
    built = build_served(folder, dtype, "sdpa", kernels)
    assert built is not None
    model, info = built
    assert not any(info.values())
    return model.eval()


def some_ids(count: int) -> torch.Tensor:
    return torch.randint(0, 260, (1, count), generator=torch.Generator().manual_seed(3))


@torch.inference_mode()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with always_quantized(model):
        found: torch.Tensor = model(input_ids=ids, use_cache=False).logits[0].float()
    return found


def greedy(model: Any, ids: torch.Tensor, count: int) -> list[int]:
    for _ in range(count):
        ids = torch.cat([ids, logits(model, ids)[-1].argmax()[None, None]], 1)
    return ids[0, -count:].tolist()


@needs_kernels
@pytest.mark.parametrize("kind", [*SERVED, None], ids=lambda kind: "mixed" if kind is None else kind.name)
def test_every_type_computes_what_its_dequantized_weights_compute(tmp_path: Path, kind: Type | None) -> None:
    choose = mixed if kind is None else everywhere(kind)
    meant = write_family(tmp_path / "a.gguf", FAMILIES["llama"], choose)
    folder = converted_copy(tmp_path / "a.gguf", progress=silent)
    ours, theirs, ids = served(folder), reference(folder, meant), some_ids(40)
    assert logit_distance(logits(ours, ids), logits(theirs, ids)) < CLOSE
    assert greedy(ours, ids[:, :8], 16) == greedy(theirs, ids[:, :8], 16)
    weight = ours.model.layers[1].self_attn.k_proj.weight
    torch.testing.assert_close(weight.whole(), theirs.model.layers[1].self_attn.k_proj.weight, rtol=1e-6, atol=1e-8)


@needs_kernels
@pytest.mark.parametrize("kind", [Type.Q4_1, Type.Q5_K, None], ids=lambda kind: "mixed" if kind is None else kind.name)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_what_its_dequantized_weights_compute(
    tmp_path: Path, family: str, kind: Type | None
) -> None:
    meant = write_family(tmp_path / "a.gguf", FAMILIES[family], mixed if kind is None else everywhere(kind))
    folder = converted_copy(tmp_path / "a.gguf", progress=silent)
    ours, theirs, ids = served(folder), reference(folder, meant), some_ids(70)
    assert logit_distance(logits(ours, ids), logits(theirs, ids)) < CLOSE
    native, info = build_native(folder, torch.float32, "sdpa", {})
    assert not any(info.values())
    assert logit_distance(logits(native.eval(), ids), logits(theirs, ids)) < 1e-5
    matrices = [name for name, weight in ours.named_parameters() if isinstance(weight, QuantizedMatrix)]
    plain = [weight.numel() for weight in ours.parameters() if not isinstance(weight, QuantizedMatrix)]
    assert len(matrices) == sum(
        len(shape) == 2 and "position" not in name for name, shape in FAMILIES[family].shapes().items()
    )
    assert max(plain) <= 1024 * SIZES["embedding_length"]  # norms, biases, GPT-2's positions
    assert {name: buffer.tolist() for name, buffer in ours.named_buffers()} == {
        name: buffer.tolist() for name, buffer in theirs.named_buffers()
    }


@needs_kernels
def test_a_chat_loads_no_native_weights_and_decodes_with_the_kernels(tmp_path: Path) -> None:
    write_family(tmp_path / "a.gguf", FAMILIES["llama"], mixed)
    loaded = load_model(str(tmp_path / "a.gguf"), device="cpu", dtype="bfloat16", weights="auto")
    assert (loaded.weights, loaded.quantized_bytes) == ("int4 and int8", 0)
    assert is_compiled(loaded.model)
    assert tokens_at_once(loaded.model) == 256
    model: Any = loaded.model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.dtype == torch.bfloat16
    assert model.device == torch.device("cpu")
    library: Any = AutoModelForCausalLM
    plain = library.from_config(model.config)
    assert model.num_parameters() == plain.num_parameters()
    assert {name: weight.shape for name, weight in model.named_parameters()} == {
        name: weight.shape for name, weight in plain.named_parameters()
    }
    file_bytes = (inspect(converted_copy(tmp_path / "a.gguf", progress=silent))).file_bytes
    assert stored_bytes(model) < 1.1 * file_bytes
    assert stored_bytes(model) < plain.num_parameters()  # 16-bit weights would take twice that
    assert copies(model) == []
    assert loaded.tokenizer.encode("hel") == [TOKENS.index("hel")]


@needs_kernels
def test_a_float32_model_on_tiles_carries_its_positions_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on processors without bfloat16: in large models rounded products would hide how positions are carried."""
    monkeypatch.setattr(devices, "cpu_has_bfloat16", lambda: False)
    write_family(tmp_path / "a.gguf", FAMILIES["llama"], everywhere(Type.Q8_0))
    loaded = load_model(str(tmp_path / "a.gguf"), device="cpu", weights="auto")
    model: Any = loaded.model
    assert (loaded.dtype, loaded.weights, copies(model)) == ("float32", "int8", [])
    fit = choose_checked_fit(model)
    assert fit.method != "recompute"
    assert fit.error < 1e-5
    weight = model.model.layers[1].mlp.down_proj.weight
    x = torch.randn(3, weight.shape[1])
    assert torch.equal(torch.nn.functional.linear(x, weight), torch.nn.functional.linear(x, weight.clone()))


def copies(model: Any) -> list[str]:
    """Names of quantized layers with a native weight beside the codes."""
    return [name for name, layer in quantized_layers(model).items() if not isinstance(layer.weight, QuantizedMatrix)]


@needs_kernels
@pytest.mark.parametrize(
    ("how", "native"),
    [
        ({"weights": "native"}, True),
        ({"weights": "auto", "kernels": "torch"}, True),
        ({"weights": "auto", "dtype": "float32"}, True),
        ({"weights": "int8"}, True),  # another kind than that of the file: quantized from native weights
        ({"weights": "int4"}, False),
        ({"weights": "int4", "dtype": "float32"}, False),
    ],
)
def test_native_weights_are_dequantized_where_they_are_needed(
    tmp_path: Path, how: dict[str, Any], native: bool
) -> None:
    meant = write_family(tmp_path / "a.gguf", FAMILIES["qwen2"], everywhere(Type.Q4_1))
    loaded = load_model(str(tmp_path / "a.gguf"), device="cpu", **({"dtype": "bfloat16"} | how))
    weight: Any = loaded.model.get_input_embeddings().weight
    assert isinstance(weight, QuantizedMatrix) is not native
    expected = reference(converted_copy(tmp_path / "a.gguf", progress=silent), meant)
    torch.testing.assert_close(weight[:7].float(), expected.model.embed_tokens.weight[:7], rtol=2**-8, atol=0)
    if how["weights"] != "native":
        assert loaded.weights == ("native" if how.get("dtype") == "float32" and native else loaded.weights)


def test_a_quantized_matrix_stands_for_its_weight_everywhere() -> None:
    kernels = load_kernels("auto")
    data = gguf.quantize(torch.randn(40, 64, generator=torch.Generator().manual_seed(0)).numpy(), Type.Q8_0)
    plain = torch.from_numpy(gguf.dequantize(data, Type.Q8_0))
    matrix = QuantizedMatrix(tiles_of_gguf(data, Type.Q8_0, None, kernels), torch.float32)
    x, ids = torch.randn(2, 5, 64), torch.tensor([[3, 39], [0, 3]])
    functions: list[Any] = [
        lambda w: w + 1,
        lambda w: w.T,
        lambda w: w[2:4],
        lambda w: w.to(torch.bfloat16).float(),
        lambda w: torch.cat([w, w]),
        lambda w: x @ w.T,
        lambda w: torch.nn.functional.embedding(ids, w),
        lambda w: torch.nn.functional.embedding(ids[0], w, padding_idx=1),
    ]
    for function in functions:
        torch.testing.assert_close(function(matrix), function(plain), rtol=1e-6, atol=1e-6)
    if kernels is not None:
        bias = torch.randn(40)
        # float32 models are checked with limits that the kernels' rounding would exceed
        found = torch.nn.functional.linear(x, matrix, bias)
        torch.testing.assert_close(found, torch.nn.functional.linear(x, plain, bias), rtol=1e-6, atol=1e-6)
        short, half, half_bias = QuantizedMatrix(matrix.quantized, torch.bfloat16), x.bfloat16(), bias.bfloat16()
        found = torch.nn.functional.linear(half, short, half_bias)
        exact = torch.nn.functional.linear(half.float(), plain, half_bias.float())
        torch.testing.assert_close(found.float(), exact, rtol=1e-2, atol=1e-2)
        flipped = QuantizedMatrix(matrix.quantized, torch.bfloat16, transposed=True)
        assert flipped.shape == (64, 40)
        torch.testing.assert_close(torch.addmm(half_bias, half[0], flipped), found[0], rtol=0, atol=0)
    parameter = torch.nn.Parameter(matrix, requires_grad=False)
    twin = copy.deepcopy(parameter)
    assert isinstance(twin, QuantizedMatrix)
    assert isinstance(twin, torch.nn.Parameter)
    assert twin.quantized is matrix.quantized
    assert stored_tensors(parameter) == [matrix.quantized.data]
    assert "QuantizedMatrix((40, 64)" in repr(matrix)


def test_a_tile_file_is_aligned_mapped_and_read_by_safetensors(tmp_path: Path) -> None:
    tensors = {
        "odd": torch.randn(7),
        "a.weight": torch.randint(0, 256, (3, 2, 544), dtype=torch.uint8),
        "half": torch.randn(32).bfloat16(),
        "uneven": torch.randint(0, 256, (1, 3, 544), dtype=torch.uint8),
        "none": torch.empty(0),
        "one": torch.tensor(3),
    }
    with TileWriter(tmp_path / TILES, len(tensors)) as file:
        for name, tensor in tensors.items():
            file.add(name, tensor, StoredMatrix("int8", 48, 64) if name == "a.weight" else None)
    found, coded = read_tiles(tmp_path / TILES)
    assert coded == {"a.weight": StoredMatrix("int8", 48, 64)}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)
    assert all(found[name].data_ptr() % ALIGNMENT == 0 for name in ("a.weight", "half"))
    assert found["a.weight"].untyped_storage().nbytes() > 0
    with Path(f"/proc/{os.getpid()}/maps").open(encoding="utf-8") as maps:
        assert any(line.endswith(f"/{TILES}\n") for line in maps)


def test_a_tile_file_is_not_left_behind_when_writing_fails(tmp_path: Path) -> None:
    write_family(tmp_path / "a.gguf", FAMILIES["llama"], mixed)

    def cancel(stage: str, done: int = 0, total: int = 0, unit: str = "", /) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        converted_copy(tmp_path / "a.gguf", progress=cancel)
    assert not list(models_dir().rglob(TILES))


@pytest.mark.parametrize("at", ["tiles", "tokenizer"])
def test_a_full_disk_is_not_blamed_on_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    write_family(tmp_path / "a.gguf", FAMILIES["llama"], mixed)

    def full(*_: Any, **__: Any) -> None:
        if at == "tokenizer":  # as the library raises it
            raise Exception("No space left on device (os error 28)")
        raise OSError(errno.ENOSPC, "No space left on device")

    if at == "tiles":
        monkeypatch.setattr(TileWriter, "_write", full)
    else:
        monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", full)
    with pytest.raises(ModelNotFoundError, match=r"the disk is full\); make room"):
        converted_copy(tmp_path / "a.gguf", progress=silent)
    assert not list(models_dir().rglob(TILES))


@pytest.mark.parametrize("kind", [Type.Q2_K, Type.IQ4_NL], ids=lambda kind: kind.name)
def test_types_without_a_layout_are_quantized_again_and_named(tmp_path: Path, kind: Type) -> None:
    meant = write_family(tmp_path / "a.gguf", FAMILIES["llama"], lambda name: kind if "ffn" in name else Type.Q8_0)
    folder = converted_copy(tmp_path / "a.gguf", progress=silent)
    notes = (read_manifest(folder) or {})["notes"]
    assert [note for note in notes if f"weights in {kind.name}" in note and "int8" in note]
    native, _ = build_native(folder, torch.float32, "sdpa", {})
    ids = some_ids(40)
    assert logit_distance(logits(native.eval(), ids), logits(reference(folder, meant), ids)) < 0.02


def test_a_file_without_quantized_matrices_is_a_folder_of_transformers(tmp_path: Path) -> None:
    meant = write_family(tmp_path / "a.gguf", FAMILIES["llama"], everywhere(Type.F16))
    folder = converted_copy(tmp_path / "a.gguf", progress=silent)
    assert not (folder / TILES).exists()
    loaded = load_model(str(tmp_path / "a.gguf"), device="cpu", dtype="float32")
    assert logit_distance(logits(loaded.model, some_ids(20)), logits(reference(folder, meant), some_ids(20))) < 1e-5


def test_damaged_tiles_are_refused_with_a_sentence(tmp_path: Path) -> None:
    write_family(tmp_path / "a.gguf", FAMILIES["llama"], mixed)
    folder = converted_copy(tmp_path / "a.gguf", progress=silent)
    file = folder / TILES
    data = bytearray(file.read_bytes())
    at = data.index(b'"layers"')
    data[at : at + 8] = b'"lawyer"'
    file.write_bytes(data)
    with pytest.raises((ModelNotFoundError, UnsupportedModelError)) as error:
        load_model(str(tmp_path / "a.gguf"), device="cpu", weights="auto")
    assert "Traceback" not in str(error.value)


def test_a_smaller_copy_replaces_that_of_an_older_version(tmp_path: Path) -> None:
    write_family(tmp_path / "a.gguf", FAMILIES["llama"], mixed)
    older = convert.older_copies(tmp_path / "a.gguf")
    assert len(older) == len(set(older)) == convert.CONVERTER
    for folder in older:
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"float32")
    kept = converted_copy(tmp_path / "a.gguf", progress=silent)
    assert sorted(path for path in models_dir().iterdir() if path.is_dir()) == [kept]


@pytest.mark.parametrize("spm", [False, True])
def test_a_saved_tokenizer_is_what_autotokenizer_reads(tmp_path: Path, spm: bool) -> None:
    path = write_gguf(tmp_path / "a.gguf", spm="runs" if spm else False, pre=None if spm else "llama-bpe")
    folder = converted_copy(path, progress=silent)
    library: Any = AutoTokenizer
    ours: Any = read_saved(folder)
    theirs: Any = library.from_pretrained(folder)
    for text in ("hel 12\n\n  12", "he     llo <b> ab", "<|im_start|>hel<|im_end|><think>"):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
        assert ours.decode(ours(text)["input_ids"]) == theirs.decode(theirs(text)["input_ids"])
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours.all_special_ids == theirs.all_special_ids
    assert ours.get_vocab() == theirs.get_vocab()
    assert (ours.chat_template, ours.model_max_length) == (theirs.chat_template, theirs.model_max_length)
    assert type(ours) is type(theirs)
