"""Where chat templates are cut: what opens and closes messages, and that the parts join to what the template writes."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from streamchat.conversation.template.chat_format import FIXED_TIME, ChatFormat
from streamchat.conversation.template.format import choose_format, template_format
from tests.support import toy_tokenizer as toy

pytestmark = pytest.mark.smoke

SYSTEM = " Two\n\nlines. "
ASSISTANT = "<|im_end|>\n<|im_start|>assistant\n"
CHATML = ("<|im_start|>user\n", "<|im_start|>user\n", ASSISTANT, ASSISTANT, "<|im_end|>\n")
TRIMMED = toy.CHATML.replace("{{ m['content'] }}", "{{ m['content'] | trim }}")
NOTED = toy.CHATML.replace("{{ m['content'] }}", "{% if '\\n' in m['content'] %}(lines) {% endif %}{{ m['content'] }}")
MOVED = toy.CHATML.replace(
    "{{ m['content'] }}", "{{ m['content'] }}{% if '\\n' in m['content'] %}{{ '\\n' }}{% endif %}"
)
SPACES = (
    "{% for m in messages %}<|im_start|> {{ m.role }}: {{ m.content }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant:{% endif %}"
)
SPACED = (" <|im_end|> <|im_start|> assistant:", " <|im_end|> <|im_start|> assistant: ", " <|im_end|>")
# a start token, messages without an end, and an end of replies only
ENDED = (
    "<|im_start|>{% for m in messages %}{{ '\n\n' if not loop.first }}{{ m.role }}:\n{{ m.content }}"
    "{{ '<|im_end|>' if m.role == 'assistant' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\n' }}assistant:\n{% endif %}"
)
SEPARATED = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }} [/{{ m.role }}]{{ '\n' if not loop.last }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n' }}[assistant]{% endif %}"
)
LAST_END = (
    "{% for m in messages %}{{ m.role | capitalize }}: {{ m.content }}"
    "{% if loop.last and m.role == 'assistant' %}[END]{% else %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant: {% endif %}"
)
BARE = (
    "{% for m in messages %}{{ m.content }}{% if m.role == 'user' %}{{ '\n' }}[reply]\n{% else %}<|im_end|>"
    "{% if not loop.last %}{{ '\n' }}{% endif %}{% endif %}{% endfor %}"
)
REPLY = "\n\nassistant:\n"
INSIDE = ("<|im_start|>[INST] ", " [/INST]", " [/INST] ", " <|im_end|>")
THOUGHT = (*CHATML[:2], f"{ASSISTANT}<think>\n\n</think>\n\n", *CHATML[3:])


@pytest.mark.parametrize(
    ("template", "system", "around", "parts", "fallbacks"),
    [
        (toy.CHATML, "", ("<|im_start|>system\nBe kind.<|im_end|>\n", "", ""), CHATML, ()),
        (toy.CHATML, SYSTEM, ("<|im_start|>system\n", SYSTEM, "<|im_end|>\n"), CHATML, ()),
        (TRIMMED, SYSTEM, ("<|im_start|>system\n", "Two\n\nlines.", "<|im_end|>\n"), CHATML, ()),
        (NOTED, SYSTEM, ("<|im_start|>system\n", f"(lines) {SYSTEM}", "<|im_end|>\n"), CHATML, ()),
        (toy.THINKING, "", ("", "", ""), THOUGHT, ("replies-kept",)),
        (toy.INSIDE, "", ("", "", ""), ("<|im_start|>[INST] ", *INSIDE), ()),
        (toy.INSIDE, SYSTEM, ("<|im_start|>[INST] <<SYS>>", SYSTEM, "<</SYS>>"), ("", *INSIDE), ()),
        (toy.NO_SYSTEM, SYSTEM, ("<|im_start|>user\n", SYSTEM, "\n\n"), ("", *CHATML[1:]), ("system-folded",)),
        (
            toy.LAST_SYSTEM,
            "",
            ("<|im_start|>", "", ""),
            ("[INST] ", "[INST] ", "[/INST]", "[/INST] ", "<|im_end|>"),
            (),
        ),
        (
            toy.LAST_SYSTEM,
            SYSTEM,
            ("<|im_start|>[INST] ", SYSTEM, "\n\n"),
            ("", "[INST] ", "[/INST]", "[/INST] ", "<|im_end|>"),
            ("system-first",),
        ),
        (
            toy.ROUNDS,
            "",
            ("[Round 1]\n<|im_start|>", "", ""),
            ("", "[Round 2]\n<|im_start|>", "<|im_end|>", "<|im_end|>", "\n"),
            ("newest-turn",),
        ),
        # white space after the end token of a reply belongs to the next message only if the first one has it as well
        (
            toy.HEADINGS,
            "",
            ("", "", ""),
            ("### Instruction:\n", "### Instruction:\n", "\n### Response:\n", "\n### Response:\n", "<|im_end|>\n"),
            (),
        ),
        (
            toy.HEADINGS,
            SYSTEM,
            ("", SYSTEM, "\n"),
            ("### Instruction:\n", "\n### Instruction:\n", "\n### Response:\n", "\n### Response:\n", "<|im_end|>"),
            (),
        ),
        (ENDED, "", ("<|im_start|>", "", ""), ("user:\n", "user:\n", REPLY, REPLY, "<|im_end|>\n\n"), ()),
        (
            ENDED,
            SYSTEM,
            ("<|im_start|>system:\n", SYSTEM, "\n\n"),
            ("user:\n", "\n\nuser:\n", REPLY, REPLY, "<|im_end|>"),
            (),
        ),
        (
            toy.LINES,
            SYSTEM,
            ("System: ", SYSTEM.strip(), "\n\n"),
            ("User: ", "User: ", "\n\nAssistant:", "\n\nAssistant: ", "\n\n"),
            (),
        ),
        (
            SEPARATED,
            SYSTEM,
            ("[system] ", SYSTEM, " [/system]\n"),
            ("[user] ", "[user] ", " [/user]\n[assistant]", " [/user]\n[assistant] ", " [/assistant]\n"),
            (),
        ),
        # the newest reply is closed otherwise, and there is no control token; messages without an opening
        (LAST_END, "", ("", "", ""), ("User: ", "User: ", "\nAssistant: ", "\nAssistant: ", "\n"), ()),
        (BARE, "", ("", "", ""), ("", "\n", "\n[reply]\n", "\n[reply]\n", "<|im_end|>"), ()),
        # a template that writes nothing without a request for a reply
        (
            f"{{% if add_generation_prompt %}}{toy.CHATML}{{% endif %}}",
            "",
            ("<|im_start|>system\nBe kind.", "", ""),
            ("<|im_end|>\n<|im_start|>user\n", "<|im_end|>\n<|im_start|>user\n", ASSISTANT, ASSISTANT, ""),
            (),
        ),
        # a space before a message is tokenized with what follows
        (SPACES, "", ("<|im_start|> user:", "", ""), (" ", " <|im_start|> user: ", *SPACED), ()),
        (
            SPACES,
            SYSTEM,
            ("<|im_start|> system: ", SYSTEM, " <|im_end|>"),
            (" <|im_start|> user: ", " <|im_start|> user: ", *SPACED),
            (),
        ),
    ],
)  # fmt: skip
def test_the_parts_of_a_template(template: str, system: str, around: Any, parts: Any, fallbacks: Any) -> None:
    tokenizer = toy.toy_tokenizer(template)
    made = choose_format(tokenizer, "template", system)
    assert (made.system_open, made.system_prompt, made.system_close) == around
    assert (
        made.first_user_open,
        made.user_open,
        made.generation,
        made.reply_open,
        made.assistant_close,
    ) == parts
    assert made.fallbacks == fallbacks
    assert made.name == "template"
    if not set(fallbacks) & {"system-folded", "system-first", "newest-turn"}:
        texts = ["Hi", "Blue.", "Why?"]
        messages = [
            {"role": role, "content": text} for role, text in zip(("user", "assistant", "user"), texts, strict=True)
        ]
        before = [{"role": "system", "content": system}] if system else []
        one, two = (
            tokenizer.apply_chat_template([*before, *some], tokenize=False, add_generation_prompt=True)
            for some in (messages[:1], messages)
        )
        first = f"{made.system_block}{made.first_user_open}Hi"
        assert one == first + made.generation
        reply = f"{made.reply_open}Blue.{made.assistant_close}"
        assert two == f"{first}{reply}{made.user_open}Why?{made.generation}"


@pytest.mark.parametrize(
    ("template", "message", "reply", "strips"),
    [
        (toy.CHATML, " a ", " b ", False),
        (TRIMMED, "a", "b", True),
        (toy.LAST_SYSTEM, " a ", "b", False),
        (toy.NO_SYSTEM, " a ", " b ", False),
        (toy.NO_SYSTEM.replace("{{ m['content'] }}", "{{ m['content'] | trim }}"), "a", "b", True),
    ],
    ids=["as it is", "trimmed", "replies trimmed", "folded", "folded and trimmed"],
)
@pytest.mark.parametrize("system", ["", "Be brief."])
def test_texts_are_written_as_the_template_does(
    template: str, message: str, reply: str, strips: bool, system: str
) -> None:
    made = choose_format(toy.toy_tokenizer(template), "template", system)
    assert made.strips is strips
    assert (made.message(" a "), made.given_reply(" b ")) == (message, reply)
    folded = "system-folded" in made.fallbacks  # the text before it is the system prompt
    assert made.message(" a ", first=True) == (" a" if folded and strips else message)
    assert made.message("m\nn") == made.message("m\nn", first=True) == "m\nn"


def test_the_plain_format() -> None:
    tokenizer = toy.toy_tokenizer(None)
    expected = ChatFormat(
        name="plain",
        system_open="",
        system_prompt="Be brief.",
        system_close="\n\n",
        first_user_open="User: ",
        user_open="User: ",
        generation="\nAssistant:",
        reply_open="\nAssistant: ",
        assistant_close="\n",
        stop_strings=("\nUser:", "\nAssistant:"),
        strips=True,
    )
    assert choose_format(tokenizer, "plain", " Be brief.\n") == expected
    made = choose_format(tokenizer, "plain", " \n")
    assert (made.system_prompt, made.system_close, made.system_block) == ("", "", "")
    tokenizer.bos_token = None
    assert choose_format(tokenizer, "plain", "").system_open == ""


def test_the_plain_format_has_the_start_token_that_the_tokenizer_adds() -> None:
    tokenizer = toy.toy_tokenizer(None)
    start = [("<|im_start|>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=start)
    assert choose_format(tokenizer, "plain", "").system_block == "<|im_start|>"


# --- the clock and arguments -------------------------------------------------------------------------------------

NOW = datetime(2001, 2, 3, 4, 5, 6)
DATE = "{{ strftime_now('%Y-%m-%d') }}"
PLAIN = "{{% for m in messages %}}<|im_start|>{{{{ m.role }}}} {}\n{{{{ m.content }}}}<|im_end|>\n{{% endfor %}}"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
EVERY = PLAIN.format(DATE) + PROMPT


@pytest.mark.parametrize("role", ["user", "assistant"])
def test_a_clock_is_noticed_in_messages_and_in_replies(role: str) -> None:
    template = PLAIN.format(f"{{% if m.role == '{role}' %}}{DATE}{{% endif %}}") + PROMPT
    made = template_format(toy.toy_tokenizer(template), "", NOW)
    assert "clock" in made.fallbacks
    assert made.renew is not None
    assert (made.moment, made.source) == (NOW, template)
    assert ("2001-02-03" in made.user_open, "2001-02-03" in made.reply_open) == (role == "user", role == "assistant")


def test_saved_turns_do_not_depend_on_time_and_arguments() -> None:
    """Saved sessions have this identity."""
    assert datetime(2000, 1, 1) == FIXED_TIME
    tokenizer = toy.toy_tokenizer(EVERY)
    opening, reply = "<|im_start|>user 2000-01-01\n", "<|im_end|>\n<|im_start|>assistant\n"
    identity = (opening, opening, reply, "<|im_end|>\n", False)
    assert template_format(tokenizer, "", NOW).identity == identity
    quiet = toy.toy_tokenizer(EVERY.replace("<|im_end|>", "{{ mode }}<|im_end|>"))
    with_mode = template_format(quiet, "", NOW, {"mode": "(deep)"})
    assert with_mode.identity == identity
    assert with_mode.parts[3] == "(deep)<|im_end|>\n"
    assert with_mode.arguments == {"mode": "(deep)"}


def test_a_template_that_needs_an_argument_is_identified_with_it() -> None:
    needs = "{% if mode is not defined %}{{ raise_exception('mode is missing') }}{% endif %}"
    dated = template_format(toy.toy_tokenizer(needs + EVERY), "", NOW, {"mode": "deep"})
    assert dated.identity[1] == "<|im_start|>user 2000-01-01\n"
    made = template_format(toy.toy_tokenizer(needs + toy.CHATML), "", NOW, {"mode": "deep"})
    assert made.identity == made.parts
    assert made.parts[1] == "<|im_start|>user\n"


def test_defaults_of_the_catalogue_are_taken_if_the_template_reads_them() -> None:
    tokenizer = toy.toy_tokenizer(toy.CHATML.replace("<|im_end|>", "{{ mode }}{{ tone }}<|im_end|>"))
    defaults = {"mode": "deep", "tone": "dry", "unread": True}
    made = template_format(tokenizer, "", NOW, {"tone": "warm"}, defaults)
    assert made.arguments == {"mode": "deep", "tone": "warm"}
    assert made.takes.names == ("mode", "tone")
    assert made.takes.defaults == {"mode": "deep", "tone": "dry"}
    assert not made.takes.thinks


@pytest.mark.parametrize(
    ("template", "thinks"), [(toy.SWITCHED, True), (toy.SWITCHED_AT_THE_START, True), (toy.SWITCHED_OFF, False)]
)
def test_whether_a_template_asks_for_reasoning_by_itself(template: str, thinks: bool) -> None:
    assert template_format(toy.toy_tokenizer(template), "", NOW).takes.thinks is thinks
