"""Events of loading the model and of the engine's start and end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from streamchat.base.events.event import Event


@dataclass(frozen=True)
class ModelLoading(Event):
    """Progress of fetching, converting or loading the model."""

    stage: str
    """Current step, as text: 'Fetching SmolLM2-135M-Instruct'."""
    done: int = 0
    """Bytes (or steps) done."""
    total: int = 0
    """Total bytes (or steps); 0 = unknown."""
    unit: Literal["bytes", ""] = ""


@dataclass(frozen=True)
class ModelFetching(Event):
    """Progress of fetching a model while the chat continues with another one."""

    name: str
    """As in `FetchModel`."""
    stage: str
    """Current step, as text: 'Fetching EleutherAI/pythia-410m'."""
    done: int = 0
    """Bytes (or steps) done."""
    total: int = 0
    """Total bytes (or steps); 0 = unknown."""
    unit: Literal["bytes", ""] = ""


@dataclass(frozen=True)
class ModelFetched(Event):
    """The fetch of a model has ended: the model can be loaded, or the fetch failed or was canceled."""

    name: str
    """As in `FetchModel`."""
    error: str = ""
    """Why it failed, as a sentence without a period; '' if it did not."""
    canceled: bool = False


@dataclass(frozen=True)
class ModelInfo:
    """The loaded model, for status displays."""

    name: str
    """Display name: 'SmolLM2-135M-Instruct', 'pythia-410m', a folder."""
    source: str
    """The folder, file or Hub id it was loaded from."""
    device: str
    dtype: str
    parameters: int
    """Number of weights."""
    weight_bytes: int
    context_length: int
    """`max_position_embeddings`: the context length the model was trained with."""
    cache_size: int
    num_sink_tokens: int
    pinned_tokens: int
    """Tokens of the system prompt beyond the sinks."""
    attention: str
    chat_format: str
    """'template' or 'plain'."""
    template_prompt: str = ""
    """The system prompt that the chat template inserts by itself if none is set; it is pinned."""
    weights: str = "native"
    """Weights for decoding: 'native', or quantized to 'int8' or 'int4'."""
    cache_dtype: str = ""
    """Dtype of cached keys and values, also 'int8', 'k8v4', or 'int4'; '' for that of the model."""
    decode_step: str = ""
    """What computes new tokens: 'compiled kernels', 'PyTorch operations', 'fused kernels', 'captured graph' or
    'transformers'; '' in events of earlier versions."""
    decode_reason: str = ""
    """Why a faster step does not run; '' if there is none."""

    template_reads: tuple[str, ...] = ()
    """The arguments that the chat template reads besides the messages."""
    template_defaults: str = "{}"
    """Values that the catalogue has for some of them, as a JSON object."""
    thinks: bool = False
    """Whether the template asks for reasoning if its switch is not given."""

    @property
    def precision(self) -> str:
        """Dtype, weights and cache, for display: 'bfloat16', 'float32, int4 weights, bfloat16 cache'."""
        cache = f", {self.cache_dtype} cache" if self.cache_dtype not in ("", self.dtype) else ""
        return self.compute_precision + cache

    @property
    def compute_precision(self) -> str:
        """Dtype and weights without the cache: 'float32, int4 weights'."""
        return self.dtype if self.weights == "native" else f"{self.dtype}, {self.weights} weights"


@dataclass(frozen=True)
class ModelReady(Event):
    """The model is loaded and ready for messages."""

    info: ModelInfo
    load_s: float


@dataclass(frozen=True)
class EngineFailed(Event):
    """The engine failed or could not start. Only `EngineClosed` follows."""

    title: str
    message: str
    """One sentence for the user."""
    exit_code: int
    details: str = ""
    """The traceback, for the log file only."""


@dataclass(frozen=True)
class EngineClosed(Event):
    """The last event of every engine."""
