"""What one machine has and can do for a pass, as ``clearsep preflight`` asks every node of a cluster.

    python -m engine.probe [--out OUT [--marker NAME [--mark put|take]]] [--separator DIR]

A line of JSON on standard output, see :func:`probe`.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

_PACKAGES = ("ray", "torch", "numpy", "pyarrow")
_CODE = ("engine", "train", "tune", "cluster")
_SECONDS = 4.0


def probe(*, out: str | None = None, marker: str | None = None, separator: str | None = None) -> dict[str, Any]:
    """Versions, GPUs, room and, where they are named, whether ``out`` takes files and ``separator`` separates.

    ``marker`` is a file that must be in ``out`` already: another machine has put it there.

    Keys: ``versions`` by name (``ours`` is a fingerprint of the code), ``gpus_seen`` (name and ``memory_gib``),
    ``disk_gib`` free where temporary files lie, ``shm_gib`` free of ``shm_total_gib`` in /dev/shm, ``out_ms`` for a
    write and a read, ``separator_rtf`` (seconds of computing for a second of audio, the second time) and ``errors``
    by what was tried.
    """
    found: dict[str, Any] = {"versions": _versions(), "errors": {}}

    def attempt(name: str, do: Callable[[], Any]) -> None:
        try:
            found[name] = do()
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            found["errors"][name] = f"{type(error).__name__}: {error}"

    attempt("gpus_seen", _gpus)
    attempt("disk_gib", lambda: shutil.disk_usage(tempfile.gettempdir()).free / 2**30)
    if os.path.isdir("/dev/shm"):
        attempt("shm_gib", lambda: shutil.disk_usage("/dev/shm").free / 2**30)
        attempt("shm_total_gib", lambda: shutil.disk_usage("/dev/shm").total / 2**30)
    if out is not None:
        attempt("out_ms", lambda: _write_and_read(out, marker))
    if separator is not None:
        attempt("separator_rtf", lambda: _separate(separator))
    return found


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions | {"ours": _fingerprint()}


def _fingerprint() -> str:
    root, digest = Path(__file__).resolve().parent.parent, hashlib.sha256()
    for path in sorted(path for name in _CODE for path in (root / name).rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _gpus() -> list[dict[str, Any]]:
    import torch

    devices = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    for number in range(len(devices)):  # a driver that does not fit shows only when it is used
        torch.zeros(1, device=f"cuda:{number}")
    return [{"name": device.name, "memory_gib": device.total_memory / 2**30} for device in devices]


def _write_and_read(out: str, marker: str | None) -> float:
    from engine.storage.files import write_bytes
    from engine.storage.paths import location

    if marker is not None and not (location(out) / marker).is_file():
        raise OSError("what another node wrote there is not there; name a folder that all nodes share, or s3://")
    place, data = location(out) / f".preflight-{uuid.uuid4().hex}", os.urandom(1024)
    started = time.perf_counter()
    try:
        write_bytes(place, data)
        if place.read_bytes() != data:
            raise OSError(f"{out} does not give back what was written to it")
    finally:
        place.unlink(missing_ok=True)
    return (time.perf_counter() - started) * 1000.0


def _separate(folder: str) -> float:
    import torch

    from engine.separators import load

    separator = load(folder, device="cuda" if torch.cuda.is_available() else "cpu")
    num_samples = int(_SECONDS * separator.sample_rate_hz)
    for _ in range(2):  # the first call starts things up
        started = time.perf_counter()
        mix_BT = torch.randn(1, num_samples, generator=torch.Generator().manual_seed(0)) * 0.1
        with torch.inference_mode():
            stems_BT = separator.separate(mix_BT, separator.labels[:1]).cpu()
    if stems_BT.shape != mix_BT.shape or not torch.isfinite(stems_BT).all():
        raise RuntimeError(f"the separator answers with {tuple(stems_BT.shape)}, or numbers that are not finite")
    return (time.perf_counter() - started) / _SECONDS


def main() -> None:
    """Print what :func:`probe` finds; or only put a marker into ``out``, or take it away."""
    parser = argparse.ArgumentParser(prog="python -m engine.probe")
    parser.add_argument("--out")
    parser.add_argument("--marker")
    parser.add_argument("--mark", choices=("put", "take"))
    parser.add_argument("--separator")
    asked = parser.parse_args()
    if asked.mark is None:
        found = probe(out=asked.out, marker=asked.marker, separator=asked.separator)
        sys.stdout.write(json.dumps(found) + "\n")
        return
    from engine.storage.files import write_bytes
    from engine.storage.paths import location

    if asked.mark == "put":
        write_bytes(location(asked.out) / asked.marker, b"another node wrote this")
    else:
        (location(asked.out) / asked.marker).unlink(missing_ok=True)


if __name__ == "__main__":
    main()
