"""Measures a chat of many turns on one GPU, whose messages have ever new lengths: `python -m tools.gpu_chat`.

Prints one JSON object: time to first token, speed of decoding, growth of host memory per turn, speed of prefill by
chunk size, reserved memory. The bytes that each captured step took are on stderr. `tools.gpu_check` runs it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import random
import statistics
import sys
import time
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
from streamchat.decode.report import step_report
from streamchat.models.load import LoadedModel, load_model
from streamchat.replay.trend import trend
from streamchat.telemetry.memory import memory_state
from tests.support.gpus import stand_in

CHUNKS = (256, 512, 1024)
PREFILL = 2048
"""Tokens of a prompt whose speed is measured."""


def main() -> int:
    """Measure the chat, and print the figures."""
    parser = argparse.ArgumentParser(prog="tools.gpu_chat", description="Measure a chat on one GPU.")
    parser.add_argument("--model", default="default", help="the model (default: the bundled one)")
    parser.add_argument("--device", default="cuda", help="where it runs (default: cuda)")
    parser.add_argument("--turns", type=int, default=200, help="turns of the chat (default: 200)")
    parser.add_argument("--stand-in", action="store_true", help="a CPU that records operations instead of graphs")
    args = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("streamchat.decode").setLevel(logging.INFO)
    loaded = load_model(args.model, device="cpu" if args.stand_in else args.device)
    if args.stand_in:
        stand_in().install(loaded.model)
    print(json.dumps(measure_chat(loaded, args.turns)))
    return 0


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
        "step": step_report(loaded.model).text,
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
