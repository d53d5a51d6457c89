"""What a GPU is used for, and what bounds it: separation, training, and the whole loop on ESC-10.

    python -m benchmarks.gpu [--esc10 DIR] [--out runs/gpu] [--quick] [--tables 123]

Table 1: the network's forward pass alone (16 bits, mixtures on the card), the loop around it (clips in memory, results
fetched) and a pass on Ray (decoded, scored, written; start-up left out), with the time that the card is busy meanwhile
and the CPU time of the whole machine. Table 2: a training step alone, and with its batches made. Table 3: the benchmark
of ``benchmarks/quality/esc10.py`` at the sizes of the README, by stage. At most eight minutes on one card. Needs torch,
Ray and libsndfile only: all clips are WAV. Without a GPU it runs on the CPU; ``--quick`` shows in minutes that it works
and writes no page. Writes ``gpu.md``.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil
import soundfile
import soxr
import torch

from benchmarks import pages
from benchmarks.quality import esc10
from benchmarks.speed.separators import difference_db
from cluster.session import connect
from engine.corpus.read import read_corpus
from engine.passes.config import PassConfig
from engine.passes.run import run_pass
from engine.separators import Embeddings, NetworkConfig, QueryEmbedder, QuerySeparator, SeparatorSource
from engine.separators.audiosep.network import AudioSepConfig
from engine.separators.audiosep.separator import AudioSep
from engine.separators.base import NetworkSeparator
from engine.storage.files import read_json
from tune.demo import sounds

_PAGE = Path(__file__).with_suffix(".md")
_LABELS, _CLIP_S = ("rain", "siren"), 10.0
_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_LARGE = NetworkConfig(channels=768, num_blocks=20)


def open_laptop(device: str) -> NetworkSeparator:
    """The recipe's network, with random weights."""
    return _opened(QuerySeparator(NetworkConfig(), _LABELS), device)


def open_large(device: str) -> NetworkSeparator:
    """A network of 768 channels and 20 blocks, with random weights."""
    return _opened(QuerySeparator(_LARGE, _LABELS), device)


def open_audiosep(device: str) -> NetworkSeparator:
    """AudioSep's network, with random weights and random embeddings of the labels."""
    separator = AudioSep(AudioSepConfig(), ())
    vectors_LE = torch.nn.functional.normalize(torch.randn(len(_LABELS), 512), dim=1)
    known = Embeddings(labels=_LABELS, vectors_LE=vectors_LE, encoder="random")
    separator.embedder = QueryEmbedder(template="{label}", encoder="random", open_encoder=_no_encoder, embeddings=known)
    return _opened(separator, device)


def _no_encoder() -> QueryEmbedder:
    raise ValueError("the labels of this benchmark must have embeddings, got another label; add it")


def _opened(separator: NetworkSeparator, device: str) -> NetworkSeparator:
    return separator.to(device).eval()


@dataclass(frozen=True, kw_only=True)
class Case:
    """A separator of table 1."""

    name: str
    open: Callable[[str], NetworkSeparator]
    batches_s: tuple[float, ...]
    """Audio of the batches of the forward pass and the loop, in seconds; each clip has two queries."""
    num_clips: int
    """Clips of the pass."""


CASES = (
    Case(name="laptop (256 channels, 10 blocks)", open=open_laptop, batches_s=(80.0, 320.0, 640.0), num_clips=6000),
    Case(name="large (768 channels, 20 blocks)", open=open_large, batches_s=(80.0, 320.0, 640.0), num_clips=6000),
    Case(name="AudioSep", open=open_audiosep, batches_s=(80.0, 320.0), num_clips=800),
)
_QUICK = (replace(CASES[0], batches_s=(20.0,), num_clips=24),)


class Watch:
    """Samples the CPU time of the machine and the use of its first GPU while a ``with`` block runs."""

    def __enter__(self) -> Watch:
        self.cpu: list[tuple[float, float]] = []
        self.gpu: list[tuple[float, float]] = []
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._watch_cpu, daemon=True)]
        self._smi = None
        if _DEVICE == "cuda" and (program := shutil.which("nvidia-smi")):
            command = [program, "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "--loop-ms=100"]
            self._smi = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            self._threads.append(threading.Thread(target=self._watch_gpu, daemon=True))
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._smi is not None:
            self._smi.terminate()
        for thread in self._threads:
            thread.join()

    def _watch_cpu(self) -> None:
        while not self._over.wait(0.1):
            times = psutil.cpu_times()
            self.cpu.append((time.time(), times.user + times.system))

    def _watch_gpu(self) -> None:
        assert self._smi is not None and self._smi.stdout is not None
        for line in self._smi.stdout:
            with contextlib.suppress(ValueError):  # a card that reports no use
                self.gpu.append((time.time(), float(line)))

    def cpu_s(self, start: float, end: float) -> float:
        """CPU seconds of all processes between two times."""
        inside = [used for at, used in self.cpu if start <= at <= end]
        return inside[-1] - inside[0] if inside else 0.0

    def busy(self, start: float = 0.0, end: float = float("inf")) -> str:
        """Fraction of the time between two times in which the GPU was busy."""
        inside = [percent for at, percent in self.gpu if start <= at <= end]
        return f"{statistics.mean(inside):.0f}%" if inside else ""


def seconds(call: Callable[[], object], *, repeats: int, warm: int = 3) -> float:
    """Median wall time of a call with everything that it started on the card."""
    times = []
    for number in range(warm + repeats):
        started = time.perf_counter()
        call()
        if _DEVICE == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[warm:])
