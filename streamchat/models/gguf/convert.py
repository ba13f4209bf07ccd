"""Conversion of a GGUF file to a folder that loads fast: weights, config, tokenizer, chat template.

Quantized matrices keep their codes, in the layout of the compiled kernels. transformers maps tensor names and layouts,
but its GGUF loader dequantizes everything, needs accelerate, shows a progress bar, cannot be canceled, and its result
cannot be saved (`save_pretrained` refuses). So the tensors are read here one by one.
"""

from __future__ import annotations

import errno
import hashlib
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamchat.base.errors import ModelError, ModelNotFoundError, UnsupportedModelError, refuse
from streamchat.base.formatting import human_bytes
from streamchat.base.progress import Progress, silent
from streamchat.models.contents import file_digest
from streamchat.models.folder import TILES
from streamchat.models.gguf.file import open_gguf, read_config
from streamchat.models.gguf.tokenizer import USE_OTHER_FORMAT, build_tokenizer, tokenizer_notes
from streamchat.models.limits import available_memory
from streamchat.models.quiet import quiet
from streamchat.models.staging import check_space, ensure, models_dir

if TYPE_CHECKING:
    from streamchat.models.gguf.tiles import GgufWeights

CONVERTER = 2
"""Version of the conversion; increment it when the result changes, so that older copies are converted again."""
HEAD_AND_TAIL = 1 << 20
"""Bytes at each end of the file from which an older version derived the names of copies."""


def convert(path: Path, folder: Path, *, name: str, progress: Progress) -> dict[str, Any]:
    """Convert the GGUF file `path` into the empty `folder`.

    Quantized matrices become tiles with the same values. Mixtures of experts, and files without quantized matrices,
    become a folder of transformers, with weights in float32 (exact).

    Returns:
        The contents of the folder's manifest.

    Raises:
        ModelNotFoundError: The file is not readable, or there is too little memory.
        UnsupportedModelError: transformers cannot read this architecture or tokenizer.
    """
    stage = f"Converting {name} (once)"
    progress(stage, 0, 0, "")
    with quiet():
        reader, metadata = open_gguf(path)
        with refuse(f"{path} cannot be read", USE_OTHER_FORMAT):
            config = read_config(path, reader, metadata)
        weights = _weights_of(path, reader, metadata, config)
        memory, disk = weights.need()
        _check_memory(path, int(memory * 1.1))
        check_space(folder, disk, name)
        with refuse(f"{path} cannot be read", USE_OTHER_FORMAT):
            tokenizer = build_tokenizer(path, metadata, reader)
        with _full_disk_as_os_error():
            tokenizer.save_pretrained(str(folder))
            write = _write_tiles if weights.has_tiles() else _write_native
            write(path, weights, folder, stage, progress)
        notes = [*tokenizer_notes(path, metadata), *_weight_notes(path, weights)]
    size = path.stat().st_size
    return {"name": name, "source": str(path), "converter": CONVERTER, "gguf_bytes": size, "notes": notes}


def converted_copy(path: Path, *, progress: Progress) -> Path:
    """Return the converted copy of a GGUF file in the user's cache; convert it on first use.

    The copy is identified by every byte of the file, so a moved file keeps its copy. Never writes to the file's folder.

    Raises:
        ModelNotFoundError, UnsupportedModelError: See `convert`.
    """
    target = copy_folder(path, progress=progress)
    made = ensure(
        target,
        lambda folder: convert(path, folder, name=path.stem, progress=progress),
        what=path.name,
        progress=progress,
    )
    for older in older_copies(path):
        with suppress(OSError):
            shutil.rmtree(older)
    return made


def copy_folder(path: Path, *, progress: Progress = silent) -> Path:
    """Return the folder of the converted copy of `path`, which may not exist yet.

    Raises:
        ModelNotFoundError: The file cannot be read.
    """
    return _copy_folder(path, CONVERTER, progress)


def _copy_folder(path: Path, version: int, progress: Progress = silent) -> Path:
    contents = file_digest(path, name=path.stem, progress=progress)
    digest = hashlib.sha256(f"{version} {contents}".encode())
    return models_dir() / f"{path.stem[:60]}-{digest.hexdigest()[:12]}"


def older_copies(path: Path) -> list[Path]:
    """Return the folders in which older versions kept their copies of `path`, whether they exist or not."""
    return [_first_copy(path), *(_copy_folder(path, version) for version in range(1, CONVERTER))]


def _first_copy(path: Path) -> Path:
    """Return the copy of the oldest version, which was named after the size, head and tail of the file."""
    size = path.stat().st_size
    digest = hashlib.sha256(f"1 {size}".encode())
    with path.open("rb") as file:
        digest.update(file.read(HEAD_AND_TAIL))
        file.seek(max(0, size - HEAD_AND_TAIL))
        digest.update(file.read())
    return models_dir() / f"{path.stem[:60]}-{digest.hexdigest()[:12]}"


