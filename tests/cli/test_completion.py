"""Completion with Tab in real shells, and the scripts for them. A shell that is not installed is skipped."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pexpect
import pytest

from streamchat.cli.parser import COMMANDS
from streamchat.commands.completion import SHELLS
from tests.support.program import run
from tests.support.saved_sessions import stored

ROOT = Path(__file__).parents[2]
LINES = [
    ("streamchat comp", "streamchat completion"),
    ("streamchat completion f", "streamchat completion fish"),
    ("streamchat --max-new", "streamchat --max-new-tokens"),
    ("streamchat --evict key", "streamchat --evict key-diversity"),
    ("streamchat --model pythia-12b-d", "streamchat --model pythia-12b-deduped"),
    ("streamchat config --config some", "streamchat config --config some.toml"),
    ("streamchat sessions sh", "streamchat sessions show"),
]


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Put a `streamchat` into the search path and a file into the folder; return the id of a saved session."""
    file = tmp_path / "bin" / "streamchat"
    file.parent.mkdir()
    file.write_text(f'#!/bin/sh\nexec {sys.executable} -m streamchat "$@"\n')
    file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{file.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    Path("some.toml").write_text("[streamchat]\n")
    return stored("The sea")


def require(shell: str) -> str:
    path = shutil.which(shell)
    if path is None:
        pytest.skip(f"{shell} is not installed")
    return path


def lines_with(session: str) -> list[tuple[str, str]]:
    return [*LINES, (f"streamchat --resume {session[:-2]}", f"streamchat --resume {session}")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shell", "options", "start"),
    [
        ("bash", ["--norc", "--noprofile", "-i"], "bind 'set enable-bracketed-paste off'; PS1='> '"),
        ("zsh", ["-f", "-i"], "unsetopt zle_bracketed_paste PROMPT_SP; PS1='> '; autoload -U compinit; compinit -u -D"),
    ],
)
def test_tab_completes_the_word(program: str, shell: str, options: list[str], start: str) -> None:
    env = {**os.environ, "TERM": "dumb", "INPUTRC": "/dev/null"}
    child = pexpect.spawn(require(shell), options, timeout=30, dimensions=(50, 200), env=env, encoding="utf-8")
    child.sendline(f'{start}; eval "$(streamchat completion {shell})"; echo re""ady')
    child.expect("ready\r")
    for typed, whole in lines_with(program):
        child.sendline(f"echo be''gin {len(typed)}")
        child.expect(f"begin {len(typed)}\r")
        child.send(f"{typed}\t")
        child.expect(re.escape(whole.removeprefix("streamchat ")))
        child.sendcontrol("u")
    child.close(force=True)


@pytest.mark.slow
def test_fish_completes_the_word(program: str) -> None:
    asked = lines_with(program)
    ask = "; ".join(f"complete -C '{typed}'; echo next" for typed, _ in asked)
    command = [require("fish"), "--no-config", "-c", f"streamchat completion fish | source; {ask}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    for (_, whole), answer in zip(asked, done.stdout.split("next\n"), strict=False):
        assert [line.split("\t")[0] for line in answer.splitlines()] == [whole.rpartition(" ")[2]], answer
    assert "\tThe sea\n" in done.stdout  # the title explains the id of a session


@pytest.mark.slow
@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_is_one_that_the_shell_can_read(shell: str) -> None:
    done = run("completion", shell)
    assert (done.returncode, done.stderr) == (0, "")
    subprocess.run([require(shell), "-n"], input=done.stdout, text=True, check=True, timeout=60)


def test_a_shell_without_completion_is_one_sentence() -> None:
    done = run("completion", "ksh")
    assert done.returncode == 2
    assert done.stderr.startswith("streamchat: ksh is not valid for SHELL; did you mean zsh?")
    assert "arguments are required: SHELL" in run("completion").stderr


def test_nothing_of_it_is_imported_for_a_chat() -> None:
    code = "import sys; from streamchat.cli import main, parser; parser.parse([]); print('argcomplete' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.stdout == "False\n", done.stderr


def test_the_command_is_in_the_help() -> None:
    assert "completion" in COMMANDS
