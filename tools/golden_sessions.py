"""The conversation, settings and input history of a golden set: see `tools.golden`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from array import array
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

MODEL = "example/tiny"
"""A Hub id, so that no path of the writing machine is in the database."""
CONVERSATION = [
    "--model",
    MODEL,
    "--save",
    "always",
    "--temperature",
    "0",
    "--cache-size",
    "96",
    "--max-new-tokens",
    "12",
]
EXACT = ["--device", "cpu", "--dtype", "float32", "--weights", "native", "--kernels", "torch"]
"""What any machine can compute alike."""
TITLE = "The sea and the dragon"
SYSTEM = "You are brief."
MESSAGES = ["Tell me of the sea.", "And of the dragon?", "What then?", "Why is that?", "How does it end?", "Go on."]
UNDONE = "Never mind the lighthouse."
NEXT = ["One more story.", "And one more."]
TYPED = ["Tell me of the sea.", "two\nlines", "a \\ backslash, “quotes” and Ünïcödé"]
IMPORTED = '{"messages": [{"role": "user", "content": "Is the harbor far?"}, {"role": "assistant", "content": "No."}]}'
EXPORTS = {"exported.jsonl": "jsonl", "exported.json": "replay"}
CONFIG = """\
[streamchat]
config_version = 1

[model]
model = "pythia-70m"
adapter = "lora"
decode = "plain"
device = "cuda:0,1"
dtype = "bfloat16"
weights = "int8"
kernels = "torch"
attention = "eager"

[cache]
cache_size = 2048
compression_ratio = 0.0
num_sink_tokens = 8
evict = "oldest-tokens"
on_full = "stop"
kv_dtype = "int8"
auto_recall = "suggest"
recall_share = 0.125

[generation]
temperature = 0.25
top_p = 0.5
top_k = 40
min_p = 0.05
repetition_penalty = 1.25
max_new_tokens = 99
seed = 7
dry_multiplier = 0.5
dry_base = 2.0
dry_allowed_length = 3
dry_penalty_last_n = 512
dry_sequence_breakers = "\\\\n"
loop_guard = "off"
speculation = "off"

[chat]
system_prompt = "You are \\"brief\\".\\nAnd kind."
chat_format = "plain"
template_args = { enable_thinking = false }

[sessions]
save = "always"
snapshot_turns = 3
archive = "int8"
archive_session_mb = 100
archive_total_mb = 1000

[interface]
plain = true
theme = "nord"
thinking = "hide"
notify = "bell"
notify_after_s = 2.5
window_title = false
history = false
metrics_port = 9100
metrics_host = "0.0.0.0"
stats_json = "stats.jsonl"

[keys]
chat.stop = "ctrl+x"
"""
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def write_model(folder: Path) -> None:
    """Save a random model of 2 layers, with attention far from uniform, and a byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=310, initial_alphabet=alphabet, special_tokens=CONTROL, show_progress=False
    )
    backend.train_from_iterator(["\n".join([*MESSAGES, *NEXT, SYSTEM, "user assistant system"])] * 3, trainer)
    make_tokenizer: Any = PreTrainedTokenizerFast
    tokenizer = make_tokenizer(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    make_model: Any = AutoModelForCausalLM.from_config
    model = make_model(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
            else:
                weight.normal_(0, 1.0 if "embed" in name else 0.3)
        for token, number in tokenizer.get_vocab().items():
            if len(token.strip("Ġ")) < 2 and number != tokenizer.eos_token_id:
                model.lm_head.weight[number] = 0  # so replies are made of letters, and can be searched
    model.to(torch.bfloat16).save_pretrained(folder)


def put_into_hub_cache(model: Path, hf_home: Path) -> None:
    """Copy the files of `model` to where a download of `MODEL` would have put them."""
    repository = hf_home / "hub" / f"models--{MODEL.replace('/', '--')}"
    commit = "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit, encoding="utf-8")
    shutil.copytree(model, repository / "snapshots" / commit)


class Program:
    """The `streamchat` command with a home folder of its own, and the model in its Hub cache."""

    def __init__(self, home: Path, model: Path) -> None:
        self.home = home
        hf_home = home.with_name(f"{home.name}-hub")
        put_into_hub_cache(model, hf_home)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("STREAMCHAT_", "HF_"))}
        self._env = kept | {"STREAMCHAT_HOME": str(home), "HF_HOME": str(hf_home), "HF_HUB_OFFLINE": "1"}

    def run(self, *arguments: str, lines: list[str] = []) -> str:  # noqa: B006 - only read
        """Return what it prints; `lines` are its input."""
        done = subprocess.run(
            [sys.executable, "-m", "streamchat", *arguments],
            input="".join(f"{line}\n" for line in lines),
            env=self._env,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"streamchat {' '.join(arguments)} failed ({done.returncode}): {done.stderr}")
        return done.stdout

    def chat(self, messages: list[str]) -> str:
        """Have the conversation, and return its id: a pin, evictions, an undo, and `messages` at the end."""
        self.run(
            *CONVERSATION,
            *EXACT,
            "--system-prompt",
            SYSTEM,
            lines=[*MESSAGES[:2], "/pin 2", *MESSAGES[2:], UNDONE, "/undo", *messages],
        )
        [session] = [json.loads(line) for line in self.run("sessions", "list", "--json").splitlines()]
        return str(session["id"])


