"""The ``clearsep`` command in this process or in one of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import clearsep

COMMAND = Path(sys.executable).parent / "clearsep"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Exit code and output of a command."""

    code: int
    out: str
    err: str

    def document(self) -> Any:
        """The one JSON document on standard output, with nothing before or after it."""
        assert self.code == 0, self.err
        return json.loads(self.out)

    def error(self) -> str:
        """The one line of an error in the command or its input."""
        assert (self.code, self.out) == (2, "")
        (line,) = self.err.splitlines()
        assert line.startswith("error: ")
        assert "Traceback" not in line
        return line


Cli = Callable[..., Outcome]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs the entry point in this process, on a terminal of some width."""

    def call(*words: object, columns: int = 1000) -> Outcome:
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("NO_COLOR", "1")
        return call_here(monkeypatch, capsys, *words)

    return call


def call_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> Outcome:
    """Runs the entry point in this process."""
    monkeypatch.setattr(sys, "argv", ["clearsep", *map(str, words)])
    capsys.readouterr()
    code: object = 0
    try:
        clearsep.main()
    except SystemExit as left:
        code = left.code or 0
    output = capsys.readouterr()
    assert isinstance(code, int)
    return Outcome(code=code, out=output.out, err=output.err)


def spawn(*words: object) -> Outcome:
    """Runs the installed command in a process of its own, its output a pipe."""
    done = subprocess.run(
        [COMMAND, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"NO_COLOR": "1"},
    )
    return Outcome(code=done.returncode, out=done.stdout, err=done.stderr)
