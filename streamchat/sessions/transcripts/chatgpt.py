"""ChatGPT's data export, `conversations.json`: each conversation is a tree of messages, `mapping`.

The shown conversation is the path from the root to `current_node`; other branches are earlier edits and regenerated
replies. If no current node is named, the path ends at the last message of the file. Text of the user, the model and a
visible system message is read. Everything else is counted as skipped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from streamchat.sessions.transcripts.messages import ROLES, Message, Transcript, TranscriptError, short_json, skip

REASONING = ("thoughts", "reasoning_recap")


def conversation_of(record: dict[str, Any]) -> Transcript:
    """Return the shown conversation of one object of the export.

    Raises:
        TranscriptError: The tree is damaged.
    """
    mapping = record["mapping"]
    if not isinstance(mapping, dict):
        raise TranscriptError('"mapping" must be an object')
    end = record["current_node"]
    if end is None:
        end = next((name for name, node in reversed(mapping.items()) if _is_visible(node)), None)
    path = list(_path(mapping, end))[::-1]
    skipped: Counter[str] = Counter()
    read = (_message(node["message"], skipped) for node in path if isinstance(node.get("message"), dict))
    messages = [message for message in read if message is not None]
    if branches := sum(_is_visible(node) for node in mapping.values()) - sum(map(_is_visible, path)):
        skipped["alternative message"] = branches
    about = {"title": record.get("title"), "model_name": record.get("default_model_slug")}
    return Transcript(messages, about=about, skipped=skipped)


def _path(mapping: dict[str, Any], name: Any) -> Iterator[dict[str, Any]]:
    """Yield the nodes from the node `name` up to the root."""
    seen = set[str]()
    while name is not None:
        node = mapping.get(name) if isinstance(name, str) else None
        if not isinstance(node, dict):
            raise TranscriptError(f'its "mapping" has no node {short_json(name)}')
        if name in seen:
            raise TranscriptError(f'its "mapping" has a cycle at the node {short_json(name)}')
        seen.add(name)
        yield node
        name = node.get("parent")


def _message(message: dict[str, Any], skipped: Counter[str]) -> Message | None:
    """Return the message of a node; None if it is hidden, empty or not text."""
    if _is_hidden(message):
        return None
    role = _field(message, "author", "role")
    kind = _field(message, "content", "content_type")
    if role == "tool" or message.get("recipient") not in (None, "all"):
        skipped["tool message"] += 1
        return None
    if kind in REASONING:
        skipped["reasoning message"] += 1
        return None
    if not isinstance(role, str) or role not in ROLES:
        raise TranscriptError(f"unknown role {short_json(role)}; known roles are {', '.join(ROLES)}")
    parts = _field(message, "content", "parts")
    if not isinstance(parts, list):
        parts = [_field(message, "content", "text")]
    text = "\n".join(filter(None, (_text(part, skipped) for part in parts)))
    if not text.strip() and kind not in ("text", "multimodal_text"):
        skipped[f"{short_json(kind)} message"] += 1
    return Message(ROLES[role], text, at=message.get("create_time")) if text.strip() else None


def _text(part: Any, skipped: Counter[str]) -> str:
    """Return the text of one content part, or the mark of what has none."""
    if isinstance(part, dict) and isinstance(part.get("text"), str):  # also the words of a recording
        part = part["text"]
    if isinstance(part, str) or part is None:
        return part or ""
    kind = str(part.get("content_type")) if isinstance(part, dict) else ""
    return skip("image" if "image" in kind else "audio recording" if "audio" in kind else "file", skipped)


def _is_visible(node: Any) -> bool:
    """Return whether a node has a message of the user or the model that is not hidden."""
    message = node.get("message") if isinstance(node, dict) else None
    if not isinstance(message, dict) or _is_hidden(message):
        return False
    return _field(message, "author", "role") in ("user", "assistant")


def _is_hidden(message: dict[str, Any]) -> bool:
    return bool(_field(message, "metadata", "is_visually_hidden_from_conversation"))


def _field(message: dict[str, Any], outer: str, name: str) -> Any:
    value = message.get(outer)
    return value.get(name) if isinstance(value, dict) else None
