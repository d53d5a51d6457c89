"""Recipes: complete run settings by name, which a YAML file and ``--set`` may change."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from engine.errors import nearest
from engine.selection.thresholds import DEFAULT_THRESHOLDS
from engine.settings import Tree, build, merged, override, plain, read_yaml
from engine.storage.paths import Name
from tune.config import RunConfig

THRESHOLDS: Tree = dict(DEFAULT_THRESHOLDS)
"""Default thresholds of later iterations."""

FIRST_THRESHOLDS: Tree = THRESHOLDS | {
    "min_remix_snr_db": 3.0,
    "min_mask_snr_db": 0.0,
    "min_share_si_sdr_db": 2.0,
    "min_estimated_si_sdr_db": 0.0,
}
"""Default thresholds of iteration 1: a weak separator's imperfect stems are still worth learning from."""

MIX: Tree = {"clip_fraction": 0.33, "self_remix": {"fraction": 0.2}}
"""Mixtures of a student that learns from such tracks, where they differ from the default (``benchmarks/gain.py``)."""


MOVING: Tree = {"drop_label_below": 0.5, "add_label_from": 0.7}
"""Limits by which the labels of clips move that came without any (``benchmarks/labels/labels.md``)."""


def _clearsep() -> Tree:
    """The published baseline: Re-SDR thresholds of 10 and then 15 dB, two iterations, 32 kHz, 10 s clips.

    Its queries name one label, and it learns from the stems as they are.
    """
    network = {"sample_rate_hz": 32000, "num_fft": 2048, "hop_samples": 512}
    return {
        "network": network,
        "schedule": [{"min_re_sdr_db": 10.0}, {"min_re_sdr_db": 15.0}],
        "seed_training": {"mix": {"rivals_rate": 0.0}},
        "distil": {"mix": {"rivals_rate": 0.0, "share_mixture": False}},
    }


def _laptop() -> Tree:
    """Small network at 16 kHz, two iterations with the default thresholds; hours on two cores."""
    return {"distil": {"mix": MIX}, "schedule": [FIRST_THRESHOLDS, THRESHOLDS]}


def _unlabelled() -> Tree:
    """The same for recordings without labels: a tagger gives them, and every pass moves them."""
    laptop = _laptop()
    return laptop | {"labels": {}, "schedule": [thresholds | MOVING for thresholds in laptop["schedule"]]}


RECIPES: Mapping[str, Callable[[], Tree]] = {"clearsep": _clearsep, "laptop": _laptop, "unlabelled": _unlabelled}
"""Every recipe by name."""


def recipe_settings(source: Mapping[str, Any] | Name, overrides: Iterable[str] = ()) -> Tree:
    """Settings of a recipe, or of a YAML file or mapping (which may name its ``recipe``), with overrides."""
    if isinstance(source, Mapping):
        return override(_with_recipe(plain(source), "the settings"), overrides)
    if (name := str(source)) in RECIPES:
        return override(RECIPES[name](), overrides)
    if Path(name).is_file():
        return override(_with_recipe(read_yaml(name, "corpus: clips.csv"), name), overrides)
    raise ValueError(f"there is no recipe or YAML file {name!r}; {nearest(name, RECIPES)}")


def _with_recipe(settings: Tree, origin: str) -> Tree:
    recipe = settings.pop("recipe", None)
    if recipe is None:
        return settings
    if not isinstance(recipe, str) or recipe not in RECIPES:
        raise ValueError(f"there is no recipe {recipe!r} (in {origin}); {nearest(str(recipe), RECIPES)}")
    return merged(RECIPES[recipe](), settings)


def run_config(source: RunConfig | Mapping[str, Any] | Name, overrides: Iterable[str] = ()) -> RunConfig:
    """The run config of a recipe, YAML file or mapping, with overrides; a run config is returned as it is."""
    if isinstance(source, RunConfig):
        return source
    return build(RunConfig, recipe_settings(source, overrides))
