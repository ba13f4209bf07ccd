"""Kills a chat at random points, again and again, and proves each time that nothing was lost.

    python -m tools.crash --times 100 [--seed 0]

A process talks to a tiny model and is killed with SIGKILL: after some forwards of a prompt or a reply, inside a
transaction of the store, inside the writing of a snapshot or of a page of evicted
tokens, or after a random time. Meanwhile it searches as the app
does, and a neighbour saves conversations into the same database, closes it again and again, and is killed as well.
Another process then resumes the conversation and checks that what the neighbour saved is there, that the database is
intact, that every turn that was told as finished is there with its reply, that what the cache holds is exactly the
saved ids, and that the next-token logits are those of a plain forward over them. Then a third one goes on with it.
POSIX only: processes are forked, as loading torch anew each time takes seconds.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import signal
import sys
import tempfile
import threading
import time
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamchat.store.connection import connect

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from streamchat.base import events as ev
from streamchat.base import paths
from streamchat.base.requests import Fork, Request, Rewind, Submit, Undo
from streamchat.config.loader import Configuration
from streamchat.config.settings import Settings
from streamchat.conversation.feeder import Feeder
from streamchat.engine.jobs import JobQueue
from streamchat.engine.owner import Owner
from streamchat.models.load import LoadedModel
from streamchat.sessions import recorder
from streamchat.sessions import snapshot as snapshots
from streamchat.sessions.evicted_pages import from_bytes
from streamchat.store import database as databases
from streamchat.store import evicted
from streamchat.store.health import examine
from streamchat.store.records import StoredTurn
from streamchat.store.store import Store
from tests.support.real_engine import tiny_loaded
from tools.actor import save_conversation

POINTS = ("prefill", "reply", "transaction", "snapshot", "page", "between", "time")
NEIGHBOUR = "neighbour "
"""How the titles of another process begin."""
WORDS = ("the sea", "and a dragon", "a knight who sings,", "the green hill", "far away;", "why so?", "tell it again")


@dataclass
class Chat:
    """A conversation without threads: what `Engine` has on its thread."""

    owner: Owner
    jobs: JobQueue
    events: list[ev.Event]

    def send(self, request: Request) -> None:
        """What the engine's thread does with a request."""
        self.jobs.put(request)
        job = self.jobs.get(0)
        assert job is not None
        self.owner.handle(job)


def open_chat(
    loaded: LoadedModel,
    database: Path,
    session: str | None,
    heard: Callable[[ev.Event], None] = lambda event: None,
    *,
    saves: bool = True,
    **settings: Any,
) -> Chat:
    """Begin a conversation, or resume one; `heard` is called with each event, and without `saves` nothing is saved."""
    events: list[ev.Event] = []

    def publish(event: ev.Event) -> None:
        events.append(event)
        heard(event)

    chosen = Settings(**({"max_new_tokens": 24, "temperature": 1.0, "snapshot_turns": 2} | settings))
    jobs = JobQueue()
    open_store = (lambda: Store(database)) if saves else None
    owner = Owner(Configuration(chosen), lambda *_: loaded, publish, lambda *_: None, open_store, jobs)
    owner.host.start(session)
    return Chat(owner, jobs, events)


# --- the process that is killed ---------------------------------------------------------------------------------


def die() -> None:
    """At once, without any cleaning up."""
    os.kill(os.getpid(), signal.SIGKILL)


def arm(point: str, rng: random.Random) -> Callable[[], None]:
    """Let this process die at a random occurrence of `point`; returns what to call between turns."""
    left = rng.randint(
        1, {"prefill": 12, "reply": 60, "transaction": 120, "snapshot": 8, "page": 12, "between": 5, "time": 1}[point]
    )

    def tick(*_: object) -> None:
        nonlocal left
        left -= 1
        if left <= 0:
            die()

    def before(owner: Any, name: str, tick: Callable[..., None]) -> None:
        original = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            tick(*args)
            return original(*args, **kwargs)

        setattr(owner, name, wrapped)

    match point:
        case "prefill":
            before(Feeder, "forward", lambda self, ids: tick() if len(ids) > 1 else None)
        case "reply":
            before(Feeder, "forward", lambda self, ids: tick() if len(ids) == 1 else None)
        case "transaction":

            def traced(path: Path) -> Any:
                connection = connect(path)
                connection.set_trace_callback(tick)
                return connection

            setattr(databases, "connect", traced)  # noqa: B010 - it is imported there
        case "snapshot":
            for owner, name in ((snapshots, "write_tensors"), (paths, "fsync"), (os, "replace")):
                before(owner, name, tick)
        case "page":

            def append(file: Any, data: bytes) -> int:
                nonlocal left
                left -= 1
                if left <= 0:
                    file.write(data[: rng.randrange(len(data))])
                    file.flush()
                    die()
                return int(file.write(data))

            setattr(evicted, "write_data", append)  # noqa: B010 - it is used there
        case "between":
            return tick
        case _:
            threading.Timer(rng.uniform(0.0, 1.5), die).start()
    return lambda: None