def turn_ids(home: Path, session: str, last: int) -> list[list[int]]:
    """The token ids of the newest `last` turns, oldest first."""
    import sqlite3

    with closing(sqlite3.connect(home / "data" / "streamchat.db")) as connection:
        rows = connection.execute(
            "SELECT ids FROM turns WHERE session = ? AND state = 'done' ORDER BY number DESC LIMIT ?", (session, last)
        ).fetchall()
    return [array("i", ids).tolist() for (ids,) in reversed(rows)]


def cached_ids(home: Path, session: str) -> list[int]:
    """The token ids in the cache, as the snapshot has them."""
    from safetensors import safe_open

    with safe_open(home / "data" / "snapshots" / f"{session}.safetensors", framework="np") as file:
        return [int(value) for value in file.get_tensor("ids")]


def write_settings(folder: Path) -> dict[str, Any]:
    """Write `config.toml` with every setting and the input history; return the settings."""
    from streamchat.config import loader, settings
    from streamchat.frontend.typed_history import TypedHistory

    (folder / "config.toml").write_text(CONFIG, encoding="utf-8")
    missing = [name for name in settings.setting_fields() if f"\n{name} = " not in CONFIG]
    if missing:
        raise SystemExit(f"CONFIG lacks settings: {', '.join(missing)}")
    os.environ["STREAMCHAT_HOME"] = str(folder)
    typed = TypedHistory.open(wanted=True)
    for text in TYPED:
        typed.add(text)
    return asdict(loader.load(config_file=folder / "config.toml", environ={}).settings)


def write_sessions(folder: Path) -> dict[str, Any]:
    """Write the model, the database, a snapshot, exports and settings into `folder`; return what they must say."""
    write_model(folder / "model")
    with tempfile.TemporaryDirectory() as scratch:
        past, unbroken = (Program(Path(scratch) / name, folder / "model") for name in ("past", "unbroken"))
        session = past.chat([])
        past.run("sessions", "rename", session, TITLE)
        for name, kind in EXPORTS.items():
            (folder / name).write_text(past.run("sessions", "export", session, "--format", kind), encoding="utf-8")
        foreign = Path(scratch) / "harbor.jsonl"
        foreign.write_text(IMPORTED, encoding="utf-8")
        past.run("sessions", "import", str(foreign))
        for name in ("streamchat.db", f"snapshots/{session}.safetensors"):
            (folder / "data" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(past.home / "data" / name, folder / "data" / name)
        shutil.copytree(past.home / "data" / "evicted", folder / "data" / "evicted")
        other = unbroken.chat(NEXT)  # the same conversation in one process: the replies that resuming must give
        return {
            "written_by": past.run("--version").strip(),
            "session": session,
            "title": TITLE,
            "messages": MESSAGES,
            "undone": UNDONE,
            "pinned": 2,
            "cached_ids": cached_ids(past.home, session),
            "next": NEXT,
            "next_turn_ids": turn_ids(unbroken.home, other, len(NEXT)),
            "next_cached_ids": cached_ids(unbroken.home, other),
            "typed": TYPED,
            "settings": write_settings(folder),
        }
