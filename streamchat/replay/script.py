"""Reader for replay scripts: conversations, MT-Bench, messages or plain text. Reports lines that cannot be used."""

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
    """A user message and the script's reply."""

    text: str
    reply: str | None = None
    """None if the script has no reply."""


@dataclass
class Dialogue:
    """One record of a script."""

    place: str
    """`FILE:LINE` of its start."""
    turns: list[Turn] = field(default_factory=list)
    system: str | None = None
    """System prompt; None if the script has none."""


@dataclass(frozen=True)
class Problem:
    """A script line that cannot be used."""

    place: str
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


@dataclass
class Script:
    """All dialogues and problems of the files."""

    dialogues: list[Dialogue] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    @property
    def turns(self) -> int:
        """Number of turns in one pass."""
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
            reader.add(record)


def _read_text(path: Path, text: str, script: Script) -> None:
    lines = [(number, line.strip()) for number, line in enumerate(split_lines(text), 1) if line.strip()]
    if lines:
        turns = [Turn(line) for _, line in lines]
        script.dialogues.append(Dialogue(f"{path}:{lines[0][0]}", turns))


class _Reader:
    """Converts the records of one file to dialogues."""

    def __init__(self, path: Path, script: Script, kind: Format) -> None:
        self._path, self._script, self._kind = path, script, kind
        self._open: Dialogue | None = None
        """Current dialogue, for formats in which a file is one dialogue."""

    def add(self, record: Record) -> None:
        """Add the next record."""
        place, value = f"{self._path}:{record.line}", record.value
        if record.problem:
            self._add_problem(place, record.problem)
        elif (kind := kind_of(value)) != self._kind:
            what = (
                unknown(value) if kind is None else f"this record has the format {kind}, but the file has {self._kind}"
            )
            self._add_problem(place, what)
        elif kind == "mt-bench":
            self._add_mt_bench(place, value)
        elif kind == "conversations":
            self._add_conversation(place, value)
        elif "streamchat" in value:  # the header of an export
            settings = value.get("settings")
            prompt = settings.get("system_prompt") if isinstance(settings, dict) else None
            self._open = None
            self._file_dialogue(place).system = prompt if isinstance(prompt, str) and prompt else None
        else:
            self._add_message(place, value)

    def _add_message(self, place: str, value: dict[str, Any]) -> None:
        try:
            role, content = message_of(value)
        except TranscriptError as error:
            self._add_problem(place, str(error))
        else:
            _append_message(self._file_dialogue(place), role, content, place, self._script.problems)

    def _file_dialogue(self, place: str) -> Dialogue:
        if self._open is None:
            self._open = Dialogue(place)
            self._script.dialogues.append(self._open)
        return self._open

    def _add_problem(self, place: str, reason: str) -> None:
        self._script.problems.append(Problem(place, reason))

    def _add_mt_bench(self, place: str, record: dict[str, Any]) -> None:
        turns = record.get("turns")
        if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) for turn in turns):
            self._add_problem(place, '"turns" must be a list of texts')
            return
        self._add_dialogue(Dialogue(place, [Turn(turn) for turn in turns if turn.strip()]))

    def _add_conversation(self, place: str, record: dict[str, Any]) -> None:
        dialogue = Dialogue(place)
        try:
            messages = messages_of(record)
        except TranscriptError as error:  # a partial conversation would be misleading, so skip all of it
            self._add_problem(place, str(error))
            return
        for role, content in messages:
            _append_message(dialogue, role, content, place, self._script.problems)
        self._add_dialogue(dialogue)

    def _add_dialogue(self, dialogue: Dialogue) -> None:
        if dialogue.turns:
            self._script.dialogues.append(dialogue)
        else:
            self._add_problem(dialogue.place, "it contains no user messages")


def _append_message(dialogue: Dialogue, role: Role, content: str, place: str, problems: list[Problem]) -> None:
    """Append a message to the dialogue."""
    if role == "system":
        if not dialogue.turns:
            dialogue.system = content if dialogue.system is None else f"{dialogue.system}\n\n{content}"
        else:  # in the middle of a dialogue: as a user message
            dialogue.turns.append(Turn(f"System: {content}"))
    elif role == "user":
        dialogue.turns.append(Turn(content))
    elif not dialogue.turns:
        problems.append(Problem(place, "it starts with an assistant message, which was skipped"))
    else:
        last = dialogue.turns[-1]
        reply = content if last.reply is None else f"{last.reply}\n\n{content}"
        dialogue.turns[-1] = Turn(last.text, reply)


@dataclass(frozen=True)
class Step:
    """One turn of a run."""

    index: int
    """Index over the whole run, from 0."""
    text: str
    reply: str | None
    """The script's reply to feed, or None to generate one."""
    place: str
    starts: bool = False
    """Whether it starts a new conversation."""
    system: str | None = None
    """System prompt of that conversation; None for the one in the settings."""


def steps(script: Script, *, fresh: bool, teacher_forced: bool, repeat: int | None) -> Iterator[Step]:
    """Yield the turns of a run in order; `repeat = None` repeats forever.

    If the whole run is one conversation, only the first system prompt can be set. Later ones are added to the start of
    the next message, so that nothing of the script is lost.
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