def talk(loaded: LoadedModel, database: Path, session: str | None, told: int, rng: random.Random, size: int) -> None:
    """Say things until killed; finished turns are written to `told`, a line each: number and reply."""
    recorder.BATCH_S = rng.choice((0.0, 0.5))
    between = arm(rng.choice(POINTS), rng)
    chat = open_chat(loaded, database, session, cache_size=size, seed=rng.randrange(10**6))
    for _ in range(12):
        if rng.random() < 0.5:  # Ctrl+R
            with Store(database) as store:
                store.search("dragon")
        text = " ".join(rng.choices(WORDS, k=rng.choice((2, 5, 30))))
        chat.send(Submit(text))
        finished = chat.events[-1]
        while not isinstance(finished, ev.TurnFinished):
            chat.events.pop()
            finished = chat.events[-1]
        if not finished.rolled_back:
            os.write(told, f"{finished.stats.turn}\t{finished.reply!r}\n".encode())
        between()
        if rng.random() < 0.15:
            os.write(told, b"undoing\n")
            chat.send(Undo())
            os.write(told, b"undone\n")
        if finished.stats.turn > 1 and rng.random() < 0.2:
            branch(chat, told, rng.randrange(1, finished.stats.turn), forks=rng.random() < 0.5)
    chat.owner.host.end()


def branch(chat: Chat, told: int, turn: int, *, forks: bool) -> None:
    """Go back to `turn`, here or in a fork; what was left, and the session that keeps it, is written to `told`."""
    conversation = chat.owner.conversation
    assert conversation is not None
    if turn >= len(conversation.log.turns):  # some were undone
        return
    parent = chat.owner.archive.session
    os.write(told, f"leaving {turn}\n".encode())
    chat.send(Fork(turn) if forks else Rewind(turn))
    rewound = [event for event in chat.events if isinstance(event, ev.ConversationRewound)]
    kept = parent if forks else rewound[-1].kept_as
    os.write(told, f"left {turn} {kept}\n".encode())


def neighbour(database: Path, told: int, rng: random.Random) -> None:
    """Save conversations and close the database until killed; titles that are saved are written to `told`."""
    threading.Timer(rng.uniform(0.2, 1.5), die).start()
    while True:
        with Store(database) as store:
            for _ in range(rng.randint(1, 3)):
                title = f"{NEIGHBOUR}{rng.randrange(10**12)}"
                save_conversation(store, title, StoredTurn(1, title, "yes", 0, 0, 0, array("i")))
                os.write(told, f"{title}\n".encode())
        time.sleep(rng.uniform(0.0, 0.2))


# --- the process that checks ------------------------------------------------------------------------------------


def latest(store: Store) -> str | None:
    """Id of the newest conversation of the chat; None without one."""
    return next((info.id for info in store.sessions() if not info.title.startswith(NEIGHBOUR)), None)


