"""The settings, declared once: type, default, legal range, help. Flags, environment, files and docs derive from them.

`streamchat.config.loader` loads the values and records their origins.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, Literal, get_args

from streamchat.base.eviction_policies import DEFAULT_POLICY, POLICIES, RENAMED_POLICIES, describe_policies
from streamchat.config.template_args import NONE

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Weights = Literal["auto", "native", "int8", "int4"]
Kernels = Literal["auto", "torch"]
KvDtype = Literal["auto", "native", "int8", "k8v4", "int4"]
Decode = Literal["auto", "fused", "graph", "plain"]
Attention = Literal["sdpa", "eager"]
Format = Literal["auto", "template", "plain"]
OnFull = Literal["evict", "stop"]
AutoRecall = Literal["off", "suggest", "on"]
Speculation = Literal["auto", "off"]
LoopGuard = Literal["auto", "on", "off"]
Thinking = Literal["collapse", "show", "hide"]
Notify = Literal["auto", "bell", "off"]
Save = Literal["chats", "always", "never"]
Archive = Literal["native", "int8", "off"]


@dataclass(frozen=True)
class Spec:
    """Legal values and help of one setting."""

    section: str
    """Table of the configuration file it belongs to."""
    help: str
    needs_trust: bool
    """`./config.toml` may set it only if the user trusts that file: it opens a port, writes a file, or chooses what is
    loaded or saved. No default, so that it is decided for each new setting."""
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
    """Legal patterns besides the choices: display form -> regular expression for the full value."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Choices of earlier versions -> their names today; files, sessions and scripts may still have the old ones."""
    metavar: str = ""
    joined_by: str = ""
    """Separator of several values in the text; the flag can then be repeated. '' if there is only one value."""
    live: bool = False
    """Whether `/set` may change it during a chat."""
    is_table: bool = False
    """The value is the text of a JSON object, and sources are merged by name; see `streamchat.config.template_args`."""
    flag: str = ""
    """The flag on the command line, if it is not the name of the setting."""
    by_model: bool = False
    """Whether a value that the model's makers advise replaces the default."""

    def legal(self) -> str:
        """Describe the legal values, for messages and comments."""
        if self.choices:
            return "one of " + ", ".join(self.words)
        if self.is_table:
            return "a table of names and values"
        parts = []
        if self.minimum is not None:
            parts.append(f"{'above' if self.above_minimum else 'at least'} {_number(self.minimum)}")
        if self.maximum is not None:
            parts.append(f"{'below' if self.below_maximum else 'at most'} {_number(self.maximum)}")
        return " and ".join(parts) or "any value"

    @property
    def words(self) -> tuple[str, ...]:
        """Choices and pattern forms, for messages."""
        return *self.choices, *self.forms

    def allows(self, value: object) -> bool:
        """Whether `value` is one of the choices or matches one of the forms; True if there are no choices."""
        if not self.choices or value in self.choices:
            return True
        return isinstance(value, str) and any(re.fullmatch(form, value, re.ASCII) for form in self.forms.values())


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


@dataclass(frozen=True)
class _Table:
    """Declares the settings of one table of the configuration file.

    There are two methods, so that trust is decided for each new setting.
    """

    name: str

    def harmless(self, default: Any, help: str, **spec: Any) -> Any:  # noqa: A002 - argparse's name
        """Declare a setting that any `./config.toml` may set."""
        return field(default=default, metadata={"spec": Spec(self.name, help, needs_trust=False, **spec)})

    def sensitive(self, default: Any, help: str, **spec: Any) -> Any:  # noqa: A002
        """Declare a setting that needs trust."""
        return field(default=default, metadata={"spec": Spec(self.name, help, needs_trust=True, **spec)})


_MODEL, _CACHE, _GENERATION = _Table("model"), _Table("cache"), _Table("generation")
_CHAT, _SESSIONS, _INTERFACE = _Table("chat"), _Table("sessions"), _Table("interface")


