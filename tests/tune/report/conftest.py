"""A small run of two iterations made by the project's own writers, without Ray, whose names are hostile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.schema import failure
from engine.selection.thresholds import Thresholds
from engine.selection.tracks import Selection, select_tracks
from engine.storage.files import write_json

RATE_HZ, DURATION_S = 8000, 4.0
MARKUP = "<script>window.hacked = 1</script>"
LABELS = (MARKUP, "\"quoted\" 'label' & <b>bold</b>", "right\u202eto left", "long " + "x" * 10_000)
FILE = "<img src=x onerror='window.hacked = 1'>"
LIMITS = ({"min_re_sdr_db": 6.0, "min_stem_level_db": -20.0}, {"min_re_sdr_db": 8.0, "min_stem_level_db": -15.0})
NUM_CLIPS = 10
Write = Callable[..., Path]


def scores(seed: int) -> dict[str, float]:
    rng = np.random.default_rng(seed)
    return {
        "re_sdr_db": float(rng.uniform(0, 20)),
        "remix_snr_db": float(rng.uniform(0, 20)),
        "stem_level_db": float(rng.uniform(-30, 0)),
    }


def stems(iteration: int) -> list[tuple[str, str, np.ndarray, dict[str, float]]]:
    time_T = np.arange(round(DURATION_S * RATE_HZ)) / RATE_HZ
    found = []
    for clip in range(NUM_CLIPS):
        shared = scores(100 * iteration + clip)
        for number in range(2):
            tone_T = (0.2 * np.sin(2 * np.pi * (300 + 100 * clip + 900 * number) * time_T)).astype(np.float32)
            label, own = LABELS[(clip + number) % len(LABELS)], scores(1000 * iteration + 10 * clip + number)
            found.append((f"{FILE}{clip}", label, tone_T, shared | {"stem_level_db": own["stem_level_db"]}))
    return found


def record(iteration: int, selection: Selection | None, sdri_db: float) -> dict[str, Any]:
    """The record of an iteration; null: the seed's."""
    figures = {"sdri_db": sdri_db, "si_sdri_db": sdri_db - 1.0, "num_stems": 20}
    by_label = {label: figures | {"sdri_db": sdri_db + number} for number, label in enumerate(LABELS)}
    validation = figures | {"by_label": by_label, "confidence_95": {"sdri_db": [sdri_db - 0.5, sdri_db + 0.5]}}
    counts = dict.fromkeys(("num_clips", "num_set_aside", "num_queries", "num_stems", "num_failed"), 0)
    found = {"iteration": iteration, **counts, "num_kept": 0, "num_rejected": {}, "kept_h": 0.0, "thresholds": {}}
    if selection is not None:
        found |= {"num_queries": selection["num_stems"] + 2, "num_stems": selection["num_stems"], "num_failed": 2}
        found |= {name: selection[name] for name in ("num_kept", "num_rejected", "kept_h", "thresholds")}  # type: ignore[literal-required]
    return found | {"validation": validation, "wall_s": 60.0}


@pytest.fixture
def run_folder(tmp_path: Path, write_pass: Write) -> Path:
    """The folder of the run; two queries of every pass failed."""
    records = [record(0, None, 4.0)]
    clip = {"clip_id": "f", "path": f"{FILE}.wav", "labels": list(LABELS[:2]), "start_s": None, "end_s": None}
    failed = dict(failure(clip, step="decode", error=ValueError(f"cannot read {MARKUP}; repair it")))
    for number, limits in enumerate(LIMITS, 1):
        out = write_pass(stems(number), folder=f"run/iterations/{number}", failures=[failed])
        selection = select_tracks(out, out / "tracks", Thresholds(**limits, rank_by="remix_snr_db"))
        records.append(record(number, selection, 4.0 + number))
    write_json(tmp_path / "run" / "summary.json", {"iterations": records})
    address = "https://user:secret@host/list.csv?signature=secret"
    (tmp_path / "run" / "config.yaml").write_text(f"corpus: {address}\nclean: '{MARKUP}'\n")
    return tmp_path / "run"
