"""Memory and speed by corpus size: rows of a manifest, tasks of a pass, stems in a filter, and a whole pass.

    python -m benchmarks.scale.scale [--rows 1000 10000 100000 1000000] [--clips 1000 10000 100000] [--out runs/scale]

*Rows*: a manifest is read, sorted, checked for repeats and written as tasks; then a pass of as many clips of two stems
each, written by hand without audio, is filtered by a limit, a quantile and a floor for each label. Each step runs in a
process of its own, and its peak memory is reported, less what its imports take. *Clips*: a whole pass on Ray over clips
of 0.1 s with a separator that costs nothing; peak memory of the driver and of the largest worker. Each measurement is
kept under ``--out``; run the script again to do what is missing. Writes ``scale.md`` and a table of docs/results.md.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.csv
import soundfile
import torch
from torch import Tensor

from benchmarks import pages
from cluster.session import connect
from engine.corpus.read import read_corpus
from engine.passes.config import PassConfig
from engine.passes.run import run_pass
from engine.passes.shards import write_shard
from engine.passes.tasks import Tasks
from engine.schema import STEMS
from engine.selection.thresholds import Quantile, Thresholds
from engine.selection.tracks import select_tracks
from engine.separators import SeparatorSource
from engine.storage.files import write_json

_LABELS = ("rain", "siren", "bell", "dog_bark", "engine", "footsteps", "clock_tick", "bird_chirp")
_RATE_HZ, _CLIP_S, _CLIPS_PER_SHARD = 8000, 0.1, 32
_PAGE = Path(__file__).with_name("scale.md")


class HalfSeparator:
    """A separator that costs nothing: half of the mixture for every query."""

    sample_rate_hz = _RATE_HZ
    labels = _LABELS
    fingerprint = "half"

    def separate(self, mix_BT: Tensor, queries: Sequence[str], *, lengths: Sequence[int] | None = None) -> Tensor:
        """``mix_BT / 2``."""
        return 0.5 * mix_BT


def open_half(device: str) -> HalfSeparator:
    """The separator that costs nothing."""
    return HalfSeparator()


def write_manifest(path: Path, num_rows: int, *, num_files: int | None = None) -> None:
    """Write rows of two labels each, in an order other than that of their ids."""
    numbers = np.arange(num_rows)
    first, second = numbers % len(_LABELS), (numbers // 8 + 1 + numbers % 7) % len(_LABELS)
    labels = [f"{_LABELS[a]};{_LABELS[b if b != a else (b + 1) % 8]}" for a, b in zip(first, second, strict=True)]
    start_s = np.zeros(num_rows) if num_files is None else _CLIP_S * (numbers // num_files)
    names = numbers if num_files is None else numbers % num_files
    paths = [f"audio/{name // 1000:04d}/{name:07d}.wav" for name in names]
    table = pa.table({"path": paths, "labels": labels, "start_s": start_s, "end_s": start_s + _CLIP_S})
    pyarrow.csv.write_csv(table, path)


def write_tasks(folder: Path) -> dict[str, Any]:
    """Manifest to tasks."""
    started = time.perf_counter()
    corpus = read_corpus(folder / "manifest.csv")
    read_s = time.perf_counter() - started
    counts = Tasks(folder / "corpus").write(corpus, rows_per_task=64, min_labels=2)
    assert corpus.num_clips == counts["num_clips"] and not corpus.num_failures
    return {"read_s": read_s, "tasks_s": time.perf_counter() - started - read_s}


def write_pass(folder: Path, num_clips: int) -> None:
    """Write a closed pass of stems without audio whose scores are random."""
    draw, shards = np.random.default_rng(0), {}
    for first in range(0, num_clips, _CLIPS_PER_SHARD):
        name, rows = f"shard-{first // 64:06d}-{first // 32 % 2:04d}", []
        for clip in range(first, min(first + _CLIPS_PER_SHARD, num_clips)):
            pair = draw.choice(len(_LABELS), 2, replace=False)
            for label in pair:
                row = dict.fromkeys(STEMS.names) | {
                    "clip_id": f"{clip:020x}",
                    "path": f"audio/{clip:07d}.wav",
                    "labels": [_LABELS[i] for i in pair],
                    "label": _LABELS[label],
                    "sample_rate_hz": _RATE_HZ,
                    "num_samples": 800,
                    "audio_flac": b"",
                    "audio_exponent": 0,
                }
                rows.append(row | {"re_sdr_db": draw.normal(10, 5), "remix_snr_db": draw.normal(10, 5)})
        shards[name] = write_shard(folder, name, stems=pa.Table.from_pylist(rows, schema=STEMS), failures=[])["sha256"]
    names = {"separator_fingerprint": "half", "config_fingerprint": "half", "fingerprint": f"half-{num_clips}"}
    write_json(folder / "stems" / "manifest.json", names | {"shards": shards})


def filter_pass(folder: Path) -> dict[str, Any]:
    """Stems to tracks."""
    started = time.perf_counter()
    thresholds = Thresholds(
        min_re_sdr_db=5.0,
        min_remix_snr_db=Quantile(quantile=0.3, by_label=True),
        label_floor_fraction=0.2,
        rank_by="remix_snr_db",
    )
    selection = select_tracks(folder / "stems", folder / "tracks", thresholds)
    return {"filter_s": time.perf_counter() - started, "num_kept": selection["num_kept"]}


def in_own_process(work: Callable[[Path], dict[str, Any]], folder: Path) -> dict[str, Any]:
    """The result of ``work`` in a process of its own, with the rise of that process's peak memory, in MiB."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        result: dict[str, Any] = pool.apply(_with_peak, (work, folder))
    return result


