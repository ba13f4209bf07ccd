"""Templates that write the reasoning of a reply differently once another message follows."""

from __future__ import annotations

import pytest

from streamchat.conversation.template.format import choose_format
from tests.support import toy_tokenizer as toy

pytestmark = pytest.mark.smoke

PLAIN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
KEYS = ("reasoning_content", "thinking", "reasoning")
NEWEST = "{{% if m.{0} and {1} %}}<think>{{{{ m.{0} }}}}</think>{{% endif %}}"


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize(
    ("condition", "kept"), [("loop.last", True), ("true", False), ("not loop.last", False), ("false", False)]
)
def test_a_template_that_drops_the_reasoning_of_earlier_replies(key: str, condition: str, kept: bool) -> None:
    template = PLAIN.replace("{{ m.content }}", NEWEST.format(key, condition) + "{{ m.content }}") + PROMPT
    made = choose_format(toy.toy_tokenizer(template), "template", "")
    assert made.fallbacks == (("replies-kept",) if kept else ())


def test_a_template_that_raises_for_one_kind_of_reasoning_may_drop_another() -> None:
    refused = (  # transformers fills in the other names
        "{% for m in messages %}{% if m.thinking and not m.reasoning %}{{ raise_exception('no') }}{% endif %}"
        "{% endfor %}"
    )
    kept = NEWEST.format("reasoning", "loop.last") + "{{ m.content }}"
    template = refused + PLAIN.replace("{{ m.content }}", kept) + PROMPT
    assert choose_format(toy.toy_tokenizer(template), "template", "").fallbacks == ("replies-kept",)


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        ("{{ m.content }}", False),
        ("{{ m.content.split('</think>')[-1] }}", True),
        ("{{ m.content.split('</think>')[-1] if m.content.startswith('<think>') else m.content }}", True),
        ("{{ m.content | replace('<think>', '<thought>') }}", False),  # it writes the reasoning otherwise
    ],
)
def test_a_template_that_drops_the_reasoning_inside_a_reply(written: str, kept: bool) -> None:
    template = PLAIN.replace("{{ m.content }}", written) + PROMPT
    made = choose_format(toy.toy_tokenizer(template), "template", "")
    assert made.fallbacks == (("replies-kept",) if kept else ())
