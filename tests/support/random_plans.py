"""What random chats do: plans made from a seed and nothing else, and their shortening.

A fault is found again by its seed; `shrunk` leaves out the steps that it does not need.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

KV_DTYPES = ("", "", "int8", "int4")
FAMILIES = ("llama", "gpt_neox", "gpt2", "mistral_window_16", "falcon_h1")
SIZES = (44, 56, 64, 96, 128, 200)
WORDS = ("the sea", "and a dragon", "sing of", "green hills", "while", "little girls", "ask", "why it is", "once more")
KINDS = {
    "turn": 10,
    "undo": 5,
    "retry": 2,
    "edit": 2,
    "reopen": 1,
    "pin": 3,
    "unpin": 1,
    "quote": 1,
    "keep": 5,
    "compact": 1,
    "resume": 3,
    "clear": 0.4,
    "system": 0.3,
}


@dataclass(frozen=True)
class Step:
    """One thing that a user, or the machine, does."""

    kind: str
    text: str = ""
    reply: str = ""
    stop: tuple[str, int] = ("", 0)
    """("prompt", n) stops before the n-th forward of the prompt, ("reply", n) after n tokens, ("memory", n) runs out of
    memory in the n-th forward, ("copy", n) when a checkpoint is made, ("crash", n) ends the process after n tokens."""
    turn: int = 0
    size: int = 0
    """Budget on resume."""
    snapshot: bool = True
    kv_dtype: str = ""
    """How keys and values are stored from a resume on; "" as before."""


@dataclass(frozen=True)
class Plan:
    """A whole chat."""

    seed: int
    family: str
    size: int
    evict: str
    on_full: Literal["evict", "stop"]
    system: str
    steps: tuple[Step, ...]
    kv_dtype: str = ""
    """How keys and values are stored: "int8", "int4", or "" for the model's dtype."""
    archive: Literal["native", "int8"] = "native"
    rebases: bool = False
    """Positions are moved after few tokens."""
    auto_recall: Literal["off", "on"] = "off"

    def __str__(self) -> str:
        head = f"seed {self.seed}: {self.family}, {self.size} tokens, {self.evict}, {self.on_full}, {self.system!r}"
        head += f", keys in {self.kv_dtype or 'native'}, archive in {self.archive}{', rebases' * self.rebases}"
        head += f", auto_recall {self.auto_recall}"
        return "\n".join([head, *(f"  {i}. {_words(step)}" for i, step in enumerate(self.steps, 1))])


def _words(step: Step) -> str:
    parts = [step.kind]
    if step.text or step.kind in ("turn", "edit", "quote"):
        parts.append(f"{len(step.text)} characters, reply {len(step.reply)}")
    if step.stop[0]:
        parts.append(f"{step.stop[0]} at {step.stop[1]}")
    if step.turn:
        parts.append(f"turn {step.turn}")
    if step.kind == "resume":
        parts.append(f"at {step.size}" + ("" if step.snapshot else ", without its snapshot"))
        parts += [f"keys in {step.kv_dtype}"] if step.kv_dtype else []
    return ", ".join(parts)


def _text(draw: random.Random, counts: tuple[int, ...]) -> str:
    count = draw.choice(counts)
    return " ".join(draw.choice(WORDS) for _ in range(count))


def plan(seed: int, steps: int = 14) -> Plan:
    """The chat of a seed."""
    draw = random.Random(seed)
    kinds, weights = list(KINDS), list(KINDS.values())
    made = []
    for i in range(steps):
        kind = "turn" if i < 3 else draw.choices(kinds, weights)[0]
        chance, stop = draw.random(), ("", 0)
        if kind in ("turn", "retry", "edit", "reopen") and chance < 0.3:
            what = draw.choice(("prompt", "reply", "memory", "copy", "crash"))
            stop = (what, draw.randint(0, 6))
        elif kind in ("undo", "compact", "resume") and chance < 0.1:
            stop = ("memory", draw.randint(1, 4)) if kind != "resume" else stop
        reply = _text(draw, (1, 1, 2, 2, 4, 6, 16)) if draw.random() > 0.05 else ""
        turn, size = draw.randint(1, 8), draw.choice(SIZES)
        text = _text(draw, (1, 1, 2, 4, 6, 10, 20, 50))
        made.append(Step(kind, text, reply, stop, turn, size, draw.random() < 0.6))
    family = draw.choice(FAMILIES)
    on_full: Literal["evict", "stop"] = "stop" if draw.random() < 0.08 else "evict"
    evict = draw.choice(("oldest-turns", "oldest-turns", "oldest-tokens"))
    size, system = draw.choice(SIZES), draw.choice(("", "Be a sailor."))
    made = [replace(each, kv_dtype=draw.choice(KV_DTYPES)) if each.kind == "resume" else each for each in made]
    archive: Literal["native", "int8"] = draw.choice(("native", "native", "int8"))
    storage = (draw.choice(KV_DTYPES), archive, draw.random() < 0.5)
    auto_recall: Literal["off", "on"] = draw.choice(("off", "on"))
    return Plan(seed, family, size, evict, on_full, system, tuple(made), *storage, auto_recall)


def shrunk(chosen: Plan, fails: Callable[[Plan], bool]) -> Plan:
    """The plan without steps that the fault does not need."""
    at = len(chosen.steps)
    while at:
        at -= 1
        shorter = replace(chosen, steps=chosen.steps[:at] + chosen.steps[at + 1 :])
        if fails(shorter):
            chosen = shorter
    return chosen
