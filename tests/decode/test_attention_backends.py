"""Which of PyTorch's attention kernels serve: none that keeps something per shape, where shapes are always new."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import DynamicCache

from streamchat.base.devices import ATTENTION_ON_GPUS
from streamchat.cache.arguments import cache_keyword
from streamchat.decode import install as decode_install
from streamchat.decode.install import install, install_captured, uninstall
from tests.support.decode_models import cache_of, make, stream
from tests.support.families import text
from tests.support.recorded_graphs import RecordedGraphs


def may_take_cudnn() -> bool:
    """Whether PyTorch may choose cuDNN for attention now."""
    return bool(torch.backends.cuda.cudnn_sdp_enabled())  # type: ignore[no-untyped-call]


@pytest.fixture
def cudnn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """Queries of each attention, and whether PyTorch might choose cuDNN for it."""
    seen: list[tuple[int, bool]] = []
    attention = functional.scaled_dot_product_attention

    def noted(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append((query.shape[-2], may_take_cudnn()))
        return attention(query, *args, **kwargs)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", noted)
    return seen


@pytest.mark.parametrize("prompt", [20, 128, 200])
def test_prompts_never_take_a_backend_that_keeps_a_plan_for_each_length(
    prompt: int, cudnn: list[tuple[int, bool]]
) -> None:
    model = make("llama")
    install_captured(model, RecordedGraphs().record)
    cache = cache_of(model, 256)
    cudnn.clear()  # measuring the positions has used caches of transformers
    stream(model, cache, text(prompt), prompt)
    plain = [enabled for queries, enabled in cudnn if queries == prompt]
    assert plain == [False] * 3
    assert may_take_cudnn()


def test_the_recorded_step_may_take_any_backend(cudnn: list[tuple[int, bool]]) -> None:
    model = make("llama, one head of keys")  # a token of the step is a row of four queries
    install_captured(model, RecordedGraphs().record)
    cache = cache_of(model, 64)
    cudnn.clear()
    stream(model, cache, text(50), 20)
    assert {enabled for queries, enabled in cudnn if queries == 4} == {True}
    assert {enabled for queries, enabled in cudnn if queries == 1} == {False}  # the plain forward, for the check


def test_a_model_without_a_step_is_limited_too(cudnn: list[tuple[int, bool]], monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama")
    monkeypatch.setattr(decode_install, "static_step", lambda _: None)
    assert not install_captured(model, RecordedGraphs().record)
    cache = cache_of(model, 64)
    cudnn.clear()
    stream(model, cache, text(50), 20)
    assert {enabled for _, enabled in cudnn} == {False}


def test_forwards_on_another_cache_are_those_of_transformers(cudnn: list[tuple[int, bool]]) -> None:
    model = make("llama")
    install_captured(model, RecordedGraphs().record)
    with torch.inference_mode():
        model(input_ids=text(20), use_cache=True, **{cache_keyword(model): DynamicCache(config=model.config)})
    assert {enabled for _, enabled in cudnn} == {True}


def test_the_limit_outlives_the_step_and_a_forward_that_fails(
    cudnn: list[tuple[int, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make("llama")
    install_captured(model, RecordedGraphs().record)
    uninstall(model)
    cache = cache_of(model, 64)
    cudnn.clear()
    stream(model, cache, text(20), 20)
    assert {enabled for _, enabled in cudnn} == {False}

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(model.model, "forward", fail)
    with pytest.raises(MemoryError):
        stream(model, cache, text(20), 20)
    assert may_take_cudnn()
    install_captured(model, RecordedGraphs().record)
    assert model.forward.__wrapped__ is model.forward.without_plans  # limited once


@pytest.mark.parametrize("spread", [False, True])
def test_every_model_on_cuda_is_limited_and_the_log_says_so(
    spread: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = make("llama")
    device = torch.device("cuda", 0)
    monkeypatch.setattr(decode_install, "input_device", lambda _: device)
    # parameters on the CPU: elsewhere than the device of the embeddings, unless they say otherwise
    if not spread:
        parameters = [type("Weights", (), {"device": device})()]
        monkeypatch.setattr(model, "parameters", lambda: parameters)
        monkeypatch.setattr(decode_install, "install_captured", lambda *_: True)
    with caplog.at_level(logging.INFO):
        assert install(model, None) is not spread
    assert hasattr(model.forward, "without_plans")
    assert f"attention: {ATTENTION_ON_GPUS}" in caplog.messages


def test_a_copy_of_a_model_is_limited_and_runs_its_own_forward(cudnn: list[tuple[int, bool]]) -> None:
    model = make("llama")
    install_captured(model, RecordedGraphs().record)
    uninstall(model)
    twin = copy.deepcopy(model)
    for weights in model.parameters():
        weights.zero_()
    cache = cache_of(twin, 64)
    cudnn.clear()
    assert stream(twin, cache, text(20), 20).std() > 0
    assert {enabled for _, enabled in cudnn} == {False}
