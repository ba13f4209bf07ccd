"""The HTML export: what it shows, that it loads nothing, and that no message is more than text in it."""

from __future__ import annotations

import re
import time
from array import array
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from streamchat.base.errors import ExitCode
from streamchat.base.sanitize import printable
from streamchat.cli import main as cli
from streamchat.sessions.transcripts.context import EDGE, token_runs
from streamchat.sessions.transcripts.export import export
from streamchat.sessions.transcripts.html_page import markdown_html
from streamchat.store.records import CacheMark, SessionInfo, StoredEviction, StoredSession, StoredTurn
from streamchat.store.store import Store
from tests.support.desk import Desk
from tests.support.saved_sessions import saved

EMPTY = ("meta", "br", "hr")
KNOWN = {
    *("html", "head", "meta", "title", "style", "body", "header", "main", "section", "div", "span", "time", "details"),
    *("summary", "dl", "dt", "dd", "h1", "h2", "h3", "h4", "h5", "h6", "p", "a", "ul", "ol", "li", "pre", "code", "em"),
    *("strong", "s", "blockquote", "table", "thead", "tbody", "tr", "th", "td", "br", "hr"),
}
ATTRIBUTES = {
    *("lang", "charset", "http-equiv", "content", "name", "class", "role", "aria-label", "style", "id", "dir"),
    *("datetime", "href", "title", "rel", "start"),
}
HOSTILE = [
    "<script>alert(1)</script>",
    "</div></section></main></body></html><script src=//evil.example/x.js></script>",
    "<img src=x onerror=alert(1)> <svg onload=alert(1)> <iframe src=http://evil.example>",
    "[a](javascript:alert(1)) [b](JaVaScRiPt:alert(1)) [c](java\nscript:alert(1)) [d](&#106;avascript:alert(1))",
    "[e](data:text/html,<script>1</script>) [f](vbscript:x) [g](file:///etc/passwd) [h](//evil.example) [i](/x)",
    "<javascript:alert(1)> <data:text/html,x>",
    '![picture](http://evil.example/pixel.png) ![x](javascript:alert(1) "t")',
    '[q](http://a.example/"onmouseover="alert(1)) [t](http://a.example ""><script>x</script>")',
    "[r]\n\n[r]: javascript:alert(1)",
    '```html"onmouseover="alert(1)\n</code></pre><script>alert(1)</script>\n```',
    "```\nnever closed\n<b>",
    "<style>*{display:none}</style><meta http-equiv=refresh content=0;url=http://evil.example>",
    "{{ 7 * 7 }} {% for x in y %} {# c #}",
    "\x1b[2J\x1b]0;owned\x07\u202eabc\x00 &lt;b&gt; &amp; \ud800",
    "> " * 60 + "# deep",
    "<think>" + "<script>alert(1)</script>" + "</think><b>",
    "| a | b |\n|---|---|\n| <i> | [x](javascript:x) |",
    "a\r\nb\rc\u2028d",
]


