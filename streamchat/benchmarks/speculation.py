"""`streamchat bench --speculative`: decode speed with and without speculation, on text that repeats and on prose."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, replace

from streamchat.base.devices import device_type
from streamchat.base.errors import ConfigError
from streamchat.base.formatting import plural
from streamchat.base.progress import Progress
from streamchat.benchmarks.loading import about, heading, load_in_thread
from streamchat.config.loader import Configuration
from streamchat.config.settings import Settings, Speculation, default_of
from streamchat.conversation.assemble import assemble
from streamchat.conversation.conversation import Conversation
from streamchat.conversation.generation import TurnOutcome
from streamchat.models.load import LoadedModel
from streamchat.reports.page import Page, Table

REPLY_TOKENS = 192
"""Maximum tokens per reply."""
CODE = """def total_price(items, tax_rate):
    total = 0.0
    for item in items:
        total += item["price"] * item["count"]
    return total * (1 + tax_rate)


def average_price(items):
    if not items:
        return 0.0
    total = 0.0
    for item in items:
        total += item["price"]
    return total / len(items)
"""
PARAGRAPH = (
    "The harbor was quiet before sunrise. Three fishing boats lay against the stone pier, and a man in a yellow coat "
    "walked from one to the next, checking the ropes. He did not hurry. The tide would not turn for another hour, and "
    "the wind had not yet decided where it wanted to go."
)
TEXTS = {
    "text that repeats": (
        f"Repeat this code, with the name cost instead of price:\n\n```python\n{CODE}```",
        "Add a comment above each function, and show the whole code again.",
        f"Repeat this paragraph word for word:\n\n{PARAGRAPH}",
        "Repeat the paragraph again, but with a blue coat.",
    ),
    "prose": (
        "Tell me a short story about a lighthouse keeper and a dog that swam ashore.",
        "Explain why the sky is blue.",
        "What should I consider when I plant a vegetable garden?",
        "Describe a day in the life of a baker.",
    ),
}
"""Kind of text -> messages of one conversation."""
MODES: tuple[Speculation, ...] = ("off", "auto")
"""Values of the setting `speculation` that are compared."""


@dataclass
class SpeculationFigures:
    """Decode speed for one kind of text, without and with speculation; the replies alternate."""

    text: str
    temperature: float
    tokens: int
    """Tokens timed with speculation."""
    plain_tps: float
    """Tokens per second without speculation."""
    tps: float
    """Tokens per second with speculation."""
    speedup: float
    proposed: int
    accepted: int
    same_replies: int
    """Replies that are the same text in both modes; forwards of several tokens round differently."""
    replies: int


def run(args: argparse.Namespace, configuration: Configuration, progress: Progress) -> Page:
    """Measure speculation on the CPU.

    Raises:
        ConfigError: Another device is set, or the model has no short path for several tokens.
        ModelError: The model cannot be loaded, or cannot stream.
    """
    settings = configuration.settings
    if device_type(settings.device) not in ("auto", "cpu"):
        raise ConfigError(f"--speculative measures the CPU and device = {settings.device}; add --device cpu")
    on_cpu = replace(configuration, settings=replace(settings, device="cpu"))
    loaded = load_in_thread(on_cpu, progress)
    chats = _chats(on_cpu, loaded)
    if not chats["auto"].speculator.is_supported:
        raise ConfigError(
            f"speculation needs compiled kernels that serve all of {loaded.name}, and it has none; `streamchat doctor` "
            "says why"
        )
    figures = []
    for temperature in (0.0, float(default_of("temperature"))):
        for name in TEXTS:
            progress(f"Decoding {name} at temperature {temperature:g}")
            figures.append(measure(chats, name, temperature, args.rounds))
    lines = heading(loaded, f"cache_size {settings.cache_size:,}", plural(args.rounds, "round"))
    data = about("bench", loaded) | {"figures": [asdict(each) for each in figures]}
    return Page("bench-speculation", "Speculation", lines, [_table(figures)], notes=[*loaded.notes], data=data)


def _chats(configuration: Configuration, loaded: LoadedModel) -> dict[str, Conversation]:
    """Return a conversation for each of `MODES`, on one model and without its hook."""
    chats: dict[str, Conversation] = {}
    for mode in MODES:
        settings = replace(configuration.settings, speculation=mode, max_new_tokens=REPLY_TOKENS)
        made = assemble(replace(configuration, settings=settings), loaded, lambda event: None, lambda *_: None)
        chats[mode] = made.conversation
        made.conversation.close()
    return chats


def measure(chats: dict[str, Conversation], text: str, temperature: float, rounds: int) -> SpeculationFigures:
    """Have the conversation about `text` in both modes, one reply each in turn, with the seed of each round.

    Args:
        chats: A conversation for each of `MODES`, without its hook.
        text: A key of `TEXTS`.
        temperature: That of the sampling; other settings have their defaults.
        rounds: Number of conversations.
    """
    seconds, tokens = dict.fromkeys(chats, 0.0), dict.fromkeys(chats, 0)
    proposed = accepted = same = 0
    for number in range(rounds):
        for chat in chats.values():
            _start(chat, replace(chat.settings, temperature=temperature, seed=number))
        for at, message in enumerate(TEXTS[text], number):
            outcomes = {mode: _reply(chats[mode], message) for mode in MODES[:: 1 if at % 2 else -1]}
            for mode, outcome in outcomes.items():
                if outcome.speed.decode_tps:
                    tokens[mode] += outcome.new_tokens - 1
                    seconds[mode] += (outcome.new_tokens - 1) / outcome.speed.decode_tps
            same += len({outcome.reply for outcome in outcomes.values()}) == 1
        proposed += chats["auto"].speculator.proposed
        accepted += chats["auto"].speculator.accepted
    plain, with_it = (tokens[mode] / seconds[mode] if seconds[mode] else 0.0 for mode in MODES)
    speedup = with_it / plain if plain else 0.0
    count = rounds * len(TEXTS[text])
    return SpeculationFigures(
        text, temperature, tokens["auto"], plain, with_it, speedup, proposed, accepted, same, count
    )


def _start(chat: Conversation, settings: Settings) -> None:
    chat.settings = settings
    chat.reopen()
    try:
        chat.start_over(chat.encoder.format)
        chat.reseed()
    finally:
        chat.close()


def _reply(chat: Conversation, message: str) -> TurnOutcome:
    chat.reopen()
    try:
        return chat.run_turn(message, lambda: False)
    finally:
        chat.close()


def _table(figures: list[SpeculationFigures]) -> Table:
    rows = [
        (
            each.text,
            f"{each.temperature:g}",
            f"{each.plain_tps:.0f}",
            f"{each.tps:.0f}",
            f"{each.speedup:.2f} x",
            f"{each.accepted:,} of {each.proposed:,}",
            f"{each.same_replies} of {each.replies}",
        )
        for each in figures
    ]
    columns = ("", "temperature", "tok/s without", "tok/s", "speedup", "accepted", "same replies")
    return Table("Decoding without and with speculation", columns, rows)
