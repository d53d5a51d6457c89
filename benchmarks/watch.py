"""Use of the CPUs and of the first GPU of this machine while something runs."""

from __future__ import annotations

import contextlib
import shutil
import statistics
import subprocess
import threading
import time

import psutil
import torch


class Watch:
    """Samples the CPU time of this process with its children, and the first GPU, while a ``with`` block runs."""

    def __enter__(self) -> Watch:
        self.cpu: list[tuple[float, float]] = []
        self.gpu: list[tuple[float, float]] = []
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._watch_cpu, daemon=True)]
        self._smi = None
        if torch.cuda.is_available() and (program := shutil.which("nvidia-smi")):
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
        used: dict[int, float] = {}  # of processes that have ended, too
        while not self._over.wait(0.2):
            for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    times = process.cpu_times()
                    used[process.pid] = times.user + times.system
            self.cpu.append((time.time(), sum(used.values())))

    def _watch_gpu(self) -> None:
        assert self._smi is not None and self._smi.stdout is not None
        for line in self._smi.stdout:
            with contextlib.suppress(ValueError):  # a card that reports no use
                self.gpu.append((time.time(), float(line)))

    def cpu_s(self, start: float, end: float) -> float:
        """CPU seconds of this process and its children between two times."""
        inside = [used for at, used in self.cpu if start <= at <= end]
        return inside[-1] - inside[0] if inside else 0.0

    def busy(self, start: float = 0.0, end: float = float("inf")) -> str:
        """Fraction of the time between two times in which the GPU was busy."""
        inside = [percent for at, percent in self.gpu if start <= at <= end]
        return f"{statistics.mean(inside):.0f}%" if inside else ""
