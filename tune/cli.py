"""Commands of whole runs and around them: from ``demo``, ``run`` and ``tune`` to ``watch`` and ``settings``."""

from __future__ import annotations

import dataclasses
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from engine.cli.console import (
    Address,
    AllowOutside,
    AudioRoot,
    ClassMap,
    Columns,
    Json,
    Out,
    RetryFailed,
    Set,
    SliceOption,
    connected,
    print_result,
)

if TYPE_CHECKING:
    from engine.cli.settings_page import Section

_LOGGER = logging.getLogger(__name__)


def demo(
    out: Out = "runs/demo",
    unlabelled: Annotated[
        bool, typer.Option("--unlabelled", help="The clips have no labels: a tagger gives them.")
    ] = False,
    set_: Set = None,
    as_json: Json = False,
    address: Address = None,
) -> None:
    """Synthesise a corpus, train a seed on little of it, run two iterations and report the gain."""
    from engine.settings import build, override
    from engine.storage.paths import is_s3
    from tune.config import RunConfig
    from tune.demo.corpus import demo_settings
    from tune.run import run
    from tune.tables import run_tables

    if is_s3(out):
        raise ValueError(f"-o must be a local folder, got {out} (the demo synthesises its sounds there); give one")
    config = build(RunConfig, override(demo_settings(out, unlabelled=unlabelled), set_ or []))
    with connected(address):
        summary = run(config, folder := f"{out}/{'unlabelled' if unlabelled else 'run'}")
    truth = Path(out) / "corpus" / ("unlabelled/truth" if unlabelled else "truth")
    _report(folder, truth if truth.is_dir() else None)  # a corpus of an older version has none
    print_result(lambda: run_tables(summary), summary, as_json)


def run(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe (laptop, clearsep) or a YAML file of settings.")],
    out: Out,
    retry_failed: RetryFailed = False,
    slice_: SliceOption = None,
    set_: Set = None,
    as_json: Json = False,
    address: Address = None,
) -> None:
    """Take a corpus through all iterations: separate, score, filter, distil, evaluate.

    Example: `clearsep run laptop -o runs/first --set corpus=natural.csv --set clean=clips.csv`

    The seed is trained on the clean clips, or given: `--set separator=FOLDER`, or `separator=package.module:factory`.
    `--slice 3/32` prepares what comes before the pass of the current iteration and separates a share of it.
    """
    from tune.recipes import run_config
    from tune.run import run as run_all
    from tune.tables import run_tables

    config = run_config(recipe, set_ or [])
    with connected(address):
        summary = run_all(config, out, retry_failed=retry_failed, slice=slice_)
    if slice_ is None:
        _report(out)
    print_result(lambda: run_tables(summary), summary, as_json)


def _report(folder: str, truth: Path | None = None) -> None:
    """Write the report of a run that has just ended."""
    from tune.report.page import only_warned
    from tune.report.write import write_run_report

    with only_warned(folder):
        _LOGGER.info(f"the report: {write_run_report(folder, truth=truth)}")


