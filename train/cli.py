"""Commands of training: ``calibrate``, ``distil`` and ``evaluate``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from engine.cli.console import Address, Json, Out, Set, connected, print_result
from engine.separators import NetworkConfig
from engine.settings import build, override
from train.evaluation.mixtures import ValidationConfig
from train.student import DistilConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """Settings of a single training, named as in a run."""

    distil: DistilConfig = dataclasses.field(default_factory=DistilConfig)
    """How the student is trained."""
    network: NetworkConfig = dataclasses.field(default_factory=NetworkConfig)
    """Shape of a network that is trained from scratch."""
    validation: ValidationConfig | None = None
    """Mixtures on which it is validated as it learns."""


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
    from engine.cli import tables
    from engine.scoring.estimator import save_estimator
    from train.judges.calibrate import CalibrationConfig, calibrate_files

    config = build(CalibrationConfig, override({}, set_ or []))
    quality = calibrate_files(separator, clean, folds=folds, tagger=tagger, config=config)
    save_estimator(quality, out)
    value = {
        "fingerprint": quality.fingerprint,
        **quality.about,
        "weights": dict(zip(quality.names, quality.weight, strict=True)),
    }
    print_result(lambda: [tables.quality_table(value)], value, as_json)


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
    from train.data.training_data import TrainingData
    from train.distil import distil as train

    training_data = TrainingData(
        clean=str(clean) if clean else None,
        clean_folds=tuple(folds) if folds else None,
        tracks=str(tracks) if tracks else None,
    )
    settings = build(Training, override({}, set_ or []))
    with connected(address):
        entry = train(
            out,
            training_data=training_data,
            config=settings.distil,
            start=None if from_ == "scratch" else from_,
            network=settings.network,
            validation=settings.validation,
        )
    print_result(lambda: [_curve_table(entry)], entry, as_json)


def _curve_table(entry: dict[str, Any]) -> Any:  # noqa: ANN401 - report is imported late
    from engine.cli.tables import Table

    names = ("step", "loss_db", "sdri_db", "si_sdri_db")
    rows = [[f"{point[name]:.6g}" if name in point else "" for name in names] for point in entry["curve"]]
    return Table(title=f"Learning curve, {entry['steps']} steps", columns=names, rows=rows)


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
    from train import tables as train_tables
    from train.evaluation.evaluate import estimator
    from train.evaluation.evaluate import evaluate as measure
    from train.evaluation.mixtures import ValidationConfig, draw_mixtures
    from train.evaluation.published_lists import evaluate_list, read_list

    if (clips is None) == (list_ is None) or (audio is None) != (list_ is None):
        raise ValueError("evaluate takes either --clips, or --list with --audio: give one of the two")
    if list_ is not None and audio is not None:
        if folds or num_mixtures is not None or num_sources is not None:
            raise ValueError("a list is evaluated as it is; --folds, --num-mixtures and --num-sources go with --clips")
        mixture_list = read_list(Path(list_))
        result = evaluate_list(load(checkpoint), mixture_list, Path(audio), seed=seed)
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
    print_result(lambda: [train_tables.evaluation_table(result)], result, as_json)


def register(app: typer.Typer) -> None:
    """Add this package's commands to the command line."""
    app.command()(calibrate)
    app.command()(distil)
    app.command()(evaluate)
