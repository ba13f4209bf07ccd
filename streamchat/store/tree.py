"""Orders sessions as a tree: each fork below the session that it was forked from."""

from __future__ import annotations

from collections.abc import Sequence

from streamchat.store.records import SessionInfo


def as_tree(sessions: Sequence[SessionInfo]) -> list[tuple[SessionInfo, int]]:
    """Return the sessions with their depth, 0 for one whose parent is not among them.

    The order is kept, except that forks follow their parent, which moves up to its newest fork.
    """
    known = {info.id: info for info in sessions}
    children: dict[str, list[SessionInfo]] = {}
    for info in sessions:
        children.setdefault(_parent(info, known), []).append(info)
    found: list[tuple[SessionInfo, int]] = []
    for info in sessions:
        root = _root(info, known)
        if (root, 0) not in found:
            _add(root, 0, children, found)
    return found


def _parent(info: SessionInfo, known: dict[str, SessionInfo]) -> str:
    """Return the id of the parent if it is known, else ''."""
    return info.parent if info.parent in known and info.parent is not None and info.parent != info.id else ""


def _root(info: SessionInfo, known: dict[str, SessionInfo]) -> SessionInfo:
    """Return the session at the top; in a circle, which only a damaged database has, some session of it."""
    seen = {info.id}
    while (parent := _parent(info, known)) and parent not in seen:
        seen.add(parent)
        info = known[parent]
    return info


def _add(
    info: SessionInfo, depth: int, children: dict[str, list[SessionInfo]], found: list[tuple[SessionInfo, int]]
) -> None:
    waiting = [(info, depth)]
    seen = {each.id for each, _ in found}
    while waiting:
        info, depth = waiting.pop()
        if info.id in seen:
            continue
        seen.add(info.id)
        found.append((info, depth))
        waiting += [(child, depth + 1) for child in reversed(children.get(info.id, []))]
