"""Names of devices: `cpu`, `mps`, `cuda`, `cuda:1`, and `cuda:0,1` where a model's layers are spread over several."""

from __future__ import annotations

from collections.abc import Iterable


def kind_of_place(place: str) -> str:
    """`cuda:0,1` -> `cuda`."""
    return place.partition(":")[0]


def devices_of(place: str) -> list[str]:
    """`cuda:0,1` -> `cuda:0` and `cuda:1`, as torch names them; one device is itself."""
    kind, _, numbers = place.partition(":")
    return [f"{kind}:{number}" for number in numbers.split(",")] if numbers else [kind]


def is_spread(place: str) -> bool:
    """Whether it is more than one device."""
    return len(devices_of(place)) > 1


def place_of(devices: Iterable[str]) -> str:
    """`cuda:0` and `cuda:1` -> `cuda:0,1`; the devices are of one kind."""
    names = list(dict.fromkeys(devices))
    kind, _, numbers = names[0].partition(":")
    return kind if not numbers else f"{kind}:{','.join(name.partition(':')[2] for name in names)}"
