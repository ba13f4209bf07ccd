"""Number of tokens of a prompt per forward.

On a CPU, 256: large enough to be fast, small enough to stop without a noticeable delay.

On CUDA, 1,024: a forward of any length launches hundreds of kernels, and only a long one keeps the GPU busy. On an
H100, a model of 135M prefills 12,400 tokens/s in chunks of 256 and 46,000 to 54,000 in chunks of 1,024; one of 8B 8,700
and 23,700 to 27,600. A chunk cannot be stopped, so it should take at most `LONGEST_S`: a slower GPU gets smaller ones.

A prompt that is longer than the cache is fed in chunks of at most a quarter of the room in it, so that each chunk still
attends to much of the text before it. On CUDA, a prompt that fits is fed in chunks of the full size:
no chunk evicts tokens of the same prompt.
"""

from __future__ import annotations

from streamchat.cache.room import quarter_of_room
from streamchat.cache.streaming import StreamingCache

PREFILL_CHUNK = 256
CUDA_CHUNK = 1024
SMALLEST = 128
"""Chunks of this size are not halved: kernel launches determine their time, and smaller chunks need as many."""
LONGEST_S = 0.05
"""Seconds that a chunk on a GPU may take; a stop takes effect within this time."""
WORTH_HALVING = 0.75
"""A smaller chunk must take at most this share of the time of one twice as large, or the larger one is used again."""


def largest_chunk(device_type: str) -> int:
    """Return the maximum number of tokens per forward on a type of device."""
    return CUDA_CHUNK if device_type == "cuda" else PREFILL_CHUNK


class ChunkSize:
    """The chunk size of a chat; on CUDA, it is adjusted to the time that the first chunks take.

    Args:
        device_type: Where the model runs.
    """

    def __init__(self, device_type: str) -> None:
        self._on_cuda = device_type == "cuda"
        self.largest = largest_chunk(device_type)
        """Maximum tokens per forward, from now on."""
        self._times: list[float] = []
        self._before: float | None = None  # seconds of a chunk twice as large
        self._settled = not self._on_cuda

    def of(self, cache: StreamingCache, prompt: int, left: int) -> int:
        """Return the maximum length of the next chunk of a prompt of `prompt` tokens, of which `left` are to be fed."""
        room = cache.cache_size - cache.num_retained
        if self._on_cuda and (prompt <= room or cache.length + left <= cache.cache_size):
            return self.largest
        return quarter_of_room(cache.cache_size, cache.num_retained, self.largest)

    def is_measured(self, count: int) -> bool:
        """Return whether `note` needs the time of a chunk of `count` tokens."""
        return not self._settled and count == self.largest

    def note(self, seconds: float) -> None:
        """Adjust to the seconds that a chunk of the largest size took. Of two, the faster counts: one loads kernels."""
        self._times.append(seconds)
        if len(self._times) < 2:
            return
        fastest = min(self._times)
        self._times.clear()
        if self._before is not None and fastest > WORTH_HALVING * self._before:
            self.largest *= 2
            self._settled = True
        elif fastest <= LONGEST_S or self.largest <= SMALLEST:
            self._settled = True
        else:
            self._before = fastest
            self.largest //= 2
