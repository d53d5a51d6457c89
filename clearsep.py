"""The command line: every command calls one function of the engine, the trainer or the loop.

Exit codes: 0 done; 1 the work failed on the way (what is done stays; start it again); 2 the command or its input is
wrong; 130 interrupted and 143 terminated (start it again to go on).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import rich.table
import typer
from rich.console import Console

from cluster.commands import register

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


def _say(text: str) -> None:
    """Progress goes to standard error, so that standard output holds the result alone."""
    Console(stderr=True).print(text, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def _connected(address: str | None) -> Iterator[None]:
    """Ray, whose own words (that a worker died, say) go to standard error too."""
    from cluster.session import connected

    with redirect_stdout(sys.stderr), connected(address):
        yield


def _print(tables: Callable[[], list[Any]], value: object, as_json: bool) -> None:
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


@app.command()
def demo(out: Out = "runs/demo", set_: Set = None, as_json: Json = False, address: Address = None) -> None:
    """Synthesise a corpus, train a seed on little of it, run two iterations and show what they gained."""
    from engine.storage import is_s3
    from tune import recipes, report
    from tune.demo import demo_settings
    from tune.loop import RunConfig, run

    if is_s3(out):
        raise ValueError("the demo makes its sounds on this machine; give it a local folder, or use `clearsep run`")
    settings = demo_settings(out, say=_say)
    config = recipes.build(RunConfig, recipes.override(settings, set_ or []))
    with _connected(address):
        summary = run(config, f"{out}/run", say=_say)
    _print(lambda: report.run_tables(summary), summary, as_json)


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="A recipe's name (laptop, clearsep) or a YAML file of settings.")],
    out: Out,
    retry_failed: RetryFailed = False,
    set_: Set = None,
    as_json: Json = False,
    address: Address = None,
) -> None:
    """Take a corpus through all iterations: separate, score, filter, distil, evaluate.

    Example: `clearsep run laptop -o runs/first --set corpus=natural.csv --set clean=clips.csv`
    """
    from tune import recipes, report
    from tune.loop import run as run_loop

    config = recipes.run_config(recipe, set_ or [])
    with _connected(address):
        summary = run_loop(config, out, retry_failed=retry_failed, say=_say)
    _print(lambda: report.run_tables(summary), summary, as_json)


@app.command("tune")
def tune_(
    space: Annotated[str, typer.Argument(help="YAML file of what to search, and how; or: demo.")],
    out: Out,
    trials: Annotated[
        int | None, typer.Option(help="Schedules to try beside the baselines, other than SPACE's.")
    ] = None,
    max_hours: Annotated[float | None, typer.Option(help="After so long no trial begins another iteration.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the search in OUT, or say that there is none.")
    ] = False,
    set_: Set = None,
    as_json: Json = False,
    address: Address = None,
) -> None:
    """Search for the schedule of thresholds that gives the best separator; trials share all that they have in common.

    Example: `clearsep tune space.yaml -o runs/search --trials 16`, then `clearsep run runs/search/best.yaml -o best`
    """
    from engine.storage import location
    from tune.demo import write_demo_space
    from tune.findings import search_tables
    from tune.search import read_search, search

    if space == "demo":
        space = str(write_demo_space(out, say=_say))
    config = read_search(space, [*(set_ or []), *([f"trials={trials}"] if trials is not None else [])])
    if resume and not (location(out) / "search.yaml").is_file():
        raise ValueError(f"{out} holds no search to go on with; leave out --resume to begin one there")
    with _connected(address):
        found = search(config, out, max_hours=max_hours, say=_say)
    _print(lambda: search_tables(found), found, as_json)


@app.command("separate-corpus")
def separate_corpus(
    manifest: Annotated[str, typer.Argument(help="CSV, JSONL or Parquet manifest, folder by label, AudioSet CSV.")],
    separator: Annotated[str, typer.Option(help="Checkpoint folder of the separator.")],
    out: Out,
    tagger: Annotated[str | None, typer.Option(help="A tagger's folder, to score what it hears in a stem.")] = None,
    class_map: ClassMap = None,
    audio_root: AudioRoot = None,
    retry_failed: RetryFailed = False,
    set_: Set = None,
    as_json: Json = False,
    address: Address = None,
) -> None:
    """One engine pass: every stem of every clip, scored, into OUT/stems; what failed into OUT/failures."""
    from engine.corpus import read_corpus
    from engine.iteration import run_pass
    from engine.stages import PassConfig
    from tune import recipes, report

    config = recipes.build(PassConfig, recipes.override({}, set_ or []))
    corpus = read_corpus(manifest, class_map=class_map, audio_root=audio_root)
    with _connected(address):
        summary = run_pass(corpus, out, separator=separator, tagger=tagger, config=config, retry_failed=retry_failed)
    _print(lambda: [report.pass_table(summary)], summary, as_json)


@app.command()
def plan(
    manifest: Annotated[str, typer.Argument(help="CSV, JSONL or Parquet manifest, folder by label, AudioSet CSV.")],
    separator: Annotated[str, typer.Option(help="Checkpoint folder of the separator.")],
    tagger: Annotated[str | None, typer.Option(help="A tagger's folder, where the pass will have one.")] = None,
    rows: Annotated[int, typer.Option(help="Rows to draw and measure.")] = 40,
    cpus: Annotated[float | None, typer.Option(help="CPUs of the cluster; default: this machine's.")] = None,
    gpus: Annotated[float | None, typer.Option(help="GPUs of the cluster; default: this machine's.")] = None,
    class_map: ClassMap = None,
    audio_root: AudioRoot = None,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Say what a pass will cost in hours and bytes, and what will fail, from a sample measured on this machine."""
    from engine.corpus import read_corpus
    from engine.plan import plan as measure
    from engine.separators import load, read_description
    from engine.stages import PassConfig
    from engine.taggers import open_tagger
    from tune import recipes, report

    if rows < 1:
        raise ValueError(f"rows is {rows}; draw one at least")
    config = recipes.build(PassConfig, recipes.override({}, set_ or []))
    cost = measure(
        read_corpus(manifest, class_map=class_map, audio_root=audio_root),
        open_separator=lambda device: load(separator, device=device),
        sample_rate_hz=read_description(separator)["sample_rate_hz"],
        config=config,
        open_tagger=(lambda device: open_tagger(tagger, device)) if tagger else None,
        num_rows=rows,
        num_cpus=cpus,
        num_gpus=gpus,
    )
    _print(lambda: [report.plan_table(cost)], cost, as_json)


