"""Pages and tables that benchmarks write, and their provenance: commit, date and hardware."""

from __future__ import annotations

import argparse
import datetime as dt
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.cli.display import MAX_MESSAGE, shown
from engine.storage.files import read_json, write_bytes, write_json

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "docs" / "results.md"


def log(text: str) -> None:
    """Print a line with the time."""
    print(f"[{dt.datetime.now():%H:%M:%S}] {shown(text, most=MAX_MESSAGE)}", flush=True)


def parser(documentation: str | None) -> argparse.ArgumentParser:
    """A command line whose help is a module's docstring."""
    return argparse.ArgumentParser(description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter)


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, whose cells may have other markup."""
    lines = [[shown(cell).replace("|", "\\|") for cell in cells] for cells in [columns, ["---"] * len(columns), *rows]]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def write_page(path: Path, title: str, *parts: str) -> None:
    """Write a page: title, then its parts."""
    write_bytes(path, ("\n\n".join([f"# {title}", *parts]) + "\n").encode())


def fill(page: Path, marker: str, text: str) -> None:
    """Replace the text between ``<!-- marker -->`` and ``<!-- /marker -->`` of a page.

    Raises ``ValueError`` for a page without these markers.
    """
    before, opened, rest = page.read_text().partition(f"<!-- {marker} -->")
    _, closed, after = rest.partition(f"<!-- /{marker} -->")
    if not (opened and closed):
        raise ValueError(f"{page} must have <!-- {marker} --> and <!-- /{marker} -->, got neither; add both")
    write_bytes(page, f"{before}{opened}\n{text}\n{closed}{after}".encode())


def spread(values: Sequence[float]) -> str:
    """Mean and range."""
    return f"{sum(values) / len(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def measured_once(path: Path, measure: Callable[[], Any]) -> Any:  # noqa: ANN401 - any JSON
    """The result of ``measure``, kept in a JSON file and read from there the next time."""
    if not path.is_file():
        log(f"measuring {path.stem}")
        write_json(path, measure())
    return read_json(path)


def commit() -> str:
    """Short hash of the commit that is checked out, or ``unknown``."""
    git = shutil.which("git")
    command = ["git", "rev-parse", "--short", "HEAD"]
    shown = git and subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    return shown or "unknown"


@contextmanager
def version_of(revision: str) -> Iterator[Path]:
    """A checkout of another commit of this project, for the length of a ``with`` block."""
    with tempfile.TemporaryDirectory() as folder:
        checkout = Path(folder) / "version"
        subprocess.run(["git", "worktree", "add", "-q", "--detach", str(checkout), revision], cwd=ROOT, check=True)
        try:
            yield checkout
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(checkout)], cwd=ROOT, check=True)


def hardware(gpu: str = "no GPU") -> str:
    """Date and machine of a table."""
    return f"{dt.date.today()}, {os.cpu_count()} CPU cores ({platform.machine()}), {gpu}."


def stamp() -> str:
    """Commit, date and hardware of a table."""
    return f"Commit {commit()}, {hardware()}"
