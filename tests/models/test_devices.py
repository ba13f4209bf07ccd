"""Which device is taken, what is free there, and what memory figures say; GPUs are made up here."""

from __future__ import annotations

import json
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from streamchat.base import events as ev
from streamchat.base.devices import device_type, devices_of, is_spread, join_devices
from streamchat.base.errors import ConfigError, ModelNotFoundError
from streamchat.cli import main as cli
from streamchat.config.settings import spec_of
from streamchat.frontend.status_table import memory_rows
from streamchat.models import device as devices
from streamchat.models import spread
from streamchat.telemetry import memory
from streamchat.telemetry.memory import memory_state, peak_memory

GB = 10**9


class Gpus:
    """What torch.cuda says on a machine with these GPUs: (free, total, allocated, reserved) bytes of each."""

    def __init__(self, *sizes: tuple[int, int, int, int], bfloat16: tuple[bool, ...] = ()) -> None:
        self.sizes = sizes
        self.bfloat16 = bfloat16 or (True,) * len(sizes)
        self.current = 0
        self.reset: list[str] = []

    def _of(self, name: Any) -> tuple[int, int, int, int]:
        return self.sizes[torch.device(name).index or 0]

    def put_in_place(self, monkeypatch: pytest.MonkeyPatch) -> None:
        cuda: dict[str, Any] = {
            "is_available": lambda: True,
            "device_count": lambda: len(self.sizes),
            "mem_get_info": lambda name: self._of(name)[:2],
            "memory_allocated": lambda name: self._of(name)[2],
            "memory_reserved": lambda name: self._of(name)[3],
            "max_memory_allocated": lambda name: self._of(name)[2] + 7,
            "reset_peak_memory_stats": self.reset.append,
            "get_device_properties": lambda name: SimpleNamespace(name="Model X", total_memory=self._of(name)[1]),
            "device": self._enter,
            "is_bf16_supported": lambda including_emulation: self.bfloat16[self.current],
        }
        for name, value in cuda.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def _enter(self, name: str) -> Any:
        self.current = torch.device(name).index or 0
        return nullcontext()


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> Gpus:
    """10 of 16 GB and 20 of 24 GB free; torch holds 2 GB of the first and uses 1 GB of them."""
    found = Gpus((10 * GB, 16 * GB, GB, 2 * GB), (20 * GB, 24 * GB, 3 * GB, 3 * GB))
    found.put_in_place(monkeypatch)
    monkeypatch.setattr(devices, "can_spread", lambda: True)
    return found


def test_names_of_places() -> None:
    assert devices_of("cuda:0,2,11") == ["cuda:0", "cuda:2", "cuda:11"]
    assert (devices_of("cuda"), devices_of("cuda:1"), devices_of("cpu")) == (["cuda"], ["cuda:1"], ["cpu"])
    for place in ("cpu", "mps", "cuda", "cuda:1", "cuda:0,2,11"):
        assert join_devices(devices_of(place)) == place
        assert is_spread(place) == ("," in place)
    assert join_devices(["cuda:1", "cuda:1"]) == "cuda:1"
    assert device_type("cuda:0,2") == device_type("cuda") == "cuda"


def test_which_words_the_setting_takes() -> None:
    spec = spec_of("device")
    for word in ("auto", "cpu", "mps", "cuda", "cuda:all", "cuda:0", "cuda:1", "cuda:0,1", "cuda:12,3,4"):
        assert spec.allows(word), word
    for wrong in ("cuda:", "cuda:x", "cuda:0,", "cuda:-1", "cuda:0 1", "cpu:0", "gpu", "cuda:1\n", "cuda:٣", 1):
        assert not spec.allows(wrong), wrong


def test_gpus_by_number(two: Gpus) -> None:
    chosen = {asked: devices.choose_device(asked) for asked in ("auto", "cuda", "cuda:1", "cuda:01", "cuda:1,0,1")}
    assert chosen == {
        "auto": "cuda",
        "cuda": "cuda",
        "cuda:1": "cuda:1",
        "cuda:01": "cuda:1",
        "cuda:1,0,1": "cuda:1,0",
    }
    assert devices.choose_device("cuda:all") == "cuda:0,1"


