"""Opens a home folder after a power failure with streamchat, and compares it with the promises."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from streamchat.base import events as ev
from streamchat.base import paths
from streamchat.base.errors import StreamchatError
from streamchat.cache import checkpoint
from streamchat.config.files import read_file
from streamchat.frontend.typed_history import TypedHistory
from streamchat.models import staging
from streamchat.models.load import LoadedModel
from streamchat.models.tile_file import read_tiles
from streamchat.server.access import read_token, token_path
from streamchat.sessions.archive import Archive
from streamchat.store.database import database_path
from streamchat.store.health import examine
from streamchat.store.records import SessionInfo, StoredSession
from streamchat.store.scrub import pending_mark
from streamchat.store.store import Store
from tools.crash import open_chat
from tools.disk.promises import Promises
from tools.disk.scenario import (
    CACHE_SIZE,
    MODEL_FILE,
    SECRET,
    SessionTruth,
    Unsaid,
    check_sentence,
    digest_of,
    wait_for_upkeep,
)
from tools.disk.states import State


class Fault(Exception):
    """A broken promise."""


def _require(holds: bool, text: str) -> None:
    if not holds:
        raise Fault(text)


def write_state(state: State, folder: Path) -> None:
    """Make `folder` contain exactly `state`."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path, contents in state.items():
        target = folder / path
        if contents is None:
            target.mkdir(mode=0o700)
        else:
            target.write_bytes(contents)
            target.chmod(0o600)


