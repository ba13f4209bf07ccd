"""Format sizes, durations and counts for people, the same everywhere."""

from __future__ import annotations

import time
from collections.abc import Sequence


def parse_whole_number(text: str) -> int | None:
    """Parse `text` as a whole number; None if it is not one or has more than 18 digits (larger values never occur)."""
    return int(text) if is_whole_number(text) and len(text) <= 18 else None


def is_whole_number(text: str) -> bool:
    """Return whether `text` consists of the digits 0 to 9."""
    return text.isascii() and text.isdecimal()


def parse_int(text: str) -> int:
    """Parse an integer like `int`, but from the digits 0 to 9 only; raises ValueError."""
    return int(_plain(text))


def parse_float(text: str) -> float:
    """Parse a number like `float`, but from the digits 0 to 9 only; raises ValueError."""
    return float(_plain(text))


def _plain(text: str) -> str:
    """Refuse what Python takes but a user mistyped or pasted: digits of other scripts, and `1_000`."""
    if not text.isascii() or "_" in text:
        raise ValueError(f"not a number: {text!r}")
    return text


def plural(count: int, noun: str, many: str = "") -> str:
    """Return `1 turn` or `1,234 turns`. `many` is the plural if it is not formed with an s."""
    return f"{count:,} {noun if count == 1 else many or noun + 's'}"


def format_turns(turns: Sequence[int]) -> str:
    """(1, 2, 3) -> 'turns 1-3', (4,) -> 'turn 4', (1, 2, 5) -> 'turns 1-2, 5'."""
    runs: list[list[int]] = []
    for turn in sorted(turns):
        if runs and turn == runs[-1][1] + 1:
            runs[-1][1] = turn
        else:
            runs.append([turn, turn])
    words = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return f"{'turn' if len(turns) == 1 else 'turns'} {words}"


def human_bytes(count: float) -> str:
    """Format bytes in the unit that reads best: 46.1 MB (powers of 1,000, as file and network tools use)."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def human_seconds(seconds: float) -> str:
    """Format a short duration: 45 ms, 1.3 s; from a minute on as `human_duration`."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    return human_duration(seconds)


def human_when(then: float, now: float) -> str:
    """Format a relative time: 'just now', '5 min ago', '3 h ago', '2 days ago', '2026-11-25'. Arguments: Unix time.

    A time that is more than a day ahead, of a wrong clock, is shown as a date.
    """
    ago = now - then
    if not -86400 <= ago < 14 * 86400:
        return time.strftime("%Y-%m-%d", time.localtime(then))
    if ago < 60:
        return "just now"
    if ago < 3600:
        return f"{int(ago // 60)} min ago"
    if ago < 86400:
        return f"{int(ago // 3600)} h ago"
    return f"{plural(int(ago // 86400), 'day')} ago"


def human_duration(seconds: float) -> str:
    """Format a long duration: 42 s, 3 min 05 s, 1 h 02 min, 2 d 3 h."""
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days} d {h} h"
    if hours:
        return f"{hours} h {m:02} min"
    return f"{m} min {s:02} s" if minutes else f"{s} s"


def human_count(count: int) -> str:
    """Format a large count: 134515008 -> '134.5 M'."""
    for unit, size in (("B", 1_000_000_000), ("M", 1_000_000), ("k", 1_000)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return str(count)


def human_speed(tokens_per_s: float) -> str:
    """Format the speed of generation: 35.1 tok/s."""
    return f"{tokens_per_s:.1f} tok/s"
