"""Several devices where there are none: tensors that say they are on one, are computed on the CPU, and must not mix.

    with simulated_devices():
        model.to("cpu:1")  # stands for a GPU

torch has no device `cpu:1`, so nothing gets there by chance. As on GPUs, an operation on tensors of two devices fails,
except for copies, for single numbers of the CPU, and for indices on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

CPU = torch.device("cpu")
_COPIES = {"aten::copy_", "aten::_to_copy", "aten::_copy_from"}
_INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}


class MixedDevicesError(RuntimeError):
    """Worded as torch does."""


class FarTensor(Tensor):
    """A tensor that says it is on `cpu:N`; `near` has its numbers."""

    near: Tensor

    @staticmethod
    def __new__(cls, near: Tensor, device: torch.device) -> FarTensor:
        made: FarTensor = Tensor._make_wrapper_subclass(
            cls,
            near.shape,
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
            device=device,
            requires_grad=False,
        )
        made.near = near
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # no types in torch
        return f"FarTensor({self.near!r}, {self.device})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # no types in torch
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})


class _Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees the operations that make tensors, too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with self:  # in inference mode an operation that consists of others arrives whole
            out = func.decompose(*args, **(kwargs or {}))
        return _run(func, args, kwargs or {}) if out is NotImplemented else out


class _Literals(TorchFunctionMode):
    """`torch.tensor` moves what it made without an operation that could be seen."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            device = torch.device(kwargs.pop("device"))
            return func(*args, **kwargs).to(device)
        return func(*args, **kwargs)


@contextmanager
def simulated_devices() -> Iterator[None]:
    """Inside, on this thread, `cpu:1`, `cpu:2`, ... are devices of their own."""
    with _Literals(), _Mode():  # type: ignore[no-untyped-call]
        yield


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func._schema.name
    leaves, _ = tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    target = kwargs.get("device")
    if target is None:
        target = tensors[0].device if name in _COPIES and tensors else _common_device(name, tensors)
    elif name not in _COPIES and tensors:
        _common_device(name, tensors)
    near_kwargs = {key: CPU if key == "device" and value is not None else value for key, value in kwargs.items()}
    near_args, near_kwargs = tree_map(lambda x: x.near if isinstance(x, FarTensor) else x, (args, near_kwargs))
    if name == "aten::_to_copy" and "device" in near_kwargs and near_kwargs.get("dtype") is None:
        out = near_args[0].clone()
    else:
        out = func(*near_args, **near_kwargs)
    if name == "aten::empty_like" and not near_args[0].is_meta and not out.is_meta:
        # transformers makes a model on the meta device, which the modes here hide. It fills the rotary frequencies
        # first and moves them like this afterwards; without the copy they would be whatever was in memory.
        out.copy_(near_args[0])
    given = {id(tensor.near): tensor for tensor in tensors if isinstance(tensor, FarTensor)}

    def far(x: Any) -> Any:
        if not isinstance(x, Tensor) or isinstance(x, FarTensor):
            return x
        if id(x) in given:  # an operation in place gives back what it was given
            return given[id(x)]
        if target.index is None:
            return x
        with torch.inference_mode(x.is_inference()):  # a view of a normal tensor is one, too
            return FarTensor(x, target)

    return tree_map(far, out)


def _common_device(name: str, tensors: list[Tensor]) -> torch.device:
    if name in _INDEXED:
        tensors = [*tensors[:1], *(tensor for tensor in tensors[1:] if tensor.device != CPU)]
    found = {tensor.device for tensor in tensors if tensor.dim() or tensor.device != CPU}
    if len(found) > 1:
        where = " and ".join(sorted(map(str, found)))
        raise MixedDevicesError(f"Expected all tensors to be on the same device, but {name} found {where}")
    return found.pop() if found else CPU
