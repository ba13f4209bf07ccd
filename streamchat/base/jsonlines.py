"""JSON, a line each: written so that every reader and every terminal takes it, read whatever ends a line."""

from __future__ import annotations

import json
import re
from typing import Any

# What `json` leaves as it is although it ends lines for some readers (U+0085, U+2028, U+2029), controls a terminal
# (U+0080 to U+009F) or the order of its letters (bidirectional controls), or cannot be encoded (surrogates). Such
# characters stand inside strings only.
_UNSAFE = re.compile("[\x7f-\x9f\u2028-\u202e\u2066-\u206f\ud800-\udfff]")


def json_line(value: Any) -> str:
    """`value` as JSON on one line, without a line end; letters of all scripts stay readable."""
    return _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", json.dumps(value, ensure_ascii=False))


def split_lines(text: str) -> list[str]:
    """The lines of `text`, ended by LF, CRLF or CR and by nothing else: JSON may hold all other line separators."""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