@dataclass(frozen=True)
class Settings:
    """All settings of a run, checked. Sizes are in tokens."""

    model: str = _MODEL.sensitive(
        "default",
        "Model to load: 'default' (SmolLM2-135M-Instruct), an alias such as pythia-410m (see `streamchat models`), a "
        "Hub id, a GGUF file of the Hub (owner/repo:Q4_K_M), a local folder or a .gguf file",
        metavar="NAME",
    )
    adapter: str = _MODEL.sensitive(
        "",
        "Folder of a LoRA adapter (as peft saves it) to merge into the model when it is loaded; repeat the flag, or "
        "separate folders as in PATH, for several",
        metavar="FOLDER",
        joined_by=os.pathsep,
    )
    device: str = _MODEL.harmless(
        "auto",
        "Device for the model; auto tries cuda (the first GPU with enough memory, or all if none has), then mps, then "
        "cpu; cuda:1 is one GPU, cuda:0,1 and cuda:all shard the layers over several",
        choices=("auto", "cpu", "cuda", "mps", "cuda:all"),
        forms={"cuda:N[,N]": r"cuda:\d{1,3}(,\d{1,3})*"},
    )
    dtype: Dtype = _MODEL.harmless(
        "auto",
        "Dtype of weights and cache; auto picks a safe and fast one for the device: on a CPU without bfloat16 "
        "arithmetic, float32 weights and, with compiled kernels, a bfloat16 cache",
        choices=get_args(Dtype),
    )
    weights: Weights = _MODEL.harmless(
        "auto",
        "Weight precision for decoding: native, int8 or int4; on a CPU, auto keeps the codes of a "
        "GGUF file and quantizes other weights if measured perplexity rises by at most 1 %",
        choices=get_args(Weights),
    )
    kernels: Kernels = _MODEL.harmless(
        "auto",
        "CPU decode kernels: auto compiles kernels once (Linux or macOS, gcc or clang), else uses PyTorch's; "
        "torch always uses PyTorch's",
        choices=get_args(Kernels),
    )
    decode: Decode = _MODEL.harmless(
        "auto",
        "Step that computes new tokens: auto (the fastest for the model), fused (fused kernels; on a CPU, compiled "
        "ones), graph (PyTorch operations; on a GPU, a captured step), or plain (transformers). If the model does not "
        "support one, the next is used",
        choices=get_args(Decode),
    )
    attention: Attention = _MODEL.harmless(
        "sdpa", "Attention implementation in transformers", choices=get_args(Attention)
    )

    cache_size: int = _CACHE.harmless(
        1024,
        "Budget of the KV cache in tokens: sinks + pinned + recent window; no layer ever exceeds it",
        minimum=16,
        metavar="TOKENS",
    )
    kv_dtype: KvDtype = _CACHE.harmless(
        "auto",
        "How cached keys and values are stored: native (as dtype says), int8, k8v4 (keys in int8, values in int4), or "
        "int4; auto chooses int8 if a measurement shows that it costs at most 0.1 % of perplexity and is not slower",
        choices=get_args(KvDtype),
    )
    compression_ratio: float = _CACHE.harmless(
        0.0,
        "Set cache_size to max(num_sink_tokens + 10, context length x (1 - ratio)); 0 = off",
        minimum=0.0,
        maximum=1.0,
        below_maximum=True,
        metavar="RATIO",
    )
    num_sink_tokens: int = _CACHE.harmless(
        4, "Attention sinks: the first tokens of the conversation, never evicted", minimum=0, metavar="TOKENS"
    )
    evict: str = _CACHE.harmless(
        DEFAULT_POLICY,
        f"Eviction policy when the budget is full: {describe_policies()}",
        choices=tuple(POLICIES),
        renamed=RENAMED_POLICIES,
    )
    on_full: OnFull = _CACHE.harmless(
        "evict",
        "When the budget is full: evict older text, or stop accepting messages until /clear",
        choices=get_args(OnFull),
    )
    auto_recall: AutoRecall = _CACHE.harmless(
        "on",
        "Recall of evicted turns that match a message: on puts them back in context for the reply, suggest names "
        "them, off does nothing",
        choices=get_args(AutoRecall),
        live=True,
    )
    recall_share: float = _CACHE.harmless(
        0.25,
        "Maximum share of the cache budget that auto_recall fills with evicted turns",
        minimum=0.0,
        above_minimum=True,
        maximum=0.5,
        metavar="SHARE",
        live=True,
    )

    temperature: float = _GENERATION.harmless(
        0.7,
        "Sampling temperature; 0 always picks the most likely token",
        minimum=0.0,
        maximum=10.0,
        live=True,
        by_model=True,
    )
    top_p: float = _GENERATION.harmless(
        0.9,
        "Sample from the smallest set of tokens with this total probability; 1 = off",
        minimum=0.0,
        above_minimum=True,
        maximum=1.0,
        live=True,
        by_model=True,
    )
    top_k: int = _GENERATION.harmless(
        0, "Sample from the k most likely tokens; 0 = off", minimum=0, live=True, by_model=True
    )
    min_p: float = _GENERATION.harmless(
        0.0,
        "Drop tokens less likely than this fraction of the most likely one; 0 = off",
        minimum=0.0,
        maximum=1.0,
        live=True,
        by_model=True,
    )
    repetition_penalty: float = _GENERATION.harmless(
        1.1,
        "Penalty for tokens seen in the last 64; 1 = off",
        minimum=0.0,
        above_minimum=True,
        maximum=10.0,
        live=True,
        by_model=True,
    )
    dry_multiplier: float = _GENERATION.harmless(
        0.0,
        "DRY penalty for tokens that continue a repeated sequence; 0 = off, 0.8 is usual",
        minimum=0.0,
        maximum=100.0,
        live=True,
    )
    dry_base: float = _GENERATION.harmless(
        1.75,
        "Growth of the DRY penalty per repeated token beyond dry_allowed_length",
        minimum=1.0,
        maximum=100.0,
        live=True,
    )
    dry_allowed_length: int = _GENERATION.harmless(
        2, "Shortest repeated sequence, in tokens, that DRY penalizes", minimum=1, live=True
    )
    dry_penalty_last_n: int = _GENERATION.harmless(
        -1,
        "Number of latest tokens in which DRY looks for repeated sequences; -1 = cache_size, 0 = off",
        minimum=-1,
        live=True,
    )
    dry_sequence_breakers: str = _GENERATION.harmless(
        '\\n : " *',
        "Texts that no DRY sequence crosses, separated by spaces; \\n, \\t and \\s are a line end, a tab and a space; "
        "or none",
        metavar="TEXTS",
        live=True,
    )
    loop_guard: LoopGuard = _GENERATION.harmless(
        "auto",
        "Stop a reply that repeats the same tokens without end; auto does so for models with less than 3 billion "
        "weights",
        choices=get_args(LoopGuard),
        live=True,
    )
    max_new_tokens: int = _GENERATION.harmless(512, "Maximum tokens per reply", minimum=1, metavar="TOKENS", live=True)
    seed: int = _GENERATION.harmless(
        -1,
        "Random seed for sampling; -1 = a new seed at every start",
        minimum=-1,
        maximum=2**63 - 1,  # the range of torch
        live=True,
    )
    speculation: Speculation = _GENERATION.harmless(
        "auto",
        "Speculative decoding: propose text that occurred before, and verify several tokens per forward pass; auto "
        "does so if it is measured to be faster (CPU with compiled kernels)",
        choices=get_args(Speculation),
        live=True,
    )

    system_prompt: str = _CHAT.harmless(
        "", "System prompt, pinned in the cache; empty = the default of the model's chat template", metavar="TEXT"
    )
    chat_format: Format = _CHAT.harmless(
        "auto",
        "Format of turns: the model's chat template, or plain 'User:' / 'Assistant:' lines; auto uses the template if "
        "the model has one",
        choices=get_args(Format),
    )
    template_args: str = _CHAT.harmless(
        NONE,
        "Arguments for the model's chat template, as in enable_thinking=false; values are JSON, else text",
        metavar="NAME=VALUE",
        flag="--template-arg",
        is_table=True,
        live=True,
    )

    save: Save = _SESSIONS.sensitive(
        "chats", "Which conversations are saved: interactive chats, piped ones too, or none", choices=get_args(Save)
    )
    snapshot_turns: int = _SESSIONS.sensitive(
        10,
        "Snapshot the cache every N turns and on exit, so that resuming needs no prefill; 0 = only on exit",
        minimum=0,
        metavar="N",
    )
    archive: Archive = _SESSIONS.sensitive(
        "native",
        "Archive keys and values of the evicted turns of saved sessions, so that /keep restores turns without a "
        "prefill: native (exactly), int8 (in 8 bits), or off",
        choices=get_args(Archive),
    )
    archive_session_mb: int = _SESSIONS.sensitive(
        512, "Maximum megabytes of archived turns per session; the oldest are deleted first", minimum=1, metavar="MB"
    )
    archive_total_mb: int = _SESSIONS.sensitive(
        4096,
        "Maximum megabytes of archived turns of all sessions; the oldest are deleted first",
        minimum=1,
        metavar="MB",
    )

    plain: bool = _INTERFACE.harmless(False, "Line-based prompt instead of the full-screen app")
    theme: str = _INTERFACE.harmless("textual-dark", "Color theme of the full-screen app", metavar="NAME")
    thinking: Thinking = _INTERFACE.harmless(
        "collapse",
        "How reasoning blocks are displayed: as a line that can be expanded, in full, or not at all",
        choices=get_args(Thinking),
        live=True,
    )
    notify: Notify = _INTERFACE.harmless(
        "auto",
        "How the app reports the end of a long reply if the terminal has no focus: auto sends a notification if the "
        "terminal is known to show it, else rings the bell",
        choices=get_args(Notify),
        live=True,
    )
    notify_after_s: float = _INTERFACE.harmless(
        10.0, "Seconds that a reply must take for its end to be reported", minimum=0, live=True, metavar="SECONDS"
    )
    window_title: bool = _INTERFACE.harmless(True, "Show model and state in the title of the terminal window")
    history: bool = _INTERFACE.sensitive(True, "Keep input history across restarts")
    metrics_port: int = _INTERFACE.sensitive(
        0,
        "Serve Prometheus metrics at http://METRICS_HOST:PORT/metrics; 0 = off",
        minimum=0,
        maximum=65535,
        metavar="PORT",
    )
    metrics_host: str = _INTERFACE.sensitive(
        "127.0.0.1", "Address the metrics server binds to (non-loopback exposes it to other machines)", metavar="HOST"
    )
    stats_json: str = _INTERFACE.sensitive(
        "", "Append one JSON object per turn to this file; empty = off", metavar="FILE"
    )


def setting_fields() -> dict[str, Field[Any]]:
    """Return the dataclass fields of `Settings` by name, in declaration order."""
    return {f.name: f for f in fields(Settings)}


def spec_of(name: str) -> Spec:
    """Return the `Spec` of the setting `name`. Raises KeyError for an unknown name."""
    spec = setting_fields()[name].metadata["spec"]
    assert isinstance(spec, Spec)
    return spec


def settings_by_model() -> list[str]:
    """Return the names of the settings whose default a model may replace."""
    return [name for name in setting_fields() if spec_of(name).by_model]


def default_of(name: str) -> Any:
    """Return the default of the setting `name`, without a model's advice."""
    default = setting_fields()[name].default
    assert default is not MISSING
    return default
