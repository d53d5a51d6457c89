"""Commands of the engine: from ``separate`` and ``separate-corpus`` to ``failures`` and ``convert``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from engine.cli.console import (
    ESTIMATOR_HELP,
    SEPARATOR_HELP,
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
from engine.cli.separate import separate

Manifest = Annotated[
    str, typer.Argument(help="CSV, JSONL or Parquet manifest, folder with a subfolder per label, or AudioSet's CSV.")
]
TAGGER_HELP = "Folder of a tagger, or a file that maps labels to its classes; it scores the label in a stem."

_LOGGER = logging.getLogger(__name__)
_NOT_JUDGED = (
    "no rule was given (--set): the default thresholds apply, without %s (--tagger and --estimator give their scores; "
    "a floor needs the clips of a pass)"
)


def separate_corpus(
    manifest: Manifest,
    separator: Annotated[str, typer.Option(help=SEPARATOR_HELP)],
    out: Out,
    tagger: Annotated[str | None, typer.Option(help=TAGGER_HELP)] = None,
    class_map: ClassMap = None,
    audio_root: AudioRoot = None,
    columns: Columns = None,
    allow_outside: AllowOutside = False,
    retry_failed: RetryFailed = False,
    slice_: SliceOption = None,
    set_: Set = None,
    as_json: Json = False,
    address: Address = None,
) -> None:
    """Run one engine pass: separate and score every clip; stems go to OUT/stems, failures to OUT/failures."""
    from engine.cli.tables import pass_table
    from engine.corpus.read import read_corpus
    from engine.passes.config import PassConfig
    from engine.passes.run import run_pass
    from engine.separators import find_separator
    from engine.settings import build, override
    from engine.taggers import find_tagger

    config = build(PassConfig, override({}, set_ or []))
    corpus = read_corpus(
        manifest, class_map=class_map, audio_root=audio_root, columns=columns, allow_outside=allow_outside
    )
    source, tagging = find_separator(separator), find_tagger(tagger) if tagger else None
    with connected(address):
        summary = run_pass(
            corpus, out, separator=source, tagger=tagging, config=config, retry_failed=retry_failed, slice=slice_
        )
    print_result(lambda: [pass_table(summary)], summary, as_json)


def plan(
    manifest: Manifest,
    separator: Annotated[str | None, typer.Option(help=SEPARATOR_HELP)] = None,
    tagger: Annotated[
        str | None, typer.Option(help="Folder of a tagger, if the pass will use one; alone, for `clearsep label`.")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows of the manifest to draw and measure.")] = 40,
    cpus: Annotated[float | None, typer.Option(help="CPUs of the cluster; default: this machine's.")] = None,
    gpus: Annotated[float | None, typer.Option(help="GPUs of the cluster; default: this machine's.")] = None,
    class_map: ClassMap = None,
    audio_root: AudioRoot = None,
    columns: Columns = None,
    allow_outside: AllowOutside = False,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Predict hours, bytes and failures of a pass from a sample of the corpus, measured on this machine."""
    from engine.cli.tables import plan_table
    from engine.corpus.read import read_corpus
    from engine.passes.config import PassConfig
    from engine.passes.speed.plan import plan_pass
    from engine.separators import find_separator
    from engine.settings import build, override
    from engine.taggers import find_tagger

    config = build(PassConfig, override({}, set_ or []))
    corpus = read_corpus(
        manifest,
        class_map=class_map,
        audio_root=audio_root,
        columns=columns,
        allow_outside=allow_outside,
        needs_labels=separator is not None,
    )
    cost = plan_pass(
        corpus,
        separator=find_separator(separator) if separator else None,
        tagger=find_tagger(tagger) if tagger else None,
        config=config,
        num_rows=rows,
        num_cpus=cpus,
        num_gpus=gpus,
    )
    print_result(lambda: [plan_table(cost)], cost, as_json)


