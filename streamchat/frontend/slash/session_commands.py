"""Slash commands about what was said: taking back, finding, keeping, resuming, exporting."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from streamchat.base import events as ev
from streamchat.base.errors import ConfigError, SessionError
from streamchat.base.formatting import parse_whole_number, plural
from streamchat.base.paths import user_path
from streamchat.base.sanitize import one_line
from streamchat.frontend import file_access
from streamchat.frontend.messages import ACKNOWLEDGED, found_line, kept, quoted, session_line
from streamchat.frontend.slash.registry import SlashCommand, SlashContext, SlashRegistry, SlashResult
from streamchat.sessions.export import FORMATS, export, write_export
from streamchat.sessions.settings import lasting_name
from streamchat.store.records import Found
from streamchat.store.store import Store

LISTED = 10
FOUND = 12


def turn_over(event: ev.Event) -> bool:
    """A turn has ended."""
    return isinstance(event, ev.TurnFinished)


def undo_over(event: ev.Event) -> bool:
    """The turn was taken back, or cannot be."""
    return isinstance(event, ev.TurnUndone) or (isinstance(event, ev.Notice) and event.level == "warning")


def summary_over(event: ev.Event) -> bool:
    """The summary is there, or none comes."""
    return isinstance(event, ev.SummaryReady)


def resume_over(event: ev.Event) -> bool:
    """The conversation goes on, or cannot."""
    return isinstance(event, ev.ConversationResumed) or (isinstance(event, ev.Notice) and event.level == "error")


class SessionCommands:
    """The commands, and what the last search found.

    Args:
        open_store: Opens the database for one command.
    """

    def __init__(self, open_store: Callable[[], Store] = Store) -> None:
        self._open_store = open_store
        self._found: list[Found] = []

    def add_to(self, registry: SlashRegistry) -> None:
        """Register them all."""
        asks = {"asks_engine": True, "needs_idle": True}
        for command in (
            SlashCommand("undo", "", "take the last turn back, as if it had not been", self.undo, **asks),  # type: ignore[arg-type]
            SlashCommand("retry", "", "take the last reply back and have another one", self.retry, ("again",), **asks),  # type: ignore[arg-type]
            SlashCommand("edit", "[TEXT]", "take the last turn back and change its message", self.edit, **asks),  # type: ignore[arg-type]
            SlashCommand("recall", "WORDS", "find what was said, in all conversations", self.recall, ("find",)),
            SlashCommand("quote", "N", "put found message N before the model again", self.quote, **asks),  # type: ignore[arg-type]
            SlashCommand("keep", "N or TEXT", "the same, or a text of your own, pinned", self.keep, **asks),  # type: ignore[arg-type]
            SlashCommand("compact", "", "sum up what is about to be forgotten", self.compact, **asks),  # type: ignore[arg-type]
            SlashCommand("sessions", "[WORDS]", "list saved conversations", self.sessions),
            SlashCommand(
                "resume",
                "ID [yes]",
                "go on with a saved conversation",
                self.resume,
                complete=self.complete_id,
                asks_engine=True,
                needs_idle=True,
            ),
            SlashCommand("title", "[TEXT]", "show or change the title of this conversation", self.title, ("rename",)),
            SlashCommand("export", "[FILE]", "write the conversation to a file: .md, .jsonl or .json", self.export),
        ):
            registry.add(command)

    # --- taking back ----------------------------------------------------------------------------------------------

    def undo(self, context: SlashContext, argument: str) -> SlashResult:
        """/undo"""
        context.engine.undo()
        return SlashResult(over=undo_over)

    def retry(self, context: SlashContext, argument: str) -> SlashResult:
        """/retry"""
        if not context.board.turns:
            return SlashResult("there is no reply yet that could be tried again", error=True)
        context.engine.retry()
        return SlashResult(over=turn_over)

    def edit(self, context: SlashContext, argument: str) -> SlashResult:
        """/edit [TEXT]"""
        if not context.board.turns:
            return SlashResult("there is no message yet that could be changed", error=True)
        if not argument:
            context.engine.undo(to_edit=True)
            return SlashResult(over=undo_over)
        context.engine.edit(argument)
        return SlashResult(over=turn_over)

    # --- finding and keeping --------------------------------------------------------------------------------------

    def recall(self, context: SlashContext, argument: str) -> SlashResult:
        """/recall WORDS"""
        if not argument:
            return SlashResult("which words? /recall WORDS finds messages that have them all", error=True)
        with self._open_store() as store:
            self._found = store.search(argument, limit=FOUND)
        if not self._found:
            return SlashResult(f"nothing was said with {argument!r}")
        now = time.time()
        here, thinking = context.board.session, context.engine.settings.thinking
        lines = [found_line(i, found, now, here, thinking) for i, found in enumerate(self._found, 1)]
        return SlashResult("\n".join([*lines, "/quote N puts one before the model again, /keep N pins it as well"]))

    def quote(self, context: SlashContext, argument: str) -> SlashResult:
        """/quote N"""
        found = self._chosen(argument)
        if found is None:
            return SlashResult(self._which("/quote", argument), error=True)
        context.engine.quote(quoted(found, time.time()), ACKNOWLEDGED, False)
        return SlashResult(over=turn_over)

    def keep(self, context: SlashContext, argument: str) -> SlashResult:
        """/keep N or TEXT"""
        found = self._chosen(argument)
        if not argument or (argument.isdecimal() and found is None):
            return SlashResult(self._which("/keep", argument), error=True)
        text = kept(argument) if found is None else quoted(found, time.time())
        context.engine.quote(text, ACKNOWLEDGED, True)
        return SlashResult(over=turn_over)

    def _chosen(self, argument: str) -> Found | None:
        number = parse_whole_number(argument) or 0
        return self._found[number - 1] if 1 <= number <= len(self._found) else None

    def _which(self, command: str, argument: str) -> str:
        if not self._found:
            return f"{command} takes the number of a message that /recall WORDS has found"
        found = plural(len(self._found), "message")
        return f"{argument or 'nothing'} is not a number that /recall listed; it found {found}"

    def compact(self, context: SlashContext, argument: str) -> SlashResult:
        """/compact"""
        context.engine.compact()
        return SlashResult(over=summary_over)

    # --- saved conversations --------------------------------------------------------------------------------------

    def sessions(self, context: SlashContext, argument: str) -> SlashResult:
        """/sessions [WORDS]"""
        with self._open_store() as store:
            found = store.sessions(argument, limit=LISTED + 1)
        if not found:
            return SlashResult(f"no saved conversation has {argument!r}" if argument else "nothing is saved yet")
        now = time.time()
        rows = [
            session_line(info, now) + ("  (this one)" if info.id == context.board.session else "")
            for info in found[:LISTED]
        ]
        if len(found) > LISTED:
            rows.append("and more; give words to find others")
        return SlashResult("\n".join([*rows, "/resume ID goes on with one"]))

    def resume(self, context: SlashContext, argument: str) -> SlashResult:
        """/resume ID, and /resume ID yes to load the model that an imported conversation names"""
        name, _, answer = argument.partition(" ")
        if not name:
            return SlashResult("which one? /resume ID; /sessions lists them", error=True)
        if answer.strip() not in ("", "yes"):
            return SlashResult(f"{answer.strip()!r} is not an answer; only yes may follow the id", error=True)
        with self._open_store() as store:
            info = store.find(name)
        session = info.id
        if session == context.board.session:
            return SlashResult(f"{session} is the conversation that is open")
        if answer:
            context.engine.open_session(session, lasting_name(str(info.settings.get("model", ""))))
        else:
            context.engine.open_session(session)
        return SlashResult(over=resume_over)

    def complete_id(self, context: SlashContext, argument: str) -> list[tuple[str, str]]:
        """Ids and titles."""
        with self._open_store() as store:
            return [
                (info.id, one_line(info.title)) for info in store.sessions(limit=50) if info.id.startswith(argument)
            ]

    def title(self, context: SlashContext, argument: str) -> SlashResult:
        """/title [TEXT]"""
        session = self._saved(context)
        with self._open_store() as store:
            if not argument:
                return SlashResult(f"{one_line(store.find(session).title)} ({session})")
            store.rename(session, " ".join(argument.split()))
        return SlashResult(f"this conversation is called “{' '.join(argument.split())}” now")

    def export(self, context: SlashContext, argument: str) -> SlashResult:
        """/export [FILE]"""
        file_access.require("/export")
        path, text, turns, lost = self.exported(context, argument)
        write_export(path, text)
        return SlashResult(f"{plural(turns, 'turn')} written to {path}{lost}")

    def exported(self, context: SlashContext, argument: str) -> tuple[Path, str, int, str]:
        """The file that `/export ARGUMENT` means, its text, the number of turns in it, and what was left out."""
        session = self._saved(context)
        path = user_path(argument or f"streamchat-{session}.md")
        kind = FORMATS.get(path.suffix.lower())
        if kind is None:
            raise ConfigError(f"{path.name}: the name must end in one of {', '.join(FORMATS)}")
        with self._open_store() as store:
            saved = store.load(session)
        lost = f"; damaged in the database and left out: {', '.join(saved.damage)}" if saved.damage else ""
        return path, export(saved, kind), len(saved.turns), lost

    def _saved(self, context: SlashContext) -> str:
        if context.board.session is None:
            if context.engine.settings.save == "never":
                raise SessionError("this conversation is not saved (save = never)")
            raise SessionError("this conversation is not saved; that begins with its first turn")
        return context.board.session
