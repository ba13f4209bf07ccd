"""The slash command `/queue`, for front ends with an `Outbox`."""

from __future__ import annotations

from streamchat.base.formatting import parse_whole_number, plural
from streamchat.base.sanitize import one_line
from streamchat.frontend.outbox import Outbox
from streamchat.frontend.slash.registry import SlashCommand, SlashContext, SlashResult

SHOWN_CHARACTERS = 200
ACTIONS = {
    "edit": "put a message into the input; Enter keeps its place",
    "drop": "remove a message",
    "clear": "remove all messages",
    "send": "send the held messages",
}


def queue_command(outbox: Outbox) -> SlashCommand:
    """The command `/queue`. The front end calls `Outbox.send_next` after it."""

    def queue(context: SlashContext, argument: str) -> SlashResult:
        action, _, number = argument.partition(" ")
        if not outbox.queue and action in ("", *ACTIONS):
            return SlashResult("no messages are queued")
        match action:
            case "":
                rows = [queue_line(outbox, index) for index in range(len(outbox.queue))]
                return SlashResult("\n".join(rows if outbox.waiting else [*rows, "held; /queue send sends them"]))
            case "clear":
                return SlashResult(f"{plural(len(outbox.clear()), 'queued message')} removed")
            case "send":
                outbox.resume()
                return SlashResult()
            case "edit" | "drop":
                index = (parse_whole_number(number) or 0) - 1
                if not 0 <= index < len(outbox.queue):
                    many = plural(len(outbox.queue), "message is", "messages are")
                    return SlashResult(f"/queue {action} needs the number of a message; {many} queued", error=True)
                if action == "edit":
                    return SlashResult(insert=outbox.edit(index))
                return SlashResult(f"removed: {shortened(outbox.drop(index).typed)}")
            case _:
                return SlashResult(f"usage: /queue, or /queue {', '.join(ACTIONS)}", error=True)

    def complete(context: SlashContext, argument: str) -> list[tuple[str, str]]:
        action, space, number = argument.partition(" ")
        if not space:
            return [(name, note) for name, note in ACTIONS.items() if name.startswith(action)]
        if action not in ("edit", "drop"):
            return []
        rows = enumerate(outbox.queue, 1)
        return [(f"{action} {n}", shortened(each.message.typed)) for n, each in rows if str(n).startswith(number)]

    arguments = "[edit N, drop N, clear, send]"
    return SlashCommand("queue", arguments, "list or change the queued messages", queue, complete=complete)


def queue_line(outbox: Outbox, index: int) -> str:
    """One line for the queued message at `index`: its number, its state, and its beginning.

    It says which messages are held if not all are.
    """
    queued = outbox.queue[index]
    lines = queued.message.typed.count("\n") + 1
    notes = [
        *(["editing"] if index == outbox.edited else []),
        *(["held"] if queued.held and outbox.waiting else []),
        *([plural(lines, "line")] if lines > 1 else []),
    ]
    state = f"({', '.join(notes)}) " if notes else ""
    return f"{index + 1:>3}. {state}{shortened(queued.message.typed)}"


def shortened(text: str) -> str:
    """The beginning of a message, on one line."""
    line = one_line(text[: 4 * SHOWN_CHARACTERS])
    return line if len(line) <= SHOWN_CHARACTERS else f"{line[: SHOWN_CHARACTERS - 1]}…"
