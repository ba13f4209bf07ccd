"""The slash command `/import`: make sessions of the conversations of a file."""

from __future__ import annotations

from itertools import islice

from streamchat.base.paths import user_path
from streamchat.frontend import file_access, mentions
from streamchat.frontend.messages import imported_lines, imported_sentence, skipped_sentence
from streamchat.frontend.saved import open_store
from streamchat.frontend.slash.registry import SlashCommand, SlashContext, SlashResult

MAX_LISTED = 20
USAGE = "usage: /import FILE [N, TITLE or all]"


def _import(context: SlashContext, argument: str) -> SlashResult:
    from streamchat.sessions.transcripts.imported import choose_sessions, read_sessions  # deferred: rarely needed

    file_access.require("/import")
    path, wanted = mentions.split_path(argument)
    if not path:
        return SlashResult(USAGE, error=True)
    sessions = read_sessions(user_path(path))
    if len(sessions) > 1 and not wanted:
        rows = list(islice(imported_lines(enumerate(sessions, 1)), MAX_LISTED))
        if len(sessions) > MAX_LISTED:
            rows.append(f"and {len(sessions) - MAX_LISTED:,} more")
        hint = f"/import {mentions.quoted(path)} N imports one, a part of a title those with it, and all imports all"
        return SlashResult("\n".join([*rows, hint]))
    chosen = sessions if wanted in ("", "all") else choose_sessions(sessions, wanted)
    with open_store() as store:
        ids = store.add(each.as_new() for each in chosen)
    done = list(map(imported_sentence, ids, chosen))
    rows = done[:MAX_LISTED]
    if len(done) > MAX_LISTED:
        rows.append(f"and {len(done) - MAX_LISTED:,} more")
    if skipped := skipped_sentence(chosen):
        rows.append(skipped)
    which = ids[0] if len(ids) == 1 else "ID"
    return SlashResult("\n".join([*rows, f"/resume {which} resumes {'it' if len(ids) == 1 else 'one'}"]))


def _complete(context: SlashContext, argument: str) -> list[tuple[str, str]]:
    return [] if " " in argument else mentions.complete_path(argument)


IMPORT = SlashCommand(
    "import",
    "FILE [N]",
    "import conversations of ChatGPT, ShareGPT or streamchat as sessions",
    _import,
    complete=_complete,
    slow=True,
)
