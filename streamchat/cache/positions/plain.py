"""A fit as plain data and back, so that it can be measured once and remembered.

Only for a model on one device, whose rotary modules get tensors and plain values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from streamchat.cache.layers.layer import LayerRotation
from streamchat.cache.positions.fit import PositionFit
from streamchat.cache.positions.rotation import RotarySource, TensorRotation

FLOATS, POSITIONS = "floats", "positions"
"""What stands for a tensor in the arguments of a rotary module: only its kind matters (`RotarySource`)."""
PLAIN = (str, int, float, bool, type(None))


def fit_to_plain(model: nn.Module, fit: PositionFit) -> dict[str, Any] | None:
    """Return `fit` of `model` as data for JSON; None if it holds something that cannot be written."""
    names = {id(module): name for name, module in model.named_modules()}
    rotations = [each for layer in fit.layers for each in (layer.keys, layer.values) if each is not None]
    sources = list({id(each.source): each.source for each in rotations}.values())
    if fit.method == "recompute" or set(fit.devices) - {_device(model)}:
        return None
    written = [_source_to_plain(source, names) for source in sources]
    if None in written:
        return None
    number = {id(source): index for index, source in enumerate(sources)}

    def plain(rotation: TensorRotation | None) -> list[Any] | None:
        if rotation is None:
            return None
        return [number[id(rotation.source)], rotation.offset, rotation.interleaved, rotation.reverse]

    return {
        "sources": written,
        "layers": [[plain(layer.keys), plain(layer.values)] for layer in fit.layers],
        "position_limit": fit.position_limit,
        "error": fit.error,
        "method": fit.method,
        "single_steps": fit.single_steps,
        "scales_queries": fit.scales_queries,
    }


def fit_from_plain(model: nn.Module, plain: Any) -> PositionFit | None:
    """Return the fit that `fit_to_plain` wrote for the same model; None if `plain` is damaged."""
    try:
        device = _device(model)
        sources = [_source_from_plain(model, each, device) for each in plain["sources"]]

        def rotation(each: Any) -> TensorRotation | None:
            if each is None:
                return None
            index, offset, interleaved, reverse = each
            return TensorRotation(sources[index], int(offset), bool(interleaved), bool(reverse))

        layers = tuple(LayerRotation(rotation(keys), rotation(values)) for keys, values in plain["layers"])
        if not layers or plain["method"] not in ("rotation", "no positions"):
            return None
        limit = plain["position_limit"]
        return PositionFit(
            layers,
            tuple(device for _ in layers),
            None if limit is None else int(limit),
            float(plain["error"]),
            plain["method"],
            bool(plain["single_steps"]),
            bool(plain["scales_queries"]),
        )
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        return None


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _source_to_plain(source: RotarySource, names: dict[int, str]) -> dict[str, Any] | None:
    module, args, options = source.call
    written = [_value_to_plain(each) for each in args], {key: _value_to_plain(each) for key, each in options.items()}
    if id(module) not in names or None in written[0] or None in written[1].values():
        return None
    return {"module": names[id(module)], "args": written[0], "options": written[1]}


def _source_from_plain(model: nn.Module, plain: Any, device: torch.device) -> RotarySource:
    args = tuple(_value_from_plain(each, device) for each in plain["args"])
    options = {str(key): _value_from_plain(each, device) for key, each in plain["options"].items()}
    return RotarySource(model.get_submodule(plain["module"]), args, options)


def _value_to_plain(value: Any) -> dict[str, Any] | None:
    """Return an argument as data; None if that is impossible."""
    if isinstance(value, Tensor):
        return {"tensor": FLOATS if value.is_floating_point() else POSITIONS}
    return {"value": value} if isinstance(value, PLAIN) else None


def _value_from_plain(plain: Any, device: torch.device) -> Any:
    if "tensor" in plain:
        return torch.zeros(1, 1, dtype=torch.float32 if plain["tensor"] == FLOATS else torch.long, device=device)
    return plain["value"]
