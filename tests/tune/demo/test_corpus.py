"""Corpora with known sources: what is written, and that it is the same every time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

from engine.corpus.read import read_corpus
from engine.corpus.sources import read_sources
from tune.demo import sounds as synth
from tune.demo.corpus import write_natural


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    return synth.write_corpus(folder, num_per_label={1: 1, 2: 2}, seed=0, duration_s=1.0)


def _write(clips: Path, out: Path, truth: Path | None = None) -> Path:
    sources = read_sources(clips, folds=[2])
    return write_natural(sources, out, num_clips=[(2, 4), (3, 2)], sample_rate_hz=16000, seed=3, truth=truth)


def test_the_manifest_names_every_clip_and_its_labels(clips: Path, tmp_path: Path) -> None:
    corpus = read_corpus(_write(clips, tmp_path))
    assert [len(row["labels"]) for row in corpus.clips.to_pylist()] == [2, 2, 2, 2, 3, 3]
    assert len(corpus.failures) == 0
    assert (tmp_path / "natural.csv").read_text().splitlines()[0] == "path,labels"


def test_the_truth_adds_up_to_the_clip_and_lies_apart(clips: Path, tmp_path: Path) -> None:
    manifest = _write(clips, tmp_path / "corpus", tmp_path / "truth")
    for row in read_corpus(manifest).clips.to_pylist():
        clip_T, _ = soundfile.read(manifest.parent / row["path"])
        folder = tmp_path / "truth" / Path(row["path"]).stem
        assert {path.stem for path in folder.iterdir()} == set(row["labels"])
        sources = [soundfile.read(path)[0] for path in folder.iterdir()]
        assert np.abs(np.sum(sources, axis=0) - clip_T).max() < 2**-14
        assert np.abs(clip_T).max() <= 0.91
    assert not list((tmp_path / "corpus").rglob("truth*"))


def test_the_same_seed_writes_the_same_bytes_and_what_is_there_is_left(clips: Path, tmp_path: Path) -> None:
    first, second = _write(clips, tmp_path / "a"), _write(clips, tmp_path / "b")
    for path in sorted((tmp_path / "a").rglob("*.*")):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()
    assert first.read_text() == second.read_text()
    before = first.stat().st_mtime_ns
    assert _write(clips, tmp_path / "a").stat().st_mtime_ns == before


def test_natural_levels_differ_between_the_sources(clips: Path, tmp_path: Path) -> None:
    _write(clips, tmp_path / "corpus", tmp_path / "truth")
    ratios_db = []
    for folder in (tmp_path / "truth").iterdir():
        levels = [float(np.sum(soundfile.read(path)[0] ** 2)) for path in sorted(folder.iterdir())]
        ratios_db.append(10 * np.log10(max(levels) / min(levels)))
    assert max(ratios_db) > 3.0
