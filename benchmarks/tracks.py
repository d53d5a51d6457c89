"""Whether a selection of tracks should copy its audio or refer to the stem shards: time and bytes of both.

    python benchmarks/tracks.py [--clips 200]

Writes stems of noise the size of real ones, selects half of them by a score, and then reads all tracks as a training
would, both ways. Writes ``benchmarks/tracks.md``.
"""

from __future__ import annotations

import argparse
import datetime as dt
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from engine.audio import encode_flac24
from engine.filter import Thresholds
from engine.schema import STEMS
from engine.shards import read_audio, read_tracks, write_part, write_tracks
from engine.storage import write_bytes, write_json, write_parquet

_RATE_HZ, _CLIP_S, _CLIPS_PER_SHARD = 16000, 10.0, 32


def write_stems(out: Path, num_clips: int) -> None:
    """A closed pass: two stems a clip, every other one with a low score."""
    rng = np.random.default_rng(0)
    shards = {}
    for first in range(0, num_clips, _CLIPS_PER_SHARD):
        rows = [_row(rng, number, label) for number in range(first, first + _CLIPS_PER_SHARD) for label in "ab"]
        part = f"part-{first:06d}"
        shards[part] = write_part(out, part, stems=rows, failures=[])["sha256"]
    manifest = {"shards": shards, "fingerprint": "pass", "separator_fingerprint": "none"}
    write_json(out / "stems" / "manifest.json", manifest)


def _row(rng: np.random.Generator, number: int, label: str) -> dict[str, Any]:
    samples_T = np.cumsum(rng.normal(0.0, 0.01, int(_RATE_HZ * _CLIP_S))).astype(np.float32) * 0.01
    data, exponent = encode_flac24(samples_T, sample_rate_hz=_RATE_HZ)
    row = dict.fromkeys(STEMS.names) | {"clip_id": f"{number:020d}", "path": f"{number}.wav", "labels": ["a", "b"]}
    row |= {"label": label, "sample_rate_hz": _RATE_HZ, "num_samples": len(samples_T), "re_sdr_db": float(number % 2)}
    return row | {"audio_flac": data, "audio_exponent": exponent}


def refer(stems: Path, out: Path) -> tuple[float, float, int]:
    """Seconds to select, seconds to read, bytes written: as the engine does it."""
    started = time.perf_counter()
    write_tracks(stems, out, Thresholds(min_re_sdr_db=0.5))
    selected = time.perf_counter()
    index, folder = read_tracks(out)
    for row in index.select(["shard", "row"]).to_pylist():
        read_audio(folder, row["shard"], [row["row"]])
    return selected - started, time.perf_counter() - selected, _bytes(out)


def copy(stems: Path, out: Path) -> tuple[float, float, int]:
    """The same with a second copy of the audio of what is kept."""
    started = time.perf_counter()
    for shard in sorted(stems.glob("*.parquet")):
        table = pq.read_table(shard)
        write_parquet(out / shard.name, table.filter(pc.greater(table["re_sdr_db"], 0.5)), rows_per_group=8)
    selected = time.perf_counter()
    for shard in sorted(out.glob("*.parquet")):
        for row in range(pq.read_metadata(shard).num_rows):
            read_audio(out, shard.name, [row])
    return selected - started, time.perf_counter() - selected, _bytes(out)


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=192)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    figures: list[list[float]] = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_stems(root, arguments.clips)
        for number in range(arguments.repeats):
            one = refer(root / "stems", root / f"refer-{number}")
            two = copy(root / "stems", root / f"copy-{number}")
            figures.append([mine / other for mine, other in zip(one, two, strict=True)])
    select, read, size = (statistics.median(column) for column in zip(*figures, strict=True))
    text = (
        "# Tracks: refer or copy\n\n| refer / copy | ratio |\n| --- | --- |\n"
        f"| time to select | {select:.3f} |\n| time to read every track once | {read:.2f} |\n| bytes | {size:.4f} |\n\n"
        f"{arguments.clips} ten-second clips of two stems at 16 kHz, half kept; medians of {arguments.repeats} pairs, "
        f"{os.cpu_count()} CPU cores, {dt.date.today()}. The engine refers: selections are cheap to make and to hold, "
        "so a sweep over thresholds costs no audio.\n"
    )
    write_bytes(Path(__file__).with_name("tracks.md"), text.encode())
    print(text)


if __name__ == "__main__":
    main()
