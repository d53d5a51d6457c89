"""The project's own files, parsed: what the tests of layers, words and sizes look at."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

from tests.support import ROOT

PACKAGES = ("cluster", "engine", "train", "tune")


def name_of(path: Path) -> str:
    """Path below the repository's root, as an id of a test."""
    return path.relative_to(ROOT).as_posix()


def files_of(*folders: str, suffix: str = ".py") -> list[Path]:
    """Files of some folders, sorted."""
    return [
        path
        for folder in folders
        for path in sorted((ROOT / folder).rglob(f"*{suffix}"))
        if "__pycache__" not in path.parts
    ]


SOURCES = [ROOT / "clearsep.py", *files_of(*PACKAGES)]
"""What is installed."""
BESIDES = files_of("benchmarks", "examples")
TESTS = files_of("tests")


@functools.cache
def parsed(path: Path) -> ast.Module:
    """Syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(tree: ast.AST) -> set[str]:
    """Dotted names of all that a module imports, anywhere in it; ``from a import b`` counts as a and a.b."""
    names = set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level and node.module, "the project imports by full names"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names
