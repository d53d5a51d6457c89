"""The command line: every command calls one function of the engine, the trainer or the loop.

Exit codes: 0 done; 1 the work failed on the way (what is done stays; start it again); 2 the command or its input is
wrong; 130 interrupted and 143 terminated (start it again to go on).
"""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import typer

import cluster.cli
import engine.cli.commands
import train.cli
import tune.cli
from engine.cli.console import connected, print_result, show_progress

_LOGGER = logging.getLogger("clearsep")

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="""Turn natural recordings into clean separated tracks and a better separator.

`clearsep demo` shows the whole loop on sounds it makes itself. `clearsep run` does it on yours: clips that name their
sounds are separated, scored and filtered, and a better separator is distilled from the tracks, iteration after
iteration. Every command can be stopped and started again; it goes on where it was.

Exit codes: 0 done, 1 failed on the way (what is done stays), 2 wrong command or input, 130 interrupted, 143
terminated.""",
)


for _package in (engine.cli.commands, train.cli, tune.cli):
    _package.register(app)
cluster.cli.register(app, show=print_result, connected=connected)


@contextmanager
def _exit_codes() -> Iterator[None]:
    """Turn what went wrong into one line on standard error and an exit code."""
    with _terminable() as terminated:
        try:
            yield
        except SystemExit as stop:
            if stop.code == signal.SIGTERM or terminated.is_set():  # the first: from Ray, while it starts
                _LOGGER.info("terminated; start the same command again to go on")
                sys.exit(143)
            if stop.code == 130:  # what Typer makes of Ctrl-C
                _LOGGER.info("interrupted; start the same command again to go on")
            raise
        except ValueError as error:
            _LOGGER.info(f"error: {error}")
            sys.exit(2)
        except (OSError, RuntimeError) as error:
            told = getattr(error, "says_how_to_go_on", False)
            _LOGGER.info(
                f"error: {error}" + ("" if told else "; what was done stays, start the same command again to go on")
            )
            sys.exit(1)


@contextmanager
def _terminable() -> Iterator[threading.Event]:
    """SIGTERM, with which a machine's manager ends a process, does what Ctrl-C does; says whether it came."""
    terminated = threading.Event()

    def terminate(number: int, frame: object) -> None:
        if not terminated.is_set():  # once, so that what ends in good order is not interrupted in it
            terminated.set()
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield terminated
    finally:
        signal.signal(signal.SIGTERM, before)


def main() -> None:
    """Entry point of the ``clearsep`` command."""
    show_progress()
    with _exit_codes():
        app()


if __name__ == "__main__":
    main()