def label(
    corpus: Annotated[str, typer.Argument(help="Folder of audio files, or a manifest that needs no labels.")],
    tagger: Annotated[str, typer.Option(help="Folder of a tagger, or a file that maps labels to its classes.")],
    out: Annotated[
        str,
        typer.Option("-o", "--out", help="File or s3:// address, OUT.parquet; the tags go into OUT.tags next to it."),
    ],
    known: Annotated[
        str | None,
        typer.Option(help="Single-source clips (CSV path,label or folder) that the tagger did not learn from."),
    ] = None,
    presence: Annotated[
        str | None,
        typer.Option(help="Folder of an earlier calibration, such as OUT.tags/presence, instead of --known."),
    ] = None,
    precision: Annotated[
        float, typer.Option(help="Fraction of the clips with a label in which it shall sound, for every label.")
    ] = 0.8,
    ontology: Annotated[
        str | None,
        typer.Option(help="AudioSet's ontology.json or a file like 'bark: [dog]'; keeps lowest labels only."),
    ] = None,
    class_map: ClassMap = None,
    audio_root: AudioRoot = None,
    columns: Columns = None,
    allow_outside: AllowOutside = False,
    retry_failed: RetryFailed = False,
    set_: Set = None,
    as_json: Json = False,
    address: Address = None,
) -> None:
    """Label recordings without labels: a tagger detects the sounds, clips of known labels calibrate it.

    Example: `clearsep label recordings --tagger DIR --known clips.csv -o labelled.parquet`

    Another --precision opens no audio again. `clearsep failures OUT.tags` lists the clips that failed.
    """
    from engine.cli.tables import label_tables
    from engine.corpus.read import read_corpus
    from engine.corpus.sources import read_sources
    from engine.passes.config import PassConfig
    from engine.passes.labels.label import tags_folder
    from engine.settings import build, override
    from engine.taggers import find_tagger
    from engine.taggers.presence import load_presence
    from tune.steps.label_corpus import label_corpus

    config, source = build(PassConfig, override({}, set_ or [])), find_tagger(tagger)
    tags_folder(out)  # before Ray starts
    clean, model = read_sources(known) if known else None, load_presence(presence) if presence else None
    reading = {"class_map": class_map, "audio_root": audio_root, "columns": columns}
    clips = read_corpus(corpus, **reading, allow_outside=allow_outside, needs_labels=False)
    with connected(address):
        summary = label_corpus(
            clips,
            out,
            tagger=source,
            known=clean,
            presence=model,
            precision=precision,
            ontology=ontology,
            config=config,
            retry_failed=retry_failed,
        )
    print_result(lambda: label_tables(summary), summary, as_json)


def tune_(
    space: Annotated[str, typer.Argument(help="YAML file of the search, or `demo`.")],
    out: Out,
    trials: Annotated[
        int | None, typer.Option(help="Schedules to try in addition to the baselines; default: that of SPACE.")
    ] = None,
    max_hours: Annotated[
        float | None, typer.Option(help="Start no further iteration of a trial after this time.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Fail if OUT has no search to resume, instead of starting one.")
    ] = False,
    set_: Set = None,
    as_json: Json = False,
    address: Address = None,
) -> None:
    """Search for the schedule of thresholds that gives the best separator; trials share all common work.

    Example: `clearsep tune space.yaml -o runs/search --trials 16`, then `clearsep run runs/search/best.yaml -o best`
    """
    from engine.storage.paths import location
    from tune.demo.corpus import write_demo_space
    from tune.search.config import read_search
    from tune.search.report import search_tables
    from tune.search.run import search

    if space == "demo":
        space = str(write_demo_space(out))
    config = read_search(space, [*(set_ or []), *([f"trials={trials}"] if trials is not None else [])])
    if resume and not (location(out) / "search.yaml").is_file():
        raise ValueError(f"{out} must hold a search for --resume, got none; leave out --resume to start one there")
    with connected(address):
        report = search(config, out, max_hours=max_hours)
    print_result(lambda: search_tables(report), report, as_json)


