"""Fixtures of all tests: fixed threads and seeds, and small folders made by the engine's own writers."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from engine.audio.flac import encode_flac24
from engine.passes.records import write_record
from engine.passes.shards import write_shard
from engine.schema import STEMS
from engine.separators import NetworkConfig, QuerySeparator, save
from engine.storage.files import write_json
from tests.support.command import cli  # noqa: F401 - a fixture
from tests.support.remixes import clean, natural, recordings, tracks  # noqa: F401 - fixtures
from tests.support.wav import write_wav

if TYPE_CHECKING:
    from tests.support.chaos import Undisturbed

RATE_HZ = 8000
TINY = NetworkConfig(
    sample_rate_hz=RATE_HZ, num_fft=256, hop_samples=128, num_bands=8, channels=8, num_blocks=1, query_features=4
)


def pytest_configure() -> None:
    os.environ.pop("COLUMNS", None)
    os.unsetenv("COLUMNS")  # readline sets it in pytest's process for all children; commands of tests write to files
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts a command in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def pinned() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def ray_ends_with_its_module() -> Iterator[None]:
    """A Ray that a test leaves connected would be that of the next module, with another environment."""
    yield
    ray = sys.modules.get("ray")
    assert ray is None or not ray.is_initialized()


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """A small run of two iterations; interrupted runs must end with the same data."""
    from tests.support import chaos

    return chaos.run_undisturbed(tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture
def write_sources(tmp_path: Path) -> Callable[..., Path]:
    """Writes float WAV files and their CSV path,label,fold; each clip is ``(name, label, fold, samples)``."""

    def write(clips: Sequence[tuple[str, str, int, np.ndarray]], *, folder: str = "sources") -> Path:
        out = tmp_path / folder
        out.mkdir(parents=True, exist_ok=True)
        lines = ["path,label,fold"]
        for name, label, fold, samples_T in clips:
            write_wav(out / f"{name}.wav", np.asarray(samples_T, np.float32), sample_rate_hz=RATE_HZ)
            lines.append(f"{name}.wav,{label},{fold}")
        (out / "clips.csv").write_text("\n".join(lines) + "\n")
        return out / "clips.csv"

    return write


@pytest.fixture
def write_pass(tmp_path: Path) -> Callable[..., Path]:
    """Writes a closed pass of one shard; each stem is ``(clip_id, label, samples, scores)``; returns its folder.

    The stems of a clip must be consecutive. Its mixture is their sum and its labels are theirs, unless ``mixtures``
    (None: not stored) or ``labels`` has others.
    """

    def write(
        stems: Sequence[tuple[str, str, np.ndarray, Mapping[str, float | None]]],
        *,
        folder: str = "pass",
        sample_rate_hz: int = RATE_HZ,
        failures: Sequence[dict[str, Any]] = (),
        mixtures: Mapping[str, np.ndarray | None] | None = None,
        labels: Mapping[str, Sequence[str]] | None = None,
    ) -> Path:
        out, shard = tmp_path / folder, "shard-000000-0000"
        order = [clip_id for clip_id, *_ in stems]
        clips = {clip_id: [stem for stem in stems if stem[0] == clip_id] for clip_id in order}
        assert order == [clip_id for clip_id in clips for _ in clips[clip_id]], (
            "the stems of a clip must be consecutive"
        )
        sums = {
            clip_id: np.sum([samples_T for _, _, samples_T, _ in group], axis=0, dtype=np.float32)
            for clip_id, group in clips.items()
        }
        coded = {
            clip_id: encode_flac24(samples_T, sample_rate_hz=sample_rate_hz)
            for clip_id, samples_T in (sums | dict(mixtures or {})).items()
            if samples_T is not None
        }
        rows = []
        for number, (clip_id, label, samples_T, scores) in enumerate(stems):
            audio_flac, audio_exponent = encode_flac24(samples_T, sample_rate_hz=sample_rate_hz)
            is_first = number == order.index(clip_id)
            mixture_flac, mixture_exponent = coded.get(clip_id, (None, None)) if is_first else (None, None)
            rows.append(
                {
                    "clip_id": clip_id,
                    "path": f"{clip_id}.wav",
                    "labels": list((labels or {}).get(clip_id, [name for _, name, *_ in clips[clip_id]])),
                    "start_s": None,
                    "end_s": None,
                    "label": label,
                    "sample_rate_hz": sample_rate_hz,
                    "num_samples": len(samples_T),
                    "audio_flac": audio_flac,
                    "audio_exponent": audio_exponent,
                    "mixture_flac": mixture_flac,
                    "mixture_exponent": mixture_exponent,
                    **scores,
                }
            )
        record = write_shard(out, shard, stems=pa.Table.from_pylist(rows, schema=STEMS), failures=list(failures))
        audio_s = sum(len(samples_T) for samples_T in sums.values()) / sample_rate_hz
        write_record(out, shard, {"num_clips": len(clips), "audio_s": audio_s, **record})
        write_json(out / "stems" / "pass.json", {"separator_fingerprint": "teacher"})
        manifest = {
            "num_clips": len(clips),
            "num_set_aside": 0,
            "num_queries": len(rows) + sum(row["num_queries"] for row in failures),
            "num_stems": len(rows),
            "num_failed": sum(row["num_queries"] for row in failures),
            "audio_h": 0.001,
            "wall_s": 2.0,
            "audio_s_per_s": 1.8,
            "step_s": {"decode": 0.4, "separate": 1.0, "assess": 0.2, "score": 0.2, "write": 0.2},
            "step_fraction": {"decode": 0.2, "separate": 0.5, "assess": 0.1, "score": 0.1, "write": 0.1},
            "separator_fingerprint": "teacher",
            "config_fingerprint": "settings",
            "fingerprint": "hand-made",
            "shards": {shard: record["sha256"]},
        }
        write_json(out / "stems" / "manifest.json", manifest)
        return out

    return write


@pytest.fixture
def write_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Saves a tiny untrained separator for some labels; returns its folder."""

    def write(labels: Sequence[str], *, folder: str = "separator", history: Sequence[dict[str, Any]] = ()) -> Path:
        save(QuerySeparator(TINY, labels), tmp_path / folder, history=history)
        return tmp_path / folder

    return write
