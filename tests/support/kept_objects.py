"""Compiles the kernels as the program does, except that what is compiled once is kept: most tests change one source."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from streamchat.kernels import build, platforms


def compiler_that_keeps(folder: Path) -> Callable[[Sequence[str], Path], None]:
    """Stands for `build._compile`: keeps the object of every source, as the preprocessor leaves it, in `folder`.

    The preprocessor runs only if the source or a header differs from all before.
    """
    preprocessed: dict[str, Path] = {}

    def compile_and_link(compiler: Sequence[str], to: Path) -> None:
        flags = [*build.FLAGS, *platforms.processor_flags(compiler)[:1]]
        headers = [path.read_text(encoding="utf-8") for path in sorted(build.SOURCES.glob("*.h"))]
        objects = []
        for source in sorted(build.SOURCES.glob("*.c")):
            command = [*compiler, *filter(None, flags), str(source)]
            given = repr([*compiler, *flags, source.name, source.read_text(encoding="utf-8"), *headers])
            if given not in preprocessed:
                text = subprocess.run([*command, "-E", "-P"], capture_output=True, check=True).stdout
                digest = hashlib.sha256(repr([*compiler, *flags]).encode() + text)
                preprocessed[given] = folder / f"{digest.hexdigest()}.o"
            kept = preprocessed[given]
            if not kept.exists():
                subprocess.run([*command, "-c", "-o", str(kept)], check=True)
            objects.append(str(kept))
        command = [*compiler, *build.FLAGS, platforms.library_flag(), *objects, "-o", str(to)]
        subprocess.run(command, check=True, umask=0o077)

    return compile_and_link
