"""Runs the scenario with failing calls, and checks what must hold."""

from __future__ import annotations

import errno
import gc
import json
import logging
import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from streamchat.models.load import LoadedModel
from tools.crash import in_a_child
from tools.disk.judge import Judge
from tools.disk.promises import Promises
from tools.disk.scenario import Scenario, wait_for_upkeep
from tools.disk.shim import Kind, Shim


@dataclass(frozen=True)
class Failure:
    """A kind of call, and how it fails."""

    kind: Kind
    error: int

    @property
    def name(self) -> str:
        """Name for messages, such as "write ENOSPC"."""
        return f"{(self.kind.name or '').lower()} {errno.errorcode[self.error]}"


FAILURES = (
    Failure(Kind.OPEN, errno.EMFILE),
    Failure(Kind.OPEN, errno.EIO),
    Failure(Kind.CREATE, errno.ENOSPC),
    Failure(Kind.WRITE, errno.ENOSPC),
    Failure(Kind.WRITE, errno.EIO),
    Failure(Kind.SYNC, errno.EIO),
    Failure(Kind.SYNC, errno.ENOSPC),
    Failure(Kind.RENAME, errno.ENOSPC),
    Failure(Kind.RENAME, errno.EIO),
    Failure(Kind.MAP, errno.ENOMEM),
    Failure(Kind.MAP, errno.EIO),
    Failure(Kind.TRUNCATE, errno.ENOSPC),
    Failure(Kind.TRUNCATE, errno.EIO),
    Failure(Kind.UNLINK, errno.EIO),
    Failure(Kind.MKDIR, errno.ENOSPC),
    Failure(Kind.LINK, errno.ENOSPC),
    Failure(Kind.READ, errno.EIO),
)


@dataclass(frozen=True)
class Case:
    """Call `number` (from 0) of a kind fails. If `lasting`, all later ones fail, too, until the next step ends."""

    failure: Failure
    number: int
    lasting: bool

    def __str__(self) -> str:
        how = "from call" if self.lasting else "call"
        return f"{self.failure.name}, {how} {self.number}"


@dataclass(frozen=True)
class Result:
    """The result of a case."""

    failed: int
    """Number of calls that failed; 0 if the case has fewer calls than `number`."""
    call: str = ""
    """The first failed call."""
    told: tuple[str, ...] = ()
    """What the user was told."""
    fault: str = ""
    """What is wrong; "" if nothing is."""


class Attempts:
    """Runs cases, each in a forked process with a separate folder.

    Args:
        loaded: The model of the chat.
        other: The same model, for the check at the end.
        folder: An empty folder.
    """

    def __init__(self, loaded: LoadedModel, other: LoadedModel, folder: Path) -> None:
        torch.set_num_threads(1)
        self._loaded, self._folder, self._shim = loaded, folder, Shim()
        self._judge = Judge(other)
        self._count = 0
        first = folder / "first"
        first.mkdir()
        os.environ["STREAMCHAT_HOME"] = str(first)
        self._shim.start(first)
        Scenario(loaded, lambda mark: None).run()  # imports everything, so that the forked processes need not
        self._shim.stop()
        self.calls = {kind: self._shim.calls(kind) for kind in Kind}
        """Kind -> number of its calls in a run without failures."""
        gc.freeze()

    def run(self, case: Case) -> Result:
        """Run a case."""
        self._count += 1
        home = self._folder / f"home-{self._count}"

        def work(fd: int) -> None:
            os.write(fd, json.dumps(self._work(case, home)).encode())

        status, said = in_a_child(work)
        if status:
            return Result(1, fault=f"{case}: {said[-3000:]}")
        values = json.loads(said)
        return Result(values["failed"], values["call"], tuple(values["told"]), values["fault"])

    def _work(self, case: Case, home: Path) -> dict[str, Any]:
        logging.disable()  # the log of a front end goes to a file
        home.mkdir(mode=0o700)
        os.environ["STREAMCHAT_HOME"] = str(home)
        digests: dict[str, set[str]] = defaultdict(set)
        position, failed_at = 0, -1

        def say(mark: dict[str, Any]) -> None:
            if "snapshot" in mark:
                digests[mark["snapshot"]].add(mark["digest"])

        def before(step: str) -> None:
            nonlocal position, failed_at
            position += 1
            if failed_at < 0 and self._shim.failed:
                failed_at = position
            elif 0 <= failed_at < position:
                self._shim.heal()

        scenario = Scenario(self._loaded, say)
        step = fault = ""

        def watched(name: str) -> None:
            nonlocal step
            step = name
            before(name)

        self._shim.start(home)
        self._shim.fail(case.failure.kind, case.number, 10**6 if case.lasting else 1, case.failure.error)
        try:
            scenario.run(watched)
            self._shim.heal()
            wait_for_upkeep()
            failed, call = self._shim.failed, self._shim.failed_call
            self._shim.stop()
            step = "check at the end"
            if failed:
                truth = scenario.truth
                self._judge.judge(home, Promises("", "", truth, truth, {}, dict(digests), frozenset(scenario.unsure)))
        except Exception as error:
            failed, call = max(1, self._shim.failed), self._shim.failed_call
            self._shim.stop()
            fault = f"{case} ({call}), step “{step}”: {type(error).__name__}: {error}; told: {scenario.told}"
        return {"failed": failed, "call": call, "told": scenario.told, "fault": fault}
