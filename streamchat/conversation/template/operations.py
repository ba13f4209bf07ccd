"""Checks of what operations of a chat template would make or compare, before they do: see `environment`.

Each check takes the operands, and raises `HugeValueError` if the result is much larger than them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Sized
from types import GeneratorType
from typing import Any

from streamchat.conversation.template.sizes import (
    SEQUENCES,
    compared,
    inside,
    joined,
    require,
    require_bits,
    require_fields,
    require_width,
    written,
)

_WIDTH = re.compile(r"%[-+ #0]*(\d*)(?:\.(\d+))?")
_WIDTH_OF_NAMED = re.compile(r"[%)][-+ #0]*(\d*)(?:\.(\d+))?")
"""Width and precision in the fields of `%`; a name in brackets, which may contain brackets, comes before them."""
_ENCODINGS = ("utf-8", "utf8", "ascii", "latin-1", "latin1")
_HANDLERS = ("strict", "ignore", "replace")
"""Encodings and error handlers that are fast."""


def _add(left: Any, right: Any) -> None:
    if isinstance(left, SEQUENCES) and isinstance(right, SEQUENCES):
        require(len(left) + len(right), len(left) + len(right))


def _multiply(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        require_bits(left.bit_length() + right.bit_length())
        return
    for items, times in ((left, right), (right, left)):
        if isinstance(items, str | bytes | list | tuple) and isinstance(times, int):
            require(len(items) * times, len(items))


def _power(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        require_bits(left.bit_length() * right)


def _modulo(left: Any, right: Any) -> None:
    if isinstance(left, str | bytes):
        _percent(_text(left), right if isinstance(right, tuple) else (right,))


def _percent(text: str, given: tuple[Any, ...]) -> None:
    require_fields(text, "%", given)
    widths_in = _WIDTH_OF_NAMED if "%(" in text else _WIDTH
    numbers = {number for found in widths_in.findall(text) for number in found if number}
    require_width(numbers)
    widths = [int(number) for number in numbers]
    if "*" in text:  # a width is an operand
        widths += [value for value in given if isinstance(value, int)]
    require(text.count("%") * max(widths, default=0), len(text))


def _text(value: Any) -> str:
    written(value)
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)


def _shown(*args: Any, **kwargs: Any) -> None:
    for value in (*args, *kwargs.values()):
        written(value)


def _pad(text: Any, width: int = 80, *_: Any, **__: Any) -> None:
    require(width, len(_text(text)))


def _expand(text: Any, tabsize: int = 8) -> None:
    text = _text(text)
    require(text.count("\t") * tabsize, len(text))


def _replace(text: Any, old: Any, new: Any, *_: Any, **__: Any) -> None:
    text, old, new = _text(text), _text(old), _text(new)
    require(text.count(old) * len(new), len(text) + len(new))


def _join(separator: Any, parts: Iterable[Any]) -> tuple[list[Any]]:
    return (joined(_text(separator), parts),)


def _sum(parts: Iterable[Any], *_: Any, **__: Any) -> tuple[Iterable[Any]]:
    return ((part for part in parts),)  # can be stopped between two parts


def _translate(text: Any, table: Any) -> None:
    values = table.values() if isinstance(table, dict) else table if isinstance(table, list | tuple) else ()
    longest = max((len(value) for value in values if isinstance(value, str)), default=0)
    require(len(text) * max(1, longest))  # each character is looked up


def _convert(text: Any, encoding: str = "utf-8", errors: str = "strict") -> None:
    if encoding.lower() not in _ENCODINGS:  # some take time with the square of the length
        require(1000 * len(text))
    if errors not in _HANDLERS:  # called for each character, and may write a long name for it
        require(90 * len(text))


def _split(text: Any, *_: Any, **__: Any) -> None:
    if isinstance(text, str | bytes):
        require(len(text) / 10)  # each piece takes many times the memory of a character


def _strip(text: Any, characters: Any = None, *_: Any, **__: Any) -> None:
    if isinstance(text, str | bytes) and isinstance(characters, str | bytes):
        require(len(text) * len(characters) / 1000)  # it may look for each character among all of them


def _trim(text: Any, chars: Any = None, *_: Any, **__: Any) -> None:
    _strip(_text(text), chars)


def _pieces(text: Any, *_: Any, **__: Any) -> None:
    _split(_text(text))


def _pprint(value: Any) -> None:
    written(value)
    _split(value)


def _compare(value: Any, *_: Any, **__: Any) -> Any:
    if isinstance(value, str | bytes):
        _split(value)
        return None
    return (compared([*value] if isinstance(value, Iterator) else value),)


def _links(url_text: Any, *_: Any, **__: Any) -> None:
    longest = max(map(len, _text(url_text).split()), default=0)
    require(longest * longest / 50)  # it looks for the punctuation at the end of a word from each character


def _collected(value: Any, *_: Any, **__: Any) -> Any:
    """Replace a generator by a list, because to free a long chain of generators overflows the stack."""
    return ([*value],) if isinstance(value, GeneratorType) else None


def _parity(value: Any) -> None:
    _modulo(value, 2)


def _subtract(left: Any, right: Any) -> None:
    if isinstance(left, KeysView | ItemsView) or isinstance(right, KeysView | ItemsView):
        compared(left)
        compared(right)


def _search_back(text: Any, part: Any = None, *_: Any, **__: Any) -> None:
    _split(text)
    if isinstance(part, str | bytes):
        require(len(text) * len(part) / 1000)  # it may compare all characters of both


def _to_bytes(_: int, length: int = 1, *__: Any, **___: Any) -> None:
    require(length)


def _from_bytes(_: Any, data: Any = (), *__: Any, **___: Any) -> None:
    if isinstance(data, Sized):
        require_bits(8 * len(data))


def _integer(text: Any, default: Any = 0, base: Any = 10) -> None:
    if isinstance(text, str) and base != 10:
        require_bits(4 * len(text))


def _indent(text: Any, width: Any = 4, *_: Any, **__: Any) -> None:
    text = _text(text)
    _split(text)
    require((len(text.splitlines()) + 1) * (width if isinstance(width, int) else len(_text(width))), len(text))


def _format(text: Any, *args: Any, **kwargs: Any) -> None:
    _percent(_text(text), (*args, *kwargs.values()))


def _batch(value: Any, linecount: int, *_: Any, **__: Any) -> Any:
    require(linecount)
    return _collected(value)


def _slice(value: Any, *_: Any, **__: Any) -> Any:
    _split(value)
    return _collected(value)


def _round(value: Any, precision: int = 0, *_: Any, **__: Any) -> None:
    require_bits(4 * abs(precision))
    if not isinstance(value, float):
        _multiply(value, 10 ** max(0, precision))


def _wrap(text: Any, width: int = 79, _: bool = True, wrapstring: Any = None, *__: Any, **___: Any) -> None:
    text = _text(text)
    _split(text)
    lines = 2 * len(text) // max(1, width) + len(text.splitlines())
    require(lines * len(_text(wrapstring or "")), len(text))


def _json(value: Any, *args: Any, **kwargs: Any) -> None:
    size = written(value)
    given = [*args, *kwargs.values()]
    given += [each for several in given if isinstance(several, list | tuple) for each in several]
    longest = max(
        (each if isinstance(each, int) else len(each) for each in given if isinstance(each, int | str)), default=0
    )
    depth, spaces, level = 0, 0, [value]
    while level and longest > 1:  # each value is indented by its depth
        depth += 1
        spaces += depth * len(level)
        level = [each for outer in level for each in inside(outer)]
    require(longest * spaces, size)


Check = Callable[..., Any]
OPERATORS: dict[str, Check] = {"+": _add, "*": _multiply, "**": _power, "%": _modulo, "-": _subtract}
METHODS: dict[str, Check] = {
    "center": _pad,
    "ljust": _pad,
    "rjust": _pad,
    "zfill": _pad,
    "expandtabs": _expand,
    "replace": _replace,
    "join": _join,
    "translate": _translate,
    "to_bytes": _to_bytes,
    "from_bytes": _from_bytes,
    "encode": _convert,
    "decode": _convert,
    "split": _split,
    "splitlines": _split,
    "rsplit": _search_back,
    "rfind": _search_back,
    "rindex": _search_back,
    "rpartition": _search_back,
    "strip": _strip,
    "lstrip": _strip,
    "rstrip": _strip,
}
"""Of texts, bytes and integers. A check that returns a tuple replaces the first arguments."""
_WRITING = [
    "string",
    "upper",
    "lower",
    "capitalize",
    "escape",
    "e",
    "forceescape",
    "safe",
    "urlencode",
    "truncate",
    "xmlattr",
]
FILTERS: dict[str, Check] = {
    "center": _pad,
    "indent": _indent,
    "replace": _replace,
    "format": _format,
    "batch": _batch,
    "round": _round,
    "wordwrap": _wrap,
    "tojson": _json,
    "sum": _sum,
    "int": _integer,
    "list": _split,
    "title": _pieces,
    "urlize": _links,
    "pprint": _pprint,
    "striptags": _pieces,
    "trim": _trim,
    "sort": _compare,
    "dictsort": _compare,
    "groupby": _compare,
    "unique": _compare,
    "min": _compare,
    "max": _compare,
    "slice": _slice,
    **dict.fromkeys(["map", "select", "reject", "selectattr", "rejectattr"], _collected),
    "wordcount": _split,
    **dict.fromkeys(_WRITING, _shown),
}
_COMPARING = [
    "eq",
    "equalto",
    "==",
    "ne",
    "!=",
    "lt",
    "lessthan",
    "<",
    "le",
    "<=",
    "gt",
    "greaterthan",
    ">",
    "ge",
    ">=",
]
TESTS: dict[str, Check] = {
    "divisibleby": _modulo,
    "odd": _parity,
    "even": _parity,
    **dict.fromkeys([*_COMPARING, "in", "lower", "upper", "filter", "test"], _shown),
}
