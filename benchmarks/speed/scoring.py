"""The cost of scoring: against torchmetrics and fast_bss_eval on the same clips, and against the separator.

    python -m benchmarks.speed.scoring [--esc10 DIR] [--repeats 7]

All in one run, on one thread as in an engine's actor, and also on a GPU if there is one. Clips of ten seconds at 16 kHz
are sums of two sounds, of ESC-10 or synthesised. Each repeat times what is compared one after the other, and the ratios
are those within a repeat: of the thread's time on a CPU, of wall time on a GPU. Every library gets the same tensors.
Writes ``scoring.md`` and a table of docs/results.md.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path

import fast_bss_eval
import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.audio import scale_invariant_signal_distortion_ratio, signal_distortion_ratio

from benchmarks import pages
from engine.audio.decode import decode
from engine.scoring import metrics
from engine.scoring.scores import score_batch
from engine.separators import NetworkConfig, QuerySeparator
from tune.demo.sounds import sound

_PAGE = Path(__file__).with_name("scoring.md")
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
    """Two sounds for each clip, [B, 2, T], each at a tenth of full scale."""
    if esc10 is None:
        rngs = [np.random.default_rng([0, clip]) for clip in range(_NUM_CLIPS)]
        sounds = [sound(label, rng=rng, duration_s=10.0) for rng in rngs for label in _LABELS]
    else:
        paths = sorted((esc10 / "audio").iterdir())
        chosen = paths[:: len(paths) // (2 * _NUM_CLIPS)][: 2 * _NUM_CLIPS]
        chosen = [chosen[i // 2 + _NUM_CLIPS * (i % 2)] for i in range(2 * _NUM_CLIPS)]  # two labels in each clip
        sounds = [decode(path, sample_rate_hz=_RATE_HZ) for path in chosen]
    signals = torch.stack([torch.from_numpy(np.resize(one, _NUM_SAMPLES).astype(np.float32)) for one in sounds])
    signals = 0.1 * signals / signals.square().mean(-1, keepdim=True).sqrt()
    return signals.view(_NUM_CLIPS, len(_LABELS), _NUM_SAMPLES)


def seconds(work: Callable[[], object], device: str, least_s: float = 0.05) -> float:
    """Mean time of a call, over at least ``least_s``: of this thread on a CPU, wall time on a GPU."""
    clock = time.thread_time if device == "cpu" else time.perf_counter
    num_calls, started = 0, clock()
    while num_calls == 0 or clock() - started < least_s:
        work()
        if device != "cpu":
            torch.cuda.synchronize()
        num_calls += 1
    return (clock() - started) / num_calls


def compare(works: Sequence[Callable[[], object]], device: str, repeats: int) -> list[list[float]]:
    """Seconds of each, for each repeat; a first repeat does not count."""
    return [[seconds(work, device) for work in works] for _ in range(repeats + 1)][1:]


def against_libraries(name: str, clips_BST: Tensor, repeats: int) -> list[list[str]]:
    """Rows of the second table: a mixture as the estimate of its first sound, in both precisions."""
    rows = []
    ours = OURS[name]
    for dtype in (torch.float32, torch.float64):
        clips = clips_BST.to(dtype)
        estimate, reference = clips.sum(1), clips[:, 0].contiguous()
        theirs = THEIRS[name]
        calls = [partial(metric, estimate, reference) for metric in (ours, *theirs.values())]
        repeated = compare(calls, clips.device.type, repeats)
        for number, (library, metric) in enumerate(theirs.items(), 1):
            difference_db = float((metric(estimate, reference) - ours(estimate, reference)).abs().max())
            ratios = [times[0] / times[number] for times in repeated]
            own_ms = 1e3 * statistics.median(times[0] for times in repeated) / _NUM_CLIPS
            device, precision = clips.device.type, str(dtype).removeprefix("torch.")
            row = [name, device, precision, library, f"{own_ms:.2f}", *_spread(ratios), f"{difference_db:.1e}"]
            rows.append(row)
            print(*row, flush=True)
    return rows


SIZES = {"laptop": NetworkConfig(), "large": NetworkConfig(channels=768, num_blocks=20)}


def against_separator(clips_BST: Tensor, size: str, batch: int, repeats: int) -> list[str]:
    """One row of the first table: every score that needs no model, of the stems of an untrained separator."""
    device = clips_BST.device.type
    torch.manual_seed(0)
    separator = QuerySeparator(SIZES[size], _LABELS).to(device).eval()
    mixtures_BT = clips_BST[:batch].sum(1)
    rows_BT, queries = mixtures_BT.repeat_interleave(len(_LABELS), 0), list(_LABELS) * batch
    stems_BST = separator.separate(rows_BT, queries).view(batch, len(_LABELS), -1)
    repeated = compare(
        [
            lambda: score_batch(mixtures_BT=mixtures_BT, stems_BST=stems_BST, sample_rate_hz=_RATE_HZ),
            lambda: separator.separate(rows_BT, queries),
        ],
        device,
        repeats,
    )
    times_ms = (f"{1e3 * statistics.median(column) / batch:.1f}" for column in zip(*repeated, strict=True))
    row = [size, device, str(batch), *times_ms, *_spread([score / separate for score, separate in repeated])]
    print(*row, flush=True)
    return row


def _spread(ratios: list[float]) -> list[str]:
    return [f"{statistics.median(ratios):.3f}", f"{min(ratios):.3f} to {max(ratios):.3f}"]


def _provenance(esc10: Path | None, repeats: int) -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchmetrics", "fast-bss-eval"))
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return (
        f"{_NUM_CLIPS} clips of 10 s ({'ESC-10' if esc10 else 'synthesised'}), {repeats} repeats, one thread; "
        f"{versions}; commit {pages.commit()}, {pages.hardware(gpu)}"
    )


_METRIC_COLUMNS = (
    "metric",
    "device",
    "precision",
    "library",
    "ours, ms a clip",
    "ours / theirs",
    "range",
    "largest difference, dB",
)
_COST_COLUMNS = (
    "separator",
    "device",
    "clips at once",
    "scores, ms a clip",
    "separator, ms a clip",
    "scores / separator",
    "range",
)


def main() -> None:
    """Command line."""
    parser = pages.parser(__doc__)
    parser.add_argument("--esc10", type=Path, help="folder with audio/; without it, synthesised sounds")
    parser.add_argument("--repeats", type=int, default=7, help="measurements of each pair")
    arguments = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in _ALLOCATOR.items()):  # read when a process starts
        os.execve(sys.executable, sys.orig_argv, os.environ | _ALLOCATOR)
    torch.set_num_threads(1)
    clips_BST = sources(arguments.esc10)
    libraries, costs = [], []
    with torch.no_grad():
        for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            for name in OURS:
                libraries += against_libraries(name, clips_BST.to(device), arguments.repeats)
            for size, batch in (("laptop", 1), ("laptop", _NUM_CLIPS), ("large", 1)):
                costs.append(against_separator(clips_BST.to(device), size, batch, arguments.repeats))
    parts = [pages.markdown(_COST_COLUMNS, costs), pages.markdown(_METRIC_COLUMNS, libraries)]
    parts.append(_provenance(arguments.esc10, arguments.repeats))
    print(*parts, sep="\n\n")
    pages.write_page(_PAGE, "Scoring", *parts)
    pages.fill(pages.RESULTS, "scoring", "\n\n".join(parts))


if __name__ == "__main__":
    main()
