"""The pages for contributors are right: commands, targets, files, code, links, and the exercise of the first hour."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from streamchat import __version__

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CONTRACT: dict[str, Any] = next(c for c in PROJECT["tool"]["importlinter"]["contracts"] if c["type"] == "layers")
DOOR = ("CONTRIBUTING.md", "SECURITY.md", "docs/index.md", "docs/install.md", "docs/architecture.md", "docs/words.md")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
SCRIPTS = {
    "CONTRIBUTING.md": CONTRIBUTING,
    "Makefile": MAKEFILE,
    ".ci/check": (ROOT / ".ci" / "check").read_text(encoding="utf-8"),
}
PATH = r"(?:streamchat|tests|tools|docs|\.ci|\.github)/[\w./-]*\w"


NOT_CODE = {"DynamicCache", "position_ids", "Literal", "py", "toml", "md"}
"""Names from transformers and typing, and endings of file names."""


def targets() -> set[str]:
    """Targets of the Makefile."""
    return set(re.findall(r"^([a-z]+):", MAKEFILE, re.MULTILINE))


def anchors(page: Path) -> set[str]:
    """Names by which links reach the headings of a page, formed as GitHub does."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", ["README.md", *DOOR])
def test_links_lead_to_a_file_and_a_heading(name: str) -> None:
    page = ROOT / name
    for target, anchor in re.findall(r"\]\((?!https?://)([^)#\s]*)#?([^)\s]*)\)", page.read_text(encoding="utf-8")):
        linked = page.parent / target if target else page
        assert linked.exists(), f"{name} links to {target}"
        assert not anchor or anchor in anchors(linked), f"{name} links to {target}#{anchor}"


def test_the_index_has_every_page_with_a_line_about_it() -> None:
    listed = dict(
        re.findall(r"^\| \[[^]]+\]\(([^)]+)\) \| (.+) \|$", (DOCS / "index.md").read_text(encoding="utf-8"), re.M)
    )
    pages = {page.name for page in DOCS.glob("*.md")} - {"index.md"}
    assert pages <= set(listed)
    assert all(len(about) > 20 for about in listed.values())


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "SECURITY.md", "docs/architecture.md"])
def test_named_files_exist(name: str) -> None:
    named = re.findall(rf"`({PATH})`", (ROOT / name).read_text(encoding="utf-8"))
    missing = [path for path in named if not (ROOT / path).exists()]
    assert not missing, f"{name} names {missing}"


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_named_code_exists(name: str) -> None:
    """Classes, functions, and fields in backticks; `Owner.name` must be in that class if there is a class `Owner`."""
    defined = _defined()
    text = (ROOT / name).read_text(encoding="utf-8")
    named = re.findall(r"`(?:(\w+)\.)?(\w*[a-z]\w*)(?:=\w+|\([\w, ]*\))?`", text)
    code = [(owner, word) for owner, word in named if (owner or re.search("[A-Z_]", word)) and word not in NOT_CODE]
    assert code
    missing = [f"{owner}.{word}" for owner, word in code if word not in defined.get(owner, defined[""])]
    assert not missing, f"{name} names {missing}"


def test_the_drawing_has_the_layers_of_the_contract() -> None:
    """From top to bottom; packages in one layer of the contract may be on several lines."""
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    drawing = text.split("## Layers")[1].split("```")[1]
    drawn = re.findall(r"\w+", " ".join(re.findall(r"^ (\w+(?: \| \w+)*)  ", drawing, re.MULTILINE)))
    layers = [set(re.findall(r"streamchat\.(\w+)", layer)) for layer in CONTRACT["layers"]]
    level = {package: place for place, layer in enumerate(layers) for package in layer}
    assert {path.parent.name for path in (ROOT / "streamchat").glob("*/__init__.py")} == set(drawn) == set(level)
    assert [level[package] for package in drawn] == sorted(level.values())


@pytest.mark.parametrize("name", SCRIPTS)
def test_modules_and_test_files_of_commands_exist(name: str) -> None:
    for module in re.findall(r"python\)? -m ([\w.]+)", SCRIPTS[name]):
        assert find_spec(module) is not None, f"{name} runs {module}"
    for path in re.findall(PATH, SCRIPTS[name]):
        assert (ROOT / path).exists(), f"{name} names {path}"


