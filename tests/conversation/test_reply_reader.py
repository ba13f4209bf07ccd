"""What is shown at each token of a reply with reasoning, and what is learned from a vocabulary: without a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from streamchat.base.thinking import THINK, Tags
from streamchat.conversation.reasoning import ReasoningFormat, ReplyReader, learn_reasoning
from streamchat.conversation.template.reply_shape import Messages, ReplyShape

START, HEADER_END, CLOSE, CHANNEL, OPEN, SHUT, SILENT, OTHER = range(8)
MESSAGES = Messages(START, "assistant", HEADER_END, CLOSE, CHANNEL, "final")
ONE = ReasoningFormat(
    tags=(Tags("<t>", "</t>"), THINK),
    opening={OPEN: Tags("[T]", "[/T]")},
    closing=frozenset({SHUT}),
    silent=frozenset({SILENT}),
)
SEVERAL = ReasoningFormat(messages=MESSAGES)
JOINED = THINK.closing[0] + "\N{WORD JOINER}" + THINK.closing[1:]
Step = tuple[int | str, str]
"""A control token or text, and what is shown then."""
ANALYSIS: list[Step] = [(CHANNEL, ""), ("analysis", ""), (HEADER_END, ""), ("Well.", "<think>\nWell."), (CLOSE, "")]


@pytest.mark.parametrize(
    ("reasoning", "steps", "end"),
    [
        (ONE, [("Good ", "Good "), ("day", "day")], ""),
        (ONE, [("<t>a", "<think>\na"), ("b</", "b"), ("t>", ""), ("\n\nc", "\n</think>\n\nc")], ""),
        (ONE, [(SILENT, ""), ("A", "A"), (SILENT, "")], ""),
        # blocks of control tokens: line ends around them are not shown, and what follows the answer is dropped
        (
            ONE,
            [
                (OPEN, ""),
                ("\n\nWell.", "<think>\nWell."),
                ("\n", ""),
                (SHUT, ""),
                ("\n\nDay.", "\n</think>\n\nDay."),
                (OPEN, ""),
                ("late", ""),
                (SHUT, ""),
                (" more", "more"),
            ],
            "",
        ),
        # blocks without an answer between them are one, with a blank line
        (
            ONE,
            [
                (OPEN, ""),
                ("One", "<think>\nOne"),
                (SHUT, ""),
                (OPEN, ""),
                ("\nTwo", "\n\nTwo"),
                (SHUT, ""),
                (OPEN, ""),
                (" ", ""),
                (SHUT, ""),
                ("A", "\n</think>\n\nA"),
            ],
            "",
        ),
        (ONE, [(OPEN, ""), ("\n", ""), (SHUT, ""), ("A", "A")], ""),  # an empty block is none
        # a closing tag of this program's own is shown as text
        (
            ONE,
            [
                (OPEN, ""),
                ("a </th", "<think>\na "),
                ("ink> b</thi", f"{JOINED} b"),
                (SHUT, ""),
                ("A", "</thi\n</think>\n\nA"),
            ],
            "",
        ),
        (ONE, [(OPEN, ""), ("a </th", "<think>\na "), (OPEN, ""), ("b", "</th\n\nb")], ""),
        (ONE, [(OPEN, ""), ("a </thi", "<think>\na ")], "</thi"),  # a block that is open at the end stays open
        (ONE, [(OPEN, ""), ("One", "<think>\nOne"), (SHUT, "")], "\n</think>"),
        (ONE, [], ""),
        (ONE, [("<t>a</t>b", "<think>\na\n</think>\n\nb"), ("c", "c")], ""),
        (ONE, [(OPEN, ""), ("\nXX", "<think>\nXX"), (SHUT, ""), ("XX", "\n</think>\n\nXX")], ""),
        # several messages
        (
            SEVERAL,
            [
                *ANALYSIS,
                (START, ""),
                ("assistant", ""),
                (CHANNEL, ""),
                ("final", ""),
                (HEADER_END, ""),
                ("Day.", "\n</think>\n\nDay."),
                (CLOSE, ""),
                (START, ""),
                ("assistant", ""),
            ],
            "",
        ),
        (
            SEVERAL,
            [
                *ANALYSIS,
                (START, ""),
                ("assistant", ""),
                (CHANNEL, ""),
                ("commentary to=f", ""),
                (HEADER_END, ""),
                ("Two", "\n\nTwo"),
                (CLOSE, ""),
            ],
            "\n</think>",
        ),
        (
            SEVERAL,
            [
                (CHANNEL, ""),
                ("final", ""),
                (" x", ""),
                (HEADER_END, ""),
                ("Day.", "Day."),
                (CLOSE, ""),
                *ANALYSIS[:3],
                ("late", ""),
            ],
            "",
        ),
        (SEVERAL, [(CHANNEL, ""), ("fin", ""), ("ally", ""), (HEADER_END, ""), ("A", "<think>\nA")], ""),
        (SEVERAL, [(CHANNEL, ""), ("analysis", ""), (CHANNEL, ""), ("final", ""), (HEADER_END, ""), ("A", "A")], ""),
        # text without a header is the answer, as soon as it cannot be one
        (SEVERAL, [("Good", "Good"), (" day", " day")], ""),
        (SEVERAL, [(HEADER_END, ""), ("text", "text"), (HEADER_END, ""), ("more", "more")], ""),
        (
            SEVERAL,
            [*ANALYSIS, (START, ""), ("assis", ""), ("tant", ""), (" Good", "\n</think>\n\nGood"), (" day", " day")],
            "",
        ),
        (SEVERAL, [(START, ""), ("assistant to", ""), ("=f", ""), (HEADER_END, ""), ("call", "call")], ""),
        (SEVERAL, [("to", ""), ("=f", "")], ""),
        (SEVERAL, [("toast", "toast")], ""),
        *((SEVERAL, [(text, "")], text) for text in ("t", "to", "to=", " to")),  # it ends without a header
        (SEVERAL, [(" \n", "")], ""),
        (SEVERAL, [("to=f", "")], ""),  # a header that is cut off
        (SEVERAL, [("to", ""), (CHANNEL, ""), ("final", "")], ""),
        (SEVERAL, [(START, ""), ("assistant", ""), (" to", "")], ""),
        (SEVERAL, [*ANALYSIS, ("t", "")], "\n</think>\n\nt"),
        (SEVERAL, [("X", "X"), (CLOSE, ""), ("X", "X")], ""),
        (SEVERAL, [*ANALYSIS[:3], ("a XX", "<think>\na XX"), (" b", " b")], ""),
        # what could have been a tag is shown when a control token follows
        *((SEVERAL, [(HEADER_END, ""), ("<thi", ""), (token, "<thi")], "") for token in (START, CLOSE, CHANNEL)),
        (SEVERAL, [(HEADER_END, ""), ("<thi", ""), (HEADER_END, "<thi"), ("nk>", "nk>")], ""),
        (SEVERAL, [("A", "A"), (CHANNEL, ""), ("final", ""), (HEADER_END, ""), ("B", "B")], ""),
        (SEVERAL, [(START, ""), (" user", "user"), (" x", " x")], ""),
    ],
)
def test_what_is_shown_at_each_token(reasoning: ReasoningFormat, steps: list[Step], end: str) -> None:
    reader = ReplyReader(reasoning)
    shown = [reader.mark(piece) if isinstance(piece, int) else reader.text(piece) for piece, _ in steps]
    assert shown == [expected for _, expected in steps]
    assert reader.end() == end


def test_the_block_of_a_prompt_is_open_at_the_start() -> None:
    reader = ReplyReader(ReasoningFormat(inside=THINK))
    assert [reader.text("Well."), reader.text("</think>Day.")] == ["<think>\nWell.", "\n</think>\n\nDay."]


def test_marks_are_the_tokens_of_the_format() -> None:
    def marks(reasoning: ReasoningFormat) -> list[int]:
        return [token for token in range(8) if ReplyReader(reasoning).is_mark(token)]

    assert marks(ONE) == [OPEN, SHUT, SILENT]
    assert marks(SEVERAL) == [START, HEADER_END, CLOSE, CHANNEL]
    assert marks(ReasoningFormat()) == []


# --- what is learned --------------------------------------------------------------------------------------------


class Vocabulary:
    """A tokenizer with these added tokens, of which decoding drops the special ones."""

    def __init__(self, added: Mapping[str, int], special: tuple[str, ...] = (), template: str | None = None) -> None:
        self._added, self._special, self.chat_template = added, special, template

    def get_added_vocab(self) -> Mapping[str, int]:
        """Return name -> id."""
        return self._added

    def decode(self, ids: list[int], *, skip_special_tokens: bool = False) -> str:
        """Return the names."""
        names = [name for name, token in self._added.items() if token in ids]
        return "".join(name for name in names if not (skip_special_tokens and name in self._special))


SQUARE, INNER = Tags("[THINK]", "[/THINK]"), Tags("<|inner_prefix|>", "<|inner_suffix|>")
OWN = Tags("<mine>", "</mine>")


def learned(shape: ReplyShape, **vocabulary: Any) -> ReasoningFormat:
    return learn_reasoning(Vocabulary(**({"added": {}} | vocabulary)), shape)


def test_tags_are_those_of_the_template_then_known_ones() -> None:
    assert learned(ReplyShape()) == ReasoningFormat()
    assert learned(ReplyShape(tags=OWN)).tags == (OWN, THINK)
    assert learned(ReplyShape(), template="x[THINK]y").tags == (SQUARE, THINK)
    both = learned(ReplyShape(tags=OWN), added={"<|inner_prefix|>": 3}, template="[THINK]")
    assert both.tags == (OWN, SQUARE, INNER, THINK)
    assert learned(ReplyShape(), template="<think>").tags == (THINK,)
    assert learned(ReplyShape(), template="[/THINK]").tags == (THINK,)  # an opening tag is needed


@pytest.mark.parametrize(
    ("opening", "closing", "label"),
    [
        ("<thinking>", "</thinking>", ""),
        ("<thought>", "</thought>", ""),
        ("<reasoning>", "</reasoning>", ""),
        ("[THINK]", "[/THINK]", ""),  # Magistral
        ("◁think▷", "◁/think▷", ""),  # Kimi
        ("<seed:think>", "</seed:think>", ""),  # Seed-OSS
        ("<|START_THINKING|>", "<|END_THINKING|>", ""),  # Command A
        ("<|inner_prefix|>", "<|inner_suffix|>", ""),  # Apertus
        ("<|begin_of_thought|>", "<|end_of_thought|>", ""),
        ("<|channel>", "<channel|>", "thought"),  # Gemma
    ],
)
def test_tags_of_published_models_are_known(opening: str, closing: str, label: str) -> None:
    assert learned(ReplyShape(), template=f"a{opening}b").tags == (Tags(opening, closing, label), THINK)


@pytest.mark.parametrize(
    ("prompt", "inside"),
    [
        ("", None),
        ("<mine>", OWN),
        ("<think>\n", THINK),
        ("<think></think>\n", None),
        ("<think></think><think>", THINK),
        ("</mine><mine>", OWN),
        ("<think><mine>", OWN),
    ],
)
def test_a_block_is_inside_a_prompt_that_opens_and_does_not_close_it(prompt: str, inside: Tags | None) -> None:
    assert learned(ReplyShape(tags=OWN, prompt=prompt)).inside == inside


def test_special_tokens_of_tags_are_marks_and_other_tokens_of_the_template_are_silent() -> None:
    names = {"[THINK]": 1, "[/THINK]": 2, "<|inner_prefix|>": 3, "<|inner_suffix|>": 4, "<think>": 5, "<x>": 6}
    shape = ReplyShape(around=frozenset({1, 2, 4, 5, 6}), messages=MESSAGES)
    found = learned(shape, added=names, special=("[THINK]", "[/THINK]", "<|inner_suffix|>"))
    assert found == ReasoningFormat(
        (THINK, SQUARE, INNER), None, {1: SQUARE}, frozenset({2, 4}), frozenset({6}), MESSAGES
    )


def test_a_format_is_plain_if_replies_have_think_tags_only() -> None:
    assert ReasoningFormat().plain
    assert ReasoningFormat(silent=frozenset({1})).plain
    for other in (
        ReasoningFormat(tags=(OWN, THINK)),
        ReasoningFormat(inside=THINK),
        ReasoningFormat(opening={1: THINK}),
        ReasoningFormat(closing=frozenset({1})),
        ReasoningFormat(messages=MESSAGES),
    ):
        assert not other.plain
