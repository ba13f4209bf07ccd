"""The list of models to choose from, as rows: the same in the app and as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from streamchat.base.formatting import human_bytes
from streamchat.base.sanitize import one_line
from streamchat.frontend import file_access

if TYPE_CHECKING:
    from streamchat.base.events import ModelInfo
    from streamchat.models.choices import ModelChoice

HEADINGS = ("model", "size", "context", "")
FITS, TOO_LARGE, UNKNOWN = "fits", "too large", ""


@dataclass(frozen=True)
class ModelList:
    """The models that can be chosen on this machine, now.

    Args:
        choices: All of them.
        free_bytes: Memory that is free on the device; None if unknown.
        in_use: `ModelInfo.source` of the loaded model; '' if none is loaded.
    """

    choices: tuple[ModelChoice, ...] = ()
    free_bytes: int | None = None
    in_use: str = ""

    def matching(self, words: str) -> list[ModelChoice]:
        """Return the models whose name or label contains all `words`, in any case."""
        wanted = words.lower().split()
        return [each for each in self.choices if all(word in f"{each.name} {each.label}".lower() for word in wanted)]

    def cells(self, choice: ModelChoice) -> tuple[str, str, str, str]:
        """Return name, size, context length and state: '98.4 MB', '8,192', 'in use', 'fits', 'fetch · too large'."""
        size = human_bytes(choice.size_bytes) if choice.size_bytes else "?"
        context = f"{choice.context_length:,}" if choice.context_length else "?"
        if self.is_in_use(choice):
            state = "in use"
        else:
            state = " · ".join(filter(None, ("" if choice.is_here else "fetch", self.fit(choice))))
        about = "" if choice.is_here or not choice.size_bytes else "~"
        return one_line(choice.name), about + size, context, state

    def is_in_use(self, choice: ModelChoice) -> bool:
        """Return whether `choice` is the loaded model."""
        return bool(self.in_use) and choice.source == self.in_use

    def fit(self, choice: ModelChoice) -> str:
        """Return whether the weights fit into the memory that is free now."""
        if not choice.memory_bytes or self.free_bytes is None:
            return UNKNOWN
        return FITS if choice.memory_bytes <= self.free_bytes else TOO_LARGE

    def details(self, choice: ModelChoice) -> str:
        """Return a sentence about `choice`: what it is, its memory, and whether it must be fetched."""
        parts = [one_line(choice.label)]
        if choice.memory_bytes:
            free = "" if self.free_bytes is None else f" ({human_bytes(self.free_bytes)} are free)"
            parts.append(f"needs about {human_bytes(choice.memory_bytes)} of memory{free}")
        if not choice.is_here:
            size = f"about {human_bytes(choice.size_bytes)} " if choice.size_bytes else ""
            parts.append(f"{size}must be fetched once")
        return "; ".join(parts)


def find_models(info: ModelInfo | None) -> ModelList:
    """Return the list for a chat with the model of `info`. May take seconds: reads the Hub cache and folders."""
    from streamchat.models.choices import free_memory, model_choices

    dtype, device = ("float32", "cpu") if info is None else (info.dtype, info.device)
    choices = model_choices(dtype=dtype, local_files=file_access.allowed())
    return ModelList(tuple(choices), free_memory(device), "" if info is None else info.source)


def table(rows: Iterable[tuple[str, str, str, str]]) -> list[str]:
    """Return rows as lines with aligned columns; sizes and context lengths are aligned on the right."""
    cells = list(rows)
    wide = [max((len(row[column]) for row in cells), default=0) for column in range(3)]
    return [f"{row[0]:<{wide[0]}}  {row[1]:>{wide[1]}}  {row[2]:>{wide[2]}}  {row[3]}".rstrip() for row in cells]


def models_text(models: ModelList) -> str:
    """Return the list as text, with a line of headings."""
    return "\n".join(table([HEADINGS, *map(models.cells, models.choices)]))


def columns(models: ModelList, choices: Sequence[ModelChoice], width: int) -> list[str]:
    """Return the rows of `choices` for a list of `width` columns; long names are cut in the middle."""
    cells = [HEADINGS, *map(models.cells, choices)]
    rest = max((len(row) for row in table(("", *cell[1:]) for cell in cells)), default=0)
    room = max(12, width - rest)
    return table((_cut(cell[0], room), *cell[1:]) for cell in cells)


def _cut(name: str, room: int) -> str:
    """Cut `name` in the middle to `room` characters: the end of a file name tells quantizations apart."""
    if len(name) <= room:
        return name
    start = (room - 1) // 2
    return f"{name[:start]}…{name[len(name) - (room - 1 - start) :]}"