def filter_(
    stems: Annotated[str, typer.Argument(help="Folder of a finished pass, or its stems folder.")],
    out: Out,
    estimator: Annotated[str | None, typer.Option(help=ESTIMATOR_HELP)] = None,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Select tracks again from stored scores, with other thresholds; opens no audio.

    Example: `clearsep filter runs/first/iterations/1 -o strict --set min_re_sdr_db=15`

    A limit may be a quantile of the pass: `--set 'min_remix_snr_db={quantile: 0.4, by_label: true}'`
    """
    from engine.cli.tables import tracks_table
    from engine.selection.thresholds import Thresholds
    from engine.selection.tracks import select_tracks
    from engine.settings import build, override

    thresholds = build(Thresholds, override({}, set_ or []))
    selection = select_tracks(stems, out, thresholds, estimator=estimator)
    print_result(lambda: [tracks_table(selection)], selection, as_json)


def score(
    mixture: Annotated[str, typer.Argument(help="Audio file of the mixture.")],
    stems: Annotated[list[str], typer.Argument(help="Audio files of its stems, separated by any tool.")],
    labels: Annotated[
        str | None, typer.Option(help="Labels of the stems, separated by ; or by commas; default: file names.")
    ] = None,
    separator: Annotated[
        str | None, typer.Option(help=SEPARATOR_HELP + " It separates each stem again with the rivals' queries.")
    ] = None,
    tagger: Annotated[str | None, typer.Option(help=TAGGER_HELP)] = None,
    estimator: Annotated[str | None, typer.Option(help=ESTIMATOR_HELP)] = None,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Score the stems of a mixture and apply thresholds to them: --set min_re_sdr_db=10 and so on, else the default."""
    from engine.cli.tables import scores_table
    from engine.files.score import score_files
    from engine.selection.thresholds import Thresholds
    from engine.separators import load_separator
    from engine.settings import build, override

    thresholds = build(Thresholds, override({}, set_ or []))
    names = _labels(labels) if labels else [Path(stem).stem for stem in stems]
    if len(names) != len(stems) or len(set(names)) != len(names):
        raise ValueError(f"labels must be {len(stems)} different names, one per stem, got {names}; give --labels")
    scored = score_files(
        mixture,
        dict(zip(names, map(str, stems), strict=True)),
        thresholds,
        separator=load_separator(separator) if separator else None,
        tagger=tagger,
        estimator=estimator,
    )
    if rules := scored[0]["not_judged"]:
        _LOGGER.info(_NOT_JUDGED, ", ".join(rules))
    print_result(lambda: [scores_table(scored)], {"stems": scored}, as_json)


def _labels(text: str) -> list[str]:
    """The labels in a text by the rule of a manifest's column."""
    from engine.corpus.labels import label_of, separator_of, split

    found = split(text, separator_of([text]))
    return [label_of(one) for one in found] if isinstance(found, list) else []


def failures(
    path: Annotated[str, typer.Argument(help="Folder of a run or of a pass.")],
    as_json: Json = False,
) -> None:
    """List failures: first the reasons with their counts, then the rows (all of them with --json)."""
    from engine.cli.reports import failures_report

    tables, value = failures_report(path)
    print_result(lambda: tables, value, as_json)


def convert(
    checkpoint: Annotated[
        str,
        typer.Argument(help="File of AudioSep, CLAPSep or LAION's CLAP, or folder of Hugging Face or of this project."),
    ],
    out: Annotated[str, typer.Option("-o", "--out", help="New folder or s3:// address of the separator.")],
    clap: Annotated[
        str | None, typer.Option(help="CLAP that a CLAPSep was trained on: LAION's file, or a folder.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="tokenizer.json of FacebookAI/roberta-base, or a folder with it.")
    ] = None,
    template: Annotated[str | None, typer.Option(help="Sentence of a label, such as 'The sound of {label}'.")] = None,
    as_json: Json = False,
) -> None:
    """Convert a checkpoint of AudioSep, CLAPSep or CLAP into a folder of this project; runs nothing that is in it.

    Example: `clearsep convert audiosep_base_4M_steps.ckpt -o audiosep`

    `clearsep inspect CHECKPOINT` shows before that which model a file holds.
    """
    from engine.cli.reports import conversion_tables
    from engine.separators.convert.convert import convert as convert_checkpoint

    converted = convert_checkpoint(checkpoint, out, clap=clap, tokenizer=tokenizer, template=template)
    print_result(lambda: conversion_tables(converted), converted, as_json)
    for note in converted["notes"]:
        _LOGGER.warning(note)


def register(app: typer.Typer) -> None:
    """Add this package's commands to the command line."""
    app.command()(separate)
    app.command("separate-corpus")(separate_corpus)
    app.command()(plan)
    app.command("filter")(filter_)
    app.command()(score)
    app.command()(failures)
    app.command()(convert)
