"""Fills the disk, and empties it some turns later."""

from __future__ import annotations

import random

from streamchat.base.formatting import human_bytes, plural
from streamchat.replay.chaos.kind import Inside, Values

LIMITS = (0, 4096, 65_536, 1_000_000)
"""Sizes in bytes up to which files can still grow."""


class FullDisk(Inside):
    """A limit on the size of the files that the process writes (RLIMIT_FSIZE).

    Unlike a file system with a quota, it needs no privileges and no compiler, and exists on Linux and macOS.
    """

    name = "disk"
    what = (
        "the disk is full for some turns; simulated: every write beyond a file size (RLIMIT_FSIZE) fails, with EFBIG "
        "instead of ENOSPC"
    )
    every = 25

    def missing(self) -> str:
        try:
            import resource
        except ImportError:
            return "this system cannot limit the size of files"
        return "" if resource.getrlimit(resource.RLIMIT_FSIZE)[1] < 0 else "the size of files is already limited"

    def draw(self, rng: random.Random) -> Values:
        return {"bytes": rng.choice(LIMITS), "turns": rng.randint(1, 3)}

    def describe(self, values: Values) -> str:
        return f"no file grows beyond {human_bytes(values['bytes'])} for {plural(values['turns'], 'turn')}"

    def apply(self, values: Values) -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (values["bytes"], resource.RLIM_INFINITY))

    def end(self) -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    def turns(self, values: Values) -> int:
        return int(values["turns"])
