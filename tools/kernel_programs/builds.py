"""Builds of the kernels with the driver: compilers, instruction sets, sanitizers."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from streamchat.kernels import build

DRIVER = Path(__file__).parent / "driver.c"
LEVELS = {
    "x86-64": "sse2",
    "x86-64-v2": "sse4_2",
    "haswell": "avx2",
    "skylake-avx512": "avx512bw",
    "icelake-server": "avx512_vnni",
}
"""Instruction sets of x86, as compilers name them, and the feature of the processor that each needs."""
_UNDEFINED = "-fsanitize=undefined,float-cast-overflow"
SANITIZERS = {
    "address": ("-O1", "-g", "-fsanitize=address", "-fno-omit-frame-pointer"),
    "undefined": ("-O1", "-g", _UNDEFINED, "-fno-sanitize-recover=all"),
    "thread": ("-O1", "-g", "-fsanitize=thread"),
}
_INCLUDE = re.compile(r'^#include "([^"]+)"', re.MULTILINE)
ENVIRONMENT = {
    "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=0",
    "TSAN_OPTIONS": "halt_on_error=1:second_deadlock_stack=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}


@dataclass(frozen=True)
class Build:
    """One way to compile the kernels."""

    name: str
    compiler: str
    flags: tuple[str, ...]
    emulator: tuple[str, ...] = ()
    feature: str = ""
    """Feature that the processor must have."""

    def missing(self) -> str:
        """Return what the build needs and this machine lacks; '' if nothing."""
        for program in (self.compiler, *self.emulator[:1]):
            if not shutil.which(program):
                return f"{program} is not installed"
        if not self.emulator and platform.machine() != "x86_64":
            return "this is not an x86 processor"
        if any(flag.startswith("-fsanitize") for flag in self.flags) and not _can_link(self.compiler, self.flags):
            return f"{self.compiler} has no library for this sanitizer"
        return "" if self.feature in _features() else f"this processor has no {self.feature}"

    def compile(self, folder: Path, sources: Path = build.SOURCES) -> list[str]:
        """Compile the build; return the command that runs it. Objects of unchanged files in `folder` are used again."""
        kernels = [path for path in sorted(sources.glob("*.c")) if path.name != "team.c"]  # which the driver includes
        base = [flag for flag in build.FLAGS if flag not in ("-fPIC", "-fvisibility=hidden")]
        command = [self.compiler, *base, *self.flags, "-w", f"-I{sources}"]
        target = folder / self.name
        objects = {path: folder / f"{self.name}-{_digest(path, sources)}.o" for path in (DRIVER, *kernels)}
        new = [[*command, "-c", path, "-o", to] for path, to in objects.items() if not to.exists()]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(_call, new))
        _call([*command, *objects.values(), "-lm", "-o", target])
        return [*self.emulator, str(target)]


@cache
def _can_link(compiler: str, flags: tuple[str, ...]) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        source, to = Path(folder) / "main.c", Path(folder) / "main"
        source.write_text("int main(void) { return 0; }\n")
        command = [compiler, *flags, str(source), "-o", str(to)]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _call(command: Sequence[str | Path]) -> None:
    done = subprocess.run([str(each) for each in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"kernel_programs: {command[0]} failed: {done.stderr.strip()[:2000]}")


def _digest(path: Path, sources: Path) -> str:
    """Return a digest of a file and of all files that it includes."""
    digest, left, known = hashlib.sha256(path.name.encode()), [path], {path}
    while left:
        text = left.pop().read_text()
        digest.update(text.encode())
        found = [folder / name for name in _INCLUDE.findall(text) for folder in (path.parent, sources)]
        new = [each for each in found if each.exists() and each not in known]
        known.update(new)
        left += new
    return digest.hexdigest()[:16]


def _features() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def _all() -> dict[str, Build]:
    found = []
    for compiler in ("gcc", "clang"):
        for level, feature in LEVELS.items():
            march = f"-march={level}"
            found.append(Build(f"{compiler}-{level}", compiler, (march,), feature=feature))
            for kind in ("address", "undefined"):
                flags = (*SANITIZERS[kind], march)
                found.append(Build(f"{compiler}-{level}-{kind}", compiler, flags, feature=feature))
        # clang instruments accesses of up to 16 bytes for races
        found.append(Build(f"{compiler}-x86-64-thread", compiler, (*SANITIZERS["thread"], "-march=x86-64")))
    # needs no library of clang; detects offsets of null pointers, which gcc does not
    flags = (*SANITIZERS["undefined"], "-fsanitize-trap=all", "-march=x86-64")
    found.append(Build("clang-x86-64-trap-undefined", "clang", flags))
    arm, emulator = "aarch64-linux-gnu-gcc", ("qemu-aarch64",)
    found.append(Build("gcc-aarch64", arm, ("-static",), emulator))
    found.append(Build("gcc-aarch64-undefined", arm, ("-static", *SANITIZERS["undefined"]), emulator))
    # the one that is compiled soonest: only guard pages and red zones
    found.append(Build("quick", "gcc", ("-O1", "-march=x86-64")))
    return {each.name: each for each in found}


BUILDS = _all()
GROUPS = {
    "all": [name for name in BUILDS if name != "quick"],
    "plain": [name for name in BUILDS if name.count("-") and not name.endswith(tuple(SANITIZERS))],
    **{kind: [name for name in BUILDS if name.endswith(f"-{kind}")] for kind in SANITIZERS},
}
"""Names for several builds."""


def chosen(names: Sequence[str]) -> list[Build]:
    """Return the builds with these names, which may also be names of groups.

    Raises:
        KeyError: A build does not exist.
    """
    return [BUILDS[each] for name in names for each in GROUPS.get(name, [name])]


def environment() -> dict[str, str]:
    """Return the environment for a driver."""
    return {**os.environ, **ENVIRONMENT}
