"""A press on a wrapped model streams the model inside, whoever calls it; a press that streamed nothing says so."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import Tensor, nn

from streamchat import StreamingHook, StreamingPress
from streamchat.base.errors import CacheError, CacheNotSeenError, UnsupportedModelError
from streamchat.cache.positions.strategy import choose_fit
from streamchat.cache.wrappers import causal_lm
from tests.support.reference import Reference
from tests.support.tiny import random_ids, ready, tiny_model

# peft asks a model for an attribute that transformers is about to drop
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
TOLERANCE = 2e-5
PROMPT, NEW = 20, 24
BUDGET, SINKS = 32, 4


class Direct(nn.Module):
    """A wrapper that calls `forward` of what it holds, not the model itself."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inside = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inside.forward(*args, **kwargs)


class Untouched(ModelHook):  # type: ignore[misc]  # accelerate has no types
    """A hook of accelerate that changes nothing, yet replaces the model's forward."""


def lora(model: Any) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, lora_dropout=0.1)
    torch.manual_seed(1)
    return peft.get_peft_model(model, config).eval()


def compiled(model: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="eager", dynamic=True)


def compiled_and_used(model: Any) -> Any:
    wrapper = compiled(model)
    with torch.no_grad():
        for count in (3, 4):
            wrapper(input_ids=random_ids(count))
    return wrapper


def compiled_in_place(model: Any) -> Any:
    torch._dynamo.reset()
    model.compile(backend="eager", dynamic=True)
    return model


def hooked(model: Any) -> Any:
    return add_hook_to_module(model, Untouched())


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "lora": lora,
    "compiled": compiled,
    "compiled and used": compiled_and_used,
    "compiled in place": compiled_in_place,
    "data parallel": nn.DataParallel,
    "accelerate hook": hooked,
    "accelerate dispatch": lambda model: dispatch_model(model, {"": "cpu"}, force_hooks=True),
    "direct": Direct,
    "lora, compiled": lambda model: compiled(lora(model)),
    "data parallel, lora, accelerate hook": lambda model: nn.DataParallel(lora(hooked(model))),
}
CALLS = ["wrapper.generate", "base.generate", "wrapper", "base", "base.forward"]
COMPILED = {
    "compiled": CALLS[:-1],
    "compiled and used": ["wrapper"],
    "compiled in place": ["wrapper.generate", "wrapper"],
    "lora, compiled": ["wrapper.generate"],
}
"""Tracing takes seconds each time, so of these only what differs, fewer layers, and fewer traces."""
MAX_TRACES = 2
"""Of a function; then it runs as it is. PyTorch's limit is 8."""
LAYERS = {name: {"num_hidden_layers": 2 if name == "compiled" else 1} for name in COMPILED}
CASES = [(name, how) for name in WRAPPERS for how in COMPILED.get(name, CALLS)]


def merged(model: Any, **sizes: Any) -> Any:
    """A plain copy of `model` (perhaps with LoRA inside) for the reference."""
    plain = copy.deepcopy(model)
    for module in list(plain.modules()):
        if hasattr(module, "lora_A"):
            module.merge()
    state = {name.replace(".base_layer", ""): w for name, w in plain.state_dict().items() if "lora_" not in name}
    fresh = tiny_model("llama", **sizes)
    fresh.load_state_dict(state)
    return fresh


