"""`streamchat recall-bench`: the benefit and the cost of recalling evicted turns."""

from __future__ import annotations

import argparse

from streamchat.base.errors import ConfigError, ExitCode, short
from streamchat.base.formatting import parse_whole_number
from streamchat.cli import flags
from streamchat.cli.loading import loading_line
from streamchat.cli.output import add_output_flags, output_folder, print_page
from streamchat.cli.scoring import require_at_least

SETTINGS = (
    *("model", "adapter", "device", "dtype", "attention", "weights", "kernels"),
    *("cache_size", "num_sink_tokens", "evict", "kv_dtype", "recall_share"),
)
DISTANCES = "256,768,3000,10000,20000"
LEAST_DISTANCE = 64

HELP = "measure the benefit and the cost of recalling evicted turns"
DESCRIPTION = (
    "State five-digit numbers in a long chat, and ask for them later. Measures nats per digit and correct numbers if "
    "the turn stays evicted, is quoted as text, is recalled by hand (/retry N) or automatically (auto_recall = on), "
    "or is never evicted (dense); the rank of the correct turn among many, compared with BM25; and the cost in time "
    "to first token and in perplexity of ordinary chat. The files provide the turns in between: books, or chats in a "
    "format of `streamchat replay`. The turns of the ordinary chat are from the first file."
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    flags.add_setting_flags(parser, SETTINGS)
    parser.add_argument("files", nargs="+", metavar="FILE", help="books (.txt), or chats (.jsonl, .json)")
    own = parser.add_argument_group("recall-bench")
    own.add_argument("--facts", type=int, default=6, metavar="N", help="five-digit numbers to ask for (default: 6)")
    own.add_argument(
        "--distances",
        default=DISTANCES,
        metavar="LIST",
        help=f"tokens between a number and its question (default: {DISTANCES})",
    )
    own.add_argument(
        "--dense",
        type=int,
        default=3000,
        metavar="TOKENS",
        help="maximum distance to measure without eviction as well; 0 = none (default: 3000)",
    )
    own.add_argument("--ranked", type=int, default=200, metavar="N", help="questions per kind to rank (default: 200)")
    own.add_argument(
        "--chat-turns", type=int, default=100, metavar="N", help="turns of ordinary chat; 0 = none (default: 100)"
    )
    own.add_argument("--seed", type=int, default=1, metavar="N", help="seed of numbers and chats (default: 1)")
    add_output_flags(own)


def run(args: argparse.Namespace) -> int:
    """Run the command and return the exit code.

    Raises:
        ConfigError: An argument is wrong, or a file cannot be read.
        ModelError: The model cannot be loaded, or cannot stream.
    """
    require_at_least(args, facts=1, dense=0, ranked=1, chat_turns=0, seed=0)
    args.distances = _distances(args.distances)
    configuration, folder = flags.configuration_of(args), output_folder(args)
    with loading_line() as progress:
        from streamchat.benchmarks.recall.page import measure

        page = measure(args, configuration, progress)
    print_page(page, args, folder)
    return ExitCode.OK


def _distances(text: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    for word in words:
        number = parse_whole_number(word)
        if number is None or number < LEAST_DISTANCE:
            raise ConfigError(f"--distances: {short(word, 80)} must be a whole number, at least {LEAST_DISTANCE}")
    return sorted({int(word) for word in words})
