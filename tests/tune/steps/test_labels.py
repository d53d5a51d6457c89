"""Runs on recordings without labels, and with labels that move, on a real Ray."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.session import connect
from engine.cli.reports import failures_report
from engine.corpus.sources import read_sources
from engine.selection.labels.table import read_label_rows
from engine.selection.labels.update import read_labels
from engine.selection.thresholds import Thresholds
from engine.selection.tracks import read_events, read_tracks
from engine.separators import NetworkConfig
from engine.settings import build
from train.data.config import MixConfig
from train.judges.calibrate import CalibrationConfig
from train.judges.tagger import TaggerConfig
from train.student import DistilConfig
from tune.config import LabelConfig, RunConfig
from tune.demo import sounds as synth
from tune.demo.corpus import write_natural
from tune.run import RunSummary, run
from tune.tables import inspect, run_tables

MOVING = Thresholds(min_stem_level_db=-60.0, drop_label_below=0.5, add_label_from=0.6, event_from=0.05)


@pytest.fixture(scope="module")
def ray_session() -> Iterator[None]:
    with connect(num_cpus=2):
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A folder of ten good recordings of one to three sounds, a broken one and a silent one."""
    folder = tmp_path_factory.mktemp("corpus")
    clips = synth.write_corpus(folder, num_per_label={1: 4, 2: 3}, seed=0, duration_s=2.0)
    folder = tmp_path_factory.mktemp("natural")
    counts = [(1, 2), (2, 6), (3, 2)]
    write_natural(read_sources(clips, folds=[2]), folder, num_clips=counts, sample_rate_hz=16000, seed=0)
    (folder / "audio" / "broken.wav").write_text("not audio")
    training = DistilConfig(
        steps=20, mix=MixConfig(batch_size=4, segment_s=0.5), validate_every_steps=10, num_workers=0
    )
    return RunConfig(
        corpus=str(folder / "audio"),
        clean=str(clips),
        clean_folds=(1,),
        network=NetworkConfig(
            channels=32, num_blocks=2, num_bands=24, num_fft=256, hop_samples=128, sample_rate_hz=8000
        ),
        seed_training=training,
        distil=training,
        calibration=CalibrationConfig(num_mixtures=40, steps=10),
        tagger_training=TaggerConfig(steps=40, batch_size=8),
        labels=LabelConfig(precision=0.5, num_tentative=1),
        schedule=(MOVING, MOVING),
    )


@pytest.fixture(scope="module")
def finished(ray_session: None, config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunSummary]:
    out = tmp_path_factory.mktemp("runs") / "run"
    return out, run(config, out)


@pytest.mark.slow
def test_every_label_of_every_iteration_is_accounted_for(finished: tuple[Path, RunSummary]) -> None:
    out, summary = finished
    counts = [record["labels"] for record in summary["iterations"]]
    assert [one["num_clips"] for one in counts] == [10, 10, 10]
    _, failed = failures_report(out)
    assert [(row["iteration"], row["path"], row["step"]) for row in failed["failures"]] == [(0, "broken.wav", "decode")]
    assert counts[0]["num_added"] > 0 and sum(one["num_dropped"] + one["num_added"] for one in counts[1:]) > 0
    for number, one in enumerate(counts):
        assert one["num_before"] == one["num_kept"] + one["num_dropped"] + one["num_relabelled"]
        assert one["num_after"] == one["num_kept"] + one["num_added"]
        assert one["num_before"] == (counts[number - 1]["num_after"] if number else 0)
        rows = list(read_label_rows(out / "iterations" / str(number) / "labels" / "labels.parquet"))
        assert sum(len(row["labels"]) for row in rows) == one["num_after"] and len(rows) == 10
    for record in summary["iterations"][1:]:
        assert record["num_queries"] == record["num_kept"] + sum(record["num_rejected"].values()) + record["num_failed"]


@pytest.mark.slow
def test_tracks_are_of_labels_that_their_clip_has_after_the_iteration(finished: tuple[Path, RunSummary]) -> None:
    out, _ = finished
    for number in (1, 2):
        folder = out / "iterations" / str(number)
        labels = {row["path"]: row["labels"] for row in read_label_rows(folder / "labels" / "labels.parquet")}
        tracks = read_tracks(folder / "tracks")[0].to_pylist()
        assert tracks and all(track["label"] in labels[track["path"]] for track in tracks)


@pytest.mark.slow
def test_a_selection_has_the_single_events_that_the_record_counts(finished: tuple[Path, RunSummary]) -> None:
    """So weak a separator leaves too much over for any; ``test_update.py`` mines some."""
    out, summary = finished
    for number in (1, 2):
        tracks = out / "iterations" / str(number) / "tracks"
        assert (tracks / "events.parquet").is_file()
        assert len(read_events(tracks)[0]) == summary["iterations"][number]["num_events"]


@pytest.mark.slow
def test_a_run_that_lost_an_iteration_makes_the_same_labels_again(
    finished: tuple[Path, RunSummary], config: RunConfig, tmp_path: Path
) -> None:
    out, summary = finished
    again = tmp_path / "run"
    shutil.copytree(out, again)
    shutil.rmtree(again / "iterations" / "2")
    run(config, again)
    before, after = (read_labels(folder / "iterations" / "2" / "labels") for folder in (out, again))
    assert before == after
    assert run(config, out) == summary


@pytest.mark.slow
def test_given_labels_stay_without_limits_and_clips_of_one_label_are_separated(
    finished: tuple[Path, RunSummary], config: RunConfig, tmp_path: Path
) -> None:
    natural = Path(config.corpus).parent / "natural.csv"
    one = dataclasses.replace(config, corpus=str(natural), schedule=(Thresholds(min_stem_level_db=-60.0),))
    _, record = run(one, tmp_path / "run")["iterations"]
    assert record["num_set_aside"] == 0
    assert record["num_queries"] == 20 and "labels" not in record, "nothing is tried, and nothing moves"


@pytest.mark.slow
def test_inspect_shows_what_moved(finished: tuple[Path, RunSummary]) -> None:
    out, summary = finished
    assert "Labels of the clips" in [table.title for table in run_tables(summary)]
    tables, value = inspect(out / "iterations" / "1" / "labels")
    assert value["num_after"] == summary["iterations"][1]["labels"]["num_after"]
    assert len(tables) == 2


def test_limits_on_labels_need_labels(config: RunConfig) -> None:
    with pytest.raises(ValueError, match=r"labels must be set for a schedule with drop_label_below, .*, got null; set"):
        dataclasses.replace(config, labels=None)


def test_a_run_without_clean_clips_needs_a_presence_model() -> None:
    settings = {"corpus": "c", "separator": "s", "tagger": "t", "labels": {}}
    from tune.inputs import require_judges

    with pytest.raises(ValueError, match=r"labels.presence or clean must be set for labels, got neither; set clean"):
        require_judges(build(RunConfig, settings))
