"""Imports transformers and the code of one model without the parts that a chat does not use, which saves time.

A start spends most of its time on imports. Nothing here changes what transformers can do in this process: see
`deferred`, `marks` and `structure`. If transformers is imported already, or if anything goes wrong, the usual imports
happen.
"""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Any

from streamchat.models.light.deferred import PACKAGE, deferring
from streamchat.models.light.marks import postponed_marks
from streamchat.models.light.structure import remember_structure

_log = logging.getLogger(__name__)

DEFERRED = frozenset(
    {
        # tensors, checkpoints and models over several machines: 0.4 s, with sympy
        *("torch.distributed.tensor", "torch.distributed.tensor._utils", "torch.distributed.tensor.placement_types"),
        *("torch.distributed.checkpoint.hf_storage", "torch.distributed.fsdp", "torch.distributed._composable.fsdp"),
        *("transformers.distributed.tensor_parallel", "transformers.distributed.expert_parallel"),
        # masks while a model is compiled: 0.5 s
        "torch._dynamo._trace_wrapped_higher_order_op",
        # losses of models that find objects in images, if scipy is installed: 0.2 s
        "scipy.optimize",
    }
)
"""Modules of which transformers imports functions and classes that a chat does not use."""
REGISTRIES = {
    "transformers.distributed.parallel_utils.ALL_PARALLEL_STYLES": (
        "transformers.distributed.tensor_parallel",
        "transformers.distributed.expert_parallel",
    )
}
"""Objects that modules of `DEFERRED` add themselves to."""


def import_libraries(model_type: str) -> None:
    """Import transformers and what it needs for a causal language model of this type, such as `llama`.

    An unknown type is not an error: only the code for all models is imported.
    """
    if PACKAGE in sys.modules:
        return
    before = set(sys.modules)
    try:
        remember_structure()
        with postponed_marks(PACKAGE), deferring(DEFERRED, REGISTRIES):
            _import_model_code(model_type)
    except Exception:
        _log.warning("transformers could not be imported quickly, and is imported as usual", exc_info=True)
        for name in set(sys.modules) - before:
            if name.partition(".")[0] == PACKAGE:
                del sys.modules[name]
        import_module(PACKAGE)
    gc.freeze()  # modules live as long as the process: collections need not look at them


def _import_model_code(model_type: str) -> None:
    auto: Any = import_module(f"{PACKAGE}.models.auto")
    import_module(f"{PACKAGE}.modeling_utils")
    configs: Any = auto.CONFIG_MAPPING
    if model_type in configs:
        with suppress(KeyError):  # not a causal language model
            auto.MODEL_FOR_CAUSAL_LM_MAPPING[configs[model_type]]


@contextmanager
def collections_paused() -> Iterator[None]:
    """Pause garbage collection inside this block: imports make many objects, and hardly any garbage."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
