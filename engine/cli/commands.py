"""Commands of the engine: ``separate-corpus``, ``plan``, ``filter``, ``score`` and ``failures``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from engine.cli.console import Address, AudioRoot, ClassMap, Json, Out, RetryFailed, Set, connected, print_result


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
    from engine.cli import tables
    from engine.corpus.read import read_corpus
    from engine.passes.config import PassConfig
    from engine.passes.run import run_pass
    from engine.settings import build, override

    config = build(PassConfig, override({}, set_ or []))
    corpus = read_corpus(manifest, class_map=class_map, audio_root=audio_root)
    with connected(address):
        summary = run_pass(corpus, out, separator=separator, tagger=tagger, config=config, retry_failed=retry_failed)
    print_result(lambda: [tables.pass_table(summary)], summary, as_json)


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
    from engine.cli import tables
    from engine.corpus.read import read_corpus
    from engine.passes.config import PassConfig
    from engine.passes.plan import plan as measure
    from engine.separators import load, read_description
    from engine.settings import build, override
    from engine.taggers import open_tagger

    if rows < 1:
        raise ValueError(f"rows is {rows}; draw one at least")
    config = build(PassConfig, override({}, set_ or []))
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
    print_result(lambda: [tables.plan_table(cost)], cost, as_json)


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
    from engine.cli import tables
    from engine.selection.thresholds import Thresholds
    from engine.selection.tracks import write_tracks
    from engine.settings import build, override
    from engine.storage.paths import location

    thresholds = build(Thresholds, override({}, set_ or []))
    place = location(stems)
    folder = place / "stems" if (place / "stems").is_dir() else place
    estimator: dict[str, Any] = {}
    if quality is not None:
        from engine.scoring.estimator import load_estimator

        loaded = load_estimator(quality)
        estimator = {"estimate": loaded.estimate, "estimator_fingerprint": loaded.fingerprint}
    tracks = write_tracks(folder, out, thresholds, **estimator)
    print_result(lambda: [tables.tracks_table(tracks)], tracks, as_json)


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
    from engine.cli import tables
    from engine.scoring.estimator import load_estimator
    from engine.selection.score_files import score_files
    from engine.selection.thresholds import Thresholds
    from engine.separators import load
    from engine.settings import build, override
    from engine.taggers import open_tagger

    thresholds = build(Thresholds, override({}, set_ or []))
    names = [label.strip() for label in labels.split(",")] if labels else [Path(stem).stem for stem in stems]
    if len(names) != len(stems) or len(set(names)) != len(names):
        raise ValueError(f"{len(stems)} stems need as many different labels, not {names}; give --labels")
    scored = score_files(
        mixture,
        dict(zip(names, map(str, stems), strict=True)),
        thresholds,
        separator=load(checkpoint) if checkpoint else None,
        tagger=open_tagger(tagger) if tagger else None,
        quality=load_estimator(quality) if quality else None,
    )
    result = {"stems": scored}
    print_result(lambda: [tables.scores_table(result)], result, as_json)


def failures(
    path: Annotated[str, typer.Argument(help="A run, or a pass: the folder with stems/ and failures/.")],
    as_json: Json = False,
) -> None:
    """Say what failed and why: reasons first, then the rows; all rows with --json."""
    from engine.cli.tables import failures as look

    tables, value = look(path)
    print_result(lambda: tables, value, as_json)


def register(app: typer.Typer) -> None:
    """Add this package's commands to the command line."""
    app.command("separate-corpus")(separate_corpus)
    app.command()(plan)
    app.command("filter")(filter_)
    app.command()(score)
    app.command()(failures)
