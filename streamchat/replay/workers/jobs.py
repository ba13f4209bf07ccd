"""The jobs of workers: each is one conversation, from its start to its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from streamchat.replay.script import Format, Script, Step, read_scripts, steps

FOLDERS = "conversations"
"""Folder of the run that has one folder for each conversation."""


@dataclass(frozen=True)
class Job:
    """One conversation of a run."""

    number: int
    """Number in the run, from 1."""
    steps: tuple[Step, ...]
    """Its turns, whose indices count over the whole run."""
    folder: str
    """Name of its folder, below `FOLDERS`."""


@dataclass
class Jobs:
    """All conversations of a run."""

    jobs: list[Job] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """Lines that cannot be used, as `FILE:LINE: REASON`."""

    @property
    def turns(self) -> int:
        """Number of turns of the run."""
        return sum(len(job.steps) for job in self.jobs)


def jobs_of(scripts: Sequence[Script], *, teacher_forced: bool, repeat: int, max_turns: int | None) -> list[Job]:
    """Return one job for each script, with the first `max_turns` turns of the run in all."""
    jobs: list[Job] = []
    index = 0
    for script in scripts:
        turns = steps(script, fresh=False, teacher_forced=teacher_forced, repeat=repeat)
        found = tuple(
            replace(step, index=index + step.index)
            for step in turns
            if max_turns is None or index + step.index < max_turns
        )
        index += len(found)
        if found:
            number = len(jobs) + 1
            jobs.append(Job(number, found, f"{number:05}"))
    return jobs


def read_jobs(
    paths: Sequence[Path],
    wanted: Format,
    *,
    fresh: bool,
    teacher_forced: bool,
    repeat: int,
    max_turns: int | None,
) -> Jobs:
    """Read the files as conversations: each record is one if `fresh`, else each file.

    Args:
        paths: The files.
        wanted: Their format.
        fresh: Start a new conversation for every record.
        teacher_forced: Feed the replies of the script.
        repeat: Passes over each conversation; with `fresh`, each pass starts new conversations.
        max_turns: Maximum number of turns of the run; None for all.

    Raises:
        ConfigError: A file cannot be read.
    """
    files = [read_scripts([path], wanted) for path in paths]
    problems = [problem for file in files for problem in file.problems]
    if fresh:
        scripts = [Script([dialogue]) for _ in range(repeat) for file in files for dialogue in file.dialogues]
        repeat = 1
    else:
        scripts = files
    return Jobs(jobs_of(scripts, teacher_forced=teacher_forced, repeat=repeat, max_turns=max_turns), problems)
