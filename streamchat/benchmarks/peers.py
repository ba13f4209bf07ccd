"""Other programs that can do the same, where they are installed: llama.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from streamchat.benchmarks.methods import Method

BATCH = 512
"""Tokens that llama.cpp reads at once; its own default."""


class LlamaCpp(Method):
    """llama.cpp through llama-cpp-python, on the GGUF file of the model, with its context shift.

    Args:
        path: The GGUF file.
        cache_size: Its context.
        num_sink_tokens: First tokens, kept (`n_keep`).
        threads: As many as torch uses.
        one_by_one: Make room for each token, as the paper does; else half of the context at a time, as llama.cpp does.
    """

    def __init__(self, path: Path, cache_size: int, num_sink_tokens: int, threads: int, *, one_by_one: bool) -> None:
        self.name = "llama.cpp, one by one" if one_by_one else "llama.cpp"
        how = "a token at a time" if one_by_one else "half of the context at a time"
        self.words = f"llama-cpp-python {version('llama-cpp-python')}, {path.name}, room is made {how}"
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

    def read(self, ids: Sequence[int], reserve: int = 0) -> int:
        # beside the sinks, a quarter of the room at a time, as ours: what is read sees what came before it
        size = min(BATCH, max(1, (self._cache_size - self._sinks) // 4))
        for start in range(0, len(ids), size):
            chunk = list(ids[start : start + size])
            self._make_room(len(chunk))
            self._llama.eval(chunk)
        logits = self._llama._ctx.get_logits_ith(-1)
        values: Any = np.ctypeslib.as_array(logits, shape=(self._llama.n_vocab(),))
        return int(values.argmax())

    def step(self, token: int) -> int:
        return self.read([token])

    def _make_room(self, incoming: int) -> None:
        held = self._llama.n_tokens
        over = held + incoming - self._cache_size
        if over <= 0:
            return
        drop = over if self._one_by_one else max(over, (held - self._sinks) // 2)
        context = self._llama._ctx
        context.kv_cache_seq_rm(0, self._sinks, self._sinks + drop)
        context.kv_cache_seq_shift(0, self._sinks + drop, held, -drop)
        self._llama.n_tokens -= drop

    @property
    def kv_bytes(self) -> int:
        """Of its 16-bit cache, by the sizes in the file."""
        about = self._llama.metadata
        kind = about["general.architecture"]
        layers, heads = int(about[f"{kind}.block_count"]), int(about[f"{kind}.attention.head_count"])
        groups = int(about.get(f"{kind}.attention.head_count_kv", heads))
        size = int(about[f"{kind}.embedding_length"]) // heads
        return 2 * 2 * layers * groups * size * int(self._llama.n_ctx())

    def close(self) -> None:
        # the model stays loaded for the next round: loading is not measured
        if self._llama is not None:
            self._llama.reset()


def find_peers(
    gguf: Path | None, cache_size: int, num_sink_tokens: int, threads: int
) -> tuple[list[Method], list[str]]:
    """The peers that can run here, and a sentence for each that cannot.

    Args:
        gguf: The model as a GGUF file, where there is one.
        cache_size: The budget.
        num_sink_tokens: First tokens, kept.
        threads: Of torch.
    """
    if find_spec("llama_cpp") is None:
        return [], ["llama.cpp was left out: llama-cpp-python is not installed (pip install llama-cpp-python)."]
    if gguf is None:
        return [], ["llama.cpp was left out: this model has no GGUF file here; give one with --model FILE.gguf."]
    return [LlamaCpp(gguf, cache_size, num_sink_tokens, threads, one_by_one=each) for each in (False, True)], []
