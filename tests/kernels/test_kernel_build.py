"""The compiled kernels are built and checked once, and do not stop the program if that fails."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from streamchat.base import paths
from streamchat.kernels import build, library, platforms, sealed
from streamchat.kernels.build import KernelsUnavailableError
from streamchat.kernels.library import load_kernels, why_unavailable
from streamchat.models.load import load_model
from tests.support.kept_objects import compiler_that_keeps
from tests.support.kernels import QUICK_FLAGS, needs_kernels
from tests.support.models_help import save, tiny_llama

PRODUCT_FLAGS = build.FLAGS


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache folder, and nothing loaded yet; returns where the kernels will be."""
    monkeypatch.setenv("STREAMCHAT_HOME", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(build, "FLAGS", QUICK_FLAGS)
    monkeypatch.setattr(library, "_loaded", functools.cache(library._loaded.__wrapped__))
    return paths.cache_dir() / "kernels"


@pytest.fixture(scope="module")
def _keeping(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Sequence[str], Path], None]:
    return compiler_that_keeps(tmp_path_factory.mktemp("objects"))


@pytest.fixture
def kept_objects(_keeping: Callable[[Sequence[str], Path], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Only sources that no test has compiled yet are compiled."""
    monkeypatch.setattr(build, "_compile", _keeping)


def compiler(folder: Path, body: str) -> str:
    """A program in the place of a compiler."""
    path = folder / "fakecc"
    path.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


@pytest.mark.slow
@needs_kernels
def test_they_are_compiled_once(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "FLAGS", PRODUCT_FLAGS)
    made = build.library().path
    assert made.parent == fresh
    assert [path.name for path in fresh.iterdir()] == [made.name]
    monkeypatch.setattr(build, "_compile", lambda *_: pytest.fail("compiled again"))
    assert build.library().path == made
    assert load_kernels("auto") is not None


@pytest.mark.slow
@needs_kernels
def test_cc_may_have_words_of_its_own(fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gcc = build.find_compiler()[0]
    monkeypatch.setenv("CC", compiler(tmp_path, 'test "$1" = --through && shift && exec "$@"') + f" --through {gcc}")
    assert build.library().path.is_file()
    monkeypatch.setenv("CC", "no-such-compiler -m64")
    with pytest.raises(KernelsUnavailableError, match=r"no-such-compiler.*gcc"):
        build.library()


@pytest.mark.slow
@needs_kernels
def test_they_are_used_also_where_new_files_are_writable_by_a_group(fresh: Path) -> None:
    before = os.umask(0o002)
    try:
        assert build.library().path.stat().st_mode & 0o777 == 0o700
        assert build.library().path.is_file()
    finally:
        os.umask(before)


@needs_kernels
def test_other_sources_another_compiler_or_processor_make_another_library(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gcc = build.find_compiler()
    first = build._digest(gcc)
    assert build._digest(gcc) == first
    assert build._digest([compiler(tmp_path, "true")]) != first
    with monkeypatch.context() as patch:
        patch.setattr(platforms, "processor_features", lambda: "another one")
        assert build._digest(gcc) != first
    sources = tmp_path / "source"
    sources.mkdir()
    for path in build.SOURCES.iterdir():
        (sources / path.name).write_bytes(path.read_bytes() + (b"\n" if path.name == "common.h" else b""))
    monkeypatch.setattr(build, "SOURCES", sources)
    assert build._digest(gcc) != first


def test_without_a_compiler_the_reason_is_told_and_models_run(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert load_kernels("auto") is None
    assert "gcc" in why_unavailable("auto")
    save(tiny_llama(), tmp_path / "model")
    loaded = load_model(str(tmp_path / "model"), device="cpu", weights="int8")
    assert loaded.weights == "int8"
    assert not fresh.exists()


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("echo 'x.c:1: error: no such luck' >&2; exit 1", "no such luck"),
        ("exit 0", "cannot be stored"),  # says that it worked, and made nothing
        ("while [ $# -gt 1 ]; do shift; done; echo rubbish > $1", "failed its check"),
    ],
)
def test_a_compiler_that_fails_is_told(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: str, reason: str
) -> None:
    monkeypatch.setenv("CC", compiler(tmp_path, body))
    with pytest.raises(KernelsUnavailableError, match=reason):
        build.library()
    assert not list(fresh.iterdir())
    assert load_kernels("auto") is None


@pytest.mark.slow
@needs_kernels
@pytest.mark.usefixtures("kept_objects")
@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("attention.c", "x[d] * cos[d] - x[d + half] * sin[d]", "x[d] * cos[d] + x[d + half] * sin[d]"),
        ("attention.c", "total += share * sum[at];", "total += sum[at];"),
        ("round.h", "float sum = scale * (float)(", "float sum = (float)("),
        ("tiles.h", "(Scales){floats_of_halves(at + 2 * row),", "(Scales){floats_of_halves(at - 32 + 2 * row),"),
        ("tiles.h", "floats_of_halves(at + 2 * (TILE + row)) : all", "floats_of_halves(at + 2 * row) : all"),
        ("tiles.h", "to_floats(ints_of_bytes(at + TILE + row))", "to_floats(ints_of_bytes(at + row))"),
        ("tiles.h", "ints_of_signed(at + TILE * part + row)", "ints_of_signed(at + row)"),
        ("tiles.h", "-floats_of_halves(header + 2 * (TILE + row))", "-floats_of_halves(header + 2 * row)"),
        ("dequantize.c", "column / 2 % 2 ? 4 : 0", "0"),
        ("dequantize.c", "at[TILE * part + row]", "at[row]"),
        ("tiles.h", "32 * (4 * i + j) + 2 * row", "32 * (4 * j + i) + 2 * row"),
        (
            "tiles.h",
            "scale, to_floats(lane_sums(sums[n])) * all_floats(x_scales[n])",
            "scale, to_floats(lane_sums(sums[n]))",
        ),
        ("span.h", "sum[i] = sum[i] * fade + total;", "sum[i] = sum[i] + total;"),
        ("rows.c", "if (n->bias)", "if (0)"),
        ("rows.c", "EACH(gelu_tanh(x[i]));", "EACH(gelu(x[i]));"),
        ("rows.c", "return x < 0.0f ? 0.0f : x;", "return x;"),
        ("rows.c", "EACH(relu(x[i]) * relu(x[i]));", "EACH(relu(x[i]));"),
        ("rows.c", "EACH(capped(x[i], softcap));", "break;"),
        ("common.h", "return cap * __builtin_copysignf", "return __builtin_copysignf"),
        ("common.h", "size + 0x38800000u) - 0x1p-14f", "size + 0x38800000u)"),
        ("common.h", "bits_of(float_of(size) + 0.5f) - 0x3f000000u", "0x3c00u"),
        ("products.c", "if (p->more)", "if (0)"),
        ("products.c", "p->added_norm.weight ? to : added, p->added_scale", "added, p->added_scale"),
        ("products.c", "p->more + (first + n) * columns, p->added_scale", "p->more + (first + n) * columns, 1.0f"),
        ("products.c", "to : added, p->added_scale", "to : added, 1.0f"),
        ("products.c", "m->format == FLOAT16", "0"),
        ("attention.c", "else if (format == FLOAT16) {", "else if (0) {"),
        ("attention.c", "source * a->key_stride", "source * a->value_stride"),
        ("attention.c", "source * a->value_stride", "source * a->key_stride"),
        ("attention.c", "h / copies * a->query_stride", "(long)h / copies * a->num_kv_groups * a->head_dim"),
        ("attention.c", "copies = a->repeats + 1", "copies = 1"),
        ("attention.c", "source = h / (a->repeats + 1)", "source = h"),
        ("attention.c", "a->is_interleaved ? rotate_pairs : rotate", "rotate"),
        ("attention.h", "a->window && stop > a->window", "0"),
        ("attend_many.c", "first + j < b->starts[n]", "0"),
        ("attend_many.c", "if (a->softcap > 0.0f)", "if (0)"),
        ("attend_many.c", "if (format == FLOAT16)", "if (0)"),
        ("attend_many.c", "if (has_scales(format))", "if (0)"),
        ("attend_codes.c", "ZERO * sum : 0;\n    }\n    for (int p", "0 : 0;\n    }\n    for (int p"),
        ("attend_codes.c", "to[n] * fade[i] + scale", "to[n] + scale"),
        ("attend_codes.c", "memcpy(padded, row + at", "memcpy(padded, row"),
        ("attend_codes.c", "done += TOGETHER", "done += 100"),
        ("codes.h", "__builtin_rintf(x[d] * inverse)", "x[d] * inverse"),
        ("codes.h", "bits + 0xffffu", "bits"),
        ("attention.c", "a->clip <= 0.0f", "1"),
        ("attention.c", "if (cap > 0.0f)", "if (0)"),
        ("attention.c", "index * a->norm_stride", "0"),
        ("attention.c", "a->norms_whole ?", "0 ?"),
        ("attention.c", "done += MAX_QUERIES", "done += 100"),
        ("moves.c", "TO_ORIGINALS = -1", "TO_ORIGINALS = 2"),
        ("moves.c", "x += m->first_dim;", ""),
        ("moves.c", "if (m->is_interleaved)", "if (0)"),
        ("team.c", "team.tasks - (int)left, team.threads", "0, team.threads"),
        ("run.c", "for (long i = 0;", "*(volatile int *)0 = 1; for (long i = 0;"),  # crashes
    ],
)
def test_kernels_that_compute_something_else_are_refused(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, file: str, old: str, new: str
) -> None:
    sources = tmp_path / "source"
    sources.mkdir()
    for path in build.SOURCES.iterdir():
        text = path.read_text(encoding="utf-8")
        if path.name == file:
            assert old in text
            text = text.replace(old, new)
        (sources / path.name).write_text(text, encoding="utf-8")
    monkeypatch.setattr(build, "SOURCES", sources)
    with pytest.raises(KernelsUnavailableError, match="failed its check"):
        build.library()
    assert not list(fresh.iterdir())


@pytest.mark.slow
@needs_kernels
@pytest.mark.usefixtures("kept_objects")
def test_a_folder_that_others_can_write_is_refused_at_the_first_start_too(fresh: Path) -> None:
    fresh.mkdir(parents=True)
    for mode in (0o777, 0o770):
        fresh.chmod(mode)
        with pytest.raises(KernelsUnavailableError, match="writable by others"):
            build.library()
        assert not list(fresh.iterdir())
    fresh.chmod(0o700)
    assert build.library().path.is_file()
    fresh.chmod(0o777)
    with pytest.raises(KernelsUnavailableError, match="writable by others"):
        build.library()


@pytest.mark.slow
@needs_kernels
@pytest.mark.usefixtures("kept_objects")
def test_a_folder_above_may_be_writable_by_a_group(fresh: Path) -> None:
    """As folders are where the umask is 002."""
    fresh.parent.mkdir(parents=True)
    fresh.parent.chmod(0o775)
    assert build.library().path.is_file()


def zero_tail(content: bytes) -> bytes:
    return content[: len(content) // 2] + bytes(len(content) - len(content) // 2)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "one byte": lambda content: b"x",
    "cut": lambda content: content[:5000],
    "without its end": lambda content: content[:-1],
    "a zeroed tail": zero_tail,
    "all zeros": lambda content: bytes(len(content)),
    "another bit": lambda content: content[:9000] + bytes([content[9000] ^ 1]) + content[9001:],
    "more": lambda content: content + b"x",
    "rubbish": lambda content: b"rubbish" * 1000,
}


@pytest.mark.slow
@needs_kernels
@pytest.mark.usefixtures("kept_objects")
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_library_is_made_again(fresh: Path, whole: bytes, damage: str) -> None:
    """Loaded as they are, these end the process (SIGBUS, SIGSEGV), or turn the kernels off for good."""
    path = build.library_path()
    path.parent.mkdir(parents=True, mode=0o700)
    damaged = DAMAGE[damage](whole)
    path.write_bytes(damaged)
    path.chmod(0o700)
    assert build.library().path == path
    assert path.read_bytes()[:4] == whole[:4]
    assert path.read_bytes() != damaged
    assert load_kernels("auto") is not None
    assert [each.name for each in fresh.iterdir()] == [path.name]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The contents of an undamaged library."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STREAMCHAT_HOME", str(tmp_path_factory.mktemp("whole")))
        patch.delenv("CC", raising=False)
        patch.setattr(build, "FLAGS", QUICK_FLAGS)
        return build.library().path.read_bytes()


@pytest.mark.slow
@needs_kernels
def test_what_is_not_our_file_is_made_again(
    fresh: Path, whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link, a pipe, a file that others may write, a library of other sources under this name."""
    path = build.library_path()
    path.parent.mkdir(parents=True, mode=0o700)
    elsewhere = tmp_path / "elsewhere.so"
    elsewhere.write_bytes(whole)
    made: list[Path] = []

    def compiled(_: object, to: Path) -> None:
        made.append(to)
        to.write_bytes(whole[:-32])

    monkeypatch.setattr(build, "_compile", compiled)
    path.symlink_to(elsewhere)
    assert build.library().path.is_file()
    assert not path.is_symlink()
    path.unlink()
    os.mkfifo(path)
    assert build.library().path.is_file()
    path.chmod(0o777)
    build.library()
    assert path.stat().st_mode & 0o777 == 0o700
    assert len(made) == 3
    build.library()
    assert len(made) == 3
    descriptor = os.open(path, os.O_RDWR | os.O_TRUNC)
    os.write(descriptor, whole[:-32])
    sealed.seal(descriptor, "another name")
    os.close(descriptor)
    build.library()
    assert len(made) == 4


@pytest.mark.slow
@needs_kernels
@pytest.mark.usefixtures("kept_objects")
def test_what_is_loaded_is_what_was_checked(fresh: Path, tmp_path: Path) -> None:
    """Also where somebody puts another file under the name in between."""
    made = build.library()
    made.path.unlink()
    made.path.write_bytes(b"not a library")
    assert made.load().run


@pytest.mark.slow
@needs_kernels
@pytest.mark.usefixtures("kept_objects")
def test_an_end_without_an_error_does_not_pass_the_check(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What runs in the place of the check may end well, and say so, without having looked at the kernels."""
    for body in ("exit 0", "seq 16", "echo ok"):
        monkeypatch.setattr("sys.executable", compiler(tmp_path, body))
        with pytest.raises(KernelsUnavailableError, match="did not run"):
            build.library()
        assert not list(fresh.iterdir())


@pytest.mark.slow
@needs_kernels
@pytest.mark.usefixtures("kept_objects")
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux")
def test_a_library_is_on_the_disk_before_it_has_its_name(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = []
    fsync, replace = os.fsync, Path.replace

    def note_sync(descriptor: int) -> None:
        order.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def note_replace(path: Path, to: Path) -> Path:
        order.append(("rename", str(path)))
        return replace(path, to)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "replace", note_replace)
    build.library()
    made = order[0][1]
    assert order == [("sync", made), ("rename", made), ("sync", str(fresh))]


@pytest.mark.slow
@needs_kernels
def test_two_processes_make_them_at_once(fresh: Path) -> None:
    code = (
        f"from streamchat.kernels import build, library; build.FLAGS = {QUICK_FLAGS}; "
        "assert library.load_kernels('auto'), library.why_unavailable('auto')"
    )
    running = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [each.wait(timeout=120) for each in running] == [0, 0]
    assert [path.name for path in fresh.iterdir()] == [build.library_path().name]
    assert load_kernels("auto") is not None


def test_a_compiler_is_looked_for_in_absolute_folders_only(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("gcc", "cc"):
        (tmp_path / name).write_text("#!/bin/sh\ntouch ran\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.chdir(tmp_path)
    for relative in (".", "", "./", "../" + tmp_path.name):
        monkeypatch.setenv("PATH", f"{relative}{os.pathsep}/nowhere")
        with pytest.raises(KernelsUnavailableError, match="no C compiler"):
            build.find_compiler()
    monkeypatch.setenv("CC", "./gcc -m64")  # named by the user
    assert build.find_compiler() == [str(tmp_path / "gcc"), "-m64"]


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "win32")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("started something"))
    with pytest.raises(KernelsUnavailableError, match="Linux"):
        build.library()


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="needs a folder that cannot be written to")
def test_a_folder_that_cannot_be_written_to_is_told(fresh: Path) -> None:
    fresh.parent.mkdir(parents=True)
    fresh.parent.chmod(0o500)
    with pytest.raises(KernelsUnavailableError, match="cannot be stored"):
        build.library()