def test_make_targets_are_explained_and_exist() -> None:
    phony = set(re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)[0].split())
    assert targets() == phony
    assert set(re.findall(r"^([a-z]+): ## \w", MAKEFILE, re.MULTILINE)) == targets()
    template = (ROOT / ".github" / "pull_request_template.md").read_text(encoding="utf-8")
    used = set(re.findall(r"(?:`|^)make ([a-z]+)", CONTRIBUTING + template, re.MULTILINE))
    assert {"check", "test", "lint", "docs", "pictures"} <= used <= targets()


def test_make_check_and_hosted_checks_run_one_list() -> None:
    assert "bash .ci/check" in MAKEFILE
    assert "bash .ci/check" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    assert "run: bash .ci/run" in workflow
    versions = re.search(r"python: \[(.*)\]", workflow)
    assert versions is not None
    supported = {line.rpartition(" :: ")[2] for line in PROJECT["project"]["classifiers"] if "Python :: 3." in line}
    assert {"3.11", "3.13"} == set(re.findall(r"[\d.]+", versions[1])) <= supported


def test_markers_are_explained() -> None:
    declared = {line.split(":")[0] for line in PROJECT["tool"]["pytest"]["ini_options"]["markers"]}
    table = CONTRIBUTING.split("| marker | tests |")[1].split("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) == declared


def test_extras_are_explained() -> None:
    table = (DOCS / "install.md").read_text(encoding="utf-8").split("| extra | adds |")[1].split("\n\n")[0]
    assert set(re.findall(r"^\| `([\w-]+)`", table, re.MULTILINE)) == set(PROJECT["project"]["optional-dependencies"])


def test_the_citation_is_of_this_version() -> None:
    citation = dict(re.findall(r"^([\w-]+): (.+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE))
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == __version__
    assert citation["license"] == PROJECT["project"]["license"]


@pytest.mark.slow
def test_the_default_model_marks_its_tests() -> None:
    found = _pytest(ROOT, "--collect-only", "-q", "-m", "model", "tests/benchmarks/test_perplexity.py")
    assert found.stdout.count("::test_") == 1, found.stdout


@pytest.mark.slow
def test_the_first_hour_goes_as_written(tmp_path: Path) -> None:
    """The sentence is in one place, its test fails after the change, and passes once it has the same change."""
    text = CONTRIBUTING.split("## Your first hour")[1].split("\n## ")[0]
    old, new = (re.search(pattern, text) for pattern in (r'grep -rn "(.*?)"', r"to `(is not .*?)`"))
    run = re.search(r'pytest (\S+) -k "(.*?)"', text)
    assert old
    assert new
    assert run
    for folder in ("streamchat", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "test_*"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / run[1]).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / run[1], tmp_path / run[1])
    assert [path.relative_to(ROOT).as_posix() for path in _with_sentence(ROOT / "tests", old[1])] == [run[1]]
    (source,) = _with_sentence(tmp_path / "streamchat", old[1])

    assert _pytest(tmp_path, run[1], "-k", run[2]).returncode == 0
    _change(source, old[1], new[1])
    failed = _pytest(tmp_path, run[1], "-k", run[2])
    assert failed.returncode == 1, failed.stdout
    assert "1 failed" in failed.stdout
    _change(tmp_path / run[1], old[1], new[1])
    passed = _pytest(tmp_path, run[1], "-k", run[2])
    assert passed.returncode == 0, passed.stdout
    assert "1 passed" in passed.stdout


def _defined() -> dict[str, set[str]]:
    """Names that the package and the tests define: all at "", and those in a class at the name of the class."""
    defined: dict[str, set[str]] = {"": set()}
    for path in (path for folder in ("streamchat", "tests") for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = {name for child in ast.iter_child_nodes(node) for name in _names_of(child)}
            defined[""] |= names
            if isinstance(node, ast.ClassDef):
                defined.setdefault(node.name, set()).update(names)
    return defined


def _names_of(node: ast.AST) -> list[str]:
    """Names that a definition or an assignment defines."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _with_sentence(folder: Path, sentence: str) -> list[Path]:
    """Return the Python files with the sentence, except this one; fail if a file has it on several lines."""
    files = [path for path in sorted(folder.rglob("*.py")) if sentence in path.read_text(encoding="utf-8")]
    files = [path for path in files if path.name != Path(__file__).name]
    assert all(path.read_text(encoding="utf-8").count(sentence) == 1 for path in files)
    return files


def _change(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")


def _pytest(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
