"""Moves the sums of the residual stream from the products that read them into those that compute the outputs.

A consumer that adds two rows before its norm has every program read both. The producer adds each element once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from streamchat.decode.operations import Input, Operation, Product, Row


@dataclass(frozen=True)
class Residual:
    """What a product adds to its results `y`, and where they go: `out` = `x` + `scale` * (`y` + `other`)."""

    x: Row
    other: Row | None
    scale: float
    out: Row


Step = tuple[Operation, Residual | None]


def with_residuals(operations: Sequence[Operation]) -> list[Step]:
    """Return the operations, each with the residual that it adds.

    A sum stays with its consumer if an output has a norm of its own, which needs the whole row.
    """
    steps: list[Step] = []
    for operation in operations:
        moved = _moved(operation, steps[-1][0] if steps else None)
        if moved is not None:
            operation, residual = moved
            steps[-1] = steps[-1][0], residual
        steps.append((operation, None))
    return steps


def _moved(operation: Operation, before: Operation | None) -> tuple[Product, Residual] | None:
    """Return the operation without its sum, which the one before it computes; None if it must keep the sum."""
    if not isinstance(operation, Product) or not isinstance(operation.given, Input):
        return None
    given = operation.given
    if given.added is None or given.added_norm is not None or not isinstance(before, Product):
        return None
    if before.out != (given.more or given.added):
        return None
    out = given.sum or Row("last_sum", given.x.width)
    other = given.added if given.more is not None else None
    return replace(operation, given=Input(out, given.norm)), Residual(given.x, other, given.added_scale, out)
