"""Loading folders: what is asked for is what one gets, or one sentence says why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from streamchat.base.errors import ConfigError, ModelError, ModelNotFoundError, OutOfMemoryError, UnsupportedModelError
from streamchat.models import device as devices
from streamchat.models import limits, load
from streamchat.models.light import skeleton
from streamchat.models.load import load_model
from tests.support.models_help import make_tokenizer, save, tiny_llama, tiny_neox


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(tiny_llama(), tmp_path / "tiny-llama")


@pytest.mark.parametrize("make", [tiny_llama, tiny_neox])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_loaded_model_is_ready(make: Any, attention: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = save(make(), tmp_path / "my-model")
    capfd.readouterr()
    loaded = load_model(str(folder), device="cpu", dtype="float32", attention=attention)
    assert (loaded.name, loaded.source) == ("my-model", str(folder))
    assert (loaded.device, loaded.dtype, loaded.notes) == ("cpu", "float32", ())
    assert loaded.model.config._attn_implementation == attention
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    ids = loaded.tokenizer("The capital of France", return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(ids).logits, make()(ids).logits)
    assert capfd.readouterr() == ("", "")  # no bar, no warning


def test_bars_and_log_levels_are_restored(folder: Path) -> None:
    import logging

    from huggingface_hub.utils.tqdm import are_progress_bars_disabled
    from transformers.utils import logging as transformers_logging

    level = logging.getLogger("transformers").level
    load_model(str(folder), device="cpu")
    assert transformers_logging.is_progress_bar_enabled()
    assert not are_progress_bars_disabled()
    assert logging.getLogger("transformers").level == level


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_number_format(folder: Path, dtype: str) -> None:
    loaded = load_model(str(folder), device="cpu", dtype=dtype)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {getattr(torch, dtype)}
    assert loaded.dtype == dtype
    assert any("slow on a CPU" in note for note in loaded.notes) == (dtype == "float16")


def test_auto_on_a_cpu_asks_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    uses = "AVX512"
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: uses)
    for flags, dtype in (({}, "float32"), ({"avx512_f": True}, "float32"), ({"avx512_bf16": True}, "bfloat16")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda flags=flags: flags)
        assert devices.choose_dtype("auto", "cpu") == (dtype, ())
    uses = "AVX2"  # of what the CPU has, as with ATEN_CPU_CAPABILITY=avx2
    assert devices.choose_dtype("auto", "cpu") == ("float32", ())
    uses = "AVX512"
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert "emulates" in devices.choose_dtype("bfloat16", "cpu")[1][0]


def test_auto_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_cuda_bfloat16", lambda _: True)
    assert devices.choose_dtype("auto", "cuda") == ("bfloat16", ())
    monkeypatch.setattr(devices, "_cuda_bfloat16", lambda _: False)
    assert devices.choose_dtype("auto", "cuda") == ("float16", ())
    assert devices.choose_dtype("bfloat16", "cuda")[1]


def test_device_order_and_absent_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "available_devices", lambda: ["cuda", "cpu"])
    assert devices.choose_device("auto") == "cuda"
    assert devices.choose_device("cpu") == "cpu"
    with pytest.raises(ConfigError, match="device = 'mps' is not available here; available: cuda, cpu"):
        devices.choose_device("mps")


def test_overflow_in_float16_is_noticed(tmp_path: Path) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1e9).clamp_(-6e4, 6e4)
        model.model.layers[0].mlp.up_proj.weight.mul_(1e5).clamp_(-6e4, 6e4)
    loaded = load_model(str(save(model, tmp_path / "hot")), device="cpu", dtype="float16")
    assert loaded.dtype in ("bfloat16", "float32")
    assert loaded.notes == (f"hot overflows in float16, so it runs in {loaded.dtype}",)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {getattr(torch, loaded.dtype)}


def test_model_without_sdpa_runs_eager(tmp_path: Path) -> None:
    config = transformers.BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=4)
    folder = save(transformers.BloomForCausalLM(config), tmp_path / "old")
    loaded = load_model(str(folder), device="cpu", dtype="float32")
    assert loaded.model.config._attn_implementation == "eager"
    assert loaded.notes == ("old has no sdpa attention, so it runs with eager attention",)


def test_too_big_for_the_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "free_memory", lambda _device: 50_000)
    with pytest.raises(ModelNotFoundError, match=r"needs \d+ kB of memory in float32 and 50\.0 kB are free"):
        load_model(str(folder), device="cpu", dtype="float32")


def test_progress_may_cancel(folder: Path) -> None:
    class CancelledError(Exception):
        pass

    def cancel(stage: str, _done: int = 0, _total: int = 0, _unit: str = "") -> None:
        if stage == "Loading tiny-llama":
            raise CancelledError

    with pytest.raises(CancelledError):
        load_model(str(folder), device="cpu", progress=cancel)


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.update(changes)
    path.write_text(json.dumps(config))


def cut_off(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def shard_missing(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    tiny_llama().save_pretrained(folder, max_shard_size="40KB")
    next(iter(sorted(folder.glob("model-0*.safetensors")))).unlink()


def weight_missing(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


DEFECTS: list[tuple[Any, type[ModelError], str]] = [
    (lambda f: (f / "config.json").unlink(), ModelNotFoundError, "has no config.json"),
    (lambda f: (f / "config.json").write_text("{"), ModelNotFoundError, "config.json cannot be read"),
    (lambda f: (f / "config.json").write_text("[]"), ModelNotFoundError, "not a model's configuration"),
    (lambda f: (f / "config.json").rename(f / "adapter_config.json"), UnsupportedModelError, "adapter"),
    (lambda f: (f / "model.safetensors").unlink(), ModelNotFoundError, "has no weights"),
    (lambda f: (f / "model.safetensors").write_bytes(b"<html>"), ModelNotFoundError, "is damaged"),
    (cut_off, ModelNotFoundError, r"is damaged \(.*incomplete metadata"),
    (only_pickle, UnsupportedModelError, r"only as pytorch_model\.bin.*save_pretrained"),
    (shard_missing, ModelNotFoundError, r"is incomplete: 1 of \d+ weight files are missing"),
    (weight_missing, UnsupportedModelError, r"lacks 1 of the weights .*layers\.1\.mlp\.up_proj"),
    (lambda f: [p.unlink() for p in f.glob("tokenizer*")], ModelNotFoundError, "has no tokenizer"),
    (lambda f: (f / "tokenizer.json").write_text("{}"), ModelNotFoundError, "tokenizer of .* cannot be read"),
    (lambda f: change_config(f, architectures=["BertForMaskedLM"], model_type="bert"), UnsupportedModelError, "Bert"),
    (lambda f: change_config(f, architectures=["T5ForConditionalGeneration"], model_type="t5"), UnsupportedModelError,
     "T5ForConditionalGeneration"),
    (lambda f: change_config(f, architectures=["CLIPModel"], model_type="clip"), UnsupportedModelError, "CLIPModel"),
    (lambda f: change_config(f, architectures=["LlamaModel"]), UnsupportedModelError, "LlamaModel"),
    (lambda f: change_config(f, architectures=None, model_type="clip"), UnsupportedModelError, "which is not a causal"),
    (lambda f: change_config(f, model_type="brand_new"), UnsupportedModelError, "'brand_new', which transformers 5"),
    (lambda f: change_config(f, model_type="own", auto_map={"AutoConfig": "x.Y"}), UnsupportedModelError,
     "requires trust_remote_code"),
    (lambda f: change_config(f, hidden_size=48), UnsupportedModelError, "tiny-llama"),
]  # fmt: skip


@pytest.mark.parametrize(("break_it", "kind", "words"), DEFECTS)
def test_defects_are_one_sentence(folder: Path, break_it: Any, kind: type[ModelError], words: str) -> None:
    break_it(folder)
    with pytest.raises(kind, match=words) as caught:
        load_model(str(folder), device="cpu", dtype="float32")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_code_in_the_folder_is_never_run(folder: Path, tmp_path: Path) -> None:
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\n")
    change_config(folder, auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    load_model(str(folder), device="cpu")  # a known type: transformers' own code is used
    assert not (tmp_path / "ran").exists()


def test_base_model_without_output_layer(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    tiny_llama().model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    with pytest.raises(UnsupportedModelError, match="LlamaModel"):
        load_model(str(folder), device="cpu")
    change_config(folder, architectures=["LlamaForCausalLM"])
    with pytest.raises(UnsupportedModelError, match=r"lacks 1 of the weights .*lm_head\.weight"):
        load_model(str(folder), device="cpu", dtype="float32")


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("mmap failed: Cannot allocate memory")],
    ids=["torch", "Python", "system"],
)
def test_out_of_memory_while_loading(folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def no_room(*_args: Any, **_kwargs: Any) -> Any:
        raise error

    monkeypatch.setattr(skeleton, "build_skeleton", no_room)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", no_room)
    with pytest.raises(OutOfMemoryError, match="does not fit into the memory of cpu in float32; choose a smaller"):
        load.load_model(str(folder), device="cpu", dtype="float32")
    monkeypatch.setattr(limits, "_address_space_limit", lambda: 10**15)
    with pytest.raises(OutOfMemoryError, match=r"allows a program: 1,000,000,000 MB \(ulimit -v\); raise the limit"):
        load.load_model(str(folder), device="cpu", dtype="float32")
