"""The page of `streamchat bench`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from streamchat.base.formatting import human_bytes, human_seconds
from streamchat.benchmarks.methods import Method
from streamchat.benchmarks.workloads import LATE, ChatFigures, DecodeFigures
from streamchat.reports.chart import Bars, Chart, Picture, Series
from streamchat.reports.page import Page, Table

OURS = "streamchat"


def make_page(
    methods: Sequence[Method],
    decode: dict[str, DecodeFigures],
    chat: dict[str, ChatFigures],
    lines: Sequence[str],
    notes: Sequence[str],
    about: dict[str, Any],
) -> Page:
    """All that was measured; `decode` or `chat` may be empty."""
    tables: list[Table] = []
    pictures: list[Picture] = []
    told = list(notes)
    size = about["cache_size"]
    if decode:
        tables.append(_decode_table(decode, size))
        pictures += _decode_pictures(decode, size)
        told += [f"{name}: {each.failure}" for name, each in decode.items() if each.failure]
    if chat:
        tables.append(_chat_table(chat))
        pictures += _chat_pictures(chat)
        told += [f"{name}, chat: {each.failure}" for name, each in chat.items() if each.failure]
        told += [
            f"{name} was not measured at turn {place}: it would have taken about {human_seconds(seconds)} a turn; "
            "raise --limit."
            for name, each in chat.items()
            for place, seconds in each.skipped.items()
        ]
        told += [
            f"{name} was not measured at turn {place}: when the time was over, it had read the history up to turn "
            f"{number}; raise --limit."
            for name, each in chat.items()
            for place, number in each.unread.items()
        ]
    ways = [f"{method.name}: {method.words}" for method in methods]
    return Page(
        "bench",
        "Benchmark",
        (*lines, *ways),
        tuple(tables),
        tuple(pictures),
        tuple(told),
        {
            **about,
            "decode": {name: _decode_data(name, decode) for name in decode},
            "chat": {name: _chat_data(name, chat) for name in chat},
        },
    )


def _spread(values: Sequence[float], digits: int = 1) -> str:
    """`24.1 (23.8-25.0)`: the median, and the least and the most."""
    if not values:
        return "-"
    middle = f"{statistics.median(values):,.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):,.{digits}f}-{max(values):,.{digits}f})"


def _ratio(theirs: Sequence[float], ours: Sequence[float]) -> float | None:
    """Median of theirs / ours, a pair a round."""
    if not theirs or not ours:
        return None
    return statistics.median(a / b for a, b in zip(theirs, ours, strict=False))


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} x" if value < 10 else f"{value:.0f} x"


def _share(parts: Sequence[float], wholes: Sequence[float]) -> str:
    """Median of part / whole, a pair a round, in percent."""
    if not parts or not wholes:
        return "-"
    return f"{100 * statistics.median(a / b for a, b in zip(parts, wholes, strict=False)):.1f} %"


def _ours_decode(decode: dict[str, DecodeFigures]) -> DecodeFigures:
    return decode.get(OURS, DecodeFigures())


def _decode_table(decode: dict[str, DecodeFigures], size: int) -> Table:
    ours = _ours_decode(decode)
    device = next((each.device_bytes for each in decode.values() if each.device_bytes is not None), None)
    rows = []
    for name, each in decode.items():
        late = statistics.median(each.late_ms) if each.late_ms else None
        rows.append(
            (
                name,
                _spread(each.prefill_tps, 0),
                _spread(each.early_ms),
                _spread(each.late_ms),
                f"{1000 / late:,.1f}" if late else "-",
                _times(_ratio(each.late_ms, ours.late_ms)),
                _times(_ratio(each.late_ms, each.early_ms)),
                _share(each.evicting_ms, each.late_ms),
                human_bytes(each.kv_bytes) if each.late_ms else "-",
                f"{each.rss_bytes / 1e6:+,.0f} MB" if each.late_ms else "-",
                *([] if device is None else [human_bytes(each.device_bytes or 0)]),
            )
        )
    columns = (
        "endless text",
        "prefill tok/s",
        f"ms a token at {size:,}",
        f"at {LATE * size:,}",
        "tok/s there",
        "time / ours",
        "late / early",
        "evictions",
        "keys and values",
        "process",
        *([] if device is None else ["device, most"]),
    )
    words = (
        f"Prefill: a prompt of {size:,} tokens into an empty cache. Then tokens are written behind {size:,} and behind "
        f"{LATE * size:,} tokens of text. Medians over rounds, with the least and the most. Evictions: "
        "their part of the time of a token there."
    )
    return Table("Endless text", columns, tuple(rows), words)


def _decode_pictures(decode: dict[str, DecodeFigures], size: int) -> list[Picture]:
    bars = tuple((name, 1000 / statistics.median(each.late_ms)) for name, each in decode.items() if each.late_ms)
    words = f"Tokens a second behind {LATE * size:,} tokens of text."
    return [Bars("decode", f"Decode speed at {LATE * size:,} tokens", words, "tok/s", bars)] if bars else []


def _chat_table(chat: dict[str, ChatFigures]) -> Table:
    places = sorted({place for each in chat.values() for place in each.history})
    history = {place: max(each.history.get(place, 0) for each in chat.values()) for place in places}
    ours = chat.get(OURS, ChatFigures())
    rows = []
    for name, each in chat.items():
        last = max(each.seconds, default=None)
        ratio = None if last is None else _ratio(each.seconds[last], ours.seconds.get(last, []))
        cells = [_spread([1000 * value for value in each.seconds.get(place, [])], 0) for place in places]
        held = human_bytes(each.kv_bytes[last]) if last is not None else "-"
        where = "" if last is None or last == places[-1] else f" at turn {last}"
        rows.append((name, *cells, _times(ratio) + (where if ratio is not None else ""), held))
    columns = ("chat", *(f"ms at turn {place:,} ({history[place]:,} tokens)" for place in places))
    words = "Time to the first token of the reply. Medians of turns in a row, with the least and the most."
    return Table("Time to first token", (*columns, "time / ours", "keys and values"), tuple(rows), words)


def _chat_pictures(chat: dict[str, ChatFigures]) -> list[Picture]:
    series = [
        Series(name, list(map(float, each.seconds)), [1000 * statistics.median(v) for v in each.seconds.values()])
        for name, each in chat.items()
        if len(each.seconds) > 1
    ]
    if not series:
        return []
    words = "Time to the first token of the reply, as the conversation grows."
    title = "Time to first token"
    return [Chart("first-token", title, words, "turn", "milliseconds", tuple(series), log_x=True, log_y=True)]


def _summary(values: Sequence[float]) -> dict[str, float] | None:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)} if values else None


def _decode_data(name: str, decode: dict[str, DecodeFigures]) -> dict[str, Any]:
    each, ours = decode[name], _ours_decode(decode)
    return {
        "prefill_tps": _summary(each.prefill_tps),
        "early_ms": _summary(each.early_ms),
        "late_ms": _summary(each.late_ms),
        "time_to_ours": _ratio(each.late_ms, ours.late_ms),
        "prefill_time_to_ours": _ratio(ours.prefill_tps, each.prefill_tps),
        "late_to_early": _ratio(each.late_ms, each.early_ms),
        "evicting_ms": _summary(each.evicting_ms) if each.evicting_ms else None,
        "kv_bytes": each.kv_bytes,
        "rss_bytes": each.rss_bytes,
        "device_bytes": each.device_bytes,
        "failure": each.failure or None,
    }


def _chat_data(name: str, chat: dict[str, ChatFigures]) -> dict[str, Any]:
    each, ours = chat[name], chat.get(OURS, ChatFigures())
    return {
        "first_token_ms": {
            str(place): _summary([1000 * value for value in values]) for place, values in each.seconds.items()
        },
        "time_to_ours": {
            str(place): _ratio(values, ours.seconds.get(place, [])) for place, values in each.seconds.items()
        },
        "history": {str(place): length for place, length in each.history.items()},
        "kv_bytes": {str(place): held for place, held in each.kv_bytes.items()},
        "not_reached": {str(place): number for place, number in each.unread.items()},
        "not_measured": {str(place): seconds for place, seconds in each.skipped.items()},
        "failure": each.failure or None,
    }
