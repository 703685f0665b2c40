"""Files, functions and constructors stay small enough to read at once."""

import ast

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_CONSTRUCTOR_ARGUMENTS = 6

# "path" or "path::function", each with its reason.
EXCEPTIONS: dict[str, str] = {"src/corolla/errors.py": "every way to fail, on one page"}


def test_files_functions_and_constructors_are_small(root):
    found = {}
    for folder in ("src", "tests", "bench", "docs"):
        for path in (root / folder).rglob("*.py"):
            found |= too_large(path.relative_to(root).as_posix(), path.read_text(encoding="utf-8"))
    assert {name: size for name, size in found.items() if name not in EXCEPTIONS} == {}
    assert not EXCEPTIONS.keys() - found.keys(), "exceptions that are no longer needed"


def too_large(path: str, source: str) -> dict[str, str]:
    found = {}
    if (lines := source.count("\n")) > MAX_FILE_LINES:
        found[path] = f"{lines} lines"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            arguments = len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs) - 1
            if lines > MAX_FUNCTION_LINES:
                found[f"{path}::{node.name}"] = f"{lines} lines"
            if node.name == "__init__" and arguments > MAX_CONSTRUCTOR_ARGUMENTS:
                found[f"{path}::{node.name}"] = f"{arguments} arguments"
    return found


def test_the_rule_notices_what_is_too_large():
    assert too_large("a", "\n" * 401) == {"a": "401 lines"}
    assert too_large("a", "def f():\n" + "    1\n" * 60) == {"a::f": "61 lines"}
    assert too_large("a", "def __init__(self, a, b, c, *, d, e, f, g): ...") == {"a::__init__": "7 arguments"}
