"""Layers on several devices, simulated: where tensors are, that they never mix, and that nothing else changes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from streamchat.base.errors import ConfigError
from streamchat.cache import checkpoint
from streamchat.cache.arguments import cache_keyword
from streamchat.cache.hook import StreamingHook
from streamchat.cache.positions.rotation import RotarySource
from streamchat.cache.positions.strategy import choose_fit, make_cache
from streamchat.cache.streaming import StreamingCache
from streamchat.decode.install import install
from streamchat.models import device as devices
from streamchat.models import read
from streamchat.models.checked_fit import verdict_file
from streamchat.models.load import load_model
from tests.support.models_help import save, tiny_llama
from tests.support.simulated_devices import FarTensor, MixedDevicesError, simulated_devices
from tests.support.small_chat import replies
from tests.support.tiny import kv_of, random_ids, tiny_model

accelerate: Any = pytest.importorskip("accelerate", reason="layers are spread by accelerate, which is not installed")

FIRST, SECOND = torch.device("cpu:1"), torch.device("cpu:2")
ROTATING = ["llama", "gpt_neox"]


@pytest.fixture
def simulated() -> Iterator[None]:
    with simulated_devices():
        yield


def halves(model: Any) -> dict[str, str]:
    """Embeddings and the first layer on one device; other layers, rotary module, norm and head on another one."""
    prefix = model.base_model_prefix
    head = FIRST if model.config.get_text_config().tie_word_embeddings else SECOND  # one tensor has one place
    found = {name: str(head) for name, _ in model.named_children() if name != prefix}
    for name, child in getattr(model, prefix).named_children():
        if isinstance(child, nn.ModuleList):
            found |= {f"{prefix}.{name}.{i}": str(SECOND if i else FIRST) for i in range(len(child))}
        else:
            found[f"{prefix}.{name}"] = str(FIRST if isinstance(child, nn.Embedding) else SECOND)
    return found


def spread_model(family: str) -> Any:
    """A tiny model over two simulated devices."""
    model = tiny_model(family, "eager")
    return accelerate.dispatch_model(model, halves(model), main_device=str(FIRST))


def stream(model: Any, cache: StreamingCache, ids: Tensor, device: torch.device) -> list[Tensor]:
    """Logits (vocabulary,) on the CPU after a chunk of 12 ids and after each of the others."""
    found = []
    with StreamingHook(model, cache), torch.inference_mode():
        for chunk in (ids[:, :12], *torch.split(ids[:, 12:], 1, dim=1)):
            out = model(input_ids=chunk.to(device), use_cache=True, **{cache_keyword(model): cache})
            assert out.logits.device == device  # where the ids came from
            found.append(out.logits[0, -1].cpu())
    return found


def tensors_of(layer: Any) -> list[Tensor]:
    """Everything that a layer keeps."""
    return [layer.keys, layer.values, *(layer.buffers or ()), *(layer._originals or ())]


def small_cache(model: Any) -> StreamingCache:
    """Full after 32 tokens; positions are moved back at 80."""
    cache = make_cache(model, choose_fit(model), cache_size=32, num_sink_tokens=4)
    cache.position_limit = min(cache.position_limit, 80)
    return cache


@pytest.mark.slow
@pytest.mark.parametrize("family", [*ROTATING, "gpt2"])
def test_a_stream_over_two_devices_is_that_of_one(family: str, simulated: None) -> None:
    ids = random_ids(110)
    plain, spread_out = tiny_model(family, "eager"), spread_model(family)
    ours, theirs = small_cache(spread_out), small_cache(plain)
    assert ours.fit.devices == (FIRST, SECOND, SECOND)
    assert set(theirs.fit.devices) == {torch.device("cpu")}
    logits, expected = stream(spread_out, ours, ids, FIRST), stream(plain, theirs, ids, torch.device("cpu"))
    assert ours.compression_count == theirs.compression_count > 5
    torch.testing.assert_close(torch.stack(logits), torch.stack(expected), atol=1e-5, rtol=0)
    for layer, device in zip(ours.streaming_layers, ours.fit.devices, strict=True):
        assert {tensor.device for tensor in tensors_of(layer)} == {device}
        assert (family == "gpt2") == (layer._originals is None)  # what is read again needs none


@pytest.mark.slow
@pytest.mark.parametrize("family", ROTATING)
def test_a_checkpoint_goes_back_to_where_each_layer_is(family: str, simulated: None) -> None:
    model = spread_model(family)
    first = small_cache(model)
    stream(model, first, random_ids(60), FIRST)
    taken = checkpoint.capture(first)
    assert {tensor.device for tensor in taken.tensors.values()} == {torch.device("cpu")}
    again = small_cache(model)
    checkpoint.restore(again, taken)
    for layer, device in zip(again.streaming_layers, (FIRST, SECOND, SECOND), strict=True):
        assert layer._originals is not None
        assert {tensor.device for tensor in tensors_of(layer)} == {device}
    more = random_ids(30, seed=5)
    for ours, theirs in zip(stream(model, again, more, FIRST), stream(model, first, more, FIRST), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.slow
def test_rows_are_chosen_by_indices_of_any_device(simulated: None) -> None:
    model = spread_model("llama")
    cache = make_cache(model, choose_fit(model), cache_size=32, num_sink_tokens=4)
    with StreamingHook(model, cache), torch.inference_mode():
        rows = random_ids(6).expand(3, -1).to(FIRST)
        model(input_ids=rows, use_cache=True, **{cache_keyword(model): cache})
    cache.batch_select_indices(torch.tensor([2, 0], device=FIRST))
    keys = [kv_of(layer)[0] for layer in cache.streaming_layers]
    assert [(each.shape[0], each.device) for each in keys] == [(2, FIRST), *[(2, SECOND)] * 2]


def test_angles_are_made_where_the_frequencies_are_and_come_to_who_asks(simulated: None) -> None:
    module = tiny_model("llama").model.rotary_emb.to(SECOND)
    states = torch.zeros(1, 1, 64, device=FIRST)
    source = RotarySource(module, (states, torch.zeros(1, 1, dtype=torch.long, device=FIRST)), {})
    for device in (FIRST, SECOND, torch.device("cpu")):
        cos, sin = source.angles_range(40, 3, device)
        assert cos.device == sin.device == device
    assert source.angles(torch.arange(2))[0].device == SECOND


def test_the_short_step_stays_away_from_several_devices_and_the_verdict_is_another_one(simulated: None) -> None:
    plain = tiny_model("llama")
    one = verdict_file(plain)
    assert install(plain, None)
    model = tiny_model("llama")
    assert verdict_file(model) == one
    accelerate.dispatch_model(model, halves(model), main_device=str(FIRST))
    assert not install(model, None)
    assert verdict_file(model) != one


def test_weights_on_the_disk_work_through_the_same_hooks(tmp_path: Path) -> None:
    """Real devices, if slow ones: accelerate puts a layer's weights in place before its forward and away after it."""
    ids = random_ids(90)
    model = tiny_model("llama")
    placed = {name: "disk" if name.endswith(("layers.1", "layers.2")) else "cpu" for name in halves(model)}
    accelerate.dispatch_model(model, placed, offload_dir=str(tmp_path), main_device="cpu")
    assert model.model.layers[1].mlp.up_proj.weight.device == torch.device("meta")
    assert not install(model, None)
    plain = tiny_model("llama")
    cpu = torch.device("cpu")
    logits = stream(model, small_cache(model), ids, cpu)
    torch.testing.assert_close(logits, stream(plain, small_cache(plain), ids, cpu), atol=1e-5, rtol=0)


