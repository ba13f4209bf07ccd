"""Numbers in words, the same everywhere: sizes, durations."""

from __future__ import annotations

import time


def whole_number(text: str) -> int | None:
    """The number that `text` is in digits; None where it is none, or has more than 18 of them, as nothing here has."""
    return int(text) if text.isdecimal() and len(text) <= 18 else None


def plural(count: int, noun: str, many: str = "") -> str:
    """`1 turn`, `1,234 turns`; `many` for nouns whose plural is not formed with an s."""
    return f"{count:,} {noun if count == 1 else many or noun + 's'}"


def human_bytes(count: float) -> str:
    """Bytes in the unit that reads best: 46.1 MB (powers of 1,000, as file and network tools show them)."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def human_seconds(seconds: float) -> str:
    """A short duration: 45 ms, 1.3 s, 4 min 05 s."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"


def human_when(then: float, now: float) -> str:
    """A moment as people say it: 'just now', '5 min ago', '3 h ago', '2 days ago', '2026-11-25'. Seconds since 1970."""
    ago = max(0.0, now - then)
    if ago < 60:
        return "just now"
    if ago < 3600:
        return f"{int(ago // 60)} min ago"
    if ago < 86400:
        return f"{int(ago // 3600)} h ago"
    if ago < 14 * 86400:
        return f"{plural(int(ago // 86400), 'day')} ago"
    return time.strftime("%Y-%m-%d", time.localtime(then))
