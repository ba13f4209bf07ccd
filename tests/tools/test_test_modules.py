"""What tests share is in modules without tests: a test module can be moved, or run alone, and nothing else changes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import tests

FOLDER = Path(tests.__file__).parent
FILES = sorted(FOLDER.rglob("*.py"))
# also in code that is run in a process of its own
IMPORT = re.compile(
    r"\b(?:from|import)\s+(?:tests|\.)[\w.]*\btest_\w+"  # the module
    r"|\bfrom\s+(?:tests|\.)[\w.]*\s+import\s+(?:\([^)]*|[^\n]*)\btest_\w+"  # by its name in the package
)


def test_no_module_imports_a_test_module() -> None:
    assert len(FILES) > 100
    found = {path.name: IMPORT.findall(path.read_text(encoding="utf-8")) for path in FILES}
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("from tests.{}store import a_session", True),
        ("    from .{}store import a_session", True),
        ("import tests.store.{}files", True),
        ("from tests import {}store", True),
        ("from . import tiny, {}store", True),
        ("from tests import (\n    tiny,\n    {}store,\n)", True),
        ("from tests.support.tiny import random_ids", False),
        ("from tests.stops import la{}word", False),
    ],
)
def test_the_forms_of_an_import_are_known(line: str, wrong: bool) -> None:
    assert bool(IMPORT.search(line.format("test_"))) == wrong
