"""What a chaos test strikes besides the command: worker processes, decoders, and listings that lose entries.

    python -m tests.support.chaos_victims COMMAND ...

runs ``clearsep COMMAND`` with listings that lose two of their newest entries once whenever the file in the environment
variable ``CHAOS_LISTINGS`` exists, as an object store does that lists late.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import psutil

LISTINGS = "CHAOS_LISTINGS"
TRAINERS = ("ray::RayTrainWorker", "ray::distil")
WORKERS = {"actor": "ray::MapWorker", "task": "ray::Map", "trainer": TRAINERS, "decoder": ""}
_DECODER = "engine.audio.worker"
_NUM_LOST = 2


def find_workers(kind: str, raylets: list[int]) -> list[psutil.Process]:
    """Worker processes of one kind that belong to some raylets; another Ray may run on this machine."""
    found = []
    for raylet in raylets:
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(raylet).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if _is_kind(kind, process.cmdline()):
                        found.append(process)
    return found


def _is_kind(kind: str, words: list[str]) -> bool:
    if kind == "decoder":
        return _DECODER in words
    title = " ".join(words)
    return title.startswith(WORKERS[kind]) and not (kind == "task" and title.startswith(WORKERS["actor"]))


def lose_listings(sign: Path) -> None:
    """Let the next listing of records in this process lose entries whenever ``sign`` exists."""
    glob = Path.glob

    def losing(folder: Path, pattern: str) -> Iterator[Path]:
        found = sorted(glob(folder, pattern))
        if pattern.endswith(".done.json") and len(found) > _NUM_LOST and sign.exists():
            sign.unlink()
            found.sort(key=lambda path: path.stat().st_mtime_ns)
            found = found[:-_NUM_LOST]
        yield from found

    Path.glob = losing  # type: ignore[method-assign,assignment]


if __name__ == "__main__":
    import clearsep

    lose_listings(Path(os.environ[LISTINGS]))
    clearsep.main()
