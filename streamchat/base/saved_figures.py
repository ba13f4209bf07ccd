"""Load dataclasses of figures from JSON, with type checks."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

Figures = TypeVar("Figures")


class InvalidFiguresError(ValueError):
    """A field is missing, unknown or of another type."""


def load_figures(kind: type[Figures], record: Any) -> Figures:
    """Return a `kind` filled with the values of `record`.

    Args:
        kind: A dataclass of numbers, texts, and tuples of dataclasses.
        record: The decoded JSON object.

    Raises:
        InvalidFiguresError: The record does not match the dataclass.
    """
    if not isinstance(record, Mapping):
        raise InvalidFiguresError(f"{record!r} is not an object")
    hints = get_type_hints(kind)
    if unknown := record.keys() - {field.name for field in fields(kind)}:  # type: ignore[arg-type]
        raise InvalidFiguresError(f"{unknown} are not known")
    try:
        return kind(**{name: _value(value, hints[name]) for name, value in record.items()})
    except TypeError as error:  # a field is missing
        raise InvalidFiguresError(str(error)) from error


def _value(value: Any, hint: Any) -> Any:
    origin = get_origin(hint)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise InvalidFiguresError(f"{value!r} is not a list")
        return tuple(load_figures(get_args(hint)[0], each) for each in value)
    if not _is_one_of(value, get_args(hint) if origin in (Union, types.UnionType) else (hint,)):
        raise InvalidFiguresError(f"{value!r} is not {hint}")
    return value


def _is_one_of(value: Any, hints: tuple[Any, ...]) -> bool:
    return any(_is(value, hint) for hint in hints)


def _is(value: Any, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if hint in (int, float):
        number = isinstance(value, int) or (hint is float and isinstance(value, float) and value == value)
        return number and not isinstance(value, bool) and abs(value) < 2**63
    return isinstance(value, type(None) if hint is None else hint)
