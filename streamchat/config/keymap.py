"""The keys of the app, declared once for bindings, help, and `[keys]` of the configuration file.

Key names are Textual's, but Textual is not imported here.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from streamchat.base.suggestions import did_you_mean


@dataclass(frozen=True)
class Key:
    """An action and its keys."""

    id: str
    keys: str
    """Key names, separated by commas."""
    label: str
    """A word or two, for the footer."""
    help: str
    """A sentence, for help and the comments of the configuration file."""

    @property
    def scope(self) -> str:
        """Where the keys work. Keys within one scope must differ; chat, input and app share one."""
        part = self.id.partition(".")[0]
        return "chat" if part in ("chat", "prompt", "app") else part


KEYS = (
    Key("prompt.send", "enter", "Send", "send the message"),
    # Every terminal sends Ctrl+J for a line feed; the others need a terminal that distinguishes them from Enter.
    Key("prompt.newline", "ctrl+j,shift+enter,alt+enter,ctrl+enter", "New line", "insert a line break"),
    Key("prompt.complete", "tab", "Complete", "complete a command or a path"),
    Key("prompt.edit", "ctrl+g", "Editor", "edit the message in $VISUAL or $EDITOR"),
    Key("prompt.delete_or_leave", "ctrl+d", "Delete", "delete a character; in an empty input, quit"),
    Key("prompt.page_up", "pageup", "Scroll up", "scroll a page up, and stop following new text"),
    Key("prompt.page_down", "pagedown", "Scroll down", "scroll a page down"),
    Key("prompt.redo", "ctrl+shift+z", "Redo", "redo the last undone edit"),
    Key("chat.stop", "escape", "Stop", "stop the reply and hold the queued messages; or cancel an edit, or a fetch"),
    Key(
        "chat.interrupt",
        "ctrl+c",
        "Stop or copy",
        "copy the selection, else stop the reply, else clear the input (Ctrl+Z undoes that), else press twice to quit",
    ),
    Key("chat.queue_drop", "shift+delete", "Unqueue", "remove the queued message being edited, or the newest one"),
    Key("chat.queue_clear", "ctrl+shift+delete", "Clear queue", "remove all queued messages"),
    Key("chat.copy_reply", "ctrl+y", "Copy reply", "copy the last reply (/copy code: its last code block)"),
    Key("chat.map", "ctrl+t", "Context", "browse the model's context; Enter jumps to a message, p pins it"),
    Key("chat.turn_up", "alt+up", "Previous turn", "go to the previous turn"),
    Key("chat.turn_down", "alt+down", "Next turn", "go to the next turn"),
    Key("chat.line_up", "ctrl+up", "Line up", "scroll a line up"),
    Key("chat.line_down", "ctrl+down", "Line down", "scroll a line down"),
    Key("chat.top", "ctrl+home", "To the top", "jump to the top (older turns load as you scroll)"),
    Key("chat.follow", "ctrl+end", "To the end", "jump to the newest text and follow it (End in an empty input)"),
    Key("chat.recall", "ctrl+r", "Recall", "search the messages of all sessions"),
    Key("chat.sessions", "ctrl+l", "Sessions", "find and resume a saved conversation"),
    Key("chat.models", "ctrl+n", "Models", "choose another model: the list shows size, context, and what fits"),
    Key("chat.thoughts", "ctrl+o", "Thoughts", "expand or collapse the reasoning of replies"),
    Key("chat.sidebar", "ctrl+b", "Panel", "show or hide the status panel"),
    Key("chat.settings", "f4", "Settings", "show and change all settings"),
    Key("app.help", "f1", "Help", "show keys and commands"),
    Key("app.palette", "ctrl+p", "Palette", "open the command palette"),
    Key("app.quit", "ctrl+q", "Quit", "quit, at any time"),
    Key("map.left", "left", "Previous", "select the previous segment"),
    Key("map.right", "right", "Next", "select the next segment"),
    Key("map.up", "up", "Up", "select the segment above"),
    Key("map.down", "down", "Down", "select the segment below"),
    Key("map.open", "enter,space", "Go to", "go to the message"),
    Key("map.pin", "p", "Pin", "pin or unpin the turn"),
    Key("map.leave", "escape", "Back", "return to the input"),
    Key("finder.close", "escape", "Close", "return to the chat"),
    Key("finder.up", "up", "Up", "select the row above"),
    Key("finder.down", "down", "Down", "select the row below"),
    Key("finder.page_up", "pageup", "Page up", "select a row one page up"),
    Key("finder.page_down", "pagedown", "Page down", "select a row one page down"),
    Key("finder.keep", "ctrl+k", "Pin", "quote the result and pin it"),
    Key("settings.close", "escape,f4", "Close", "return to the chat; or cancel the edit of a setting"),
    Key("settings.up", "up", "Up", "select the setting above; in an edit, the previous choice"),
    Key("settings.down", "down", "Down", "select the setting below; in an edit, the next choice"),
    Key("settings.page_up", "pageup", "Page up", "select a setting one page up"),
    Key("settings.page_down", "pagedown", "Page down", "select a setting one page down"),
    Key("settings.reset", "ctrl+r", "Reset", "set the setting to its default"),
    Key("settings.write", "ctrl+s", "Write", "write the setting to config.toml"),
    Key("help.close", "escape,f1,q,enter", "Close", "return to the chat"),
)
BY_ID = {key.id: key for key in KEYS}

_MODIFIERS = ("alt", "ctrl", "hyper", "meta", "shift", "super")
_NAMED = {
    *("escape", "enter", "tab", "space", "backspace", "delete", "insert", "home", "end", "pageup", "pagedown"),
    *("up", "down", "left", "right", "at", "slash", "backslash", "minus", "plus", "underscore"),
    *(f"f{number}" for number in range(1, 25)),
}
_ALIASES = {"esc": "escape", "return": "enter", "del": "delete", "pgup": "pageup", "pgdn": "pagedown"}
# Terminals send the same byte for both keys.
_SAME_BYTE = {"ctrl+i": "tab", "ctrl+m": "enter", "ctrl+space": "ctrl+at"}


def key_name(text: str) -> str | None:
    """Return Textual's name of the key that a user wrote: `Ctrl+X` -> 'ctrl+x', `Esc` -> 'escape'; None if invalid."""
    *modifiers, base = text.strip().split("+")
    given = {modifier.lower() for modifier in modifiers}
    if not given <= set(_MODIFIERS):
        return None
    if len(base) > 1 or given - {"shift"}:
        base = _ALIASES.get(base.lower(), base.lower())
    if not (base in _NAMED or re.fullmatch(r"[A-Za-z0-9]", base) or _is_character(base)):
        return None
    if given == {"shift"} and re.fullmatch("[A-Za-z]", base):
        return base.upper()  # as a terminal sends it
    name = "+".join([*sorted(given), base])
    return _SAME_BYTE.get(name, name)


