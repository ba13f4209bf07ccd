"""Print the result page of benchmark commands, and the flags for it."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from streamchat.base.colors import wants_color
from streamchat.base.errors import ConfigError, reason_of
from streamchat.base.paths import user_path

if TYPE_CHECKING:
    from streamchat.reports.page import Page


LAST_LINE = "print all figures as a JSON object in the last line"


def add_output_flags(group: argparse._ArgumentGroup, json_help: str = LAST_LINE) -> None:
    """Add `--charts`, `--out` and `--json`."""
    group.add_argument(
        "--charts",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="draw charts in the terminal (default: if stdout is a terminal)",
    )
    group.add_argument(
        "--out", metavar="DIR", help="write JSON, an HTML page, and charts (with matplotlib) to this folder"
    )
    group.add_argument("--json", action="store_true", help=json_help)


def output_folder(args: argparse.Namespace) -> Path | None:
    """Return the folder of `--out`, created if missing; None without the flag.

    Raises:
        ConfigError: It cannot be created or written.
    """
    if args.out is None:
        return None
    path = user_path(args.out)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".streamchat-writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"--out {args.out} cannot be written ({reason_of(error)})") from None
    return path


def print_page(page: Page, args: argparse.Namespace, folder: Path | None, *, json_only: bool = False) -> None:
    """Print the page as the flags ask; with `folder`, write its files first.

    Args:
        page: The page.
        args: The flags of `add_output_flags`.
        folder: Where to write the files; None to write none.
        json_only: With `--json`, print one indented JSON object instead of text.
    """
    from streamchat.reports import figure, terminal
    from streamchat.reports.page import as_text, write

    written = [] if folder is None else write(page, folder)
    if args.json and json_only:
        sys.stdout.write(json.dumps(page.data, indent=1) + "\n")
        return
    width = shutil.get_terminal_size((100, 24)).columns
    parts = [as_text(page, width)]
    if sys.stdout.isatty() if args.charts is None else args.charts:
        color = wants_color(os.environ, is_terminal=sys.stdout.isatty())
        encoding = sys.stdout.encoding or "utf-8"
        parts += [terminal.text_of(picture, width, color=color, encoding=encoding) for picture in page.pictures]
    if folder is not None:
        names = ", ".join(path.name for path in written)
        missing = "" if figure.can_draw() or not page.pictures else f"; for charts: {figure.HOW_TO_GET}"
        parts.append(f"Written to {folder}: {names}{missing}")
    sys.stdout.write("\n\n".join(parts) + "\n")
    if args.json:
        sys.stdout.write(json.dumps(page.data, ensure_ascii=False) + "\n")


def exit_now(code: int) -> None:
    """Exit the process while the model's thread is still inside a native call that cannot be interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    os._exit(code)
