"""The command ``separate``: stems of any audio file."""

from __future__ import annotations

import hashlib
import logging
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from engine.cli.console import ESTIMATOR_HELP, SEPARATOR_HELP, Json, print_result
from engine.cli.display import console, shown

if TYPE_CHECKING:
    from engine.files.names import AudioInput
    from engine.files.targets import StemQuery

_LOGGER = logging.getLogger(__name__)
_LOG_EVERY_S = 30.0
_PIPE = "-"


def separate(
    inputs: Annotated[
        list[str],
        typer.Argument(metavar="IN...", help="Audio files, folders, globs or s3:// addresses; - for standard input."),
    ],
    separator: Annotated[list[str], typer.Option(help=SEPARATOR_HELP)],
    out: Annotated[
        str, typer.Option("-o", "--out", help="Folder or s3:// address for the stems; - for standard output.")
    ],
    query: Annotated[list[str] | None, typer.Option(help="Label or text of a sound; repeat it for more stems.")] = None,
    query_audio: Annotated[list[str] | None, typer.Option(help="File with an example of a sound; repeatable.")] = None,
    unwanted: Annotated[
        list[str] | None, typer.Option("--not", metavar="TEXT", help="Sound that no stem must contain; repeatable.")
    ] = None,
    best_of: Annotated[
        bool,
        typer.Option(
            "--best-of", help="Choose by --estimator: of wordings 'dog bark|a dog barking', of several --separator."
        ),
    ] = False,
    file_format: Annotated[
        Literal["wav", "flac"], typer.Option("--format", help="32-bit float WAV or 24-bit FLAC.")
    ] = "wav",
    residual: Annotated[bool, typer.Option("--residual", help="Also write the mixture without its stems.")] = False,
    complete: Annotated[
        bool,
        typer.Option(
            "--complete", help="The queries name every sound of the inputs: divide the inputs among their stems."
        ),
    ] = False,
    estimator: Annotated[str | None, typer.Option(help=ESTIMATOR_HELP)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace stems that are there already.")] = False,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where the separator runs.")] = "auto",
    as_json: Json = False,
) -> None:
    """Separate any audio files: one file for each input and query, with the input's rate, channels and length.

    Example: `clearsep separate street.mp3 --query "dog bark" --separator DIR -o stems`

    The same command resumes: stems that are there are left. A file that fails is a line on standard error.
    """
    from engine.cli.tables import stems_table
    from engine.files.plan import plan_separation
    from engine.files.separate import separate_files
    from engine.storage.paths import location

    _check(inputs, query, query_audio, separator, best_of=best_of)
    plan = plan_separation(
        _targets(query or [], query_audio or [], unwanted or [], best_of=best_of),
        separator=separator,
        file_format=file_format,
        residual=residual,
        complete=complete,
        estimator=estimator,
        overwrite=overwrite,
        device=device,
    )
    with _found(inputs, out) as sources:
        if out == _PIPE:
            from engine.files.separate import separate_to_pipe

            if len(sources) > 1 or len(plan.targets) > 1 or residual or as_json or file_format != "wav":
                raise ValueError("standard output must get one stem of one input as WAV, got more; give a folder (-o)")
            separate_to_pipe(sources[0], plan, sys.stdout.buffer)
            return
        with _progress(len(sources)) as on_progress:
            summary = separate_files(sources, plan, location(out), on_progress=on_progress)
    print_result(lambda: [stems_table(summary["stems"])], summary, as_json)
    if summary["failures"]:
        raise typer.Exit(1)


def _check(
    inputs: Sequence[str],
    query: Sequence[str] | None,
    query_audio: Sequence[str] | None,
    separator: Sequence[str],
    *,
    best_of: bool,
) -> None:
    if not (query or query_audio):
        raise ValueError("there is no query; name a sound (--query TEXT) or give an example (--query-audio FILE)")
    if len(separator) > 1 and not best_of:
        raise ValueError(f"there must be one --separator, got {len(separator)}; add --best-of to choose among them")
    if inputs.count(_PIPE) > 1:
        raise ValueError("standard input must be given once, got - several times; remove one")


def _targets(
    query: Sequence[str], query_audio: Sequence[str], unwanted: Sequence[str], *, best_of: bool
) -> list[StemQuery]:
    from engine.audio.decoder import shared_decoder
    from engine.files.targets import make_targets
    from engine.separators import AudioExample, Query

    examples = []
    for path in query_audio:
        rate_hz = shared_decoder().probe(path).sample_rate_hz
        samples_T = shared_decoder().decode(path, sample_rate_hz=rate_hz)
        examples.append(Query(AudioExample(samples_T=samples_T, sample_rate_hz=rate_hz)))
    texts = [text.split("|") if best_of else text for text in query]
    names = [None] * len(texts) + [Path(path).stem for path in query_audio]
    return make_targets([*texts, *examples], unwanted=unwanted, names=names)


@contextmanager
def _found(names: Sequence[str], out: str) -> Iterator[list[AudioInput]]:
    """The inputs; standard input is copied to a temporary file, because some formats are read from their end."""
    from engine.files.names import AudioInput, find_inputs
    from engine.storage.files import folder_for_block
    from engine.storage.paths import location

    found = find_inputs([name for name in names if name != _PIPE], out=location(out) if out != _PIPE else None)
    if _PIPE not in names:
        yield found
        return
    with folder_for_block("clearsep-stdin-") as folder:
        with open(folder / "stdin", "wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file, 1 << 20)
        with open(folder / "stdin", "rb") as file:
            contents = hashlib.file_digest(file, "sha256").hexdigest()
        yield [*found, AudioInput(source=str(folder / "stdin"), name="stdin", contents=contents)]


@contextmanager
def _progress(num_files: int) -> Iterator[Callable[[AudioInput, float], None]]:
    """Progress on standard error: one line that changes on a terminal, a log line now and then elsewhere."""
    screen = console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    begun: dict[str, int] = {}
    logged_s = time.monotonic()
    with Progress(*columns, console=screen, disable=not screen.is_terminal) as progress:
        task = progress.add_task("", total=None)

        def show(source: AudioInput, done_s: float) -> None:
            nonlocal logged_s
            number = begun.setdefault(source.source, len(begun) + 1)
            text = f"file {number} of at most {num_files}, {source.shown}: {done_s:.0f} s"
            progress.update(task, description=shown(text))
            if not screen.is_terminal and time.monotonic() - logged_s > _LOG_EVERY_S:
                logged_s = time.monotonic()
                _LOGGER.info(text)

        yield show
