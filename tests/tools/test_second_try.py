"""`.ci/tests`: a test that fails gets a second try, and both outcomes are told."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / ".ci" / "tests"
TESTS = """
import pathlib
import pytest

def test_sound():
    pass

@pytest.mark.parametrize("number", range({count}))
def test_unsure(number):
    tried = pathlib.Path(f"tried-{{number}}")
    times = int(tried.read_text()) if tried.exists() else 0
    tried.write_text(str(times + 1))
    assert times >= {failures}
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "failures", "status", "tries"),
    [(3, 1, 0, 2), (3, 2, 1, 2), (4, 1, 1, 1)],
)
def test_few_failures_get_a_second_try(count: int, failures: int, status: int, tries: int, tmp_path: Path) -> None:
    (tmp_path / "test_odd.py").write_text(TESTS.format(count=count, failures=failures))
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        ["bash", str(SCRIPT), "-q", "-n", "2"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stdout
    assert {each.read_text() for each in tmp_path.glob("tried-*")} == {str(tries)}
    assert f"{count} failed, 1 passed" in done.stdout
    _, told, names = done.stdout.rpartition("and passed alone:\n")
    assert bool(told) == (status == 0)
    if told:
        assert sorted(names.splitlines()) == [f"test_odd.py::test_unsure[{number}]" for number in range(count)]


def test_a_file_that_cannot_be_imported_gets_none(tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_odd.py").write_text("import nothing_of_this_name\n")
    done = subprocess.run(["bash", str(SCRIPT)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "once more" not in done.stdout