def _check_memory(path: Path, need: int) -> None:
    available = available_memory()
    if need > available:
        raise ModelNotFoundError(
            f"Converting {path} takes {human_bytes(need)} of memory and {human_bytes(available)} are "
            "available; close other programs or choose a smaller model"
        )


def _weights_of(path: Path, reader: Any, metadata: dict[str, Any], config: Any) -> GgufWeights:
    """Return what reads the weights of the file for the model of `config`."""
    import torch
    from transformers import AutoModelForCausalLM, modeling_gguf_pytorch_utils

    from streamchat.models.gguf.reader import shared
    from streamchat.models.gguf.tiles import GgufWeights

    architecture = str(metadata["general.architecture"])
    library: Any = modeling_gguf_pytorch_utils
    causal_lm: Any = AutoModelForCausalLM
    if type(config) not in causal_lm._model_mapping:
        raise UnsupportedModelError(
            f"{path} is a {architecture!r} model, which does not generate text; choose a causal language model"
        )
    with refuse(f"{path} describes a model that cannot be built", USE_OTHER_FORMAT):
        with torch.device("meta"):
            model = causal_lm.from_config(config, dtype=torch.float32)
        processor = library.TENSOR_PROCESSORS.get(architecture, library.TensorProcessor)(config=config.to_dict())
        with shared(reader):
            names: dict[str, str] = library.get_gguf_hf_weights_map(model, processor)
    return GgufWeights(reader.tensors, model, processor, names)


def _weight_notes(path: Path, weights: GgufWeights) -> list[str]:
    """Return a note that names the types of the file that are not kept."""
    if not weights.requantized:
        return []
    kinds = " and ".join(sorted(weights.requantized))
    return [
        f"{path.name} has weights in {kinds}, which streamchat does not use directly; they were quantized again to int8"
    ]


@contextmanager
def _full_disk_as_os_error() -> Iterator[None]:
    """Turn what safetensors and tokenizers raise when the disk is full, errors of their own, into an OSError."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, ModelError | OSError) and "os error 28" in str(error):
            raise OSError(errno.ENOSPC, "No space left on device") from error
        raise


def _write_tiles(path: Path, weights: GgufWeights, folder: Path, stage: str, progress: Progress) -> None:
    """Write tiles, config and generation config."""
    from streamchat.models.tile_file import TileWriter

    written: set[str] = set()
    own = weights.model.state_dict()
    with TileWriter(folder / TILES, len(weights.model.state_dict())) as file:
        for done, tensor in enumerate(weights.tensors):
            progress(stage, done, len(weights.tensors), "")
            with refuse(f"{path}: {tensor.name} cannot be read", USE_OTHER_FORMAT):
                parts = list(weights.read(tensor))
            for name, part, coded in parts:
                _check_shape(path, name, tuple(part.shape) if coded is None else coded.shape, own)
                file.add(name, part, coded)  # outside: a full disk says nothing about the file
                written.add(name)
    model = weights.model
    model.tie_weights()
    tied = {id(weight) for name, weight in model.named_parameters(remove_duplicate=False) if name in written}
    _check_complete(path, [name for name, weight in model.named_parameters() if id(weight) not in tied])
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(str(folder))
    if model.generation_config is not None:
        model.generation_config.save_pretrained(str(folder))


def _write_native(path: Path, weights: GgufWeights, folder: Path, stage: str, progress: Progress) -> None:
    """Write a folder with float32 weights, as transformers saves it."""
    model = weights.model
    numbers: dict[str, Any] = {}
    for done, tensor in enumerate(weights.tensors):
        progress(stage, done, len(weights.tensors), "")
        with refuse(f"{path}: {tensor.name} cannot be read", USE_OTHER_FORMAT):
            weights.add_numbers(tensor, numbers)
    with refuse(f"{path} has weights that do not match its metadata", USE_OTHER_FORMAT):
        result = model.load_state_dict(
            {name: each.float() for name, each in numbers.items()}, assign=True, strict=False
        )
        model.tie_weights()
    _check_complete(path, [key for key in result.missing_keys if model.get_parameter(key).is_meta])
    model.save_pretrained(str(folder))


def _check_shape(path: Path, name: str, shape: tuple[int, ...], own: Mapping[str, Any]) -> None:
    if name in own and tuple(own[name].shape) != shape:
        raise UnsupportedModelError(
            f"{path} has weights that do not match its metadata ({name} is {shape} and not {tuple(own[name].shape)}); "
            f"{USE_OTHER_FORMAT}"
        )


def _check_complete(path: Path, missing: list[str]) -> None:
    if missing:
        raise UnsupportedModelError(
            f"{path} lacks {len(missing)} of the model's weights ({missing[0]} is the first), so its output would be "
            f"nonsense; {USE_OTHER_FORMAT}"
        )
