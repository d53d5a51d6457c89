"""Whether memory grows with the corpus: rows of a manifest, tasks of a pass, stems under a filter, and a whole pass.

    python benchmarks/scale.py [--rows 1000 10000 100000 1000000] [--clips 1000 10000 100000] [--out runs/scale]

*Rows*: a manifest of so many rows is read, sorted, checked for repeats and laid down as tasks; then a pass of as many
clips of two stems each, written by hand without audio, is filtered by a limit, a quantile and a floor for each label.
Each in a process of its own, whose peak memory is told, less what its imports take. *Clips*: a whole pass on Ray over
so many clips of 0.1 s with a stand-in separator; peak memory of the driver and of the largest worker. Every piece that
is measured is kept under ``--out``; started again, the script does what is missing. Writes ``benchmarks/scale.md``.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.csv
import setting
import soundfile
import torch
from torch import Tensor

from cluster.session import connected
from engine.cli.tables import fill
from engine.corpus.read import read_corpus
from engine.passes.config import PassConfig
from engine.passes.records import write_done
from engine.passes.run import run_pass
from engine.passes.shards import write_part
from engine.passes.tasks import Tasks
from engine.schema import STEMS
from engine.selection.thresholds import Quantile, Thresholds
from engine.selection.tracks import write_tracks
from engine.storage.files import read_json, write_bytes, write_json

_LABELS = ("rain", "siren", "bell", "dog_bark", "engine", "footsteps", "clock_tick", "bird_chirp")
_RATE_HZ, _CLIP_S, _CLIPS_A_PART = 8000, 0.1, 32
_HERE = Path(__file__).parent


class HalfSeparator:
    """A stand-in that costs nothing: half of the mixture for every query."""

    sample_rate_hz = _RATE_HZ
    labels = _LABELS

    def separate(self, mix_BT: Tensor, queries: list[str], *, lengths: list[int] | None = None) -> Tensor:
        """``mix_BT / 2``."""
        return 0.5 * mix_BT


def open_half(device: str) -> HalfSeparator:
    """The stand-in."""
    return HalfSeparator()


def write_manifest(path: Path, num_rows: int, *, num_files: int | None = None) -> None:
    """Rows of two labels each, in an order that is not that of their ids."""
    numbers = np.arange(num_rows)
    first, second = numbers % len(_LABELS), (numbers // 8 + 1 + numbers % 7) % len(_LABELS)
    labels = [f"{_LABELS[a]};{_LABELS[b if b != a else (b + 1) % 8]}" for a, b in zip(first, second, strict=True)]
    start_s = np.zeros(num_rows) if num_files is None else _CLIP_S * (numbers // num_files)
    names = numbers if num_files is None else numbers % num_files
    paths = [f"audio/{name // 1000:04d}/{name:07d}.wav" for name in names]
    table = pa.table({"path": paths, "labels": labels, "start_s": start_s, "end_s": start_s + _CLIP_S})
    pyarrow.csv.write_csv(table, path)


def read_and_lay_down(folder: Path) -> dict[str, Any]:
    """Manifest to tasks."""
    started = time.perf_counter()
    corpus = read_corpus(folder / "manifest.csv")
    read_s = time.perf_counter() - started
    counts = Tasks(folder / "corpus").write(corpus, rows_per_task=64, min_labels=2)
    assert corpus.num_clips == counts["num_clips"] and not corpus.num_failures
    return {"read_s": read_s, "tasks_s": time.perf_counter() - started - read_s}


def write_pass(folder: Path, num_clips: int) -> None:
    """A closed pass of stems without audio, whose scores are random."""
    draw, shards = np.random.default_rng(0), {}
    for part in range(0, num_clips, _CLIPS_A_PART):
        name, rows = f"part-{part // 64:06d}-{part // 32 % 2:04d}", []
        for clip in range(part, min(part + _CLIPS_A_PART, num_clips)):
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
        record = write_part(folder, name, stems=rows, failures=[])
        write_done(folder, name, {"task": part // 64, "num_parts": 2, **record})
        shards[name] = record["sha256"]
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
    tracks = write_tracks(folder / "stems", folder / "tracks", thresholds)
    return {"filter_s": time.perf_counter() - started, "num_kept": tracks["num_kept"]}


def alone(work: Callable[[Path], dict[str, Any]], folder: Path) -> dict[str, Any]:
    """What ``work`` says, in a process of its own, and by how much it raised that process's peak memory, in MiB."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        result: dict[str, Any] = pool.apply(_watched, (work, folder))
    return result


