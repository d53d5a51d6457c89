"""Sounds with known answers, corpora of real files and simple separators, shared by the tests.

All audio is at 8 kHz and about a second long: the tests do not depend on either.
"""

from __future__ import annotations

import csv
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import soundfile
import torch
from torch import Tensor

from engine.passes.config import PassConfig
from engine.passes.decode import Decode
from engine.passes.records import failure_rows, missing_tasks, read_totals, shard_records
from engine.passes.separate import Separate
from engine.passes.tasks import Tasks
from engine.passes.transport import unpack
from engine.passes.write import Write
from engine.schema import FAILURES, DecodedClip
from engine.separators import NetworkConfig, QuerySeparator, Separator, save
from engine.storage.files import write_json
from engine.storage.fingerprints import fingerprint
from engine.storage.paths import Location
from engine.taggers import Tagger

RATE_HZ = 8000
SPLIT_HZ = 1000.0
MARKER = 0.123456
TINY = NetworkConfig(
    channels=16, num_blocks=2, num_bands=20, num_fft=256, hop_samples=64, sample_rate_hz=RATE_HZ, query_features=8
)
_SENTENCE = "The sound of "


def tone(freq_hz: float, duration_s: float, *, level: float = 0.25) -> np.ndarray:
    """A sine [T]; without leakage where it has whole periods."""
    return (level * np.sin(2 * np.pi * freq_hz * np.arange(round(duration_s * RATE_HZ)) / RATE_HZ)).astype(np.float32)


def band_noise(num_samples: int, *, low_hz: float, high_hz: float, seed: int, rms: float = 0.1) -> np.ndarray:
    """Noise [T] with a spectrum of exactly zero outside ``low_hz <= f < high_hz``."""
    hz_F = np.fft.rfftfreq(num_samples, 1 / RATE_HZ)
    spectrum_F = np.fft.rfft(np.random.default_rng(seed).standard_normal(num_samples))
    noise_T = np.fft.irfft(spectrum_F * ((hz_F >= low_hz) & (hz_F < high_hz)), num_samples)
    return (rms * noise_T / np.sqrt(np.mean(noise_T**2))).astype(np.float32)