class Judge:
    """Judges states one after the other, with one model.

    Args:
        loaded: The model of the recorded chat.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self._chat = open_chat(loaded, Path("unused"), None, saves=False, cache_size=CACHE_SIZE, seed=1)
        self._active = self._chat.owner.host.active
        self._format = self._active.conversation.encoder.format

    def judge(self, home: Path, promises: Promises) -> str:
        """Open the home folder; return what happened to the cache of the newest session.

        Raises:
            Fault: A promise is broken.
        """
        os.environ["STREAMCHAT_HOME"] = str(home)
        try:
            self._settings(promises)
            self._typed(promises)
            self._token(promises)
            self._exports(home, promises)
            self._model()
            return self._sessions(home, promises)
        except Unsaid as error:
            raise Fault(str(error)) from error
        except StreamchatError as error:
            raise Fault(f"refused: {type(error).__name__}: {error}") from error

    # --- small files --------------------------------------------------------------------------------------------

    def _settings(self, promises: Promises) -> None:
        file = paths.config_dir() / "config.toml"
        found = {} if not file.exists() else dict(read_file(file).values)
        after = promises.after
        wanted = [promises.before.settings, after.settings, *filter(None, [after.settings_or])]
        _require(found in wanted, f"the settings are {found}, not one of {wanted}")

    def _typed(self, promises: Promises) -> None:
        history = TypedHistory.open(True)
        _require(not history.problem, history.problem)
        said = promises.after.typed
        _require(
            [text for text in said if text in history.entries] == history.entries,
            f"the input history is {history.entries}, of {said}",
        )
        history.add("and on")
        _require("and on" in TypedHistory.open(True).entries, "nothing can be added to the input history")

    def _token(self, promises: Promises) -> None:
        token, is_new = read_token(token_path())
        if promises.before.token:
            _require(token == promises.before.token, f"the token is {'new' if is_new else 'another one'}")

    def _exports(self, home: Path, promises: Promises) -> None:
        for name, digest in promises.after.exports.items():
            file = home / name
            if file.exists() or name in promises.before.exports:
                found = hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else "missing"
                _require(found == digest, f"the export {name} is not whole ({found[:8]})")

    def _model(self) -> None:
        folder = staging.models_dir() / "tiny"
        if staging.read_manifest(folder) is None:
            return
        tensors, _ = read_tiles(folder / MODEL_FILE)
        for name, tensor in tensors.items():
            _require(tensor.tolist() == list(range(1024)), f"the tensor {name} of the converted model is damaged")

    # --- sessions -----------------------------------------------------------------------------------------------

    def _sessions(self, home: Path, promises: Promises) -> str:
        wanted = promises.before.sessions
        if not database_path().exists():
            _require(not wanted and not promises.turns, f"the database is lost with {len(wanted)} sessions")
        archive = Archive(Store, self._hear)
        archive.open(required=True)
        try:
            assert archive.recorder is not None
            store = archive.recorder.store
            wait_for_upkeep()
            problems = examine(store.path).problems
            _require(not problems, f"the database is damaged: {problems}")
            infos = store.sessions()
            found = {info.id: store.load(info.id) for info in infos}
            for session in (wanted.keys() & promises.after.sessions.keys()) - promises.unsure:
                _require(session in found, f"the session {session} is lost")
            for stored in found.values():
                _check_session(stored, promises)
            self._deleted(home, promises)
            return self._resume(archive, infos[0], promises) if infos else "nothing to resume"
        finally:
            archive.close()

    def _hear(self, event: ev.Event) -> None:
        if isinstance(event, ev.Notice):
            check_sentence(event.text)

    def _deleted(self, home: Path, promises: Promises) -> None:
        """Check that deleted text is in no file. A start of streamchat must have removed what was left of it."""
        if not promises.before.deleted or promises.step == "restore":
            return
        _require(not pending_mark(database_path()).exists(), "text of a deleted session was not removed at the start")
        for path in home.rglob("*"):
            if path.is_file():
                _require(SECRET.encode() not in path.read_bytes(), f"deleted text is in {path.relative_to(home)}")
        for path in (database_path().parent / "snapshots").glob("*"):
            session = path.name.lstrip(".").partition(".")[0]
            _require(session not in promises.before.deleted, f"the cache of a deleted session is there: {path.name}")

    def _resume(self, archive: Archive, saved: SessionInfo, promises: Promises) -> str:
        conversation = self._active.conversation
        event, notices = archive.restore(self._active, archive.claim(saved.id))
        for notice in notices:
            check_sentence(notice)
        try:
            cache = conversation.cache
            _require(cache.ledger.next_index == len(conversation.log), "the cache is not of the saved turns")
            _require(cache.lengths == [cache.length] * len(cache.streaming_layers), "layers differ in length")
            if not (cut := any(word in notice for notice in notices for word in ("being generated", "not added"))):
                _require(tuple(saved.pins) == tuple(cache.pins), f"pins are {cache.pins}, saved were {saved.pins}")
                _require(list(saved.held) == list(cache.ledger.runs), "other tokens are cached than were saved")
            if event.prefilled:
                _require(any("prefilled again" in notice for notice in notices), "a refused cache was not reported")
                return "cache prefilled again, and told"
            if event.turns and not cut:
                digest = digest_of(checkpoint.capture(cache))
                _require(digest in promises.digests.get(saved.id, ()), "the cache differs from the one that was saved")
            return "cache equal to the bit"
        finally:
            archive.flush_and_snapshot(None)
            conversation.start_over(self._format)


def _check_session(stored: StoredSession, promises: Promises) -> None:
    session = stored.info.id
    before, after = promises.before.sessions.get(session), promises.after.sessions.get(session)
    _require(not stored.damage, f"parts of {session} are damaged: {stored.damage}")
    if before is None and after is None:
        raise Fault(f"the session {session} is there, which was deleted or never was")
    done = [[turn.text, turn.reply] for turn in stored.turns if turn.state == "done"]
    if session in promises.unsure:
        known = (after or before or SessionTruth("", [], [], 0.0)).turns
        _require(done == known[: len(done)], f"{session} has other turns than were said")
        return
    running = [turn for turn in stored.turns if turn.state == "running"]
    for number, said in promises.turns.get(session, ()):
        _require(done[number - 1 : number] == [said], f"turn {number} of {session} was finished and is not there")
    old = before.turns if before is not None else []
    new = after.turns if after is not None else old
    same = _common(old, new)
    if running:
        last = running[-1]
        _require(
            done == new[: len(done)] and len(done) in (len(same), len(old)) and len(new) == len(done) + 1,
            f"a running turn follows {len(done)} turns of {session}",
        )
        text, reply = new[-1]
        _require(last.text == text and reply.startswith(last.reply), f"the running turn of {session} is another one")
    else:
        _require(done in (old, new, same), f"{session} has {len(done)} turns; promised were {len(old)} or {len(new)}")
    _check_rest(stored, [each for each in (before, after) if each is not None])


def _check_rest(stored: StoredSession, truths: list[SessionTruth]) -> None:
    """Check everything that can change without a turn."""
    info = stored.info
    temperature = float(info.settings.get("temperature", -1))
    _require(temperature in [each.temperature for each in truths], f"the temperature of {info.id} is {temperature}")
    titles = [each.title for each in truths]
    _require("" in titles or info.title in titles, f"the title of {info.id} is {info.title!r}, not one of {titles}")
    if len(truths) == 2 and truths[0] == truths[1]:
        pins = [list(run) for run in info.pins]
        _require(pins == truths[0].pins, f"the pins of {info.id} are {pins}, not {truths[0].pins}")


def _common(one: list[list[str]], other: list[list[str]]) -> list[list[str]]:
    count = 0
    while count < min(len(one), len(other)) and one[count] == other[count]:
        count += 1
    return one[:count]
