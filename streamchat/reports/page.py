"""Results of a run as tables and charts, rendered for terminal, HTML and JSON."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from streamchat.base.atomic_files import SHARED, write_text
from streamchat.base.sanitize import printable
from streamchat.reports import figure
from streamchat.reports.chart import Picture


@dataclass(frozen=True)
class Table:
    """Text in rows and columns; the first column has the row names."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    """Meaning of the columns, if their names are not enough."""

    @property
    def numeric(self) -> list[bool]:
        """Whether each column has only numbers, and is therefore aligned to the right; never the first one."""
        cells = list(zip(*self.rows, strict=True)) or [()] * len(self.columns)
        return [bool(at) and all(map(_NUMBER.match, column)) for at, column in enumerate(cells)]


def facts(title: str, values: Mapping[str, object], caption: str = "") -> Table:
    """Return a table with one name and one value per row."""
    return Table(title, ("", "value"), [(name, str(value)) for name, value in values.items()], caption)


_NUMBER = re.compile(r"[-+]?\d|-?$")
"""Start of a cell with a number, or without one."""


@dataclass
class Page:
    """The result of one run of a command."""

    name: str
    """File name without extension."""
    title: str
    lines: list[str] = field(default_factory=list)
    """What was run on what, one line each."""
    tables: list[Table] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Notes for the reader, one sentence each."""
    data: dict[str, Any] = field(default_factory=dict)
    """All figures, for programs."""
    verdict: str = ""
    """Result of the checks as a sentence, if the command checks anything."""
    ok: bool = True
    """Whether the checks passed."""


def as_text(page: Page, width: int) -> str:
    """Return the page as lines for a terminal, without charts and colors."""
    from rich.console import Console

    out = io.StringIO()
    # the terminal wraps a table that is too wide, instead of cutting it off
    console = Console(file=out, width=max(width, 200), color_system=None, legacy_windows=False)
    console.print(page.title, *page.lines, sep="\n", markup=False, highlight=False)
    for table in page.tables:
        console.print()
        console.print(table.title, markup=False, highlight=False)
        console.print(_rich_table(table))
        if table.caption:
            console.print(table.caption, markup=False, highlight=False)
    if page.notes:
        console.print()
        console.print(*page.notes, sep="\n", markup=False, highlight=False)
    if page.verdict:
        console.print()
        console.print(page.verdict, markup=False, highlight=False)
    return "\n".join(line.rstrip() for line in printable(out.getvalue()).splitlines())


def _rich_table(table: Table) -> Any:
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    drawn = RichTable(box=box.SIMPLE_HEAD, pad_edge=False)
    for name, numeric in zip(table.columns, table.numeric, strict=True):
        drawn.add_column(Text(name), justify="right" if numeric else "left", no_wrap=True)
    for row in table.rows:
        drawn.add_row(*map(Text, row))
    return drawn


def as_html(page: Page) -> str:
    """Return the page as one self-contained HTML file; without matplotlib it has a note instead of charts."""
    import jinja2

    source = (resources.files("streamchat.reports") / "page.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    drawn = [(picture, figure.svg_of(picture)) for picture in page.pictures] if figure.can_draw() else None
    return environment.from_string(source).render(page=page, pictures=drawn, how=figure.HOW_TO_GET) + "\n"


def write(page: Page, folder: Path) -> list[Path]:
    """Write NAME.json and NAME.html, and NAME.svg and NAME.png of each chart if matplotlib is installed."""
    as_json, html = folder / f"{page.name}.json", folder / f"{page.name}.html"
    write_text(as_json, json.dumps(page.data, indent=1, ensure_ascii=False) + "\n", durable=False, mode=SHARED)
    write_text(html, as_html(page), durable=False, mode=SHARED)
    return [as_json, html, *(figure.save_pictures(folder, page.pictures) if figure.can_draw() else [])]
