"""The public `Chat` object: a conversation for Python programs and notebooks, on the engine of the app."""

from __future__ import annotations

import weakref
from os import PathLike
from pathlib import Path
from types import TracebackType

from streamchat.base import events as ev
from streamchat.base import requests as rq
from streamchat.base.errors import ConfigError, SessionError, StoreError
from streamchat.base.formatting import plural
from streamchat.base.paths import user_path
from streamchat.base.sanitize import one_line
from streamchat.config.files import short_value
from streamchat.config.loader import Configuration, check_live, from_arguments
from streamchat.config.settings import Settings, spec_of
from streamchat.conversation.assemble import load_from_settings
from streamchat.engine.engine import Engine
from streamchat.engine.protocol import ChatEngine
from streamchat.scripting.calls import Calls, reason
from streamchat.scripting.display import live_reply
from streamchat.scripting.inbox import Inbox
from streamchat.scripting.reply import Reply, ReplyStream
from streamchat.scripting.status import ChatStatus, status_of
from streamchat.sessions.settings import foreign_model, foreign_model_notice
from streamchat.sessions.transcripts.export import FORMATS, export, write_export
from streamchat.store.records import SearchHit
from streamchat.store.store import Store

SECTIONS = ("model", "cache", "generation", "chat")
"""Settings that a program may give; the others are about a terminal."""
CLOSE_S = 30.0


