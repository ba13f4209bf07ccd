"""`streamchat ppl`: perplexity of texts under several cache policies."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from streamchat.base.errors import ConfigError, ExitCode
from streamchat.base.eviction_policies import describe_policies
from streamchat.benchmarks.policies import KINDS, TURN_TOKENS
from streamchat.cli import flags
from streamchat.cli.loading import loading_line
from streamchat.cli.output import add_output_flags, print_page
from streamchat.cli.scoring import add_text_flags, require_at_least

if TYPE_CHECKING:
    from streamchat.benchmarks.texts import Document, Tokens
    from streamchat.cli.flags import Subparsers
    from streamchat.models.load import LoadedModel

DEFAULT_POLICIES = "dense,sinks,window,no-rerotation"
DEFAULT_TOKENS = 4096


def add_parser(subparsers: Subparsers[Any]) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "ppl",
        help="measure perplexity of texts under several cache policies",
        description="Score texts token by token, each conditioned on the cached tokens, under each policy: dense (a "
        "growing cache), window (the latest tokens), sinks (attention sinks and the latest tokens, as in streamchat), "
        "no-rerotation (the same tokens without correcting positions, the classic mistake), recompute (prefill of the "
        "latest tokens without a cache), or an eviction policy of the setting evict, for which the text is cut into "
        f"turns of {TURN_TOKENS} tokens: {describe_policies()}.",
    )
    flags.add_setting_flags(parser, ("model", "device", "dtype", "attention", "weights", "kernels", "num_sink_tokens"))
    own = parser.add_argument_group("perplexity")
    add_text_flags(parser, own, DEFAULT_TOKENS)
    own.add_argument(
        "--policies",
        default=DEFAULT_POLICIES,
        metavar="LIST",
        help=f"KIND[:BUDGET[:SINKS]],... of {', '.join(KINDS)} (default: {DEFAULT_POLICIES})",
    )
    own.add_argument(
        "--cache-size", default="512", metavar="TOKENS", help="budget of policies that do not name one (default: 512)"
    )
    own.add_argument("--segment", type=int, default=0, metavar="N", help="tokens per row of the table (default: 1/8)")
    add_output_flags(own)


def run(args: argparse.Namespace) -> int:
    """Run the command and return the exit code.

    Raises:
        ConfigError: A policy, size or file is invalid, or the run would not fit into memory.
        ModelError: The model cannot be loaded, or cannot stream.
    """
    from streamchat.benchmarks.policies import parse_policies
    from streamchat.benchmarks.texts import read_documents
    from streamchat.reports.page import prepare_folder

    configuration = flags.configuration_of(args)
    settings = configuration.settings
    require_at_least(args, max_tokens=0, chunk=1, segment=0)
    policies = parse_policies(args.policies, settings.cache_size, settings.num_sink_tokens)
    documents = read_documents(args.files)
    folder = None if args.out is None else prepare_folder(args.out)
    with loading_line() as progress:
        progress("Starting torch")

        from streamchat.models.load import load_model

        loaded = load_model(
            settings.model,
            device=settings.device,
            dtype=settings.dtype,
            attention=settings.attention,
            # policies are compared on the original model unless quantized weights are requested
            weights=settings.weights if configuration.is_explicit("weights") else "native",
            kernels=settings.kernels,
            progress=progress,
        )
        progress("Reading the texts")
        tokens, notes = _tokens(documents, loaded, args.max_tokens)
    return _score(args, loaded, tokens, policies, [*loaded.notes, *notes], folder)


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
    policies: list[Any],
    notes: list[str],
    folder: Any,
) -> int:
    from streamchat.benchmarks import perplexity as ppl
    from streamchat.benchmarks.memory_estimate import measure_cost, require_memory
    from streamchat.benchmarks.perplexity_page import make_page
    from streamchat.cache.context import context_length
    from streamchat.cli.progress_bar import Bar
    from streamchat.models.checked_fit import choose_checked_fit
    from streamchat.models.device import free_memory
    from streamchat.models.quiet import quiet
    from streamchat.quantization.linear import always_quantized

    model = loaded.model
    longest = max(len(each.ids) for each in tokens)
    attention = str(model.config._attn_implementation)
    with quiet():
        fit = choose_checked_fit(model)
        require_memory(
            policies, longest, measure_cost(model), args.chunk, attention == "eager", free_memory(loaded.device)
        )
    context = context_length(model.config)
    if context is not None and longest > context and any(policy.kind == "dense" for policy in policies):
        notes.append(f"{loaded.name} was trained for {context:,} tokens; dense exceeds that from token {context:,} on.")
    work = sum(len(each.ids) for each in tokens) * len(policies)
    results: list[ppl.ScoredDocument] = []
    stopped = False
    try:
        # larger chunks would use the native weights
        with quiet(), always_quantized(model), Bar(sys.stderr, work) as bar:
            scored = ppl.score_all(
                model,
                fit,
                tokens,
                policies,
                args.chunk,
                lambda policy, document, count: bar.advance(f"{policy.name}, {document.name}", count),
            )
            results.extend(scored)
    except KeyboardInterrupt:
        stopped = True
    if stopped:
        if not results:
            raise KeyboardInterrupt
        notes.append("Stopped early: missing policies and documents were not finished.")
    notes += _unscorable(results)
    about = {
        "command": "ppl",
        "model": loaded.name,
        "source": loaded.source,
        "device": loaded.device,
        "dtype": loaded.dtype,
        "weights": loaded.weights,
        "attention": attention,
        "chunk": args.chunk,
    }
    precision = f", {loaded.weights} weights" if loaded.weights != "native" else ""
    where = f"{loaded.name}, {loaded.dtype} on {loaded.device}{precision}"
    heading = f"{where}, {args.chunk} tokens per forward pass for bounded policies"
    size = args.segment or ppl.default_segment(longest)
    print_page(make_page(results, ppl.segments(longest, size), about, heading, notes), args, folder)
    return ExitCode.INTERRUPTED if stopped else ExitCode.OK


def _unscorable(results: Sequence[Any]) -> list[str]:
    return [
        f"{result.policy.name}, {result.document.name}: {result.scores.unscorable:,} tokens could not be scored (out "
        "of positions, or the model returned NaN or inf)."
        for result in results
        if result.scores.unscorable
    ]
