"""Checks and measures streamchat on one GPU in less than ten minutes: `python -m tools.gpu_check --out FOLDER`.

Runs the tests marked `gpu`, `doctor`, `verify`, `bench --gpu`, `ppl` and the measurements below, each in a process with
a time limit, and writes what each prints to FOLDER. The last lines are a summary. The default model must be here:
without network, run `streamchat models fetch default` elsewhere and set STREAMCHAT_HOME.

`--chat` is one of the measurements: a chat of many turns, whose messages have ever new lengths. It prints one JSON
object: time to first token, speed of decoding, growth of host memory, prefill by chunk size, reserved memory. The bytes
that each recorded step took are on stderr.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from streamchat.cache.hook import StreamingHook
from streamchat.cache.positions.strategy import choose_fit, make_cache
from streamchat.cache.token_ids import random_ids
from streamchat.config.loader import Configuration
from streamchat.config.settings import Settings
from streamchat.conversation.assemble import assemble
from streamchat.conversation.chunk_size import ChunkSize
from streamchat.conversation.feeder import Feeder
from streamchat.conversation.log import TokenLog
from streamchat.models.load import LoadedModel, load_model
from streamchat.replay.trend import trend
from streamchat.telemetry.memory import memory_state

CHUNKS = (256, 512, 1024)
PREFILL = 2048
"""Tokens of a prompt whose speed is measured."""
STREAMCHAT = (sys.executable, "-m", "streamchat")


def steps(model: str, device: str, turns: int) -> dict[str, tuple[int, list[str]]]:
    """Return the commands by name, with their time limits in seconds."""
    chosen = ["--model", model, "--device", device]
    sizes = ["--cache-size", str(PREFILL), "--rounds", "2", "--until", "20000"]
    this = [sys.executable, "-m", "tools.gpu_check", "--chat", *chosen, "--turns", str(turns)]
    return {
        "doctor": (30, [*STREAMCHAT, "doctor", *chosen]),
        "tests": (180, [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/gpu"]),
        "chat": (120, this),
        "bench": (120, [*STREAMCHAT, "bench", "--gpu", *chosen, *sizes, "--json"]),
        "ppl": (60, [*STREAMCHAT, "ppl", *chosen, "--methods", "dense,sinks", "--max-tokens", "4096", "--json"]),
        "verify": (80, [*STREAMCHAT, "verify", *chosen]),
    }


def main() -> int:
    """Run all steps, or measure the chat; return 1 if a step failed."""
    parser = argparse.ArgumentParser(prog="tools.gpu_check", description="Check and measure streamchat on one GPU.")
    parser.add_argument("--out", type=Path, default=Path("gpu-check"), help="folder for what the steps print")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="run these steps")
    parser.add_argument("--chat", action="store_true", help="measure a chat in this process")
    parser.add_argument("--model", default="default", help="the model (default: the bundled one)")
    parser.add_argument("--device", default="cuda", help="where it runs (default: cuda)")
    parser.add_argument("--turns", type=int, default=200, help="turns of the chat (default: 200)")
    args = parser.parse_args()
    if args.chat:
        logging.basicConfig(format="%(message)s")
        logging.getLogger("streamchat.decode").setLevel(logging.INFO)
        print(json.dumps(measure_chat(load_model(args.model, device=args.device), args.turns)))
        return 0
    everything = steps(args.model, args.device, args.turns)
    chosen = {name: step for name, step in everything.items() if args.only is None or name in args.only}
    return run_steps(chosen, args.out)


def run_steps(chosen: dict[str, tuple[int, list[str]]], out: Path) -> int:
    """Run the steps one after the other, also after a failure; print a summary and return 1 if a step failed."""
    out.mkdir(parents=True, exist_ok=True)
    summary = []
    for name, (limit, command) in chosen.items():
        started, file = time.perf_counter(), out / f"{name}.txt"
        print(f"==> {name}: {' '.join(command)}", flush=True)
        try:
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=limit, check=False
            )
            text, result = done.stdout, "ok" if done.returncode == 0 else f"exit code {done.returncode}"
        except subprocess.TimeoutExpired as error:
            printed = error.stdout or b""
            text = printed.decode(errors="replace") if isinstance(printed, bytes) else printed
            result = f"stopped after {limit} s"
        file.write_text(text, encoding="utf-8")
        print("\n".join(text.splitlines()[-25:]), flush=True)
        summary.append((name, result, time.perf_counter() - started))
    print("\n==> summary")
    for name, result, seconds in summary:
        print(f"{name:8} {result:22} {seconds:6.1f} s")
    return 0 if all(result == "ok" for _, result, _ in summary) else 1


@torch.inference_mode()
def measure_chat(loaded: LoadedModel, turns: int) -> dict[str, Any]:
    """Measure a chat of `turns` turns, whose messages have 10 to 60 words or, each eighth, up to 400."""
    settings = Settings(temperature=0, cache_size=PREFILL, max_new_tokens=32)
    made = assemble(Configuration(settings, {"cache_size": "flag"}), loaded, lambda _: None, lambda *_: None)
    chat, lengths = made.conversation, random.Random(3)
    before = memory_state(loaded.device)
    first_token: dict[str, list[float]] = {"first quarter": [], "later": []}
    decode: list[float] = []
    host: list[float] = []
    for turn in range(turns):
        words = lengths.randrange(60, 400) if turn % 8 == 7 else lengths.randrange(10, 60)
        outcome = chat.run_turn("word " * words, lambda: False)
        chat.record_steps()
        if outcome.speed.ttft_s is not None and turn % 8 != 7:
            first_token["first quarter" if turn < turns // 4 else "later"].append(1000 * outcome.speed.ttft_s)
        if outcome.speed.decode_tps:
            decode.append(outcome.speed.decode_tps)
        host.append(memory_state(loaded.device).rss_bytes)
    after, found = memory_state(loaded.device), trend(host[turns // 2 :])
    chat.close()
    step = getattr(loaded.model.forward, "step", None)
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else loaded.device,
        "torch": torch.__version__,
        "turns": turns,
        "ttft_ms": {part: statistics.median(values) if values else None for part, values in first_token.items()},
        "decode_tps": statistics.median(decode) if decode else None,
        "host_bytes": [host[0], host[turns // 2], host[-1]],
        "host_bytes_per_turn": None if found is None else [found.change / found.count, found.low / found.count],
        "reserved_bytes": [before.reserved_bytes, after.reserved_bytes],
        "disabled_steps": str(getattr(step, "failed", "")),
        "prefill_tps": {chunk: prefill_speed(loaded, chunk) for chunk in CHUNKS},
        "first_chunks_ms": first_chunks(loaded),
    }


class FixedChunk(ChunkSize):
    """A chunk size that is not adjusted."""

    def __init__(self, device_type: str, size: int) -> None:
        super().__init__(device_type)
        self.largest, self._settled = size, True


def an_empty_feeder(loaded: LoadedModel) -> Feeder:
    """Return a feeder for an empty cache."""
    cache = make_cache(loaded.model, choose_fit(loaded.model), cache_size=PREFILL, num_sink_tokens=4)
    return Feeder(loaded.model, cache, TokenLog())


def a_prompt(loaded: LoadedModel) -> list[int]:
    """Return `PREFILL` ids."""
    return [int(token) for token in random_ids(loaded.model, PREFILL, seed=2)[0]]


def prefill_speed(loaded: LoadedModel, chunk: int) -> float:
    """Return the tokens per second of a prompt of `PREFILL` tokens in chunks of that size; the best of four."""
    best, ids = 0.0, a_prompt(loaded)
    for _ in range(4):
        feeder = an_empty_feeder(loaded)
        feeder.chunk_size = FixedChunk(feeder.device.type, chunk)
        with StreamingHook(loaded.model, feeder.cache):
            started = time.perf_counter()
            feeder.feed(ids).argmax().item()
            best = max(best, PREFILL / (time.perf_counter() - started))
    return best


def first_chunks(loaded: LoadedModel) -> list[float]:
    """Return the milliseconds of each chunk of a first long prompt, with the sizes that a chat would choose."""
    feeder, stamps, ids = an_empty_feeder(loaded), list[float](), a_prompt(loaded)
    with StreamingHook(loaded.model, feeder.cache):
        feeder.feed(ids, lambda done: stamps.append(time.perf_counter()))
    return [round(1000 * (later - earlier), 1) for earlier, later in itertools.pairwise(stamps)]


if __name__ == "__main__":
    sys.exit(main())
