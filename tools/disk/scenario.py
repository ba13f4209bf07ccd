"""A chat with everything that a user does around it, whose writes are recorded or made to fail.

    python -m tools.disk.scenario HOME LOG    (started by `tools.power_loss`)

In one process, and with streamchat's own functions, it chats with a tiny model with evictions, pins, unpins, undoes,
retries, renames, clears, switches sessions, exports, saves settings, deletes a session, stores a converted model and a
token, closes, resumes, and restores a backup. Before and after each step, it reports what a user may rely on (`Truth`).
Files of later versions are covered as soon as a step makes streamchat write them.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from streamchat.base import events as ev
from streamchat.base import paths
from streamchat.base import requests as rq
from streamchat.base.errors import StreamchatError
from streamchat.cache.checkpoint import CacheCheckpoint
from streamchat.cli.main import main as streamchat
from streamchat.config.files import read_file
from streamchat.config.writing import write_settings
from streamchat.frontend.typed_history import TypedHistory
from streamchat.models import staging
from streamchat.models.load import LoadedModel
from streamchat.models.tile_file import TileWriter
from streamchat.server.access import read_token, token_path
from streamchat.sessions import recorder
from streamchat.sessions import snapshot as snapshots
from streamchat.store.database import database_path
from tests.support.real_engine import tiny_loaded
from tools.crash import Chat, open_chat
from tools.disk.shim import Shim

CACHE_SIZE = 128
SECRET = "zanzibar quagga"
"""A text of the session that is deleted."""
MODEL_FILE = "model.safetensors"
Say = Callable[[dict[str, Any]], None]


@dataclass
class SessionTruth:
    """What the disk must have of one session."""

    title: str
    turns: list[list[str]]
    """Message and reply of each turn."""
    pins: list[list[int]]
    temperature: float


@dataclass
class Truth:
    """What a user may rely on."""

    sessions: dict[str, SessionTruth] = field(default_factory=dict)
    deleted: list[str] = field(default_factory=list)
    """Ids of deleted sessions. No file may have their cache, or `SECRET`, which was in their text."""
    settings: dict[str, Any] = field(default_factory=dict)
    settings_or: dict[str, Any] = field(default_factory=dict)
    """What they also may be: their last change failed, and may have been written."""
    typed: list[str] = field(default_factory=list)
    """What was typed; its newest lines may be lost in a power failure."""
    token: str = ""
    exports: dict[str, str] = field(default_factory=dict)
    """Path below the home folder -> SHA-256."""


class Unsaid(Exception):
    """A fault: a failure that was not reported in exactly one sentence for the user."""


def digest_of(checkpoint: CacheCheckpoint) -> str:
    """Return a digest of a cache: all bits of all tensors, and the indices of their tokens."""
    digest = hashlib.sha256(repr((checkpoint.bases, checkpoint.runs, checkpoint.next_index)).encode())
    for name in sorted(checkpoint.tensors):
        tensor = checkpoint.tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_sentence(text: str) -> None:
    """Raise `Unsaid` unless `text` is for a user: no traceback, one line."""
    if not text.strip() or "Traceback" in text or "\n" in text.strip() or "unexpected " in text:
        raise Unsaid(f"not a sentence for a user: {text!r}")


class Scenario:
    """Carries out the steps, one after the other.

    Args:
        loaded: The model.
        say: Takes a mark: {"begin": step}, {"end": step, "truth": ...}, {"turn": ...} as soon as a turn is finished
            and saved, {"snapshot": session, "digest": ...} before a snapshot is written.
    """

    def __init__(self, loaded: LoadedModel, say: Say) -> None:
        self.loaded, self._say = loaded, say
        self.truth = Truth()
        self.told: list[str] = []
        """Sentences about failures, in order."""
        self.is_saving = True
        self.unsure: set[str] = set()
        """Sessions that were left while the chat had said that it could not save them."""
        self.ids: list[str] = []
        """Ids of the sessions, in the order of their creation."""
        self._chat: Chat | None = None
        self._active: str | None = None

    # --- running ------------------------------------------------------------------------------------------------

    def steps(self) -> list[tuple[str, Callable[[], None]]]:
        """Return the names and functions of all steps."""
        return [
            ("save settings", lambda: self.save_settings(temperature=0.5, snapshot_turns=2)),
            ("start", self.start),
            ("type", lambda: self.type("hello there")),
            ("turn 1", lambda: self.turn("the sea and a dragon", is_slow=True)),
            ("turn 2", lambda: self.turn("a knight who sings, far away; why so?")),
            ("pin", lambda: self.pin(2)),
            ("turn 3", lambda: self.turn("tell it again and again, the green hill")),
            ("title", lambda: self.title("about a dragon")),
            ("turn 4", lambda: self.turn("a dragon, a knight, the sea, the hill; why so?")),
            ("undo", lambda: self.request(rq.Undo())),
            ("turn 4 again", lambda: self.turn("another one, far away")),
            ("retry", lambda: self.request(rq.Retry())),
            ("unpin", lambda: self.request(rq.Unpin(2))),
            ("option", lambda: self.request(rq.SetOption("temperature", 0.7))),
            ("turn 5", lambda: self.turn("the end of it", is_slow=True)),
            ("export", lambda: self.export(0, "one.md")),
            ("clear", lambda: self.request(rq.Clear())),
            ("secret", lambda: self.turn(SECRET)),
            ("secret again", lambda: self.turn(f"more of {SECRET}")),
            ("switch", lambda: self.switch(0)),
            ("turn 6", lambda: self.turn("where were we")),
            ("token", self.token),
            ("model", self.model),
            ("delete", lambda: self.delete(1)),
            ("save settings again", lambda: self.save_settings(cache_size=128)),
            ("type more", lambda: self.type("good bye")),
            ("export again", lambda: self.export(0, "two.jsonl")),
            ("close", self.close),
            ("resume", lambda: self.start(0)),
            ("turn 7", lambda: self.turn("once more")),
            ("close again", self.close),
            ("restore", self.restore),
        ]

    def run(self, before: Callable[[str], None] = lambda step: None) -> None:
        """Carry out all steps; call `before` before each."""
        with self._snapshots_said():
            for name, step in self.steps():
                before(name)
                self.step(name, step)

    def step(self, name: str, step: Callable[[], None]) -> None:
        """Carry out one step. If it fails and reports that in one sentence, add the sentence to `told`."""
        self._say({"begin": name})
        try:
            was_saving = self.is_saving
            step()
        except StreamchatError as error:
            self._tell(str(error))
        if self._active not in (None, self.session) and not (was_saving and self.is_saving):
            self.unsure.add(str(self._active))
        self._active = self.session
        wait_for_upkeep()
        self._learn()
        self._say({"end": name, "truth": asdict(self.truth)})

    @property
    def session(self) -> str | None:
        """Id of the session of the running chat."""
        return None if self._chat is None else self._chat.owner.archive.session

    def _tell(self, sentence: str) -> None:
        check_sentence(sentence)
        self.told.append(sentence)

    @contextlib.contextmanager
    def _snapshots_said(self) -> Iterator[None]:
        save = snapshots.save

        def said(path: Path, snapshot: snapshots.Snapshot) -> int:
            self._say({"snapshot": snapshot.session, "digest": digest_of(snapshot.checkpoint)})
            return save(path, snapshot)

        snapshots.save = said
        try:
            yield
        finally:
            snapshots.save = save

    def _learn(self) -> None:
        """Add the state of the running chat to the truth."""
        owner = None if self._chat is None else self._chat.owner
        if owner is None or owner.conversation is None or (session := owner.archive.session) is None:
            return
        if session not in self.ids:
            self.ids.append(session)
        conversation = owner.conversation
        title = self.truth.sessions[session].title if session in self.truth.sessions else ""
        self.truth.sessions[session] = SessionTruth(
            title,
            [[turn.text, turn.reply] for turn in conversation.log.turns],
            [list(run) for run in conversation.cache.pins],
            conversation.settings.temperature,
        )

    # --- steps --------------------------------------------------------------------------------------------------

    def start(self, resumed: int | None = None) -> None:
        """Open a new chat, or resume one."""
        session = None if resumed is None or resumed >= len(self.ids) else self.ids[resumed]
        settings: dict[str, Any] = {"cache_size": CACHE_SIZE, "seed": 1, "snapshot_turns": 2, "temperature": 0.5}
        settings["max_new_tokens"] = 12
        self.is_saving = True
        self._chat = open_chat(self.loaded, database_path(), session, self._heard, **settings)

    def _heard(self, event: ev.Event) -> None:
        match event:
            case ev.SavingChanged(works=works):
                self.is_saving = works
            case ev.Notice(text=text, level=level):
                check_sentence(text)
                if level != "info":
                    self.told.append(text)
            case ev.EngineFailed():
                raise Unsaid(f"the engine failed: {event}")
            case ev.TurnFinished() if event.rolled_back:
                raise Unsaid(f"a turn failed: {event.message}")
            case ev.TurnFinished() if self.is_saving and self._chat is not None:
                turn = [event.text, event.reply]
                self._say({"turn": self._chat.owner.archive.session, "number": event.stats.turn, "said": turn})
            case _:
                pass

    def request(self, request: rq.Request) -> None:
        """Send one request to the chat."""
        if self._chat is not None:
            self._chat.send(request)

    def turn(self, text: str, *, is_slow: bool = False) -> None:
        """Take one turn; a slow reply is saved token by token, a fast one when it ends."""
        batch = recorder.BATCH_S
        recorder.BATCH_S = 0.0 if is_slow else batch
        try:
            self.request(rq.Submit(text))
        finally:
            recorder.BATCH_S = batch

    def pin(self, number: int) -> None:
        """Pin a turn."""
        self.request(rq.Pin(number))

    def title(self, title: str) -> None:
        """Rename the session."""
        self.request(rq.SetTitle(title))
        if self._chat is not None and any(
            isinstance(event, ev.Notice) and title in event.text for event in self._chat.events[-2:]
        ):
            self.truth.sessions[self._chat.owner.archive.session or ""].title = title

    def switch(self, index: int) -> None:
        """Open another session."""
        if index < len(self.ids):
            self.request(rq.OpenSession(self.ids[index]))

    def close(self) -> None:
        """Leave the chat."""
        chat, self._chat = self._chat, None
        if chat is not None:
            chat.owner.host.end()

    def save_settings(self, **changes: Any) -> None:
        """Save settings as the settings screen does."""
        file = paths.config_dir() / "config.toml"
        try:
            write_settings(file, changes)
        except StreamchatError:  # they may have been written, and not flushed
            self.truth.settings_or = self.truth.settings | changes
            with contextlib.suppress(StreamchatError):  # reading may fail as well
                if file.exists() and dict(read_file(file).values) == self.truth.settings_or:
                    self.truth.settings = dict(self.truth.settings_or)
            raise
        self.truth.settings |= changes
        if self.truth.settings_or:
            self.truth.settings_or |= changes

    def type(self, text: str) -> None:
        """Add to the input history."""
        history = TypedHistory.open(True)
        if not history.problem:
            history.add(text)
        if history.problem:
            self._tell(history.problem)
        else:
            self.truth.typed.append(text)

    def token(self) -> None:
        """Create the token of a server."""
        self.truth.token = read_token(token_path())[0]

    def model(self) -> None:
        """Store a converted model."""

        def build(folder: Path) -> dict[str, Any]:
            with TileWriter(folder / MODEL_FILE, 2) as file:
                for name in ("one", "two"):
                    file.add(name, torch.arange(1024, dtype=torch.float32))
            return {"kind": "tiles"}

        target = staging.models_dir() / "tiny"
        staging.ensure(target, build, what="the model", progress=lambda *_: None)

    def export(self, index: int, name: str) -> None:
        """Export a session with the command."""
        if index < len(self.ids):
            target = paths.data_dir().parent / name
            self.command("sessions", "export", self.ids[index], "--output", str(target))
            with contextlib.suppress(OSError):  # reading may fail as well
                self.truth.exports[name] = hashlib.sha256(target.read_bytes()).hexdigest()

    def delete(self, index: int) -> None:
        """Delete a session with the command."""
        if index < len(self.ids):
            session = self.ids[index]
            if self.command("sessions", "delete", session, "--yes") == 0:
                self.truth.sessions.pop(session, None)
                self.truth.deleted.append(session)
            else:
                self.unsure.add(session)

    def restore(self) -> None:
        """Replace the database by its newest backup with the command."""
        names = sorted(path.name for path in (paths.data_dir() / "backups").glob("*.db"))
        if names and self.command("sessions", "restore-backup", names[-1], "--yes") == 0:
            try:
                self.truth.sessions, running = _stored_sessions()
                self.unsure |= running
            except StreamchatError:  # the backup is restored, and cannot be read here
                self.unsure |= {*self.ids}
                raise

    def command(self, *arguments: str) -> int:
        """Run a command of streamchat; return its exit code. If it fails, it must print one sentence."""
        out, error = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            code = streamchat(list(arguments))
        if code:
            self._tell(error.getvalue())
        return code


def _stored_sessions() -> tuple[dict[str, SessionTruth], set[str]]:
    """Return the saved sessions, and the ids of those whose newest turn was not saved to its end."""
    from streamchat.store.store import Store

    found, running = dict[str, SessionTruth](), set[str]()
    with Store() as store:
        for info in store.sessions():
            turns = store.load(info.id).turns
            done = [[turn.text, turn.reply] for turn in turns if turn.state == "done"]
            if len(done) < len(turns):
                running.add(info.id)
            pins = [list(run) for run in info.pins]
            found[info.id] = SessionTruth(info.title, done, pins, float(info.settings.get("temperature", 0)))
    return found, running


def wait_for_upkeep() -> None:
    for thread in threading.enumerate():
        if thread.name == "streamchat-upkeep":
            thread.join(30)


def main() -> int:
    """Run the scenario and record it. Nothing in it may fail."""
    home, log = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    loaded, shim = tiny_loaded(), Shim()
    shim.start(home, log)
    scenario = Scenario(loaded, lambda mark: shim.mark(json.dumps(mark)))
    scenario.run()
    shim.stop()
    for sentence in scenario.told:
        print(sentence, file=sys.stderr)
    return 1 if scenario.told else 0


if __name__ == "__main__":
    raise SystemExit(main())
