"""Packed weights: what they stand for, in which layers, kept on the disk, and chosen only where they are good."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from streamchat.base import paths
from streamchat.base.errors import ConfigError
from streamchat.base.progress import silent
from streamchat.kernels.library import Kernels, load_kernels
from streamchat.models import device
from streamchat.models.fingerprint import model_fingerprint, set_contents_digest
from streamchat.models.load import load_model
from streamchat.models.quantize import cpu, served_copy
from streamchat.models.quantize.cpu import quantized_folder, use_weights
from streamchat.quantization import quality
from streamchat.quantization.codes import int8_codes, is_grouped
from streamchat.quantization.linear import (
    MAX_ROWS,
    QuantizedConv1D,
    QuantizedLinear,
    always_quantized,
    quantized_bytes,
    quantized_layers,
)
from streamchat.quantization.replace import groups, quantize_group, replace, restore
from streamchat.quantization.weights import Kind, can_quantize, quantize
from tests.support.families import build
from tests.support.models_help import make_tokenizer, save, tiny_llama

KINDS: tuple[Kind, ...] = ("int8", "int4")

chosen: list[str] = []


@pytest.fixture(params=["auto", "torch"], autouse=True)
def kernels_(request: pytest.FixtureRequest) -> Iterator[str]:
    """With the compiled kernels, where there are some, and with PyTorch's."""
    chosen.append(request.param)
    yield request.param
    chosen.clear()


