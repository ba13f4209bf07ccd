"""Imports among the modules of streamchat form no circle, and commands load no library that they do not need."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import grimp
import pytest
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

import tests
from streamchat.base.errors import ExitCode

OLD_FILES = Path(tests.__path__[0]) / "golden" / "0.1.0.dev1"
LIBRARIES = {
    *("torch", "transformers", "tokenizers", "safetensors", "gguf", "huggingface_hub", "numpy", "scipy"),
    *("textual", "prompt_toolkit", "jinja2", "matplotlib", "plotext"),
}
"""Those that take long to load."""


# --- circles ------------------------------------------------------------------------------------------------------


def circles(graph: grimp.ImportGraph) -> list[list[str]]:
    """Return the strongly connected modules: in each list every module imports every other, directly or indirectly."""
    names = sorted(graph.modules)
    number = {name: i for i, name in enumerate(names)}
    edges = [(number[a], number[b]) for a in names for b in graph.find_modules_directly_imported_by(a)]
    rows, columns = zip(*edges, strict=True)
    matrix = csr_array(([1] * len(edges), (rows, columns)), shape=(len(names), len(names)))
    _, labels = connected_components(matrix, directed=True, connection="strong")
    groups = defaultdict(list)
    for name, label in zip(names, labels, strict=True):
        groups[label].append(name)
    return [group for group in groups.values() if len(group) > 1]


def lines_of(graph: grimp.ImportGraph, group: list[str]) -> str:
    """Return the import statements that make a circle, a line each."""
    return "\n".join(
        f"{importer}, line {detail['line_number']}: {detail['line_contents']}"
        for importer in group
        for imported in sorted(graph.find_modules_directly_imported_by(importer) & set(group))
        for detail in graph.get_import_details(importer=importer, imported=imported)
    )


def test_no_import_circle() -> None:
    """Imports inside functions and for type checkers count as well."""
    graph = grimp.build_graph("streamchat", cache_dir=None)
    assert len(graph.modules) > 200
    found = circles(graph)
    assert not found, "\n\n".join(lines_of(graph, group) for group in found)


def test_a_circle_is_found() -> None:
    graph = grimp.ImportGraph()
    for importer, imported in ("ab", "bc", "ca", "cd", "de", "ef", "fe", "ga"):
        graph.add_import(importer=importer, imported=imported, line_number=1, line_contents=f"import {imported}")
    assert circles(graph) == [["a", "b", "c"], ["e", "f"]]
    assert lines_of(graph, ["e", "f"]) == "e, line 1: import f\nf, line 1: import e"


# --- what commands load -------------------------------------------------------------------------------------------

COMMAND = """
import sys
from streamchat.cli import main as cli
code = cli.main(sys.argv[1:])
open("modules.txt", "w").write("\\n".join(sys.modules))
raise SystemExit(code)
"""
MONITOR = """
import asyncio, sys
from streamchat.frontend.watch import monitored_sessions
from streamchat.tui.monitor import MonitorApp

async def main():
    app = MonitorApp(monitored_sessions(limit=1)[0])
    async with app.run_test() as pilot:
        await pilot.pause()

asyncio.run(main())
open("modules.txt", "w").write("\\n".join(sys.modules))
"""


@pytest.fixture
def _saved() -> None:
    """Two saved conversations."""
    shutil.copytree(OLD_FILES / "data", Path(os.environ["STREAMCHAT_HOME"]) / "data")


def loaded_by(program: str, *arguments: str, code: int = ExitCode.OK) -> set[str]:
    """Run `program` in a fresh interpreter, and return which of `LIBRARIES` it has loaded."""
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120, check=False)
    assert done.returncode == code, done.stderr
    modules = set(Path("modules.txt").read_text().split())
    assert "streamchat.base.errors" in modules
    return modules & LIBRARIES


@pytest.mark.parametrize(
    "arguments",
    [
        "--help",
        "--version",
        "config",
        "models",
        "sessions",
        "sessions list",
        "sessions list sea",
        "sessions show last",
        "monitor --help",
        "monitor --list",
        "monitor --once",
        "replay --help",
        "bench --help",
        "serve --help",
        "doctor --help",
    ],
)
@pytest.mark.usefixtures("_saved")
def test_commands_without_a_model_load_no_library(arguments: str) -> None:
    assert loaded_by(COMMAND, *arguments.split()) == set()


def test_a_monitor_with_nothing_to_watch_loads_no_library() -> None:
    assert loaded_by(COMMAND, "monitor", code=ExitCode.STORE) == set()


@pytest.mark.usefixtures("_saved")
def test_the_monitor_loads_textual_only() -> None:
    assert loaded_by(MONITOR) == {"textual"}


def test_the_doctor_loads_torch_only() -> None:
    """It asks torch which devices and number formats there are."""
    assert loaded_by(COMMAND, "doctor") - {"numpy"} == {"torch"}  # torch loads numpy
