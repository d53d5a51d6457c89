"""The demo on a folder of recordings without labels, as its user starts it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SMALL = (
    "seed_training.steps=30",
    "distil.steps=20",
    "calibration.steps=10",
    "calibration.num_mixtures=40",
    "tagger_training.steps=40",
    "network.channels=32",
    "network.num_blocks=2",
    "validation.num_mixtures=8",
    "labels.precision=0.4",
)


@pytest.mark.slow
def test_a_folder_without_labels_becomes_a_student_with_one_command(tmp_path: Path) -> None:
    limits = ["--set", "schedule=[{min_stem_level_db: -40, drop_label_below: 0.5, add_label_from: 0.7}]"]
    settings = [word for setting in SMALL for word in ("--set", setting)]
    command = [
        sys.executable,
        "-m",
        "clearsep",
        "demo",
        "--unlabelled",
        "-o",
        str(tmp_path),
        *settings,
        *limits,
        "--json",
    ]
    done = subprocess.run([*command, *settings, *limits], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    first, last = json.loads(done.stdout)["iterations"]
    assert first["labels"]["num_clips"] == last["labels"]["num_clips"] == 144
    assert last["labels"]["num_before"] == first["labels"]["num_after"] > 0
    assert last["num_kept"] > 0 and last["validation"] is not None
    assert (tmp_path / "unlabelled" / "iterations" / "1" / "separator" / "separator.json").is_file()
    assert "True SI-SDR, mean: " in (tmp_path / "unlabelled" / "report.html").read_text()
    assert not list((tmp_path / "corpus" / "unlabelled" / "audio").glob("*.csv"))
