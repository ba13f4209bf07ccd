"""`streamchat ppl`: perplexity of texts under several methods."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from streamchat.base.devices import device_type
from streamchat.base.errors import ConfigError, ExitCode
from streamchat.base.formatting import plural
from streamchat.benchmarks.loading import about, heading
from streamchat.benchmarks.methods.registry import SCORED, Method, parse_methods
from streamchat.cli import flags
from streamchat.cli.loading import loading_line
from streamchat.cli.output import add_output_flags, output_folder, print_page
from streamchat.cli.scoring import add_methods_flag, add_text_flags, default_chunk, require_at_least, summaries

if TYPE_CHECKING:
    from streamchat.benchmarks.texts import Document, Tokens
    from streamchat.models.load import LoadedModel

DEFAULT_METHODS = "dense,sinks,window,no-rerotation"
DEFAULT_TOKENS = 4096

HELP = "measure perplexity of texts under several ways to handle the cache"
DESCRIPTION = (
    f"Score texts token by token, each conditioned on the cached tokens, under each method: {summaries(SCORED)}."
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    names = ("model", "adapter", "device", "dtype", "attention", "weights", "kernels", "kv_dtype", "num_sink_tokens")
    flags.add_setting_flags(parser, names)
    own = parser.add_argument_group("perplexity")
    add_text_flags(parser, own, DEFAULT_TOKENS, by_device=True)
    add_methods_flag(own, DEFAULT_METHODS, "NAME[:BUDGET[:SINKS]],...", SCORED)
    own.add_argument(
        "--cache-size", default="512", metavar="TOKENS", help="budget of methods that do not name one (default: 512)"
    )
    own.add_argument("--segment", type=int, default=0, metavar="N", help="tokens per row of the table (default: 1/8)")
    add_output_flags(own)


def run(args: argparse.Namespace) -> int:
    """Run the command and return the exit code.

    Raises:
        ConfigError: A method, size or file is invalid, or the run would not fit into memory.
        ModelError: The model cannot be loaded, or cannot stream.
    """
    from streamchat.benchmarks.texts import read_documents

    configuration = flags.configuration_of(args)
    settings = configuration.settings
    require_at_least(args, max_tokens=0, chunk=1, segment=0)
    methods = parse_methods(args.methods, settings.cache_size, settings.num_sink_tokens)
    documents = read_documents(args.files)
    folder = output_folder(args)
    with loading_line() as progress:
        from streamchat.models.load import load_from_settings

        # methods are compared on the original model and cache unless quantized ones are requested
        weights = settings.weights if configuration.is_explicit("weights") else "native"
        kv_dtype = settings.kv_dtype if configuration.is_explicit("kv_dtype") else "native"
        loaded = load_from_settings(settings, progress, weights=weights, kv_dtype=kv_dtype)
        progress("Reading the texts")
        tokens, notes = _tokens(documents, loaded, args.max_tokens)
    return _score(args, loaded, tokens, methods, [*loaded.notes, *notes], folder)


def _tokens(documents: Sequence[Document], loaded: LoadedModel, most: int) -> tuple[list[Tokens], list[str]]:
    """Return the documents that can be scored, and notes about the others."""
    from streamchat.benchmarks.texts import tokenize

    tokens: list[Tokens] = []
    notes: list[str] = []
    short: list[str] = []
    for document in documents:
        notes += document.notes
        found = tokenize(document, loaded.tokenizer, most)
        if len(found.ids) < 2:
            short.append(document.name)
        else:
            tokens.append(found)
    if not tokens:
        raise ConfigError(f"nothing to score: {', '.join(short)} has fewer than two tokens")
    if short:
        notes.append(f"Not scored, with fewer than two tokens: {', '.join(short)}.")
    return tokens, notes


def _score(
    args: argparse.Namespace,
    loaded: LoadedModel,
    tokens: list[Tokens],
    methods: list[Method],
    notes: list[str],
    folder: Any,
) -> int:
    from streamchat.benchmarks import perplexity as ppl
    from streamchat.benchmarks.memory_estimate import check_memory
    from streamchat.benchmarks.perplexity_page import make_page
    from streamchat.cache.context import context_length
    from streamchat.cli.progress_bar import Bar
    from streamchat.models.checked_fit import choose_checked_fit
    from streamchat.models.quiet import quiet
    from streamchat.quantization.linear import always_quantized

    model, chunk = loaded.model, args.chunk or default_chunk(loaded.device)
    longest = max(len(each.ids) for each in tokens)
    with quiet():
        fit = choose_checked_fit(model)
        check_memory(methods, longest, loaded, chunk)
    context = context_length(model.config)
    if context is not None and longest > context and any(method.kind == "dense" for method in methods):
        notes.append(f"{loaded.name} was trained for {context:,} tokens; dense exceeds that from token {context:,} on.")
    work = sum(len(each.ids) for each in tokens) * len(methods)
    results: list[ppl.ScoredDocument] = []
    code = ExitCode.OK
    try:
        # larger chunks would use the native weights
        with quiet(), always_quantized(model), Bar(sys.stderr, work) as bar:
            scored = ppl.score_all(
                model,
                fit,
                tokens,
                methods,
                chunk,
                lambda method, document, count: bar.advance(f"{method.name}, {document.name}", count),
            )
            results.extend(scored)
    except KeyboardInterrupt:
        if not results:
            raise
        code = ExitCode.INTERRUPTED
        notes.append("Stopped early: missing methods and documents were not finished.")
    notes += _unscorable(results)
    why = "" if args.chunk else f" (default on {device_type(loaded.device)})"
    lines = heading(loaded, f"{plural(chunk, 'token')} per forward pass for bounded methods{why}")
    data = about("ppl", loaded, chunk=chunk)
    size = args.segment or ppl.default_segment(longest)
    print_page(make_page(results, ppl.segments(longest, size), data, lines, notes), args, folder)
    return code


def _unscorable(results: Sequence[Any]) -> list[str]:
    return [
        f"{result.method.name}, {result.document.name}: {result.scores.unscorable:,} tokens could not be scored (out "
        "of positions, or the model returned NaN or inf)."
        for result in results
        if result.scores.unscorable
    ]
