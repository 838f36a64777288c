"""Whoever reads a public name of the package finds a sentence about it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "verl_m2po"
FILES = sorted(PACKAGE.rglob("*.py"))
# Bases whose methods say nothing of what a subclass of ours does; a Protocol says it of all its methods at once.
PLAIN_BASES = {"ABC", "NamedTuple", "Enum", "str", "BaseConfig"}


def undocumented(tree: ast.Module) -> Iterator[str]:
    """Yield public names without a docstring. What a method of another base class does, that class says."""
    if not ast.get_docstring(tree):
        yield "the module"
    yield from _undocumented(tree.body, "")


def _undocumented(body: list[ast.stmt], prefix: str) -> Iterator[str]:
    for node in body:
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or node.name.startswith("_"):
            continue
        if not ast.get_docstring(node):
            yield f"{prefix}{node.name}"
        if isinstance(node, ast.ClassDef) and {ast.unparse(base) for base in node.bases} <= PLAIN_BASES:
            yield from _undocumented(node.body, f"{node.name}.")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_every_public_name_says_what_it_is(file):
    assert not list(undocumented(ast.parse(file.read_text())))


def test_the_check_can_fail():
    code = "def f(): pass\ndef _g(): pass\nclass C:\n  def m(self): pass\nclass D(C):\n  'D.'\n  def n(self): pass"
    assert list(undocumented(ast.parse(code))) == ["the module", "f", "C", "C.m"]
