"""`python -m tools.templates`: every template equal, or said, or a failure."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from streamchat.conversation.template import format as template_module
from tests.support import toy_tokenizer as toy
from tools import templates
from tools.template_tokenizers import KINDS


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of templates of every kind."""
    for name in ("CHATML", "INSIDE", "LAST_SYSTEM", "CHANNELS", "OPEN_REASONING", "CLOCK", "ROUNDS", "RAISES"):
        (tmp_path / f"{name}.jinja").write_text(getattr(toy, name))
    (tmp_path / "cz_chatml.jinja").write_text(toy.CHATML.replace("{% endfor %}", "\n    {% endfor %}\n"))
    return tmp_path


def words(out: str, name: str) -> list[str]:
    """The verdicts on a template, without and with a system prompt."""
    return [line.split("'")[2].split()[0] for line in out.splitlines() if line.startswith(f"{name} ")]


def test_each_template_gets_its_verdict(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert templates.main([str(folder), "--tokenizer", "metaspace"]) == 0
    out = capsys.readouterr().out
    for name in ("CHATML", "cz_chatml", "INSIDE", "CHANNELS", "OPEN_REASONING"):
        assert words(out, name) == ["equal"] * 3, out
    assert words(out, "LAST_SYSTEM") == ["equal", "told", "told"]
    assert words(out, "CLOCK") == words(out, "ROUNDS") == ["told"] * 3
    assert words(out, "RAISES") == ["plain"] * 3
    assert out.splitlines()[-1] == "16 equal, 3 plain, 8 told"


# as Vicuna: a text, not a token, opens messages, and a space is before it
SPACED = (
    "{% if messages[0].role == 'system' %}{% set lead = messages[0].content %}{% set messages = messages[1:] %}"
    "{% else %}{% set lead = 'A chat.' %}{% endif %}{{ lead }} {% for m in messages %}"
    "{% if m.role == 'user' %}USER: {{ m.content | trim }} {% else %}ASSISTANT: {{ m.content | trim }}{{ eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt", templates.SYSTEMS)
def test_a_space_before_the_first_message_belongs_to_it(kind: str, prompt: str) -> None:
    assert templates.check(SPACED, kind, prompt) == templates.Verdict("equal")


@pytest.mark.parametrize(
    "change",
    [
        {"user_open": "<|im_start|>human\n"},
        {"reply_open": "<|im_end|>\n<|im_start|>assistant\n "},
        {"user_open": "q0123456789abq<|im_start|>user\n"},
        {"notes": (), "fallbacks": ("clock",)},
    ],
    ids=["opening", "given", "mark", "unsaid"],
)
def test_what_differs_ends_with_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], change: dict[str, Any]
) -> None:
    (tmp_path / "chatml.jinja").write_text(toy.CHATML)
    monkeypatch.setattr(template_module.ChatFormat, "__post_init__", lambda _: None)
    monkeypatch.setattr(
        templates, "choose_format", lambda *args: replace(template_module.choose_format(*args), **change)
    )
    assert templates.main([str(tmp_path), "--tokenizer", "byte-level"]) == 1
    assert words(capsys.readouterr().out, "chatml") == ["DIFFERS"] * 3


def test_a_folder_without_templates_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert templates.main([str(tmp_path)]) == 2
    assert "has no *.jinja files" in capsys.readouterr().err
