"""A check of one machine, which ``clearsep preflight`` runs on every node of a cluster.

    python -m engine.cli.selfcheck [--out OUT [--marker NAME [--mark put|take]]] [--separator SEPARATOR]

Prints the result of :func:`probe` as a line of JSON.
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
_ROOT = Path(__file__).resolve().parents[2]
_CODE = ("engine", "train", "tune", "cluster")
_SECONDS = 4.0
_TEXT = "dog bark"
"""A query for a separator without a vocabulary; its encoder must be there."""


def probe(*, out: str | None = None, marker: str | None = None, separator: str | None = None) -> dict[str, Any]:
    """Versions, GPUs and free space; with ``out`` and ``separator`` also tests of writing there and of separating.

    ``marker`` is a file that another machine has put into ``out``, which must be visible here.

    Keys: ``versions`` by package (``clearsep`` is a fingerprint of the code), ``gpus_seen`` (name and ``memory_gib``),
    ``disk_gib`` free for temporary files, ``shm_gib`` free of ``shm_total_gib`` in /dev/shm, ``out_ms`` of a write and
    a read, ``separator_rtf`` (seconds of computing per second of audio, second call) and ``errors`` by key of the
    check that failed.
    """
    found: dict[str, Any] = {"versions": _versions(), "errors": {}}

    def attempt(name: str, check: Callable[[], Any]) -> None:
        try:
            found[name] = check()
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            found["errors"][name] = f"{type(error).__name__}: {error}"

    attempt("gpus_seen", _gpus)
    if (secret := os.environ.get("CLEARSEP_ENV_FILE")) is not None:  # of clearsep submit --env-file
        attempt("env_file", lambda: len(Path(secret).read_bytes()))
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
    return versions | {"clearsep": _code_fingerprint()}


def _code_fingerprint() -> str:
    digest = hashlib.sha256()
    for path in sorted(path for name in _CODE for path in (_ROOT / name).rglob("*.py")):
        digest.update(path.relative_to(_ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _gpus() -> list[dict[str, Any]]:
    import torch

    devices = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    for number in range(len(devices)):  # a driver of a wrong version fails only when a GPU is used
        torch.zeros(1, device=f"cuda:{number}")
    return [{"name": device.name, "memory_gib": device.total_memory / 2**30} for device in devices]


def _write_and_read(out: str, marker: str | None) -> float:
    from engine.storage.files import write_bytes
    from engine.storage.paths import location

    folder = location(out)
    if marker is not None and not (folder / marker).is_file():
        raise OSError("cannot see a file that another node wrote; give a folder that all nodes share, or s3://")
    path, data = folder / f".preflight-{uuid.uuid4().hex}", os.urandom(1024)
    started = time.perf_counter()
    try:
        write_bytes(path, data)
        if path.read_bytes() != data:
            raise OSError(f"cannot read from {out} what was written to it; check the storage")
    finally:
        path.unlink(missing_ok=True)
    return (time.perf_counter() - started) * 1000.0


def _separate(name: str) -> float:
    import torch

    from engine.separators import load_separator

    separator = load_separator(name, device="cuda" if torch.cuda.is_available() else "cpu")
    queries = list(separator.labels[:1]) or [_TEXT]
    num_samples = int(_SECONDS * separator.sample_rate_hz)
    for _ in range(2):  # the first call includes start-up costs
        started = time.perf_counter()
        mix_BT = torch.randn(1, num_samples, generator=torch.Generator().manual_seed(0)) * 0.1
        with torch.inference_mode():
            stems_BT = separator.separate(mix_BT, queries).cpu()
    if stems_BT.shape != mix_BT.shape or not torch.isfinite(stems_BT).all():
        raise RuntimeError(
            f"stems must be finite and of shape {tuple(mix_BT.shape)}, got {tuple(stems_BT.shape)} from {name}; "
            "correct the separator"
        )
    return (time.perf_counter() - started) / _SECONDS


def main() -> None:
    """Print the result of :func:`probe`; with ``--mark`` put or take away the marker file in ``out`` instead."""
    parser = argparse.ArgumentParser(prog="python -m engine.cli.selfcheck")
    parser.add_argument("--out")
    parser.add_argument("--marker")
    parser.add_argument("--mark", choices=("put", "take"))
    parser.add_argument("--separator")
    options = parser.parse_args()
    if options.mark is None:
        found = probe(out=options.out, marker=options.marker, separator=options.separator)
        sys.stdout.write(json.dumps(found) + "\n")
        return
    from engine.storage.files import write_bytes
    from engine.storage.paths import location

    path = location(options.out) / options.marker
    if options.mark == "put":
        write_bytes(path, b"another node wrote this")
    else:
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
