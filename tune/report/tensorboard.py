"""Event files for TensorBoard from what a run or a pass has stored: figures, spectrograms and audio of the sample.

Shape suffixes: T samples, F bins, N frames or stems.
"""

from __future__ import annotations

import functools
import re
import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path, PurePosixPath

import numpy as np
from tensorboardX import SummaryWriter
from tensorboardX.proto.summary_pb2 import Summary

from engine.passes.shards import read_clip
from engine.storage.paths import Name, is_s3, location
from train.task import TrainingRecord
from tune.report.collect import PassFacts, RunFacts, collect_pass, collect_run
from tune.report.sample import draw
from tune.report.stems import StemRow, score_names

_MOST_CLIPS, _MOST_S = 8, 10.0  # of a pass, of a clip
_PEAK = 0.9  # of a clip's mixture; its stems have the same gain
_FRAME, _HOP, _RANGE_DB = 512, 256, 75.0


def write_events(path: Name, out: Name) -> None:
    """Write the event files of a run or a pass into folders of ``out``, where they replace those of an earlier call.

    ``training-K`` has the validations of iteration K's training, and ``iterations`` the rest, by iteration.
    """
    if is_s3(out):
        raise ValueError(f"--tensorboard must be a local folder, got {out}; copy its files there afterwards")
    folder, target = location(path), Path(str(location(out)))
    facts = collect_run(folder) if (folder / "iterations").is_dir() else collect_pass(folder)
    trainings = {0: facts.seed_training} | {one.number or 0: one.training for one in facts.passes}
    for number, training in trainings.items():
        if training is not None:
            with closing(_writer(target / f"training-{number}")) as writer:
                _write_training(writer, training)
    with closing(_writer(target / "iterations")) as writer:
        _write_iterations(writer, facts)
        _write_sample(writer, facts)


def _writer(folder: Path) -> SummaryWriter:
    for old in folder.glob("events.out.tfevents.*"):
        old.unlink()
    return SummaryWriter(str(folder))


def _write_training(writer: SummaryWriter, training: TrainingRecord) -> None:
    for point in training["curve"]:
        for name in ("loss_db", "sdri_db", "si_sdri_db"):
            if name in point:
                writer.add_scalar(f"training/{name}", point[name], round(point["step"]))


def _write_iterations(writer: SummaryWriter, facts: RunFacts) -> None:
    for record in facts.records:
        figures: dict[str, float | None] = {}
        if record["validation"] is not None:
            figures |= {name: record["validation"][name] for name in ("sdri_db", "si_sdri_db")}
        if record["num_stems"]:
            figures |= {"num_failed": record["num_failed"], "kept_h": record["kept_h"]}
            figures["kept_fraction"] = record["num_kept"] / record["num_stems"]
        _write_scalars(writer, "iteration", figures, record["iteration"])
    for one in facts.passes:
        means = {name: np.concatenate(one.stems.values(name)) for name in score_names()}
        defined = {name: float(np.nanmean(some)) for name, some in means.items() if np.isfinite(some).any()}
        _write_scalars(writer, "mean_of_all_stems", defined, one.number or 0)


def _write_scalars(writer: SummaryWriter, group: str, figures: Mapping[str, float | None], step: int) -> None:
    for name, value in figures.items():
        if value is not None:
            writer.add_scalar(f"{group}/{name}", value, step)


def _write_sample(writer: SummaryWriter, facts: RunFacts) -> None:
    """The clips of the last pass's sample, as every pass has them."""
    clips = draw(facts.passes[-1], most=_MOST_CLIPS) if facts.passes else []
    for one in facts.passes:
        found = one.stems.of_clips([clip.clip_id for clip in clips])
        for number, clip in enumerate(clips):
            if clip.clip_id in found:
                name = _text(PurePosixPath(clip.path).name)
                _write_clip(writer, f"clip-{number}-{name}", one, found[clip.clip_id])


def _write_clip(writer: SummaryWriter, group: str, one: PassFacts, rows: list[StemRow]) -> None:
    first = rows[0]
    shard, place = first["shard"], {"first_row": first["first_row"], "num_stems": first["num_stems"]}
    read = functools.partial(read_clip, one.folder / "stems", shard, **place)
    found = one.left_out.read(shard.removesuffix(".parquet"), read)
    if found is None:
        return
    mixture_T, stems = found
    rate_hz = first["sample_rate_hz"]
    gain = _PEAK / max(1e-3, float(np.abs(mixture_T).max(initial=0.0)))
    top = _power(gain * mixture_T).max()
    for number, (label, samples_T) in enumerate({"mixture": mixture_T, **stems}.items()):
        tag = f"{group}/{number}-{_text(label)}"
        played_T = np.clip(gain * samples_T[: round(_MOST_S * rate_hz)], -1.0, 1.0)
        writer.add_audio(tag, played_T, one.number or 0, sample_rate=rate_hz)
        level_FN = 10.0 * np.log10(_power(played_T) / top + 1e-12) / _RANGE_DB + 1.0
        image = _image(np.round(255.0 * np.clip(level_FN, 0.0, 1.0)).astype(np.uint8)[::-1])
        summary = Summary(value=[Summary.Value(tag=tag, image=image)])
        writer.file_writer.add_summary(summary, one.number or 0)


def _text(name: str) -> str:
    """A name of others as part of a tag."""
    return re.sub(r"[^\w.-]+", "_", name)[:60]


def _power(samples_T: np.ndarray) -> np.ndarray:
    """Power ``[F, N]`` of a signal in short frames."""
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(samples_T, (0, _FRAME)), _FRAME)[::_HOP]
    power: np.ndarray = np.abs(np.fft.rfft(frames * np.hanning(_FRAME), axis=1)).T ** 2 + 1e-12
    return power


def _image(bytes_FN: np.ndarray) -> Summary.Image:
    """A grey PNG, written here because the project does not need an image library for anything else."""
    height, width = bytes_FN.shape
    lines = b"".join(b"\0" + line.tobytes() for line in bytes_FN)
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + b"".join(_chunks(header, zlib.compress(lines)))
    return Summary.Image(height=height, width=width, colorspace=1, encoded_image_string=png)


def _chunks(header: bytes, data: bytes) -> Iterator[bytes]:
    for kind, content in ((b"IHDR", header), (b"IDAT", data), (b"IEND", b"")):
        yield struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
