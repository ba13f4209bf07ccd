"""Keys of the chat. Every one has an id, so that it can be remapped."""

from __future__ import annotations

from textual.binding import Binding, BindingType

CHAT_KEYS: list[BindingType] = [
    Binding(
        "escape",
        "stop",
        "Stop",
        id="chat.stop",
        tooltip="Stop the reply; take a waiting message back",
    ),
    Binding(
        "ctrl+c",
        "interrupt",
        "Stop or copy",
        show=False,
        priority=True,
        id="chat.interrupt",
        tooltip="Copy the selection, else stop the reply, else quit on a second press",
    ),
    Binding(
        "ctrl+y",
        "copy_reply",
        "Copy reply",
        priority=True,
        id="chat.copy_reply",
        tooltip="Copy the last reply to the terminal's clipboard",
    ),
    Binding(
        "ctrl+b",
        "toggle_sidebar",
        "Sidebar",
        priority=True,
        id="chat.sidebar",
        tooltip="Show or hide the status panel",
    ),
    Binding(
        "ctrl+end",
        "follow",
        "To the end",
        show=False,
        priority=True,
        id="chat.follow",
        tooltip="Go to the newest text and follow it",
    ),
    Binding(
        "ctrl+home",
        "scroll_top",
        "To the top",
        show=False,
        priority=True,
        id="chat.top",
        tooltip="Go to the oldest text",
    ),
    Binding(
        "ctrl+t",
        "focus_map",
        "Memory",
        priority=True,
        id="chat.map",
        tooltip="Walk through what the model still sees; Enter goes to the message, p pins it",
    ),
    Binding("alt+up", "step_turn(-1)", "Turn before", show=False, id="chat.turn_up", tooltip="Go to the turn before"),
    Binding("alt+down", "step_turn(1)", "Turn after", show=False, id="chat.turn_down", tooltip="Go to the turn after"),
    Binding("ctrl+up", "scroll_line(-1)", "Scroll up", show=False, id="chat.line_up", tooltip="Scroll a line up"),
    Binding(
        "ctrl+down", "scroll_line(1)", "Scroll down", show=False, id="chat.line_down", tooltip="Scroll a line down"
    ),
]