def report(
    path: Annotated[str, typer.Argument(metavar="RUN|PASS|SEARCH", help="Folder or s3:// address.")],
    out: Annotated[
        str | None, typer.Option("-o", "--out", help="The page; default: report.html in the folder.")
    ] = None,
    against: Annotated[str | None, typer.Option(metavar="RUN", help="Another run, to compare a run with.")] = None,
    truth: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER", help="True sources of clips, CLIP/LABEL.flac, to show the true SI-SDR of stems."
        ),
    ] = None,
    max_mb: Annotated[float, typer.Option(min=0.0, help="Most audio in the page, in megabytes; 0: none.")] = 25.0,
    tensorboard: Annotated[
        str | None, typer.Option(metavar="DIR", help="Also write event files for TensorBoard into this folder.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the report of a run, a pass or a search: one HTML page to look at and to listen to, which needs no network.

    Example: `clearsep report runs/first`, then open `runs/first/report.html`
    """
    from engine.cli.tables import Table
    from engine.storage.paths import location
    from tune.report.write import write_run_report
    from tune.search.report import write_search_page

    folder = location(path)
    is_search = (folder / "trials.parquet").is_file()
    if is_search and tensorboard is not None:
        raise ValueError(
            f"--tensorboard must be for a run or a pass, got the search {path}; give TensorBoard the folder {path}/tune"
        )
    if is_search and against is None and truth is None:
        target = location(out) if out is not None else folder / "report.html"
        write_search_page(folder, target)
    else:
        target = write_run_report(folder, out, max_mb=max_mb, against=against, truth=truth)
    value = {"report": str(target)}
    if tensorboard is not None:
        from tune.report.tensorboard import write_events

        write_events(folder, tensorboard)
        value["tensorboard"] = tensorboard
    rows = [list(one) for one in value.items()]
    print_result(lambda: [Table(title="Report", columns=["", ""], rows=rows)], value, as_json)


def watch(
    path: Annotated[str, typer.Argument(metavar="RUN|PASS|SEARCH", help="Folder or s3:// address.")],
    every_s: Annotated[float, typer.Option("--every", min=0.1, help="Seconds between two looks.")] = 5.0,
    once: Annotated[bool, typer.Option("--once", help="Look once.")] = False,
    as_json: Json = False,
) -> None:
    """Show what a run, a pass or a search is at, until it is done; also one on a cluster or in S3, from its files.

    Example: `clearsep watch runs/first`
    """
    from engine.storage.paths import location
    from tune.show.watch import Watch, watch_until_done
    from tune.show.watch_search import SearchWatch

    watched = SearchWatch(path) if (location(path) / "search.yaml").is_file() else Watch(path)
    if as_json:
        print_result(list, watched.snapshot().value, as_json)
    else:
        watch_until_done(watched, every_s=every_s, once=once)


def inspect(
    path: Annotated[
        str, typer.Argument(help="A run, a pass, tracks, a stem shard, a checkpoint (of others too) or a corpus.")
    ],
    class_map: ClassMap = None,
    audio_root: AudioRoot = None,
    columns: Columns = None,
    allow_outside: AllowOutside = False,
    as_json: Json = False,
) -> None:
    """Show the contents of a run, a pass, a selection of tracks, a shard, a checkpoint or a corpus."""
    from engine.cli.reports import DAMAGED
    from tune.tables import inspect as report

    tables, value = report(
        path, class_map=class_map, audio_root=audio_root, columns=columns, allow_outside=allow_outside
    )
    print_result(lambda: tables, value, as_json)
    if damaged := value.get(DAMAGED):
        _LOGGER.error(
            f"cannot use {path} as it is ({len(damaged)} of its files are missing or damaged, the first is "
            f"{damaged[0]}); start the command that wrote it again, which replaces them"
        )
        raise typer.Exit(1)


def settings(
    key: Annotated[
        str | None, typer.Argument(help="First letters of a name or of a part of it, such as clip_s.")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the reference page docs/settings.md.")] = False,
    as_json: Json = False,
) -> None:
    """List settings with type, range, default and meaning; they go into a YAML file or after `--set`.

    Example: `clearsep settings distil.mix`
    """
    from engine.cli.settings_page import find_settings, settings_page, settings_tables

    sections = _sections()
    if markdown:
        sys.stdout.write(settings_page(sections))
        return
    found = find_settings(sections, key)
    value = [{"section": one.title} | dataclasses.asdict(setting) for one in found for setting in one.settings]
    print_result(lambda: settings_tables(found), value, as_json)


def _sections() -> list[Section]:
    from engine.cli.settings_page import section
    from engine.selection.thresholds import Thresholds
    from tune.config import RunConfig
    from tune.search.config import SearchConfig

    return [
        section(
            RunConfig,
            title="Runs",
            intro="For `clearsep run` and `demo`. `distil` takes `distil.*`, `network.*` and `validation.*`; "
            "`separate-corpus` and `plan` take `engine.*`, `calibrate` takes `calibration.*`, and `evaluate` takes "
            "`validation.*`, without the prefix.",
        ),
        section(
            Thresholds,
            title="Thresholds",
            intro="For every entry of `schedule`, and for `clearsep filter` and `score`. A limit may also be a "
            "quantile of the pass: `{quantile: 0.4, by_label: true}`.",
        ),
        section(SearchConfig, title="Searches", intro="For `clearsep tune`."),
    ]


def register(app: typer.Typer) -> None:
    """Add this package's commands to the command line."""
    app.command()(demo)
    app.command()(run)
    app.command()(label)
    app.command("tune")(tune_)
    app.command()(report)
    app.command()(watch)
    app.command()(inspect)
    app.command()(settings)
