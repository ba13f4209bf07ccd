"""The page of `streamchat bench`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from streamchat.base.formatting import human_bytes, human_seconds
from streamchat.benchmarks.figures import paired_ratio, spread, summary
from streamchat.benchmarks.methods.stream import Stream
from streamchat.benchmarks.workloads import LATE, ChatFigures, DecodeFigures
from streamchat.reports.chart import Bars, Chart, Picture, Series
from streamchat.reports.page import Page, Table

OURS = "streamchat"


def make_page(
    streams: Sequence[Stream],
    decode: dict[str, DecodeFigures],
    chat: dict[str, ChatFigures],
    lines: Sequence[str],
    notes: Sequence[str],
    about: dict[str, Any],
) -> Page:
    """Build the page from all figures; `decode` or `chat` may be empty."""
    tables: list[Table] = []
    pictures: list[Picture] = []
    messages = list(notes)
    size = about["cache_size"]
    if decode:
        tables.append(_decode_table(decode, size))
        pictures += _decode_pictures(decode, size)
        messages += [f"{name}: {each.failure}" for name, each in decode.items() if each.failure]
    if chat:
        tables.append(_chat_table(chat))
        pictures += _chat_pictures(chat)
        messages += [f"{name}, chat: {each.failure}" for name, each in chat.items() if each.failure]
        messages += [
            f"{name} was not measured at turn {turn}: it would have taken about {human_seconds(seconds)} per turn; "
            "raise --limit."
            for name, each in chat.items()
            for turn, seconds in each.skipped.items()
        ]
        messages += [
            f"{name} timed out before turn {turn}: history processed only up to turn {number}; raise --limit."
            for name, each in chat.items()
            for turn, number in each.unreached.items()
        ]
    descriptions = [f"{stream.name}: {stream.description}" for stream in streams]
    return Page(
        "bench",
        "Benchmark",
        [*lines, *descriptions],
        tables,
        pictures,
        messages,
        {
            **about,
            "decode": {name: _decode_data(name, decode) for name in decode},
            "chat": {name: _chat_data(name, chat) for name in chat},
        },
    )


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} x" if value < 10 else f"{value:.0f} x"


def _share(parts: Sequence[float], wholes: Sequence[float]) -> str:
    """Format the median of part / whole in percent, one pair per round."""
    ratio = paired_ratio(parts, wholes)
    return "-" if ratio is None else f"{100 * ratio:.1f} %"


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
                spread(each.prefill_tps, 0),
                spread(each.early_ms),
                spread(each.late_ms),
                f"{1000 / late:,.1f}" if late else "-",
                _times(paired_ratio(each.late_ms, ours.late_ms)),
                _times(paired_ratio(each.late_ms, each.early_ms)),
                _share(each.evicting_ms, each.late_ms),
                human_bytes(each.kv_bytes) if each.late_ms else "-",
                f"{each.rss_bytes / 1e6:+,.0f} MB" if each.late_ms else "-",
                *([] if device is None else [human_bytes(each.device_bytes or 0)]),
            )
        )
    columns = (
        "endless text",
        "prefill tok/s",
        f"ms per token at {size:,}",
        f"at {LATE * size:,}",
        "tok/s there",
        "time / ours",
        "late / early",
        "evictions",
        "keys and values",
        "process",
        *([] if device is None else ["device, peak"]),
    )
    words = (
        f"Prefill: a prompt of {size:,} tokens into an empty cache. Decoding is timed after {size:,} and after "
        f"{LATE * size:,} tokens of text. Medians over rounds, with minimum and maximum. Evictions: their share of the "
        "time per token there."
    )
    return Table("Endless text", columns, rows, words)


def _decode_pictures(decode: dict[str, DecodeFigures], size: int) -> list[Picture]:
    bars = tuple((name, 1000 / statistics.median(each.late_ms)) for name, each in decode.items() if each.late_ms)
    words = f"Tokens per second after {LATE * size:,} tokens of text."
    return [Bars("decode", f"Decode speed at {LATE * size:,} tokens", words, "tok/s", bars)] if bars else []


def _chat_table(chat: dict[str, ChatFigures]) -> Table:
    turns = sorted({turn for each in chat.values() for turn in each.history})
    history = {turn: max(each.history.get(turn, 0) for each in chat.values()) for turn in turns}
    ours = chat.get(OURS, ChatFigures())
    rows = []
    for name, each in chat.items():
        last = max(each.seconds, default=None)
        ratio = None if last is None else paired_ratio(each.seconds[last], ours.seconds.get(last, []))
        cells = [spread([1000 * value for value in each.seconds.get(turn, [])], 0) for turn in turns]
        cached = human_bytes(each.kv_bytes[last]) if last is not None else "-"
        where = "" if last is None or last == turns[-1] else f" at turn {last}"
        rows.append((name, *cells, _times(ratio) + (where if ratio is not None else ""), cached))
    columns = ("chat", *(f"ms at turn {turn:,} ({history[turn]:,} tokens)" for turn in turns))
    words = "Time to the first token of the reply. Medians over consecutive turns, with minimum and maximum."
    return Table("Time to first token", (*columns, "time / ours", "keys and values"), rows, words)


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


def _decode_data(name: str, decode: dict[str, DecodeFigures]) -> dict[str, Any]:
    each, ours = decode[name], _ours_decode(decode)
    return {
        "prefill_tps": summary(each.prefill_tps),
        "early_ms": summary(each.early_ms),
        "late_ms": summary(each.late_ms),
        "time_to_ours": paired_ratio(each.late_ms, ours.late_ms),
        "prefill_time_to_ours": paired_ratio(ours.prefill_tps, each.prefill_tps),
        "late_to_early": paired_ratio(each.late_ms, each.early_ms),
        "evicting_ms": summary(each.evicting_ms),
        "kv_bytes": each.kv_bytes,
        "rss_bytes": each.rss_bytes,
        "device_bytes": each.device_bytes,
        "failure": each.failure or None,
    }


def _chat_data(name: str, chat: dict[str, ChatFigures]) -> dict[str, Any]:
    each, ours = chat[name], chat.get(OURS, ChatFigures())
    return {
        "first_token_ms": {turn: summary([1000 * value for value in values]) for turn, values in each.seconds.items()},
        "time_to_ours": {turn: paired_ratio(each.seconds[turn], ours.seconds.get(turn, [])) for turn in each.seconds},
        "history": each.history,
        "kv_bytes": each.kv_bytes,
        "not_reached": each.unreached,
        "not_measured": each.skipped,
        "failure": each.failure or None,
    }
