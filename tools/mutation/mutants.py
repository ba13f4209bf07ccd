"""All mutants of a module: each is the module with one change."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tools.mutation.operators import replacements
from tools.mutation.rules import is_excluded

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Mutant:
    """One change. `number` is its place among all changes of the module; `function` is empty outside of functions.

    `line` is that of the changed node, and `statement` that of the statement that it belongs to.
    """

    path: str
    number: int
    line: int
    statement: int
    function: str
    text: str
    before: str
    after: str

    @property
    def package(self) -> str:
        """The package of streamchat that it is in."""
        return self.path.split("/")[1]

    def __str__(self) -> str:
        return f"{self.path}:{self.line} #{self.number}: {self.before} -> {self.after}"


@dataclass
class _Site:
    """A node with its place in the tree, its line, that of its statement, and the outermost function around it."""

    parent: ast.AST
    field: str
    index: int | None
    node: ast.AST
    line: int
    statement: int
    function: ast.FunctionDef | ast.AsyncFunctionDef | None
    name: str

    def put(self, node: ast.AST) -> None:
        if self.index is None:
            setattr(self.parent, self.field, node)
        else:
            getattr(self.parent, self.field)[self.index] = node


def mutants_of(path: str, source: str | None = None) -> list[Mutant]:
    """Return the mutants of a module, given by its path from the root of the repository."""
    source = (ROOT / path).read_text("utf-8") if source is None else source
    lines, found = source.splitlines(), []
    for number, (site, after) in enumerate(_changes(ast.parse(source))):
        text = lines[site.line - 1].strip()
        found.append(Mutant(path, number, site.line, site.statement, site.name, text, _shown(site.node), _shown(after)))
    return found


def mutated_tree(path: str, number: int) -> ast.Module:
    """Return the syntax tree of a module with one change; its line numbers are those of the module.

    Raises:
        IndexError: The module has fewer mutants.
    """
    tree = ast.parse((ROOT / path).read_text("utf-8"))
    for i, (site, after) in enumerate(_changes(tree)):
        if i == number:
            site.put(after)
            return ast.fix_missing_locations(tree)
    raise IndexError(f"{path} has no mutant {number}")


def _shown(node: ast.AST) -> str:
    if isinstance(node, ast.If | ast.While):
        return f"{'if' if isinstance(node, ast.If) else 'while'} {ast.unparse(node.test)}:"
    return ast.unparse(node)


def _changes(tree: ast.Module) -> Iterator[tuple[_Site, ast.AST]]:
    for site in _sites(tree, None, "", 1, 1):
        for after in replacements(site.node):
            yield site, after


def _sites(
    parent: ast.AST, function: ast.FunctionDef | ast.AsyncFunctionDef | None, name: str, line: int, statement: int
) -> Iterator[_Site]:
    """Yield all nodes below a node that may change, outer ones first."""
    for field, value in ast.iter_fields(parent):
        for index, node in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if not isinstance(node, ast.AST) or is_excluded(parent, field, node):
                continue
            at, inside, called = getattr(node, "lineno", line), function, name
            whole = at if isinstance(node, ast.stmt) else statement
            # Defaults and decorators of a function run when its module is imported.
            if function is None and field == "body" and isinstance(parent, ast.FunctionDef | ast.AsyncFunctionDef):
                inside, called = parent, f"{name}.{parent.name}".lstrip(".")
            if isinstance(node, ast.ClassDef) and function is None:
                called = f"{name}.{node.name}".lstrip(".")
            yield _Site(parent, field, index, node, at, whole, inside, called if inside else "")
            yield from _sites(node, inside, called, at, whole)
