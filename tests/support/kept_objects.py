"""Compiles the kernels as the program does, except that what is compiled once is kept: most tests change one source."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from streamchat.kernels import build, platforms


def compiler_that_keeps(folder: Path) -> Callable[[Sequence[str], Path], None]:
    """Stands for `build._compile`: keeps the object of every source, as the preprocessor leaves it, in `folder`."""

    def compile_and_link(compiler: Sequence[str], to: Path) -> None:
        flags = [*build.FLAGS, *platforms.processor_flags(compiler)[:1]]
        objects = []
        for source in sorted(build.SOURCES.glob("*.c")):
            command = [*compiler, *filter(None, flags), str(source)]
            text = subprocess.run([*command, "-E", "-P"], capture_output=True, check=True).stdout
            kept = folder / f"{hashlib.sha256(repr([*compiler, *flags]).encode() + text).hexdigest()}.o"
            if not kept.exists():
                subprocess.run([*command, "-c", "-o", str(kept)], check=True)
            objects.append(str(kept))
        command = [*compiler, *build.FLAGS, platforms.library_flag(), *objects, "-o", str(to)]
        subprocess.run(command, check=True, umask=0o077)

    return compile_and_link
