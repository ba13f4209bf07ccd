"""`streamchat bench --gpu` on the stand-in for a GPU: `python -m tests.support.stand_in_program bench --gpu ...`.

A CPU with recorded operations, in the command and in the process that measures; the named shapes are tiny.
"""

from __future__ import annotations

import functools
import os
import sys
from typing import Any

from transformers import GPTNeoXConfig, LlamaConfig, PreTrainedConfig

from streamchat.benchmarks.gpu import command, measure, shapes, worker
from streamchat.cli import main as cli
from streamchat.decode.install import install_captured
from tests.support.recorded_graphs import RecordedGraphs

WORKER = ("-m", "tests.support.stand_in_program", "--worker")
FAULT = "STREAMCHAT_TEST_FAULT"
"""Environment variable that breaks one kind of step: `KIND=exit`, `KIND=hang`, `KIND=device` or `KIND=error`."""


def tiny_config(name: str) -> PreTrainedConfig:
    """A configuration of the same class as that of the shape."""
    sizes: dict[str, Any] = {
        "vocab_size": 160,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 4096,
    }
    return GPTNeoXConfig(**sizes) if name == "410M" else LlamaConfig(**sizes, num_key_value_heads=2)


def install_here(model: Any, kernels: Any, decode: str) -> bool:
    """What `install` does on CUDA, with recorded operations; or the fault of the environment."""
    kind, _, fault = os.environ.get(FAULT, "").partition("=")
    if kind == decode:
        _break(fault)
    setting: Any = decode
    return install_captured(model, RecordedGraphs().record, setting)


def _break(fault: str) -> None:
    if fault == "exit":
        sys.stderr.write("the driver is gone\n")
        os._exit(9)
    while fault == "hang":
        os.read(0, 1)
        os.kill(os.getpid(), 19)  # SIGSTOP
    raise RuntimeError("CUDA error: an illegal memory access was encountered" if fault == "device" else "a bad kernel")


def main(arguments: list[str]) -> int:
    """Run the command, or its worker."""
    for name in shapes.SHAPES:
        shapes.SHAPES[name] = (f"tiny {name}", functools.partial(tiny_config, name))
    setattr(measure, "install", install_here)  # noqa: B010 - for mypy
    setattr(worker, "COPIED", 1 << 20)  # noqa: B010
    if arguments[0] == "--worker":
        return worker.main()
    command.cuda_device = lambda device: "cpu"
    command.WORKER = WORKER  # type: ignore[assignment]
    return int(cli.main(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
