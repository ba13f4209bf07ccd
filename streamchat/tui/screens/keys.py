"""Key bindings of the chat screen; `streamchat.config.keymap` defines the keys."""

from __future__ import annotations

from textual.binding import BindingType

from streamchat.tui.bindings import bind

CHAT_KEYS: list[BindingType] = [
    bind("chat.stop", "stop", show=True),
    bind("chat.interrupt", "interrupt", priority=True),
    bind("chat.queue_drop", "queue_drop", priority=True),
    bind("chat.queue_clear", "queue_clear", priority=True),
    bind("chat.copy_reply", "copy_reply", priority=True, show=True),
    bind("chat.map", "focus_map", priority=True, show=True),
    bind("chat.sidebar", "toggle_sidebar", priority=True, show=True),
    bind("chat.recall", "recall", priority=True),
    bind("chat.sessions", "sessions", priority=True),
    bind("chat.models", "models", priority=True),
    bind("chat.settings", "settings", priority=True),
    bind("chat.thoughts", "toggle_thoughts", priority=True),
    bind("chat.follow", "follow", priority=True),
    bind("chat.top", "scroll_top", priority=True),
    bind("chat.turn_up", "step_turn(-1)"),
    bind("chat.turn_down", "step_turn(1)"),
    bind("chat.line_up", "scroll_line(-1)"),
    bind("chat.line_down", "scroll_line(1)"),
]
