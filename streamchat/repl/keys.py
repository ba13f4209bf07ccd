"""The keys that the prompt shares with the app, in prompt-toolkit's notation."""

from __future__ import annotations

from collections.abc import Mapping

from prompt_toolkit.keys import ALL_KEYS

from streamchat.config.keymap import keys_of

_SPELLED = {
    "escape": "escape",
    "space": " ",
    "at": "@",
    "slash": "/",
    "backslash": "\\",
    "minus": "-",
    "plus": "+",
    "underscore": "_",
}


def sequences(key_id: str, changed: Mapping[str, str]) -> list[tuple[str, ...]]:
    """Key sequences to bind for a key id; keys that plain terminals cannot send are skipped.

    Args:
        key_id: Id in `streamchat.config.keymap`, such as `prompt.newline`.
        changed: The `[keys]` table of the configuration.
    """
    found = [_sequence(name) for name in keys_of(key_id, changed)]
    return [sequence for sequence in found if sequence]


def _sequence(name: str) -> tuple[str, ...]:
    *modifiers, base = name.split("+")
    base = _SPELLED.get(base, base)
    alt = ("escape",) if "alt" in modifiers else ()
    letters = "".join({"ctrl": "c-", "shift": "s-"}.get(modifier, "?-") for modifier in modifiers if modifier != "alt")
    if letters or len(base) > 1:
        word = f"{letters}{base}"
        return (*alt, word) if word in ALL_KEYS or word in ("enter", "tab", "backspace") else ()
    return (*alt, base)


def interrupt_character(changed: Mapping[str, str]) -> int | None:
    """The control character that the terminal turns into SIGINT instead of Ctrl+C; None for Ctrl+C."""
    for name in keys_of("chat.interrupt", changed):
        if name == "ctrl+c":
            return None
        if name.startswith("ctrl+") and len(name) == 6 and name[-1].isalpha():
            return ord(name[-1]) & 0x1F
    return None