class Parsed(HTMLParser):
    """The elements of a page, checked for what may be there."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        """Texts of the elements with the class `text`, as they are read."""
        self._text_at = 0
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        assert tag in KNOWN, tag
        assert set(given) <= ATTRIBUTES, given
        self.seen.append((tag, given))
        if tag not in EMPTY:
            self.open.append(tag)
        if "text" in given.get("class", "").split():
            self.texts.append("")
            self._text_at = len(self.open)

    def handle_endtag(self, tag: str) -> None:
        if tag in EMPTY:  # `<br />` is a start and an end
            return
        assert self.open.pop() == tag
        if len(self.open) < self._text_at:
            self._text_at = 0

    def handle_data(self, data: str) -> None:
        if self._text_at:
            self.texts[-1] += data

    def handle_comment(self, data: str) -> None:
        raise AssertionError(data)

    def of(self, tag: str) -> list[dict[str, str]]:
        return [given for name, given in self.seen if name == tag]

    @property
    def levels(self) -> list[int]:
        return [int(tag[1]) for tag, _ in self.seen if re.fullmatch("h[1-6]", tag)]


def session(*messages: str, title: str = "A title") -> StoredSession:
    """A conversation of these user messages and replies, alternating; turn n has log indices 10 n to 10 n + 9."""
    about = {"num_sink_tokens": 4, "cache_size": 64, "system_prompt": "S <b>", "model": "/home/me/m", "device": "cpu"}
    info = SessionInfo("abcdef", title, 1e9, 1e9 + 60, "/home/me/m", "The <model>", "float32", "f", "t", about)
    turns = [
        StoredTurn(n, text, reply, 10 * n, 10 * n + 1, 10 * n + 5, array("i", [7] * 10), started=1e9 + n)
        for n, (text, reply) in enumerate(zip(messages[::2], messages[1::2], strict=True), 1)
    ]
    return StoredSession(replace(info, held=((0, 10 + 10 * len(turns)),)), array("i", [7] * 10), tuple(turns))


def page_of(stored: StoredSession) -> Parsed:
    """The parsed export; it has the structure of every page."""
    text = export(stored, "html")
    assert text == printable(text)
    page = Parsed(text)
    assert "http" not in re.sub(r'(?s)<body>.*|http-equiv|https?://[^"]*"', "", text)  # nothing to fetch
    assert not re.search(r"@import|url\(", text.partition("</style>")[0])
    assert [given["content"] for given in page.of("meta") if given.get("http-equiv") == "Content-Security-Policy"] == [
        "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    ]
    assert page.of("html") == [{"lang": "en"}]
    assert len(page.of("style")) == len(page.of("title")) == len(page.of("h1")) == len(page.of("main")) == 1
    assert all(
        urlsplit(given["href"]).scheme in ("http", "https", "mailto") and "noreferrer" in given["rel"]
        for given in page.of("a")
    )
    assert page.levels.count(2) == len(stored.turns) + 1  # with the system prompt
    assert page.levels.count(3) == 2 * len(stored.turns)
    assert len(page.of("section")) == len(stored.turns) + 1
    return page


@pytest.mark.parametrize("message", HOSTILE)
def test_a_hostile_message_is_inert(message: str) -> None:
    page = page_of(session(message, message, "next", "and next", title=message))
    assert page.texts[0] == "S <b>"
    assert page.texts[-2:] == ["next", "and next\n"]
    assert "{{" not in message or "{{ 7 * 7 }}" in page.texts[1]


@settings(max_examples=60)
@given(st.text(max_size=200), st.text("<>&\"'`#[]()!*_|-:/\\ \n\tabjavscript", max_size=200))
@example("<", "[x](javascript:alert(1))")
@example("", "\\\n:")
def test_any_texts_stay_in_their_place(text: str, reply: str) -> None:
    page = page_of(session(text, reply, reply, text, "next", "and next"))
    assert page.texts[-2:] == ["next", "and next\n"]


def test_markdown_is_rendered_below_the_headings_of_the_page() -> None:
    reply = "# One\n\nTwo\n---\n\n### Three\n\n**b** `c<` [a](https://a.example/?q=1&b=2)\n\n```python\nx < 1\n```"
    page = page_of(session("# typed\n  as it is", reply))
    assert page.levels == [1, 2, 2, 3, 3, 4, 5, 6]
    assert page.texts[1] == "# typed\n  as it is"
    assert page.texts[2].split() == ["One", "Two", "Three", "b", "c<", "a", "x", "<", "1"]
    assert page.of("a") == [
        {"href": "https://a.example/?q=1&b=2", "title": "https://a.example/?q=1&b=2",
         "rel": "noopener noreferrer nofollow"}
    ]  # fmt: skip
    assert {"class": "language-python"} in page.of("code")


def test_a_link_without_an_address_is_text() -> None:
    for message in ("[here]()", "[here](<>)", "[here]\n\n[here]: <>"):
        assert "href" not in str(markdown_html(message)), message
    assert 'href="https://a.b"' in str(markdown_html("[here](https://a.b)"))


def test_the_edge_of_memory_is_visible() -> None:
    stored = session(*(f"{word} {n}" for n in range(1, 6) for word in ("question", "answer")))
    info = replace(stored.info, held=((0, 10), (20, 30), (45, 60)), pins=((0, 10), (20, 30)), compressions=2)
    evicted = (StoredEviction(5, 1e9, "prefill", ((10, 20), (30, 45)), 60, 35),)
    stored = replace(stored, info=info, evictions=evicted)
    runs = [("sinks", 4), ("pinned", 6), ("evicted", 10), ("pinned", 10), ("evicted", 15), ("cached", 15)]
    assert token_runs(stored) == runs
    page, text = page_of(stored), export(stored, "html")
    assert [given["style"] for given in page.of("span") if "style" in given] == [f"flex-grow:{n}" for _, n in runs]
    assert "The model sees 35 of 60 tokens (4 sinks, 16 pinned, 15 recent); 25 were evicted in 2 compressions." in text
    states = [given["class"].split()[1:] for given in page.of("section")]
    assert states == [["pinned"], ["forgotten"], ["seen", "pinned"], ["forgotten"], ["partly"], ["seen"]]
    assert text.count(EDGE.replace("'", "&#39;")) == 1
    assert text.index("answer 3") < text.index(EDGE[12:]) < text.index("question 4")
    assert text.count('<span class="tag">evicted</span>') == 2
    assert "25 tokens of turns 1 to 4 evicted" in text
    whole = export(session("a", "b"), "html")
    assert EDGE[12:] not in whole
    assert "tag" not in whole.partition("Turn 1")[2].partition("</h2>")[0]


def test_the_head_names_model_and_settings_but_not_the_machine() -> None:
    stored = session("a", "b")
    text = export(stored, "html")
    assert "The &lt;model&gt; (float32), " in text
    assert "<dt>cache_size</dt><dd>64</dd>" in text
    assert "/home/me" not in text
    assert "<dt>device" not in text
    moment = time.strftime("%Y-%m-%d %H:%M", time.localtime(stored.info.created))
    assert f'<time datetime="{moment.replace(" ", "T")}">{moment}</time>' in text


def test_an_imported_conversation_has_no_memory_yet() -> None:
    stored = session("a", "b")
    text = export(replace(stored, info=replace(stored.info, fingerprint="", held=())), "html")
    assert "Imported and not resumed yet" in text
    assert 'class="map"' not in text
    assert ">evicted" not in text


@pytest.mark.parametrize(("thinking", "shown"), [("collapse", True), ("show", True), ("hide", False)])
def test_reasoning_follows_its_setting(thinking: str, shown: bool) -> None:
    stored = session("a", "<think>hidden *thought*</think>the answer", "b", "<think>only</think>", "c", "")
    about = {**stored.info.settings, "thinking": thinking}
    text = export(replace(stored, info=replace(stored.info, settings=about)), "html")
    assert ("hidden <em>thought</em>" in text, "the answer" in text) == (shown, True)
    assert "(no reply)" in text


def contrast(first: str, second: str) -> float:
    """The ratio of WCAG 2."""

    def luminance(color: str) -> float:
        parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted(luminance(color) for color in (first, second))
    return (high + 0.05) / (low + 0.05)


def test_all_colors_can_be_read() -> None:
    style = export(session("a", "b"), "html").partition("</style>")[0]
    blocks = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    palettes = [dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block)) for block in blocks]
    assert len(palettes) == 3  # light, dark, print
    for colors in palettes:
        for ground in ("page", "block"):
            for text in ("text", "soft", "link", "you", "pin"):
                assert contrast(colors[text], colors[ground]) >= 4.5, (text, ground, colors)
        for mark in ("pin", "sink", "cached", "gone"):
            assert contrast(colors[mark], colors["page"]) >= 3, (mark, colors)


def test_the_name_of_the_file_chooses_the_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = saved(turns=3)
    with Store() as store:
        store.write(name, cache=CacheMark(((0, 4), (24, 34)), ((0, 4),), (), 1))
        whole = export(store.load(name), "html")
    desk = Desk()
    desk.board.session = name
    assert desk.say(f"/export {tmp_path}/a.html").text == f"3 turns written to {tmp_path}/a.html"
    assert (tmp_path / "a.html").read_text(encoding="utf-8") == whole
    assert desk.say(f"/export {tmp_path}/a.pdf").text == "a.pdf: the file name must end in .md, .html, .jsonl, .json"
    for file, start in (("b.html", "<!doctype html>"), ("b.jsonl", '{"streamchat"'), ("b.md", "# "), ("b.txt", "# ")):
        assert cli.main(["sessions", "export", name, "-o", str(tmp_path / file)]) == ExitCode.OK
        assert (tmp_path / file).read_text(encoding="utf-8").startswith(start)
    capsys.readouterr()
    assert cli.main(["sessions", "export", name, "--format", "html"]) == ExitCode.OK
    assert capsys.readouterr().out == whole


def test_the_time_grows_with_the_turns_not_with_their_square() -> None:
    looks = 0

    class Ids(array):  # type: ignore[type-arg]
        def __len__(self) -> int:
            nonlocal looks
            looks += 1
            return super().__len__()

    count = 200
    stored = session(*["Hello"] * 2 * count)
    turns = tuple(
        replace(turn, start=4 * at, ids=Ids("i", [1, 2, 3, 4])) for at, turn in enumerate(stored.turns, start=1)
    )
    evictions = tuple(StoredEviction(turn.number, 1.0, "turn", ((4, turn.start + 1),), 9, 4) for turn in turns)
    page = export(replace(stored, turns=turns, evictions=evictions), "html")
    assert looks < 20 * count
    assert f"of turns 1 to {count} evicted" in page
    assert "1 token of turn 1 evicted" in page
