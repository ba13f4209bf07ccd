"""The documentation agrees with the program: generated pages, names of tests, links."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from tools.docs import DOCS, PAGES, ROOT


@pytest.mark.parametrize("name", PAGES)
def test_generated_pages_are_those_of_the_program(name: str) -> None:
    written = (ROOT / name).read_text(encoding="utf-8")
    assert written == PAGES[name](), f"{name} differs from the program; run: python -m tools.docs --write"


def test_every_command_has_its_section() -> None:
    page = PAGES["docs/commands.md"]()
    for name in ("streamchat replay", "streamchat sessions import", "streamchat doctor"):
        assert re.search(rf"^#+ {name}$", page, re.MULTILINE)


def test_the_man_page_is_installed_and_reads_well() -> None:
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]["targets"]
    assert wheel["wheel"]["shared-data"] == {"man/streamchat.1": "share/man/man1/streamchat.1"}
    assert "man" in wheel["sdist"]["include"]
    groff = shutil.which("groff")
    if groff is None:
        pytest.skip("groff is not installed")
    command = [groff, "-man", "-ww", "-Tutf8", "-P-cbou", str(ROOT / "man" / "streamchat.1")]
    done = subprocess.run(command, capture_output=True, timeout=60, check=True)
    assert done.stderr == b""
    text = done.stdout.decode()
    for part in ("--template-arg NAME=VALUE", "streamchat sessions export", "/think [on|off]", "EXIT STATUS"):
        assert part in text, part


def test_every_test_named_in_the_docs_exists() -> None:
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", (DOCS / "robustness.md").read_text(encoding="utf-8"))
    assert len(named) > 60
    for file, test in named:
        [path] = (ROOT / "tests").rglob(file)
        source = path.read_text(encoding="utf-8")
        assert re.search(rf"^(async )?def {test}\(", source, re.MULTILINE), f"tests/{file} has no {test}"


def test_every_source_named_in_the_docs_and_tools_exists() -> None:
    generated = {DOCS / "robustness.md"}  # its tests are checked above
    pages = {ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.glob("*.md")} - generated
    named = 0
    for page in sorted(pages | set((ROOT / "tools").rglob("*.py"))):
        text = page.read_text(encoding="utf-8")
        for path in re.findall(r"`((?:streamchat|tests|tools)/[\w/.]*\w)/?`", text):
            assert (ROOT / path).exists(), f"{page.name} names {path}"
            named += 1
        for module in re.findall(r"python -m ((?:streamchat|tests|tools)\.[a-z_.]*[a-z_])\b", text):
            path = module.replace(".", "/")
            assert (ROOT / path).is_dir() or (ROOT / f"{path}.py").is_file(), f"{page.name} names {module}"
            named += 1
    assert named > 40


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted(DOCS.glob("*.md"))], ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\((?!https?://|#)([^)#\s]+)", text):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
