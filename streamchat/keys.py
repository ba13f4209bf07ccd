"""The keys of the app, declared once: bindings, help, `[keys]` of the configuration file and its comments follow.

Nothing of Textual is imported here; key names are Textual's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Key:
    """What some keys do."""

    id: str
    keys: str
    """Names of the keys, with commas between them."""
    label: str
    """A word or two, for the footer."""
    help: str
    """A sentence, for help and comments."""

    @property
    def scope(self) -> str:
        """Where it works: keys of one scope must differ. Chat, input and app share one."""
        part = self.id.partition(".")[0]
        return "chat" if part in ("chat", "prompt", "app") else part


KEYS = (
    Key("prompt.send", "enter", "Send", "send the message"),
    # Ctrl+J is what every terminal sends for a line feed; the others need one that tells them from Enter
    Key("prompt.newline", "ctrl+j,shift+enter,alt+enter,ctrl+enter", "New line", "new line"),
    Key("prompt.complete", "tab", "Complete", "complete a command or a path"),
    Key("prompt.edit", "ctrl+g", "Editor", "write the message in $VISUAL or $EDITOR"),
    Key("prompt.delete_or_leave", "ctrl+d", "Delete", "delete a character; in an empty input, quit"),
    Key("prompt.page_up", "pageup", "Scroll up", "scroll a page up; the view stays where you are"),
    Key("prompt.page_down", "pagedown", "Scroll down", "scroll a page down"),
    Key("prompt.redo", "ctrl+shift+z", "Redo", "redo"),
    Key("chat.stop", "escape", "Stop", "stop the reply; take a waiting message back"),
    Key(
        "chat.interrupt",
        "ctrl+c",
        "Stop or copy",
        "copy the selection, else stop the reply, else press twice to quit",
    ),
    Key("chat.copy_reply", "ctrl+y", "Copy reply", "copy the last reply (/copy code: its last code block)"),
    Key("chat.map", "ctrl+t", "Memory", "walk through what the model still sees; Enter goes to the message, p pins it"),
    Key("chat.turn_up", "alt+up", "Turn before", "go to the turn before"),
    Key("chat.turn_down", "alt+down", "Turn after", "go to the turn after"),
    Key("chat.line_up", "ctrl+up", "Line up", "scroll a line up"),
    Key("chat.line_down", "ctrl+down", "Line down", "scroll a line down"),
    Key("chat.top", "ctrl+home", "To the top", "go to the oldest text; older turns come as you go on"),
    Key("chat.follow", "ctrl+end", "To the end", "go to the newest text and follow it (End in an empty input)"),
    Key("chat.thoughts", "ctrl+o", "Thoughts", "open or fold the reasoning of replies"),
    Key("chat.sidebar", "ctrl+b", "Panel", "status panel on or off"),
    Key("app.help", "f1", "Help", "keys and commands"),
    Key("app.palette", "ctrl+p", "Palette", "command palette"),
    Key("app.quit", "ctrl+q", "Quit", "leave, at any moment"),
    Key("map.left", "left", "Before", "choose the segment before"),
    Key("map.right", "right", "After", "choose the segment after"),
    Key("map.up", "up", "Up", "choose the segment above"),
    Key("map.down", "down", "Down", "choose the segment below"),
    Key("map.open", "enter,space", "Go to", "go to the message"),
    Key("map.pin", "p", "Pin", "pin or unpin the turn"),
    Key("map.leave", "escape", "Back", "back to the input"),
    Key("help.close", "escape,f1,q,enter", "Close", "back to the chat"),
)
BY_ID = {key.id: key for key in KEYS}

_NAME = re.compile(r"(?:(?:ctrl|alt|shift|super|hyper|meta)\+)*(?:[a-z]+[a-z_]*\d*|[A-Z0-9])")


def key_names(text: str) -> list[str]:
    """`"ctrl+x, f2"` -> ['ctrl+x', 'f2']; empty where one of them is no name of a key."""
    names = [name.strip() for name in text.split(",")]
    return names if all(_NAME.fullmatch(name) for name in names) else []


def conflict(changed: dict[str, str]) -> tuple[str, str, str] | None:
    """(key, id, id) where two things in one place would have the same key, with `changed` ids -> keys."""
    taken: dict[tuple[str, str], str] = {}
    for key in KEYS:
        for name in key_names(changed.get(key.id, key.keys)):
            other = taken.setdefault((key.scope, name), key.id)
            if other != key.id:
                return name, other, key.id
    return None


def spoken(keys: str) -> str:
    """`ctrl+j,f1` -> 'Ctrl+J, F1', for people."""
    return ", ".join("+".join(part.capitalize() for part in name.split("+")) for name in key_names(keys))