def check(loaded: LoadedModel, database: Path, told: list[str], beside: set[str], size: int) -> str:
    """Resume and compare; returns how it was resumed.

    Args:
        loaded: The model.
        database: The file.
        told: What the chat wrote before it was killed.
        beside: Titles that neighbours have saved.
        size: Of the cache.

    Raises:
        AssertionError: Something was lost, or is wrong.
    """
    problems = examine(database).problems
    assert not problems, problems
    with Store(database) as store:
        lost = beside - {info.title for info in store.sessions()}
        assert not lost, f"{len(lost)} of {len(beside)} conversations of the neighbour are lost"
        session = latest(store)
        if session is None:
            assert not told
            return "nothing was begun"
        saved = store.load(session)
    numbers = [turn.number for turn in saved.turns]
    assert numbers == list(range(1, len(numbers) + 1)), numbers
    assert all(turn.state == "done" for turn in saved.turns[:-1])
    replies, left = finished_turns(told)
    for number, reply in replies.items():
        assert number <= len(saved.turns), f"turn {number} was finished and is not there"
        assert saved.turns[number - 1].reply == reply, number
    with Store(database) as store:
        for kept, before in left:  # of a branch that was being left when the process was killed, either session has all
            ids = [kept] if kept else [info.id for info in store.sessions()]
            each = [{turn.number: turn.reply for turn in store.load(one).turns} for one in ids]
            assert any(before.items() <= one.items() for one in each), (
                f"turns that {kept or 'no session'} kept are lost"
            )

    chat = open_chat(loaded, database, session, cache_size=size)
    [resumed] = [event for event in chat.events if isinstance(event, ev.ConversationResumed)]
    fresh = resumed.prefilled > 0
    compare(chat, loaded, exact=pure(chat) or not saved.evictions)
    state = state_of(chat)
    chat.owner.host.end()
    with Store(database) as store:
        store.snapshot_path(session).unlink(missing_ok=True)
    again = open_chat(loaded, database, session, cache_size=size)
    compare(again, loaded, exact=pure(again))
    assert state == state_of(again)
    check_archive(again, database, session)
    again.owner.host.end()
    return "read again" if fresh else "from the snapshot"


def check_archive(chat: Chat, database: Path, session: str) -> None:
    """Every row of the archive of evicted turns has its page, whole and of the right tokens; turns can come back."""
    conversation = chat.owner.conversation
    assert conversation is not None
    cache, log = conversation.cache, conversation.log
    archived: set[int] = set()
    with Store(database) as store:
        for stored in store.evicted.pages(session):
            page, data = stored[0], store.evicted.read(stored)
            assert data is not None, f"the page of turn {page.turn} is torn"
            tokens = from_bytes(data)
            assert tokens is not None
            assert tokens.runs == page.runs
            assert page.turn <= len(log.turns), f"turn {page.turn} was undone and is archived"
            if page.part == "evicted":
                archived.update(index for run in page.runs for index in range(*run))
    for turn in log.turns:
        evicted_now = set(range(max(turn.start, cache.num_sink_tokens), turn.end or 0)) - set(cache.ledger)
        size = (turn.end or 0) - turn.start
        if evicted_now and evicted_now <= archived and cache.num_retained + size <= cache.cache_size // 2:
            conversation.page_in(turn.number)
            assert not evicted_now - set(cache.ledger), turn.number
            assert conversation.next_logits().isfinite().all()
            conversation.set_pin(turn.number, False)


def pure(chat: Chat) -> bool:
    """Whether the cache was read again, and nothing left it since: closing a reply that was cut off may need room."""
    [resumed] = [event for event in chat.events if isinstance(event, ev.ConversationResumed)]
    return resumed.prefilled > 0 and not any(isinstance(event, ev.TokensEvicted) for event in chat.events)


Left = list[tuple[str, dict[int, str]]]
"""(session that keeps them, '' if that is not known, replies by turn)."""


def finished_turns(told: list[str]) -> tuple[dict[int, str], Left]:
    """What the killed process had told: replies by turn, those that were taken back left out; and those it had left."""
    replies: dict[int, str] = {}
    left: Left = []
    for line in told:
        match line.split():
            case ["undoing"]:  # and done, or cut off before
                replies.popitem()
            case ["undone"]:
                pass
            case ["leaving", turn]:
                left.append(("", dict(replies)))
                replies = {number: reply for number, reply in replies.items() if number <= int(turn)}
            case ["left", _, kept]:
                left[-1] = (kept, left[-1][1])
            case _:
                number, _, reply = line.partition("\t")
                replies[int(number)] = ast.literal_eval(reply)
    return replies, left


def state_of(chat: Chat) -> tuple[list[int], list[tuple[int, int]]]:
    """The ids of the whole conversation, and the runs of them that are in the cache."""
    conversation = chat.owner.conversation
    assert conversation is not None
    return conversation.log.ids.tolist(), list(conversation.cache.ledger.runs)