@pytest.mark.parametrize(
    ("asked", "missing"), [("cuda:2", "cuda:2"), ("cuda:0,7", "cuda:7")], ids=["one", "one of several"]
)
def test_a_gpu_that_is_not_there(two: Gpus, asked: str, missing: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        devices.choose_device(asked)
    assert str(refusal.value) == (
        f"device = {asked!r} cannot be used: there is no {missing} here; available: cuda:0, cuda:1, cpu"
    )


def test_no_gpu_at_all(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(devices, "available_devices", lambda: ["cpu"])
    for asked in ("cuda:0", "cuda:all", "cuda:0,1"):
        with pytest.raises(ConfigError, match=f"device = '{asked}' is not available here; available: cpu"):
            devices.choose_device(asked)
    assert cli.main(["bench", "--startup", "--rounds", "1", "--device", "cuda:x"]) == 2
    assert "device = 'cuda:x' is not valid; it must be one of auto, cpu, cuda, mps" in capsys.readouterr().err


def test_spreading_without_accelerate_is_one_sentence(two: Gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "can_spread", lambda: False)
    with pytest.raises(ConfigError, match="over cuda:0,1, which needs accelerate; install it with: pip install acc"):
        devices.choose_device("cuda:all")
    assert devices.choose_device("cuda:1") == "cuda:1"
    with pytest.raises(ModelNotFoundError, match=r"big needs 25\.2 GB .* only cuda:0 and cuda:1 together have"):
        devices.device_with_room(12 * GB, "bfloat16", "big")


def test_auto_takes_the_first_gpu_with_room_then_all(two: Gpus) -> None:
    # 11 GB can be had on the first GPU, 20 GB on the second
    places = {billions: devices.device_with_room(billions * GB, "bfloat16", "m") for billions in (5, 6, 9, 10, 14, 99)}
    assert places == {5: "cuda", 6: "cuda:1", 9: "cuda:1", 10: "cuda:0,1", 14: "cuda:0,1", 99: "cuda:0,1"}
    devices.check_memory(14 * GB, "bfloat16", "cuda:0,1", "m")  # main memory is not asked
    with pytest.raises(ModelNotFoundError, match=r"needs 31\.5 GB of cuda:0,1 memory in bfloat16 and 31\.0 GB"):
        devices.check_memory(15 * GB, "bfloat16", "cuda:0,1", "m")


def test_one_gpu_is_taken_whatever_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    Gpus((GB, GB, 0, 0)).put_in_place(monkeypatch)
    assert devices.device_with_room(9 * GB, "bfloat16", "m") == "cuda"  # `check_memory` says what is wrong then


def test_what_torch_holds_unused_counts_as_free(two: Gpus) -> None:
    assert devices.free_memory("cuda") == devices.free_memory("cuda:0") == 11 * GB
    assert devices.free_memory("cuda:1") == 20 * GB
    assert devices.free_memory("cuda:0,1") == 31 * GB


def test_bfloat16_must_be_had_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    Gpus(*[(GB, GB, 0, 0)] * 2, bfloat16=(True, False)).put_in_place(monkeypatch)
    chosen = [devices.choose_dtype("auto", place)[0] for place in ("cuda:0", "cuda:1", "cuda:0,1")]
    assert chosen == ["bfloat16", "float16", "float16"]
    assert "no bfloat16" in devices.choose_dtype("bfloat16", "cuda:0,1")[1][0]
    assert devices.choose_dtype("bfloat16", "cuda:0")[1] == ()


def test_figures_of_several_gpus_are_sums(two: Gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "process_rss", lambda: 1000)
    assert memory_state("cuda:1") == ev.MemoryState(1000, "cuda:1", 3 * GB, 3 * GB, 24 * GB)
    state = memory_state("cuda:0,1")
    assert state == ev.MemoryState(1000, "cuda:0,1", 4 * GB, 5 * GB, 40 * GB)
    assert [(row.label, row.value) for row in memory_rows(state)] == [
        ("VRAM allocated", "4.0 GB"),
        ("VRAM reserved", "5.0 GB"),
        ("VRAM of 2 devices", "40.0 GB"),
        ("process memory", "1.0 kB"),
    ]
    with peak_memory("cuda:0,1") as peak:
        assert peak() == 14
    assert two.reset == ["cuda:0", "cuda:1"]


def test_figures_of_an_apple_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: 2 * GB)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 3 * GB)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 12 * GB)
    monkeypatch.setattr(memory, "process_rss", lambda: 1000)
    assert memory_state("mps") == ev.MemoryState(1000, "mps", 2 * GB, 3 * GB, 12 * GB)
    assert devices.free_memory("mps") == 10 * GB  # the driver's spare gigabyte can be used
    with pytest.raises(ModelNotFoundError, match=r"needs 12\.6 GB of mps memory in bfloat16 and 10\.0 GB are free"):
        devices.check_memory(6 * GB, "bfloat16", "mps", "m")
    with peak_memory("mps") as peak:
        assert peak() is None