def run(wrapper: Any, base: Any, press: StreamingPress, how: str) -> tuple[Tensor, Tensor]:
    """Ids, and logits at each new token, (1, n) and (n, vocabulary)."""
    ids = random_ids(PROMPT)
    who = wrapper if how.startswith("wrapper") else base
    with press, torch.no_grad():
        if how.endswith("generate"):
            out = who.generate(
                input_ids=ids,
                max_new_tokens=NEW,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
            return out.sequences, torch.cat(out.logits)
        call = who.forward if how.endswith("forward") else who
        logits = [call(input_ids=ids).logits[0, -1:]]
        while ids.shape[1] < PROMPT + NEW:
            ids = torch.cat([ids, logits[-1].argmax(-1)[None]], dim=1)
            if len(logits) < NEW:
                logits.append(call(input_ids=ids[:, -1:], past_key_values=press.cache).logits[0])
        return ids, torch.cat(logits)


@pytest.fixture
def few_traces() -> Iterator[None]:
    """Compiled models are traced at most `MAX_TRACES` times; PyTorch reads the limit when it compiles one."""
    with torch._dynamo.config.patch(recompile_limit=MAX_TRACES):
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("few_traces")
@pytest.mark.parametrize(("name", "how"), CASES)
@pytest.mark.filterwarnings("ignore:.*past_key_values:FutureWarning")
def test_a_wrapped_model_streams_exactly_however_it_is_called(name: str, how: str) -> None:
    sizes: Any = LAYERS.get(name, {})
    base = ready(tiny_model("llama", **sizes))
    wrapper = WRAPPERS[name](base)
    if how == "wrapper.generate" and not hasattr(wrapper, "generate"):
        pytest.skip("the wrapper has no generate")
    reference = Reference(merged(base, **sizes), BUDGET, SINKS)
    press = StreamingPress(wrapper, cache_size=BUDGET, num_sink_tokens=SINKS)
    ids, logits = run(wrapper, base, press, how)
    assert press.lengths == [BUDGET] * base.config.num_hidden_layers
    assert press.tokens_evicted == press.compression_count == PROMPT + NEW - 1 - BUDGET
    expected = [reference.feed(ids[0, :PROMPT])[-1:]]
    expected += [reference.feed(ids[0, i : i + 1]) for i in range(PROMPT, PROMPT + NEW - 1)]
    assert (logits.double() - torch.cat(expected)).abs().max() < TOLERANCE
    if "lora" in name:  # the adapter is not bypassed
        plain = Reference(tiny_model("llama", **sizes), BUDGET, SINKS).feed(ids[0, :PROMPT])[-1]
        assert (logits[0].double() - plain).abs().max() > 0.1


@pytest.mark.parametrize("name", ["direct", "accelerate hook", "accelerate dispatch", "data parallel", "lora"])
def test_nothing_is_left_on_a_wrapped_model(name: str) -> None:
    base = ready(tiny_model("llama"))
    wrapper = WRAPPERS[name](base)
    before = {key: base.__dict__.get(key) for key in ("forward", "generate", "prepare_inputs_for_generation")}
    hooks = len(base._forward_pre_hooks), len(base._forward_hooks)
    run(wrapper, base, StreamingPress(wrapper, cache_size=BUDGET, num_sink_tokens=SINKS), "base.generate")
    assert {key: base.__dict__.get(key) for key in before} == before
    assert (len(base._forward_pre_hooks), len(base._forward_hooks)) == hooks


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_adapters_that_add_to_the_text_are_refused(kind: str, nested: bool) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        tiny_model("llama"), getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=4)
    ).eval()
    with pytest.raises(UnsupportedModelError, match=r"the adapter 'default' .* puts trained tokens before the text"):
        StreamingPress(nn.DataParallel(model) if nested else model, cache_size=BUDGET)


def test_copies_of_a_model_on_several_devices_are_refused() -> None:
    wrapper = nn.DataParallel(tiny_model("llama"))
    wrapper.device_ids = [0, 1]
    with pytest.raises(UnsupportedModelError, match=r"splits a batch over 2 copies .* give the model inside it"):
        StreamingPress(wrapper, cache_size=BUDGET)


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (nn.Linear(2, 2), "Linear contains no transformers causal LM"),
        (nn.ModuleList([tiny_model("llama"), tiny_model("gpt2")]), "ModuleList contains 2 transformers models"),
        ("llama", "str is not a model"),
    ],
)
def test_what_holds_not_one_causal_lm_is_refused(model: Any, sentence: str) -> None:
    with pytest.raises(UnsupportedModelError, match=sentence):
        StreamingPress(model, cache_size=BUDGET)


def test_training_mode_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM is in training mode; call eval\(\)"):
        StreamingPress(tiny_model("llama").train(), cache_size=BUDGET)
    peft = pytest.importorskip("peft")
    model = tiny_model("llama")
    config = peft.LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.1)
    with pytest.raises(UnsupportedModelError, match=r"training mode \(dropout in model\.layers\.0.*call eval"):
        StreamingPress(peft.get_peft_model(model, config), cache_size=BUDGET)


def test_a_hook_on_a_wrapper_is_on_the_model_inside() -> None:
    base = tiny_model("llama")
    press = StreamingPress(base, cache_size=BUDGET)
    with StreamingHook(nn.DataParallel(base), press.cache) as hook:
        assert hook.model is base
        assert len(base._forward_pre_hooks) == 1
    assert causal_lm(Direct(nn.DataParallel(base))) is base


def test_a_block_that_streamed_nothing_raises_when_it_ends() -> None:
    base = ready(tiny_model("llama"))
    other = copy.deepcopy(base)
    press = StreamingPress(base, cache_size=BUDGET)
    with pytest.raises(CacheNotSeenError, match=r"no forward of the LlamaForCausalLM .* nothing was streamed"), press:
        other.generate(random_ids(PROMPT), max_new_tokens=NEW)
    assert not base._forward_pre_hooks
    with pytest.raises(RuntimeError, match="boom"), press:  # an error on its way is not covered up
        raise RuntimeError("boom")
    with press:
        base.generate(random_ids(PROMPT), max_new_tokens=NEW)
    with pytest.raises(CacheNotSeenError, match="nothing was streamed"), press:  # each block counts for itself
        pass


def test_a_second_press_in_the_block_of_the_first_says_so() -> None:
    base = ready(tiny_model("llama"))
    fit = choose_fit(base)
    first, second = (StreamingPress(base, cache_size=BUDGET, fit=fit) for _ in range(2))
    with first:
        with pytest.raises(CacheError, match="already streams into another cache; exit that StreamingPress"), second:
            pass
        base.generate(random_ids(PROMPT), max_new_tokens=NEW)
    assert first.lengths == [BUDGET] * 3
    with second:
        base.generate(random_ids(PROMPT), max_new_tokens=NEW)
    assert second.lengths == [BUDGET] * 3
