"""What ends a reply: the model's own list, guesses from the template, and messages inside one reply."""

from __future__ import annotations

from typing import Any

import pytest

from streamchat.base import events as ev
from streamchat.base.thinking import split
from tests.support.scripted_model import Chat, make_chat
from tests.support.toy_tokenizer import CHATML, NO_SYSTEM

pytestmark = pytest.mark.smoke

MARKS = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>")
# as gpt-oss: the model writes the headers of its messages; only the newest reply keeps its reasoning
CHANNELS = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{% if loop.last and not add_generation_prompt and m['thinking'] %}"
    "<|start|>assistant<|channel|>analysis<|message|>{{ m['thinking'] }}<|end|>{% endif %}"
    "<|start|>assistant<|channel|>final<|message|>{{ m['content'] }}"
    "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}"
    "{% else %}<|start|>{{ m['role'] }}<|message|>{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
# the same without a place for reasoning, and with one closing token for all messages
FINAL_ONLY = (
    "{% for m in messages %}<|start|>{{ m['role'] }}"
    "{% if m['role'] == 'assistant' %}<|channel|>final{% endif %}<|message|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
# reasoning is a message of a role of its own, in the same marks as all others
ROLES = (
    "{% for m in messages %}{% if m['reasoning_content'] %}"
    "<|im_start|>thinker\n{{ m['reasoning_content'] }}<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)
ANALYSIS = "<|channel|>analysis<|message|>They greet me.<|end|>"
FINAL = "<|start|>assistant<|channel|>final<|message|>Good day."


def channels(template: str = CHANNELS, **more: Any) -> Chat:
    """A chat on a model that writes channels."""
    return make_chat(template=template, control=MARKS, **({"eos": "<|return|>"} | more))


def ids(chat: Chat, text: str) -> list[int]:
    """Token ids of `text`, control tokens included."""
    found: list[int] = chat.tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


def said(chat: Chat) -> str:
    """All that was fed, as text."""
    return str(chat.tokenizer.decode(chat.conversation.log.ids))


@pytest.mark.parametrize("template", [CHANNELS, FINAL_ONLY])
@pytest.mark.parametrize("eos", ["<|return|>", ("<|return|>", "<|end|>", "<|call|>")])
def test_a_reply_of_several_messages_goes_on_to_its_answer(template: str, eos: str | tuple[str, ...]) -> None:
    chat = channels(template, eos=eos)
    outcome = chat.say("Hello", ids(chat, f"{ANALYSIS}{FINAL}<|return|>"))
    assert not chat.script  # all of it was sampled
    assert (outcome.reply, outcome.finish_reason) == ("<think>\nThey greet me.\n</think>\n\nGood day.", "stop")
    chat.say("More", ids(chat, "<|channel|>final<|message|>Yes.<|return|>"))
    begin = said(chat).index("<|start|>user<|message|>Hello")
    assert said(chat)[begin:].removesuffix("<|end|>") == (
        f"<|start|>user<|message|>Hello<|end|><|start|>assistant{ANALYSIS}{FINAL}<|end|>"
        "<|start|>user<|message|>More<|end|><|start|>assistant<|channel|>final<|message|>Yes."
    )
    chat.check()


@pytest.mark.parametrize("template", [CHANNELS, FINAL_ONLY])
@pytest.mark.parametrize("role", ["user", "developer", "tool to=assistant"])
def test_a_message_of_somebody_else_ends_the_reply_before_it(template: str, role: str) -> None:
    chat = channels(template)
    outcome = chat.say("Hello", ids(chat, f"{ANALYSIS}{FINAL}<|end|><|start|>{role}<|message|>And you?<|return|>"))
    assert chat.script  # it did not go on
    assert (outcome.reply, outcome.finish_reason) == ("<think>\nThey greet me.\n</think>\n\nGood day.", "stop")
    assert said(chat).removesuffix("<|end|>").endswith(FINAL)
    chat.check()


@pytest.mark.parametrize("family", ["llama", "falcon_h1"])
def test_the_reply_is_cut_back_where_the_cache_cannot_be(family: str) -> None:
    chat = channels(family=family)
    chat.say("Hello", ids(chat, f"{ANALYSIS}{FINAL}<|end|><|start|>user"))
    assert said(chat).removesuffix("<|end|>").endswith(FINAL)
    assert len(chat.conversation.log) == chat.conversation.cache.ledger.next_index
    before = said(chat)
    chat.say("More", ids(chat, f"{ANALYSIS}{FINAL}<|return|>"))
    chat.conversation.undo()
    assert said(chat) == before


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        (ANALYSIS + FINAL, ("They greet me.", "Good day.")),
        ("<|channel|>final<|message|>Good day.", ("", "Good day.")),
        (f"{ANALYSIS}<|start|>assistant<|channel|>analysis<|message|>Be short.<|end|>{FINAL}",
         ("They greet me.\n\nBe short.", "Good day.")),
        (f"{ANALYSIS}<|start|>assistant<|channel|>commentary to=functions.look<|message|>{{}}<|end|>{FINAL}",
         ("They greet me.\n\n{}", "Good day.")),
        ("<|channel|>analysis<|message|>Close </think> or not? <think>Well.<|end|>" + FINAL,
         ("Close <\N{WORD JOINER}/think> or not? <think>Well.", "Good day.")),
        (f"{ANALYSIS}<|start|>assistant Good day.", ("They greet me.", "Good day.")),
        (f"{ANALYSIS}Good day.", ("They greet me.", "Good day.")),
        ("Good day.", ("", "Good day.")),
        (ANALYSIS, ("They greet me.", "")),
        ("<|channel|>analysis<|message|>They gre", ("They gre", "")),
        ("<|channel|>anal", ("", "")),
        (f"{ANALYSIS}<|start|>assist", ("They greet me.", "")),
        (f"{ANALYSIS}{FINAL}<|end|><|start|>assistant<|channel|>analysis<|message|>Done.",
         ("They greet me.", "Good day.")),
        ("<|channel|>final<|message|>A <|message> sign, <|end|", ("", "A <|message> sign, <|end|")),
    ],
)  # fmt: skip
def test_channels_are_split_however_the_reply_ends(written: str, shown: tuple[str, str]) -> None:
    chat = channels()
    script = ids(chat, written)
    outcome = chat.say("Hello", [*script, *ids(chat, "<|return|>")])
    assert split(outcome.reply) == shown
    assert "".join(event.text for event in chat.of(ev.TextDelta)) == outcome.reply
    turn = chat.conversation.log.turns[-1]
    fed = list(chat.conversation.log.ids[turn.reply_start : turn.end])
    opening = chat.conversation.encoder.reply_opening()
    assert fed[: len(opening)] == opening
    assert split(chat.conversation.text_of(fed[len(opening) :])) == shown
    chat.check()


