"""Test files stand alone: what several of them use is in ``tests/support``."""

import ast
from pathlib import Path

TESTS = Path(__file__).parent


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            # `from tests import x` and `from support import x` name the module behind "import".
            yield from (f"{node.module or ''}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_no_test_file_imports_another():
    found = [
        f"{path.name}: {name}"
        for path in TESTS.rglob("*.py")
        for name in imported(path)
        if any(part.startswith("test_") or part == "conftest" for part in name.split(".")[:2])
        and (TESTS / f"{name.removeprefix('tests.').split('.')[0]}.py").is_file()
    ]
    assert not found


def test_only_tests_are_beside_support():
    assert {path.name for path in TESTS.glob("*.py") if not path.name.startswith("test_")} == {"conftest.py"}
