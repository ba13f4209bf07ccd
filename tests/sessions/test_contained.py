"""The Markdown export: no message can swallow, or pass for, another part of the document."""

from __future__ import annotations

import html
import re
from array import array
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from streamchat.sessions.transcripts.contained import contained, literal
from streamchat.sessions.transcripts.export import export
from streamchat.store.records import SessionInfo, StoredSession, StoredTurn

OPEN = [
    "Sure:\n```python\nprint(1)",
    "~~~~ text\n~~~\nopen",
    "   ````\n```\nopen",
    "<!-- hidden\n\nmore",
    "<details>\n<summary>Open</summary>\n\ntext",
    "<script>\nalert(1)",
    "<pre>\n\n```\n</pre>",
    "<![CDATA[ x",
    "<?php x",
    "a <b>bold",
    "a <!-- b --> c",
    "`<b>` and <b> and `` ` <i> ``",
    "- item\n\n  ```\n  open in a list",
    "> ```\n> open in a quote",
    "1. # A heading in a list\n2. > ## And in a quote",
    "# Title\n\n## 9. You\n\nI never said this.",
    "Title\n===\n\nOther\n---\n\nlast\n-",
    "> Title\n> ===",
    "- a\n  ---",
    "[foo]: http://example.org\n[foo]: http://example.com 'x'\n\n> [bar]: <x>",
    "[^1]: a footnote of several words\n",
    "| a | <b> |\n| --- | --- |\n| `<c>` | <d> |",
    "<div>\n# head\n```\n<!--",
    "\\<b> \\\\<b>",
    "<https://example.org> <a@example.org> 1 < 2 <3",
    "#",
    "# #\n#\tx\n ## y ##",
    "    # code\n\n\t<b>",
    "```\nclosed\n```\ntext",
    "```\nclosed\n    ```",
    "a\r\n# b\r```\rc",
    "\0<b>\0",
    "---\n***\n- - -",
    "> " * 40 + "# deep <b>",
]


def session(*messages: str, title: str = "A title") -> StoredSession:
    """A conversation of these user messages and replies, alternating."""
    info = SessionInfo("abcdef", title, 0.0, 0.0, "m", "The <model>", "float32", "f", "t", {"system_prompt": "S"})
    turns = [
        StoredTurn(number, text, reply, 0, 0, 0, array("i"))
        for number, (text, reply) in enumerate(zip(messages[::2], messages[1::2], strict=True), 1)
    ]
    return StoredSession(info, array("i"), tuple(turns))


def parse(text: str) -> tuple[list[Any], dict[str, Any]]:
    env: dict[str, Any] = {}
    return MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text, env), env


def html_of(text: str) -> str:
    rendered: str = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(text)
    return rendered


def own_headings(tokens: list[Any]) -> list[str]:
    """What stands in the headings of the first two levels."""
    return [
        tokens[at + 1].content
        for at, token in enumerate(tokens)
        if token.type == "heading_open" and token.tag in ("h1", "h2")
    ]


def check_document(*messages: str) -> None:
    """The export has the structure of its turns, and each message is read as it would be alone."""
    text = export(session(*messages), "markdown")
    tokens, env = parse(text)
    names = [f"{n}. {who}" for n in range(1, len(messages) // 2 + 1) for who in ("You", r"The \<model\>")]
    assert own_headings(tokens) == ["A title", "System prompt", *names]
    assert all(token.level == 0 for token in tokens if token.type == "heading_open" and token.tag in ("h1", "h2"))
    assert not env.get("references")
    assert not any(
        token.type == "html_block" or any(child.type == "html_inline" for child in token.children or ())
        for token in tokens
    )
    rendered = html_of(text)
    for message in messages:
        alone = html_of(f"{contained(message)}\n\n## end").removesuffix("<h2>end</h2>\n")
        assert alone.strip() in rendered


@pytest.mark.parametrize("message", OPEN)
def test_no_message_reaches_out_of_its_place(message: str) -> None:
    check_document(message, "an answer", "and", message)


@pytest.mark.parametrize("message", [m for m in OPEN if m.count("> ") < 40])
def test_the_reader_sees_the_same_text(message: str) -> None:
    """Every word of the message is in the rendered text, and raw HTML is shown and not obeyed."""
    shown = html.unescape(re.sub(r"<[^>]*>", " ", html_of(contained(message))))
    for word in re.findall(r"[A-Za-z]{2,}", message.replace("\\", "")):
        # the language of a fence is not shown, as ever
        assert word in shown or word in ("python", "text")


def test_a_message_without_dangers_stays_as_it_is() -> None:
    for text in (
        "Hello *there*, see [this](http://example.org).",
        "- a\n- b\n\n```python\nx = 1 < 2  # <b>\n```\n\n### Step 1\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n\n---\n\nz",
        "1 < 2 and `<b>` and <https://example.org>",
    ):
        assert contained(text) == text


def test_what_becomes_of_each() -> None:
    assert contained("# A\n## B\n### C") == "### A\n#### B\n### C"
    assert contained("A\n===") == "A\n\\==="
    assert contained("A\r===\r\nB") == "A\n\\===\nB"
    assert contained("```") == "```\n```"
    assert contained("```py\nx") == "```py\nx\n```"
    assert contained("~~~~\nx\n~~~") == "~~~~\nx\n~~~\n~~~~"
    assert contained("a <b>c</b> `<d>`") == "a \\<b>c\\</b> `<d>`"
    assert contained("<!-- x") == "\\<!-- x"
    assert contained("<div>\nx\n</div>\n\nafter") == "\\<div>\nx\n\\</div>\n\nafter"
    assert contained("[a]: b") == "\\[a]: b"
    assert contained("[^a]: b c") == "\\[^a]: b c"
    assert contained("a\r\nb") == "a\nb"


def test_a_message_that_resists_is_shown_as_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamchat.sessions.transcripts.contained.PASSES", 0)
    assert contained("# A\n````\n<b>") == "`````text\n# A\n````\n<b>\n````\n`````".replace("<b>\n````\n", "<b>\n")
    check_document("# A\n````", "<b>")


@pytest.mark.parametrize(
    "title", ["<!-- x", "a # b #", "`x", "*a* _b_ [c](d) &lt; \\", "![i](j) | k", "# h", "-", "1. x"]
)
def test_titles_are_shown_as_they_are(title: str) -> None:
    tokens, _ = parse(export(session("a", "b", title=title), "markdown"))
    shown = "".join(child.content for child in tokens[1].children)
    assert (tokens[0].tag, shown) == ("h1", title)
    assert literal("a\n b") == "a b"


PIECES = st.sampled_from(
    ["```", "~~~", "````", "`", "<", "<!--", "-->", "<b>", "</b>", "<details>", "<script>", "<pre>", "<![CDATA[", "<?",
     "#", "##", "===", "---", "- ", "1. ", "> ", "    ", "\t", "  ", "\n", "\n\n", "[a]: b", "[a]", "[^1]: x y", "\\",
     "|", "| - |", "&lt;", "word", "*", "_", "\r", "\0", "\u2028", "é"]
)  # fmt: skip
MESSAGES = st.lists(PIECES, max_size=14).map("".join)


@pytest.mark.fuzz
@given(MESSAGES, MESSAGES)
@example("[", "]: x")
def test_any_two_messages_stay_apart(first: str, second: str) -> None:
    check_document(first, second, second, first)
