"""Limits on the sizes of what a chat template makes or compares: see `environment`."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import ItemsView, Iterable, KeysView, Sized, ValuesView
from types import MappingProxyType
from typing import Any

from jinja2.runtime import LoopContext

MOST_ITEMS = 2_000_000
MOST_TIMES = 20
"""Limits on the characters or items of a result, besides the size of its operands: added, and times that size."""
MOST_IN_ALL = 40_000_000
"""Limit on the characters or items of any result, and of any value that is written as text."""
MOST_BITS = 1_000_000
"""Limit on the bits of an integer."""
MOST_LEVELS = 500
"""Limit on containers within containers, where a value is written, compared, or hashed: Python's hash of a tuple has
none, and overflows the stack."""
MOST_CODE = 3_000_000
"""Limit on the characters of the Python code that a template compiles to."""
TEXTS, SEQUENCES, SCALARS = (str, bytes), (str, bytes, list, tuple), (str, bytes, int, float)
"""Tuples, because `isinstance` takes several times as long with `str | bytes`."""


class HugeValueError(ValueError):
    """One operation of a template would make a huge value."""


def require(size: float, given: float = 0) -> None:
    """Raise unless a result of `size` characters or items may be made of operands with `given` of them.

    Raises:
        HugeValueError: It may not.
    """
    if size > min(MOST_ITEMS + MOST_TIMES * given, MOST_IN_ALL):
        raise HugeValueError("one operation would make a huge value")


def require_bits(bits: float) -> None:
    """Raise `HugeValueError` unless an integer may have so many bits."""
    if bits > MOST_BITS:
        raise HugeValueError("one operation would make a huge integer")


def inside(value: Any) -> Iterable[Any]:
    """Return what is written with a container; nothing for another value."""
    if isinstance(value, dict | MappingProxyType):
        return (*value.keys(), *value.values())
    if isinstance(value, list | tuple | set | frozenset | KeysView | ValuesView | ItemsView):
        return value
    if isinstance(value, LoopContext):
        return tuple(vars(value).values())  # the items around the current one are its attributes
    return (getattr(value, "_Namespace__attrs", ()),) if type(value).__name__.endswith("Namespace") else ()


def written(value: Any) -> int:
    """Return about how many characters `value` has as text: those of the texts in it, and one for each other value, or
    more for a huge integer.

    To compare or to hash a value takes as many steps at most.

    Raises:
        HugeValueError: They are too many, or containers are nested too deeply. A value may contain the same one many
            times.
    """
    if isinstance(value, TEXTS):
        return len(value)
    size, open_containers = 1, [iter(inside(value))]
    while open_containers:
        for each in open_containers[-1]:
            is_text = isinstance(each, TEXTS)
            size += len(each) if is_text else 1 + each.bit_length() // 32 if isinstance(each, int) else 1
            if size > MOST_IN_ALL:
                require(size)
            if not is_text and (held := inside(each)):
                open_containers.append(iter(held))
                if len(open_containers) > MOST_LEVELS:
                    raise HugeValueError(f"one operation would read a value nested more than {MOST_LEVELS} deep")
                break
        else:
            open_containers.pop()
    return size


def compared(value: Any) -> Any:
    """Return a value that is compared or hashed next.

    Raises:
        HugeValueError: That would take too long, or overflow the stack.
    """
    if not isinstance(value, SCALARS):
        written(value)
    return value


def joined(separator: str, parts: Iterable[Any]) -> list[Any]:
    """Return the parts as a list, if they are not too long together.

    Raises:
        HugeValueError: They are.
    """
    found, size = [], 0
    for part in parts:
        found.append(part)
        size += len(separator) + (len(part) if isinstance(part, str) else written(part))
        if size > MOST_IN_ALL:  # a long conversation is joined in one operation
            require(size)
    return found


def require_fields(text: str, sign: str, given: Iterable[Any]) -> None:
    """Check `%` or `format`, whose fields begin with `sign`: the number of fields times the longest operand.

    Raises:
        HugeValueError: The result would be huge.
    """
    longest = max(map(written, given), default=0)
    require(text.count(sign) * longest, len(text) + longest)


def require_width(digits: Iterable[str]) -> None:
    """Check the numbers in the field of a format.

    Raises:
        HugeValueError: One of them is huge.
    """
    for each in digits:
        require(10.0 ** len(each) if len(each) > 9 else int(each or 0))


def require_specification(specification: str) -> None:
    """Check what stands behind the colon in a field of `format`.

    Raises:
        HugeValueError: It has a huge width or precision.
    """
    require_width(re.findall(r"\d+", specification))


def spread(values: Any) -> Any:
    """Return the values that a call gets after `*`.

    Raises:
        HugeValueError: They are too many.
    """
    if isinstance(values, Sized):
        require(len(values))
    return values


def require_code(code: str) -> None:
    """Check the Python code of a template before it is compiled.

    Raises:
        HugeValueError: It is too long, or has a name that takes too long to normalize.
    """
    if len(code) > MOST_CODE:
        raise HugeValueError(f"it compiles to {len(code):,} characters of code")
    for text in re.findall(r"[^\x00-\x7f]{100,}", code):
        require(sum(unicodedata.combining(each) > 0 for each in text) ** 2 / 50)