def compare(chat: Chat, loaded: LoadedModel, *, exact: bool) -> None:
    """The cache against the saved ids, and against a plain forward over what it holds."""
    conversation = chat.owner.conversation
    assert conversation is not None
    cache, log = conversation.cache, conversation.log
    assert cache.lengths == [cache.length] * len(cache.streaming_layers)
    assert cache.ledger.next_index == len(log)
    assert cache.length <= cache.cache_size
    assert not cache.length or cache.ledger.runs[-1][1] == len(log), "the newest token is not held"
    for turn in log.turns:
        assert turn.end is not None
        said = conversation.tokenizer.decode(log.ids[turn.start : turn.end].tolist(), skip_special_tokens=True)
        assert turn.text.strip(), turn.number
        assert turn.text in said, (turn.text, said)
        assert turn.reply in said, (turn.reply, said)
    if not cache.length:
        return
    kept = log.ids_at(cache.ledger.runs)
    got = conversation.next_logits()
    if exact:
        conversation.close()
        with torch.inference_mode():
            plain = loaded.model(torch.tensor([kept])).logits[0, -1]
        conversation.reopen()
        torch.testing.assert_close(got, plain, atol=2e-4, rtol=0)


# --- one after the other ----------------------------------------------------------------------------------------


def in_a_child(work: Callable[[int], None]) -> tuple[int, str]:
    """Run `work(fd)` in a forked process; returns its wait status and what it wrote to the descriptor."""
    return end_of(begin(work))


def begin(work: Callable[[int], None]) -> tuple[int, int]:
    """Start `work(fd)` in a forked process; returns its number, and where what it writes can be read."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        code = 1
        try:
            work(write)
            code = 0
        except BaseException:
            import traceback

            os.write(write, traceback.format_exc().encode())
        finally:
            os._exit(code)
    os.close(write)
    return child, read


def end_of(begun: tuple[int, int]) -> tuple[int, str]:
    """Wait for what `begin` gave; returns the wait status and all that was written."""
    child, read = begun
    parts = []
    while part := os.read(read, 65536):
        parts.append(part)
    os.close(read)
    return os.waitpid(child, 0)[1], b"".join(parts).decode("utf-8", "replace")


def crash(times: int, seed: int, folder: Path, say: Callable[[str], None] = lambda text: None) -> Counter[str]:
    """Kill `times` processes; returns how each conversation was had back.

    Raises:
        AssertionError: One of them was not.
    """
    torch.set_num_threads(1)
    loaded = tiny_loaded()
    rng = random.Random(seed)
    outcomes: Counter[str] = Counter()
    kills = begun = 0
    while kills < times:
        if kills % 10 == 0:  # a new conversation from time to time
            begun += 1
            size = rng.choice((96, 1024))
            saved: set[str] = set()
        database = folder / str(begun) / "streamchat.db"
        session = None
        if database.exists():
            with Store(database) as store:
                session = latest(store)
        own, other = random.Random(rng.random()), random.Random(rng.random())
        beside = begin(lambda fd: neighbour(database, fd, other))  # noqa: B023
        status, said = in_a_child(lambda fd: talk(loaded, database, session, fd, own, size))  # noqa: B023
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, said
        killed = os.WIFSIGNALED(status)
        told = said.splitlines() if killed else []
        its_status, titles = end_of(beside)
        assert os.WIFSIGNALED(its_status), titles
        saved |= {title for title in titles.splitlines() if title}

        def checked(fd: int, told: list[str] = told, database: Path = database, size: int = size) -> None:
            if database.exists():
                os.write(fd, check(loaded, database, told, saved, size).encode())  # noqa: B023
            else:
                os.write(fd, b"nothing was begun")

        status, answer = in_a_child(checked)
        assert status == 0, f"after kill {kills + 1}: {answer}"
        if killed:
            kills += 1
            outcomes[answer] += 1
            say(f"{kills}: {answer}")
    return outcomes


def main() -> int:
    """Run it and print what came of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--times", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["STREAMCHAT_HOME"] = folder
        outcomes = crash(args.times, args.seed, Path(folder), lambda text: print(text, file=sys.stderr))
    listed = ", ".join(f"{count} {how}" for how, count in outcomes.most_common())
    print(f"killed {args.times} times in {time.perf_counter() - started:.0f} s; conversations had back: {listed}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
