"""llama.cpp, a comparable program, if it is installed. `bench --peers` times it; it cannot be scored."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from streamchat.benchmarks.methods.stream import Stream
from streamchat.cache.room import quarter_of_room

BATCH = 512
"""Tokens per batch of llama.cpp; its default."""


class LlamaCpp(Stream):
    """llama.cpp through llama-cpp-python, on the GGUF file of the model, with its context shift.

    Args:
        path: The GGUF file.
        cache_size: Size of its context.
        num_sink_tokens: First tokens, which are never evicted (`n_keep`).
        threads: Number of threads; the same as torch's.
        one_by_one: Evict for each token, as in the paper; else half of the context at a time, as llama.cpp does.
    """

    def __init__(self, path: Path, cache_size: int, num_sink_tokens: int, threads: int, *, one_by_one: bool) -> None:
        self.name = "llama.cpp, one by one" if one_by_one else "llama.cpp"
        how = "a token at a time" if one_by_one else "half of the context at a time"
        self.description = f"llama-cpp-python {version('llama-cpp-python')}, {path.name}, evicts {how}"
        self._path, self._cache_size, self._sinks = path, cache_size, num_sink_tokens
        self._threads, self._one_by_one = threads, one_by_one
        self._llama: Any = None

    def start(self) -> None:
        if self._llama is None:
            import llama_cpp

            self._llama = llama_cpp.Llama(
                model_path=str(self._path),
                n_ctx=self._cache_size,
                n_batch=BATCH,
                n_threads=self._threads,
                n_threads_batch=self._threads,
                verbose=False,
            )
        self._llama.reset()

    def prefill(self, ids: Sequence[int], reserve: int = 0) -> int:
        fits = self._llama.n_tokens + len(ids) <= self._cache_size
        # chunks of a quarter of the window, as ours, so that each chunk sees the text before it
        size = BATCH if fits else quarter_of_room(self._cache_size, self._sinks, BATCH)
        for start in range(0, len(ids), size):
            chunk = list(ids[start : start + size])
            self._make_room(len(chunk))
            self._llama.eval(chunk)
        logits = self._llama._ctx.get_logits_ith(-1)
        values: Any = np.ctypeslib.as_array(logits, shape=(self._llama.n_vocab(),))
        return int(values.argmax())

    def _make_room(self, incoming: int) -> None:
        cached = self._llama.n_tokens
        excess = cached + incoming - self._cache_size
        if excess <= 0:
            return
        drop = excess if self._one_by_one else max(excess, (cached - self._sinks) // 2)
        context = self._llama._ctx
        context.kv_cache_seq_rm(0, self._sinks, self._sinks + drop)
        context.kv_cache_seq_shift(0, self._sinks + drop, cached, -drop)
        self._llama.n_tokens -= drop

    @property
    def kv_bytes(self) -> int:
        """Bytes of its 16-bit cache, computed from the metadata of the file."""
        about = self._llama.metadata
        kind = about["general.architecture"]
        layers, heads = int(about[f"{kind}.block_count"]), int(about[f"{kind}.attention.head_count"])
        groups = int(about.get(f"{kind}.attention.head_count_kv", heads))
        size = int(about[f"{kind}.embedding_length"]) // heads
        return 2 * 2 * layers * groups * size * int(self._llama.n_ctx())

    def close(self) -> None:
        # keep the model loaded for the next round, because loading is not measured
        if self._llama is not None:
            self._llama.reset()


def find_peers(
    gguf: Path | None, cache_size: int, num_sink_tokens: int, threads: int
) -> tuple[list[Stream], list[str]]:
    """Return the peers that can run here, and a note for each that cannot.

    Args:
        gguf: The model as a GGUF file, if there is one.
        cache_size: The cache budget, in tokens.
        num_sink_tokens: First tokens, which are never evicted.
        threads: Number of torch's threads.
    """
    if find_spec("llama_cpp") is None:
        return [], ["llama.cpp was skipped: llama-cpp-python is not installed (pip install llama-cpp-python)."]
    if gguf is None:
        return [], ["llama.cpp was skipped: there is no GGUF file of this model; give one with --model FILE.gguf."]
    return [LlamaCpp(gguf, cache_size, num_sink_tokens, threads, one_by_one=each) for each in (False, True)], []
