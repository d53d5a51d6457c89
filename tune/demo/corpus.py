"""Corpora with known sources: natural-looking clips mixed from single-source clips, and the settings of the demo."""

from __future__ import annotations

import csv
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile
import yaml

from engine.corpus.sources import SourceClips, read_sources
from engine.settings import Tree
from engine.storage.files import atomic_path, write_bytes
from train.evaluation.mixtures import draw_mixture
from tune.demo.sounds import LABELS, write_corpus
from tune.recipes import FIRST_THRESHOLDS, MIX, MOVING, THRESHOLDS

_LOGGER = logging.getLogger(__name__)
_PEAK = 0.9


def write_natural(
    sources: SourceClips,
    out: str | Path,
    *,
    num_clips: Sequence[tuple[int, int]],
    sample_rate_hz: int,
    seed: int,
    gain_db: float = 5.0,
    truth: str | Path | None = None,
) -> Path:
    """Write mixtures as 16-bit WAV files with a manifest ``path,labels``; returns the manifest, written last.

    ``num_clips`` has pairs: a number of sources, and the number of clips with so many. In folder ``truth``, the sources
    of every clip are written as ``CLIP/LABEL.flac``, at their level in the clip; a run does not read them.
    """
    out = Path(out)
    manifest = out / "natural.csv"
    if manifest.is_file():
        return manifest
    (out / "audio").mkdir(parents=True, exist_ok=True)
    rows = []
    for num_sources, count in num_clips:
        for number in range(count):
            rng = np.random.default_rng([seed, num_sources, number])
            mixture = draw_mixture(
                sources, num_sources=num_sources, sample_rate_hz=sample_rate_hz, rng=rng, gain_db=gain_db
            )
            name = f"clip-{num_sources}-{number:05d}"
            gain = min(1.0, _PEAK / float(np.abs(mixture.mix_T).max()))
            soundfile.write(out / "audio" / f"{name}.wav", mixture.mix_T * gain, sample_rate_hz, subtype="PCM_16")
            if truth is not None:
                _write_truth(Path(truth) / name, mixture.labels, mixture.sources_ST * gain, sample_rate_hz)
            rows.append({"path": f"audio/{name}.wav", "labels": ";".join(mixture.labels)})
    with atomic_path(manifest) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["path", "labels"])
        writer.writeheader()
        writer.writerows(rows)
    return manifest


def _write_truth(folder: Path, labels: Sequence[str], sources_ST: np.ndarray, sample_rate_hz: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for label, source_T in zip(labels, sources_ST, strict=True):
        soundfile.write(folder / f"{label}.flac", source_T, sample_rate_hz, subtype="PCM_24")


def demo_settings(out: str | Path, *, unlabelled: bool = False) -> Tree:
    """Synthesise the demo's corpus under ``out`` and return the settings of its run.

    The few clips of fold 1 train the seed, those of fold 2 are mixed to natural clips, fold 3 is for validation. With
    ``unlabelled`` the run gets the natural clips as a folder of files, among them some of one sound.
    """
    folder = Path(out).resolve() / "corpus"
    clips = folder / "clips.csv"
    if not clips.is_file():
        _LOGGER.info(f"synthesising {len(LABELS)} kinds of sound into {folder}")
        write_corpus(folder, num_per_label={1: 3, 2: 24, 3: 8}, seed=0)
    natural = write_natural(
        read_sources(clips, folds=[2]),
        folder,
        num_clips=[(2, 120), (3, 24)],
        sample_rate_hz=16000,
        seed=1,
        truth=folder / "truth",
    )
    if unlabelled:
        natural = _unlabelled(clips, folder)
    training = {"mix": {"batch_size": 12, "segment_s": 1.5}}
    moving: Tree = {"labels": {}} if unlabelled else {}
    return moving | {
        "corpus": str(natural),
        "clean": str(clips),
        "clean_folds": [1],
        "network": {"channels": 128, "num_blocks": 8, "num_bands": 48},
        "seed_training": {**training, "steps": 300},
        "distil": {"steps": 250, "mix": training["mix"] | MIX},
        "calibration": {"steps": 100, "num_mixtures": 150},
        "tagger_training": {"steps": 300},
        "schedule": [one | (MOVING if unlabelled else {}) for one in (FIRST_THRESHOLDS, THRESHOLDS)],
        "validation": {"clips": str(clips), "folds": [3], "num_mixtures": 80},
    }


def _unlabelled(clips: Path, folder: Path) -> Path:
    """A folder of natural clips of one to three sounds, whose names say nothing."""
    out = folder / "unlabelled"
    counts = [(1, 24), (2, 96), (3, 24)]
    sources = read_sources(clips, folds=[2])
    write_natural(sources, out, num_clips=counts, sample_rate_hz=16000, seed=1, truth=out / "truth")
    return out / "audio"


def write_demo_space(out: str | Path) -> Path:
    """Synthesise the demo's corpus under ``out`` and write the settings of a search over it; returns their file.

    The search takes minutes on two cores: its separators are smaller than the demo's and train for fewer steps, so
    the schedule that it finds need not suit other separators.
    """
    settings = demo_settings(out)
    mix = {"batch_size": 8, "segment_s": 1.0}
    training = {"mix": mix, "steps": 80, "num_workers": 0}
    network = {"sample_rate_hz": 16000, "num_fft": 1024, "hop_samples": 256}
    space = {
        "run": "clearsep",
        "set": {
            **{name: settings[name] for name in ("corpus", "clean", "clean_folds")},
            "network": network | {"channels": 64, "num_blocks": 4, "num_bands": 48},
            "seed_training": training | {"steps": 200},
            "distil": training | {"mix": mix | MIX},
            "engine": {"clip_s": 5.0},
            "schedule": [{"min_remix_snr_db": 3.0, "label_floor_fraction": 0.5}, {"min_remix_snr_db": 7.0}],
            "validation": settings["validation"] | {"num_mixtures": 60},
        },
        "iterations": 2,
        "schedule": {
            "min_stem_level_db": -20.0,
            "min_remix_snr_db": {"between": [0, 12], "step": 2},
            "min_re_sdr_db": {"between": [0, 15], "step": 5, "or": None},
            "label_floor_fraction": {"choose": [None, 0.3, 0.6]},
        },
        "trials": 8,
        "finalists": 2,
        "repeats": 2,
    }
    write_bytes(Path(out) / "space.yaml", yaml.safe_dump(space, sort_keys=False).encode())
    return Path(out) / "space.yaml"