# --- loading ------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(tiny_llama(max_position_embeddings=2048), tmp_path / "tiny")


@pytest.fixture
def two_gpus(simulated: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two simulated devices stand for GPUs; accelerate is told which layer goes where, as it knows real ones only."""
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # weights are read on this thread
    monkeypatch.setattr(devices, "available_devices", lambda: ["cuda", "cpu"])
    monkeypatch.setattr(devices, "gpus", lambda: [str(FIRST), str(SECOND)])
    monkeypatch.setattr(devices, "choose_dtype", lambda *_: ("float32", ()))
    placed = halves(tiny_llama())
    monkeypatch.setattr(read, "spread_arguments", lambda _: {"device_map": placed})


@pytest.mark.slow
def test_a_chat_over_two_gpus_says_what_it_says_on_one(folder: Path, two_gpus: None) -> None:
    loaded = load_model(str(folder), device="cuda:all", attention="eager")
    assert (loaded.device, loaded.dtype, loaded.notes) == ("cpu:1,2", "float32", ())
    assert loaded.weights == "native"
    placed = {name: parameter.device for name, parameter in loaded.model.named_parameters()}
    assert placed["model.embed_tokens.weight"] == placed["model.layers.0.mlp.up_proj.weight"] == FIRST
    assert placed["lm_head.weight"] == placed["model.layers.1.mlp.up_proj.weight"] == SECOND
    one = load_model(str(folder), device="cpu", dtype="float32", attention="eager")
    assert replies(loaded) == replies(one)


def test_packed_weights_are_for_one_device(folder: Path, two_gpus: None) -> None:
    with pytest.raises(ConfigError, match=r"weights = 'int8' cannot be used: .* on cpu:1,2; choose weights = native"):
        load_model(str(folder), device="cuda:all", attention="eager", weights="int8")
    assert load_model(str(folder), device="cuda:all", attention="eager", weights="auto").weights == "native"


def test_auto_spreads_what_fits_on_no_single_gpu(folder: Path, two_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    need = int(1.05 * 4 * sum(p.numel() for p in tiny_llama().parameters()))
    sizes = {str(FIRST): need // 2 + 10, str(SECOND): need // 2 + 10, "cpu:1,2": need + 20, "cpu": 10**9}
    monkeypatch.setattr(devices, "free_memory", sizes.__getitem__)
    loaded = load_model(str(folder), attention="eager")
    assert loaded.device == "cpu:1,2"
    assert loaded.notes == ("tiny fits on no single GPU, so it is spread over cpu:1,2",)


def test_a_model_that_fails_over_several_gpus_runs_on_the_roomier_one(
    folder: Path, two_gpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {str(FIRST): 10**8, str(SECOND): 10**9, "cpu:1,2": 10**9, "cpu": 10**9}
    monkeypatch.setattr(devices, "free_memory", sizes.__getitem__)
    # the hooks that move what layers pass on are missing
    monkeypatch.setattr("transformers.modeling_utils.accelerate_dispatch", without_hooks)
    loaded = load_model(str(folder), device="cuda:all", attention="eager")
    assert loaded.device == str(SECOND)
    (note,) = loaded.notes
    assert note.startswith("tiny cannot be spread over cpu:1,2 (Expected all tensors to be on the same device")
    assert note.endswith("so it runs on cpu:2")
    assert {parameter.device for parameter in loaded.model.parameters()} == {SECOND}


def without_hooks(model: Any, _quantizer: Any, device_map: dict[str, str], *_: Any) -> None:
    model.hf_device_map = device_map


def test_the_simulation_refuses_to_mix(simulated: None) -> None:
    a, b = torch.ones(3, device=FIRST), torch.ones(3, device=SECOND)
    assert isinstance(a, FarTensor)
    with pytest.raises(MixedDevicesError, match="aten::add found cpu:1 and cpu:2"):
        a + b
    assert torch.equal((a + b.to(FIRST)).cpu(), torch.full((3,), 2.0))
    assert (a[torch.tensor([0, 2])] * torch.tensor(2.0)).device == FIRST
