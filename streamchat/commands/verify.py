"""`streamchat verify`: check on a model that the cache shrinks and the output stays correct."""

from __future__ import annotations

import argparse

from streamchat.base.errors import ConfigError, ExitCode
from streamchat.cli import flags
from streamchat.cli.loading import loading_line
from streamchat.cli.output import add_output_flags, output_folder, print_page

PITFALL_BUDGETS = 4
"""Length of the text scored with `--show-pitfalls`, in multiples of the budget."""

HELP = "verify on a model that the cache shrinks and the output stays correct"
DESCRIPTION = (
    "Run the model in three ways (plain loop, loop with eviction, generate() in a StreamingPress), "
    "read back the length of every layer after each step, and check lengths, memory, counters, and logits "
    "against a slow reference. Exit code 0 if all checks hold, 4 if one does not."
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    names = ("model", "adapter", "device", "attention", "kernels", "decode", "kv_dtype", "num_sink_tokens")
    flags.add_setting_flags(parser, names)
    own = parser.add_argument_group("verification")
    own.add_argument("--cache-size", default="64", metavar="TOKENS", help="budget to verify with (default: 64)")
    own.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="dtype; 16-bit dtypes are compared within their own rounding (default: float32)",
    )
    own.add_argument(
        "--new-tokens", type=int, metavar="N", help="tokens to generate (default: enough to fill the budget, plus 64)"
    )
    own.add_argument(
        "--show-pitfalls", action="store_true", help="also run the two classic mistakes and print their perplexity"
    )
    own.add_argument("--all-steps", action="store_true", help="print every step, not only the informative ones")
    add_output_flags(own, json_help="one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    """Run the command and return the exit code.

    Raises:
        ConfigError: The sizes are impossible.
        ModelError: The model cannot be loaded, or cannot stream.
    """
    configuration = flags.configuration_of(args)
    settings = configuration.settings
    _check_sizes(settings.cache_size, settings.num_sink_tokens, args.new_tokens)
    folder = output_folder(args)
    with loading_line() as progress:
        from streamchat.benchmarks.pitfalls import run_pitfalls
        from streamchat.models.load import load_from_settings
        from streamchat.models.quiet import quiet
        from streamchat.verify.report import make_page
        from streamchat.verify.run import verify
        from streamchat.verify.text import help_topic_ids

        kv_dtype = settings.kv_dtype if configuration.is_explicit("kv_dtype") else "native"
        loaded = load_from_settings(settings, progress, weights="native", kv_dtype=kv_dtype)
        count = settings.cache_size * (PITFALL_BUDGETS if args.show_pitfalls else 1)
        ids = help_topic_ids(loaded.tokenizer, count)
        with quiet():
            result = verify(
                loaded.model,
                ids,
                cache_size=settings.cache_size,
                num_sink_tokens=settings.num_sink_tokens,
                new_tokens=args.new_tokens,
                progress=progress,
            )
            if args.show_pitfalls:
                progress("The classic mistakes")
                result.pitfalls = run_pitfalls(loaded.model, ids, result)
    model = {
        "name": loaded.name,
        "source": loaded.source,
        "device": loaded.device,
        "dtype": loaded.dtype,
        "cache_dtype": loaded.cache_dtype,
        "attention": str(loaded.model.config._attn_implementation),
    }
    print_page(make_page(result, model, all_steps=args.all_steps), args, folder, json_only=True)
    return ExitCode.OK if result.ok else ExitCode.CHECK_FAILED


def _check_sizes(cache_size: int, sinks: int, new_tokens: int | None) -> None:
    if sinks >= cache_size // 2:
        raise ConfigError(
            f"num_sink_tokens = {sinks} is too large for --cache-size {cache_size}; the cache size must be at least "
            f"{2 * sinks + 2}"
        )
    if new_tokens is not None and new_tokens < 1:
        raise ConfigError(f"--new-tokens {new_tokens} must be at least 1")