def _with_peak(work: Callable[[Path], dict[str, Any]], folder: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as warm:  # the first use of Arrow and Parquet takes memory of its own
        write_manifest(Path(warm) / "manifest.csv", 100)
        write_tasks(Path(warm))
        write_pass(Path(warm), 64)
        filter_pass(Path(warm))
    before = _peak_mib()
    return work(folder) | {"mib": _peak_mib() - before}


def _peak_mib() -> float:
    """Peak memory of this process since its program began; ``ru_maxrss`` would include the parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))


def measure_rows(num_rows: int) -> dict[str, Any]:
    """Both steps over a number of rows."""
    with tempfile.TemporaryDirectory() as folder:
        write_manifest(Path(folder) / "manifest.csv", num_rows)
        read = in_own_process(write_tasks, Path(folder))
        write_pass(Path(folder) / "pass", num_rows)
        filtered = in_own_process(filter_pass, Path(folder) / "pass")
    return {"rows": num_rows, "read": read, "filter": filtered, "commit": pages.commit()}


class Peaks:
    """Peak private memory during a ``with`` block, in MiB: of this process and of Ray's largest worker."""

    def __enter__(self) -> Peaks:
        self.driver = self.worker = 0.0
        self.curve: list[tuple[float, float]] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        started = time.perf_counter()
        while not self._done.wait(2.0):
            self.driver = max(self.driver, _private_mib(os.getpid()))
            for process in psutil.process_iter(["name", "cmdline"]):
                if " ".join(process.info["cmdline"] or ()).startswith("ray::Map"):
                    self.worker = max(self.worker, _private_mib(process.pid))
            self.curve.append((time.perf_counter() - started, _private_mib(os.getpid())))


def _private_mib(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon:")), 0.0)


def measure_pass(num_clips: int) -> dict[str, Any]:
    """A whole pass over a number of clips, which are cut from at most a thousand files."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        num_files = min(num_clips, 1000)
        (folder / "audio" / "0000").mkdir(parents=True)
        num_samples = round(_CLIP_S * _RATE_HZ * -(-num_clips // num_files))
        noise = np.random.default_rng(0)
        for number in range(num_files):
            samples_T = noise.normal(0, 0.1, num_samples)
            soundfile.write(folder / f"audio/0000/{number:07d}.wav", samples_T, _RATE_HZ)
        write_manifest(folder / "manifest.csv", num_clips, num_files=num_files)
        config = PassConfig(clip_s=_CLIP_S, min_clip_s=0.05, shard_s=_CLIP_S * _CLIPS_PER_SHARD, batch_s=10.0)
        separator = SeparatorSource.from_factory(open_half)
        with connect(), Peaks() as peaks:
            started = time.perf_counter()
            summary = run_pass(read_corpus(folder / "manifest.csv"), folder / "out", separator=separator, config=config)
            wall_s = time.perf_counter() - started
        assert (summary["num_clips"], summary["num_stems"]) == (num_clips, 2 * num_clips), summary
    figures = {"driver_mib": peaks.driver, "worker_mib": peaks.worker, "wall_s": wall_s, "commit": pages.commit()}
    return {"clips": num_clips, **figures, "curve": peaks.curve[:: max(1, len(peaks.curve) // 50)]}


def report(rows: list[dict[str, Any]], passes: list[dict[str, Any]]) -> list[str]:
    """Both tables in Markdown, and their provenance."""
    upper = []
    for entry in rows:
        read, filtered = entry["read"], entry["filter"]
        seconds = read["read_s"] + read["tasks_s"]
        cells = [f"{entry['rows']:,}", f"{seconds:.1f} s", f"{read['mib']:.0f} MiB", f"{entry['rows'] / seconds:,.0f}"]
        upper.append([*cells, f"{filtered['filter_s']:.1f} s", f"{filtered['mib']:.0f} MiB"])
    lower = [
        [f"{entry['clips']:,}", f"{entry['driver_mib']:.0f} MiB", f"{entry['worker_mib']:.0f} MiB"] for entry in passes
    ]
    commits = ", ".join(dict.fromkeys(entry["commit"] for entry in (*rows, *passes)))
    return [
        pages.markdown(["rows", "reading and sorting", "memory", "rows/s", "filter", "memory"], upper),
        pages.markdown(["clips of a whole pass", "driver", "largest worker"], lower),
        f"Memory in the upper table is what the step added to its process. Commits {commits}; {pages.hardware()}",
    ]


def main() -> None:
    """Command line."""
    parser = pages.parser(__doc__)
    parser.add_argument("--rows", type=int, nargs="*", default=[1000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--clips", type=int, nargs="*", default=[1000, 10_000, 100_000])
    parser.add_argument("--out", type=Path, default=Path("runs/scale"), help="working folder")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    def measured(kind: str, measure: Callable[[int], dict[str, Any]], sizes: Sequence[int]) -> list[dict[str, Any]]:
        return [
            pages.measured_once(arguments.out / f"{kind}-{size}.json", functools.partial(measure, size))
            for size in sizes
        ]

    parts = report(measured("rows", measure_rows, arguments.rows), measured("clips", measure_pass, arguments.clips))
    print(*parts, sep="\n\n")
    pages.write_page(_PAGE, "Memory and speed by corpus size", *parts)
    pages.fill(pages.RESULTS, "scale", "\n\n".join(parts))


if __name__ == "__main__":
    main()
