"""Reads the turns of a replay: conversations, MT-Bench, messages, plain text. Reports what cannot be used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from streamchat.base.errors import ConfigError
from streamchat.base.jsonlines import split_lines
from streamchat.sessions.transcripts import (
    Record,
    Role,
    TranscriptError,
    kind_of,
    message_of,
    messages_of,
    read_records,
    unknown,
)

Format = Literal["auto", "conversations", "mt-bench", "messages", "text"]
FORMATS: tuple[Format, ...] = ("auto", "conversations", "mt-bench", "messages", "text")
"""`conversations`: {"messages": [...]} or {"conversations": [...]} per record; `mt-bench`: {"turns": [...]} per record;
`messages`: {"role", "content"} per record, as `streamchat sessions export --format jsonl` writes them; `text`: a user
turn per line. Records are JSON lines, the items of one array, or one object."""


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
    if wanted == "text":
        _read_text(path, text, script)
        return
    try:
        records = read_records(text)
    except TranscriptError as error:
        raise ConfigError(f"{path}: {error}; give `--format text` if it is plain text") from None
    if records is None and wanted == "auto":
        _read_text(path, text, script)
        return
    kinds = [kind for record in records or () if (kind := kind_of(record.value))]
    if records and not kinds:
        raise ConfigError(f"{path}: {unknown(next((r.value for r in records if not r.problem), records[0].value))}")
    if records is None:
        raise ConfigError(f"{path}: it is not JSON; `--format text` reads it as plain text")
    if records:
        reader = _Reader(path, script, kinds[0] if wanted == "auto" else wanted)
        for record in records:
            reader.take(record)


def _read_text(path: Path, text: str, script: Script) -> None:
    lines = [(number, line.strip()) for number, line in enumerate(split_lines(text), 1) if line.strip()]
    if lines:
        turns = [Turn(line) for _, line in lines]
        script.dialogues.append(Dialogue(f"{path}:{lines[0][0]}", turns))


class _Reader:
    """Records of one file to dialogues."""

    def __init__(self, path: Path, script: Script, kind: Format) -> None:
        self._path, self._script, self._kind = path, script, kind
        self._open: Dialogue | None = None
        """Of formats in which a dialogue is the whole file."""

    def take(self, record: Record) -> None:
        """The next record."""
        place, value = f"{self._path}:{record.line}", record.value
        if record.problem:
            self._wrong(place, record.problem)
        elif (kind := kind_of(value)) != self._kind:
            what = unknown(value) if kind is None else f"this is of the format {kind}, and the file is {self._kind}"
            self._wrong(place, what)
        elif kind == "mt-bench":
            self._turns(place, value)
        elif kind == "conversations":
            self._messages(place, value)
        elif "streamchat" in value:  # the head of an export
            settings = value.get("settings")
            prompt = settings.get("system_prompt") if isinstance(settings, dict) else None
            self._open = None
            self._whole(place).system = prompt if isinstance(prompt, str) and prompt else None
        else:
            self._message(place, value)

    def _message(self, place: str, value: dict[str, Any]) -> None:
        try:
            role, content = message_of(value)
        except TranscriptError as error:
            self._wrong(place, str(error))
        else:
            _add(self._whole(place), role, content, place, self._script.problems)

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
        dialogue = Dialogue(place)
        try:
            messages = messages_of(record)
        except TranscriptError as error:  # half a conversation would be another one
            self._wrong(place, str(error))
            return
        for role, content in messages:
            _add(dialogue, role, content, place, self._script.problems)
        self._keep(dialogue)

    def _keep(self, dialogue: Dialogue) -> None:
        if dialogue.turns:
            self._script.dialogues.append(dialogue)
        else:
            self._wrong(dialogue.place, "nothing is said by the user")


def _add(dialogue: Dialogue, role: Role, content: str, place: str, problems: list[Problem]) -> None:
    """Append a message."""
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