def two_bands(num_samples: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two signals that ``BandSeparator`` recovers from their sum."""
    low_T = band_noise(num_samples, low_hz=50.0, high_hz=SPLIT_HZ, seed=2 * seed)
    return low_T, band_noise(num_samples, low_hz=SPLIT_HZ, high_hz=3500.0, seed=2 * seed + 1)


def mixture(num_samples: int, *, seed: int = 0) -> np.ndarray:
    """Sum [T] of ``two_bands``."""
    return np.sum(two_bands(num_samples, seed=seed), axis=0, dtype=np.float32)


def snr_db(*, estimate: Any, reference: Any) -> float:
    """Plain signal-to-noise ratio in numpy, independent of the engine's."""
    estimate, reference = np.asarray(estimate, np.float64), np.asarray(reference, np.float64)
    return float(10 * np.log10(np.sum(reference**2) / max(np.sum((reference - estimate) ** 2), 1e-30)))


def decoded(
    samples_T: np.ndarray, labels: Sequence[str] = ("low", "high"), *, clip_id: str | None = None
) -> DecodedClip:
    """A clip in memory, as decoding passes it to separation."""
    clip_id = clip_id or f"clip-{len(samples_T)}"
    row = {"clip_id": clip_id, "path": f"{clip_id}.wav", "labels": list(labels), "start_s": None, "end_s": None}
    return DecodedClip(row=row, samples_T=np.asarray(samples_T, np.float32))


def write_clips(
    folder: Path,
    clips: Mapping[str, np.ndarray | bytes | None],
    *,
    labels: Mapping[str, Sequence[str]] | None = None,
) -> Path:
    """Write float WAV files and the CSV manifest that names them; bytes are written unchanged, None is a missing file.

    A clip's labels are low and high unless ``labels`` has others.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "manifest.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "labels"])
        for name, content in clips.items():
            writer.writerow([name, "; ".join((labels or {}).get(name, ("low", "high")))])
            if isinstance(content, bytes):
                (folder / name).write_bytes(content)
            elif content is not None:
                soundfile.write(folder / name, content, RATE_HZ, subtype="FLOAT")
    return folder / "manifest.csv"


class BandSeparator:
    """Separates exactly: ``low`` is everything below 1 kHz, ``high`` the rest, by the transform of the whole row."""

    sample_rate_hz = RATE_HZ
    labels = ("low", "high")

    def __init__(self) -> None:
        self.shapes: list[tuple[int, int]] = []

    def separate(self, mix_BT: Tensor, queries: Sequence[str], *, lengths: Sequence[int] | None = None) -> Tensor:
        """See the protocol; ``shapes`` collects the shape of every call with audio."""
        for query in queries:
            if query.removeprefix(_SENTENCE) not in self.labels:
                raise ValueError(f"the separator does not know {query!r}; known: high, low")
        stems_BT = torch.zeros_like(mix_BT)
        if mix_BT.numel():
            self.shapes.append(tuple(mix_BT.shape))
            self.inspect(mix_BT)
        for row, query in enumerate(queries):
            num_samples = mix_BT.shape[1] if lengths is None else lengths[row]
            if num_samples:
                stems_BT[row, :num_samples] = self._band(mix_BT[row, :num_samples], query.removeprefix(_SENTENCE))
        return stems_BT

    def inspect(self, mix_BT: Tensor) -> None:
        """Overridden by separators that fail."""

    def _band(self, mix_T: Tensor, label: str) -> Tensor:
        spectrum_F = torch.fft.rfft(mix_T.double())
        is_low_F = torch.fft.rfftfreq(len(mix_T), 1 / RATE_HZ) < SPLIT_HZ
        return torch.fft.irfft(spectrum_F * (is_low_F if label == "low" else ~is_low_F), len(mix_T)).float()


class BandTagger:
    """Tags exactly what ``BandSeparator`` separates: its tags are energies in bands, in dB."""

    fingerprint = "0123456789abcdef"
    bounds_hz: Mapping[str, tuple[float, float]] = {
        "low": (0, SPLIT_HZ),
        "high": (SPLIT_HZ, 4000),
        "click": (4000, 9e9),
    }
    labels = tuple(bounds_hz)

    def __init__(self, sample_rate_hz: int = RATE_HZ) -> None:
        self.sample_rate_hz = sample_rate_hz
        self.calls: list[tuple[tuple[int, int], list[int]]] = []

    def tag(self, audio_BT: Tensor, *, lengths: Sequence[int] | None = None) -> Tensor:
        """See the protocol; ``calls`` collects the shape and lengths of every call."""
        lengths = [audio_BT.shape[1]] * len(audio_BT) if lengths is None else list(lengths)
        self.calls.append((tuple(audio_BT.shape), lengths))
        if not torch.isfinite(audio_BT).all():
            raise ValueError("the audio to tag has NaN or infinite samples")
        rows = [self._tags(audio_T[:length]) for audio_T, length in zip(audio_BT, lengths, strict=True)]
        return torch.tensor(rows, dtype=torch.float32)

    def _tags(self, audio_T: Tensor) -> list[float]:
        energy_F = torch.fft.rfft(audio_T.double()).abs().square()
        hz_F = torch.fft.rfftfreq(len(audio_T), 1 / self.sample_rate_hz)
        bands = [float(energy_F[(hz_F >= low) & (hz_F < high)].sum()) for low, high in self.bounds_hz.values()]
        return [10 * float(np.log10(max(energy, 1e-9))) for energy in bands]


class SmallMemorySeparator(BandSeparator):
    """Is out of memory if a batch, padding included, has more than ``max_samples`` samples."""

    def __init__(self, max_samples: int) -> None:
        super().__init__()
        self.max_samples = max_samples

    def inspect(self, mix_BT: Tensor) -> None:
        if mix_BT.numel() > self.max_samples:
            raise torch.OutOfMemoryError(f"{mix_BT.numel()} samples do not fit")


class CountedMemorySeparator(BandSeparator):
    """Is out of memory if more than ``max_samples`` are alive, those that a failed call still references included."""

    def __init__(self, max_samples: int) -> None:
        super().__init__()
        self.max_samples, self.alive = max_samples, 0

    def inspect(self, mix_BT: Tensor) -> None:
        activations = []
        for _ in range(len(mix_BT)):
            activations.append(self._allocate(mix_BT.shape[1]))

    def _allocate(self, num_samples: int) -> Tensor:
        if self.alive + num_samples > self.max_samples:
            raise torch.OutOfMemoryError(f"{num_samples} samples do not fit in addition to {self.alive}")
        tensor = torch.zeros(num_samples)
        self.alive += num_samples
        weakref.finalize(tensor, self._free, num_samples)
        return tensor

    def _free(self, num_samples: int) -> None:
        self.alive -= num_samples


class MarkedSeparator(BandSeparator):
    """Fails for every batch that has a sample of the value ``MARKER``."""

    def inspect(self, mix_BT: Tensor) -> None:
        if bool((mix_BT == np.float32(MARKER)).any()):
            raise RuntimeError("the marked clip cannot be separated")


class NanSeparator(BandSeparator):
    """Returns NaN for the marked clip, as an overflowing network does."""

    def separate(self, mix_BT: Tensor, queries: Sequence[str], *, lengths: Sequence[int] | None = None) -> Tensor:
        stems_BT = super().separate(mix_BT, queries, lengths=lengths)
        marked_B = (mix_BT == np.float32(MARKER)).any(1)
        return torch.where(marked_B[:, None], torch.nan, stems_BT)


def marked(samples_T: np.ndarray) -> np.ndarray:
    """The clip [T] with the sample that makes ``MarkedSeparator`` and ``NanSeparator`` fail."""
    return np.concatenate([np.float32([MARKER]), samples_T[1:]])


def tiny_separator(labels: Sequence[str] = ("low", "high"), *, config: NetworkConfig = TINY) -> QuerySeparator:
    """A small untrained built-in separator with the same weights at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return QuerySeparator(config, labels).eval()


def tiny_checkpoint(folder: str | Path, labels: Sequence[str] = ("low", "high")) -> Path:
    """A checkpoint folder with ``tiny_separator``."""
    save(tiny_separator(labels), folder)
    return Path(folder)


@dataclass(frozen=True, kw_only=True)
class FixedSource:
    """A separator source whose every ``open`` returns the same object, so that a test can look at it afterwards."""

    separator: Separator
    name: str = "bands"
    fingerprint: str = "bands"
    is_trainable: bool = False

    @property
    def sample_rate_hz(self) -> int:
        return self.separator.sample_rate_hz

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(self.separator.labels)

    def with_labels(self, labels: object, store: object) -> FixedSource:
        return self

    def open(self, device: str = "cpu") -> Separator:
        return self.separator


class EndingSeparator(BandSeparator):
    """Ends its process at the marked clip."""

    def inspect(self, mix_BT: Tensor) -> None:
        if bool((mix_BT == np.float32(MARKER)).any()):
            os._exit(3)


def open_ending(device: str) -> EndingSeparator:
    """Factory of ``EndingSeparator``."""
    return EndingSeparator()


class LosingSeparator(BandSeparator):
    """Loses the GPU at the marked clip: a kernel reads where nothing is."""

    def inspect(self, mix_BT: Tensor) -> None:
        marked_B = (mix_BT == np.float32(MARKER)).any(1)
        on_gpu_B = marked_B.to("cuda")
        torch.ones(1, device="cuda")[on_gpu_B.long() * 1000].sum().item()


def open_losing(device: str) -> LosingSeparator:
    """Factory of ``LosingSeparator``."""
    return LosingSeparator()


def open_here_alone(pid: int, end: str, device: str) -> BandSeparator:
    """Factory of ``BandSeparator`` that ends or raises in any process but one."""
    if os.getpid() != pid and end == "die":
        os._exit(5)
    if os.getpid() != pid:
        raise KeyError("weights")
    return BandSeparator()


def open_bands(device: str) -> BandSeparator:
    """Factory of ``BandSeparator``, importable by its name."""
    return BandSeparator()


def run_stages(
    rows: list[Any],
    root: str,
    out: Path,
    *,
    config: PassConfig,
    open_separator: Callable[[str], Separator] = open_bands,
    open_tagger: Callable[[str], Tagger] | None = None,
    max_shards: int | None = None,
) -> list[str]:
    """A pass without Ray over rows of ``schema.CLIPS``; makes what is missing and returns the shards that it wrote.

    It stops after ``max_shards`` shards. Retry tasks that were planned before are part of it.
    """
    Tasks(out / "corpus").write_rows(rows, rows_per_task=config.rows_per_task)
    decode = Decode(config, root=root, out=str(out), sample_rate_hz=RATE_HZ)
    separate = Separate(open_separator, open_tagger, config)
    write = Write(str(out), RATE_HZ, written_hz=config.stem_rate_hz)
    written: list[str] = []
    for task in missing_tasks(out, read_totals(out)):
        for shard in decode(pa.Table.from_pylist([task])):
            if len(written) == max_shards:
                return written
            written.append(unpack(shard).name)
            write(separate(shard))
    return written


def read_failures(out: Location) -> pa.Table:
    """All failures of a pass that stand."""
    return pa.Table.from_pylist([row for _, row in failure_rows(out)], schema=FAILURES)


def close_pass(out: Path) -> None:
    """Write the manifest that closes a pass, with what its readers need."""
    shards = {name: record["sha256"] for name, record in shard_records(out)}
    names = {"separator_fingerprint": "bands", "config_fingerprint": "settings"}
    manifest = {**names, "shards": shards, "fingerprint": fingerprint(["bands", shards])}
    write_json(out / "stems" / "manifest.json", manifest)
