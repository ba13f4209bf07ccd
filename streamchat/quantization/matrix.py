"""A quantized weight as a tensor that PyTorch's layers accept; only its codes are in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._pytree import tree_map

from streamchat.quantization.weights import QuantizedWeight

UNCHANGEABLE = "weights that are kept as codes only cannot be changed; load the model with weights='native'"


class QuantizedMatrix(Tensor):
    """The weight of a linear layer, an embedding, or both.

    It has the shape, dtype, and device of the dequantized weight, but no memory of its own. In 16 bits, `linear`
    multiplies by the codes. `embedding` dequantizes the rows of its ids. Every other function gets the whole
    dequantized weight, for as long as it runs. Cannot be changed. Pickled as the dequantized weight.

    Args:
        quantized: The codes.
        dtype: The dtype of the dequantized weight.
        transposed: Whether the shape is (columns, rows), as `Conv1D` stores it.
    """

    quantized: QuantizedWeight
    transposed: bool

    @staticmethod
    def __new__(cls, quantized: QuantizedWeight, dtype: torch.dtype, transposed: bool = False) -> QuantizedMatrix:
        size = (quantized.rows, quantized.columns)
        shape, device = size[::-1] if transposed else size, quantized.data.device
        new: Any = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        new.quantized, new.transposed = quantized, transposed
        made: QuantizedMatrix = new
        return made

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        """Name the tensors that take the memory."""
        return ["codes"], None

    @property
    def codes(self) -> Tensor:
        """The codes and scales, uint8."""
        return self.quantized.data

    def whole(self) -> Tensor:
        """Return the dequantized weight."""
        found = self.quantized.dequantize(self.dtype)
        return found.T if self.transposed else found

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedMatrix:
        return _like(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        plain: Any = self.whole()
        if isinstance(self, torch.nn.Parameter):
            plain = torch.nn.Parameter(plain, requires_grad=False)
        return plain.__reduce_ex__(protocol)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"QuantizedMatrix({tuple(self.shape)}, {self.dtype}, {self.quantized.layout})"

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run `func` on the codes if it is a product or a lookup."""
        serve = _SERVED.get(func)
        served = NotImplemented if serve is None else serve(*args, **(kwargs or {}))
        if served is not NotImplemented:
            return served
        with torch._C.DisableTorchFunctionSubclass():  # else the result would become a QuantizedMatrix
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run any other function on dequantized weights.

        Raises:
            TypeError: It would change one of them.
        """
        if func is torch.ops.aten.detach.default:
            return _like(args[0])
        _refuse_changes(func, args, kwargs or {})
        return func(*tree_map(_plain, args), **tree_map(_plain, kwargs or {}))


def _like(matrix: QuantizedMatrix) -> QuantizedMatrix:
    new: Any = QuantizedMatrix(matrix.quantized, matrix.dtype, matrix.transposed)
    if isinstance(matrix, torch.nn.Parameter):
        new._is_param = True
    made: QuantizedMatrix = new
    return made


def _refuse_changes(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    if not func._schema.is_mutable:
        return
    named = dict(zip((each.name for each in func._schema.arguments), args, strict=False)) | dict(kwargs)
    for each in func._schema.arguments:
        is_written = each.alias_info is not None and each.alias_info.is_write
        if is_written and isinstance(named.get(each.name), QuantizedMatrix):
            raise TypeError(UNCHANGEABLE)


def _set_item(matrix: Any, *_: Any) -> Any:
    if isinstance(matrix, QuantizedMatrix):
        raise TypeError(UNCHANGEABLE)
    return NotImplemented


def _plain(value: Any) -> Any:
    return value.whole() if isinstance(value, QuantizedMatrix) else value


def _takes_gradients(*tensors: Tensor | None) -> bool:
    """Return whether autograd must record an operation on `tensors`; the kernels have no gradients."""
    return torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in tensors)


def _linear(x: Tensor, weight: Any, bias: Tensor | None = None) -> Any:
    if not isinstance(weight, QuantizedMatrix) or weight.transposed or _needs_whole(x, bias):
        return NotImplemented
    out = weight.quantized.multiply(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)
    return out if bias is None else out + bias


def _addmm(bias: Tensor, x: Tensor, weight: Any, **more: Any) -> Any:
    if not isinstance(weight, QuantizedMatrix) or not weight.transposed or more or _needs_whole(x, bias):
        return NotImplemented
    return weight.quantized.multiply(x) + bias


def _needs_whole(x: Tensor, bias: Tensor | None) -> bool:
    """Return whether a product needs the dequantized weight: for gradients, and in float32.

    The kernels round `x` to 16 bits in groups, which the checks of float32 models would take for an error. Chats do not
    come here: the short path runs their prompts, and `QuantizedLinear` runs a few tokens.
    """
    return not x.numel() or x.dtype == torch.float32 or _takes_gradients(x, bias)


def _embedding(ids: Tensor, weight: Any, *_: Any, **__: Any) -> Any:
    # the other arguments matter in training only
    if not isinstance(weight, QuantizedMatrix) or weight.transposed or ids.dtype not in (torch.int64, torch.int32):
        return NotImplemented
    return weight.quantized.rows_at(ids.reshape(-1), weight.dtype).view(*ids.shape, -1)


def _share_memory(matrix: QuantizedMatrix) -> QuantizedMatrix:
    codes: Any = matrix.codes
    codes.share_memory_()
    return matrix


# `detach` is here, and not only in `__torch_dispatch__`, because torch imports torch.distributed.tensor before it calls
# that one for the first time.
_SERVED: dict[Callable[..., Any], Callable[..., Any]] = {
    Tensor.detach: _like,
    Tensor.share_memory_: _share_memory,
    Tensor.__setitem__: _set_item,
    functional.linear: _linear,
    torch.addmm: _addmm,
    functional.embedding: _embedding,
}
