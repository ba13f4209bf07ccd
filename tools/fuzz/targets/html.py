"""Messages in exports as HTML and Markdown: any content remains text."""

from __future__ import annotations

from html.parser import HTMLParser

from streamchat.sessions.transcripts.contained import contained
from streamchat.sessions.transcripts.html_page import is_safe_link, markdown_html
from tools.fuzz.target import Target

TAGS = frozenset(
    (
        *("p", "br", "hr", "em", "strong", "s", "a", "code", "pre", "blockquote", "ul", "ol", "li"),
        *("h3", "h4", "h5", "h6", "table", "thead", "tbody", "tr", "th", "td"),
    )
)
ATTRIBUTES = frozenset(("href", "title", "rel", "class", "start", "style"))


class _Checker(HTMLParser):
    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in TAGS, tag
        for name, value in attrs:
            assert name in ATTRIBUTES, name
            assert name != "href" or is_safe_link(value or ""), value
            assert name != "style" or (value or "").startswith("text-align:"), value

    def handle_decl(self, decl: str) -> None:
        raise AssertionError(decl)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(data)

    def handle_pi(self, data: str) -> None:
        raise AssertionError(data)


def run(data: bytes) -> None:
    """Write a message in both forms."""
    text = data.decode("utf-8", "surrogateescape")
    checker = _Checker()
    checker.feed(str(markdown_html(text)))
    checker.close()
    contained(text)


def seeds() -> dict[str, bytes]:
    """Structure, links and HTML."""
    return {
        "structure": b"# a\n\n- b\n  1. c\n\n| a | b |\n|---|:-:|\n| c | d |\n\n> q\n\n```py\nx\n```\n",
        "links": b'[a](https://a.b "t") <http://a.b> ![i](x) [j](javascript:alert) [r][1]\n\n[1]: data:text/html,x',
        "html": b"<script>alert(1)</script> <!-- c --> <![CDATA[x]]> <?php ?> &lt; &#x3c;b o=x>\n\n<div>\n\n~~s~~",
        "open": b"```\n<b>\n\n    code\n\n***a **b\n[x",
    }


TARGET = Target(
    "html",
    run,
    seeds,
    ("streamchat.sessions.transcripts.html_page", "streamchat.sessions.transcripts.contained", "markdown_it"),
    (),
    (b"```", b"~~~", b"[a](", b"<", b">", b"javascript:", b"&#", b"\n\n", b"    ", b"- ", b"1. ", b"|", b"<!--", b"\t",
     b"http:", b"*", b"\\"),
    max_bytes=1024,
    suite_runs=200,
)  # fmt: skip
