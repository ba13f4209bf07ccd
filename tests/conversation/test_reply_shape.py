"""What is learned from a chat template about replies: control tokens, tags around reasoning, headers of messages."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from streamchat.base.thinking import Tags
from streamchat.conversation.encoding import ChatEncoder
from streamchat.conversation.template.format import choose_format
from streamchat.conversation.template.reply_shape import Messages, ReplyShape, _common, learn_shape
from tests.support import toy_tokenizer as toy

pytestmark = pytest.mark.smoke

START, END = "<|im_start|>", "<|im_end|>"
CONTROL = ("<channel>", "<message>", "<think>", "</think>")


def tokenizer_of(template: str | None, control: tuple[str, ...] = CONTROL) -> Any:
    tokenizer = toy.toy_tokenizer(template)
    tokenizer.add_tokens(list(control), special_tokens=True)
    return tokenizer


def shape_of(tokenizer: Any, system: str = "", wanted: str = "auto") -> ReplyShape:
    return learn_shape(tokenizer, ChatEncoder(tokenizer, choose_format(tokenizer, wanted, system)))


def learned(template: str, control: tuple[str, ...] = CONTROL) -> ReplyShape:
    return shape_of(tokenizer_of(template, control))


def ids(*names: str) -> frozenset[int]:
    return frozenset(tokenizer_of(None).convert_tokens_to_ids(list(names)))


def reasoned(opening: str, closing: str, key: str = "thinking") -> str:
    """The part of a template that writes reasoning between these."""
    return f"{{% if m.{key} %}}{opening}{{{{ m.{key} }}}}{closing}{{% endif %}}"


def chatml(opening: str, closing: str, prompt: str = "", key: str = "thinking") -> str:
    """ChatML that writes reasoning before the answer, and `prompt` at the end of a generation prompt."""
    before = reasoned(opening, closing, key)
    return (
        f"{{% for m in messages %}}<|im_start|>{{{{ m.role }}}}\n{before}{{{{ m.content }}}}<|im_end|>\n{{% endfor %}}"
        f"{{% if add_generation_prompt %}}<|im_start|>assistant\n{prompt}{{% endif %}}"
    )


@pytest.mark.parametrize(
    ("template", "close", "user", "role", "around", "prompt"),
    [
        (toy.CHATML, END, START, "user", (END, START), "<|im_end|>\n<|im_start|>assistant\n"),
        (toy.INSIDE, END, START, "[INST]", (END, START), " [/INST]"),
        (toy.LAST_SYSTEM, END, None, "", (END,), "[/INST]"),
        (toy.HEADINGS, END, None, "", (END,), "\n### Response:\n"),
        (toy.ROUNDS, None, None, "", (START,), "<|im_end|>"),
        (toy.LINES, None, None, "", (), "\n\nAssistant:"),
    ],
    ids=["ChatML", "inside", "text opens the message", "headings", "rounds", "lines"],
)
def test_control_tokens_around_a_reply(
    template: str, close: str | None, user: str | None, role: str, around: tuple[str, ...], prompt: str
) -> None:
    """The reply itself has none; its start belongs to the prompt."""
    one = {name: next(iter(ids(name))) for name in (START, END)}
    expected = ReplyShape(
        one.get(close or ""), one.get(user or ""), role, frozenset(), ids(*around), prompt, None, None
    )
    assert learned(template) == expected


def test_a_plain_format_teaches_nothing() -> None:
    nothing = ReplyShape(None, None, "", frozenset(), frozenset(), "", None, None)
    assert shape_of(tokenizer_of(None)) == nothing
    assert shape_of(tokenizer_of(toy.CHATML), wanted="plain") == nothing


def test_the_first_message_may_be_opened_differently() -> None:
    """Here the system prompt is in the first message, so its opening is fed with the system prompt."""
    shape = shape_of(tokenizer_of(toy.NO_SYSTEM), "Be brief.")
    assert (shape.close, shape.user, shape.user_role) == (*ids(END), *ids(START), "user")


def test_a_template_that_raises_from_now_on_has_no_prompt() -> None:
    tokenizer = tokenizer_of(toy.CHATML)
    encoder = ChatEncoder(tokenizer, choose_format(tokenizer, "auto", ""))
    tokenizer.chat_template = toy.RAISES
    shape = learn_shape(tokenizer, encoder)
    assert (shape.prompt, shape.user_role, shape.tags) == ("", "user", None)


# --- tags around reasoning --------------------------------------------------------------------------------------

THINK = Tags("<think>", "</think>")


@pytest.mark.parametrize("control", [CONTROL, ()], ids=["tokens", "text"])
@pytest.mark.parametrize(
    ("template", "tags"),
    [
        (chatml("<think>", "</think>"), THINK),
        (chatml("<think>\n", "\n</think>\n\n", key="reasoning_content"), THINK),
        (chatml("<think>", "</think>", key="reasoning"), THINK),
        (chatml("<a><think>", "</think>"), THINK),  # the last tag before the reasoning
        (chatml("[THINK]analysis\n", "[/THINK]"), Tags("[THINK]", "[/THINK]", "analysis")),
        (chatml("<think>", "</think>", prompt="<think>\n"), THINK),
        (chatml("", "</think>", prompt="<a> x <think>\n"), THINK),
        (chatml("", "</think>", prompt="<a> x"), None),  # the tag is closed, or it marks something else
        (chatml("<think>", ""), None),
        (chatml("<think>", " Then</think>"), None),
        (chatml("<think>", "<think>"), None),
        (chatml("Thoughts: ", "</think>"), None),  # the prompt opens the message with a tag
        (toy.INSIDE.replace("{% else %} ", "{% else %} " + reasoned("<|im_start|>think ", END)), None),  # a message
        (toy.LINES.replace("{{ m.content", reasoned("Thoughts: ", "</think>") + "{{ m.content"), None),
    ],
)
def test_tags_that_the_template_writes_around_reasoning(
    template: str, tags: Tags | None, control: tuple[str, ...]
) -> None:
    assert learned(template, control).tags == tags


def test_control_tokens_of_reasoning() -> None:
    written = learned(chatml("<think>", "</think>"))
    assert written.inside == ids("</think>")
    assert written.around == ids(START, END, "<think>", "</think>")
    opened = learned(chatml("<think>", "</think>", prompt="<think>"))
    assert opened.inside == ids("</think>")
    assert opened.around == ids(START, END, "</think>")


def test_a_start_token_that_the_tokenizer_adds_to_each_text_is_in_no_reply() -> None:
    tokenizer = tokenizer_of(chatml("<think>", "</think>"))
    (start,) = ids(START)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[(START, start)]
    )
    shape = shape_of(tokenizer)
    assert (shape.tags, shape.inside) == (THINK, ids("</think>"))


# --- replies of several messages --------------------------------------------------------------------------------

HEADERS = (
    "{% for m in messages %}<|im_start|>{{ m.role | upper }}{% if m.role == 'assistant' %}"
    "{% if m.thinking %}<channel>analysis<message>\n{{ m.thinking }}<|im_end|><|im_start|>ASSISTANT{% endif %}"
    " to=user<channel>final{% endif %}<message>\n{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>ASSISTANT{% endif %}"
)


@pytest.mark.parametrize(("channel", "answer"), [("<channel>", "final"), ("", "")])
def test_a_reply_whose_header_the_model_generates(channel: str, answer: str) -> None:
    shape = learned(HEADERS if channel else HEADERS.replace(" to=user<channel>final", ""))
    (start,), (message,), (end,) = ids(START), ids("<message>"), ids(END)
    named = next(iter(ids(channel))) if channel else None
    assert shape.messages == Messages(start, "ASSISTANT", message, end, named, answer)
    assert (shape.close, shape.user, shape.user_role) == (end, start, "USER")
    assert shape.inside == ids(*([channel] if channel else []), "<message>", START, END)
    assert shape.tags is None


@pytest.mark.parametrize(
    "template",
    [
        toy.CHATML.replace("\n{{ m['content'] }}", "<message>{{ m['content'] }}").replace(
            "assistant\n", "assistant<message>"
        ),
        toy.CHATML,
        toy.INSIDE,
        "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>user<message>{{ m.content }}<channel>"
        "{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}",
    ],
    ids=["the prompt ends the header", "no header", "no prompt", "no message of the model"],
)
def test_a_reply_without_a_header_of_its_own_is_one_message(template: str) -> None:
    assert learned(template).messages is None


# --- the part shared with the prompt ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "other", "length"),
    [
        ("", "", 0),
        ("a", "", 0),
        ("", "a", 0),
        ("abc", "abd", 2),
        ("abc", "ab", 2),
        ("ab", "abc", 2),
        ("xbc", "ybc", 0),
        ("a b c", "ab d", 3),
        ("ab d", "a b c", 2),
        ("a \n", "a", 1),
        (" a", "\nac", 2),
    ],
)
def test_a_common_prefix_without_regard_to_white_space(text: str, other: str, length: int) -> None:
    assert _common(text, other) == length
