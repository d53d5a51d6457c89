"""The public Python API of ClearSep and the entry point of its command line.

    import clearsep as cs

A name is imported when it is first used, so ``import clearsep`` alone loads neither torch nor Ray. Every function that
works on a cluster (``run_pass``, ``distil``, ``run``, ``search``) needs a connection: ``with cs.connect():``.
"""

# ruff: noqa: PLC0414 - the aliases tell type checkers that the names are public
from __future__ import annotations

import getpass
import importlib
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

_PACKAGES = ("engine", "train", "tune", "cluster")
_ROOT = Path(__file__).resolve().parent


def _claim_packages() -> None:
    """Import this project's packages from here, although a module of the user's may have the name of one."""
    sys.path.insert(0, str(_ROOT))
    try:
        for name in _PACKAGES:
            found = importlib.import_module(name).__file__
            if found is None or Path(found).resolve().parent != _ROOT / name:
                raise ImportError(
                    f"{name} must be the package of {_ROOT}, got {found or 'a folder'}, which was imported before; "
                    "import clearsep first, or rename it"
                )
    finally:
        sys.path.remove(str(_ROOT))


_claim_packages()

if TYPE_CHECKING:
    import typer

    from cluster.session import connect as connect
    from engine.corpus.read import read_corpus as read_corpus
    from engine.corpus.sources import read_sources as read_sources
    from engine.files.score import score_files as score_files
    from engine.files.separate import separate_file as separate_file
    from engine.passes.run import run_pass as run_pass
    from engine.scoring import metrics as metrics
    from engine.selection.export.export import export_tracks as export_tracks
    from engine.selection.thresholds import Thresholds as Thresholds
    from engine.selection.tracks import select_tracks as select_tracks
    from engine.separators import AudioExample as AudioExample
    from engine.separators import Query as Query
    from engine.separators import QueryPart as QueryPart
    from engine.separators import Separator as Separator
    from engine.separators import load_separator as from_pretrained  # noqa: F401 - public under both names
    from engine.separators import load_separator as load_separator
    from engine.separators.exports.hub import save_pretrained as save_pretrained
    from train.api import distil as distil
    from train.api import evaluate as evaluate
    from tune.run import run as run
    from tune.search.run import search as search
    from tune.steps.label_corpus import label_corpus as label_corpus

_PUBLIC = {
    "AudioExample": "engine.separators:AudioExample",
    "Query": "engine.separators:Query",
    "QueryPart": "engine.separators:QueryPart",
    "Separator": "engine.separators:Separator",
    "Thresholds": "engine.selection.thresholds:Thresholds",
    "connect": "cluster.session:connect",
    "distil": "train.api:distil",
    "evaluate": "train.api:evaluate",
    "export_tracks": "engine.selection.export.export:export_tracks",
    "from_pretrained": "engine.separators:load_separator",
    "label_corpus": "tune.steps.label_corpus:label_corpus",
    "load_separator": "engine.separators:load_separator",
    "metrics": "engine.scoring.metrics",
    "read_corpus": "engine.corpus.read:read_corpus",
    "read_sources": "engine.corpus.sources:read_sources",
    "run": "tune.run:run",
    "run_pass": "engine.passes.run:run_pass",
    "save_pretrained": "engine.separators.exports.hub:save_pretrained",
    "score_files": "engine.files.score:score_files",
    "search": "tune.search.run:search",
    "select_tracks": "engine.selection.tracks:select_tracks",
    "separate_file": "engine.files.separate:separate_file",
}
"""Public name: ``module:attribute``, or a module."""


def __getattr__(name: str) -> Any:  # noqa: ANN401 - any public object
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _PUBLIC[name].partition(":")
    imported = importlib.import_module(module)
    from tune.show.notebook import with_display

    globals()[name] = with_display(name, getattr(imported, attribute) if attribute else imported)
    return globals()[name]


def __dir__() -> list[str]:
    return [*_PUBLIC, "command_line", "main"]


def command_line() -> typer.Typer:
    """The command line with the commands of all packages."""
    import typer

    import cluster.cli
    import engine.cli.commands
    import engine.cli.export
    import train.cli
    import tune.cli
    from engine.cli.console import Commands, print_log, print_result

    app = typer.Typer(
        cls=Commands,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="markdown",
        help="""Turn natural recordings into clean separated tracks and a better separator.

`clearsep demo` shows the whole loop on synthetic sounds. `clearsep run` applies it to yours: it separates, scores and
filters labelled clips and distils a better separator from the tracks, iteration after iteration. Every command can be
stopped; start the same command again to resume.

Exit codes: 0 done, 1 failed (finished work is kept), 2 wrong command or input, 130 interrupted, 143 terminated.""",
    )
    for package in (engine.cli.commands, engine.cli.export, train.cli, tune.cli):
        package.register(app)
    cluster.cli.register(app, show=print_result, write=print_log)
    return app


def _name_user() -> None:
    """Give a user who is not in the machine's list of users a name and a home: torch and Ray Train ask for them."""
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = f"user-{os.getuid()}"
    if os.path.expanduser("~") == "~":
        os.environ["HOME"] = tempfile.gettempdir()


def main() -> None:
    """Run the ``clearsep`` command."""
    _name_user()
    from cluster.env_file import load_env_file
    from engine.cli.console import exit_codes, show_progress

    show_progress()
    with exit_codes():
        load_env_file()
        command_line()()


if __name__ == "__main__":
    main()
