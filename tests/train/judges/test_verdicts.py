"""Verdicts from reports: how their stems are found, and what of a file is refused or counted."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from engine.scoring.estimator import load_estimator
from tests.support.command import Cli
from tests.support.signals import two_bands
from train.judges.verdicts import read_verdicts

Write = Callable[..., Path]
NAMES = ("pass", "iteration", "clip_id", "path", "label", "outcome", "verdict")
LABELS = ("low", 'high "quoted", and\nbroken')
NUM_CLIPS = 20


@pytest.fixture
def judged_pass(write_pass: Write) -> Path:
    """A pass in which a higher mask SNR is better; clips have two stems."""
    stems = [
        (f"clip {clip}", label, two_bands(2000, seed=clip)[number], {"mask_snr_db": float(clip), "re_sdr_db": None})
        for clip in range(NUM_CLIPS)
        for number, label in enumerate(LABELS)
    ]
    return write_pass(stems)


def row(clip: int, verdict: str, *, label: int = 0, name: str = "hand-made") -> list[str]:
    return [name, "1", f"clip {clip}", f"clip {clip}.wav", LABELS[label], "kept", verdict]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(rows: Sequence[Sequence[str]], *, names: Sequence[str] = NAMES, file: str = "verdicts.csv") -> Path:
        with open(tmp_path / file, "w", newline="", encoding="utf-8") as out:
            csv.writer(out).writerows([names, *rows])
        return tmp_path / file

    return write


def test_verdicts_find_their_stems_and_scores(judged_pass: Path, write: Write) -> None:
    first = write([row(3, "bad"), row(3, "good", label=1), row(4, "wrong label", label=1)])
    second = write([row(3, "bad"), row(9, "good")], file="more.csv")
    judged = read_verdicts([first, second], [judged_pass])
    found = zip(judged.groups, judged.scores["mask_snr_db"].to_pylist(), judged.is_good, strict=True)
    assert sorted(found) == [
        ("clip 3", 3.0, False),
        ("clip 3", 3.0, True),
        ("clip 4", 4.0, False),
        ("clip 9", 9.0, True),
    ]
    assert judged.about["num_verdicts"] == 5
    again = read_verdicts([second, first], [judged_pass])
    assert again.about == judged.about, "the hash is that of the verdicts, in any order"
    assert read_verdicts([write([row(3, "good"), row(4, "bad")])], [judged_pass]).about != judged.about


def test_what_cannot_be_used_is_counted(judged_pass: Path, write: Write) -> None:
    contradicting = [row(5, "good"), row(5, "wrong label")]
    gone = [row(99, "good"), ["hand-made", "", "clip 3", "", "unknown", "", "bad"]]
    judged = read_verdicts([write([row(1, "good"), row(2, "bad"), *contradicting, *gone])], [judged_pass])
    assert judged.about.items() >= {"num_good": 1, "num_bad": 1, "num_contradicting": 1, "num_without_stem": 2}.items()
    assert judged.groups == ["clip 1", "clip 2"]


def test_what_is_no_download_is_refused(judged_pass: Path, write: Write, tmp_path: Path) -> None:
    rows = [row(1, "good"), row(2, "bad")]
    for cells, names, message in (
        ([[*one, "5"] for one in rows], [*NAMES, "stars"], r"must have the columns pass,.*'stars'"),
        ([one[1:] for one in rows], NAMES[1:], r"must have the columns pass,.*\['pass'\]"),
        ([*rows, row(3, "fine")], NAMES, r"with good, bad, wrong label as verdict, got 'fine' last in line 4 of"),
        ([*rows, row(3, "bad")[1:]], NAMES, r"must be a row of 7 cells .* in line 4"),
        ([*rows, row(3, "bad", name="another")], NAMES, r"got one of pass 'another'; give the run or pass"),
        ([row(1, "good"), row(2, "good")], NAMES, r"good and on bad stems, got 2 good and 0 bad"),
        ([], NAMES, r"got 0 good and 0 bad"),
    ):
        with pytest.raises(ValueError, match=message):
            read_verdicts([write(cells, names=names)], [judged_pass])
    with pytest.raises(ValueError, match="there is no pass"):
        read_verdicts([write(rows)], [tmp_path])


def test_the_command_uses_verdicts_and_says_what_they_changed(
    judged_pass: Path, write: Write, write_sources: Write, write_checkpoint: Write, cli: Cli, tmp_path: Path
) -> None:
    clips = write_sources(
        [
            (f"{label}-{seed}", label, 1, two_bands(4000, seed=seed)[number])
            for number, label in enumerate(("low", "high"))
            for seed in range(4)
        ]
    )
    file = write([row(clip, "good" if clip < 8 else "bad", label=clip % 2) for clip in range(NUM_CLIPS)])
    words = ["calibrate", write_checkpoint(("low", "high")), "--clean", clips, "--set", "num_mixtures=30"]
    plain = cli(*words, "-o", tmp_path / "plain", "--json").document()
    report = cli(*words, "-o", tmp_path / "judged", "--verdicts", file, "--passes", judged_pass, "--json").document()
    assert "verdicts" not in plain and plain["fingerprint"] != report["fingerprint"]
    verdicts = report["verdicts"]
    assert (verdicts["num_good"], verdicts["num_bad"], verdicts["num_without_stem"]) == (8, 12, 0)
    assert 0.0 <= verdicts["auc_before"] <= 1.0 and 0.0 <= verdicts["auc"] <= 1.0
    assert report["weights"] != plain["weights"]
    stored = json.loads((tmp_path / "judged" / "estimator.json").read_text())
    assert stored["about"]["verdicts"] == verdicts and len(verdicts["fingerprint"]) == 16
    assert np.isfinite(load_estimator(tmp_path / "judged").weight).all()
    table = cli(*words, "-o", tmp_path / "judged", "--verdicts", file, "--passes", judged_pass).out
    assert "8 and 12" in table and "AUC on the verdicts, cross-validated" in table
    assert "--verdicts must be given with --passes" in cli(*words, "-o", tmp_path / "x", "--verdicts", file).error()
