"""Print the result page of benchmark commands, and the flags for it."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

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
    from streamchat.reports.page import prepare_folder

    return None if args.out is None else prepare_folder(args.out)


def print_page(page: Page, args: argparse.Namespace, folder: Path | None) -> None:
    """Print the page as the flags ask; with `folder`, also write its files."""
    from streamchat.reports.page import show

    charts = sys.stdout.isatty() if args.charts is None else args.charts
    no_color = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
    show(page, sys.stdout, charts=charts, as_json=args.json, folder=folder, no_color=no_color)
