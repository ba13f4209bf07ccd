"""Reading what is to be said: conversations, MT-Bench, messages, plain text. Broken lines are told."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from streamchat.errors import ConfigError
from streamchat.jsonlines import split_lines

Format = Literal["auto", "conversations", "mt-bench", "messages", "text"]
FORMATS: tuple[Format, ...] = ("auto", "conversations", "mt-bench", "messages", "text")
"""`conversations`: {"messages": [...]} a line; `mt-bench`: {"turns": [...]} a line; `messages`: {"role", "content"} a
line, as `streamchat sessions export --format jsonl` writes them; `text`: a user turn a line."""


@dataclass(frozen=True)
class Turn:
    """What the user says, and what the script has as the answer."""

    text: str
    reply: str | None = None
    """None where the script has none."""


@dataclass
class Dialogue:
    """One record of a script."""

    place: str
    """`FILE:LINE` where it begins."""
    turns: list[Turn] = field(default_factory=list)
    system: str | None = None
    """None where the script says nothing about it."""


@dataclass(frozen=True)
class Problem:
    """A line that cannot be used."""

    place: str
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


@dataclass
class Script:
    """All dialogues, and what was wrong."""

    dialogues: list[Dialogue] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    @property
    def turns(self) -> int:
        """Turns of one pass."""
        return sum(len(dialogue.turns) for dialogue in self.dialogues)


def read_scripts(paths: Sequence[Path], wanted: Format = "auto") -> Script:
    """Read all files, in order.

    Raises:
        ConfigError: A file cannot be read.
    """
    script = Script()
    for path in paths:
        _read(path, wanted, script)
    return script


def _read(path: Path, wanted: Format, script: Script) -> None:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    text = data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace")
    if "\N{REPLACEMENT CHARACTER}" in text and b"\xef\xbf\xbd" not in data:
        script.problems.append(Problem(str(path), "not all of it is UTF-8 text; the bytes were replaced"))
    lines = [(number, line) for number, line in enumerate(split_lines(text), 1) if line.strip()]
    kind = _detect(lines) if wanted == "auto" else wanted
    reader = _Reader(path, script)
    for number, line in lines:
        reader.take(number, line, kind)


def _detect(lines: list[tuple[int, str]]) -> Format:
    """By the first line that is JSON; plain text where the first lines are none."""
    for _, line in lines[:20]:
        record = _json(line)
        if isinstance(record, dict):
            if "messages" in record:
                return "conversations"
            if "turns" in record:
                return "mt-bench"
            if "role" in record or "streamchat" in record:
                return "messages"
    return "text"


def _json(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


class _Reader:
    """Lines of one file to dialogues."""

    def __init__(self, path: Path, script: Script) -> None:
        self._path, self._script = path, script
        self._open: Dialogue | None = None
        """Of formats in which a dialogue is the whole file."""

    def take(self, number: int, line: str, kind: Format) -> None:
        """The next line."""
        place = f"{self._path}:{number}"
        if kind == "text":
            self._whole(place).turns.append(Turn(line.strip()))
            return
        record = _json(line)
        if not isinstance(record, dict):
            self._wrong(place, "this is no JSON object")
        elif kind == "mt-bench":
            self._turns(place, record)
        elif kind == "conversations":
            self._messages(place, record)
        elif "streamchat" in record:  # the head of an export
            settings = record.get("settings")
            prompt = settings.get("system_prompt") if isinstance(settings, dict) else None
            self._open = None
            self._whole(place).system = prompt if isinstance(prompt, str) and prompt else None
        else:
            _add(self._whole(place), record, place, self._script.problems)

    def _whole(self, place: str) -> Dialogue:
        if self._open is None:
            self._open = Dialogue(place)
            self._script.dialogues.append(self._open)
        return self._open

    def _wrong(self, place: str, reason: str) -> None:
        self._script.problems.append(Problem(place, reason))

    def _turns(self, place: str, record: dict[str, Any]) -> None:
        turns = record.get("turns")
        if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) for turn in turns):
            self._wrong(place, '"turns" must be a list of texts')
            return
        self._keep(Dialogue(place, [Turn(turn) for turn in turns if turn.strip()]))

    def _messages(self, place: str, record: dict[str, Any]) -> None:
        messages = record.get("messages")
        if not isinstance(messages, list):
            self._wrong(place, '"messages" must be a list')
            return
        dialogue = Dialogue(place)
        for message in messages:
            if not _add(dialogue, message, place, self._script.problems):
                return  # half a conversation would be another one
        self._keep(dialogue)

    def _keep(self, dialogue: Dialogue) -> None:
        if dialogue.turns:
            self._script.dialogues.append(dialogue)
        else:
            self._wrong(dialogue.place, "nothing is said by the user")


def _add(dialogue: Dialogue, message: Any, place: str, problems: list[Problem]) -> bool:
    """Append a message; returns False where it is none."""
    role = message.get("role") if isinstance(message, dict) else None
    content = message.get("content") if isinstance(message, dict) else None
    if role not in ("system", "user", "assistant") or not isinstance(content, str):
        problems.append(Problem(place, 'a message needs "role" (system, user, assistant) and "content" (text)'))
        return False
    if role == "system":
        if not dialogue.turns:
            dialogue.system = content if dialogue.system is None else f"{dialogue.system}\n\n{content}"
        else:  # in the middle: with the next message, as words of the user
            dialogue.turns.append(Turn(f"System: {content}"))
    elif role == "user":
        dialogue.turns.append(Turn(content))
    elif not dialogue.turns:
        problems.append(Problem(place, "it begins with words of the assistant; these were left out"))
    else:
        last = dialogue.turns[-1]
        reply = content if last.reply is None else f"{last.reply}\n\n{content}"
        dialogue.turns[-1] = Turn(last.text, reply)
    return True


@dataclass(frozen=True)
class Step:
    """One turn of a run."""

    index: int
    """Counts from 0 over the whole run."""
    text: str
    reply: str | None
    """The script's answer, where it is to be fed as given."""
    place: str
    starts: bool = False
    """A new conversation begins with it."""
    system: str | None = None
    """Its system prompt; None for the one of the settings."""


def steps(script: Script, *, fresh: bool, teacher_forced: bool, repeat: int | None) -> Iterator[Step]:
    """The turns of a run, in order; lazily, as `repeat = None` has no end.

    With one conversation over everything, a system prompt can only be the first one's; later ones are put in front of
    the next message, so that nothing of the script is left out.
    """
    index = passed = 0
    while repeat is None or passed < repeat:
        for number, dialogue in enumerate(script.dialogues):
            very_first = index == 0
            lead = ""
            if not fresh and not very_first and dialogue.system and number:
                lead = f"System: {dialogue.system}\n\n"
            for at, turn in enumerate(dialogue.turns):
                starts = (very_first and at == 0) or (fresh and at == 0)
                yield Step(
                    index,
                    (lead if at == 0 else "") + turn.text,
                    turn.reply if teacher_forced else None,
                    dialogue.place,
                    starts,
                    dialogue.system if starts else None,
                )
                index += 1
        if index == 0:
            return
        passed += 1
