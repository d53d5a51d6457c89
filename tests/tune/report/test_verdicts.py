"""Verdicts on a report of a real run, written as its page writes them, calibrate an estimator for its separators."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.support.chaos import Undisturbed
from tests.support.command import Cli
from tune.report.collect import PassFacts, collect_run
from tune.report.listen import judged_stems, played_clips


@pytest.mark.slow
def test_every_stem_of_a_report_can_be_judged(undisturbed: Undisturbed, cli: Cli, tmp_path: Path) -> None:
    """The verdicts of a listener who finds the louder half of the stems good."""
    run = undisturbed.config.parent.parent / "undisturbed"
    facts = collect_run(run)
    judged = judged_stems(played_clips(facts, max_mb=25.0))
    stored = {key: level_db for one in facts.passes for key, level_db in levels(one).items()}
    levels_db = [stored[one["pass"], one["clip_id"], one["label"]] for one in judged.values()]
    with open(tmp_path / "verdicts.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        writer.writerow([*next(iter(judged.values())), "verdict"])
        for one, level_db in zip(judged.values(), levels_db, strict=True):
            writer.writerow([*one.values(), "good" if level_db > np.median(levels_db) else "bad"])
    settings = yaml.safe_load(undisturbed.config.read_text())
    words = ["--clean", settings["clean"], "--folds", "2", "--set", "num_mixtures=40", "--set", "max_s=1", "--json"]
    words += ["-o", str(tmp_path / "estimator"), "--verdicts", str(tmp_path / "verdicts.csv"), "--passes", str(run)]
    found = cli("calibrate", run / "iterations" / "2" / "separator", *words).document()["verdicts"]
    assert found["num_good"] + found["num_bad"] == len(judged) > 20
    assert found["num_without_stem"] == found["num_contradicting"] == 0
    assert 0.0 < found["auc"] <= 1.0 and 0.0 < found["auc_before"] <= 1.0


def levels(one: PassFacts) -> dict[tuple[object, ...], float]:
    """Level of every stem in dB, by pass, clip and label."""
    clips = one.stems.of_clips(sorted({clip_id for some in one.stems.identities() for clip_id, _ in some}))
    name = one.summary["fingerprint"]
    return {
        (name, row["clip_id"], row["label"]): row["scores"]["stem_level_db"] or 0.0
        for rows in clips.values()
        for row in rows
    }
