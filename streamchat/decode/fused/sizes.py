"""Block sizes of the fused kernels, by the shape of their work and the GPU."""

from __future__ import annotations

from dataclasses import dataclass

MULTIPROCESSORS = {(8, 0): 108, (8, 6): 84, (8, 9): 128, (9, 0): 132, (10, 0): 148}
"""By compute capability, if no device is asked."""


@dataclass(frozen=True)
class Sizes:
    """How the work is divided among programs. The defaults are for 80 to 150 multiprocessors."""

    multiprocessors: int = 132
    waves: float = 2.0
    """Least programs per multiprocessor for which a program of a product gets more rows."""
    max_rows: int = 16
    """Rows of the matrix per program of a product."""
    tile: int = 4096
    """Weights that a program reads at once."""
    max_block: int = 2048
    """Columns that a program reads at once."""
    tile_groups: int = 16
    """Groups of 32 columns that a program reads at once of 4-bit weights in tiles; half as many of 8-bit ones."""
    product_warps: int = 4
    attention_block: int = 64
    """Slots that a program of attention reads at once, if a head has at most 128 numbers of 16 bits."""
    least_slots: int = 128
    """Slots for which another program of attention is worth its start, and the join of its result."""
    attention_warps: int = 4
    attention_stages: int = 2
    max_splits: int = 64
    """Parts of the live slots that are attended to in parallel."""
    overlap: bool = False
    """Start a kernel while the one before it ends, to read its weights (CUDA's programmatic dependent launch)."""

    @classmethod
    def of(cls, capability: tuple[int, int], multiprocessors: int) -> Sizes:
        """Return the sizes for a compute capability, as measured with `tools.fused_sizes` on an H100."""
        return cls(multiprocessors=multiprocessors, overlap=capability >= (9, 0))

    def product(self, rows: int, columns: int, matrices: int = 1) -> tuple[int, int]:
        """Return rows and columns of the block of a product; `matrices` are read at the same time."""
        count = self.max_rows
        while count > 1 and rows / count < self.waves * self.multiprocessors:
            count //= 2
        most = max(16, self.tile // count // matrices)
        return count, min(power_of_two(columns), most, self.max_block)

    def groups(self, bits: int, count: int) -> int:
        """Return the groups of 32 columns that a product with tiles reads at once."""
        return min(power_of_two(count), max(1, self.tile_groups * 4 // bits))

    def attention(self, element_bytes: int, head_dim: int) -> tuple[int, int]:
        """Return the slots that a program of attention reads at once, and its warps, for numbers of that many bytes.

        float32 is multiplied without tensor cores, from registers: a quarter of them for each thread. Wide heads need
        more shared memory per slot.
        """
        if element_bytes > 2:
            return min(16, self.attention_block), 2 * self.attention_warps
        return min(self.attention_block, max(16, 64 * 128 // head_dim)), self.attention_warps

    def splits(self, num_kv_heads: int, slots: int) -> int:
        """Return the parts of an attention over at most that many slots."""
        parts = 1
        while parts < self.max_splits and parts * num_kv_heads < self.waves * self.multiprocessors:
            parts *= 2
        return max(1, min(parts, power_of_two(-(-slots // max(self.attention_block, self.least_slots)))))


def power_of_two(number: int) -> int:
    """Return the smallest power of two that is at least `number`."""
    return 1 << max(0, number - 1).bit_length()
