"""The command line: exit codes, what goes to stdout and what to stderr, what is imported."""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from streamchat import __version__
from streamchat.base.errors import ConfigError, ExitCode, ModelNotFoundError, StreamchatError, TurnError
from streamchat.cli import main as cli
from streamchat.cli import parser
from streamchat.cli.front_ends import choose_front_end
from streamchat.cli.output import output_folder
from streamchat.config import loader
from streamchat.config.render import render_toml
from streamchat.config.settings import setting_fields
from streamchat.telemetry.log_file import log_path
from tests.support.program import FACE, run


def said(result: subprocess.CompletedProcess[str]) -> str:
    """The one sentence on stderr."""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("streamchat: ")
    return lines[0].removeprefix("streamchat: ")


# --- wrong input: exit code 2 ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--cahce-size", "64"], "--cahce-size is not a flag; did you mean --cache-size?"),
        (["--cache-size", "many"], "--cache-size: cache_size must be a whole number"),
        (["--cache-size", "3"], "--cache-size: cache_size = 3 is not valid; it must be at least 16"),
        (["--cache-size"], "--cache-size: expected one argument"),
        (["verfy"], "verfy is not a command; did you mean verify?"),
        (["hello"], "hello is not a command; choose from serve, attach, web, replay, monitor, "),
        (["hello"], ", or give none to start a chat; see streamchat --help"),
        (["config", "stray"], "unexpected argument stray"),
        (["config", "--path", "--default"], "not allowed with"),
        (["--config", "missing.toml"], "missing.toml: no such configuration file"),
        (["--stats-json", "no/such/folder/x"], "stats_json = 'no/such/folder/x' cannot be written"),
    ],
)
def test_wrong_flags_are_one_sentence_and_2(arguments: list[str], sentence: str) -> None:
    result = run(*arguments)
    assert result.returncode == ExitCode.USAGE
    assert sentence in said(result)
    assert result.stdout == ""


