"""Whole runs on a real Ray, on synthesised sounds: from clips to a distilled separator, and again."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.session import connect
from engine.corpus.read import read_corpus
from engine.corpus.sources import read_sources
from engine.passes.run import run_pass
from engine.selection.thresholds import Thresholds
from engine.selection.tracks import read_tracks
from engine.separators import NetworkConfig, find_separator, load, read_description
from engine.settings import build, deciding
from train.data.config import MixConfig
from train.evaluation.mixtures import ValidationConfig
from train.student import DistilConfig
from tune.config import RunConfig
from tune.demo import sounds as synth
from tune.demo.corpus import write_natural
from tune.run import run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ray_session() -> Iterator[None]:
    with connect(num_cpus=2):
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("corpus")
    clips = synth.write_corpus(folder, num_per_label={1: 2, 2: 3, 3: 2}, seed=0, duration_s=2.0)
    natural = write_natural(
        read_sources(clips, folds=[2]), folder, num_clips=[(2, 8), (3, 2)], sample_rate_hz=16000, seed=0
    )
    with natural.open("a") as file:
        file.write("audio/missing.flac,rain;bell\n")
    training = DistilConfig(
        steps=20, mix=MixConfig(batch_size=4, segment_s=0.5), validate_every_steps=10, num_workers=0
    )
    return RunConfig(
        corpus=str(natural),
        clean=str(clips),
        clean_folds=(1,),
        network=NetworkConfig(
            channels=32, num_blocks=2, num_bands=24, num_fft=256, hop_samples=128, sample_rate_hz=8000
        ),
        seed_training=training,
        distil=dataclasses.replace(training, num_workers=1),
        schedule=(Thresholds(min_stem_level_db=-15.0), Thresholds(min_re_sdr_db=-30.0, min_stem_level_db=-12.0)),
        validation=ValidationConfig(clips=str(clips), folds=(3,), num_mixtures=6),
    )


@pytest.fixture(scope="module")
def finished(ray_session: None, config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    out = tmp_path_factory.mktemp("runs") / "run"
    return out, run(config, out)


def test_a_run_leaves_its_artifacts_and_records(finished: tuple[Path, Any], config: RunConfig) -> None:
    out, summary = finished
    assert json.loads((out / "summary.json").read_text()) == summary
    assert build(RunConfig, yaml.safe_load((out / "config.yaml").read_text())) == config
    assert [entry["iteration"] for entry in summary["iterations"]] == [0, 1, 2]
    for number in (1, 2):
        folder = out / "iterations" / str(number)
        assert {"stems", "tracks", "failures", "separator"} <= {path.name for path in folder.iterdir()}
        index, stems = read_tracks(folder / "tracks")
        assert len(index) == summary["iterations"][number]["num_kept"] > 0
        assert stems == (folder / "stems").resolve()
    assert load(out / "iterations" / "2" / "separator").sample_rate_hz == 8000
    assert not (out / "iterations" / "0" / "stems").exists()


def test_a_run_continues_with_the_pass_that_slices_made(
    finished: tuple[Path, Any], config: RunConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One slice by the run's own command, the other by that of a pass with the run's settings, then the run."""
    caplog.set_level("INFO")
    one = dataclasses.replace(config, schedule=config.schedule[:1], distil=config.seed_training)
    out = tmp_path / "run"
    assert [entry["iteration"] for entry in run(one, out, slice="1/2")["iterations"]] == [0]
    assert "slice 1/2 is done, 1 are not (2/2)" in caplog.text
    folder, seed = out / "iterations" / "1", find_separator(out / "iterations" / "0" / "separator")
    engine = dataclasses.replace(config.engine, rows_per_task=3)
    with pytest.raises(ValueError, match=r"another settings \(rows_per_task "):
        run_pass(read_corpus(config.corpus), folder, separator=seed, config=engine, slice="2/2")
    run_pass(read_corpus(config.corpus), folder, separator=seed, config=config.engine, slice="2/2")
    closed = (folder / "stems" / "manifest.json").read_bytes()
    record = run(one, out)["iterations"][1]
    assert (folder / "stems" / "manifest.json").read_bytes() == closed
    wanted = finished[1]["iterations"][1]
    names = ("num_clips", "num_queries", "num_stems", "num_failed", "num_kept", "audio_h")
    assert {name: record[name] for name in names} == {name: wanted[name] for name in names}
    for shard in (finished[0] / "iterations" / "1" / "stems").glob("*.parquet"):
        assert shard.read_bytes() == (folder / "stems" / shard.name).read_bytes()


def test_kept_rejected_and_failed_add_up_at_every_step(finished: tuple[Path, Any]) -> None:
    for entry in finished[1]["iterations"][1:]:
        assert entry["num_kept"] + sum(entry["num_rejected"].values()) == entry["num_stems"]
        assert entry["num_clips"] == 11
        assert entry["num_failed"] == 2  # the missing file has two labels
        assert entry["num_queries"] == entry["num_stems"] + entry["num_failed"]
        assert entry["num_stems"] == 8 * 2 + 2 * 3
        assert set(entry["validation"]) >= {"sdri_db", "si_sdri_db", "by_label"}
        assert entry["wall_s"] > 0


