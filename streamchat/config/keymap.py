"""The keys of the app, declared once: bindings, help, `[keys]` of the configuration file and its comments follow.

Nothing of Textual is imported here; key names are Textual's.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


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
        "copy the selection, else stop the reply, else empty the input (Ctrl+Z undoes it), else press twice to quit",
    ),
    Key("chat.copy_reply", "ctrl+y", "Copy reply", "copy the last reply (/copy code: its last code block)"),
    Key("chat.map", "ctrl+t", "Memory", "walk through what the model still sees; Enter goes to the message, p pins it"),
    Key("chat.turn_up", "alt+up", "Turn before", "go to the turn before"),
    Key("chat.turn_down", "alt+down", "Turn after", "go to the turn after"),
    Key("chat.line_up", "ctrl+up", "Line up", "scroll a line up"),
    Key("chat.line_down", "ctrl+down", "Line down", "scroll a line down"),
    Key("chat.top", "ctrl+home", "To the top", "go to the oldest text; older turns come as you go on"),
    Key("chat.follow", "ctrl+end", "To the end", "go to the newest text and follow it (End in an empty input)"),
    Key("chat.recall", "ctrl+r", "Recall", "find what was said, here and in other conversations"),
    Key("chat.sessions", "ctrl+l", "Conversations", "saved conversations: find one and go on with it"),
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
    Key("finder.close", "escape", "Close", "back to the chat"),
    Key("finder.up", "up", "Up", "choose the row above"),
    Key("finder.down", "down", "Down", "choose the row below"),
    Key("finder.page_up", "pageup", "Page up", "choose a row further up"),
    Key("finder.page_down", "pagedown", "Page down", "choose a row further down"),
    Key("finder.keep", "ctrl+k", "Pin", "put what was found before the model again, pinned"),
    Key("help.close", "escape,f1,q,enter", "Close", "back to the chat"),
)
BY_ID = {key.id: key for key in KEYS}

_MODIFIERS = ("alt", "ctrl", "hyper", "meta", "shift", "super")
_NAMED = {
    *("escape", "enter", "tab", "space", "backspace", "delete", "insert", "home", "end", "pageup", "pagedown"),
    *("up", "down", "left", "right", "at", "slash", "backslash", "minus", "plus", "underscore"),
    *(f"f{number}" for number in range(1, 25)),
}
_SAME = {"esc": "escape", "return": "enter", "del": "delete", "pgup": "pageup", "pgdn": "pagedown"}
# a terminal sends the same byte for both
_ONE_BYTE = {"ctrl+i": "tab", "ctrl+m": "enter", "ctrl+space": "ctrl+at"}


def key_name(text: str) -> str | None:
    """How Textual spells the key that a user names: `Ctrl+X` -> 'ctrl+x', `Esc` -> 'escape'; None for no key."""
    *modifiers, base = text.strip().split("+")
    given = {modifier.lower() for modifier in modifiers}
    if not given <= set(_MODIFIERS):
        return None
    if len(base) > 1 or given - {"shift"}:
        base = _SAME.get(base.lower(), base.lower())
    if not (base in _NAMED or re.fullmatch(r"[A-Za-z0-9]", base) or _is_character(base)):
        return None
    if given == {"shift"} and re.fullmatch("[A-Za-z]", base):
        return base.upper()  # what a terminal sends
    name = "+".join([*sorted(given), base])
    return _ONE_BYTE.get(name, name)


def _is_character(base: str) -> bool:
    """Whether this is the Unicode name of a character, such as question_mark."""
    try:
        unicodedata.lookup(base.replace("_", " "))
    except KeyError:
        return False
    return "_" in base or base in ("comma", "colon", "semicolon", "apostrophe", "tilde", "asterisk")


def key_names(text: str) -> list[str]:
    """`"Ctrl+X, f2"` -> ['ctrl+x', 'f2']; empty where one of them is no name of a key."""
    names = [key_name(name) for name in text.split(",")]
    return [name for name in names if name] if all(names) else []


def writes(name: str) -> bool:
    """Whether the key (in Textual's spelling) writes a character into a text."""
    *modifiers, base = name.split("+")
    named = base in _NAMED and base not in ("space", "at", "slash", "backslash", "minus", "plus", "underscore")
    return not named and not set(modifiers) - {"shift"}


def keys_of(key_id: str, changed: Mapping[str, str]) -> list[str]:
    """The keys of an id, with `changed` ids -> keys."""
    return key_names(changed.get(key_id, BY_ID[key_id].keys))


def conflict(changed: Mapping[str, str]) -> tuple[str, str, str] | None:
    """(key, id, id) where two things in one place would have the same key, with `changed` ids -> keys."""
    taken: dict[tuple[str, str], str] = {}
    for key in KEYS:
        for name in keys_of(key.id, changed):
            other = taken.setdefault((key.scope, name), key.id)
            if other != key.id:
                return name, other, key.id
    return None


def checked(table: Any) -> dict[str, str]:
    """The table `[keys]` of a configuration file: id -> keys in Textual's spelling.

    Raises:
        ValueError: An id or a key is wrong, or two things would have one key; one sentence.
    """
    if not isinstance(table, dict):
        raise ValueError(f"keys must be a table, [keys], not {table!r}")
    changed: dict[str, str] = {}
    for group, content in table.items():
        if not isinstance(content, dict):
            raise ValueError(f"keys.{group} must be the id of a key such as chat.stop")
        for name, value in content.items():
            changed[f"{group}.{name}"] = _checked_keys(f"{group}.{name}", value)
    clash = conflict(changed)
    if clash is not None:
        raise ValueError(f"{clash[0]} would be both keys.{clash[1]} and keys.{clash[2]}; change one of them")
    return changed


def _checked_keys(key_id: str, value: Any) -> str:
    if key_id not in BY_ID:
        close = difflib.get_close_matches(key_id, BY_ID, n=1)
        raise ValueError(f"unknown key keys.{key_id}{f'; did you mean {close[0]}?' if close else ''}")
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f'keys.{key_id} = {value!r} must be names of keys with commas between them, as "ctrl+x,f2"')
    if wrong := [name.strip() for name in value.split(",") if key_name(name) is None]:
        raise ValueError(
            f"keys.{key_id}: {wrong[0][:40]!r} is not the name of a key; write it as ctrl+x, f2, alt+up or escape"
        )
    names = key_names(value)
    writing = [name for name in names if writes(name)]
    if writing and BY_ID[key_id].scope == "chat":
        raise ValueError(f"keys.{key_id}: {writing[0]} is needed for writing; take one such as ctrl+x or f2")
    return ",".join(names)


_SPOKEN = {"pageup": "Page Up", "pagedown": "Page Down"}


def spoken(keys: str) -> str:
    """`ctrl+j,pageup` -> 'Ctrl+J, Page Up', for people."""
    return ", ".join("+".join(map(_spoken_part, name.split("+"))) for name in key_names(keys))


def _spoken_part(part: str) -> str:
    return _SPOKEN.get(part, part.replace("_", " ").capitalize())
