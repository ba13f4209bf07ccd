"""Loading the model, and the start and end of the engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from streamchat.base.events.event import Event


@dataclass(frozen=True)
class ModelLoading(Event):
    """Progress of fetching, converting or loading the model."""

    stage: str
    """What is being done, in words: 'Fetching SmolLM2-135M-Instruct'."""
    done: int = 0
    """Bytes (or steps) done."""
    total: int = 0
    """Bytes (or steps) in all; 0 = not known."""
    unit: Literal["bytes", ""] = ""


@dataclass(frozen=True)
class ModelInfo:
    """What is loaded, for status displays."""

    name: str
    """As the user would type it or know it: 'SmolLM2-135M-Instruct', 'pythia-410m', a folder."""
    source: str
    """Where it was read from: a folder, a file or a Hub id."""
    device: str
    dtype: str
    parameters: int
    """Number of weights."""
    weight_bytes: int
    context_length: int
    """`max_position_embeddings`: what the model was trained to address."""
    cache_size: int
    num_sink_tokens: int
    pinned_tokens: int
    """Tokens of the system prompt beyond the sinks."""
    attention: str
    chat_format: str
    """'template' or 'plain'."""
    template_prompt: str = ""
    """What the chat template says and pins by itself when no system prompt is set."""
    weights: str = "native"
    """'native', or how new tokens are computed: with packed 'int8' or 'int4' weights."""

    @property
    def precision(self) -> str:
        """Number format and weights in words: 'bfloat16', 'bfloat16, int4 weights'."""
        return self.dtype if self.weights == "native" else f"{self.dtype}, {self.weights} weights"


@dataclass(frozen=True)
class ModelReady(Event):
    """The model answers from now on."""

    info: ModelInfo
    load_s: float


@dataclass(frozen=True)
class EngineFailed(Event):
    """The engine cannot go on (or never started). Nothing follows but `EngineClosed`."""

    title: str
    message: str
    """One sentence for the user."""
    exit_code: int
    details: str = ""
    """The traceback for a log file; never for the screen."""


@dataclass(frozen=True)
class EngineClosed(Event):
    """The last event of every engine."""
