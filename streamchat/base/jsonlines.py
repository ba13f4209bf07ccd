"""JSON Lines: safe for every reader and terminal when written, with any line ending when read."""

from __future__ import annotations

import json
import re
from typing import Any

# Characters that `json` does not escape although they end lines for some readers (U+0085, U+2028, U+2029), control a
# terminal (U+0080 to U+009F) or its text direction (bidirectional controls), or cannot be encoded (surrogates). They
# occur only inside strings.
_UNSAFE = re.compile("[\x7f-\x9f\u2028-\u202e\u2066-\u206f\ud800-\udfff]")


def json_line(value: Any) -> str:
    """Return `value` as JSON on one line, without a line ending; letters of all scripts stay readable."""
    return _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", json.dumps(value, ensure_ascii=False))


def split_lines(text: str) -> list[str]:
    """Split `text` at LF, CRLF and CR only: JSON strings may contain the other line separators."""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
