"""`streamchat sessions`: list, show, rename, delete, export and import sessions, and maintain their database."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from streamchat.base.errors import ConfigError, ExitCode
from streamchat.base.formatting import human_when, plural
from streamchat.base.jsonlines import json_line
from streamchat.base.paths import user_path
from streamchat.base.sanitize import one_line, printable
from streamchat.base.thinking import plain_text
from streamchat.commands import session_files, session_import
from streamchat.commands.session_files import print_line
from streamchat.frontend.messages import session_line
from streamchat.sessions.transcripts.context import fork_of, turn_visibility
from streamchat.sessions.transcripts.export import FORMATS, export, write_export
from streamchat.store.lock import is_open
from streamchat.store.records import SessionInfo, StoredSession
from streamchat.store.restore import empty_database_notice
from streamchat.store.store import Store
from streamchat.store.tree import as_tree

MAX_LIMIT = 2**31
"""Upper limit of --limit that SQLite accepts."""

HELP = "list, show, rename, delete, export and import saved conversations"
DESCRIPTION = (
    "Manage saved conversations (sessions). `streamchat --resume ID` resumes one. ID is 'last', an id, "
    "or the start of an id."
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the actions."""
    actions = parser.add_subparsers(title="actions", dest="action", metavar="ACTION", parser_class=type(parser))

    listing = actions.add_parser("list", help="list sessions, newest first (the default)")
    listing.add_argument(
        "words", nargs="*", metavar="WORD", help="only sessions whose title or messages contain these words"
    )
    listing.add_argument("--json", action="store_true", help="one JSON object per line")
    listing.add_argument("--limit", type=int, default=50, metavar="N", help="maximum number to list (default: 50)")

    def one(name: str, text: str) -> argparse.ArgumentParser:
        action: argparse.ArgumentParser = actions.add_parser(name, help=text)
        action.add_argument("id", metavar="ID", help="'last', an id, or the start of an id")
        return action

    one("show", "print a session, and mark the messages that the model no longer sees")
    one("rename", "change the title of a session").add_argument("title", metavar="TITLE", help="the new title")
    deleting = one("delete", "delete a session permanently, also from the backups")
    deleting.add_argument("--yes", action="store_true", help="do not ask")
    deleting.add_argument("--keep-backups", action="store_true", help="do not delete it from the backups")
    exporting = one("export", "export a session to a file or stdout")
    exporting.add_argument(
        "--format", choices=tuple(FORMATS.values()), help="format (default: from the name of FILE, else markdown)"
    )
    exporting.add_argument("-o", "--output", metavar="FILE", help="new file (default: stdout)")
    importing = actions.add_parser("import", help="import conversations from streamchat or another program")
    importing.add_argument(
        "file", metavar="FILE", help="an export of streamchat or ChatGPT, or JSON in the format of OpenAI or ShareGPT"
    )
    which = importing.add_mutually_exclusive_group()
    which.add_argument("--all", action="store_true", help="import every conversation of the file as a session")
    which.add_argument(
        "--pick", action="append", metavar="N|TITLE", help="import conversation N, or all whose title contains TITLE"
    )
    which.add_argument("--list", action="store_true", help="list the conversations of the file, but import none")
    actions.add_parser("backups", help="list the backups of the database")
    actions.add_parser("repair", help="rebuild the indexes of the database")
    restoring = actions.add_parser("restore-backup", help="move the database aside and replace it with a backup")
    restoring.add_argument(
        "name", nargs="?", metavar="NAME", help="name of the backup (default: the newest intact one)"
    )
    restoring.add_argument("--yes", action="store_true", help="do not ask if the database is intact")


def run(args: argparse.Namespace) -> int:
    """Run the command and return the exit code.

    Raises:
        StoreError: The database or a file cannot be used.
        SessionError: The session does not exist, or it is open.
    """
    if args.action == "backups":
        return session_files.list_backups()
    if args.action == "restore-backup":
        return session_files.restore_backup(args.name, yes=args.yes)
    with Store() as store:
        match args.action:
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
                session_import.run(store, user_path(args.file), args)
            case _:
                _list(store, args)
    return ExitCode.OK


def _list(store: Store, args: argparse.Namespace) -> None:
    words = " ".join(getattr(args, "words", []))
    limit = getattr(args, "limit", 50)
    if limit < 1:
        raise ConfigError(f"--limit {limit} must be at least 1")
    limit = min(limit, MAX_LIMIT)
    found = store.sessions(words, limit=limit + 1)
    if getattr(args, "json", False):
        for info in found[:limit]:
            print_line(json_line(_as_dict(store, info)))
        return
    if not found:
        if not words and (lost := empty_database_notice(store.path)):
            session_files.warn(lost)
        print_line(
            f"No saved session contains {words!r}." if words else "No saved sessions yet; `streamchat` starts one."
        )
        return
    now = time.time()
    for info, depth in as_tree(found[:limit]):
        print_line(session_line(info, now, depth) + ("  (open)" if is_open(store.lock_folder, info) else ""))
    if len(found) > limit:
        print_line("... and more; --limit N shows them")


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
        "fork": fork_of(info),
    }


def _load(store: Store, info: SessionInfo) -> StoredSession:
    """Load the whole session; report damaged parts on stderr."""
    session = store.load(info.id)
    if session.damage:
        session_files.warn(f"parts of {info.id} are damaged in the database and skipped: {', '.join(session.damage)}")
    return session


def _show(store: Store, info: SessionInfo) -> None:
    session = _load(store, info)
    memory = turn_visibility(session)
    held = sum(stop - first for first, stop in info.held)
    title, name = one_line(info.title), one_line(info.model_name)
    model = f"{name} ({info.dtype})" if info.dtype else name
    print_line(f"{title}\n{info.id}, {model}, started {human_when(info.created, time.time())}")
    if info.is_imported:
        print_line(f"imported, not resumed yet; model: {one_line(str(info.settings.get('model', 'default')))}")
    turns, compressions = plural(info.turns, "turn"), plural(info.compressions, "compression")
    print_line(f"{turns}, {plural(held, 'token')} in the cache, {compressions}")
    marks = {"seen": "", "partly": " (partly evicted)", "forgotten": " (evicted)"}
    for turn in session.turns:
        cut = " (cut off)" if turn.state == "running" else ""
        reply = plain_text(turn.reply, str(info.settings.get("thinking", "collapse")))
        print_line(
            f"\n{turn.number}. you{marks[memory[turn.number]]}\n{turn.text}\n\n{turn.number}. model{cut}\n{reply}"
        )


def _rename(store: Store, info: SessionInfo, title: str) -> None:
    print_line(f"{info.id} is now named “{one_line(store.rename(info.id, title))}”.")


def _export(store: Store, info: SessionInfo, args: argparse.Namespace) -> None:
    session = _load(store, info)
    text = export(session, args.format or FORMATS.get(Path(args.output or "").suffix.lower(), "markdown"))
    if args.output:
        write_export(user_path(args.output), text)
        count = len(session.turns)
        turns = plural(count, "turn was", "turns were")
        print(f"streamchat: {turns} written to {one_line(args.output)}", file=sys.stderr)
    elif sys.stdout.isatty():
        sys.stdout.write(printable(text))  # without terminal control sequences
    else:  # UTF-8 in every locale, since the file may be shared
        sys.stdout.flush()
        sys.stdout.buffer.write(text.encode())