@app.command("filter")
def filter_(
    stems: Annotated[str, typer.Argument(help="A finished pass: its folder or the stems folder in it.")],
    out: Out,
    quality: Annotated[str | None, typer.Option(help="Estimator of each stem's SI-SDR from its scores.")] = None,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Decide again from stored scores which stems become tracks; opens no audio.

    Example: `clearsep filter runs/first/iterations/1 -o strict --set min_re_sdr_db=15`

    A limit may be a quantile of the pass: `--set 'min_remix_snr_db={quantile: 0.4, by_label: true}'`
    """
    from engine.filter import Thresholds
    from engine.shards import write_tracks
    from engine.storage import location
    from tune import recipes, report

    thresholds = recipes.build(Thresholds, recipes.override({}, set_ or []))
    place = location(stems)
    folder = place / "stems" if (place / "stems").is_dir() else place
    estimator: dict[str, Any] = {}
    if quality is not None:
        from engine.quality import load_quality

        loaded = load_quality(quality)
        estimator = {"estimate": loaded.estimate, "estimator_fingerprint": loaded.fingerprint}
    tracks = write_tracks(folder, out, thresholds, **estimator)
    _print(lambda: [report.tracks_table(tracks)], tracks, as_json)


@app.command()
def calibrate(
    separator: Annotated[str, typer.Argument(help="Checkpoint folder of a separator.")],
    clean: Annotated[str, typer.Option(help="Single-source clips that it has not learned from: CSV or folder.")],
    out: Out,
    folds: Annotated[list[int] | None, typer.Option(help="Folds of the clips; repeatable.")] = None,
    tagger: Annotated[str | None, typer.Option(help="A tagger that has not learned from them either.")] = None,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Calibrate the estimate of a stem's SI-SDR on mixtures of single-source clips, for `filter` and `score`.

    A run does this by itself. Example: `clearsep calibrate SEPARATOR --clean clips.csv --folds 4 -o quality`
    """
    from engine.quality import save_quality
    from train.calibrate import CalibrationConfig, calibrate_files
    from tune import recipes, report

    config = recipes.build(CalibrationConfig, recipes.override({}, set_ or []))
    quality = calibrate_files(separator, clean, folds=folds, tagger=tagger, config=config)
    save_quality(quality, out)
    value = {
        "fingerprint": quality.fingerprint,
        **quality.about,
        "weights": dict(zip(quality.names, quality.weight, strict=True)),
    }
    _print(lambda: [report.quality_table(value)], value, as_json)


@app.command()
def distil(
    out: Out,
    from_: Annotated[str, typer.Option("--from", help="Checkpoint folder to go on from, or `scratch`.")],
    clean: Annotated[str | None, typer.Option(help="Single-source clips: CSV path,label[,fold] or a folder.")] = None,
    folds: Annotated[list[int] | None, typer.Option(help="Folds of the clean clips; repeatable.")] = None,
    tracks: Annotated[str | None, typer.Option(help="Tracks that `filter` or an iteration selected.")] = None,
    set_: Set = None,
    as_json: Json = False,
    address: Address = None,
) -> None:
    """Train a separator from tracks and single-source clips.

    Settings are those of `distil` and `network` in a run's config, such as `--set distil.steps=400`, and
    `validation.clips`.
    """
    from train.distil import Material
    from train.distil import distil as train
    from tune import recipes

    material = Material(
        clean=str(clean) if clean else None,
        clean_folds=tuple(folds) if folds else None,
        tracks=str(tracks) if tracks else None,
    )
    settings = recipes.build(recipes.Training, recipes.override({}, set_ or []))
    with _connected(address):
        entry = train(
            out,
            material=material,
            config=settings.distil,
            start=None if from_ == "scratch" else from_,
            network=settings.network,
            validation=settings.validation,
            say=_say,
        )
    _print(lambda: [_curve_table(entry)], entry, as_json)


def _curve_table(entry: dict[str, Any]) -> Any:  # noqa: ANN401 - report is imported late
    from tune.report import Table

    names = ("step", "loss_db", "sdri_db", "si_sdri_db")
    rows = [[f"{point[name]:.6g}" if name in point else "" for name in names] for point in entry["curve"]]
    return Table(title=f"Learning curve, {entry['steps']} steps", columns=names, rows=rows)


@app.command()
def evaluate(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint folder of the separator.")],
    clips: Annotated[str | None, typer.Option(help="Single-source clips: CSV path,label[,fold] or a folder.")] = None,
    list_: Annotated[str | None, typer.Option("--list", help="AudioSep's or CLAPSep's evaluation CSV.")] = None,
    audio: Annotated[str | None, typer.Option(help="Folder of the audio that --list names.")] = None,
    folds: Annotated[list[int] | None, typer.Option(help="Folds of --clips to draw from; repeatable.")] = None,
    num_mixtures: Annotated[int | None, typer.Option(help="Mixtures to draw of --clips; 300 by default.")] = None,
    num_sources: Annotated[int | None, typer.Option(help="Sources in each; 2 by default.")] = None,
    seed: Annotated[int, typer.Option(help="Of the draw and of queries for absent sounds.")] = 0,
    as_json: Json = False,
) -> None:
    """Measure a separator on seeded mixtures of single-source clips or on the mixture list of a paper.

    Clips are mixed at equal levels over their active parts. The lists of AudioSep and CLAPSep are read as they are:
    `clearsep evaluate CHECKPOINT --list esc50_eval.csv --audio esc50`
    """
    from engine.separators import load
    from train.evaluate import ValidationConfig, draw_mixtures, estimator
    from train.evaluate import evaluate as measure
    from train.lists import evaluate_list, read_list
    from tune import report

    if (clips is None) == (list_ is None) or (audio is None) != (list_ is None):
        raise ValueError("evaluate takes either --clips, or --list with --audio: give one of the two")
    if list_ is not None and audio is not None:
        if folds or num_mixtures is not None or num_sources is not None:
            raise ValueError("a list is evaluated as it is; --folds, --num-mixtures and --num-sources go with --clips")
        mixture_list = read_list(Path(list_))
        result = evaluate_list(load(checkpoint), mixture_list, Path(audio), seed=seed, say=_say)
    else:
        config = ValidationConfig(
            clips=str(clips),
            folds=tuple(folds) if folds else None,
            num_mixtures=300 if num_mixtures is None else num_mixtures,
            num_sources=2 if num_sources is None else num_sources,
            seed=seed,
        )
        separator = load(checkpoint)
        mixtures = draw_mixtures(config, sample_rate_hz=separator.sample_rate_hz)
        result = measure(estimator(separator), mixtures, seed=seed)
    _print(lambda: [report.evaluation_table(result)], result, as_json)


@app.command()
def score(
    mixture: Annotated[str, typer.Argument(help="Audio file of the mixture.")],
    stems: Annotated[list[str], typer.Argument(help="Audio files of its stems, made by any tool.")],
    labels: Annotated[str | None, typer.Option(help="Labels of the stems, comma-separated.")] = None,
    checkpoint: Annotated[str | None, typer.Option(help="A separator, to ask what the rivals find in a stem.")] = None,
    tagger: Annotated[str | None, typer.Option(help="A tagger's folder, to ask what it hears in a stem.")] = None,
    quality: Annotated[str | None, typer.Option(help="RUN/quality, to estimate each stem's SI-SDR.")] = None,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Score the stems of a mixture, and say what each rule of a gate says (--set min_re_sdr_db=10 and the like)."""
    from engine.filter import Thresholds
    from engine.quality import load_quality
    from engine.score_files import score_files
    from engine.separators import load
    from engine.taggers import open_tagger
    from tune import recipes, report

    thresholds = recipes.build(Thresholds, recipes.override({}, set_ or []))
    names = [label.strip() for label in labels.split(",")] if labels else [Path(stem).stem for stem in stems]
    if len(names) != len(stems) or len(set(names)) != len(names):
        raise ValueError(f"{len(stems)} stems need as many different labels, not {names}; give --labels")
    scored = score_files(
        mixture,
        dict(zip(names, map(str, stems), strict=True)),
        thresholds,
        separator=load(checkpoint) if checkpoint else None,
        tagger=open_tagger(tagger) if tagger else None,
        quality=load_quality(quality) if quality else None,
    )
    result = {"stems": scored}
    _print(lambda: [report.scores_table(result)], result, as_json)


@app.command()
def inspect(
    path: Annotated[str, typer.Argument(help="A run, a pass, tracks, a stem shard, a checkpoint or a corpus.")],
    class_map: ClassMap = None,
    audio_root: AudioRoot = None,
    as_json: Json = False,
) -> None:
    """Say what is in a run, a pass, a selection of tracks, a shard, a checkpoint or a corpus."""
    from tune.report import inspect as look

    tables, value = look(path, class_map=class_map, audio_root=audio_root)
    _print(lambda: tables, value, as_json)


@app.command()
def failures(
    path: Annotated[str, typer.Argument(help="A run, or a pass: the folder with stems/ and failures/.")],
    as_json: Json = False,
) -> None:
    """Say what failed and why: reasons first, then the rows; all rows with --json."""
    from tune.report import failures as look

    tables, value = look(path)
    _print(lambda: tables, value, as_json)


register(app, say=_say, show=_print, connected=_connected)


@contextmanager
def _exit_codes() -> Iterator[None]:
    """Turn what went wrong into one line on standard error and an exit code."""
    with _terminable() as terminated:
        try:
            yield
        except SystemExit as stop:
            if stop.code == signal.SIGTERM or terminated.is_set():  # the first: from Ray, while it starts
                _say("terminated; start the same command again to go on")
                sys.exit(143)
            if stop.code == 130:  # what Typer makes of Ctrl-C
                _say("interrupted; start the same command again to go on")
            raise
        except ValueError as error:
            _say(f"error: {error}")
            sys.exit(2)
        except (OSError, RuntimeError) as error:
            told = getattr(error, "says_how_to_go_on", False)
            _say(f"error: {error}" + ("" if told else "; what was done stays, start the same command again to go on"))
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
    with _exit_codes():
        app()


if __name__ == "__main__":
    main()
