"""Checks in long chats that `/rewind` is exact and that forks never mix; with a tiny model, or `rewind` with any model.

    python -m tools.time_travel rewind               # to each of the last 64 of 300 turns
    python -m tools.time_travel rewind --model default --cache-size 256 --kv-dtype int8
    python -m tools.time_travel forks --turns 1000   # two forks, which must not mix

`rewind` starts from the last turn each time. It compares the logits, bit for bit, with those that were computed after
that turn. It reports the time per rewind, elapsed and CPU, which includes saving the fork that keeps the later turns.
The records for undo in memory are cleared first, so each rewind uses the archive.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

from streamchat.base import events as ev
from streamchat.base.requests import Fork, OpenSession, Rewind, Submit
from streamchat.cache import checkpoint
from streamchat.cache.dtype import set_cache_dtype
from streamchat.cache.layers.codes import INT4, CacheDtype
from streamchat.models.load import LoadedModel, load_model
from streamchat.store.store import Store
from tests.support.real_engine import tiny_loaded
from tools.crash import Chat, open_chat

LAST = 64
"""Number of turns to rewind to."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8, "int4": INT4}


def logits_of(chat: Chat) -> Tensor:
    """Return the next token's logits, and leave the cache unchanged."""
    conversation = chat.owner.conversation
    assert conversation is not None
    saved = checkpoint.capture(conversation.cache)
    history, conversation.cache.history = conversation.cache.history, None
    found = conversation.next_logits().clone()
    conversation.cache.history = history
    last = saved.length - 1
    for i, layer in enumerate(conversation.cache.streaming_layers):  # the newest token was computed in another way
        assert layer.storage is not None
        names = [name for name in saved.tensors if name.startswith(f"{i}.") and "original" not in name]
        raw = {name.partition(".")[2]: saved.tensors[name][:, :, last:] for name in names}
        layer.storage.write_raw(layer.start + last, raw)
    return found


def talk(chat: Chat, first: int, last: int, text: str) -> dict[int, Tensor]:
    """Send `text` as the message of turns `first` to `last`; return the next token's logits after each turn."""
    logits = {}
    for number in range(first, last + 1):
        chat.send(Submit(f"{text} {number}, please"))
        logits[number] = logits_of(chat)
    return logits


def rewind(
    loaded: LoadedModel, folder: Path, turns: int, cache_size: int, dtype: CacheDtype
) -> list[tuple[float, float]]:
    """Rewind a chat of `turns` turns to each of the last `LAST` ones; return elapsed and CPU time of each, in seconds.

    Raises:
        AssertionError: The logits differ, or a turn was not exact.
    """
    set_cache_dtype(loaded.model, dtype)
    chat = open_chat(loaded, folder / "streamchat.db", None, cache_size=cache_size, max_new_tokens=8)
    logits = talk(chat, 1, turns, "question number")
    session = chat.owner.archive.session
    assert session is not None
    conversation = chat.owner.conversation
    assert conversation is not None
    oldest = conversation.state().first_visible_turn
    assert oldest > turns - LAST
    times = []
    for turn in range(turns - 1, turns - 1 - LAST, -1):
        conversation = chat.owner.conversation
        assert conversation is not None
        conversation.rollback.clear()  # as in a new process: otherwise, undo would use the records in memory
        began = time.process_time()
        chat.send(Rewind(turn))
        used = time.process_time() - began
        done = [event for event in chat.events if isinstance(event, ev.ConversationRewound)][-1]
        assert done.turn == turn
        assert done.is_exact, turn
        assert torch.equal(logits_of(chat), logits[turn]), turn
        times.append((done.seconds, used))
        chat.send(OpenSession(done.kept_as))  # and forward again: each rewind is from the last turn
        assert torch.equal(logits_of(chat), logits[turns]), turn
    chat.owner.host.end()
    return times


def forks(folder: Path, turns: int) -> None:
    """Continue two forks alternately, up to `turns` turns each, and check that neither has a trace of the other.

    Raises:
        AssertionError: The forks mix, or the logits of one change while the other continues.
    """
    database, loaded = folder / "streamchat.db", tiny_loaded()
    chat = open_chat(loaded, database, None, cache_size=128, max_new_tokens=4, temperature=0)
    talk(chat, 1, 20, "common question")
    parent, ids = chat.owner.archive.session, list[str]()
    assert parent is not None
    for name in ("one", "other"):
        chat.send(Fork(10))
        session = chat.owner.archive.session
        assert session not in (None, parent)
        assert session is not None
        ids.append(session)
        chat.send(Submit(f"fork {name} starts"))
        chat.send(OpenSession(parent))
    last: dict[str, Tensor] = {}
    for start in range(11, turns, 100):
        for session, name in zip(ids, ("one", "other"), strict=True):
            chat.send(OpenSession(session))
            if session in last:
                assert torch.equal(logits_of(chat), last[session])
            conversation = chat.owner.conversation
            assert conversation is not None
            stop = min(turns, start + 100)
            last[session] = list(talk(chat, len(conversation.log.turns) + 1, stop, f"fork {name}").values())[-1]
    chat.owner.host.end()
    with Store(database) as store:
        for session, name in zip(ids, ("one", "other"), strict=True):
            said = [turn.text for turn in store.load(session).turns]
            assert len(said) == turns
            assert all("common" in text for text in said[:10])
            assert all(f"fork {name}" in text for text in said[10:])
        assert len(store.load(parent).turns) == 20


def main() -> int:
    """Run `rewind` or `forks`, and print the result."""
    parser = argparse.ArgumentParser(prog="python -m tools.time_travel", description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("rewind", "forks"))
    parser.add_argument("--turns", type=int, help="turns of the chat (default: 300, or 1000 for forks)")
    parser.add_argument(
        "--kv-dtype", choices=tuple(DTYPES), default="float32", help="how keys and values are stored (default: float32)"
    )
    parser.add_argument("--model", help="model of `rewind` (default: a tiny one with random weights)")
    parser.add_argument("--cache-size", type=int, default=128, help="budget of `rewind` (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        if args.what == "forks":
            forks(Path(name), args.turns or 1000)
            print(f"two forks of {args.turns or 1000} turns never mixed ({time.perf_counter() - started:.0f} s)")
        else:
            loaded = load_model(args.model, device="cpu") if args.model else tiny_loaded()
            times = rewind(loaded, Path(name), args.turns or 300, args.cache_size, DTYPES[args.kv_dtype])
            print(f"rewound to each of the last {LAST} of {args.turns or 300} turns, equal to the bit")
            for label, column in zip(("time", "CPU time"), zip(*times, strict=True), strict=True):
                milliseconds = [1000 * seconds for seconds in column]
                print(f"{label}: median {statistics.median(milliseconds):.1f} ms, at most {max(milliseconds):.1f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