def test_stopped_and_cut_off_reasoning_is_no_answer() -> None:
    chat = channels(max_new_tokens=12)
    script = ids(chat, ANALYSIS + FINAL)
    outcome = chat.say("Hello", script)
    assert outcome.finish_reason == "length"
    thoughts, answer = split(outcome.reply)
    assert thoughts
    assert "They greet me.".startswith(thoughts)
    assert answer == ""

    seen = len(chat.of(ev.TextDelta))
    outcome = chat.say("Again", script, cancelled=lambda: len(chat.of(ev.TextDelta)) > seen + 1)
    assert outcome.finish_reason == "cancelled"
    assert not outcome.rolled_back
    assert split(outcome.reply)[1] == ""
    chat.check()


def test_the_user_s_mark_ends_a_reply_whose_reasoning_has_a_role() -> None:
    chat = make_chat(template=ROLES, eos="<|endoftext|>")
    text = "thinker\nWell.<|im_end|>\n<|im_start|>assistant\nGood day."
    outcome = chat.say("Hello", ids(chat, f"{text}<|im_end|>\n<|im_start|>user\nAnd you?"))
    assert chat.script
    assert outcome.finish_reason == "stop"
    assert "Good day." in outcome.reply
    assert "user" not in outcome.reply
    assert said(chat).endswith(f"<|im_start|>{text}<|im_end|>\n")


@pytest.mark.parametrize("template", [CHATML, NO_SYSTEM])
@pytest.mark.parametrize("end", ["<|im_end|>", "<|im_start|>", "<|endoftext|>"])
def test_in_a_reply_of_one_message_the_marks_of_messages_end_it(template: str, end: str) -> None:
    """A model that does not list its closing token, or skips it, does not write the user's part."""
    chat = make_chat(template=template, eos="<|endoftext|>")
    outcome = chat.say("Hello", ids(chat, f"Good day.{end}user\nAnd you?"))
    assert (outcome.reply, outcome.finish_reason) == ("Good day.", "stop")
    assert said(chat).endswith("Good day.<|im_end|>\n")


def test_every_listed_end_token_ends_a_reply() -> None:
    for end in ("<|return|>", "<|call|>"):
        chat = channels(eos=("<|return|>", "<|call|>"))
        assert chat.say("Hello", ids(chat, f"{FINAL[len('<|start|>assistant') :]}{end}more")).reply == "Good day."


def test_a_template_that_writes_the_newest_message_otherwise_hides_no_end() -> None:
    """What stands in a past message and not in the newest one is no part of the reply."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
        "{% if loop.last and m['role'] == 'user' %} (newest){% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    chat = make_chat(template=template, eos=("<|endoftext|>", "<|im_end|>"))
    assert chat.say("Hello", ids(chat, "Good day.<|im_end|>\n<|im_start|>user")).reply == "Good day."
    assert chat.say("Hello", ids(chat, "Good day.<|im_start|>user")).reply == "Good day."


def test_a_closing_text_ends_nothing() -> None:
    """A template may close messages with blank lines, which a reply has as well."""
    template = (
        "{% for m in messages %}### {{ m['role'] }}:\n{{ m['content'] }}\n\n{% endfor %}"
        "{% if add_generation_prompt %}### assistant:\n{% endif %}"
    )
    chat = make_chat(template=template, eos="<|endoftext|>")
    outcome = chat.say("Hello", ids(chat, "One.\n\nTwo.<|endoftext|>"))
    assert outcome.reply == "One.\n\nTwo."


def test_a_user_mark_behind_white_space_ends_a_reply() -> None:
    template = (
        "{% for m in messages %}\n<|{{ m['role'] }}|>\n{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}\n<|assistant|>\n{% endif %}"
    )
    chat = make_chat(template=template, control=("<|user|>", "<|assistant|>"), eos="<|endoftext|>")
    assert chat.say("Hello", ids(chat, "Good day.\n<|user|>\nAnd you?")).reply.rstrip() == "Good day."
