"""The files of the repository that follow from the program itself.

    python -m tools.docs --write

docs/configuration.md and config.toml come from the settings, docs/commands.md and the man page from the parser of every
command. A test says when they differ.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from streamchat.cli import parser
from streamchat.config import keymap
from streamchat.config.loader import flag_of
from streamchat.config.render import render_toml
from streamchat.config.settings import default_of, setting_fields, settings_by_model, spec_of
from streamchat.conversation.loops import LONGEST, REPEATS, TOKENS
from streamchat.frontend.slash.commands import default_registry
from streamchat.models.catalogue import SAMPLING
from tools.man_page import man_page, usage

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
NOTE = "*Made by `python -m tools.docs --write`; changes here are overwritten.*"


def configuration_page() -> str:
    """Every setting and every key."""
    lines = [
        "# Configuration",
        "",
        NOTE,
        "",
        *_paragraph(
            "Every setting is a flag (`--cache-size 2048`), an environment variable "
            "(`STREAMCHAT_CACHE_SIZE=2048`), and a line in `config.toml` (`cache_size = 2048` under `[cache]`). A flag "
            "overrides a variable, and a variable overrides the files. With `--config FILE` (or `STREAMCHAT_CONFIG`), "
            "only that file is read. Without it, streamchat reads the user's `config.toml`, and then "
            "`./config.toml` in the current folder if that has a `[streamchat]` table. The second overrides the "
            "first, except with values that equal the default (sampling settings override always). `streamchat "
            "config` prints the settings in use and "
            "their origins, `streamchat config --path` prints the path of the file that takes precedence, and "
            "`streamchat config --default` prints a complete file to start from. In the app, F4 opens "
            "[all settings](settings.svg): type to filter, Enter edits, Ctrl+R resets, and Ctrl+S writes the selected "
            "setting to the file of `--config`, else to the user's, where comments and order stay."
        ),
        "",
        "## Settings from the current folder",
        "",
        *_paragraph(
            "A folder may come from a stranger. One line at the start says what its `config.toml` changes. Settings "
            "that open a port, write a file, choose the model, or decide what is saved "
            f"({', '.join(f'`{name}`' for name in setting_fields() if spec_of(name).needs_trust)}, and `[keys]`) are "
            "ignored until you trust the file:"
        ),
        "",
        "```sh",
        "streamchat config --trust            # the current folder; prints what the file sets",
        "streamchat config --trust FOLDER",
        "streamchat config --untrust FOLDER",
        "```",
        "",
        *_paragraph(
            "Trust applies to the file at this path with these contents: after a change or a move, it must be trusted "
            "again. `trusted-config.json` in the state folder lists the trusted files. A file that belongs to another "
            "user (except root) is ignored entirely until you trust it. A file that is not a regular file or is larger "
            "than 1,000,000 bytes is always ignored. Whatever you give with `--config`, a flag, or a variable "
            "needs no trust."
        ),
    ]
    section = ""
    for name in setting_fields():
        spec = spec_of(name)
        if spec.section != section:
            section = spec.section
            lines += [
                "",
                f"## [{section}]",
                "",
                "| setting | default | legal values | meaning |",
                "| --- | --- | --- | --- |",
            ]
        default = default_of(name)
        shown = str(default).lower() if isinstance(default, bool) else f"`{default}`" if default != "" else "empty"
        shown += " or the model's" if spec.by_model else ""
        live = " Can be changed in a chat with `/set`." if spec.live else ""
        legal = "true or false" if isinstance(default, bool) else spec.legal()
        lines.append(f"| `{name}` | {shown} | {legal} | {_cell(spec.help)}.{live} |")
    lines += _sampling_section()
    lines += ["", "## [keys]", "", 'Key names, separated by commas: `chat.stop = "escape, ctrl+g"`.', ""]
    lines += ["| action | default | meaning |", "| --- | --- | --- |"]
    lines += [f"| `{key.id}` | `{key.keys}` | {_cell(key.help)} |" for key in keymap.KEYS]
    lines += ["", "## Other environment variables", "", "| variable | meaning |", "| --- | --- |"]
    lines += [
        "| `STREAMCHAT_HOME` | one folder for configuration, models, sessions, and logs |",
        "| `STREAMCHAT_CONFIG` | the configuration file, like `--config` |",
        "| `STREAMCHAT_DEBUG` | any value except 0: show tracebacks of errors, like `--debug` |",
        "| `STREAMCHAT_TRACE` | file for startup trace events; `streamchat bench --startup` sets it |",
        "| `NO_COLOR` | any value but the empty one: no colors; wins over `FORCE_COLOR` |",
        "| `FORCE_COLOR` | any value but the empty one, 0 and false: colored charts also in files and pipes |",
        "| `HF_HOME`, `HF_HUB_CACHE`, `HF_ENDPOINT`, `HF_HUB_OFFLINE` | as for all Hugging Face programs |",
    ]
    return "\n".join(lines) + "\n"


def _sampling_section() -> list[str]:
    """Where sampling settings come from, and what works against repetition."""
    *others, last = (f"`{name}`" for name in settings_by_model())
    names = f"{', '.join(others)}, or {last}"
    lines = [
        "",
        "## Sampling",
        "",
        *_paragraph(
            f"If you give no value for {names}, the model's makers decide: first `generation_config.json` in the "
            "model's folder (or `general.sampling.*` in the metadata of a GGUF file), then the catalogue below, then "
            "the default above. A value in a file, a variable, a flag, or `/set` always wins, even if it equals the "
            "default. `/set` and `streamchat config` name the source of each value. `/model` looks up the values for "
            "the new model, except those that you gave. A resumed session keeps the values that it was run with, and a "
            "notice says so if a new chat would use others."
        ),
        "",
        "| model | " + " | ".join(f"`{name}`" for name in settings_by_model()) + " |",
        "| --- |" + " --- |" * len(settings_by_model()),
    ]
    for name, values in SAMPLING.items():
        cells = " | ".join(f"{values[setting]:g}" if setting in values else "" for setting in settings_by_model())
        lines.append(f"| {name} | {cells} |")
    return [
        *lines,
        "",
        *_paragraph(
            "The values are those of the makers' model cards and generation_config files. Copies under the same name "
            "(a folder, a GGUF file with a quantization at the end of its name) count as the same model. "
            "[Right answers by setting](measuring.md#which-sampling-settings-answer-best) has measurements."
        ),
        "",
        "Three settings work against repetition:",
        "",
        *_paragraph(
            "- **`repetition_penalty`** makes every token of the last 64 less likely, whether it repeats a sequence or "
            "not."
        ),
        *_paragraph(
            "- **DRY** makes only tokens less likely that would continue a sequence that occurred before, and more so "
            "the longer it is: `/set dry_multiplier 0.8` turns it on. If the newest n tokens occurred before, the "
            "token that followed them loses `dry_multiplier * dry_base ** (n - dry_allowed_length)` from its logit. "
            "The `dry_` settings have the names and the meaning of llama.cpp and koboldcpp. No sequence crosses a "
            "sequence breaker or a control token, control tokens have no penalty, and no more than the latest "
            "`cache_size` tokens are looked at."
        ),
        *_paragraph(
            f"- **`loop_guard`** stops a reply that repeats the same cycle of up to {LONGEST} tokens, at least "
            f"{REPEATS} times and for at least {TOKENS} tokens. The line of figures then says so, and the finish "
            "reason is `loop`. By default, it guards models with less than 3 billion weights "
            "([measurements](measuring.md#how-often-the-loop-guard-acts))."
        ),
    ]


def commands_page() -> str:
    """Every command with its arguments, and the slash commands."""
    top, subparsers = parser.build_parser()
    lines = ["# Commands", "", NOTE, "", *_of(top, "streamchat")]
    for name in parser.COMMANDS:
        lines += ["", *_of(subparsers.choices[name], f"streamchat {name}")]
    lines += ["", "## In the chat", "", "| command | meaning |", "| --- | --- |"]
    for command in default_registry():
        lines.append(f"| `/{f'{command.name} {command.arguments}'.strip()}` | {_cell(command.help)} |")
    lines += [
        "",
        "`//help` sends `/help` to the model; two slashes before anything else, as in a comment, stay as typed.",
        "",
        *_paragraph(
            '`@path` or `@"a path"` inserts a text file into the message if that file exists. Letters of any script '
            "and punctuation may precede or follow it. Anything else after an `@` is text: decorators, "
            "`@types/node`, addresses. So is everything in fenced and inline code. If the text looks like a file (a "
            "common suffix such as `.txt`, or an existing folder before a slash) but does not exist, it is sent as "
            "text with a notice. `@./x`, `@../x`, and `@~/x` are always paths: if the file does not exist, nothing is "
            "sent. `\\@` is a literal @."
        ),
        *_queue_section(),
    ]
    return "\n".join(lines) + "\n"


def _queue_section() -> list[str]:
    """What happens to messages that are written while the model is busy."""
    drop, clear = (keymap.display_keys(keymap.BY_ID[f"chat.queue_{name}"].keys) for name in ("drop", "clear"))
    return [
        "",
        "## Messages written during a reply",
        "",
        *_paragraph(
            "In the app, messages that you write while a reply runs or a model loads are queued. They are listed above "
            "the input and sent in order, each when the reply before it is done. The files that a message mentions are "
            "read when you queue it."
        ),
        "",
        *_paragraph(
            "- **Edit.** Up in an empty input edits the newest queued message; Up and Down go on to the others, and "
            "from the oldest to the input history. Enter saves the message in its place, Esc leaves it as it was. "
            "While you edit a message, nothing behind it is sent."
        ),
        *_paragraph(
            f"- **Remove.** {drop} removes the message being edited, or the newest one; {clear} removes all. The input "
            "history keeps them."
        ),
        *_paragraph(
            "- **`/queue`** lists all messages; `/queue edit N`, `/queue drop N`, `/queue clear`, and `/queue send` "
            "act on them."
        ),
        *_paragraph(
            "- **Stop.** Esc or Ctrl+C stops the reply and holds the queue: nothing more is sent until you press Enter "
            "in an empty input (or run `/queue send`). A message that you write before that is not held, and is sent "
            "first. A failed turn holds the queue, too, and so does a command that stops a reply to start over "
            "(`/clear`, `/system TEXT`, `/model NAME`)."
        ),
        *_paragraph(
            "- **Nothing is lost.** The message of a failed turn returns to the input, or to the queue if the input is "
            "in use. When you quit, unsent messages are printed: their beginnings if the input history is saved, "
            "else in full."
        ),
        "",
        *_paragraph("Commands are not queued. They run at once, or say why they are not available during a reply."),
        "",
        *_paragraph(
            "At the prompt (`--plain`), the terminal keeps what you type during a reply, without showing it. The "
            "prompt reads it when the reply is done: each Enter sends one message. A pipe reads the next line when "
            "the reply to the last one is done."
        ),
    ]


def _of(each: argparse.ArgumentParser, name: str, level: int = 2) -> Iterator[str]:
    yield f"{'#' * level} {name}"
    yield ""
    yield from _paragraph(each.description or "")
    rows, settings, below = [], [], []
    for action in each._actions:
        if isinstance(action, argparse._SubParsersAction):
            below.append(action)
        elif action.dest in setting_fields() and action.default is argparse.SUPPRESS:
            settings.append(f"`{flag_of(action.dest)}`")
        elif action.dest != "help" and action.help is not argparse.SUPPRESS:
            rows.append(f"| `{usage(action)}` | {_cell((action.help or '').replace('%%', '%'))} |")
    if rows:
        yield from ["", "| argument | meaning |", "| --- | --- |", *rows]
    if settings:
        yield ""
        yield from _paragraph(f"Settings ([configuration](configuration.md)): {', '.join(settings)}.")
    for action in below:
        for word, lower in action.choices.items() if each.prog != "streamchat" else ():
            about = next((choice.help for choice in action._choices_actions if choice.dest == word), "")
            lower.description = lower.description or f"{str(about)[:1].upper()}{str(about)[1:]}."
            yield ""
            yield from _of(lower, f"{name} {word}", level + 1)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _paragraph(text: str) -> list[str]:
    import textwrap

    below = "  " if text.startswith("- ") else ""
    return textwrap.wrap(text, 120, subsequent_indent=below, break_long_words=False, break_on_hyphens=False)


PAGES = {
    "docs/configuration.md": configuration_page,
    "docs/commands.md": commands_page,
    "man/streamchat.1": man_page,
    "config.toml": render_toml,
}
"""Path in the repository -> what makes the file."""


def main(argv: list[str]) -> int:
    """Write the pages, or say which differ."""
    texts = {name: page() for name, page in PAGES.items()}
    differ = [name for name, text in texts.items() if not _is(ROOT / name, text)]
    for name in differ:
        print(name, "is written" if "--write" in argv else "differs; run: python -m tools.docs --write")
        if "--write" in argv:
            (ROOT / name).write_text(texts[name], encoding="utf-8")
    return 0 if "--write" in argv else len(differ)


def _is(path: Path, text: str) -> bool:
    return path.exists() and path.read_text(encoding="utf-8") == text


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
