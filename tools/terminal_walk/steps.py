"""The steps of a walk. They depend on its seed only, so that a walk can be repeated."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

FrontEnd = Literal["app", "prompt"]
FRONT_ENDS: tuple[FrontEnd, ...] = ("app", "prompt")
Kind = Literal["type", "resize", "pause", "probe", "quit", "terminate"]
WORDS = ("the sea", "a dragon", "Köln grüßt", "三つの願い", "🙂 why", "x" * 90, "a\tb", "[bold] [/x]", "  ")
PASTES = (
    "two\nlines",
    "a\r\nb\r\n\r\nc",
    "one \x1b[31mred\x1b[0m",
    "\x07\x01\x1a",
    "def f(x):\n    return x\n",
    "y " * 900,
)
KEYS = {
    "up": b"\x1b[A", "down": b"\x1b[B", "right": b"\x1b[C", "left": b"\x1b[D", "home": b"\x1b[H", "end": b"\x1b[F",
    "page up": b"\x1b[5~", "page down": b"\x1b[6~", "delete": b"\x1b[3~", "backspace": b"\x7f", "tab": b"\t",
    "enter": b"\r", "escape": b"\x1b", "ctrl+a": b"\x01", "ctrl+e": b"\x05", "ctrl+k": b"\x0b", "ctrl+u": b"\x15",
    "ctrl+w": b"\x17", "ctrl+j": b"\n", "ctrl+y": b"\x19", "ctrl+c": b"\x03", "alt+up": b"\x1b[1;3A",
    "alt+down": b"\x1b[1;3B", "shift+tab": b"\x1b[Z", "nul": b"\0", "not UTF-8": b"\xff\xc3(",
    "unknown": b"\x1b[57441;2:3u",
}  # fmt: skip
APP_KEYS = {
    "context": b"\x14", "panel": b"\x02", "palette": b"\x10", "help": b"\x1bOP", "f2": b"\x1bOQ", "f3": b"\x1bOR",
    "f4": b"\x1bOS", "f5": b"\x1b[15~", "search": b"\x06", "models": b"\x0f", "wheel up": b"\x1b[<64;9;9M",
    "wheel down": b"\x1b[<65;9;9M", "click": b"\x1b[<0;20;12M\x1b[<0;20;12m", "blur": b"\x1b[O", "focus": b"\x1b[I",
}  # fmt: skip
COMMANDS = ("/stats", "/help", "/undo", "/retry", "/pin", "/unpin all", "/set temperature 0.5", "/clear", "/map",
            "/recall sea", "/system be brief", "/nonsense", "/edit a sea", "/rename walk", "/set")  # fmt: skip
RESTORING = ("/undo", "/retry", "/clear", "/edit", "/unpin")
"""Commands after which evicted tokens may be back in the cache."""


@dataclass(frozen=True)
class Step:
    """One step of a walk."""

    kind: Kind
    data: bytes = b""
    """The typed bytes."""
    label: str = ""
    size: tuple[int, int] = (0, 0)
    """Columns and rows."""
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"{self.kind} {self.label}".strip()


def steps(seed: int, count: int, front_end: FrontEnd) -> Iterator[Step]:
    """Yield `count` steps."""
    rng = random.Random(f"{seed} {front_end}")
    for number in range(count):
        yield _step(rng, number, front_end)


def _step(rng: random.Random, number: int, front_end: FrontEnd) -> Step:
    choice = rng.random()
    if choice < 0.22:
        text = f"m{number} {rng.choice(WORDS)}"
        return Step("type", f"{text}\r".encode(), f"message {text[:20]!r}")
    if choice < 0.30:
        text = rng.choice(COMMANDS)
        # Escape closes the list of commands, which would take the Enter
        end = b"\x1b" if front_end == "app" else b""
        return Step("type", text.encode() + end, f"command {text}", seconds=0.15)
    if choice < 0.38:
        text = rng.choice(PASTES)
        return Step("type", f"\x1b[200~p {text}\x1b[201~".encode(), f"paste {text[:12]!r}")
    if choice < 0.72:
        keys = KEYS | APP_KEYS if front_end == "app" else KEYS
        name = rng.choice([*keys])
        times = rng.choice((1, 1, 1, 2, 30)) if name not in ("ctrl+c", "enter") else 1
        return Step("type", keys[name] * times, f"key {name} x {times}")
    if choice < 0.84:
        size = rng.choice(((100, 30), (80, 24), (rng.randint(1, 220), rng.randint(1, 60)), (20, 6), (1, 1)))
        return Step("resize", label=f"{size[0]} x {size[1]}", size=size)
    if choice < 0.91:
        return Step("pause", label="", seconds=rng.choice((0.05, 0.3)))
    if choice < 0.975:
        return Step("probe")
    return Step(rng.choice(("quit", "quit", "terminate")))
