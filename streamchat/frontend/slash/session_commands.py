"""Slash commands for turns and sessions: undo, search, quote, resume, export."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

from streamchat.base import events as ev
from streamchat.base.errors import ConfigError, SessionError
from streamchat.base.formatting import is_whole_number, parse_whole_number, plural
from streamchat.base.paths import user_path
from streamchat.base.requests import Compact, Edit, OpenSession, Quote, Retry, SetTitle, Undo
from streamchat.base.sanitize import one_line
from streamchat.frontend import file_access
from streamchat.frontend.messages import QUOTE_REPLY, note_prompt, quote_prompt, search_hit_line, session_line
from streamchat.frontend.saved import open_store
from streamchat.frontend.slash.registry import SlashCommand, SlashContext, SlashRegistry, SlashResult
from streamchat.sessions.settings import portable_model_name
from streamchat.sessions.transcripts.export import FORMATS, export, write_export
from streamchat.store.records import SearchHit
from streamchat.store.tree import as_tree

MAX_SESSIONS = 10
MAX_RESULTS = 12


def reply_done(event: ev.Event) -> bool:
    """Whether the turn of a message has ended."""
    return isinstance(event, ev.TurnFinished)


def turn_done(event: ev.Event) -> bool:
    """Whether a turn has ended, or an evicted one was paged in instead."""
    return isinstance(event, ev.TurnFinished | ev.TurnPagedIn)


def turn_here(found: SearchHit, session: str | None) -> int:
    """The turn of the conversation `session` that a search result is from; 0 if it is from elsewhere or undone."""
    return found.turn if found.session == session and not found.undone else 0


def undo_done(event: ev.Event) -> bool:
    """Whether the turn was undone or could not be."""
    return isinstance(event, ev.TurnUndone) or (isinstance(event, ev.Notice) and event.level != "info")


def summary_done(event: ev.Event) -> bool:
    """Whether summarizing has ended."""
    return isinstance(event, ev.SummaryReady)


def resume_done(event: ev.Event) -> bool:
    """Whether the session was resumed or could not be."""
    return isinstance(event, ev.ConversationResumed) or (isinstance(event, ev.Notice) and event.level == "error")


class SessionCommands:
    """The commands, and the results of the last search."""

    def __init__(self) -> None:
        self._found: list[SearchHit] = []

    def add_to(self, registry: SlashRegistry) -> None:
        """Add all commands to `registry`."""
        request = partial(SlashCommand, asks_engine=True, needs_idle=True)
        for command in (
            request("undo", "", "undo the last turn", self.undo),
            request(
                "retry",
                "[TURN ...]",
                "regenerate the last reply; recall the given evicted turns",
                self.retry,
                ("again",),
            ),
            request("edit", "[TEXT]", "edit and resend your last message", self.edit),
            SlashCommand("recall", "WORDS", "search the messages of all sessions", self.recall, ("find",)),
            request("quote", "N", "quote search result N to the model", self.quote),
            request("keep", "N or TEXT", "quote result N (or your own text) and pin it", self.keep),
            request("compact", "", "summarize what is about to be evicted", self.compact),
            SlashCommand("sessions", "[WORDS]", "list saved sessions", self.sessions),
            request("resume", "ID [yes]", "resume a saved conversation", self.resume, complete=self.complete_id),
            SlashCommand(
                "title",
                "[TEXT]",
                "show or change the title of this conversation",
                self.title,
                ("rename",),
                asks_engine=True,
            ),
            SlashCommand(
                "export", "[FILE]", "write the conversation to a file: .md, .html, .jsonl or .json", self.export
            ),
        ):
            registry.add(command)

    # --- undo -----------------------------------------------------------------------------------------------------

    def undo(self, context: SlashContext, argument: str) -> SlashResult:
        """Run `/undo`."""
        context.engine.send(Undo())
        return SlashResult(done_when=undo_done)

    def retry(self, context: SlashContext, argument: str) -> SlashResult:
        """Run `/retry [TURN ...]`."""
        if not context.board.turns:
            return SlashResult("no reply to regenerate yet", error=True)
        turns: list[int] = []
        for word in argument.replace(",", " ").split():
            turn = parse_whole_number(word)
            if not turn:
                return SlashResult(f"{word} is not a turn number", error=True)
            turns.append(turn)
        context.engine.send(Retry(tuple(dict.fromkeys(turns))))
        return SlashResult(done_when=reply_done)

    def edit(self, context: SlashContext, argument: str) -> SlashResult:
        """Run `/edit [TEXT]`."""
        if not context.board.turns:
            return SlashResult("no message to edit yet", error=True)
        if not argument:
            context.engine.send(Undo(to_edit=True))
            return SlashResult(done_when=undo_done)
        context.engine.send(Edit(argument))
        return SlashResult(done_when=reply_done)

    # --- search and quote -----------------------------------------------------------------------------------------

    def recall(self, context: SlashContext, argument: str) -> SlashResult:
        """Run `/recall WORDS`."""
        if not argument:
            return SlashResult("usage: /recall WORDS (finds messages that contain all of them)", error=True)
        with open_store() as store:
            self._found = store.search(argument, limit=MAX_RESULTS, here=context.board.session)
        if not self._found:
            return SlashResult(f"no messages match {argument!r}")
        now = time.time()
        here, thinking = context.board.session, context.engine.settings.thinking
        lines = [search_hit_line(i, found, now, here, thinking) for i, found in enumerate(self._found, 1)]
        return SlashResult("\n".join([*lines, "/quote N quotes one to the model, /keep N also pins it"]))

    def quote(self, context: SlashContext, argument: str) -> SlashResult:
        """Run `/quote N`."""
        found = self._chosen("/quote", argument)
        context.engine.send(Quote(quote_prompt(found, time.time()), QUOTE_REPLY, pin=False))
        return SlashResult(done_when=reply_done)

    def keep(self, context: SlashContext, argument: str) -> SlashResult:
        """Run `/keep N or TEXT`."""
        if argument and not is_whole_number(argument):
            context.engine.send(Quote(note_prompt(argument), QUOTE_REPLY, pin=True))
        else:
            found = self._chosen("/keep", argument)
            text, turn = quote_prompt(found, time.time()), turn_here(found, context.board.session)
            context.engine.send(Quote(text, QUOTE_REPLY, pin=True, turn=turn))
        return SlashResult(done_when=turn_done)

    def _chosen(self, command: str, argument: str) -> SearchHit:
        """The search result with the number `argument`.

        Raises:
            ConfigError: There is none.
        """
        if not self._found:
            raise ConfigError(f"{command} needs the number of a search result; search with /recall WORDS first")
        number = parse_whole_number(argument) or 0
        if not 1 <= number <= len(self._found):
            what = f"{argument!r} is not" if argument else f"{command} needs"
            found = plural(len(self._found), "message")
            raise ConfigError(f"{what} the number of a search result; /recall found {found}")
        return self._found[number - 1]

    def compact(self, context: SlashContext, argument: str) -> SlashResult:
        """Run `/compact`."""
        context.engine.send(Compact())
        return SlashResult(done_when=summary_done)

    # --- sessions -------------------------------------------------------------------------------------------------

    def sessions(self, context: SlashContext, argument: str) -> SlashResult:
        """Run `/sessions [WORDS]`."""
        with open_store() as store:
            found = store.sessions(argument, limit=MAX_SESSIONS + 1)
        if not found:
            return SlashResult(f"no sessions match {argument!r}" if argument else "no saved sessions yet")
        now = time.time()
        rows = [
            session_line(info, now, depth) + ("  (this one)" if info.id == context.board.session else "")
            for info, depth in as_tree(found[:MAX_SESSIONS])
        ]
        if len(found) > MAX_SESSIONS:
            rows.append("and more; /sessions WORDS narrows the list")
        return SlashResult("\n".join([*rows, "/resume ID resumes one"]))

    def resume(self, context: SlashContext, argument: str) -> SlashResult:
        """Run `/resume ID`; `/resume ID yes` loads the model that an imported session names."""
        name, _, answer = argument.partition(" ")
        if not name:
            return SlashResult("usage: /resume ID (/sessions lists the ids)", error=True)
        if answer.strip() not in ("", "yes"):
            return SlashResult(f"{answer.strip()!r} is not a valid answer; only yes may follow the id", error=True)
        with open_store() as store:
            info = store.find(name)
        session = info.id
        if session == context.board.session:
            return SlashResult(f"{session} is already open")
        agreed_model = portable_model_name(str(info.settings.get("model", ""))) if answer else ""
        context.engine.send(OpenSession(session, agreed_model))
        return SlashResult(done_when=resume_done)

    def complete_id(self, context: SlashContext, argument: str) -> list[tuple[str, str]]:
        """(id, title) of sessions whose id starts with `argument`."""
        with open_store() as store:
            return [
                (info.id, one_line(info.title)) for info in store.sessions(limit=50) if info.id.startswith(argument)
            ]

    def title(self, context: SlashContext, argument: str) -> SlashResult:
        """Run `/title [TEXT]`."""
        session = self._saved(context)
        if argument:
            context.engine.send(SetTitle(argument))
            return SlashResult()
        with open_store() as store:
            return SlashResult(f"{one_line(store.find(session).title)} ({session})")

    def export(self, context: SlashContext, argument: str) -> SlashResult:
        """Run `/export [FILE]`."""
        file_access.require("/export")
        path, text, turns, lost = self.exported(context, argument)
        write_export(path, text)
        return SlashResult(f"{plural(turns, 'turn')} written to {path}{lost}")

    def exported(self, context: SlashContext, argument: str) -> tuple[Path, str, int, str]:
        """(path, text, number of turns, note about turns that are missing) of `/export ARGUMENT`."""
        session = self._saved(context)
        path = user_path(argument or f"streamchat-{session}.md")
        kind = FORMATS.get(path.suffix.lower())
        if kind is None:
            raise ConfigError(f"{path.name}: the file name must end in {', '.join(FORMATS)}")
        with open_store() as store:
            saved = store.load(session)
        lost = f"; skipped because damaged in the database: {', '.join(saved.damage)}" if saved.damage else ""
        if not context.board.saving_works:
            lost += "; saving fails now: the file has the conversation as it was last saved"
        return path, export(saved, kind), len(saved.turns), lost

    def _saved(self, context: SlashContext) -> str:
        if context.board.session is None:
            if context.engine.settings.save == "never":
                raise SessionError("this conversation is not saved (save = never)")
            raise SessionError("this conversation is not saved yet; it is saved after its first turn")
        return context.board.session
