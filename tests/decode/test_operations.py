"""The operations of a step, and where the residual stream is summed up."""

from __future__ import annotations

from typing import Any

import pytest

from streamchat.decode.families.registry import model_spec
from streamchat.decode.fused.residuals import Residual, with_residuals
from streamchat.decode.fused.sizes import Sizes
from streamchat.decode.operations import Attend, Input, Operation, Product, Row, lower
from tests.support.families import build


def operations_of(name: str, **changes: Any) -> list[Operation]:
    spec = model_spec(build(name, **changes))
    assert spec is not None
    return lower(spec)


def test_a_layer_is_five_operations() -> None:
    operations = operations_of("llama")
    kinds = [type(each) for each in operations]
    layers = kinds.count(Attend)
    assert kinds == [Product, Attend, Product, Product, Product] * layers + [Product]
    assert [each.out.name for each in operations if isinstance(each, Product)][:4] == [
        "qkv",
        "attn_out",
        "activated",
        "mlp_out",
    ]


def simulate(steps: list[tuple[Operation, Residual | None]]) -> list[tuple[str, float]]:
    """What each product reads, if each row is a number and each product adds 1 to what it reads."""
    rows: dict[Row, float] = {}
    found = []
    for operation, residual in steps:
        if not isinstance(operation, Product):
            continue
        value = 2.0
        if isinstance(operation.given, Input):
            given = operation.given
            value = rows.get(given.x, 0.5)
            for added in (given.added, given.more):
                value += 0 if added is None else given.added_scale * rows[added]
            if given.sum is not None:
                rows[given.sum] = value
        found.append((operation.out.name, value))
        if residual is None:
            rows[operation.out] = value + 1
        else:
            other = 0 if residual.other is None else rows[residual.other]
            rows[residual.out] = rows.get(residual.x, 0.5) + residual.scale * (value + 1 + other)
    return found


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "granite", "cohere", "phi", "olmo2", "gemma3_window_16"])
def test_producers_compute_the_sums_of_their_consumers(name: str) -> None:
    operations = operations_of(name)
    moved = with_residuals(operations)
    plain: list[tuple[Operation, Residual | None]] = [(each, None) for each in operations]
    for (left, ours), (right, theirs) in zip(simulate(moved), simulate(plain), strict=True):
        assert left == right
        assert ours == pytest.approx(theirs)
    sums = [each.given.added for each, _ in moved if isinstance(each, Product) and isinstance(each.given, Input)]
    has_output_norms = name in ("olmo2", "gemma3_window_16")
    assert any(sums) is has_output_norms  # these need the whole output first


def test_products_of_small_models_are_divided_among_all_multiprocessors() -> None:
    sizes = Sizes(multiprocessors=132)
    rows, block = sizes.product(576, 1536)
    assert -(-576 // rows) >= 2 * 132
    assert block == 2048
    assert sizes.product(14336, 4096, 2) == (16, 128)
    assert sizes.product(5, 72)[0] == 1
    assert sizes.splits(8, 2560) * 8 >= 132
    assert sizes.splits(8, 1024) == 8
    assert sizes.splits(8, 20) == 1