def test_doctor_lists_every_gpu(two: Gpus, capsys: pytest.CaptureFixture[str]) -> None:
    two.bfloat16 = (True, False)
    cli.main(["doctor", "--json", "--model", "pythia-410m"])
    report = json.loads(capsys.readouterr().out)
    assert report["device"]["devices"] == ["cuda", "cpu"]
    assert report["device"]["cuda:0"] == "Model X, 11.0 GB free of 16.0 GB"
    assert report["device"]["cuda:1"] == "Model X, 20.0 GB free of 24.0 GB"
    assert (report["device"]["bfloat16 on cuda:0"], report["device"]["bfloat16 on cuda:1"]) == (True, False)
    assert report["chat"]["device"] == "cuda (auto: best of cuda, cpu)"


def test_doctor_and_an_apple_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *_: True)
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: 2 * GB)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 12 * GB)
    cli.main(["doctor", "--json", "--model", "pythia-410m"])
    report = json.loads(capsys.readouterr().out)
    assert report["device"]["mps"] == "10.0 GB free of 12.0 GB"
    assert report["chat"]["dtype"] == "bfloat16 (auto: safe and fast on this device)"


# --- spreading ----------------------------------------------------------------------------------------------------


def test_accelerate_gets_the_gpus_alone_and_uses_both(two: Gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerate: Any = pytest.importorskip("accelerate", reason="accelerate is not installed")
    arguments = spread.spread_arguments("cuda:0,1")
    assert arguments == {"device_map": "auto", "max_memory": {0: int(0.9 * 11 * GB), 1: 18 * GB}}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=32))  # 13.5 GB in bfloat16
    monkeypatch.undo()  # accelerate asks torch about real GPUs
    model.bfloat16()
    placed = accelerate.infer_auto_device_map(
        model, max_memory=arguments["max_memory"], no_split_module_classes=model._no_split_modules
    )
    assert set(placed.values()) == {0, 1}
    model.hf_device_map = placed
    assert spread.used_devices(model, "cuda:0,1", "m") == "cuda:0,1"


def test_what_is_left_for_the_disk_is_refused() -> None:
    def on(*places: Any) -> Any:
        return SimpleNamespace(hf_device_map=dict(enumerate(places)))

    assert spread.used_devices(on(1, torch.device("cuda:0"), "cuda:1"), "cuda:0,1,2", "m") == "cuda:0,1"
    assert spread.used_devices(on(2), "cuda:0,1,2", "m") == "cuda:2"
    with pytest.raises(ModelNotFoundError, match=r"m does not fit into .* cuda:0,1: .* offloaded to cpu and disk"):
        spread.used_devices(on(0, 1, "disk", "cpu"), "cuda:0,1", "m")
