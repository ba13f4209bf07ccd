"""Conversion of a GGUF file to a folder that loads fast: float32 safetensors, config, tokenizer, chat template.

transformers maps tensor names and layouts, but its GGUF loader needs accelerate, shows a progress bar, cannot be
canceled, and its result cannot be saved (`save_pretrained` refuses). So the tensors are read here one by one.
"""

from __future__ import annotations

import errno
import hashlib
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from streamchat.base.errors import ModelNotFoundError, UnsupportedModelError, refuse
from streamchat.base.formatting import human_bytes
from streamchat.base.progress import Progress, silent
from streamchat.models.contents import file_digest
from streamchat.models.gguf.file import open_gguf, read_config
from streamchat.models.gguf.tokenizer import USE_OTHER_FORMAT, build_tokenizer, tokenizer_notes
from streamchat.models.limits import available_memory
from streamchat.models.quiet import quiet
from streamchat.models.staging import check_space, ensure, models_dir

CONVERTER = 1
"""Version of the conversion; increment it when the result changes, so that older copies are converted again."""
HEAD_AND_TAIL = 1 << 20
"""Bytes at each end of the file from which an older version derived the names of copies."""


def convert(path: Path, folder: Path, *, name: str, progress: Progress) -> dict[str, Any]:
    """Convert the GGUF file `path` into the empty `folder`, with weights in float32 (exact).

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
        weight_bytes = 4 * sum(int(tensor.n_elements) for tensor in reader.tensors)
        _check_memory(path, weight_bytes)
        check_space(folder, weight_bytes, name)
        with refuse(f"{path} cannot be read", USE_OTHER_FORMAT):
            config = read_config(path, reader, metadata)
            tokenizer = build_tokenizer(path, metadata)
        tokenizer.save_pretrained(str(folder))
        model = _fill(path, reader, metadata, config, stage, progress)
        progress(f"Saving {name}", 0, 0, "")
        _save(model, folder)
        notes = tokenizer_notes(path, metadata)
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
    with suppress(OSError):
        shutil.rmtree(_legacy_copy(path))
    return made


def copy_folder(path: Path, *, progress: Progress = silent) -> Path:
    """Return the folder of the converted copy of `path`, which may not exist yet.

    Raises:
        ModelNotFoundError: The file cannot be read.
    """
    contents = file_digest(path, name=path.stem, progress=progress)
    digest = hashlib.sha256(f"{CONVERTER} {contents}".encode())
    return models_dir() / f"{path.stem[:60]}-{digest.hexdigest()[:12]}"


def _legacy_copy(path: Path) -> Path:
    """Return the obsolete copy of an older version, which was named after the size, head and tail of the file."""
    size = path.stat().st_size
    digest = hashlib.sha256(f"1 {size}".encode())
    with path.open("rb") as file:
        digest.update(file.read(HEAD_AND_TAIL))
        file.seek(max(0, size - HEAD_AND_TAIL))
        digest.update(file.read())
    return models_dir() / f"{path.stem[:60]}-{digest.hexdigest()[:12]}"


def _save(model: Any, folder: Path) -> None:
    try:
        model.save_pretrained(str(folder))
    except Exception as error:
        # safetensors reports a full disk with its own error type
        if "os error 28" in str(error):
            raise OSError(errno.ENOSPC, "No space left on device") from error
        raise


def _check_memory(path: Path, weight_bytes: int) -> None:
    available = available_memory()
    if weight_bytes * 1.1 > available:
        raise ModelNotFoundError(
            f"Converting {path} takes {human_bytes(weight_bytes * 1.1)} of memory and {human_bytes(available)} are "
            "available; close other programs or choose a smaller model"
        )


def _fill(path: Path, reader: Any, metadata: dict[str, Any], config: Any, stage: str, progress: Progress) -> Any:
    """Build the model of `config` with the weights of the file."""
    import gguf
    import torch
    from transformers import AutoModelForCausalLM, modeling_gguf_pytorch_utils

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
        names: dict[str, str] = library.get_gguf_hf_weights_map(model, processor)
    weights: dict[str, Any] = {}
    for done, tensor in enumerate(reader.tensors):
        progress(stage, done, len(reader.tensors), "")
        with refuse(f"{path}: {tensor.name} cannot be read", USE_OTHER_FORMAT):
            # processors of mixture-of-experts models write into `tensors` directly and return no name
            read = processor.process(
                weights=gguf.dequantize(tensor.data, tensor.tensor_type),
                name=tensor.name,
                tensor_key_mapping=names,
                parsed_parameters={"tensors": weights},
            )
        if read.name in names:
            weights[names[read.name]] = torch.from_numpy(read.weights.copy()).float()
    with refuse(f"{path} has weights that do not match its metadata", USE_OTHER_FORMAT):
        result = model.load_state_dict(weights, assign=True, strict=False)
        model.tie_weights()
    missing = [key for key in result.missing_keys if model.get_parameter(key).is_meta]
    if missing:
        raise UnsupportedModelError(
            f"{path} lacks {len(missing)} of the model's weights ({missing[0]} is the first), so its output would be "
            f"nonsense; {USE_OTHER_FORMAT}"
        )
    return model
