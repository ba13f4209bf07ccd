"""Measures the loop guard: `python -m tools.loops [--temperature T]... [--seeds N] [--model NAME] [--kept FILE]`.

Lets a model answer prompts that small models answer in loops, with the guard off, and says for several thresholds how
many replies it would have stopped, after how many tokens, and how many that were cut at the limit it would have missed.
Then it reads texts that repeat for good reasons, in the tokens of the same model; each one that it stops is a mistake.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from streamchat.config.loader import Configuration
from streamchat.config.settings import Settings
from streamchat.conversation.assemble import assemble
from streamchat.conversation.loops import REPEATS, TOKENS, LoopWatch
from streamchat.models.load import load_from_settings

THRESHOLDS = ((3, 64), (4, 64), (4, 96), (6, 96), (REPEATS, TOKENS), (8, 160))
"""(occurrences, tokens) that are compared."""
TOPICS = (
    "a lighthouse", "the history of bread", "a dragon who cannot fly", "how rivers form", "my first day at school",
    "a robot that learns to paint", "the moon", "growing tomatoes", "a lost letter", "why people travel",
    "the sound of rain", "an old map", "bees and flowers", "a long train journey", "the color blue",
    "a cat and a mirror", "winter in the mountains", "how to bake a cake", "a city under the sea", "the first computer",
)  # fmt: skip
PROMPTS = (
    "Write a long story about {}.",
    "Write a poem of ten verses about {}.",
    "List 30 facts about {}.",
)


@dataclass(frozen=True)
class Reply:
    """A reply with the guard off."""

    temperature: float
    prompt: str
    ids: list[int]
    is_cut: bool
    """Whether it reached the token limit."""


def legitimate_texts() -> dict[str, str]:
    """Return texts that repeat for good reasons, by name."""
    numbers = range(1, 101)
    refrain = "Row on, row on, the tide is high,\nrow on, row on, the shore is nigh.\n"
    verses = ("The morning came with silver light", "The noon was hot, the sails were white", "The evening sang")
    return {
        "count to 100": ", ".join(map(str, numbers)),
        "count to 100 in lines": "\n".join(map(str, numbers)),
        "multiplication table": "\n".join(f"{a} x {b} = {a * b}" for a in range(1, 11) for b in range(1, 11)),
        "poem with a refrain": "\n".join(
            f"{verse},\nand far away the gulls took flight.\n{refrain}" for verse in verses
        ),
        "table with equal cells": "| name | done |\n| --- | --- |\n"
        + "".join(f"| task {n} | yes |\n" for n in numbers),
        "empty table": "| a | b | c | d |\n| --- | --- | --- | --- |\n" + "|   |   |   |   |\n" * 5,
        "list with equal beginnings": "\n".join(f"{n}. The color of number {n} is blue." for n in range(1, 31)),
        "ten lines for a teacher": "I will not talk in class.\n" * 10,
        "thirty times ha": "ha " * 30,
        "a song": "La la la la la, la la la la.\n" * 6,
        "5 x 5 zeros in code": "matrix = [\n" + "    [0, 0, 0, 0, 0],\n" * 5 + "]\n",
        "code with equal lines": "".join(f"    assert check(values[{n}]) == expected[{n}]\n" for n in range(40)),
        "JSON records": "".join(f'{{"id": {n}, "active": true, "tags": []}},\n' for n in range(40)),
        "HTML list": "<ul>\n" + "".join(f"  <li><a href='#{n}'>Part {n}</a></li>\n" for n in range(30)) + "</ul>\n",
        "chess board": ("# . # . # . # .\n. # . # . # . #\n" * 4),
        "a separator": "-" * 80 + "\n" + "=" * 80 + "\n",
        "the alphabet, five times": "a b c d e f g h i j k l m n o p q r s t u v w x y z\n" * 5,
        "days of four weeks": "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday. " * 4,
        "steps of a dance": "step left, step right, turn around, " * 5,
    }


def replies(temperature: float, seeds: int, settings: Settings) -> Iterator[Reply]:
    """Yield a reply to each prompt with each seed, every one in a new conversation; greedy once."""
    loaded = load_from_settings(settings)
    quiet = replace(settings, temperature=temperature, loop_guard="off")
    chat = assemble(Configuration(quiet), loaded, lambda event: None, lambda *_: None).conversation
    prompts = [prompt.format(topic) for topic in TOPICS for prompt in PROMPTS]
    for seed in range(seeds if temperature else 1):
        for number, prompt in enumerate(prompts):
            chat.settings = replace(quiet, seed=seed * len(prompts) + number)
            chat.start_over(chat.encoder.format)
            chat.reseed()
            outcome = chat.run_turn(prompt, lambda: False)
            turn = chat.log.turns[-1]
            ids = list(chat.log.ids[turn.prompt_end : turn.end])
            yield Reply(temperature, prompt, ids, outcome.finish_reason == "length")
    chat.close()


def stopped_at(ids: Sequence[int], repeats: int, tokens: int) -> int | None:
    """Return after how many tokens the guard stops a text; None if it does not."""
    watch = LoopWatch(repeats, tokens)
    return next((at for at, token in enumerate(ids, 1) if watch.is_loop_with(token)), None)


def report(found: Sequence[Reply], tokenizer: Any) -> None:
    """Print the tables."""
    print("temperature  threshold  replies  stopped  after tokens  of those at the limit  not stopped at the limit")
    for temperature in sorted({reply.temperature for reply in found}):
        own = [reply for reply in found if reply.temperature == temperature]
        for repeats, tokens in THRESHOLDS:
            ends = [(reply, stopped_at(reply.ids, repeats, tokens)) for reply in own]
            stops = [at for _, at in ends if at is not None]
            cut = sum(at is not None and reply.is_cut for reply, at in ends)
            missed = sum(at is None and reply.is_cut for reply, at in ends)
            mean = sum(stops) / len(stops) if stops else 0.0
            print(f"{temperature:11g} {repeats:6} {tokens:3} {len(own):8} {len(stops):8}", end=" ")
            print(f"{mean:13.0f} {cut:22} {missed:25}")
    print("\nthreshold  mistakes on texts that repeat for good reasons")
    texts = {name: tokenizer(text, add_special_tokens=False)["input_ids"] for name, text in legitimate_texts().items()}
    for repeats, tokens in THRESHOLDS:
        wrong = [name for name, ids in texts.items() if stopped_at(ids, repeats, tokens) is not None]
        print(f"{repeats:5} {tokens:3}  {len(wrong)} of {len(texts)}  {', '.join(wrong)}")


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default="default")
    parser.add_argument("--temperature", type=float, action="append", help="may be repeated (default: 0, 0.2, 0.7)")
    parser.add_argument("--penalty", type=float, default=1.0, help="repetition_penalty (default: 1)")
    parser.add_argument("--dry", type=float, default=0.0, help="dry_multiplier (default: 0)")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--kept", type=Path, help="file for the token ids: replies in it are not decoded again")
    args = parser.parse_args()
    kept: Path | None = args.kept
    found = [Reply(**each) for each in json.loads(kept.read_text())] if kept is not None and kept.exists() else []
    settings = Settings(
        model=args.model, top_p=0.9, repetition_penalty=args.penalty, dry_multiplier=args.dry, max_new_tokens=512
    )
    for temperature in args.temperature or (0.0, 0.2, 0.7):
        if all(reply.temperature != temperature for reply in found):
            found += replies(temperature, args.seeds, settings)
            if kept is not None:
                kept.write_text(json.dumps([vars(reply) for reply in found]))
    report(found, load_from_settings(settings).tokenizer)


if __name__ == "__main__":
    main()
