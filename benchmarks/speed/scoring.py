"""What scoring costs: against torchmetrics and fast_bss_eval on the same clips, and against the separator.

    python benchmarks/scoring.py [--esc10 DIR] [--repeats 7]

In one run, on one thread as in an engine's actor, and on a GPU where there is one. Clips of ten seconds at 16 kHz are
sums of two sounds: of ESC-10, or of those that the engine makes itself. Each repeat times what is compared one after
the other, and the ratios are those within a repeat, of the thread's time on a CPU and of wall time
on a GPU. Every library gets the same tensors. Writes ``benchmarks/scoring.md``.
"""

from __future__ import annotations

import argparse
import datetime as dt
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import fast_bss_eval
import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.audio import scale_invariant_signal_distortion_ratio, signal_distortion_ratio

from engine.audio.decode import decode
from engine.cli.tables import fill
from engine.scoring import metrics
from engine.scoring.scores import score_batch
from engine.separators import NetworkConfig, QuerySeparator
from engine.storage.files import write_bytes
from tune.demo import sounds as synth

_RATE_HZ, _NUM_SAMPLES, _NUM_CLIPS = 16000, 160000, 8
_LABELS = ("rain", "siren")
_ALLOCATOR = {f"MALLOC_{name}_THRESHOLD_": str(2**32) for name in ("MMAP", "TRIM")}  # an engine's actor has these too

Metric = Callable[[Tensor, Tensor], Tensor]
OURS: dict[str, Metric] = {
    "BSS-eval SDR": lambda estimate, reference: metrics.bss_sdr_db(estimate=estimate, reference=reference),
    "SI-SDR": lambda estimate, reference: metrics.si_sdr_db(estimate=estimate, reference=reference),
}
THEIRS: dict[str, dict[str, Metric]] = {
    "BSS-eval SDR": {
        "torchmetrics": signal_distortion_ratio,
        "fast_bss_eval": lambda estimate, reference: fast_bss_eval.sdr(reference[:, None], estimate[:, None])[:, 0],
    },
    "SI-SDR": {
        "torchmetrics": scale_invariant_signal_distortion_ratio,
        "fast_bss_eval": lambda estimate, reference: fast_bss_eval.si_sdr(reference[:, None], estimate[:, None])[:, 0],
    },
}


