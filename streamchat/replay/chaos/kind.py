"""What all kinds of disturbances have in common."""

from __future__ import annotations

import random
import threading
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

Values = dict[str, Any]
"""One disturbance of a kind, as JSON values."""


class Screen(Protocol):
    """The terminal of the measured process."""

    def resize(self, columns: int, rows: int) -> None:
        """Change its size."""
        ...


@dataclass(frozen=True)
class Target:
    """The measured process, as disturbances reach it from outside."""

    pid: int
    database: Path
    """The sessions of the run."""
    folder: Path
    """The folder of the run."""
    metrics_port: int
    screen: Screen | None
    """None if the process has no terminal."""
    ended: threading.Event
    """Set when the run is over; ends waiting."""


class Kind(ABC):
    """A kind of disturbance."""

    name: str
    what: str
    """What it does, and what is simulated, for the report."""
    every: int
    """Mean number of turns between two of them."""

    def missing(self) -> str:
        """Return why this machine cannot have it; '' if it can."""
        return ""

    @abstractmethod
    def draw(self, rng: random.Random) -> Values:
        """Return a random disturbance."""

    @abstractmethod
    def describe(self, values: Values) -> str:
        """Return what a disturbance does, for the report."""

    def slow_for_s(self, values: Values) -> float:
        """Return for how many seconds the times of turns are not judged."""
        return 0.5


class Inside(Kind):
    """A kind that the measured process carries out on itself."""

    @abstractmethod
    def apply(self, values: Values) -> None:
        """Start a disturbance."""

    @abstractmethod
    def end(self) -> None:
        """End all of them."""

    def turns(self, values: Values) -> int:
        """Return the number of turns after which `end` is called; 0 for never."""
        return 0


class Outside(Kind):
    """A kind that another process carries out."""

    @abstractmethod
    def disturb(self, target: Target, values: Values) -> None:
        """Carry out a disturbance; return when it is over. Runs in a thread."""
