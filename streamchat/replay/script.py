"""Reads replay scripts: the transcripts of all files, as turns. Reports lines that cannot be used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from streamchat.base.errors import ConfigError
from streamchat.base.text_files import read_text
from streamchat.sessions.transcripts.formats import KINDS, Kind
from streamchat.sessions.transcripts.messages import Message, Transcript, TranscriptError, counted
from streamchat.sessions.transcripts.reader import read_transcripts

Format = Literal["auto"] | Kind
FORMATS: tuple[Format, ...] = ("auto", *KINDS)


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


@dataclass
class Script:
    """All dialogues and problems of the files."""

    dialogues: list[Dialogue] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """Lines that cannot be used, as `FILE:LINE: REASON`."""

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
    text = read_text(path, guess=True)
    if text.guess:
        script.problems.append(f"{path}: it {text.guess}")
    try:
        file = read_transcripts(text.text, wanted)
    except TranscriptError as error:
        raise ConfigError(f"{path}: {error}; give `--format text` if it is plain text") from None
    problems = list(file.problems)
    for transcript in file.transcripts:
        dialogue = Dialogue(f"{path}:{transcript.line}", system=_system_prompt(transcript))
        problems += [(message.line, reason) for message in transcript.messages if (reason := _add(message, dialogue))]
        if skipped := transcript.skipped:
            problems.append((transcript.line, f"{counted(skipped)} (only text can be replayed)"))
        if dialogue.turns or file.kind == "messages":
            script.dialogues.append(dialogue)
        else:
            problems.append((transcript.line, "it contains no user messages"))
    problems.sort(key=lambda each: each[0])
    script.problems += [f"{path}:{line}: {reason}" for line, reason in problems]


def _system_prompt(transcript: Transcript) -> str | None:
    """Return the system prompt in the header of an export."""
    settings = transcript.about.get("settings")
    prompt = settings.get("system_prompt") if isinstance(settings, dict) else None
    return prompt if isinstance(prompt, str) and prompt else None


def _add(message: Message, dialogue: Dialogue) -> str:
    """Append a message to the dialogue; return why it cannot be used, or ''."""
    content = message.text
    if message.role == "system":
        if not dialogue.turns:
            dialogue.system = content if dialogue.system is None else f"{dialogue.system}\n\n{content}"
        else:  # in the middle of a dialogue: as a user message
            dialogue.turns.append(Turn(f"System: {content}"))
    elif message.role == "user":
        dialogue.turns.append(Turn(content))
    elif not dialogue.turns:
        return "it starts with an assistant message, which was skipped"
    else:
        last = dialogue.turns[-1]
        reply = content if last.reply is None else f"{last.reply}\n\n{content}"
        dialogue.turns[-1] = Turn(last.text, reply)
    return ""


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
    number: int = 0
    """Number in its conversation, from 0."""


def steps(script: Script, *, fresh: bool, teacher_forced: bool, repeat: int | None) -> Iterator[Step]:
    """Yield the turns of a run in order; `repeat = None` repeats forever.

    If the whole run is one conversation, only the first system prompt can be set. Later ones are added to the start of
    the next message, so that nothing of the script is lost.
    """
    index = passed = number = 0
    while repeat is None or passed < repeat:
        for at_dialogue, dialogue in enumerate(script.dialogues):
            lead = ""
            if not fresh and index and dialogue.system and at_dialogue:
                lead = f"System: {dialogue.system}\n\n"
            for at, turn in enumerate(dialogue.turns):
                starts = at == 0 and (fresh or index == 0)
                number = 0 if starts else number + 1
                yield Step(
                    index,
                    (lead if at == 0 else "") + turn.text,
                    turn.reply if teacher_forced else None,
                    dialogue.place,
                    starts,
                    dialogue.system if starts else None,
                    number,
                )
                index += 1
        if index == 0:
            return
        passed += 1
