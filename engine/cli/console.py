"""Shared by all commands: options, printing results, progress on standard error, exit codes, connecting to Ray."""

from __future__ import annotations

import _thread
import io
import json
import logging
import os
import signal
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from types import FrameType, TracebackType
from typing import Annotated, Any

import typer
import typer.core
from rich.console import ConsoleRenderable
from rich.highlighter import NullHighlighter
from rich.logging import RichHandler
from rich.text import Text

from engine.cli.display import MAX_MESSAGE, console, rich_table, shown
from engine.errors import INTERRUPT_HANDLED, DamagedError

_LOGGER = logging.getLogger(__name__)
_LOG_COLUMNS = 200
_LOOK_EVERY_S = 0.1
_UsageError: Any = typer.BadParameter.__base__  # which Typer does not export
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change one setting, such as distil.steps=200; repeatable. `clearsep settings` lists them.",
    ),
]
Out = Annotated[
    str, typer.Option("-o", "--out", help="Folder or s3:// address for the results; the same command resumes there.")
]
ClassMap = Annotated[str | None, typer.Option(help="AudioSet's class_labels_indices.csv, for its segment CSV.")]
AudioRoot = Annotated[str | None, typer.Option(help="Folder of the list's audio files; default: the list's own.")]
Columns = Annotated[
    str | None,
    typer.Option(metavar="NAME=COLUMN,...", help="The list's names of columns, such as path=fname,labels=tags."),
]
AllowOutside = Annotated[
    bool, typer.Option("--allow-outside", help="Also read files outside the list's folder (or --audio-root).")
]
RetryFailed = Annotated[bool, typer.Option("--retry-failed", help="Process only the failed clips again.")]
SliceOption = Annotated[
    str | None,
    typer.Option(
        "--slice", metavar="NUMBER/COUNT", help="Only this share of the pass, such as 3/32; the last to end closes it."
    ),
]
Address = Annotated[str | None, typer.Option(help="Ray cluster; default: RAY_ADDRESS, else a new Ray on this machine.")]
ESTIMATOR_HELP = "Folder of a calibrated estimator, such as RUN/estimator, which estimates each stem's SI-SDR."
SEPARATOR_HELP = "Separator: checkpoint folder, or package.module:factory for one of your own."


class _PlainHandler(RichHandler):
    """Prints ``level: message`` (the level from WARNING on), each on one line, as logs need it."""

    def render_message(self, record: logging.LogRecord, message: str) -> Text:
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        return Text(level + shown(message, most=MAX_MESSAGE))

    def render(self, *, record: logging.LogRecord, traceback: Any, message_renderable: ConsoleRenderable) -> Any:  # noqa: ANN401 - rich's types
        return message_renderable


def show_progress() -> None:
    """Print the project's log messages on standard error; standard output holds nothing but the result."""
    handler = _PlainHandler(console=console(stderr=True), highlighter=NullHighlighter())
    handler.console.soft_wrap = True
    if isinstance(sys.stdout, io.TextIOWrapper):  # an encoding without some letter shows its number
        sys.stdout.reconfigure(errors="backslashreplace")
    for name in ("engine", "train", "tune", "cluster"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        logger.handlers = [handler]
        logger.propagate = False


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Ray for the length of a ``with`` block, its own output on standard error."""
    from cluster.session import connect

    with redirect_stdout(sys.stderr), connect(address):
        yield


def print_result(tables: Callable[[], Sequence[Any]], value: object, as_json: bool) -> None:
    """Print a result as tables (with ``title``, ``columns`` and ``rows``), or as JSON and nothing else."""
    if as_json:
        sys.stdout.write(json.dumps(value, indent=2, allow_nan=False) + "\n")
        return
    # A file has no width: cells stay unbroken.
    is_file = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    screen = console(width=_LOG_COLUMNS if is_file else None)
    for table in tables():
        screen.print(rich_table(table.title, table.columns, table.rows))


def print_log(text: str) -> None:
    """Print a part of another process's log: its lines stay lines, its control codes do nothing."""
    sys.stdout.write(shown(text, most=None, keep="\n\t"))
    sys.stdout.flush()


class Commands(typer.core.TyperGroup):
    """Commands whose errors of usage show the words of the command line as foreign text."""

    def make_context(self, *args: Any, **more: Any) -> Any:  # noqa: ANN401 - Typer's types
        """See Typer."""
        with _shown_usage_errors():
            return super().make_context(*args, **more)

    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401 - Typer's types
        """See Typer."""
        with _shown_usage_errors():
            return super().invoke(ctx)


@contextmanager
def _shown_usage_errors() -> Iterator[None]:
    try:
        yield
    except _UsageError as error:
        error.message = shown(error.message or "")
        raise


def _print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Python's report of an error of the program itself, without its control codes."""
    text = "".join(traceback.format_exception(kind, error, trace))
    sys.stderr.write(shown(text, most=None, keep="\n"))


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turn an exception into one line on standard error and the exit code of the process."""
    with _terminable() as terminated:
        try:
            yield
        except SystemExit as stop:
            if stop.code == signal.SIGTERM or terminated.is_set():  # Ray exits with the signal's number as it starts
                _LOGGER.info("terminated; start the same command again to resume")
                sys.exit(143)
            if stop.code == 130:  # Typer's exit code for Ctrl-C
                _LOGGER.info("interrupted; start the same command again to resume")
            raise
        except ValueError as error:
            _LOGGER.error(str(error))
            sys.exit(1 if isinstance(error, DamagedError) else 2)  # 2: the command or its input is wrong
        except (OSError, RuntimeError) as error:
            if terminated.is_set():  # a library made an error of the interrupt
                _LOGGER.info("terminated; start the same command again to resume")
                sys.exit(143)
            has_remedy = getattr(error, "has_remedy", "; " in str(error))
            _LOGGER.error(f"{error}{'' if has_remedy else '; start the same command again to resume'}")
            sys.exit(1)


@contextmanager
def _terminable() -> Iterator[threading.Event]:
    """Let SIGTERM act as Ctrl-C does; the event is set once it came.

    An interrupt that comes while a library calls back is lost there: it is raised again.
    """
    terminated = threading.Event()

    def interrupt(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM and terminated.is_set():  # a second signal must not interrupt the clean-up
            return
        if number == signal.SIGTERM:
            terminated.set()
        raise _watched_interrupt(number, terminated)

    INTERRUPT_HANDLED.clear()
    numbers = [number for number in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(number) != signal.SIG_IGN]
    handlers_before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield terminated
    finally:
        INTERRUPT_HANDLED.set()
        sys.excepthook = _print_traceback  # Typer has put its own there
        for number, handler in handlers_before.items():
            signal.signal(number, handler)


class _Interrupt(KeyboardInterrupt):
    """An interrupt of which one can see whether it is still on its way."""


def _watched_interrupt(number: int, terminated: threading.Event) -> _Interrupt:
    """An interrupt, which no frame holds but those that it passes."""
    error = _Interrupt()
    threading.Thread(target=_repeat, args=(weakref.ref(error), number, terminated), daemon=True).start()
    return error


def _repeat(error: weakref.ref[_Interrupt], number: int, terminated: threading.Event) -> None:
    """Send a signal to the main thread again if its exception has ended without a handler."""
    while error() is not None:
        if INTERRUPT_HANDLED.wait(_LOOK_EVERY_S):
            return
    if not INTERRUPT_HANDLED.is_set():
        terminated.clear()
        _thread.interrupt_main(signal.Signals(number))