def sources(esc10: Path | None) -> Tensor:
    """Two sounds of each clip, [B, 2, T], each at a tenth of full scale."""
    if esc10 is None:
        rngs = [np.random.default_rng([0, clip]) for clip in range(_NUM_CLIPS)]
        sounds = [synth.sound(label, rng=rng, duration_s=10.0) for rng in rngs for label in _LABELS]
    else:
        paths = sorted((esc10 / "audio").iterdir())
        chosen = paths[:: len(paths) // (2 * _NUM_CLIPS)][: 2 * _NUM_CLIPS]
        chosen = [chosen[place // 2 + _NUM_CLIPS * (place % 2)] for place in range(2 * _NUM_CLIPS)]  # unlike sounds
        sounds = [decode(path, sample_rate_hz=_RATE_HZ) for path in chosen]
    signals = torch.stack([torch.from_numpy(np.resize(sound, _NUM_SAMPLES).astype(np.float32)) for sound in sounds])
    signals = 0.1 * signals / signals.square().mean(-1, keepdim=True).sqrt()
    return signals.view(_NUM_CLIPS, len(_LABELS), _NUM_SAMPLES)


def seconds(work: Callable[[], object], device: str, least_s: float = 0.05) -> float:
    """Mean time of a call, over as many as take ``least_s``: of this thread on a CPU, wall on a GPU."""
    clock = time.thread_time if device == "cpu" else time.perf_counter
    num_calls, started = 0, clock()
    while num_calls == 0 or clock() - started < least_s:
        work()
        if device != "cpu":
            torch.cuda.synchronize()
        num_calls += 1
    return (clock() - started) / num_calls


def compare(works: list[Callable[[], object]], device: str, repeats: int) -> list[list[float]]:
    """Seconds of each, per repeat, after one round that does not count."""
    rounds = [[seconds(work, device) for work in works] for _ in range(repeats + 1)]
    return rounds[1:]


def against_libraries(name: str, clips_BST: Tensor, repeats: int) -> list[list[str]]:
    """Rows of the first table: a mixture as the estimate of its first sound, in both precisions."""
    rows = []
    ours = OURS[name]
    for dtype in (torch.float32, torch.float64):
        clips = clips_BST.to(dtype)
        estimate, reference = clips.sum(1), clips[:, 0].contiguous()
        theirs = THEIRS[name]
        calls = [partial(metric, estimate, reference) for metric in (ours, *theirs.values())]
        rounds = compare(calls, clips.device.type, repeats)
        for place, (library, metric) in enumerate(theirs.items(), 1):
            difference_db = float((metric(estimate, reference) - ours(estimate, reference)).abs().max())
            ratios = [times[0] / times[place] for times in rounds]
            own_ms = 1e3 * statistics.median(times[0] for times in rounds) / _NUM_CLIPS
            device, precision = clips.device.type, str(dtype).removeprefix("torch.")
            row = [name, device, precision, library, f"{own_ms:.2f}", *_spread(ratios), f"{difference_db:.1e}"]
            rows.append(row)
            print(*row, flush=True)
    return rows


SIZES = {"laptop": NetworkConfig(), "large": NetworkConfig(channels=768, num_blocks=20)}


def against_separator(clips_BST: Tensor, size: str, batch: int, repeats: int) -> list[str]:
    """A row of the second table: every score that needs no model, of the stems that the separator made."""
    device = clips_BST.device.type
    torch.manual_seed(0)
    separator = QuerySeparator(SIZES[size], _LABELS).to(device).eval()
    mixtures_BT = clips_BST[:batch].sum(1)
    rows_BT, queries = mixtures_BT.repeat_interleave(len(_LABELS), 0), list(_LABELS) * batch
    stems_BST = separator.separate(rows_BT, queries).view(batch, len(_LABELS), -1)
    rounds = compare(
        [
            lambda: score_batch(mixtures_BT=mixtures_BT, stems_BST=stems_BST, sample_rate_hz=_RATE_HZ),
            lambda: separator.separate(rows_BT, queries),
        ],
        device,
        repeats,
    )
    times_ms = (f"{1e3 * statistics.median(column) / batch:.1f}" for column in zip(*rounds, strict=True))
    row = [size, device, str(batch), *times_ms, *_spread([score / separate for score, separate in rounds])]
    print(*row, flush=True)
    return row


def _spread(ratios: list[float]) -> list[str]:
    return [f"{statistics.median(ratios):.3f}", f"{min(ratios):.3f} to {max(ratios):.3f}"]


def _table(columns: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [columns, ["---"] * len(columns), *rows])


def _about(esc10: Path | None, repeats: int) -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False).stdout
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchmetrics", "fast-bss-eval"))
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return (
        f"{_NUM_CLIPS} clips of 10 s ({'ESC-10' if esc10 else 'made'}), {repeats} repeats, one thread of "
        f"{os.cpu_count()} CPU cores ({platform.machine()}), {gpu}; {versions}; "
        f"commit {commit.strip() or 'unknown'}, {dt.date.today()}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--esc10", type=Path, help="folder with audio/; without it, made sounds")
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in _ALLOCATOR.items()):  # read when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | _ALLOCATOR)
    torch.set_num_threads(1)
    clips_BST = sources(arguments.esc10)
    libraries, costs = [], []
    with torch.no_grad():
        for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            for name in OURS:
                libraries += against_libraries(name, clips_BST.to(device), arguments.repeats)
            for size, batch in (("laptop", 1), ("laptop", _NUM_CLIPS), ("large", 1)):
                costs.append(against_separator(clips_BST.to(device), size, batch, arguments.repeats))
    columns = [
        "metric",
        "device",
        "clips",
        "library",
        "ours, ms a clip",
        "ours / theirs",
        "range",
        "largest difference, dB",
    ]
    theirs = _table(columns, libraries)
    columns = [
        "separator",
        "device",
        "clips at once",
        "scores, ms a clip",
        "separator, ms a clip",
        "scores / separator",
        "range",
    ]
    cost = _table(columns, costs)
    about = _about(arguments.esc10, arguments.repeats)
    text = f"# Scoring\n\n{cost}\n\n{theirs}\n\n{about}\n"
    write_bytes(Path(__file__).with_name("scoring.md"), text.encode())
    fill(Path(__file__).parent.parent / "README.md", "scoring", f"{cost}\n\n{theirs}\n\n{about}")


if __name__ == "__main__":
    main()
