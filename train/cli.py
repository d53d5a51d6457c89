"""Commands of training: ``calibrate``, ``distil`` and ``evaluate``."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from engine.cli.console import (
    SEPARATOR_HELP,
    Address,
    AllowOutside,
    AudioRoot,
    Columns,
    Json,
    Out,
    Set,
    connected,
    print_result,
)

if TYPE_CHECKING:
    from train.evaluation.figures import Evaluation

Folds = Annotated[list[int] | None, typer.Option(help="Folds of the clips to use; repeatable; default: all.")]
_CLIPS = "Single-source clips: CSV path,label[,fold] or a folder with a subfolder per label"


def calibrate(
    separator: Annotated[str, typer.Argument(help=SEPARATOR_HELP)],
    clean: Annotated[str, typer.Option(help=f"{_CLIPS}; the separator must not be trained on them.")],
    out: Out,
    folds: Folds = None,
    columns: Columns = None,
    audio_root: AudioRoot = None,
    allow_outside: AllowOutside = False,
    tagger: Annotated[str | None, typer.Option(help="Folder of a tagger that is not trained on them either.")] = None,
    verdicts: Annotated[
        list[str] | None, typer.Option(help="CSV of verdicts from a report, as further evidence; repeatable.")
    ] = None,
    passes: Annotated[
        list[str] | None, typer.Option(metavar="RUN|PASS", help="Run or pass of these verdicts; repeatable.")
    ] = None,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Calibrate the estimate of a stem's SI-SDR on mixtures of single-source clips, for `filter` and `score`.

    A run does this by itself. Example: `clearsep calibrate SEPARATOR --clean clips.csv --folds 4 -o estimator`
    """
    from engine.cli.tables import estimator_report
    from engine.corpus.sources import read_sources
    from engine.scoring.estimator import save_estimator
    from engine.separators import load_separator
    from engine.settings import build, override
    from engine.storage.factories import own_device
    from engine.taggers import find_tagger
    from train.judges.calibrate import CalibrationConfig
    from train.judges.calibrate import calibrate as fit
    from train.judges.verdicts import read_verdicts

    if bool(verdicts) != bool(passes):
        raise ValueError("--verdicts must be given with --passes, got one of the two; give both or neither")
    judged = read_verdicts(verdicts, passes) if verdicts and passes else None
    config = build(CalibrationConfig, override({}, set_ or []))
    clips = read_sources(clean, folds=folds, columns=columns, audio_root=audio_root, allow_outside=allow_outside)
    tagging = find_tagger(tagger).with_labels(clips.labels).open(own_device()) if tagger else None
    estimator = fit(load_separator(separator, own_device()), clips, tagger=tagging, config=config, judged=judged)
    save_estimator(estimator, out)
    tables, value = estimator_report(estimator)
    print_result(lambda: tables, value, as_json)


def distil(
    out: Out,
    from_: Annotated[str, typer.Option("--from", help="Checkpoint folder of the teacher, or `scratch`.")],
    clean: Annotated[str | None, typer.Option(help=f"{_CLIPS}.")] = None,
    folds: Folds = None,
    columns: Columns = None,
    audio_root: AudioRoot = None,
    allow_outside: AllowOutside = False,
    tracks: Annotated[str | None, typer.Option(help="Tracks that `filter` or an iteration selected.")] = None,
    text_encoder: Annotated[
        str | None,
        typer.Option(help="Folder of a CLAP, or of a separator that has one: the student reads text."),
    ] = None,
    set_: Set = None,
    as_json: Json = False,
    address: Address = None,
) -> None:
    """Train a separator on tracks and single-source clips.

    Settings are those of `distil`, `network` and `validation` in a run, such as `--set distil.steps=400` and
    `--set validation.clips=held-out.csv`.
    """
    from engine.corpus.sources import read_sources
    from engine.settings import build, override
    from train.api import TrainingConfig
    from train.data.training_data import TrainingData
    from train.distil import distil as train
    from train.evaluation.mixtures import resolve_validation
    from train.tables import curve_table

    settings = build(TrainingConfig, override({}, set_ or []))
    read = functools.partial(
        read_sources, folds=folds, columns=columns, audio_root=audio_root, allow_outside=allow_outside
    )
    data = TrainingData(clean=read(clean) if clean else None, tracks=tracks)
    chosen = settings.validation
    validation = resolve_validation(chosen, allow_outside=allow_outside) if chosen else None
    with connected(address):
        record = train(
            out,
            data=data,
            config=settings.distil,
            start=None if from_ == "scratch" else from_,
            network=settings.network,
            validation=validation,
            text_encoder=text_encoder,
        )
    print_result(lambda: [curve_table(record)], record, as_json)


def evaluate(
    separator: Annotated[str, typer.Argument(help=SEPARATOR_HELP)],
    clips: Annotated[str | None, typer.Option(help=f"{_CLIPS}.")] = None,
    list_: Annotated[str | None, typer.Option("--list", help="AudioSep's or CLAPSep's evaluation CSV.")] = None,
    audio: Annotated[str | None, typer.Option(help="Folder of the audio that --list names.")] = None,
    folds: Folds = None,
    columns: Columns = None,
    audio_root: AudioRoot = None,
    allow_outside: AllowOutside = False,
    num_mixtures: Annotated[int | None, typer.Option(help="Mixtures to draw from --clips; default: 300.")] = None,
    num_sources: Annotated[int | None, typer.Option(help="Sources in each mixture; default: 2.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the mixtures and of the queries for absent sounds.")] = 0,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Measure a separator on seeded mixtures of single-source clips, or on the mixture list of a paper.

    Clips are mixed at equal levels over their active parts. The lists of AudioSep and CLAPSep are read as published:
    `clearsep evaluate SEPARATOR --list esc50_eval.csv --audio esc50`

    With `--set same_label_fraction=0.3` some mixtures have two sources of one label, and the class-aware SDRi of
    DCASE's task 4 is reported too. Settings are those of `validation` in a run.
    """
    from engine.corpus.sources import read_sources
    from engine.separators import load_separator
    from engine.settings import override
    from engine.storage.factories import own_device
    from train.api import evaluate as measure
    from train.evaluation.list_formats import read_list
    from train.evaluation.published_lists import evaluate_list
    from train.tables import evaluation_table

    if (clips is None) == (list_ is None) or (audio is None) != (list_ is None):
        raise ValueError(
            "evaluate must have either --clips, or --list with --audio, got neither or both; give one of the two"
        )
    result: Evaluation
    if list_ is not None and audio is not None:
        if folds or columns or audio_root or set_ or num_mixtures is not None or num_sources is not None:
            raise ValueError(
                "a list must be evaluated as published, got options of --clips; leave out --folds, --num-mixtures and "
                "--num-sources, --columns and --audio-root, and --set"
            )
        mixtures = read_list(Path(list_))
        result = evaluate_list(load_separator(separator, own_device()), mixtures, Path(audio), seed=seed)
    else:
        result = measure(
            separator,
            read_sources(str(clips), folds=folds, columns=columns, audio_root=audio_root, allow_outside=allow_outside),
            num_mixtures=300 if num_mixtures is None else num_mixtures,
            num_sources=2 if num_sources is None else num_sources,
            seed=seed,
            config=override({}, set_ or []),
        )
    print_result(lambda: [evaluation_table(result)], result, as_json)


def register(app: typer.Typer) -> None:
    """Add this package's commands to the command line."""
    app.command()(calibrate)
    app.command()(distil)
    app.command()(evaluate)
