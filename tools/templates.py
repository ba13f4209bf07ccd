"""Whether the ids that are fed equal the chat template's own: `python -m tools.templates FOLDER`.

For every `*.jinja` file, with small tokenizers of several kinds, with and without a system prompt, and for one to four
turns with replies that are given. Each pair of template and system prompt gets a verdict:

equal     What is fed equals the whole conversation, rendered and tokenized, id for id.
told      The template cannot be followed so, which is said at the start; what is fed is what is documented for it.
plain     The template cannot be used, which is said at the start.
DIFFERS   None of these. The exit code is 1 then, and if an internal mark is fed.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from streamchat.conversation.encoding import ChatEncoder
from streamchat.conversation.template.chat_format import ChatFormat
from streamchat.conversation.template.cutting import conversation
from streamchat.conversation.template.format import choose_format
from streamchat.conversation.template.format_check import fed
from streamchat.conversation.template.reference import Exchange, Reference
from streamchat.conversation.template.rendering import MARK, Renderer, UnusableTemplateError
from streamchat.conversation.template.turn_check import FedTurn, turn_difference
from tools.template_tokenizers import BOS, EOS, KINDS, names_of

SYSTEMS = "", "Be brief.", " Two lines.\n\nOf  text. \n"
TURNS = 4
MESSAGES = ("Name a color.", "Another,\nplease", "Köln: 5 € & <b>1</b>?", "  Spaces. ")
REPLIES = (
    ("Blue.", "Red.", "Green", "White."),
    (" Blue.", " Red.\n", "\n\nGreen", "White!\n\n"),
)


@dataclass(frozen=True)
class Verdict:
    """What came out for one template, tokenizer and system prompt."""

    word: str
    detail: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Check a folder; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.templates", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="folder of *.jinja files")
    parser.add_argument("--tokenizer", choices=[*KINDS], help="kind of tokenizer (default: each of them)")
    parser.add_argument(
        "--indented",
        default="cz_",
        metavar="PREFIX",
        help="files with this prefix lose every newline and run of four spaces first (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    files = sorted(args.folder.glob("*.jinja"))
    if not files:
        print(f"{args.folder} has no *.jinja files; name a folder that has", file=sys.stderr)
        return 2
    counts: Counter[str] = Counter()
    for file in files:
        source = file.read_text(encoding="utf-8")
        if args.indented and file.name.startswith(args.indented):
            source = source.replace("    ", "").replace("\n", "")
        for prompt in SYSTEMS:
            kinds = [args.tokenizer] if args.tokenizer else [*KINDS]
            for kind, verdict in ((kind, check(source, kind, prompt)) for kind in kinds):
                counts[verdict.word] += 1
                print(f"{file.stem:32} {kind:14} {prompt[:9].strip()!r:12} {verdict.word:8} {verdict.detail}")
    print(", ".join(f"{count} {word}" for word, count in sorted(counts.items())))
    return 1 if counts["DIFFERS"] else 0


def check(source: str, kind: str, prompt: str) -> Verdict:
    """Compare what is fed with what the template renders, for one template, kind of tokenizer and system prompt."""
    tokenizer = KINDS[kind](names_of(source, _sample(source)))
    tokenizer.chat_template = source
    chosen = choose_format(tokenizer, "auto", prompt)
    if chosen.name == "plain":
        return Verdict("plain" if chosen.notes else "DIFFERS", "; ".join(chosen.notes))
    found = [
        problem
        for replies in REPLIES
        for turns in range(1, TURNS + 1)
        if (problem := _problem(tokenizer, chosen, prompt, list(zip(MESSAGES, replies, strict=True))[:turns]))
    ]
    if found:
        return Verdict("DIFFERS", found[0])
    told = [each for each in chosen.fallbacks if each not in ("system-folded", "replies-kept")]
    if told and not chosen.notes:
        return Verdict("DIFFERS", f"{', '.join(told)} is not said")
    return Verdict("told" if told else "equal", ", ".join(chosen.fallbacks))


def _sample(source: str) -> str:
    """A conversation as the template renders it, whatever the tokenizer."""
    tokenizer = KINDS["byte-level"]([BOS, EOS])
    tokenizer.chat_template = source
    texts = ["a", "b", "c"]
    rendered = []
    for messages in (conversation(texts), conversation(texts, "s")):
        try:
            rendered.append(Renderer(tokenizer, datetime(2000, 1, 1))(messages, generation=True))
        except UnusableTemplateError:
            continue
    return "\n".join(rendered)


def _problem(tokenizer: Any, chosen: ChatFormat, prompt: str, turns: list[Exchange]) -> str:
    """How what is fed differs from the template, or from what is documented for it; '' if it does not."""
    encoder = ChatEncoder(tokenizer, chosen)
    reference = Reference(tokenizer, chosen, prompt)
    history, message = turns[:-1], turns[-1][0]
    ids = fed(encoder, history, message)
    if mark := MARK.search(tokenizer.decode(ids)):
        return f"a mark is fed: {mark[0]}"
    exact = not set(chosen.fallbacks) & {"system-first", "newest-turn", "tokens"}
    if exact:
        expected = reference.ids(history, message)
        if ids != expected:
            return f"{len(history)} replies: {_first_difference(tokenizer, ids, expected)}"
        return ""
    return _documented(tokenizer, encoder, reference, turns)


def _documented(tokenizer: Any, encoder: ChatEncoder, reference: Reference, turns: list[Exchange]) -> str:
    """How the newest turn differs from the documented way of following the template; '' if it does not."""
    message, reply = turns[-1]
    before = fed(encoder, turns[:-1], message)
    return turn_difference(
        reference, tokenizer, encoder.control_ids, FedTurn(turns[:-1], message, reply, before, len(before), False)
    )


def _first_difference(tokenizer: Any, ids: list[int], expected: list[int]) -> str:
    at = next((i for i, (a, b) in enumerate(zip(ids, expected, strict=False)) if a != b), min(len(ids), len(expected)))
    around = slice(max(0, at - 3), at + 6)
    names = tokenizer.convert_ids_to_tokens
    return f"fed {names(ids[around])}, the template's own {names(expected[around])}"


if __name__ == "__main__":
    sys.exit(main())
