"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from streamchat.reports.page import Table


def as_markdown(table: Table) -> str:
    """Return the table in Markdown."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rule = "| " + " | ".join("---:" if numeric else "---" for numeric in table.numeric) + " |"
    return "\n".join([line(table.columns), rule, *map(line, table.rows)])
