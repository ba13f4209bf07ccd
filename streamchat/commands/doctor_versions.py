"""Versions of the packages: those of the installation, and whether streamchat supports them."""

from __future__ import annotations

import platform
import tomllib
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import streamchat
from streamchat import __version__

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "gguf",
    "huggingface-hub",
    "textual",
    "prompt-toolkit",
)
OPTIONAL = {
    "matplotlib": "plots of reports",
    "textual-serve": "web",
    "starlette": "serve",
    "uvicorn": "serve",
    "greenlet": "serve",
    "websockets": "attach",
    "agent-client-protocol": "acp",
    "peft": "--adapter",
    "torchao": "int8 and int4 weights on a GPU without fused kernels",
    "accelerate": "models sharded over several GPUs",
    "ray": "sweep --ray",
    "llama-cpp-python": "bench --peers",
}


def versions(problems: list[str]) -> dict[str, Any]:
    """Return the rows of the versions; appends a sentence to `problems` for each package missing or unsupported."""
    rows: dict[str, Any] = {
        "streamchat": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }
    folder = _checkout()
    if folder is not None:
        rows["installation"] = f"none: runs from {folder}; pip install -e {folder} installs it"
    for package in (*PACKAGES, *OPTIONAL):
        try:
            rows[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            rows[package] = f"not installed (for {OPTIONAL[package]})" if package in OPTIONAL else "not installed"
            if package not in OPTIONAL:
                problems.append(f"{package} is not installed; {remedy()}")
    problems += _unsupported_versions(_requirements(folder))
    return rows


def _checkout() -> Path | None:
    """Return the folder that streamchat runs from if it is not installed."""
    try:
        metadata.distribution("streamchat")
    except metadata.PackageNotFoundError:
        return Path(streamchat.__file__).parents[1]
    return None


def remedy() -> str:
    """Say how to install what is missing."""
    folder = _checkout()
    return "install streamchat again with pip" if folder is None else f"pip install -e {folder} installs it"


def _requirements(folder: Path | None) -> list[str]:
    """Return the requirements of streamchat; those of a checkout are in its pyproject.toml."""
    if folder is None:
        return metadata.requires("streamchat") or []
    project = folder / "pyproject.toml"
    if not project.is_file():
        return []
    found: list[str] = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"]
    return found


def _unsupported_versions(requirements: Sequence[str]) -> list[str]:
    """Return a problem for each package whose version is outside the range in `requirements`."""
    from packaging.requirements import Requirement

    wrong = []
    for line in requirements:
        wanted = Requirement(line)
        if wanted.name not in PACKAGES or (wanted.marker is not None and not wanted.marker.evaluate()):
            continue
        try:
            found = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            continue  # reported above
        if not wanted.specifier.contains(found, prereleases=True):
            wrong.append(f"{wanted.name} {found} is installed, but streamchat needs {wanted.specifier}")
    return wrong
