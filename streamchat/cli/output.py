"""How commands that measure show their page, and the flags for that."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from streamchat.reports.page import Page


def add_output_flags(group: argparse._ArgumentGroup) -> None:
    """`--charts`, `--out`, `--json`."""
    group.add_argument(
        "--charts",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="draw the pictures in the terminal (default: when stdout is one)",
    )
    group.add_argument(
        "--out", metavar="DIR", help="write JSON, an HTML page, and pictures (these with matplotlib) into this folder"
    )
    group.add_argument("--json", action="store_true", help="the last line is a JSON object with all figures")


def print_page(page: Page, args: argparse.Namespace, folder: Path | None) -> None:
    """Print the page as these flags say; with `folder`, write its files."""
    from streamchat.reports.page import show

    charts = sys.stdout.isatty() if args.charts is None else args.charts
    no_colour = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
    show(page, sys.stdout, charts=charts, as_json=args.json, folder=folder, no_colour=no_colour)
