"""A conversation is made from settings and a model: what is said about both, and its format with other arguments."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from streamchat.base import events as ev
from streamchat.base.errors import ConfigError
from streamchat.config.loader import Configuration
from streamchat.config.settings import Settings
from streamchat.conversation.assemble import (
    StartedConversation,
    assemble,
    format_from_settings,
    format_with_arguments,
    load_from_settings,
)
from streamchat.decode.steps import StepReport
from streamchat.models.load import LoadedModel
from tests.support import toy_tokenizer as toy
from tests.support.real_engine import tiny_loaded

READS = toy.CHATML.replace("<|im_end|>", "{{ mode }}{% if enable_thinking %}!{% endif %}<|im_end|>")


def started(loaded: LoadedModel | None = None, origins: dict[str, str] | None = None, **settings: Any) -> Any:
    """What is made from these settings, and the steps that it reports."""
    steps = list[Any]()
    given = Settings(**({"cache_size": 128} | settings))
    made = assemble(
        Configuration(given, origins or {}), loaded or tiny_loaded(), lambda _: None, lambda *a: steps.append(a)
    )
    assert steps == [("Checking positions",)]
    return made


def test_the_model_of_the_settings_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, asked, progress = tiny_loaded(), list[Any](), lambda *_: None

    def load(*given: Any) -> LoadedModel:
        asked.append(given)
        return loaded

    monkeypatch.setattr("streamchat.models.load.load_from_settings", load)
    settings = Settings(cache_size=128)
    assert load_from_settings(Configuration(settings, {}), progress) is loaded
    assert asked == [(settings, progress)]


def test_what_is_said_about_a_model() -> None:
    loaded = replace(
        tiny_loaded(READS, notes=("A note.",)),
        weights="int8",
        quantized_bytes=1000,
        cache_dtype="int4",
        step=StepReport("compiled kernels", "because"),
    )
    made: StartedConversation = started(loaded, model="qwen3-0.6b", num_sink_tokens=3)
    weights = list(loaded.model.parameters())
    system = len(loaded.tokenizer("<|im_start|>system\nBe kind.<|im_end|>\n", add_special_tokens=False)["input_ids"])
    assert made.info == ev.ModelInfo(
        name="tiny",
        source="tests",
        device="cpu",
        dtype="float32",
        parameters=sum(weight.numel() for weight in weights),
        weight_bytes=4 * sum(weight.numel() for weight in weights) + 1000,
        context_length=loaded.model.config.max_position_embeddings,
        cache_size=128,
        num_sink_tokens=3,
        pinned_tokens=system - 3,
        attention="sdpa",
        chat_format="template",
        template_prompt="<|im_start|>system\nBe kind.<|im_end|>",
        weights="int8",
        cache_dtype="int4",
        decode_step="compiled kernels",
        decode_reason="because",
        template_reads=("enable_thinking", "mode"),
        template_defaults='{"enable_thinking": false}',
        thinks=False,
    )
    assert made.notes == ("A note.", *made.conversation.encoder.format.notes)
    assert made.conversation.cache.cache_size == 128
    assert made.conversation.settings.model == "qwen3-0.6b"
    assert made.conversation.log.ids.tolist() == made.conversation.encoder.system_block()


def test_what_is_unknown_about_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamchat.cache.context.context_length", lambda config: None)
    info = started(tiny_loaded(toy.SWITCHED)).info
    assert (info.decode_step, info.decode_reason, info.context_length, info.template_defaults) == ("", "", 0, "{}")
    assert info.thinks  # if nothing is said about it


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        (toy.CHATML, "<|im_start|>system\nBe kind.<|im_end|>"),
        ("<|im_start|>" + toy.NO_SYSTEM.replace("<|im_start|>", ""), ""),  # only a start token
        (toy.NO_SYSTEM, ""),
    ],
    ids=["a default", "a start token", "none"],
)
def test_the_system_prompt_of_a_template_that_is_not_used(template: str | None, prompt: str) -> None:
    assert started(tiny_loaded(template), system_prompt="Be brief.").info.template_prompt == prompt


def test_notes_about_a_smaller_budget_and_about_positions() -> None:
    loaded = tiny_loaded(family="gpt2")
    context = loaded.model.config.max_position_embeddings
    made = started(loaded, cache_size=10 * context)
    assert made.info.cache_size == made.info.context_length == context
    lowered, moved = made.notes
    assert lowered == f"cache_size was lowered from {10 * context} to {context} tokens, this model's context length."
    assert moved.startswith("This model's positions cannot be moved")


# --- the format with other arguments -----------------------------------------------------------------------------


def test_the_format_of_later_turns_has_the_new_arguments_and_the_old_time() -> None:
    tokenizer, settings = toy.toy_tokenizer(READS), Settings(model="qwen3-0.6b", system_prompt="Be brief.")
    before = format_from_settings(tokenizer, settings)
    made = format_with_arguments(tokenizer, replace(settings, template_args='{"mode": "(deep)"}'), before)
    assert made.moment == before.moment
    assert made.arguments == {"enable_thinking": False, "mode": "(deep)"}
    assert made.assistant_close == "(deep)<|im_end|>\n"
    assert made.system_block == "<|im_start|>system\nBe brief.(deep)<|im_end|>\n"


def test_a_conversation_without_the_template_stays_without_it() -> None:
    tokenizer, settings = toy.toy_tokenizer(READS), Settings(chat_format="plain")
    before = format_from_settings(tokenizer, settings)
    made = format_with_arguments(tokenizer, replace(settings, chat_format="auto", template_args='{"a": 1}'), before)
    assert (made.name, made.parts) == ("plain", before.parts)
    assert made.notes == ("Without a chat template, arguments have no effect: a=1.",)


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ('{"mode": "bad"}', 'mode="bad"'),
        ("{}", "no arguments"),
        (f'{{"mode": "{"b" * 73}"}}', f'mode="{"b" * 73}"'),  # 80 characters
        (f'{{"mode": "{"b" * 74}"}}', f'mode="{"b" * 73}…'),
    ],
)
def test_arguments_that_the_template_refuses(arguments: str, shown: str) -> None:
    template = "{% if mode is undefined or mode[0] == 'b' %}{{ raise_exception('no mode') }}{% endif %}" + toy.CHATML
    tokenizer = toy.toy_tokenizer(template)
    before = format_from_settings(tokenizer, Settings(template_args='{"mode": "good"}'))
    assert before.name == "template"
    with pytest.raises(ConfigError) as raised:
        format_with_arguments(tokenizer, Settings(template_args=arguments), before)
    assert str(raised.value).startswith(f"the model's chat template cannot be used with {shown}: it raises: no mode;")