def _watched(work: Callable[[Path], dict[str, Any]], folder: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as warm:  # what the first use of Arrow and Parquet takes is not the corpus'
        write_manifest(Path(warm) / "manifest.csv", 100)
        read_and_lay_down(Path(warm))
        write_pass(Path(warm), 64)
        filter_pass(Path(warm))
    before = _peak_mib()
    told = work(folder)
    return told | {"mib": _peak_mib() - before}


def _peak_mib() -> float:
    """The most that this process has held since its program began (``ru_maxrss`` is handed down from the parent)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))


def measure_rows(num_rows: int) -> dict[str, Any]:
    """Both steps over so many rows."""
    with tempfile.TemporaryDirectory() as folder:
        write_manifest(Path(folder) / "manifest.csv", num_rows)
        read = alone(read_and_lay_down, Path(folder))
        write_pass(Path(folder) / "pass", num_rows)
        judged = alone(filter_pass, Path(folder) / "pass")
    return {"rows": num_rows, "read": read, "filter": judged}


class Peaks:
    """Peak memory that processes own alone while a ``with`` block runs, in MiB: this one, and Ray's largest worker."""

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
            self.driver = max(self.driver, _own_mib(os.getpid()))
            for process in psutil.process_iter(["name", "cmdline"]):
                if " ".join(process.info["cmdline"] or ()).startswith("ray::Map"):
                    self.worker = max(self.worker, _own_mib(process.pid))
            self.curve.append((time.perf_counter() - started, _own_mib(os.getpid())))


def _own_mib(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon:")), 0.0)


def measure_pass(num_clips: int) -> dict[str, Any]:
    """A whole pass over so many clips; a thousand files stand for them, each cut into as many as it takes."""
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
        config = PassConfig(clip_s=_CLIP_S, min_clip_s=0.05, part_s=_CLIP_S * _CLIPS_A_PART, batch_s=10.0)
        with connected(), Peaks() as peaks:
            started = time.perf_counter()
            summary = run_pass(
                read_corpus(folder / "manifest.csv"),
                folder / "out",
                separator="half",
                config=config,
                open_separator=open_half,
                sample_rate_hz=_RATE_HZ,
            )
            wall_s = time.perf_counter() - started
        assert (summary["num_clips"], summary["num_stems"]) == (num_clips, 2 * num_clips), summary
    told = {"driver_mib": peaks.driver, "worker_mib": peaks.worker, "wall_s": wall_s}
    return {"clips": num_clips, **told, "curve": peaks.curve[:: max(1, len(peaks.curve) // 50)]}


def piece(out: Path, name: str, measure: Callable[[int], dict[str, Any]], size: int) -> dict[str, Any]:
    """A measurement, kept on disk."""
    path = out / f"{name}-{size}.json"
    if not path.is_file():
        setting.say(f"{name}: {size}")
        write_json(path, measure(size) | {"commit": setting.commit()})
    result: dict[str, Any] = read_json(path)
    return result


def report(rows: list[dict[str, Any]], passes: list[dict[str, Any]]) -> str:
    """Both tables in Markdown."""
    lines = [
        "| rows | reading and sorting | memory | rows/s | filter | memory |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for entry in rows:
        read, judged = entry["read"], entry["filter"]
        seconds = read["read_s"] + read["tasks_s"]
        cells = [f"{entry['rows']:,}", f"{seconds:.1f} s", f"{read['mib']:.0f} MiB", f"{entry['rows'] / seconds:,.0f}"]
        cells += [f"{judged['filter_s']:.1f} s", f"{judged['mib']:.0f} MiB"]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| clips of a whole pass | driver | largest worker |", "| --- | --- | --- |"]
    for entry in passes:
        cells = [f"{entry['clips']:,}", f"{entry['driver_mib']:.0f} MiB", f"{entry['worker_mib']:.0f} MiB"]
        lines.append("| " + " | ".join(cells) + " |")
    commits = ", ".join(dict.fromkeys(entry["commit"] for entry in (*rows, *passes)))
    about = f"Memory of the upper table is what the step added to its process. Commits {commits}; {setting.hardware()}"
    return "\n".join([*lines, "", about])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="*", default=[1000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--clips", type=int, nargs="*", default=[1000, 10_000, 100_000])
    parser.add_argument("--out", type=Path, default=Path("runs/scale"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [piece(arguments.out, "rows", measure_rows, size) for size in arguments.rows]
    passes = [piece(arguments.out, "clips", measure_pass, size) for size in arguments.clips]
    text = report(rows, passes)
    write_bytes(_HERE / "scale.md", f"# Memory and speed from a thousand to a million rows\n\n{text}\n".encode())
    fill(_HERE.parent / "README.md", "scale", text)
    print(text)


if __name__ == "__main__":
    main()
