"""Runs a target under atheris in a separate process, which libFuzzer ends when the time is over.

    python -m tools.fuzz.guided TARGET FOLDER MODULES [OPTIONS OF LIBFUZZER ...] [CORPUS ...]

MODULES are the target's modules, separated by commas, which must be known before they are imported. Every new fault is
minimized and written to FOLDER, and the search continues.
"""

from __future__ import annotations

import hashlib
import logging
import random
import sys
from pathlib import Path

import atheris

from tools.fuzz.check import find_fault
from tools.fuzz.json_mutate import mutate_json
from tools.fuzz.minimize import minimized
from tools.fuzz.mutate import JSON_SHARE
from tools.fuzz.target import load_target
from tools.fuzz.workplace import workplace


def main() -> None:
    """Run the target until libFuzzer ends the process."""
    name, folder, modules, *options = sys.argv[1:]
    out = Path(folder).absolute()
    options = [option if option.startswith("-") else str(Path(option).absolute()) for option in options]
    sys.argv = [sys.argv[0], *options]
    logging.disable()
    with workplace():
        with atheris.instrument_imports(include=modules.split(",")):
            target = load_target(name)
            for data in target.corpus():  # imports that are deferred
                find_fault(target, data)
        known: set[tuple[str, str]] = set()

        def test_one(data: bytes) -> None:
            fault = find_fault(target, data)
            if fault is None or fault.identity in known:
                return
            known.add(fault.identity)
            small = minimized(target, data, fault)
            key = hashlib.sha256(small).hexdigest()[:12]
            (out / f"fault-{key}").write_bytes(small)
            (out / f"fault-{key}.txt").write_text(f"{fault}\n", encoding="utf-8", errors="backslashreplace")

        def mutate(data: bytes, max_size: int, seed: int) -> bytes:
            rng = random.Random(seed)
            changed = mutate_json(rng, data) if rng.random() < JSON_SHARE else None
            mutated: bytes = atheris.Mutate(data, max_size) if changed is None else changed[:max_size]
            return mutated

        atheris.Setup(sys.argv, test_one, custom_mutator=mutate)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