class Chat:
    """A conversation with a model, whose cache never exceeds its budget.

    The model is loaded before the constructor returns. Settings are those of `config.toml` (sections `model`, `cache`,
    `generation` and `chat`), by name: `Chat("smollm2", cache_size=2048, temperature=0)`. Neither `config.toml` nor
    the environment is read. A `Chat` is a context manager that closes it.

    A chat is used by one thread at a time: while one thread reads a reply, a call from another thread raises
    `TurnError`; only `stop`, `status` and `history` may be used from any thread. It needs no event loop, and works
    inside one (Jupyter).

    Args:
        model: The model, as for `--model`.
        session: Resume this saved session: its id, the start of one, or 'last'.
        save: Save the conversation as a session, from its first turn.
        trust_model: Load the model that `session` names even if only an imported file named it.
        **settings: Other settings.

    Raises:
        ConfigError: A setting is unknown or wrong.
        ModelError: The model cannot be found, fetched, or used.
        SessionError: The session does not exist, is open elsewhere, or names an untrusted model.
    """

    def __init__(
        self,
        model: str = "default",
        *,
        session: str | None = None,
        save: bool = False,
        trust_model: bool = False,
        **settings: rq.SettingValue,
    ) -> None:
        given = settings if model == "default" else {"model": model, **settings}
        self._start(_configuration(given), session, save=save, trust_model=trust_model)

    @classmethod
    def from_configuration(cls, configuration: Configuration, *, save: bool) -> Chat:
        """Return a chat with all settings of a command line."""
        chat = cls.__new__(cls)
        chat._start(configuration, None, save=save)
        return chat

    def _start(
        self, configuration: Configuration, session: str | None, *, save: bool, trust_model: bool = False
    ) -> None:
        self._configuration = configuration
        found, agreed = (None, "") if session is None else self._found(session, trust_model)
        self._inbox = Inbox()
        self._engine: ChatEngine = Engine(
            self._configuration,
            load_from_settings,
            open_store=Store,
            session=found,
            agreed_model=agreed,
            save_later=not save,
        )
        self._engine.subscribe(self._inbox.put)
        self._calls = Calls(self._engine, self._inbox)
        self._end = weakref.finalize(self, self._engine.close, CLOSE_S)
        self._engine.start()
        try:
            self._calls.wait_until_ready()
        except BaseException:
            self.close()
            raise

    def _found(self, name: str, trust_model: bool) -> tuple[str, str]:
        """Return the id of the session `name`, and the model that it may load although only a file named it.

        Raises:
            SessionError: There is no such session, or its model is not trusted.
        """
        _check_text(name, "a session is named by its id")
        with Store() as store:
            info = store.find(name)
        model = foreign_model(self._configuration, info)
        if model and not trust_model:
            raise SessionError(f"{foreign_model_notice(info, model)}; trust_model=True loads it")
        return info.id, model

    # --- replies ------------------------------------------------------------------------------------------------

    def send(self, text: str) -> ReplyStream:
        """Send a message, exactly as given, and return the events of its turn as they happen.

        The events are `TurnStarted`, `PrefillProgress`, `TokensEvicted`, `TextDelta` (pieces of the reply), `Notice`,
        and last `TurnFinished` with the whole reply, the reason of its end, and the figures. They are classes of
        `streamchat.events`. Ctrl+C, `break`, and `stop` end the reply; what was generated stays in the conversation.

        Raises:
            ConfigError: The message has no text.
            TurnError: The turn failed and was rolled back (raised after its last event), or another thread is reading
                a reply of this chat.
            StreamchatError: The chat is closed, or the engine has failed.
        """
        if not isinstance(text, str) or not text.strip():
            raise ConfigError("a message needs text")
        return self._calls.run(rq.Submit(text))

    def retry(self, *turns: int) -> ReplyStream:
        """Replace the newest reply by another one; events and errors as for `send`.

        Args:
            turns: Numbers of evicted turns to recall for it. If one cannot be recalled, the reply stays, and the stream
                raises `TurnError`.

        Raises:
            ConfigError: The conversation has no turn, or one of `turns` is not a number.
        """
        if not self.history:
            raise ConfigError("no reply to regenerate yet")
        return self._calls.run(rq.Retry(tuple(self._number(turn) for turn in turns)))

    def ask(self, text: str) -> Reply:
        """Send a message and return the reply when it is complete; errors as for `send`."""
        return _reply_of(self.send(text))

    def show(self, text: str) -> None:
        """Send a message and show the reply while it is generated: in the notebook's cell, or on stdout.

        Errors are those of `send`.
        """
        stream, shown = self.send(text), live_reply()
        try:
            for event in stream:
                if isinstance(event, ev.TextDelta):
                    shown.add(event.text)
        finally:
            shown.end()

    def stop(self) -> None:
        """Stop the running reply, if there is one. May be called from any thread; does not wait."""
        self._engine.send(rq.Stop())

    # --- the conversation ---------------------------------------------------------------------------------------

    @property
    def history(self) -> tuple[ev.SavedTurn, ...]:
        """The turns of the conversation, oldest first, also those that the model no longer sees."""
        return self._inbox.turns

    @property
    def status(self) -> ChatStatus:
        """The figures now."""
        return status_of(self._inbox.board)

    @property
    def settings(self) -> Settings:
        """The settings now."""
        return self._engine.settings

    @property
    def session(self) -> str | None:
        """Id of the saved session; None if the chat is not saved, or has no turn yet."""
        return self._inbox.board.session

    def set(self, **settings: rq.SettingValue) -> None:
        """Change settings from the next turn on, as `/set` does.

        Raises:
            ConfigError: A setting cannot change during a chat, or its value is wrong.
        """
        for name in settings:
            check_live(name)
        for name, value in settings.items():
            self._calls.expect(rq.SetOption(name, value), ev.SettingChanged)

    def pin(self, turn: int | None = None) -> None:
        """Pin a turn, the newest by default, so that it is never evicted.

        Raises:
            ConfigError: There is no such turn, it was evicted, or it does not fit.
        """
        self._calls.expect(rq.Pin(self._number(turn)), ev.TurnPinned)

    def unpin(self, turn: int | None = None) -> None:
        """Unpin a turn, the newest by default.

        Raises:
            ConfigError: There is no such turn.
        """
        self._calls.expect(rq.Unpin(self._number(turn)), ev.TurnPinned)

    def undo(self) -> str:
        """Undo the newest turn, also what it evicted; return its message.

        Raises:
            ConfigError: There is no turn, or it is too old.
        """
        return self._calls.expect(rq.Undo(), ev.TurnUndone).text

    def rewind(self, turn: int, *, drop: bool = False) -> ev.ConversationRewound:
        """Go back to the conversation as it was after a turn, however old; return the result.

        A fork of the saved session keeps the later turns: `kept_as` of the result is its id. The cache is equal to the
        bit (`is_exact`) if the archive has all keys and values; otherwise, tokens are prefilled again (`prefilled`).

        Args:
            turn: A turn before the newest.
            drop: Rewind even if the chat is not saved, which loses the later turns.

        Raises:
            ConfigError: There is no such turn, or the chat is not saved and `drop` is False.
        """
        return self._calls.expect(rq.Rewind(self._number(turn), drop), ev.ConversationRewound)

    def fork(self, turn: int | None = None) -> str:
        """Continue after a turn, the newest by default, in a new session; return its id.

        The previous session does not change; `open` resumes it.

        Raises:
            ConfigError: There is no such turn, or the chat is not saved.
        """
        before = self.session
        number = self._number(turn)
        if not number:  # the engine takes 0 for the newest turn
            raise ConfigError(f"0 is not a turn of this conversation; it has {plural(len(self.history), 'turn')}")
        events = self._calls.call(rq.Fork(number))
        session = self.session
        if session is None or session == before:
            raise ConfigError(reason(events))
        return session

    def clear(self) -> None:
        """Start a new conversation with the same model and settings. A saved one stays saved."""
        self._calls.expect(rq.Clear(), ev.ConversationCleared)

    # --- sessions -----------------------------------------------------------------------------------------------

    def recall(self, words: str, *, limit: int = 12) -> list[SearchHit]:
        """Return messages of all saved sessions that contain all `words`, best first.

        Raises:
            StoreError: The database cannot be read.
            ConfigError: `words` is not a text, or an empty one.
        """
        _check_text(words, "the words to look for are a text")
        with Store() as store:
            return store.search(words, limit=limit)

    def save(self, title: str = "") -> str:
        """Save the conversation as a session, from now on; return its id, with which the app can resume it.

        Args:
            title: Title of the session; by default the start of the first message.

        Raises:
            SessionError: The conversation has no turn yet.
            StoreError: The database cannot be written.
            ConfigError: `title` is not a title.
        """
        if not self.history:
            raise SessionError("there is nothing to save yet; send a message first")
        events = [] if self.session is not None else self._calls.call(rq.Save())
        if self.session is None:
            raise StoreError(reason(events))
        if title:
            with Store() as store:
                store.rename(self.session, title)
        return self.session

    def export(self, path: str | PathLike[str]) -> Path:
        """Write the saved conversation to a new file: `.md`, `.html`, `.jsonl` or `.json`; return its path.

        Raises:
            SessionError: The conversation is not saved.
            ConfigError: The name has another ending.
            StoreError: The file exists or cannot be written.
        """
        file = user_path(Path(path))
        kind = FORMATS.get(file.suffix.lower())
        if kind is None:
            raise ConfigError(f"{file.name}: the file name must end in {', '.join(FORMATS)}")
        if self.session is None:
            raise SessionError("this conversation is not saved; call save() first")
        with Store() as store:
            stored = store.load(self.session)
        write_export(file, export(stored, kind))
        return file

    def open(self, session: str, *, trust_model: bool = False) -> None:
        """Resume a saved session in place of the current conversation, with its model and settings.

        Args:
            session: Its id, the start of one, or 'last'.
            trust_model: Load the model that the session names even if only an imported file named it.

        Raises:
            SessionError: The session does not exist, is open elsewhere, or names an untrusted model.
        """
        found, agreed = self._found(session, trust_model)
        if found == self.session:
            return
        events = self._calls.call(rq.OpenSession(found, agreed))
        if not any(isinstance(event, ev.ConversationResumed) for event in events):
            raise SessionError(reason(events))

    def close(self) -> None:
        """Stop everything, save the cache of a saved session, and release the model. May be called twice."""
        self._calls.close()
        if not self._calls.is_forked:
            self._end()

    def __enter__(self) -> Chat:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        board = self._inbox.board
        name = one_line(board.info.name) if board.info is not None else self.settings.model
        state = (
            "closed" if self._calls.is_closed else f"{board.cache.length:,} of {board.cache.cache_size:,} tokens cached"
        )
        return f"<Chat with {name}: {board.turns} turns, {state}>"

    def _number(self, turn: int | None) -> int:
        if turn is not None:
            if not isinstance(turn, int) or isinstance(turn, bool):
                raise ConfigError(f"a turn is a whole number, not {short_value(turn)}")
            return turn
        if not self.history:
            raise ConfigError("the conversation has no turn yet")
        return self.history[-1].number


def _configuration(given: dict[str, rq.SettingValue]) -> Configuration:
    configuration = from_arguments(given)
    for name in given:
        if spec_of(name).section not in SECTIONS:
            raise ConfigError(f"{name} is a setting of the terminal; a Chat has those of {', '.join(SECTIONS)}")
    return configuration


def _check_text(value: object, sentence: str) -> None:
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"{sentence}, not {short_value(value)}")


def _reply_of(stream: ReplyStream) -> Reply:
    for _ in stream:
        pass
    reply = stream.reply
    assert reply is not None  # a stream that ends without one has raised
    return reply
