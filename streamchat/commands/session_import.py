"""`streamchat sessions import`: makes sessions of the conversations of a file."""

from __future__ import annotations

import argparse
from pathlib import Path

from streamchat.base.errors import StoreError
from streamchat.commands.session_files import print_line, warn
from streamchat.frontend.messages import imported_lines, imported_sentence, skipped_sentence
from streamchat.sessions.transcripts.imported import ImportedSession, choose_sessions, read_sessions
from streamchat.store.store import Store


def run(store: Store, path: Path, args: argparse.Namespace) -> None:
    """Import the conversations that the flags choose, all or none, and print one line for each.

    Raises:
        StoreError: The file cannot be read, has several conversations and no flag chooses, or the chosen one is
            missing.
    """
    sessions = read_sessions(path)
    if args.list:
        for line in imported_lines(enumerate(sessions, 1)):
            print_line(line)
        return
    chosen = _chosen(sessions, path, args)
    for session, imported in zip(store.add(each.as_new() for each in chosen), chosen, strict=True):
        print_line(f"{imported_sentence(session, imported)}; `streamchat --resume {session}` resumes it.")
    if skipped := skipped_sentence(chosen):
        warn(skipped)


def _chosen(sessions: list[ImportedSession], path: Path, args: argparse.Namespace) -> list[ImportedSession]:
    if args.pick:
        try:
            found = [session for wanted in args.pick for session in choose_sessions(sessions, wanted)]
        except StoreError as error:
            raise StoreError(f"{path}: {error}; --list lists them; nothing was imported") from None
        return list(dict.fromkeys(found))
    if len(sessions) > 1 and not args.all:
        raise StoreError(
            f"{path} has {len(sessions):,} conversations; --all imports each as a session, --pick N or --pick TITLE "
            "some of them, and --list lists them; nothing was imported"
        )
    return sessions
