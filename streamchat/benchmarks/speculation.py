"""`streamchat bench --speculative`: decode speed with and without speculation, on text that repeats and on prose."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

import torch

from streamchat.base import events as ev
from streamchat.base.devices import device_type
from streamchat.base.errors import ConfigError, StreamchatError
from streamchat.base.formatting import plural
from streamchat.base.progress import Progress
from streamchat.benchmarks.attached import attached
from streamchat.benchmarks.decode import Clock
from streamchat.benchmarks.loading import about, heading
from streamchat.config.loader import Configuration
from streamchat.config.settings import Speculation, default_of
from streamchat.conversation.assemble import assemble
from streamchat.models.load import LoadedModel, load_from_settings
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
        StreamchatError: A reply failed, or no reply has a token.
    """
    settings = configuration.settings
    if device_type(settings.device) not in ("auto", "cpu"):
        raise ConfigError(f"--speculative measures the CPU and device = {settings.device}; add --device cpu")
    before = torch.get_num_threads()
    torch.set_num_threads(args.threads or before)
    try:
        return _page(args, replace(configuration, settings=replace(settings, device="cpu")), progress)
    finally:
        torch.set_num_threads(before)


def _page(args: argparse.Namespace, configuration: Configuration, progress: Progress) -> Page:
    loaded = load_from_settings(configuration.settings, progress)
    clock = time.thread_time if args.cpu_time else time.perf_counter
    chats = {mode: TimedChat(configuration, loaded, mode, clock) for mode in MODES}
    if not chats["auto"].conversation.speculator.is_supported:
        raise ConfigError(
            f"speculation needs compiled kernels that serve all of {loaded.name}, and it has none; `streamchat doctor` "
            "says why"
        )
    figures = []
    for temperature in (0.0, float(default_of("temperature"))):
        for name in TEXTS:
            progress(f"Decoding {name} at temperature {temperature:g}")
            figures.append(measure(chats, name, temperature, args.rounds))
    sizes = f"cache_size {configuration.settings.cache_size:,}", plural(args.rounds, "round")
    lines = heading(loaded, *sizes, *["CPU time"] * args.cpu_time)
    data = about("bench", loaded) | {"figures": [asdict(each) for each in figures]}
    return Page("bench-speculation", "Speculation", lines, [_table(figures)], notes=[*loaded.notes], data=data)


class TimedChat:
    """A conversation whose decoding is timed; its hook is on the model only while it runs.

    Args:
        configuration: The settings.
        loaded: The model, which several conversations share.
        mode: Value of the setting `speculation`.
        clock: Returns seconds.
    """

    def __init__(self, configuration: Configuration, loaded: LoadedModel, mode: Speculation, clock: Clock) -> None:
        settings = replace(configuration.settings, speculation=mode, max_new_tokens=REPLY_TOKENS, loop_guard="off")
        own = replace(configuration, settings=settings)
        self.conversation = assemble(own, loaded, self._hear, lambda *_: None).conversation
        self.conversation.speculator.clock = self._clock = clock
        self.name = loaded.name
        self._decoding_since = 0.0
        self.tokens, self.seconds = 0, 0.0
        """Decoded in all replies."""
        self.conversation.close()

    def _hear(self, event: ev.Event) -> None:
        if isinstance(event, ev.PrefillProgress) and event.done == event.total:
            self._decoding_since = self._clock()

    def start_over(self, temperature: float, seed: int) -> None:
        """Clear the conversation, and sample with these settings."""
        chat = self.conversation
        chat.settings = replace(chat.settings, temperature=temperature, seed=seed)
        with attached(self.conversation):
            chat.start_over(chat.encoder.format)
            chat.reseed()

    def reply(self, message: str) -> str:
        """Decode a reply, and add its tokens and seconds."""
        with attached(self.conversation):
            outcome = self.conversation.run_turn(message, lambda: False)
        self.tokens += outcome.new_tokens
        self.seconds += self._clock() - self._decoding_since
        return outcome.reply


def measure(chats: Mapping[Speculation, TimedChat], text: str, temperature: float, rounds: int) -> SpeculationFigures:
    """Have the conversation about `text` in both modes, one reply each in turn, with the seed of each round.

    Args:
        chats: A conversation for each of `MODES`.
        text: A key of `TEXTS`.
        temperature: That of the sampling; other settings have their defaults.
        rounds: Number of conversations.

    Raises:
        StreamchatError: No reply has a token.
    """
    proposed = accepted = same = 0
    for chat in chats.values():
        chat.tokens, chat.seconds = 0, 0.0
    for number in range(rounds):
        for chat in chats.values():
            chat.start_over(temperature, number)
        for at, message in enumerate(TEXTS[text], number):
            same += len({chats[mode].reply(message) for mode in MODES[:: 1 if at % 2 else -1]}) == 1
        speculator = chats["auto"].conversation.speculator
        proposed, accepted = proposed + speculator.proposed, accepted + speculator.accepted
    if not all(chat.tokens for chat in chats.values()):
        name = chats["auto"].name
        raise StreamchatError(f"{name} ended all replies to {text} before their first token; try another --model")
    plain, speculative = (chats[mode].tokens / max(chats[mode].seconds, 1e-9) for mode in MODES)
    return SpeculationFigures(
        text=text,
        temperature=temperature,
        tokens=chats["auto"].tokens,
        plain_tps=plain,
        tps=speculative,
        speedup=speculative / plain,
        proposed=proposed,
        accepted=accepted,
        same_replies=same,
        replies=rounds * len(TEXTS[text]),
    )


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