def compiled() -> Kernels | None:
    return load_kernels(chosen[0])


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def q4_1(rows: int, columns: int) -> Tensor:
    """A matrix as GGUF's Q4_1 stores it: `d * q + m` with float16 d and m in groups of 32."""
    generator = torch.Generator().manual_seed(2)
    q = torch.randint(0, 16, (rows, columns // 32, 32), generator=generator).float()
    q[..., 0], q[..., 7] = 0, 15
    d = (torch.rand(rows, columns // 32, 1, generator=generator) * 0.02 + 0.001).half().float()
    m = (d * (torch.randn(rows, columns // 32, 1, generator=generator) - 8)).half().float()
    return (d * q + m).view(rows, columns)


def meant(packed: Any, columns: int) -> Tensor:
    """The matrix that a packed one stands for, read out by the kernel itself: products with unit vectors."""
    return torch.cat([packed.multiply(row) for row in torch.split(torch.eye(columns), 1)]).T


@pytest.mark.slow
@pytest.mark.parametrize("columns", [32, 96, 576])
@pytest.mark.parametrize("rows", [16, 80, 192])
def test_int8_is_within_half_a_step_of_each_group(rows: int, columns: int) -> None:
    weight = noise(rows, columns)
    weight[:, 5] *= 20
    if compiled() is None:  # a group is a row; scale and product are rounded to bfloat16
        allowed = 0.5 * weight.abs().amax(1, keepdim=True) / 127 + weight.abs() * 2**-7
    else:
        allowed = 0.51 * weight.abs().view(rows, -1, 32).amax(-1).repeat_interleave(32, 1) / 112
    assert ((meant(quantize(weight, "int8", compiled()), columns) - weight).abs() <= allowed).all()


@pytest.mark.skipif(load_kernels("auto") is None, reason="needs compiled kernels")
@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("limit", [127, 16, 8], ids=["Q8_0", "Q5_0", "Q4_0"])
def test_int8_finds_the_codes_of_gguf(limit: int, rounded: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    q = torch.randint(-limit, limit, (64, 3, 32), generator=generator).float()
    q[..., 5] = -limit
    d = (torch.rand(64, 3, 1, generator=generator) * 0.02 + 0.001).half().float()
    weight = (d * q).view(64, 96)
    given = weight.bfloat16() if rounded else weight
    found = meant(quantize(given, "int8", load_kernels("auto")), 96)
    if rounded:
        assert (found - weight).square().mean() < (given.float() - weight).square().mean()
    else:  # what is left is the rounding of the scale
        assert ((found - weight).abs() <= weight.abs() * 2**-11 + 1e-6).all()


@pytest.mark.parametrize("least", [0, 4])
@pytest.mark.parametrize("count", [3, 8, 11, 15])
def test_int4_finds_the_codes_of_groups_that_have_few_of_them(count: int, least: int) -> None:
    q = torch.randint(least, least + count + 1, (64, 3, 32), generator=torch.Generator().manual_seed(4)).float()
    q[..., 3], q[..., 9] = least, least + count
    weight = (0.01 * q - 0.07).view(64, 96)
    assert is_grouped(weight)
    assert is_grouped(weight.bfloat16())
    found = meant(quantize(weight, "int4", compiled()), 96)
    torch.testing.assert_close(found, weight, rtol=0, atol=0.001)


def test_random_weights_are_not_grouped() -> None:
    assert not is_grouped(noise(64, 576))
    assert not is_grouped(torch.rand(5, 32, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e9])
def test_int8_scales_are_positive_and_finite(size: float) -> None:
    scales = int8_codes(size * noise(2, 32))[1]
    assert ((scales > 0) & scales.isfinite()).all()


@pytest.mark.skipif(load_kernels("auto") is None, reason="needs compiled kernels")
@pytest.mark.parametrize("size", [1e-7, 3e-6, 1e-4, 1.0, 1e5])
def test_int8_scales_of_any_size_do_not_cut_the_largest_weight(size: float) -> None:
    weight = size * noise(64, 96)
    found = meant(quantize(weight, "int8", load_kernels("auto")), 96)
    # below 2 ** -14, float16 scales are multiples of 2 ** -24
    step = weight.abs().view(64, 3, 32).amax(-1).repeat_interleave(32, 1) / 112
    assert ((found - weight).abs() <= 0.51 * step + 2**-25).all()


@pytest.mark.skipif(load_kernels("auto") is None, reason="needs compiled kernels")
@pytest.mark.parametrize("rows", [1, 15, 33, 161])
def test_rows_of_int8_need_not_fill_the_last_tile(rows: int) -> None:
    weight, x = noise(rows, 64), noise(50, 64, seed=2)
    packed = quantize(weight, "int8", load_kernels("auto"))
    assert packed.rows == rows
    assert packed.data.shape == (-(-rows // 16), 2, 544)
    found = packed.multiply(x)
    assert found.shape == (50, rows)
    assert (found - x @ weight.T).square().mean().sqrt() < 0.01 * 8
    full = quantize(torch.cat([weight, noise(-rows % 16, 64)]), "int8", load_kernels("auto"))
    assert torch.equal(found, full.multiply(x)[:, :rows])
    if rows > 32:
        assert torch.equal(packed.part(16, rows).multiply(x), found[:, 16:])


@pytest.mark.parametrize("columns", [32, 96, 576])
@pytest.mark.parametrize("rows", [16, 80, 192])
def test_int4_is_within_half_a_step_of_each_group(rows: int, columns: int) -> None:
    weight = noise(rows, columns)
    groups_ = weight.view(rows, -1, 32)
    step = ((groups_.amax(-1) - groups_.amin(-1)) / 15).repeat_interleave(32, 1)
    found = meant(quantize(weight, "int4", compiled()), columns)
    # the fitted scale may move the outermost codes a little, and a group may do with fewer codes
    assert ((found - weight).abs() <= 0.75 * step * 15 / 8 + weight.abs() * 2**-7).all()
    assert (found - weight).square().mean() < (step * 0.3).square().mean()


@pytest.mark.parametrize("rounded", [False, True])
def test_int4_finds_the_codes_of_q4_1_exactly_also_after_bfloat16(rounded: bool) -> None:
    weight = q4_1(64, 96)
    given = weight.bfloat16().float() if rounded else weight
    found = meant(quantize(given, "int4", compiled()), 96)
    # nothing but bfloat16 rounding of scale, zero and product is left; half a step is at least ten times that
    assert ((found - weight).abs() <= weight.abs().view(64, 3, 32).amax(-1).repeat_interleave(32, 1) * 2**-6).all()
    step = q_step(weight)
    assert ((found - weight).abs().view(64, 3, 32) < 0.2 * step).all()


def q_step(weight: Tensor) -> Tensor:
    grouped = weight.view(weight.shape[0], -1, 32)
    return (grouped.amax(-1, keepdim=True) - grouped.amin(-1, keepdim=True)) / 15


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_are_all_equal_or_zero_stay_what_they_are(kind: Kind) -> None:
    weight = torch.zeros(16, 64)
    weight[3], weight[4, 0] = 0.5, 2.0
    # in float16, 2 / 15 is off by 3e-5; the fit spreads the error of the largest weight over the group
    torch.testing.assert_close(meant(quantize(weight, kind, compiled()), 64), weight, rtol=2**-7, atol=2**-15)


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_is_the_same_rows(kind: Kind) -> None:
    whole = quantize(noise(192, 64), kind, compiled())
    x = noise(2, 64)
    for first, stop in ((0, 64), (64, 192), (128, 192)):
        assert torch.equal(whole.part(first, stop).multiply(x), whole.multiply(x)[:, first:stop])


def test_sizes_that_the_kernels_do_not_take_are_refused() -> None:
    assert can_quantize("int8", 33, 64)
    assert not can_quantize("int8", 64, 33)
    assert not can_quantize("int4", 24, 64)
    with pytest.raises(ValueError, match="24 x 64"):
        quantize(noise(24, 64), "int4", compiled())


# --- in a model ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_few_tokens_are_multiplied_by_packed_weights_and_many_by_the_layers_own(kind: Kind, bias: bool) -> None:
    plain = nn.Linear(64, 80, bias=bias)
    transposed = Conv1D(80, 64)  # type: ignore[no-untyped-call]
    pairs: list[tuple[nn.Module, nn.Module]] = [
        (plain, QuantizedLinear(plain, quantize(plain.weight.detach(), kind, compiled()))),
        (transposed, QuantizedConv1D(transposed, quantize(transposed.weight.detach().T, kind, compiled()))),
    ]
    with torch.inference_mode():
        for own, packed in pairs:
            many, few = noise(1, MAX_ROWS + 1, 64), noise(1, MAX_ROWS, 64)
            assert torch.equal(packed(many), own(many))
            assert packed(few).shape == own(few).shape
            assert not torch.equal(packed(few), own(few))
            error = (packed(few) - own(few)).square().mean().sqrt() / own(few).std()
            assert error < (0.02 if kind == "int8" else 0.15)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2", "qwen3"])
def test_a_packed_model_predicts_nearly_the_same_and_can_be_put_back(family: str) -> None:
    model = build(family)
    ids = torch.arange(3, 40)[None] % model.config.vocab_size
    before = model(input_ids=ids, use_cache=False).logits
    names = [name for name, _ in model.named_parameters()]
    print_before = model_fingerprint(model)
    replace(
        model, {group: quantize_group(model, group, its, compiled()) for group, its in groups(model, "int8").items()}
    )
    assert quantized_layers(model)
    assert [name for name, _ in model.named_parameters()] == names
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, before)
    with always_quantized(model):
        packed = model(input_ids=ids, use_cache=False).logits
    assert 0 < (packed - before).square().mean().sqrt() < 0.1 * before.std()
    # a snapshot made with other weights is not taken as equal
    assert model_fingerprint(model) != print_before
    restore(model)
    assert not quantized_layers(model)
    assert model_fingerprint(model) == print_before


def test_siblings_are_packed_as_one_and_the_output_layer_in_int8() -> None:
    model = build("llama", hidden_size=128, num_attention_heads=2, num_key_value_heads=1, intermediate_size=192)
    found = groups(model, "int4")
    joined = {tuple(name.rpartition(".")[2] for name in group) for group in found}
    assert {("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)} <= joined
    assert all(kind == ("int8" if group == ("lm_head",) else "int4") for group, kind in found.items())
    packed = {group: quantize_group(model, group, its, compiled()) for group, its in found.items()}
    assert {weight.kind for group, weight in packed.items() if group != ("lm_head",)} == {"int4"}
    if ("lm_head",) in packed:
        assert packed[("lm_head",)].kind == "int8"
    replace(model, packed)
    layer = model.model.layers[0]
    assert layer.self_attn.k_proj.quantized.data.data_ptr() != layer.self_attn.q_proj.quantized.data.data_ptr()
    assert quantized_bytes(model) < sum(p.nbytes for p in model.parameters()) / 2


# --- chosen, and kept on the disk ------------------------------------------------------------------------------

LLAMA = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(tiny_llama(**LLAMA), tmp_path / "llama")


def loaded(folder: Path, asked: str, **how: Any) -> Any:
    return load_model(str(folder), device="cpu", **({"dtype": "bfloat16"} | how), weights=asked, kernels=chosen[0])


def logits(model: Any) -> Tensor:
    """Of three tokens: few enough for packed weights."""
    with torch.inference_mode():
        return torch.as_tensor(model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False).logits)


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for models that the kernels do not run as a whole: others are served from another copy (test_served_copy)."""
    monkeypatch.setattr(served_copy, "can_be_served", lambda model: False)


@pytest.mark.usefixtures("packed")
@pytest.mark.parametrize("kind", KINDS)
def test_packed_weights_are_made_once_and_read_from_the_disk(
    folder: Path, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = loaded(folder, kind)
    assert first.weights == kind
    assert first.quantized_bytes == quantized_bytes(first.model) > 0
    monkeypatch.setattr(cpu, "quantize_group", None)
    again = loaded(folder, kind)
    assert torch.equal(logits(again.model), logits(first.model))
    assert not torch.equal(logits(again.model), logits(loaded(folder, "native").model))


@pytest.mark.usefixtures("packed")
@pytest.mark.parametrize("damage", ["bit", "short", "gone", "not safetensors", "manifest"])
def test_damaged_packed_weights_are_made_again(folder: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    first = loaded(folder, "int8")
    kept = quantized_folder(loaded(folder, "native").model, "int8", compiled())
    file = kept / cpu.FILE
    whole = file.read_bytes()
    match damage:
        case "bit":
            file.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
        case "short":
            file.write_bytes(whole[:-9])
        case "gone":
            file.unlink()
        case "not safetensors":
            file.write_bytes(b"x" * len(whole))
        case "manifest":
            (kept / "streamchat.json").write_text("{", encoding="utf-8")
    assert torch.equal(logits(loaded(folder, "int8").model), logits(first.model))
    assert file.read_bytes() == whole


@pytest.mark.usefixtures("packed")
@pytest.mark.parametrize("lacks", ["fingerprint", "format"])
def test_copies_of_an_older_version_go_when_a_new_one_is_made(folder: Path, lacks: str) -> None:
    loaded(folder, "int8")
    [kept] = [path for path in (paths.cache_dir() / "weights").iterdir() if path.is_dir()]
    older = kept.with_name("0" * 32 + "-int8")
    kept.rename(older)
    manifest = json.loads((older / "streamchat.json").read_text(encoding="utf-8"))
    del manifest[lacks]
    (older / "streamchat.json").write_text(json.dumps(manifest), encoding="utf-8")
    older.with_suffix(".json").write_text("{}", encoding="utf-8")
    loaded(folder, "int4")
    assert not older.exists()
    assert not older.with_suffix(".json").exists()
    loaded(folder, "int8")
    assert len([path for path in kept.parent.iterdir() if path.is_dir()]) == 2


def test_another_model_has_packed_weights_of_its_own(folder: Path, tmp_path: Path) -> None:
    loaded(folder, "int8")
    other = save(tiny_llama(seed=1, **LLAMA), tmp_path / "other")
    with torch.inference_mode():
        error = (logits(loaded(other, "int8").model) - logits(loaded(other, "native").model)).float().std()
        assert error < 0.1 * logits(loaded(other, "native").model).float().std()


def test_packed_weights_that_cannot_be_kept_serve_all_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cpu, "save_file", full)
    result = loaded(folder, "int8")
    assert result.weights == "int8"
    # a processor without bfloat16 arithmetic adds a note of its own
    assert (
        len([note for note in result.notes if "will be rebuilt at every start" in note and "disk is full" in note]) == 1
    )


def test_auto_takes_int8_and_measures_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert loaded(folder, "auto").weights == "int8"
    kept = quantized_folder(loaded(folder, "native").model, "int8", compiled()).with_suffix(".json")
    assert 0 < json.loads(kept.read_text(encoding="utf-8"))["divergence"] < quality.AUTO_LIMIT
    monkeypatch.setattr(cpu, "divergence", None)
    assert loaded(folder, "auto").weights == "int8"


def test_auto_takes_int4_where_the_weights_were_in_groups(tmp_path: Path) -> None:
    model = tiny_llama(**LLAMA)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = q4_1(*module.weight.shape)
    assert loaded(save(model, tmp_path / "grouped"), "auto").weights == "int4"


def test_auto_takes_int4_for_those_layers_whose_weights_were_in_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in files in Q4_K_M, which have more bits for some layers."""
    model = tiny_llama(**LLAMA | {"hidden_size": 128})
    for layer in model.model.layers:
        for module in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.mlp.gate_proj, layer.mlp.up_proj):
            module.weight.data = q4_1(*module.weight.shape)
    model.model.layers[0].mlp.down_proj.weight.data = q4_1(*model.model.layers[0].mlp.down_proj.weight.shape)
    folder = save(model, tmp_path / "mixed")
    first = loaded(folder, "auto")
    assert first.weights == "int4 and int8"
    layers = quantized_layers(first.model)
    kinds = {name: layer.quantized.kind for name, layer in layers.items()}
    for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
        assert kinds[f"model.layers.0.{name}"] == "int4"
    for name in ("0.self_attn.v_proj", "0.self_attn.o_proj", "1.mlp.down_proj"):
        assert kinds[f"model.layers.{name}"] == "int8"
    # layers of two kinds are no single matrix
    assert layers["model.layers.0.self_attn.q_proj"].whole is layers["model.layers.0.self_attn.q_proj"].quantized
    monkeypatch.setattr(cpu, "quantize_group", None)  # the second time, they are read from the disk
    monkeypatch.setattr(cpu, "divergence", None)
    again = loaded(folder, "auto")
    assert again.weights == "int4 and int8"
    assert torch.equal(logits(again.model), logits(first.model))
    native = logits(loaded(folder, "native").model)
    assert (logits(first.model) - native).float().square().mean().sqrt() < 0.05 * native.float().std()
    monkeypatch.undo()
    assert loaded(folder, "int4").weights == "int4"  # copies of its own
    assert loaded(folder, "int8").weights == "int8"


def test_a_vocabulary_of_any_size_is_quantized_and_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("gpt2", vocab_size=161)
    folder = save(model, tmp_path / "gpt2")
    first = loaded(folder, "int8")
    assert quantized_layers(first.model)["lm_head"].quantized.rows == 161
    monkeypatch.setattr(cpu, "quantize_group", None)
    assert torch.equal(logits(loaded(folder, "int8").model), logits(first.model))


@pytest.mark.parametrize("vocabulary", [160, 176, 200])
def test_copies_are_aligned_in_memory(tmp_path: Path, vocabulary: int) -> None:
    """PyTorch's int8 kernel crashes otherwise, for two tokens or more."""
    folder = save(tiny_llama(**LLAMA | {"vocab_size": vocabulary}), tmp_path / "model")
    for _ in range(2):  # the second time, they are read from the disk
        layers = quantized_layers(loaded(folder, "int8").model)
        assert {layer.quantized.data.data_ptr() % 16 for layer in layers.values()} == {0}


def test_copies_of_an_older_format_are_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded(folder, "native").model
    now = quantized_folder(model, "int8", compiled())
    monkeypatch.setattr(cpu, "FORMAT", 1)
    assert quantized_folder(model, "int8", compiled()) != now


@pytest.mark.skipif(load_kernels("auto") is None, reason="needs compiled kernels")
def test_a_cache_computed_with_int8_rows_is_not_that_of_int8_groups() -> None:
    prints = set()
    for kernels in (None, load_kernels("auto")):
        model = tiny_llama(**LLAMA)
        set_contents_digest(model, "1")
        replace(
            model, {group: quantize_group(model, group, its, kernels) for group, its in groups(model, "int8").items()}
        )
        prints.add(model_fingerprint(model))
    assert len(prints) == 2


def test_auto_stays_with_the_models_own_where_packed_ones_say_something_else(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "divergence", lambda *_: 1.01 * quality.AUTO_LIMIT)
    first = loaded(folder, "auto")
    assert first.weights == "native"
    assert first.quantized_bytes == 0
    assert torch.equal(logits(first.model), logits(loaded(folder, "native").model))
    monkeypatch.setattr(cpu, "quantize_group", None)  # remembered: nothing is packed, nothing measured
    assert loaded(folder, "auto").weights == "native"
    monkeypatch.undo()
    assert loaded(folder, "int8").weights == "int8"  # who asks for it gets it


@pytest.mark.parametrize(
    ("how", "reason"),
    [({"dtype": "float16"}, "float16"), ({"capability": "DEFAULT"}, "AVX"), ({"memory": 1000}, "memory")],
)
def test_where_packed_weights_do_not_work_auto_is_native_and_the_others_are_refused(
    folder: Path, how: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "memory" not in how:
        chosen[:] = ["torch"]  # compiled ones serve any processor and format
    if "capability" in how:
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: how["capability"])
    model = tiny_llama(**LLAMA).to(getattr(torch, how.get("dtype", "bfloat16")))
    if "memory" in how:
        monkeypatch.setattr(device, "free_memory", lambda _: how["memory"])
    assert use_weights(model, None, "auto", device="cpu", name="m", kernels=chosen[0], progress=silent) == (
        "native",
        (),
    )
    with pytest.raises(ConfigError, match=f"int4.*{reason}.*weights = native"):
        use_weights(model, None, "int4", device="cpu", name="m", kernels=chosen[0], progress=silent)
    assert not quantized_layers(model)


@pytest.mark.skipif(load_kernels("auto") is None, reason="needs compiled kernels")
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_compiled_kernels_quantize_a_model_in_float16(kind: Any) -> None:
    model: Any = tiny_llama(**LLAMA)
    model.to(torch.float16)
    found, _ = use_weights(model, None, kind, device="cpu", name="m", kernels="auto", progress=silent)
    assert found == kind
    assert quantized_layers(model)


def test_a_device_without_the_kernels_is_named() -> None:
    with pytest.raises(ConfigError, match="mps"):
        use_weights(tiny_llama(**LLAMA), None, "int8", device="mps", name="m", kernels=chosen[0], progress=silent)


def test_on_a_gpu_auto_is_native_and_others_need_fused_kernels_or_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama(**LLAMA)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert use_weights(model, None, "auto", device="cuda", name="m", kernels=chosen[0], progress=silent) == (
        "native",
        (),
    )
    expected = r"'int4' on a GPU needs fused kernels, .*\(Triton is not installed\), or torchao, .*pip install torchao"
    with pytest.raises(ConfigError, match=expected):
        use_weights(model, None, "int4", device="cuda", name="m", kernels=chosen[0], progress=silent)


def test_who_asks_for_float32_gets_exact_numbers_from_auto(folder: Path) -> None:
    assert loaded(folder, "auto", dtype="float32").weights == "native"
    assert loaded(folder, "int8", dtype="float32").weights == "int8"


def test_the_divergence_is_that_of_the_definition() -> None:
    model = tiny_llama(**LLAMA)
    replace(
        model, {group: quantize_group(model, group, its, compiled()) for group, its in groups(model, "int4").items()}
    )
    tokenizer = make_tokenizer()
    measured = quality.divergence(model, tokenizer)
    ids = torch.tensor([tokenizer(quality.TEXT)["input_ids"][: quality.TOKENS]])
    plain = model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
    with always_quantized(model):
        packed = model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
    expected = torch.nn.functional.kl_div(packed, plain, log_target=True, reduction="batchmean").item()
    assert measured == pytest.approx(expected, rel=1e-3)
    assert measured > 1e-6


def test_the_default_model_runs_on_int4_that_costs_less_than_1_percent(default_model_home: Path, kernels_: str) -> None:
    result = load_model("default", device="cpu", dtype="bfloat16", weights="auto", kernels=kernels_)
    assert result.weights == "int4"
    plain = load_model("default", device="cpu", dtype="bfloat16", kernels=kernels_)
    with always_quantized(result.model):
        ours = quality.predictions(result.model, plain.tokenizer)
    assert quality.divergence_from(quality.predictions(plain.model, plain.tokenizer), ours) < 0.005
    assert result.quantized_bytes < 100e6
