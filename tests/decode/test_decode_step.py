"""The short decode path gives the logits and the cache of the plain forward, and steps aside where it does not fit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache

from streamchat.cache.arguments import cache_keyword, parameter_names
from streamchat.cache.hook import StreamingHook
from streamchat.cache.press import StreamingPress
from streamchat.decode import install as short
from streamchat.decode.families.registry import model_spec
from streamchat.decode.install import install, tokens_at_once, uninstall
from streamchat.kernels.library import Kernels, load_kernels
from streamchat.models.load import load_model
from streamchat.quantization.linear import always_quantized
from streamchat.quantization.replace import groups, quantize_group, replace
from tests.support.decode_models import GROUPED, KNOWN, cache_of, counted, make, stream
from tests.support.families import build, text


@pytest.fixture(params=["auto", "torch"], autouse=True)
def kernels_(request: pytest.FixtureRequest) -> str:
    """With the compiled kernels, where there are some, and with PyTorch's."""
    return str(request.param)


@pytest.fixture
def compiled(kernels_: str) -> Kernels | None:
    return load_kernels(kernels_)


@pytest.mark.smoke
@pytest.mark.parametrize("name", KNOWN)
def test_logits_and_cache_are_those_of_the_plain_forward(
    compiled: Kernels | None, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(name)
    ids = text(150)
    expected_cache, cache = cache_of(model, 64), cache_of(model, 64)
    expected = stream(model, expected_cache, ids, 40)
    seen = counted(model, monkeypatch)
    assert install(model, compiled)
    found = stream(model, cache, ids, 40)
    assert seen == [40]  # all others took the short path
    assert cache.compression_count == expected_cache.compression_count > 50
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert cache.lengths == expected_cache.lengths == [64] * 3
    assert cache.ledger == expected_cache.ledger
    for ours, theirs in zip(cache.streaming_layers, expected_cache.streaming_layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, rtol=0, atol=1e-4)
        torch.testing.assert_close(ours.values, theirs.values, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("name", ["llama", "llama, biases", "qwen3", "gpt_neox"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_layers_that_are_multiplied_together_give_what_they_give_one_by_one(
    compiled: Kernels | None, name: str, kind: Any, dtype: torch.dtype
) -> None:
    model = make(name).to(dtype)
    replace(model, {group: quantize_group(model, group, its, compiled) for group, its in groups(model, kind).items()})
    ids = text(76)
    expected = stream(model, cache_of(model, 48), ids, 36).float()
    with always_quantized(model):
        served = stream(model, cache_of(model, 48), ids, 36).float()
    assert install(model, compiled)
    found = stream(model, cache_of(model, 48), ids, 36).float()
    if tokens_at_once(model) < 36:
        # the prompt is long enough for native weights: the same to the bit
        assert torch.equal(found[:36], expected[:36])
    else:
        expected = served
    error = (found - expected).square().mean().sqrt() / expected.std()
    assert error < (0.01 if dtype == torch.float32 else 0.05)
    native = stream(make(name).to(dtype), cache_of(model, 48), ids, 36).float()
    assert (native - expected)[36:].square().mean() > 0


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_compiled_kernels_leave_weights_packed_for_pytorch_alone(compiled: Kernels | None, kind: Any) -> None:
    model = make("llama")
    replace(model, {group: quantize_group(model, group, its, None) for group, its in groups(model, kind).items()})
    assert install(model, compiled)
    assert not short.is_compiled(model)


@pytest.mark.parametrize("family", ["gpt2", "falcon_h1", "falcon_alibi", "deepseek_v3", "nanochat"])
def test_families_that_are_not_known_keep_their_forward(compiled: Kernels | None, family: str) -> None:
    model = build(family)
    assert model_spec(model) is None
    assert not install(model, compiled)
    assert "forward" not in model.__dict__


def test_eager_attention_and_look_alikes_are_not_known() -> None:
    eager = make("llama")
    eager.set_attn_implementation("eager")
    assert model_spec(eager) is None

    class LlamaForCausalLM(transformers.LlamaForCausalLM):  # type: ignore[no-untyped-call]
        """Of the same name, elsewhere."""

    model = LlamaForCausalLM(transformers.LlamaConfig(**GROUPED))
    assert model_spec(model.train(False)) is None


@pytest.mark.parametrize(
    "change",
    [
        {"output_hidden_states": True},
        {"output_attentions": True},
        {"labels": torch.tensor([[3]])},
        {"use_cache": False},
        {"return_dict": False},
        {"input_ids": torch.tensor([[3], [4]])},
        {"input_ids": None, "inputs_embeds": torch.zeros(1, 1, 128)},
        {"position_ids": None},
        {"past_key_values": None},
        {"attention_mask": torch.ones(1, 1)},
    ],
)
def test_calls_of_another_kind_get_the_plain_forward(change: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama")
    cache = cache_of(model, 16)
    call = {"input_ids": torch.tensor([[3]]), "position_ids": torch.tensor([[0]]), "use_cache": True}
    call |= {"past_key_values": cache, "logits_to_keep": 1, "attention_mask": None}
    with torch.inference_mode():
        assert short._supported_cache((), call) is cache
        assert short._supported_cache((), call | change) is None
        assert short._supported_cache((torch.tensor([[3]]),), call) is None
        assert short._supported_cache((), call | {"past_key_values": DynamicCache(config=model.config)}) is None
    assert short._supported_cache((), call) is None  # with gradients


def test_signature_hooks_and_generate_are_as_before(compiled: Kernels | None) -> None:
    model = make("llama")
    names = parameter_names(model)
    ids = text(20)

    def written() -> Tensor:
        with StreamingPress(model, num_sink_tokens=2, cache_size=24) as press:
            out = model.generate(ids, max_new_tokens=40, do_sample=False, pad_token_id=0)
            assert set(press.lengths) == {24}
            assert press.compression_count > 20
        return torch.as_tensor(out)

    before = written()
    install(model, compiled)
    assert parameter_names(model) == names
    assert torch.equal(written(), before)
    uninstall(model)
    assert "forward" not in model.__dict__


def test_a_step_that_fails_half_way_leaves_nothing_behind(
    compiled: Kernels | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make("llama")
    install(model, compiled)
    ids = text(30)
    cache, twin = cache_of(model, 16), cache_of(model, 16)
    expected = stream(model, twin, ids, 10)
    name = cache_keyword(model)
    stream(model, cache, ids[:, :20], 10)
    broken: Any = cache.layers[2]
    reserve_slots = broken.reserve_slots

    def fail(*args: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(broken, "reserve_slots", fail)
    with torch.inference_mode(), StreamingHook(model, cache), pytest.raises(MemoryError):
        model(input_ids=ids[:, 20:21], use_cache=True, **{name: cache})
    assert cache.lengths == [16, 16, 15]
    monkeypatch.setattr(broken, "reserve_slots", reserve_slots)
    assert cache.length == 15
    found = stream(model, cache, ids[:, 20:], 1)
    torch.testing.assert_close(found, expected[20:], rtol=0, atol=1e-4)


def test_a_copy_of_the_cache_goes_on_alone(compiled: Kernels | None) -> None:
    model = make("llama")
    install(model, compiled)
    cache = cache_of(model, 32)
    ids = text(40)
    stream(model, cache, ids[:, :20], 10)
    twin = copy.deepcopy(cache)
    torch.testing.assert_close(stream(model, twin, ids[:, 20:], 1), stream(model, cache, ids[:, 20:], 1))


@pytest.mark.parametrize(("dtype", "weights", "limit"), [("float32", "native", 1e-3), ("bfloat16", "int8", 0.05)])
def test_the_default_model_predicts_the_same_on_both_paths(
    default_model_home: None, kernels_: str, dtype: str, weights: str, limit: float
) -> None:
    loaded = load_model("default", device="cpu", dtype=dtype, weights=weights, kernels=kernels_)
    model = loaded.model
    ids = loaded.tokenizer("The river ran past the mill, and the wheel " * 8, return_tensors="pt")["input_ids"]
    # the prompt is long enough to be read in the same way on both
    found = stream(model, cache_of(model, 48), ids, 40).float()
    uninstall(model)
    expected = stream(model, cache_of(model, 48), ids, 40).float()
    error = (found - expected).square().mean().sqrt() / expected.std()
    assert error < limit
    assert (found.argmax(-1) == expected.argmax(-1)).float().mean() > 0.95


def test_a_deep_copy_of_a_model_decodes_with_its_own_weights(compiled: Kernels | None) -> None:
    model, ids = make("llama"), text(14)
    expected = stream(model, cache_of(model, 24), ids, 10)
    install(model, compiled)
    copied = copy.deepcopy(model)
    copied.get_output_embeddings().weight.zero_()
    assert stream(copied, cache_of(copied, 24), ids, 10).count_nonzero() == 0
    torch.testing.assert_close(stream(model, cache_of(model, 24), ids, 10), expected, rtol=0, atol=1e-4)
    assert tokens_at_once(model) > 0
    assert tokens_at_once(copied) == 0
    assert install(copied, compiled)
    assert stream(copied, cache_of(copied, 24), ids, 10).count_nonzero() == 0
