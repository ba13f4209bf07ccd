"""Arguments for chat templates, from a flag, an environment variable, or `/set`."""

from __future__ import annotations

from streamchat.config.template_args import from_text, merged, parse_argument, parse_arguments, shown, to_text
from tools.fuzz.target import Target


def run(data: bytes) -> None:
    """Parse a JSON object or words, and one word."""
    text = data.decode("utf-8", "surrogateescape")
    refusal: ValueError | None = None
    for parse in (parse_arguments, lambda word: dict([parse_argument(word)])):
        try:
            table = parse(text)
            kept = to_text(table)
        except ValueError as error:
            refusal = error
            continue
        assert merged(kept, kept) == kept
        assert shown(from_text(kept)) or not table
    if refusal is not None:
        raise refusal


def seeds() -> dict[str, bytes]:
    """Both notations."""
    return {
        "object": b'{"a": [1, {"b": null}], "c": "d"}',
        "words": b'a=1 b="x" c=[1] d=e',
        "number": b"a=1" + b"0" * 50,
    }


TARGET = Target(
    "template_args",
    run,
    seeds,
    ("streamchat.config.template_args",),
    (ValueError,),
    (b"=", b"{", b'"', b"messages", b"NaN", b"\\ud800", b"bos_token"),
    suite_runs=500,
)