@pytest.mark.parametrize("path", ["~nobody-here/x", "x" * 5000], ids=["home of nobody", "too long"])
@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["models", "PATH.gguf"], 3),
        (["verify", "--model", "PATH/more/more"], 3),
        (["--config", "PATH"], 2),
        (["--stats-json", "PATH"], 2),
        (["sessions", "import", "PATH"], 5),
        (["monitor", "PATH"], 5),
        (["replay", "PATH"], 2),
        (["replay", "--resume-run", "PATH"], 2),
        (["replay", "said.txt", "--out", "PATH/run", "--model", "./missing"], 2),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else None,
)
def test_paths_that_cannot_be_are_one_sentence(
    arguments: list[str], code: int, path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("said.txt").write_text("hello\n")
    if "--out" in arguments and path.startswith("~"):
        code = 3  # a folder of that name can be made; there is no model
    assert cli.main([word.replace("PATH", path) for word in arguments]) == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "unexpected" not in error


def test_huge_numbers_are_taken_or_refused(capsys: pytest.CaptureFixture[str]) -> None:
    many = "9" * 30
    assert cli.main(["sessions", "list", "--limit", many]) == 0
    Path("said.txt").write_text("hello\n")
    assert cli.main(["replay", "said.txt", "--max-turns", many, "--model", "./missing"]) == 3
    assert cli.main(["replay", "said.txt", "--repeat", "9" * 5000]) == 2
    assert "unexpected" not in capsys.readouterr().err


def test_wrong_variables_and_files_are_2() -> None:
    assert "STREAMCHAT_TEMPERATURE" in said(result := run(STREAMCHAT_TEMPERATURE="hot"))
    assert result.returncode == ExitCode.USAGE
    Path("config.toml").write_text("[streamchat]\nconfig_version = 1\n[keys]\nchat.stop = 'banana'\n")
    assert "'banana' is not a key name" in said(result := run())
    assert result.returncode == ExitCode.USAGE


def test_a_model_that_is_not_there_is_3() -> None:
    result = run("--model", "./missing", given="hi\n")
    assert result.returncode == ExitCode.MODEL
    assert "There is no folder 'missing'" in said(result)
    assert result.stdout == ""


# --- the chat through a pipe ------------------------------------------------------------------------------------


def test_replies_go_to_stdout_and_notices_to_stderr() -> None:
    scenario = {"replies": ["Paris."], "notes": [{"text": "a remark", "level": "warning"}]}
    result = run(scenario=scenario, given="capital?\n")
    assert (result.returncode, result.stdout) == (0, "Paris.\n")
    assert said(result) == "a remark"


def test_a_failed_turn_is_1_and_the_others_are_answered() -> None:
    scenario = {"replies": [{"text": "", "error": "it broke"}, "fine"]}
    result = run(scenario=scenario, given="one\ntwo\n")
    assert (result.returncode, result.stdout) == (1, "fine\n")
    assert "it broke" in said(result)


def test_a_line_without_an_end_is_left_out() -> None:
    result = run(scenario={}, given="x" * 5_000_000 + "\nhello\n")
    assert (result.returncode, result.stdout) == (1, "You said: hello\n")
    assert said(result) == "line 1 of the input is longer than 2.0 MB and was skipped"


def test_a_wrong_command_is_1() -> None:
    result = run(scenario={}, given="/nonsense\nhello\n")
    assert result.returncode == 1
    assert "/nonsense is not a command" in result.stderr
    assert result.stdout == "You said: hello\n"


def test_an_engine_that_fails_has_its_code() -> None:
    failure = {"title": "No model", "message": "no such model", "exit_code": 3}
    result = run(scenario={"load_failure": failure}, given="hi\n")
    assert (result.returncode, said(result)) == (3, "no such model")


def test_an_unexpected_error_names_the_log() -> None:
    result = run(scenario={"raise": True})
    assert result.returncode == ExitCode.FAILURE
    assert said(result) == f"unexpected RuntimeError: a bug in the program; the traceback is in {log_path()}"
    assert "RuntimeError: a bug" in log_path().read_text()


def test_too_many_open_files_are_one_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(argv: list[str]) -> int:
        raise OSError(24, "Too many open files", "/a/module.py")

    monkeypatch.setattr(cli, "_dispatch", full)
    assert cli.main([]) == ExitCode.FAILURE
    assert capsys.readouterr().err == (
        "streamchat: too many open files; raise the limit of this shell, for example with `ulimit -n 1024`\n"
    )


def test_debug_shows_the_traceback() -> None:
    result = run("--debug", scenario={"raise": True})
    assert result.returncode == ExitCode.FAILURE
    assert result.stderr.startswith("Traceback")


def test_ctrl_c_is_130() -> None:
    scenario = json.dumps({"loading": [], "replies": [{"text": "one two three", "hold_after": 2}]})
    child = subprocess.Popen(
        [sys.executable, str(FACE), scenario],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # a shell lets what it runs in the background ignore the signal, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(b"hi\n")
    child.stdin.flush()
    assert child.stdout.read(3) == b"one"
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=30)
    assert child.returncode == ExitCode.INTERRUPTED
    assert errors == b""


def test_a_reader_that_leaves_is_141() -> None:
    scenario = json.dumps({"loading": [], "replies": [{"text": "word " * 2_000, "tokens_per_s": 1_000}] * 3})
    command = f"printf 'a\\nb\\nc\\n' | {sys.executable} {FACE} '{scenario}' | head -c 10; echo ${{PIPESTATUS[1]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert result.stdout.split()[-1] == str(int(ExitCode.BROKEN_PIPE))
    assert result.stderr == ""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux only")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["models"], ["config"], []], ids=str)
def test_a_full_device_is_one_sentence(arguments: list[str], unbuffered: str) -> None:
    scenario = json.dumps({"loading": [], "replies": ["a reply"]})
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, str(FACE), scenario, *arguments],
            input="hello\n",
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )
    assert result.stderr == "streamchat: stdout cannot be written (No space left on device); the output is incomplete\n"
    assert result.returncode == ExitCode.FAILURE


@pytest.mark.parametrize("arguments", ["--version", "models"])
def test_a_closed_stdout_ends_nothing(arguments: str) -> None:
    command = f"{sys.executable} -m streamchat {arguments} >&-"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="Linux only")
