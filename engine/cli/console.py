"""What all commands share: their common options, printing results, progress lines and connecting to Ray."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Annotated, Any

import rich.table
import typer
from rich.console import Console, ConsoleRenderable
from rich.highlighter import NullHighlighter
from rich.logging import RichHandler

_LOG_COLUMNS = 200
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one setting, such as distil.steps=200; repeatable."),
]
Out = Annotated[
    str, typer.Option("-o", "--out", help="Folder or s3:// address for the results; started again, it goes on there.")
]
ClassMap = Annotated[str | None, typer.Option(help="AudioSet's class_labels_indices.csv, for its segment CSV.")]
AudioRoot = Annotated[str | None, typer.Option(help="Where AudioSet's audio files are.")]
RetryFailed = Annotated[
    bool, typer.Option("--retry-failed", help="Try again the clips that failed as a whole, and only those.")
]
Address = Annotated[str | None, typer.Option(help="Ray cluster; default: RAY_ADDRESS, else a Ray of its own here.")]


class _PlainHandler(RichHandler):
    """Prints the message alone, without breaking its lines: a log is not a terminal."""

    def render(self, *, record: logging.LogRecord, traceback: Any, message_renderable: ConsoleRenderable) -> Any:  # noqa: ANN401 - rich's types
        return message_renderable


def show_progress() -> None:
    """Print the project's log messages on standard error, so that standard output holds the result alone."""
    console = Console(stderr=True, soft_wrap=True)
    handler = _PlainHandler(console=console, highlighter=NullHighlighter(), markup=False)
    for name in ("clearsep", "engine", "train", "tune", "cluster"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        logger.handlers = [handler]
        logger.propagate = False


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Ray for the length of a ``with`` block; what Ray prints goes to standard error too."""
    from cluster.session import connected as session

    with redirect_stdout(sys.stderr), session(address):
        yield


def print_result(tables: Callable[[], list[Any]], value: object, as_json: bool) -> None:
    """Print a result as tables, or as JSON and nothing else."""
    if as_json:
        sys.stdout.write(json.dumps(value, indent=2, allow_nan=False) + "\n")
        return
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:  # a log has no width: cells stay whole
        console = Console(width=_LOG_COLUMNS)
    for table in tables():
        shown = rich.table.Table(title=table.title, title_justify="left")
        for column in table.columns:
            shown.add_column(column, overflow="fold")
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)
