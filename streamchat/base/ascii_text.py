"""Replace box-drawing characters and typographic marks by ASCII, for consoles that can show nothing else."""

from __future__ import annotations

import codecs

ERRORS = "streamchat-plain"
"""Error handler for `errors=` of a stream: writes ASCII look-alikes, and `?` for characters that have none."""

_LIKE = {
    **dict.fromkeys("·•◦‣∙", "*"),
    **dict.fromkeys("‘’‚‛′", "'"),
    **dict.fromkeys("“”„‟″«»", '"'),
    **dict.fromkeys("‐‑‒–−─━┄┈╌", "-"),
    **dict.fromkeys("│┃┆┊▌▐▏", "|"),
    **dict.fromkeys("┌┐└┘├┤┬┴┼╭╮╯╰╷╵╶╴╸╺", "+"),
    **dict.fromkeys("█▉▊▋▓■◆", "#"),
    **dict.fromkeys("░▒□", "."),
    **dict.fromkeys("›▸▶", ">"),
    **dict.fromkeys("‹◂◀", "<"),
    **dict.fromkeys("▾▼", "v"),
    **dict.fromkeys("▴▲", "^"),
    **dict.fromkeys("\u00a0\u2007\u2009\u202f", " "),
    "—": "--",
    "…": "...",
    "→": "->",
    "←": "<-",
    "×": "x",
    "≥": ">=",
    "≤": "<=",
    "✓": "ok",
    "✗": "x",
    "≈": "~",
}
_TABLE = str.maketrans(_LIKE)


def in_encoding(text: str, encoding: str | None) -> str:
    """Return `text` unchanged if `encoding` can encode it, else with ASCII look-alikes."""
    try:
        text.encode(encoding or "utf-8")
    except UnicodeEncodeError:
        return text.translate(_TABLE)
    except LookupError:
        return text
    return text


def _replace(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_LIKE.get(letter, "?") for letter in error.object[error.start : error.end]), error.end


def register() -> None:
    """Register the `ERRORS` handler with `codecs`."""
    codecs.register_error(ERRORS, _replace)
