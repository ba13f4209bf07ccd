"""`streamchat sessions`: list, show, rename, delete, export, import and restore saved conversations."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamchat.base.errors import ConfigError, ExitCode
from streamchat.base.formatting import human_when, plural
from streamchat.base.jsonlines import json_line
from streamchat.base.paths import user_path
from streamchat.base.sanitize import one_line, printable
from streamchat.base.thinking import plain_text
from streamchat.commands import session_files
from streamchat.commands.session_files import say as _say
from streamchat.frontend.messages import session_line
from streamchat.sessions.export import export, read_export, turn_visibility, write_export
from streamchat.store.lock import is_open
from streamchat.store.records import SessionInfo, StoredSession
from streamchat.store.restore import empty_database_notice
from streamchat.store.store import Store

if TYPE_CHECKING:
    from streamchat.cli.flags import Subparsers

MANY = 2**31
"""More than can be listed, and not more than SQLite can count."""


def add_parser(subparsers: Subparsers[Any]) -> None:
    """Register the command and what it can do."""
    parser = subparsers.add_parser(
        "sessions",
        help="list, show, rename, delete, export, import and restore saved conversations",
        description="Saved conversations. `streamchat --resume ID` goes on with one; ID is 'last', an id, or the start "
        "of one.",
    )
    actions = parser.add_subparsers(title="what to do", dest="do", metavar="DO", parser_class=type(parser))

    listing = actions.add_parser("list", help="list them, newest first (the default)")
    listing.add_argument("words", nargs="*", metavar="WORD", help="only those whose title or messages have these words")
    listing.add_argument("--json", action="store_true", help="one JSON object a line")
    listing.add_argument("--limit", type=int, default=50, metavar="N", help="at most so many (default: 50)")

    def one(name: str, text: str) -> argparse.ArgumentParser:
        action: argparse.ArgumentParser = actions.add_parser(name, help=text)
        action.add_argument("id", metavar="ID", help="'last', an id, or the start of one")
        return action

    one("show", "print one; messages that the model no longer sees are marked")
    one("rename", "give it another title").add_argument("title", metavar="TITLE", help="the new title")
    deleting = one("delete", "delete it for good, from the backups as well")
    deleting.add_argument("--yes", action="store_true", help="do not ask")
    deleting.add_argument("--keep-backups", action="store_true", help="do not delete it from the backups")
    exporting = one("export", "write it to a file or to stdout")
    exporting.add_argument(
        "--format", choices=("markdown", "jsonl", "replay"), default="markdown", help="default: markdown"
    )
    exporting.add_argument("-o", "--output", metavar="FILE", help="a new file; stdout without it")
    importing = actions.add_parser("import", help="read one that was exported as jsonl or replay")
    importing.add_argument(
        "file", metavar="FILE", help="what was exported, or conversations of another program in that form"
    )
    actions.add_parser("backups", help="list the backups of the database")
    actions.add_parser("repair", help="rebuild the indexes of the database")
    restoring = actions.add_parser("restore-backup", help="move the database aside and put a backup in its place")
    restoring.add_argument("name", nargs="?", metavar="NAME", help="the backup (default: the newest that is sound)")
    restoring.add_argument("--yes", action="store_true", help="do not ask when the database is sound")


def run(args: argparse.Namespace) -> int:
    """Carry it out; returns the exit code.

    Raises:
        StoreError: The database or a file cannot be used.
        SessionError: There is no such conversation, or it is open.
    """
    if args.do == "backups":
        return session_files.list_backups()
    if args.do == "restore-backup":
        return session_files.restore_backup(args.name, yes=args.yes)
    with Store() as store:
        match args.do:
            case "repair":
                return session_files.repair(store)
            case "show":
                _show(store, store.find(args.id))
            case "rename":
                _rename(store, store.find(args.id), args.title)
            case "delete":
                return session_files.delete(store, args.id, yes=args.yes, keep_backups=args.keep_backups)
            case "export":
                _export(store, store.find(args.id), args)
            case "import":
                _import(store, user_path(args.file))
            case _:
                _list(store, args)
    return ExitCode.OK


def _list(store: Store, args: argparse.Namespace) -> None:
    words = " ".join(getattr(args, "words", []))
    limit = getattr(args, "limit", 50)
    if limit < 1:
        raise ConfigError(f"--limit {limit} must be at least 1")
    limit = min(limit, MANY)
    found = store.sessions(words, limit=limit + 1)
    if getattr(args, "json", False):
        for info in found[:limit]:
            _say(json_line(_as_dict(store, info)))
        return
    if not found:
        if not words and (lost := empty_database_notice(store.path)):
            session_files.warn(lost)
        _say(
            f"No saved conversation has {words!r}."
            if words
            else "No conversation is saved yet; `streamchat` begins one."
        )
        return
    now = time.time()
    for info in found[:limit]:
        _say(session_line(info, now) + ("  (open)" if is_open(store.lock_folder, info) else ""))
    if len(found) > limit:
        _say("... and more; --limit N shows them")


def _as_dict(store: Store, info: SessionInfo) -> dict[str, Any]:
    path = store.snapshot_path(info.id)
    return {
        "id": info.id,
        "title": info.title,
        "created": info.created,
        "updated": info.updated,
        "model": info.model,
        "model_name": info.model_name,
        "dtype": info.dtype,
        "turns": info.turns,
        "compressions": info.compressions,
        "tokens_held": sum(stop - first for first, stop in info.held),
        "snapshot_bytes": path.stat().st_size if path.exists() else None,
        "open": is_open(store.lock_folder, info),
        "imported": info.is_imported,
    }


def _load(store: Store, info: SessionInfo) -> StoredSession:
    """All of it; what is damaged is said on stderr."""
    session = store.load(info.id)
    if session.damage:
        session_files.warn(f"parts of {info.id} are damaged in the database and left out: {', '.join(session.damage)}")
    return session


def _show(store: Store, info: SessionInfo) -> None:
    session = _load(store, info)
    memory = turn_visibility(session)
    held = sum(stop - first for first, stop in info.held)
    title, name = one_line(info.title), one_line(info.model_name)
    _say(f"{title}\n{info.id}, {name} ({info.dtype}), begun {human_when(info.created, time.time())}")
    if info.is_imported:
        _say(f"imported, and not resumed yet; names the model {one_line(str(info.settings.get('model', 'default')))}")
    turns, compressions = plural(info.turns, "turn"), plural(info.compressions, "compression")
    _say(f"{turns}, {plural(held, 'token')} in the cache, {compressions}")
    marks = {"seen": "", "partly": " (partly forgotten)", "forgotten": " (forgotten)"}
    for turn in session.turns:
        cut = " (cut off)" if turn.state == "running" else ""
        reply = plain_text(turn.reply, str(info.settings.get("thinking", "collapse")))
        _say(f"\n{turn.number}. you{marks[memory[turn.number]]}\n{turn.text}\n\n{turn.number}. model{cut}\n{reply}")


def _rename(store: Store, info: SessionInfo, title: str) -> None:
    title = " ".join(title.split())
    if not title:
        raise ConfigError("a title needs at least one character")
    store.rename(info.id, title)
    _say(f"{info.id} is called “{title}” now.")


def _export(store: Store, info: SessionInfo, args: argparse.Namespace) -> None:
    session = _load(store, info)
    text = export(session, args.format)
    if args.output:
        write_export(user_path(args.output), text)
        count = len(session.turns)
        turns = plural(count, "turn was", "turns were")
        print(f"streamchat: {turns} written to {one_line(args.output)}", file=sys.stderr)
    elif sys.stdout.isatty():
        sys.stdout.write(printable(text))  # without what would control the terminal
    else:  # UTF-8 whatever the locale: a file for others
        sys.stdout.flush()
        sys.stdout.buffer.write(text.encode())


def _import(store: Store, path: Path) -> None:
    imported = read_export(path)
    session = store.create(
        imported.title,
        model=imported.model,
        model_name=imported.model_name,
        dtype="",
        fingerprint="",
        tokenizer="",  # so its texts are read, and not ids
        settings=imported.settings,
        system_ids=[],
    )
    store.write(session, turns=imported.turns)
    turns = plural(len(imported.turns), "turn was", "turns were")
    _say(f"{session}: {turns} imported; `streamchat --resume {session}` goes on with them.")