def _is_character(base: str) -> bool:
    """Whether `base` is the Unicode name of a character, such as question_mark."""
    try:
        unicodedata.lookup(base.replace("_", " "))
    except KeyError:
        return False
    return "_" in base or base in ("comma", "colon", "semicolon", "apostrophe", "tilde", "asterisk")


def key_names(text: str) -> list[str]:
    """Return the key names: `"Ctrl+X, f2"` -> ['ctrl+x', 'f2']; empty if one of them is invalid."""
    names = [key_name(name) for name in text.split(",")]
    return [name for name in names if name] if all(names) else []


def types_character(name: str) -> bool:
    """Whether the key (Textual's name) types a character."""
    *modifiers, base = name.split("+")
    named = base in _NAMED and base not in ("space", "at", "slash", "backslash", "minus", "plus", "underscore")
    return not named and not set(modifiers) - {"shift"}


def keys_of(key_id: str, changed: Mapping[str, str]) -> list[str]:
    """Return the keys of an id; `changed` maps ids to their new keys."""
    return key_names(changed.get(key_id, BY_ID[key_id].keys))


def conflict(changed: Mapping[str, str]) -> tuple[str, str, str] | None:
    """Return (key, id, other id) if two actions of one scope share a key; `changed` maps ids to their new keys."""
    taken: dict[tuple[str, str], str] = {}
    for key in KEYS:
        for name in keys_of(key.id, changed):
            other = taken.setdefault((key.scope, name), key.id)
            if other != key.id:
                return name, other, key.id
    return None


def check_keys(table: Any) -> dict[str, str]:
    """Check the table `[keys]` of a configuration file and return key id -> key names, as Textual spells them.

    Raises:
        ValueError: An id or a key is wrong, or two actions share a key; one sentence.
    """
    if not isinstance(table, dict):
        raise ValueError(f"keys must be a table, [keys], not {table!r}")
    changed: dict[str, str] = {}
    for group, content in table.items():
        if not isinstance(content, dict):
            raise ValueError(f"keys.{group} must be the id of a key such as chat.stop")
        for name, value in content.items():
            changed[f"{group}.{name}"] = _check_names(f"{group}.{name}", value)
    clash = conflict(changed)
    if clash is not None:
        raise ValueError(f"{clash[0]} would be both keys.{clash[1]} and keys.{clash[2]}; change one of them")
    return changed


def _check_names(key_id: str, value: Any) -> str:
    if key_id not in BY_ID:
        raise ValueError(f"unknown key keys.{key_id}{did_you_mean(key_id, BY_ID)}")
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f'keys.{key_id} = {value!r} must be key names separated by commas, as in "ctrl+x,f2"')
    if wrong := [name.strip() for name in value.split(",") if key_name(name) is None]:
        raise ValueError(
            f"keys.{key_id}: {wrong[0][:40]!r} is not a key name; write it as ctrl+x, f2, alt+up or escape"
        )
    names = key_names(value)
    writing = [name for name in names if types_character(name)]
    if writing and BY_ID[key_id].scope == "chat":
        raise ValueError(f"keys.{key_id}: {writing[0]} types a character; choose a key such as ctrl+x or f2")
    return ",".join(names)


_DISPLAY_NAMES = {"pageup": "Page Up", "pagedown": "Page Down"}


def display_keys(keys: str) -> str:
    """Format keys for display: `ctrl+j,pageup` -> 'Ctrl+J, Page Up'."""
    return ", ".join("+".join(map(_display_part, name.split("+"))) for name in key_names(keys))


def _display_part(part: str) -> str:
    return _DISPLAY_NAMES.get(part, part.replace("_", " ").capitalize())
