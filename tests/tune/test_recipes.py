"""Recipes, YAML files and ``--set``: settings reach the config, and errors name the nearest right name."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from engine.passes.config import PassConfig
from engine.selection.thresholds import Quantile, Thresholds
from engine.separators import NetworkConfig
from engine.settings import build, override
from engine.storage.files import write_json
from train.api import TrainingConfig
from train.data.config import MixConfig
from train.evaluation.mixtures import ValidationConfig
from train.student import DistilConfig
from tune.config import RunConfig
from tune.inputs import resolve
from tune.recipes import MIX, RECIPES, recipe_settings, run_config
from tune.run import run

CORPUS = ["corpus=natural.csv", "clean=clips.csv"]
Put = Callable[[str], str]


@pytest.fixture
def put(tmp_path: Path) -> Put:
    """Writes a YAML file and returns its path."""

    def write(text: str) -> str:
        (tmp_path / "run.yaml").write_text(text)
        return str(tmp_path / "run.yaml")

    return write


# Recipes.


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_builds(name: str) -> None:
    config = run_config(name, CORPUS)
    assert (config.corpus, config.clean) == ("natural.csv", "clips.csv")
    assert len(config.schedule) >= 2


def test_clearsep_is_the_published_baseline() -> None:
    config = run_config("clearsep", CORPUS)
    assert config.schedule == (Thresholds(min_re_sdr_db=10.0), Thresholds(min_re_sdr_db=15.0))
    assert config.network.sample_rate_hz == 32000
    assert config.engine.clip_s == 10.0
    assert config.distil.mix.silence_rate == 0.05
    assert config.distil.mix.rivals_rate == config.seed_training.mix.rivals_rate == 0.0
    assert not config.distil.mix.share_mixture and config.distil.mix.self_remix is None


def test_other_settings_of_a_recipe_have_their_default() -> None:
    config = run_config("laptop", CORPUS)
    distil = DistilConfig(mix=build(MixConfig, MIX))
    assert (config.engine, config.network, config.distil) == (PassConfig(), NetworkConfig(), distil)
    assert config.validation is None


def test_a_recipe_is_fresh_every_time() -> None:
    before = run_config("clearsep", CORPUS)
    run_config("clearsep", [*CORPUS, "schedule.0.min_re_sdr_db=3", "network.channels=64"])
    assert run_config("clearsep", CORPUS) == before


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("claersep", "did you mean 'clearsep'"), ("labtop", "did you mean 'laptop'"), ("runs.yml", "")],
)
def test_a_missing_file_or_recipe_names_the_nearest_recipe(name: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=rf"there is no recipe or YAML file '{name}'; .*{nearest}"):
        run_config(name, CORPUS)


# YAML files.


def test_a_file_of_its_own(put: Put) -> None:
    config = run_config(put("corpus: natural.csv\nseparator: seed\ndistil: {steps: 7, mix: {batch_size: 3}}\n"))
    assert (config.corpus, config.separator) == ("natural.csv", "seed")
    assert config.distil == DistilConfig(steps=7, mix=MixConfig(batch_size=3))
    assert config.schedule == (Thresholds(min_re_sdr_db=10.0), Thresholds(min_re_sdr_db=15.0))


def test_a_file_may_start_from_a_recipe(put: Put) -> None:
    config = run_config(put("recipe: clearsep\ncorpus: a.csv\nclean: b.csv\nnetwork: {channels: 64}\n"))
    assert config.network == NetworkConfig(sample_rate_hz=32000, num_fft=2048, hop_samples=512, channels=64)
    assert len(config.schedule) == 2


def test_a_file_replaces_a_recipes_schedule_as_a_whole(put: Put) -> None:
    config = run_config(put("recipe: laptop\ncorpus: a.csv\nclean: b.csv\nschedule: [{min_re_sdr_db: 1}]\n"))
    assert config.schedule == (Thresholds(min_re_sdr_db=1.0),)


def test_overrides_win_over_the_file_and_the_recipe(put: Put) -> None:
    path = put("recipe: clearsep\ncorpus: a.csv\nclean: b.csv\nnetwork: {channels: 64, num_blocks: 3}\n")
    config = run_config(path, ["network.channels=32", "network.num_fft=1024"])
    assert config.network.channels == 32
    assert config.network.num_blocks == 3
    assert config.network.num_fft == 1024


def test_a_file_that_names_an_unknown_recipe(put: Put) -> None:
    with pytest.raises(ValueError, match=r"there is no recipe 'clearsap' \(in .*run\.yaml\); did you mean 'clearsep'"):
        run_config(put("recipe: clearsap\ncorpus: a.csv\n"))


@pytest.mark.parametrize("recipe", ["[laptop]", "{laptop: 1}", "3"])
def test_a_recipe_that_is_no_name(put: Put, recipe: str) -> None:
    with pytest.raises(ValueError, match="there is no recipe"):
        run_config(put(f"recipe: {recipe}\ncorpus: a.csv\n"))


@pytest.mark.parametrize("text", ["corpus: [1, 2", "a: b: c", "\tcorpus: x"])
def test_a_file_that_is_not_yaml(put: Put, text: str) -> None:
    with pytest.raises(ValueError, match=r"cannot read .*run\.yaml as YAML"):
        run_config(put(text))


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(b"corpus: \xff\xfe\x80")
    with pytest.raises(ValueError, match=r"cannot read .*run\.yaml as YAML"):
        run_config(str(tmp_path / "run.yaml"))


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just words"])
def test_a_file_that_is_no_mapping(put: Put, text: str) -> None:
    with pytest.raises(ValueError, match="must be a mapping of settings"):
        run_config(put(text))


# --set.


def test_overrides_reach_every_depth() -> None:
    config = run_config(
        "laptop",
        [
            *CORPUS,
            "seed_training.steps=11",
            "distil.mix.gain_db=2.5",
            "distil.mix.augment=false",
            "distil.learning_rate=1e-4",
            "distil.patience=null",
            "validation.clips=held_out.csv",
            "validation.folds=[4, 5]",
            "engine.max_actors=2",
        ],
    )
    assert config.seed_training.steps == 11
    mix = build(MixConfig, MIX | {"gain_db": 2.5, "augment": False})
    assert config.distil == DistilConfig(learning_rate=1e-4, mix=mix)
    assert config.validation == ValidationConfig(clips="held_out.csv", folds=(4, 5))
    assert config.engine.max_actors == 2


def test_an_override_of_one_position_of_the_schedule() -> None:
    config = run_config("clearsep", [*CORPUS, "schedule.1.min_re_sdr_db=12.5", "schedule.1.max_coherence_fraction=0.7"])
    assert config.schedule == (
        Thresholds(min_re_sdr_db=10.0),
        Thresholds(min_re_sdr_db=12.5, max_coherence_fraction=0.7),
    )


@pytest.mark.parametrize("name", RECIPES)
def test_a_threshold_of_one_iteration_leaves_the_other_iterations_alone(name: str) -> None:
    before = run_config(name, CORPUS).schedule
    after = run_config(name, [*CORPUS, "schedule.1.min_re_sdr_db=3.25"]).schedule
    assert after[1].min_re_sdr_db == 3.25
    assert after[0] == before[0]


def test_an_override_of_a_whole_position_and_of_the_whole_list() -> None:
    config = run_config("clearsep", [*CORPUS, "schedule.0={min_remix_snr_db: 5}"])
    assert config.schedule == (Thresholds(min_remix_snr_db=5.0), Thresholds(min_re_sdr_db=15.0))
    config = run_config("clearsep", [*CORPUS, "schedule=[{min_re_sdr_db: 8}]", "clean_folds=[1, 2]"])
    assert config.schedule == (Thresholds(min_re_sdr_db=8.0),)
    assert config.clean_folds == (1, 2)


def test_a_limit_may_be_a_quantile() -> None:
    config = run_config("clearsep", [*CORPUS, "schedule.1.min_re_sdr_db={quantile: 0.4, by_label: true}"])
    assert config.schedule == (
        Thresholds(min_re_sdr_db=10.0),
        Thresholds(min_re_sdr_db=Quantile(quantile=0.4, by_label=True)),
    )
    assert build(Thresholds, override({}, ["min_re_sdr_db.quantile=0.25"])) == Thresholds(
        min_re_sdr_db=Quantile(quantile=0.25)
    )


def test_a_schedule_may_be_a_function_of_the_iteration(put: Put) -> None:
    path = put(
        "recipe: laptop\ncorpus: a.csv\nclean: b.csv\n"
        "schedule: {iterations: 3, min_re_sdr_db: {linear: [5, 15]}, min_stem_level_db: -20}\n"
    )
    expected = tuple(Thresholds(min_re_sdr_db=limit, min_stem_level_db=-20.0) for limit in (5.0, 10.0, 15.0))
    assert run_config(path).schedule == expected
    assert run_config(path, ["schedule.iterations=2"]).schedule == (expected[0], expected[2])
    changed = run_config(path, ["schedule.min_re_sdr_db={step: [1, 2], at: 2}", "schedule.min_stem_level_db=null"])
    assert changed.schedule == tuple(Thresholds(min_re_sdr_db=limit) for limit in (1.0, 2.0, 2.0))
    with pytest.raises(ValueError, match=r"cannot set schedule\.0 \(this schedule has shapes over the iterations\)"):
        run_config(path, ["schedule.0.min_re_sdr_db=3"])


def test_later_overrides_win_and_values_may_hold_equals_signs() -> None:
    assert override({}, ["a.b=1", "a.b=2", "c=x=y"]) == {"a": {"b": 2}, "c": "x=y"}


@pytest.mark.parametrize("text", ["distil.steps", "=5", " =5", ""])
def test_an_override_without_key_or_value_sign(text: str) -> None:
    with pytest.raises(ValueError, match="--set must be key=value"):
        run_config("laptop", [*CORPUS, text])


@pytest.mark.parametrize("text", ["schedule.7.min_re_sdr_db=1", "schedule.first.min_re_sdr_db=1", "schedule.-1={}"])
def test_a_position_that_is_not_there(text: str) -> None:
    with pytest.raises(ValueError, match="must have a position from 0 to 1"):
        run_config("clearsep", [*CORPUS, text])


@pytest.mark.parametrize("text", ["corpus=[1, 2", "clean=a: b: c", "distil={steps: 5"])
def test_a_value_that_is_not_yaml_is_an_error_that_names_it(text: str) -> None:
    with pytest.raises(ValueError, match=text.partition("=")[0]):
        run_config("laptop", [*CORPUS, text])


@pytest.mark.parametrize("text", ["clean_folds.0.x=1", "clean_folds.0.x.y=1"])
def test_a_key_below_a_plain_value_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="clean_folds"):
        run_config("laptop", [*CORPUS, "clean_folds=[1]", text])


# What does not fit.


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("corpsu", "there is no setting corpsu; did you mean 'corpus'"),
        ("distil.step", "there is no setting distil.step; did you mean 'steps'"),
        ("distil.mix.silence", "there is no setting distil.mix.silence; did you mean 'silence_rate'"),
        ("validation.clip", "there is no setting validation.clip; did you mean 'clips'"),
        ("schedule.1.min_re_sdr_db.quantil", "no setting schedule.1.min_re_sdr_db.quantil; did you mean 'quantile'"),
        ("schedule.1.min_re_sdr", "there is no setting schedule.1.min_re_sdr; did you mean 'min_re_sdr_db'"),
        ("engine.shard_seconds", "there is no setting engine.shard_seconds; did you mean 'shard_s'"),
        ("network.zzzzzzzz", "there is no setting network.zzzzzzzz; known: band_features, channels"),
    ],
)
def test_a_misspelt_key_names_the_nearest_at_its_depth(key: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        run_config("clearsep", [*CORPUS, f"{key}=1"])
    assert message in str(caught.value)


def test_a_misspelt_key_in_a_file(put: Put) -> None:
    with pytest.raises(ValueError, match=r"there is no setting distil\.mix\.gain; did you mean 'gain_db'"):
        run_config(put("corpus: a.csv\nclean: b.csv\ndistil: {mix: {gain: 3}}\n"))


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("corpus=5", "corpus"),
        ("distil.steps=many", "distil.steps"),
        ("distil.steps=1.5", "distil.steps"),
        ("distil.mix.augment=perhaps", "distil.mix.augment"),
        ("distil.mix=loud", "distil.mix"),
        ("distil=null", "distil"),
        ("clean_folds=one", "clean_folds"),
        ("clean_folds=[one]", "clean_folds.0"),
        ("schedule=10", "schedule"),
        ("schedule.0.min_re_sdr_db=high", "schedule.0.min_re_sdr_db"),
        ("schedule.0.min_re_sdr_db.quantile=high", "schedule.0.min_re_sdr_db.quantile"),
        ("network.channels=wide", "network.channels"),
    ],
)
def test_a_value_of_the_wrong_type_names_its_key(text: str, key: str) -> None:
    with pytest.raises(ValueError) as caught:
        run_config("clearsep", [*CORPUS, text])
    assert str(caught.value).startswith(f"{key} must be ")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("distil.steps=0", "distil.steps must be at least 1, got 0"),
        ("distil.mix.silence_rate=2", "distil.mix.silence_rate must be at most 1, got 2"),
        ("distil.num_workers=-1", "distil.num_workers must be at least 0, got -1"),
        ("engine.clip_s=-3", "engine.clip_s must be above 0, got -3"),
        ("network.channels=12", "network.channels must be a multiple of 8, got 12"),
        ("schedule.1.min_re_sdr_db=.inf", "schedule.1.min_re_sdr_db must be finite, got inf"),
        ("schedule.1.min_re_sdr_db={quantile: 2}", "schedule.1.min_re_sdr_db.quantile must be at most 1, got 2"),
        ("schedule={iterations: 2, min_re_sdr_db: {liner: [1, 2]}}", "no shape 'liner'; did you mean 'linear'"),
        ("schedule={min_re_sdr_db: 2}", "schedule.iterations must be a whole number from 1 on, got None"),
        ("corpus=", "corpus"),
    ],
)
def test_a_value_out_of_range_says_where_and_why(text: str, reason: str) -> None:
    with pytest.raises(ValueError) as caught:
        run_config("clearsep", [*CORPUS, text])
    assert reason in str(caught.value)
    assert "Value error" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_run_needs_a_corpus_and_a_seed_or_clean_clips() -> None:
    with pytest.raises(ValueError, match="corpus must be set, got nothing; set corpus"):
        run_config("laptop", ["clean=clips.csv"])
    with pytest.raises(ValueError, match="separator or clean must be set, got neither"):
        run_config("laptop", ["corpus=natural.csv"])


def test_validation_without_clips_names_what_is_missing() -> None:
    with pytest.raises(ValueError, match=r"validation\.clips"):
        run_config("laptop", [*CORPUS, "validation.seed=3"])


# build().


@pytest.mark.parametrize("kind", [DistilConfig, MixConfig, NetworkConfig, PassConfig, Thresholds, TrainingConfig])
def test_build_of_nothing_is_the_default(kind: type[Any]) -> None:
    assert build(kind, {}) == kind()


def test_build_takes_whole_numbers_for_fractions() -> None:
    assert build(Thresholds, {"min_re_sdr_db": 10}).min_re_sdr_db == 10.0
    assert isinstance(build(Thresholds, {"min_re_sdr_db": 10}).min_re_sdr_db, float)


def test_recipe_settings_are_plain() -> None:
    assert recipe_settings("clearsep", ["distil.steps=4"])["distil"] == {
        "mix": {"rivals_rate": 0.0, "share_mixture": False},
        "steps": 4,
    }


def test_the_lists_of_a_run_have_their_own_columns_and_folders(tmp_path: Path) -> None:
    (tmp_path / "natural.csv").write_text("fname,tags\na,dog;rain\n/outside,dog;rain\n")
    (tmp_path / "esc50.csv").write_text("filename,fold,category\na.wav,1.0,dog\n/b.wav,2,rain\n")
    names = ("path=filename,label=category", str(tmp_path / "clips"))
    settings = [
        *CORPUS,
        f"corpus={tmp_path / 'natural.csv'}",
        "columns=path={fname}.wav,labels=tags",
        f"audio_root={tmp_path / 'audio'}",
        f"clean={tmp_path / 'esc50.csv'}",
        f"clean_columns={names[0]}",
        f"clean_audio_root={names[1]}",
        f"validation.clips={tmp_path / 'esc50.csv'}",
        f"validation.columns={names[0]}",
        f"validation.audio_root={names[1]}",
        "validation.folds=[2]",
    ]
    with pytest.raises(ValueError, match=r"row 2: a path must stay below the root .*allow_outside in settings"):
        resolve(run_config("clearsep", settings))
    inputs = resolve(run_config("clearsep", [*settings, "allow_outside=true"]))
    assert pickle.loads(pickle.dumps(inputs)).corpus.clips["path"].to_pylist() == ["a.wav", "/outside.wav"]
    assert inputs.corpus.root == f"{tmp_path}/audio"
    assert inputs.clean is not None and inputs.clean.table["path"].to_pylist() == [f"{tmp_path}/clips/a.wav", "/b.wav"]
    assert inputs.validation is not None and inputs.validation.sources.labels == ["rain"]


# The stored config.


def test_the_config_stored_with_a_run_builds_the_same_run(tmp_path: Path) -> None:
    """A run whose iterations are all on disk reads its inputs, stores its config and does nothing else."""
    (tmp_path / "natural.csv").write_text("path,labels\na.wav,dog;rain\n")
    (tmp_path / "clips.csv").write_text("path,label,fold\na.wav,dog,1\nb.wav,rain,2\nc.wav,Dog,5\n")
    config = run_config(
        "clearsep",
        [
            *CORPUS,
            f"corpus={tmp_path / 'natural.csv'}",
            f"clean={tmp_path / 'clips.csv'}",
            f"training_validation.clips={tmp_path / 'clips.csv'}",
            "clean_folds=[1, 2]",
            "distil.mix.augment=false",
            "distil.patience=3",
            "schedule.1.max_coherence_fraction=0.75",
            f"validation.clips={tmp_path / 'clips.csv'}",
            "validation.folds=[5]",
            "engine.num_gpus_per_actor=0.5",
        ],
    )
    for number in range(3):
        write_json(tmp_path / "iterations" / str(number) / "iteration.json", {"iteration": number})
    summary = run(config, tmp_path)
    assert [entry["iteration"] for entry in summary["iterations"]] == [0, 1, 2]
    again = run_config(str(tmp_path / "config.yaml"))
    assert again == config
    assert isinstance(again, RunConfig)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["schedule"][1] == asdict(config.schedule[1])
