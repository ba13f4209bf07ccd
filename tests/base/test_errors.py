"""Texts of errors that streamchat did not write."""

from __future__ import annotations

import errno

import pytest
import torch

from streamchat.base.errors import (
    ConfigError,
    TurnError,
    describe_unexpected,
    first_line,
    limit_reached,
    reason_of,
    short,
)
from streamchat.base.out_of_memory import is_out_of_memory


@pytest.mark.parametrize(
    ("text", "line"), [("one", "one"), ("one\ntwo", "one"), ("\n  \n one \r\ntwo", "one"), ("", "ValueError")]
)
def test_the_first_line_of_an_error_is_the_first_that_says_something(text: str, line: str) -> None:
    assert first_line(ValueError(text)) == line


def test_an_unexpected_error_is_named_by_its_type_and_its_first_line() -> None:
    assert describe_unexpected(RuntimeError("no kernel\nBacktrace: ...")) == "RuntimeError: no kernel"
    assert describe_unexpected(MemoryError()) == "MemoryError"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"), True),
        (RuntimeError("std::bad_alloc"), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), True),
        (ImportError("libtorch_cpu.so: cannot open shared object file: No such file or directory"), False),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_errors_that_mean_that_memory_ran_out(error: BaseException, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


@pytest.mark.parametrize(
    ("error", "text", "code"),
    [
        (MemoryError(), "out of memory", 3),
        (OSError(errno.EMFILE, "Too many open files", "/a/module.py"), "ulimit -n", 1),
        (OSError(errno.ENFILE, "Too many open files in system"), "ulimit -n", 1),
        (RuntimeError("can't start new thread"), "ulimit -u", 1),
        (RuntimeError("The global thread pool has not been initialized.: ThreadPoolBuildError"), "ulimit -u", 1),
    ],
)
def test_a_limit_that_is_reached_is_one_sentence(error: BaseException, text: str, code: int) -> None:
    found = limit_reached(error)
    assert found is not None
    assert text in str(found)
    assert found.exit_code == code


def test_other_errors_reach_no_limit() -> None:
    assert limit_reached(OSError(errno.ENOENT, "No such file or directory")) is None
    assert limit_reached(RuntimeError("shapes differ")) is None


def test_the_reason_of_a_system_error_has_neither_number_nor_path() -> None:
    assert reason_of(PermissionError(errno.EACCES, "Permission denied", "/a/file")) == "Permission denied"
    assert reason_of(ValueError("embedded null byte")) == "embedded null byte"
    assert reason_of(OSError()) == "OSError"


def test_an_error_is_one_printable_line_whatever_it_repeats() -> None:
    error = ConfigError("a  b.toml: keys.\x1b[31mx\x07 is\n\tunknown\u2028\x85\ud800")
    assert str(error) == error.args[0] == "a  b.toml: keys.x is unknown \N{REPLACEMENT CHARACTER}"
    assert str(TurnError("a\nb")) == "a b"
    assert short(ValueError("a\x1b\n\ud800.")) == "a \N{REPLACEMENT CHARACTER}"
