"""Whether a selection of tracks should copy its audio or refer to the stem shards: time and bytes of both.

    python -m benchmarks.speed.tracks [--clips 192]

Writes stems of noise of a realistic size and selects half of them by a score. Referring writes an index, and a training
then reads each track's clip and stems and divides the clip among its labels; copying divides it once and writes the
results, which are then read. Writes ``tracks.md``.
"""

from __future__ import annotations

import datetime as dt
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks import pages
from engine.audio.flac import decode_flac24, encode_flac24
from engine.passes.shards import read_audio, write_shard
from engine.schema import STEMS
from engine.scoring.sharing import share_mixture
from engine.selection.thresholds import Thresholds
from engine.selection.tracks import select_tracks
from engine.storage.files import write_json, write_parquet
from train.data.items import track_items

_PAGE = Path(__file__).with_name("tracks.md")
_RATE_HZ, _CLIP_S, _CLIPS_PER_SHARD = 16000, 10.0, 32


def write_stems(out: Path, num_clips: int) -> None:
    """Write a closed pass: two stems a clip, every other clip with a low score."""
    rng = np.random.default_rng(0)
    shards = {}
    for first in range(0, num_clips, _CLIPS_PER_SHARD):
        rows = [row for number in range(first, first + _CLIPS_PER_SHARD) for row in _rows(rng, number)]
        name = f"shard-{first:06d}-0000"
        shards[name] = write_shard(out, name, stems=pa.Table.from_pylist(rows, schema=STEMS), failures=[])["sha256"]
    names = {"fingerprint": "pass", "separator_fingerprint": "none", "config_fingerprint": "none"}
    manifest = {**names, "shards": shards}
    write_json(out / "stems" / "manifest.json", manifest)


def _rows(rng: np.random.Generator, number: int) -> list[dict[str, Any]]:
    """The two stems of a clip."""
    noise_ST = rng.normal(0.0, 0.01, (2, int(_RATE_HZ * _CLIP_S)))
    stems_ST = (np.cumsum(noise_ST, axis=1) * 0.01).astype(np.float32)
    coded = [encode_flac24(signal_T, sample_rate_hz=_RATE_HZ) for signal_T in (*stems_ST, stems_ST.sum(0))]
    clip = dict.fromkeys(STEMS.names) | {"clip_id": f"{number:020d}", "path": f"{number}.wav", "labels": ["a", "b"]}
    clip |= {"sample_rate_hz": _RATE_HZ, "num_samples": stems_ST.shape[1], "re_sdr_db": float(number % 2)}
    rows = [
        {**clip, "label": label, "audio_flac": data, "audio_exponent": exponent}
        for label, (data, exponent) in zip("ab", coded, strict=False)
    ]
    rows[0] |= {"mixture_flac": coded[2][0], "mixture_exponent": coded[2][1]}
    return rows


def refer(stems: Path, out: Path) -> tuple[float, float, int]:
    """Seconds to select, seconds to read, and bytes written, as the engine does it."""
    started = time.perf_counter()
    select_tracks(stems, out, Thresholds(min_re_sdr_db=0.5))
    selected = time.perf_counter()
    for item in track_items(out, sample_rate_hz=_RATE_HZ):
        item.load()
    return selected - started, time.perf_counter() - selected, _bytes(out)


def copy(stems: Path, out: Path) -> tuple[float, float, int]:
    """The same with a copy of the kept tracks, already divided."""
    started = time.perf_counter()
    for shard in sorted(stems.glob("*.parquet")):
        rows = pq.read_table(shard).to_pylist()
        tracks = [
            {**row, **_divided(rows[first : first + 2])[number], "mixture_flac": None}
            for first in range(0, len(rows), 2)
            for number, row in enumerate(rows[first : first + 2])
            if row["re_sdr_db"] > 0.5
        ]
        write_parquet(out / shard.name, pa.Table.from_pylist(tracks, schema=STEMS), rows_per_group=8)
    selected = time.perf_counter()
    for shard in sorted(out.glob("*.parquet")):
        for row in range(pq.read_metadata(shard).num_rows):
            read_audio(out, shard.name, [row])
    return selected - started, time.perf_counter() - selected, _bytes(out)


def _divided(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The coded tracks of the two stems of a clip."""
    mixture_T = torch.from_numpy(decode_flac24(rows[0]["mixture_flac"], rows[0]["mixture_exponent"]))
    stems_ST = np.stack([decode_flac24(row["audio_flac"], row["audio_exponent"]) for row in rows])
    tracks_ST = share_mixture(mixture_T=mixture_T, stems_ST=torch.from_numpy(stems_ST), sample_rate_hz=_RATE_HZ)
    coded = (encode_flac24(track_T, sample_rate_hz=_RATE_HZ) for track_T in tracks_ST.numpy())
    return [{"audio_flac": data, "audio_exponent": exponent} for data, exponent in coded]


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def main() -> None:
    """Command line."""
    parser = pages.parser(__doc__)
    parser.add_argument("--clips", type=int, default=192, help="clips of the pass")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of measurements")
    arguments = parser.parse_args()
    ratios: list[list[float]] = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_stems(root, arguments.clips)
        for number in range(arguments.repeats):
            one = refer(root / "stems", root / f"refer-{number}")
            two = copy(root / "stems", root / f"copy-{number}")
            pairs = [*zip(one, two, strict=True), (one[0] + one[1], two[0] + two[1])]
            ratios.append([mine / other for mine, other in pairs])
    select, read, size, both = (statistics.median(column) for column in zip(*ratios, strict=True))
    rows = [
        ["time to select", f"{select:.3f}"],
        ["time to read every track once", f"{read:.2f}"],
        ["both", f"{both:.2f}"],
        ["bytes", f"{size:.4f}"],
    ]
    table = pages.markdown(["refer / copy", "ratio"], rows)
    about = (
        f"{arguments.clips} ten-second clips of two stems at 16 kHz, half kept; medians of {arguments.repeats} pairs, "
        f"{os.cpu_count()} CPU cores, {dt.date.today()}. The engine refers: a selection is cheap to make and to store, "
        "so a sweep over thresholds writes no audio; a training, which reads its tracks once, pays for it."
    )
    print(table, about, sep="\n\n")
    pages.write_page(_PAGE, "Tracks: refer or copy", table, about)


if __name__ == "__main__":
    main()
