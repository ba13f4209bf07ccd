"""What is not changed, because no test could or should notice it."""

from __future__ import annotations

import ast
import re

DECLARED = {"annotation", "returns", "decorator_list", "type_params"}
LOGGERS = {"_log", "log", "logger", "logging", "warnings"}
CLOCKS = {"perf_counter", "monotonic", "process_time", "thread_time"}
UNTESTABLE_KEYWORDS = {
    *("strict", "encoding", "slots", "frozen"),  # they state what is so anyway
    *("stacklevel", "daemon", "name", "repr"),  # for warnings, the end of the process, and debuggers
    "non_blocking",  # for speed
    "verbose",  # whether a tokenizer warns about long texts
    "device",  # there is one in the tests; those of tests/gpu need another
}
"""Keywords of calls that are neither left out nor changed."""


def is_excluded(parent: ast.AST, field: str, node: ast.AST) -> bool:
    """Return True for a node whose changes, and those of everything below it, are equivalent.

    These are docstrings, annotations, imports, `assert` (for the type checker), decorators, what is logged, the texts
    of errors, other texts of three words or more, `if TYPE_CHECKING`, `Literal`, the type in `cast`, `del` of a name,
    elapsed times (no test asserts one), and the keywords above.
    """
    return (
        field in DECLARED
        or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant | ast.JoinedStr))
        or isinstance(node, ast.Import | ast.ImportFrom | ast.Assert | ast.Global | ast.Nonlocal)
        or (isinstance(node, ast.If) and _name(node.test) == "TYPE_CHECKING")
        or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and _owner(node.value.func) in LOGGERS)
        or _is_text_of_an_error(parent, field, node)
        or _is_sentence(node)
        or (isinstance(node, ast.Subscript) and _name(node.value) == "Literal")
        or (isinstance(node, ast.keyword) and node.arg in UNTESTABLE_KEYWORDS)
        or (isinstance(node, ast.BinOp) and _is_clock(node.left))
        or (isinstance(node, ast.Delete) and all(isinstance(each, ast.Name) for each in node.targets))
        or (isinstance(parent, ast.Call) and _name(parent.func) in {"cast", "TypeVar", "getLogger"} and field == "args")
        or (isinstance(node, ast.Assign) and [_name(each) for each in node.targets] == ["__all__"])
    )


def may_be_left_out(word: ast.keyword) -> bool:
    """Return True for a keyword of a call that a change may leave out; also False for `**words`."""
    return word.arg is not None and word.arg not in UNTESTABLE_KEYWORDS


def _is_text_of_an_error(parent: ast.AST, field: str, node: ast.AST) -> bool:
    """Return True for a string that is given to something named Error, Refusal, or Warning."""
    if isinstance(parent, ast.Call) and field == "args" and isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp):
        name = _name(parent.func)
        return name.endswith(("Error", "Warning")) and _is_text(node)
    return False


def _is_sentence(node: ast.AST) -> bool:
    """Return True for a text that people read; its wording is free."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value.count(" ") >= 2 and len(re.findall("[A-Za-z]{2,}", node.value)) >= 3
    return False


def _is_clock(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and _name(node.func) in CLOCKS


def _is_text(node: ast.AST) -> bool:
    match node:
        case ast.JoinedStr() | ast.Constant(value=str()):
            return True
        case ast.BinOp():
            return _is_text(node.left) or _is_text(node.right)
    return False


def _name(node: ast.AST) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _owner(node: ast.AST) -> str:
    return _name(node.value) if isinstance(node, ast.Attribute) else ""
