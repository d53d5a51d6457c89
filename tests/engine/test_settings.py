"""Config classes: what they check and how they say it, how YAML and ``--set`` fill them, and what decides a result."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from engine.cli.describe_settings import describe_settings
from engine.errors import TooManyFailuresError
from engine.passes.config import PassConfig
from engine.settings import (
    RUNTIME,
    Count,
    Fraction,
    Positive,
    build,
    config,
    deciding,
    merged,
    named_in,
    override,
    plain,
    read_yaml,
)
from tune.config import RunConfig


@config
class Mix:
    """How mixtures are made."""

    silence_rate: Fraction = 0.05
    """Fraction of silent targets."""
    kind: Literal["loud", "quiet"] = "loud"
    """Kind of mixture."""


@config
class Training:
    """A training."""

    out: str
    """Folder of the result."""
    steps: Count = 800
    """Updates of the weights."""
    rate: Positive = 1e-3
    """Peak learning rate."""
    mix: Mix = dataclasses.field(default_factory=Mix)
    """Mixtures."""
    folds: tuple[int, ...] | None = None
    """Folds to use; null: all."""
    stages: tuple[Mix, ...] = ()
    """Mixtures by stage."""
    num_threads: Annotated[int, RUNTIME] = 2
    """Threads."""

    def __post_init__(self) -> None:
        if self.steps < 10 and self.rate > 0.1:
            raise ValueError(f"rate must be at most 0.1 below 10 steps, got {self.rate}; choose more steps")


def test_a_config_object_is_a_frozen_keyword_only_dataclass() -> None:
    training = Training(out="x", steps=5)
    assert (training.steps, training.mix, training.folds) == (5, Mix(), None)
    assert dataclasses.replace(training, steps=6).steps == 6
    with pytest.raises(dataclasses.FrozenInstanceError):
        training.steps = 7  # type: ignore[misc]
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        dataclasses.replace(training, steps=0)
    with pytest.raises(ValueError, match="must be given by name, got 'x'"):
        Training("x")  # type: ignore[misc]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0; choose one such as 800"),
        ({"steps": 2.5}, "steps must be a whole number, got 2.5; choose one such as 800"),
        ({"steps": True}, "steps must be a number, got true; give a number"),
        ({"rate": 0.0}, "rate must be above 0, got 0.0; choose one such as 0.001"),
        ({"rate": float("nan")}, "rate must be finite, got nan; choose one such as 0.001"),
        ({"rate": "fast"}, "rate must be a number, got 'fast'; choose one such as 0.001"),
        ({"mix": {"silence_rate": 1.5}}, "mix.silence_rate must be at most 1, got 1.5; choose one such as 0.05"),
        ({"mix": {"kind": "low"}}, "mix.kind must be one of 'loud' or 'quiet', got 'low'; choose one such as loud"),
        ({"mix": {"silence": 0.1}}, "there is no setting mix.silence; did you mean 'silence_rate'?"),
        ({"step": 5}, "there is no setting step; did you mean 'steps'?"),
        ({"stages": [{}, {"silence_rate": -1}]}, "stages.1.silence_rate must be at least 0, got -1"),
        ({"steps": 5, "rate": 1.0}, "rate must be at most 0.1 below 10 steps, got 1.0; choose more steps"),
    ],
)
def test_a_wrong_setting_is_named_with_its_rule_its_value_and_a_remedy(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        build(Training, {"out": "x", **settings})
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_required_setting_must_be_set() -> None:
    with pytest.raises(ValueError, match="out must be set, got nothing; set out"):
        build(Training, {})


def test_a_config_object_is_built_from_plain_settings_or_returned_as_it_is() -> None:
    training = build(Training, {"out": "x", "mix": {"kind": "quiet"}, "folds": [1, 2], "stages": [{"kind": "quiet"}]})
    assert training == Training(out="x", mix=Mix(kind="quiet"), folds=(1, 2), stages=(Mix(kind="quiet"),))
    assert build(Training, training) is training
    assert build(Training, plain(training)) == training
    with pytest.raises(ValueError, match="settings must be a mapping of names to values, got 'steps=3'"):
        build(Training, "steps=3")  # type: ignore[arg-type]


def test_settings_that_do_not_decide_a_result_are_left_out() -> None:
    training = Training(out="x", num_threads=8)
    assert "num_threads" not in deciding(training)
    assert deciding(training) == deciding(Training(out="x", num_threads=1)) != deciding(Training(out="x", steps=5))
    assert deciding(plain(training), Training) == deciding(training)


@pytest.mark.parametrize("kind", [ValueError, TooManyFailuresError])
def test_an_error_names_a_setting_as_the_settings_around_it_do(kind: type[Exception]) -> None:
    message = (
        "set clip_s to 5 (`--set clip_s=5`), not engine.min_clip_s, /clip_s/ or reseparate; the engine reseparates"
    )
    with pytest.raises(kind) as caught, named_in("set", RunConfig), named_in("engine", PassConfig):
        raise kind(message)
    assert str(caught.value) == (
        "set set.engine.clip_s to 5 (`--set set.engine.clip_s=5`), not set.engine.min_clip_s, /clip_s/ or reseparate; "
        "the engine reseparates"
    )


def test_overrides_are_yaml_at_any_depth() -> None:
    settings = override({"mix": {"silence_rate": 0.1}}, ["steps=5", "mix.kind=quiet", "folds=[1, 2]", "out=null"])
    assert settings == {"mix": {"silence_rate": 0.1, "kind": "quiet"}, "steps": 5, "folds": [1, 2], "out": None}
    assert override({"stages": [{}, {}]}, ["stages.1.kind=quiet"]) == {"stages": [{}, {"kind": "quiet"}]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps", "--set must be key=value, got 'steps'; write it like distil.steps=200"),
        ("=5", "--set must be key=value, got '=5'"),
        ("steps=[1", "--set must have a YAML value, got 'steps=[1'; quote it"),
        ("stages.2.kind=quiet", "--set must have a position from 0 to 1, got '2' in stages.2.kind=quiet"),
        ("out.name=x", None),
    ],
)
def test_a_wrong_override_is_named(text: str, message: str | None) -> None:
    settings = {"stages": [{}, {}], "out": "x"}
    if message is None:  # a value becomes a mapping; the config class says whether it may
        assert override(settings, [text])["out"] == {"name": "x"}
        return
    with pytest.raises(ValueError) as caught:
        override(settings, [text])
    assert str(caught.value).startswith(message)
    assert settings == {"stages": [{}, {}], "out": "x"}


def test_inner_mappings_are_merged_and_all_else_replaced() -> None:
    base = {"a": {"x": 1, "y": {"z": 2}}, "b": [1, 2]}
    assert merged(base, {"a": {"y": {"w": 3}}, "b": [3]}) == {"a": {"x": 1, "y": {"z": 2, "w": 3}}, "b": [3]}
    assert base == {"a": {"x": 1, "y": {"z": 2}}, "b": [1, 2]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read .*run.yaml .*; give the path of a YAML file"),
        ("a: [1, 2", "cannot read .*run.yaml as YAML .*; correct it"),
        ("- a", "run.yaml must be a mapping of settings, got list; write it like `corpus: clips.csv`"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused(text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_yaml(path, "corpus: clips.csv")


@pytest.mark.parametrize(
    "text", ["root: x: notforyou", "notforyou: [1", "notforyou: 'x", "\tnotforyou", "- notforyou\n]"]
)
def test_a_message_shows_nothing_of_a_file_that_is_no_yaml(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"cannot read .*run.yaml as YAML \(.* in line \d+, column \d+\)") as refused:
        read_yaml(tmp_path / "run.yaml", "corpus: clips.csv")
    assert "notforyou" not in str(refused.value)


def test_every_setting_is_described() -> None:
    found = {setting.name: setting for setting in describe_settings(Training)}
    assert list(found) == [
        *("out", "steps", "rate", "mix.silence_rate", "mix.kind", "folds", "stages", "num_threads"),
    ]
    steps, folds = found["steps"], found["folds"]
    assert (steps.type, steps.range, steps.default, steps.meaning) == (
        *("whole number", "at least 1", "800", "Updates of the weights."),
    )
    assert (folds.type, folds.default, found["out"].default) == ("list of whole number or null", "null", "required")
    assert (found["mix.silence_rate"].range, found["rate"].range) == ("at least 0, at most 1", "above 0")
    assert found["mix.kind"].type == "`loud` or `quiet`"
    assert [name for name, setting in found.items() if setting.is_runtime] == ["num_threads"]