@pytest.mark.parametrize("closed", ["0<&- 2>&-", "0<&- 1>&- 2>&-"])
def test_no_file_gets_the_number_of_a_closed_standard_stream(closed: str, tmp_path: Path) -> None:
    """Native libraries print into descriptors 1 and 2, whatever they are by then."""
    names = tmp_path / "names"
    program = (
        "import os, sys; from streamchat.cli.stdout import guarded_output\n"
        "with guarded_output() as _, open(sys.argv[1], 'w') as file:\n"
        "    file.write(' '.join(os.readlink(f'/proc/self/fd/{n}') for n in (0, 2)))"
    )
    subprocess.run(["bash", "-c", f"'{sys.executable}' -c \"$0\" {names} {closed}", program], check=True, timeout=60)
    assert names.read_text() == "/dev/null /dev/null"


def test_statistics_are_written_a_line_a_turn() -> None:
    result = run("--stats-json", "stats.jsonl", scenario={"replies": ["a b c", "d"]}, given="one\ntwo\n")
    assert result.returncode == 0
    records = [json.loads(line) for line in Path("stats.jsonl").read_text().splitlines()]
    assert [record["turn"] for record in records] == [1, 2]
    assert records[0]["new_tokens"] == 3


# --- what needs no model ----------------------------------------------------------------------------------------


def test_help_and_version() -> None:
    assert (result := run("--help")).returncode == 0
    for setting in setting_fields():
        assert loader.flag_of(setting) in result.stdout
    assert (result := run("--version")).returncode == 0
    assert result.stdout.startswith(f"streamchat {__version__} (Python 3.")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["config"], ["verify", "--help"]])
def test_what_needs_no_model_loads_nothing_heavy(arguments: list[str]) -> None:
    report = Path("modules.txt")
    run(*arguments, scenario={}, LOADED_MODULES=str(report))
    loaded = set(report.read_text().split()) if report.exists() else set()
    assert "streamchat.cli.main" in loaded
    assert not loaded & {"torch", "transformers", "textual", "prompt_toolkit"}


def test_config_prints_what_is_in_force(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "--cache-size", "64"]) == 0
    out = capsys.readouterr().out
    assert "# from --cache-size\ncache_size = 64" in out
    assert '# chat.stop = "escape"' in out
    assert cli.main(["config", "--default"]) == 0
    assert capsys.readouterr().out == render_toml()
    assert cli.main(["config", "--path"]) == 0
    assert capsys.readouterr().out.strip() == str(loader.user_file())


# --- small things -----------------------------------------------------------------------------------------------


class Stream(io.StringIO):
    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


@pytest.mark.parametrize(
    ("plain", "stdin", "stdout", "term", "face"),
    [
        (False, True, True, "xterm", "app"),
        (True, True, True, "xterm", "prompt"),
        (False, True, True, "dumb", "prompt"),
        (False, False, True, "xterm", "pipe"),
        (True, True, False, "xterm", "pipe"),
    ],
)
def test_the_face(plain: bool, stdin: bool, stdout: bool, term: str, face: str) -> None:
    assert choose_front_end(plain, Stream(stdin), Stream(stdout), {"TERM": term}) == face
    assert choose_front_end(plain, None, Stream(stdout), {"TERM": term}) == "pipe"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("x"), 2),
        (ModelNotFoundError("x"), 3),
        (TurnError("x"), 1),
        (StreamchatError("x"), 1),
        (KeyboardInterrupt(), 130),
        (SystemExit(7), 7),
        (SystemExit("text"), 0),
    ],
)
def test_exit_codes_of_errors(monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int) -> None:
    def fail(argv: list[str]) -> int:
        raise error

    monkeypatch.setattr(cli, "_dispatch", fail)
    assert cli.main([]) == code


def test_a_folder_with_the_home_of_an_unknown_user_is_taken_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert output_folder(argparse.Namespace(out="~nobody-of-this-name/run")) == Path("~nobody-of-this-name/run")
    assert (tmp_path / "~nobody-of-this-name" / "run").is_dir()


@pytest.mark.parametrize(
    "words",
    [[], ["--plain"], ["--model", "x", "--debug"], ["--resume"], ["--resume", "abc"], ["--no-history", "--seed=3"]],
)
def test_a_chat_is_parsed_alike_without_the_commands(words: list[str]) -> None:
    with_commands, _ = parser.build_parser()
    assert parser.parse(words) == with_commands.parse_args(words)
    assert parser.parse(words).command is None
