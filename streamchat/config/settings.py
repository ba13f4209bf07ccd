"""Every setting, declared once: type, default, legal range, help. Flags, environment, file and docs follow from it.

Nothing is read here; `streamchat.config.loader` finds the values and says where each came from.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, Literal

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Weights = Literal["auto", "native", "int8", "int4"]
Kernels = Literal["auto", "torch"]
Attention = Literal["sdpa", "eager"]
Format = Literal["auto", "template", "plain"]
Evict = Literal["turns", "tokens"]
OnFull = Literal["evict", "stop"]
Thinking = Literal["collapse", "show", "hide"]
Save = Literal["chats", "always", "never"]


@dataclass(frozen=True)
class Spec:
    """What is legal for one setting, and how it is explained."""

    section: str
    """Table of the configuration file it belongs to."""
    help: str
    needs_trust: bool
    """`./config.toml` may set it only after the user trusted that file: it opens a port, writes a file, chooses what is
    loaded, or decides what is saved. Without a default, so that each new setting is decided on."""
    minimum: float | None = None
    """Smallest legal number."""
    maximum: float | None = None
    """Largest legal number."""
    above_minimum: bool = False
    """The minimum itself is not legal."""
    below_maximum: bool = False
    """The maximum itself is not legal."""
    choices: tuple[str, ...] = ()
    forms: Mapping[str, str] = field(default_factory=dict)
    """Legal words beside the choices: how they are shown -> a regular expression for all of it."""
    metavar: str = ""
    live: bool = False
    """`/set` may change it during a chat."""

    def legal(self) -> str:
        """The legal values in words, for messages and comments."""
        if self.choices:
            return "one of " + ", ".join(self.words)
        parts = []
        if self.minimum is not None:
            parts.append(f"{'above' if self.above_minimum else 'at least'} {_number(self.minimum)}")
        if self.maximum is not None:
            parts.append(f"{'below' if self.below_maximum else 'at most'} {_number(self.maximum)}")
        return " and ".join(parts) or "any value"

    @property
    def words(self) -> tuple[str, ...]:
        """Choices and forms, for messages."""
        return *self.choices, *self.forms

    def allows(self, value: object) -> bool:
        """Whether `value` is one of the choices or has one of the forms; True where any value is legal."""
        if not self.choices or value in self.choices:
            return True
        return isinstance(value, str) and any(re.fullmatch(form, value, re.ASCII) for form in self.forms.values())


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def _setting(default: Any, section: str, help: str, *, needs_trust: bool, **spec: Any) -> Any:  # noqa: A002 - the word of argparse
    return field(default=default, metadata={"spec": Spec(section, help, needs_trust, **spec)})


@dataclass(frozen=True)
class Settings:
    """All settings of one run, checked. Sizes are in tokens."""

    model: str = _setting(
        "default",
        "model",
        "Model to load: 'default' (bundled SmolLM2-135M-Instruct), an alias such as pythia-410m "
        "(see `streamchat models`), a Hub id, a local folder or a .gguf file",
        metavar="NAME",
        needs_trust=True,
    )
    device: str = _setting(
        "auto",
        "model",
        "Where the model runs; auto takes cuda, then mps, then cpu, and of several GPUs the first that has room, or "
        "all of them for a model that fits on none; cuda:1 is one GPU by number, cuda:0,1 and cuda:all spread the "
        "model's layers over several",
        choices=("auto", "cpu", "cuda", "mps", "cuda:all"),
        forms={"cuda:N[,N]": r"cuda:\d{1,3}(,\d{1,3})*"},
        needs_trust=False,
    )
    dtype: Dtype = _setting(
        "auto",
        "model",
        "Number format of weights and cache; auto picks what is safe and fast on the device",
        choices=("auto", "float32", "bfloat16", "float16"),
        needs_trust=False,
    )
    weights: Weights = _setting(
        "auto",
        "model",
        "Weights that new tokens are computed with: the model's own, or in int8 or int4, which reads less memory (on a "
        "GPU by torchao); auto packs on a CPU, where that is measured to cost no more than 1 % of perplexity",
        choices=("auto", "native", "int8", "int4"),
        needs_trust=False,
    )
    kernels: Kernels = _setting(
        "auto",
        "model",
        "What computes new tokens on a CPU: auto compiles kernels for this very processor, once, where Linux and gcc "
        "are there, and takes PyTorch's elsewhere; torch takes PyTorch's always",
        choices=("auto", "torch"),
        needs_trust=False,
    )
    attention: Attention = _setting(
        "sdpa", "model", "Attention implementation of transformers", choices=("sdpa", "eager"), needs_trust=False
    )

    cache_size: int = _setting(
        1024,
        "cache",
        "Budget of the KV cache in tokens: sinks + pinned + recent window; no layer ever holds more",
        minimum=16,
        metavar="TOKENS",
        needs_trust=False,
    )
    compression_ratio: float = _setting(
        0.0,
        "cache",
        "Another way to give cache_size: max(num_sink_tokens + 10, context length x (1 - ratio)); 0 = not used",
        minimum=0.0,
        maximum=1.0,
        below_maximum=True,
        metavar="RATIO",
        needs_trust=False,
    )
    num_sink_tokens: int = _setting(
        4,
        "cache",
        "Attention sinks: the first tokens of the conversation, never evicted",
        minimum=0,
        metavar="TOKENS",
        needs_trust=False,
    )
    evict: Evict = _setting(
        "turns",
        "cache",
        "What leaves when the budget is full: the oldest whole turns, or the oldest tokens (the paper's rolling "
        "window)",
        choices=("turns", "tokens"),
        needs_trust=False,
    )
    on_full: OnFull = _setting(
        "evict",
        "cache",
        "What happens when the budget is reached: older text leaves, or the chat refuses to go on until /clear",
        choices=("evict", "stop"),
        needs_trust=False,
    )

    temperature: float = _setting(
        0.7,
        "generation",
        "Randomness of the reply; 0 always takes the likeliest token",
        minimum=0.0,
        maximum=10.0,
        live=True,
        needs_trust=False,
    )
    top_p: float = _setting(
        0.9,
        "generation",
        "Sample from the smallest set of tokens with this total probability; 1 = off",
        minimum=0.0,
        above_minimum=True,
        maximum=1.0,
        live=True,
        needs_trust=False,
    )
    top_k: int = _setting(
        0, "generation", "Sample from the k likeliest tokens; 0 = off", minimum=0, live=True, needs_trust=False
    )
    min_p: float = _setting(
        0.0,
        "generation",
        "Drop tokens less likely than this share of the likeliest one; 0 = off",
        minimum=0.0,
        maximum=1.0,
        live=True,
        needs_trust=False,
    )
    repetition_penalty: float = _setting(
        1.1,
        "generation",
        "Above 1 makes tokens of the latest 64 less likely to come again; 1 = off",
        minimum=0.0,
        above_minimum=True,
        maximum=10.0,
        live=True,
        needs_trust=False,
    )
    max_new_tokens: int = _setting(
        512,
        "generation",
        "A reply is cut off after this many tokens",
        minimum=1,
        metavar="TOKENS",
        live=True,
        needs_trust=False,
    )
    seed: int = _setting(
        -1,
        "generation",
        "Makes sampling repeatable; -1 = a new seed each start",
        minimum=-1,
        maximum=2**63 - 1,  # what torch takes
        live=True,
        needs_trust=False,
    )

    system_prompt: str = _setting(
        "",
        "chat",
        "Instructions that stay pinned in the cache; empty = what the model's own chat template says",
        metavar="TEXT",
        needs_trust=False,
    )
    chat_format: Format = _setting(
        "auto",
        "chat",
        "How turns are written for the model: its chat template, or plain 'User:' / 'Assistant:' lines; "
        "auto takes the template where the model has one",
        choices=("auto", "template", "plain"),
        needs_trust=False,
    )

    save: Save = _setting(
        "chats",
        "sessions",
        "Which conversations are saved, to be resumed and searched: of app and prompt, also of pipes, or none",
        choices=("chats", "always", "never"),
        needs_trust=True,
    )
    snapshot_turns: int = _setting(
        10,
        "sessions",
        "Save the cache itself after every so many turns, and when leaving, so that resuming reads nothing again; 0 = "
        "when leaving only",
        minimum=0,
        metavar="N",
        needs_trust=True,
    )

    plain: bool = _setting(False, "interface", "Line-based prompt instead of the full-screen app", needs_trust=False)
    theme: str = _setting(
        "textual-dark", "interface", "Colour theme of the full-screen app", metavar="NAME", needs_trust=False
    )
    thinking: Thinking = _setting(
        "collapse",
        "interface",
        "How a model's reasoning is displayed: as a line that can be opened, in full, or not at all",
        choices=("collapse", "show", "hide"),
        live=True,
        needs_trust=False,
    )
    history: bool = _setting(True, "interface", "Remember what you typed across restarts", needs_trust=True)
    metrics_port: int = _setting(
        0,
        "interface",
        "Serve figures for Prometheus at http://METRICS_HOST:PORT/metrics; 0 = off",
        minimum=0,
        maximum=65535,
        metavar="PORT",
        needs_trust=True,
    )
    metrics_host: str = _setting(
        "127.0.0.1",
        "interface",
        "Where the metrics are served; others than this machine see them elsewhere",
        metavar="HOST",
        needs_trust=True,
    )
    stats_json: str = _setting(
        "", "interface", "Append one JSON object a turn to this file; empty = off", metavar="FILE", needs_trust=True
    )


def setting_fields() -> dict[str, Field[Any]]:
    """The dataclass fields of `Settings` by name, in declaration order."""
    return {f.name: f for f in fields(Settings)}


def spec_of(name: str) -> Spec:
    """The `Spec` of the setting `name`. Raises KeyError for an unknown name."""
    spec = setting_fields()[name].metadata["spec"]
    assert isinstance(spec, Spec)
    return spec


def default_of(name: str) -> Any:
    """The default of the setting `name`."""
    default = setting_fields()[name].default
    assert default is not MISSING
    return default
