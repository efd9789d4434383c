"""Files and functions stay small, and public functions say what they take and give."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "trl_dynamics"
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_FILE, MAX_FUNCTION = 400, 60
# Each a list of steps that reads best in one piece.
LONG_FUNCTIONS = {"akg/gram/products.py:gram", "probing/build.py:build"}


def functions(source: str) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, bool]]:
    """Every function with whether it is public: its name and those of the classes around it have no underscore, and
    it is not inside a function."""

    def visit(body: list[ast.stmt], public: bool) -> Iterator:
        for node in body:
            if isinstance(node, ast.ClassDef):
                yield from visit(node.body, public and not node.name.startswith("_"))
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield node, public and not node.name.startswith("_")
                yield from visit(node.body, False)

    return visit(ast.parse(source).body, True)


def long_functions(source: str) -> list[str]:
    return [node.name for node, _ in functions(source) if node.end_lineno - node.lineno + 1 > MAX_FUNCTION]


def not_annotated(source: str) -> list[str]:
    """Public functions without a type for every named argument and for what they return."""
    found = []
    for node, public in functions(source):
        named = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        missing = [arg.arg for arg in named if arg.annotation is None and arg.arg not in ("self", "cls")]
        if public and (missing or node.returns is None):
            found.append(node.name)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_are_small_and_annotated(path):
    source = path.read_text()
    name = path.relative_to(PACKAGE).as_posix()
    assert len(source.splitlines()) <= MAX_FILE
    assert {f"{name}:{function}" for function in long_functions(source)} == {
        known for known in LONG_FUNCTIONS if known.startswith(f"{name}:")
    }
    assert not_annotated(source) == []


def test_the_guards_see_what_they_guard():
    long = "def f() -> None:\n" + "    pass\n" * MAX_FUNCTION
    assert long_functions(long) == ["f"] and long_functions("class A:\n    def f(self):\n        pass") == []
    assert not_annotated(
        "def f(a) -> int: ...\ndef g(a: int): ...\ndef _h(a): ...\nclass _A:\n    def f(self): ..."
    ) == ["f", "g"]
    assert not_annotated("class A:\n    def f(self, *, b) -> None: ...") == ["f"]