def test_the_same_call_again_does_nothing_and_another_config_is_refused(
    finished: tuple[Path, Any], config: RunConfig
) -> None:
    out, summary = finished
    assert run(config, out) == summary
    with pytest.raises(ValueError, match="another distil"):
        run(dataclasses.replace(config, distil=dataclasses.replace(config.distil, steps=21)), out)


def test_a_run_that_lost_its_last_steps_makes_only_those_again(
    finished: tuple[Path, Any], config: RunConfig, tmp_path: Path
) -> None:
    """As after a stop between the pass and the distillation of iteration 2: its stems stay, the rest is made again."""
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    folder = out / "iterations" / "2"
    shutil.rmtree(folder / "separator")
    shutil.rmtree(folder / "tracks")
    (folder / "iteration.json").unlink()
    stems = {path: path.stat().st_mtime_ns for path in (folder / "stems").glob("*.parquet")}
    again = run(dataclasses.replace(config, distil=config.distil), out)
    assert {path: path.stat().st_mtime_ns for path in (folder / "stems").glob("*.parquet")} == stems
    wanted = finished[1]["iterations"][2]
    assert again["iterations"][2]["num_kept"] == wanted["num_kept"]
    assert again["iterations"][2]["validation"]["sdri_db"] == pytest.approx(wanted["validation"]["sdri_db"], abs=0.05)


def test_what_could_only_fail_hours_later_fails_before_anything_is_made(config: RunConfig, tmp_path: Path) -> None:
    """And leaves nothing behind that would refuse the corrected settings."""
    lines = Path(str(config.clean)).read_text().replace(",rain,", ",trombone,")
    (tmp_path / "trombones.csv").write_text(lines)
    (tmp_path / "single.csv").write_text("path,labels\na.wav,rain\nb.wav,bell\n")
    (tmp_path / "empty.csv").write_text("path,labels\na.wav,\n")
    trombones = ValidationConfig(clips=str(tmp_path / "trombones.csv"), folds=(3,))
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"clean": str(tmp_path / "gone.csv")}, "gone.csv"),
        ({"clean_folds": (9,)}, "folds"),
        ({"separator": str(tmp_path / "gone")}, "there is no separator in .*gone"),
        ({"corpus": str(tmp_path / "gone.csv")}, "gone.csv"),
        (
            {"corpus": str(tmp_path / "single.csv")},
            r"at least one clip must have 2 or more labels, got none of 2 .*\(`--set engine\.min_labels=1`\)",
        ),
        ({"corpus": str(tmp_path / "empty.csv")}, "some row must be a clip, got none of 1; .*at least one label"),
        ({"validation": dataclasses.replace(trombones, folds=(8,))}, "folds"),
        (
            {"validation": trombones},
            r"^validation\.clips must have labels that .* know, got \['trombone'\]",
        ),
        ({"training_validation": trombones}, r"^training_validation\.clips must have labels .*trombone"),
    ]
    for changes, message in wrong:
        with pytest.raises(ValueError, match=message):
            run(dataclasses.replace(config, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="training_validation must be set for patience, got null"):
        dataclasses.replace(config, distil=dataclasses.replace(config.distil, patience=2))


def test_thresholds_that_keep_nothing_say_so(ray_session: None, config: RunConfig, tmp_path: Path) -> None:
    seedless = dataclasses.replace(config, schedule=(Thresholds(min_re_sdr_db=99.0),), validation=None)
    with pytest.raises(ValueError, match=r"must keep at least one stem, got none of 22 .*min_re_sdr_db"):
        run(seedless, tmp_path / "run")


def test_a_separator_of_ones_own_is_the_first_teacher(ray_session: None, config: RunConfig, tmp_path: Path) -> None:
    """Its student is trained from scratch, and later students start from their teacher."""
    name = "tests.support.models.own_separators:Halves"
    training = dataclasses.replace(config.distil, steps=2, num_workers=0)
    own = dataclasses.replace(config, separator=name, distil=training, schedule=(Thresholds(), Thresholds()))
    seed, *students = run(own, tmp_path / "run")["iterations"]
    assert seed.get("separator") == name
    assert seed["validation"] is not None and seed["validation"]["sdri_db"] == pytest.approx(3.0, abs=0.3)
    assert [path.name for path in (tmp_path / "run" / "iterations" / "0").iterdir()] == ["iteration.json"]
    assert [student["num_kept"] for student in students] == [22, 22]
    folders = [tmp_path / "run" / "iterations" / str(number) for number in (1, 2)]
    teachers = [json.loads((folder / "stems" / "pass.json").read_text())["separator"] for folder in folders]
    first, second = (read_description(folder / "separator") for folder in folders)
    assert teachers == [find_separator(name).fingerprint, first["fingerprint"]]
    assert first["network"] == deciding(config.network)
    assert [entry["start"] for entry in second["history"]] == [None, first["fingerprint"]]
