"""The config and the index of a folder with a model."""

from __future__ import annotations

from pathlib import Path

from streamchat.models.folder import check_kind, check_sizes, read_config, shard_names
from tools.fuzz.target import Target


def run(data: bytes) -> None:
    """Read the input as config.json, and as the index of the weights."""
    folder = Path("model")
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes(data)
    config = read_config(folder)
    check_kind(config, str(folder))
    check_sizes(config, [(64, 64)], str(folder))
    assert shard_names(folder / "config.json")


def seeds() -> dict[str, bytes]:
    """A config, and an index."""
    return {
        "config": b'{"architectures": ["LlamaForCausalLM"], "model_type": "a", "hidden_size": 8, "text_config": {}}',
        "index": b'{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}',
        "encoder": b'{"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": true}',
    }


TARGET = Target(
    "model_config",
    run,
    seeds,
    ("streamchat.models.folder",),
    words=(b'"num_hidden_layers"', b"null", b"[]", b"{}", b"1e400", b'"vocab_size"', b"\\u001b[2J", b'"../x"', b"NaN"),
    suite_runs=300,
)
