"""Perplexity with llama.cpp and a cache in 16, 8, and 4 bits, on texts that `streamchat ppl` reads.

    python -m tools.kv_llama BOOK BOOK --budget 512 --max-tokens 20000

Needs llama-cpp-python. The file is the GGUF of the default model. Texts, token ids, sinks, budget, and tokens per
forward pass are those of `streamchat ppl --methods sinks:BUDGET`. llama.cpp rotates the window at each eviction, and
rounds its keys again; `--evict half` evicts half of the window at a time instead, as its programs do.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamchat.benchmarks.score import Scores, perplexity, score
from streamchat.benchmarks.texts import read_documents, tokenize
from streamchat.config.settings import Settings
from streamchat.models.bundled.default import default_gguf
from streamchat.models.load import load_model

TYPES = {"f16": "GGML_TYPE_F16", "q8_0": "GGML_TYPE_Q8_0", "q4_0": "GGML_TYPE_Q4_0"}


class LlamaStream:
    """An endless text on llama.cpp with sinks and a window; see `streamchat.benchmarks.score.Scorable`."""

    limit = None
    kv_bytes = 0

    def __init__(self, path: Path, kinds: tuple[str, str], budget: int, sinks: int, chunk: int, *, half: bool) -> None:
        import llama_cpp

        keys, values = (int(getattr(llama_cpp, TYPES[kind])) for kind in kinds)
        self._llama: Any = llama_cpp.Llama(
            model_path=str(path),
            n_ctx=budget,
            n_batch=budget,
            n_threads=torch.get_num_threads(),
            n_threads_batch=torch.get_num_threads(),
            type_k=keys,
            type_v=values,
            flash_attn=True,
            logits_all=True,
            verbose=False,
        )
        self._budget, self._sinks, self._half, self.chunk = budget, sinks, half, chunk

    @property
    def length(self) -> int:
        """Number of cached tokens."""
        return int(self._llama.n_tokens)

    def feed(self, ids: Tensor) -> Tensor:
        """Feed (n,) ids; return logits (n, vocabulary) in float32."""
        excess = self.length + len(ids) - self._budget
        if excess > 0:
            cached = self.length
            drop = max(excess, (cached - self._sinks) // 2) if self._half else excess
            context = self._llama._ctx
            context.kv_cache_seq_rm(0, self._sinks, self._sinks + drop)
            context.kv_cache_seq_shift(0, self._sinks + drop, cached, -drop)
            self._llama.n_tokens -= drop
        first = self.length
        self._llama.eval(ids.tolist())
        return torch.from_numpy(self._llama.scores[first : self.length].copy())


def main() -> None:
    """Print a JSON line per dtype: perplexity of all texts, and its change from the first dtype."""
    parser = argparse.ArgumentParser(prog="python -m tools.kv_llama", description=__doc__)
    parser.add_argument("books", nargs="+", type=Path)
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--max-tokens", type=int, default=20_000)
    parser.add_argument("--chunk", type=int, default=16, help="tokens per forward pass (default: %(default)s)")
    parser.add_argument("--evict", choices=("chunk", "half"), default="chunk", help="how much at a time")
    parser.add_argument(
        "--types", nargs="+", default=["f16", "q8_0", "q4_0"], help="of the cache; q8_0/q4_0: keys/values"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)  # perplexity does not depend on it, and threads that wait take time from other programs
    tokenizer = load_model("default", device="cpu", weights="int4").tokenizer
    texts = [tokenize(each, tokenizer, args.max_tokens) for each in read_documents(list(map(str, args.books)))]
    first: float | None = None
    for name in args.types:
        keys, _, values = name.partition("/")
        found: list[Scores] = []
        started = time.perf_counter()
        for text in texts:
            stream = LlamaStream(
                default_gguf(),
                (keys, values or keys),
                args.budget,
                Settings().num_sink_tokens,
                args.chunk,
                half=args.evict == "half",
            )
            found.append(score(stream, torch.tensor(text.ids)))
        value = perplexity(np.concatenate([each.losses for each in found]))
        assert value is not None
        first = first or value
        row = {
            "types": name,
            "budget": args.budget,
            "evict": args.evict,
            "perplexity": round(value, 3),
            "change_percent": round(100 * (value / first - 1), 3),
            "of_each": [round(perplexity(each.losses) or 0.0, 3) for each in found],
            "seconds": round(time.perf_counter() - started),
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
