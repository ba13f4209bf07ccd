"""Writes the golden set of this version: files that every later version must read. Run it at each release.

    python -m tools.golden --write [--name NAME]

A set is a folder of `tests/golden`, named after the version; `tests/e2e/test_old_files.py` opens them all. It is laid
out like STREAMCHAT_HOME (database, snapshot, input history), with `config.toml`, the exports of a conversation, the
tiny random model of the conversation, a tiny GGUF file with its converted copy, and `expected.json`: what later
versions must find. A set never changes once it is committed: `tests/golden/digests.json` has the SHA-256 of its files.
Without --write, it compares the sets with those digests.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from streamchat import __version__
from streamchat.models.staging import MANIFEST
from tools.golden_sessions import write_sessions

FOLDER = Path(__file__).parents[1] / "tests" / "golden"
DIGESTS = "digests.json"
PROMPT = [5, 9, 40, 100, 77, 31, 8, 60]
"""Ids whose logits the converted model must give."""


def digest_of(folder: Path) -> str:
    """Return the SHA-256 of names and contents of all files in `folder`."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def digests(root: Path = FOLDER) -> dict[str, str]:
    """Return the digest of each set, by name."""
    found: dict[str, str] = json.loads((root / DIGESTS).read_text(encoding="utf-8"))
    return found


def logits_of(gguf: Path) -> list[float]:
    """Return the last logits of the model in a GGUF file after `PROMPT`, in float32."""
    import torch

    from streamchat.models.load import load_model

    model: Any = load_model(str(gguf), device="cpu", dtype="float32", weights="native", kernels="torch").model
    with torch.inference_mode():
        logits: list[float] = model(input_ids=torch.tensor([PROMPT]), use_cache=False).logits[0, -1].tolist()
    return logits


def write_models(folder: Path) -> dict[str, Any]:
    """Write a tiny GGUF file and its converted copy; return the logits that the model must give."""
    from tests.support.models_help import write_gguf
    from tools.random_gguf import Shape
    from tools.random_gguf import write as random_gguf

    folder.mkdir()
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = write_gguf(Path(scratch) / "tokenizer.gguf")
        random_gguf(folder / "tiny.gguf", Shape(64, 1, 4, 2, 64, context=512), "Q8_0", tokenizer, name="tiny")
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["STREAMCHAT_HOME"] = scratch
        logits = logits_of(folder / "tiny.gguf")
        shutil.copytree(Path(scratch) / "cache" / "models", folder / "models", ignore=shutil.ignore_patterns(".*"))
    [manifest] = (folder / "models").glob(f"*/{MANIFEST}")
    text = manifest.read_text(encoding="utf-8")  # it names the folder of the writing machine
    manifest.write_text(text.replace(json.dumps(str(folder))[1:-1], "/models"), encoding="utf-8")
    return {"gguf_logits": [round(value, 5) for value in logits]}


def write(root: Path, name: str) -> Path:
    """Write the set `name` of this version and its digest; return its folder.

    Raises:
        FileExistsError: The set exists already.
    """
    folder = root / name
    folder.mkdir(parents=True)
    try:
        expected = write_sessions(folder) | write_models(folder / "gguf")
        text = json.dumps(expected, indent=1, ensure_ascii=False) + "\n"
        (folder / "expected.json").write_text(text, encoding="utf-8")
    except BaseException:
        shutil.rmtree(folder)
        raise
    known = digests(root) if (root / DIGESTS).exists() else {}
    entries = json.dumps(known | {name: digest_of(folder)}, indent=1) + "\n"
    (root / DIGESTS).write_text(entries, encoding="utf-8")
    return folder


def check(root: Path = FOLDER) -> list[str]:
    """Return a sentence for each set that is missing, changed, or has no digest."""
    known, here = digests(root), {path.name for path in root.iterdir() if path.is_dir()}
    return [
        *(f"{name} is missing" for name in known if name not in here),
        *(f"{name} is not in {DIGESTS}" for name in sorted(here - set(known))),
        *(f"{name} was changed" for name in known if name in here and digest_of(root / name) != known[name]),
    ]


def main(argv: list[str] | None = None) -> int:
    """Write the set of this version, or check all."""
    parser = argparse.ArgumentParser(prog="python -m tools.golden", description=str(__doc__).splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the set of this version")
    parser.add_argument("--name", default=__version__, help="name of the set (default: the version)")
    args = parser.parse_args(argv)
    if args.write:
        if (FOLDER / args.name).exists():
            parser.error(f"{args.name} exists; golden sets are never written again, so give another --name")
        print(write(FOLDER, args.name))
        return 0
    problems = check()
    print("\n".join(problems) or f"{len(digests())} golden sets are as they were written")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
