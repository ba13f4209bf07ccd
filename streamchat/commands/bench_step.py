"""The modes `--decode` and `--gpu` of `streamchat bench`: their flags, checks and models."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from streamchat.base.devices import device_type, is_spread
from streamchat.base.errors import ConfigError
from streamchat.cli.loading import Progress
from streamchat.config.loader import Configuration

if TYPE_CHECKING:
    from streamchat.models.load import LoadedModel

Result = tuple[dict[str, Any], str]
"""Figures for JSON, and the text of a measurement."""
UNTIL = 100_000
"""Default of `--until`."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `--decode` and `--gpu`."""
    group = parser.add_argument_group("decode step and GPU")
    kind = group.add_mutually_exclusive_group()
    kind.add_argument("--profile", action="store_true", help="with --decode: time per token by kind of operation")
    kind.add_argument(
        "--flat",
        type=int,
        metavar="TOKENS",
        help="with --decode: decode one reply of this length and compare its last tokens with early ones",
    )
    group.add_argument(
        "--threads", type=int, metavar="N", help="with --decode: number of threads (default: as in a chat)"
    )
    group.add_argument(
        "--cpu-time",
        action="store_true",
        help="with --decode --threads 1: count CPU time instead of elapsed time, for a busy machine",
    )
    group.add_argument(
        "--until",
        type=int,
        metavar="TOKENS",
        help=f"with --gpu: length of the stream over which memory is read (default: {UNTIL})",
    )


def check_flags(args: argparse.Namespace) -> None:
    """Check the flags of `--decode` and `--gpu`; raises ConfigError."""
    given = {"--profile": args.profile, "--flat": args.flat, "--threads": args.threads, "--cpu-time": args.cpu_time}
    for name, value in given.items():
        if value not in (None, False) and not args.decode:
            raise ConfigError(f"{name} needs --decode")
    if args.until is not None and not args.gpu:
        raise ConfigError("--until needs --gpu")
    if args.cpu_time and args.threads != 1:
        raise ConfigError("--cpu-time counts the time of one thread; add --threads 1")
    if args.cpu_time and args.profile:
        raise ConfigError("--cpu-time does not work with --profile; choose one")
    for name, value, least in (
        ("--threads", args.threads, 1),
        ("--until", args.until, 1),
        ("--new-tokens", args.new_tokens if args.decode or args.gpu else None, 2),
    ):
        if value is not None and value < least:
            raise ConfigError(f"{name} {value} must be at least {least}")


def measure_decode(args: argparse.Namespace, configuration: Configuration, progress: Progress) -> Result:
    """Measure the decode step on the CPU.

    Raises:
        ConfigError: Another device is set, or `--flat` is too short.
        ModelError: The model cannot be loaded, or cannot stream.
    """
    from streamchat.benchmarks import decode
    from streamchat.models.quiet import quiet

    settings = configuration.settings
    if device_type(settings.device) not in ("auto", "cpu"):
        raise ConfigError(f"--decode measures the CPU and device = {settings.device}; add --device cpu, or use --gpu")
    if args.flat is not None and args.flat < decode.MIN_FLAT:
        raise ConfigError(f"--flat {args.flat} must be at least {decode.MIN_FLAT}")
    with _torch_threads(args.threads), quiet():
        return _decode_figures(args, configuration, progress)


def _decode_figures(args: argparse.Namespace, configuration: Configuration, progress: Progress) -> Result:
    from streamchat.benchmarks import decode, decode_profile

    weights, tokens = configuration.settings.weights, args.rounds * args.new_tokens
    clock = time.thread_time if args.cpu_time else time.perf_counter
    loaded = _load_on("cpu", weights, configuration, progress)
    size, sinks = _cache_size(configuration, loaded), configuration.settings.num_sink_tokens
    evict = configuration.settings.evict
    if args.profile or args.flat:
        stream = decode.full_stream(loaded, cache_size=size, num_sink_tokens=sinks, evict=evict, clock=clock)
        heading = f"{loaded.name}, {loaded.dtype}, {loaded.weights} weights, {size:,} cached tokens"
        progress(f"Decoding {args.flat or tokens:,} tokens")
        if args.profile:
            parts = decode_profile.profile_token(stream, tokens)
            return {"ms": parts}, f"{heading}\n{decode_profile.as_text(parts)}"
        flat = decode.compare_ends(stream.decode(args.flat))
        return flat.as_dict(), f"{heading}\n{flat.as_text()}"
    native = _load_on("cpu", "native", configuration, progress)
    progress(f"Decoding {tokens:,} tokens in each of four configurations")
    figures = decode.measure_step(
        loaded,
        native,
        cache_size=size,
        num_sink_tokens=sinks,
        evict=evict,
        tokens=tokens,
        rounds=args.rounds,
        clock=clock,
    )
    return figures.as_dict(), f"{loaded.name}, {loaded.dtype}, {size:,} cached tokens\n{figures.as_text()}"


def measure_gpu(args: argparse.Namespace, configuration: Configuration, progress: Progress) -> Result:
    """Measure one GPU.

    Raises:
        ConfigError: There is no GPU, or another device or quantized weights are set.
        ModelError: The model cannot be loaded, or cannot stream.
        StreamchatError: The engine or `generate` failed.
    """
    settings = configuration.settings
    if settings.weights not in ("auto", "native"):
        raise ConfigError(f"--gpu measures native weights and weights = {settings.weights}; add --weights native")
    progress("Starting torch")
    device = _cuda_device(settings.device)

    from streamchat.benchmarks import gpu
    from streamchat.models.quiet import quiet

    loaded = _load_on(device, "native", configuration, progress)
    if is_spread(loaded.device):
        raise ConfigError(f"--gpu measures one GPU and the layers are on {loaded.device}; choose one with --device")
    with quiet():
        figures = gpu.measure(
            loaded,
            cache_size=_cache_size(configuration, loaded),
            num_sink_tokens=settings.num_sink_tokens,
            evict=settings.evict,
            tokens=args.new_tokens,
            rounds=args.rounds,
            until=UNTIL if args.until is None else args.until,
            progress=progress,
        )
    return figures.as_dict(), gpu.as_text(figures)


def _cuda_device(device: str) -> str:
    """Return the GPU for `--gpu`: the first one for `auto`.

    Raises:
        ConfigError: PyTorch finds no GPU, or the setting names another device.
    """
    import torch

    if not torch.cuda.is_available():
        raise ConfigError("--gpu measures a GPU and PyTorch finds none here; use --decode to measure the CPU")
    if device != "auto" and device_type(device) != "cuda":
        raise ConfigError(f"--gpu measures a GPU and device = {device}; add --device cuda")
    return "cuda" if device == "auto" else device


@contextmanager
def _torch_threads(count: int | None) -> Iterator[None]:
    """Have torch use `count` threads inside the block; None changes nothing."""
    import torch

    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _load_on(device: str, weights: str, configuration: Configuration, progress: Progress) -> LoadedModel:
    """Load the model with another device and weights than the settings name."""
    from streamchat.models.load import load_model

    settings = configuration.settings
    return load_model(
        settings.model,
        device=device,
        dtype=settings.dtype,
        attention=settings.attention,
        weights=weights,
        kernels=settings.kernels,
        progress=progress,
    )


def _cache_size(configuration: Configuration, loaded: LoadedModel) -> int:
    from streamchat.cache.context import context_length
    from streamchat.conversation.budget import resolve_cache_size

    return resolve_cache_size(configuration, context_length(loaded.model.config))[0]
