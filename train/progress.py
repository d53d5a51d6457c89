"""Progress of a training on disk: states from which it resumes, and figures that the driver logs.

States are written through to the disk and checked when they are read. They are ours because Ray Train flushes neither
its copy of a checkpoint nor its list of checkpoints: after a power cut both can be empty, and no start of the training
gets past them.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from engine.storage.files import folder_for_block, write_bytes
from engine.storage.paths import Location
from train.student import StudentState

_LOGGER = logging.getLogger(__name__)
_NUM_STATES = 2


def save_state(work: Location, state: StudentState, *, step: int) -> None:
    """Store a state in the folder of a training, durably; the one before it stays as a fallback.

    The file's name has the SHA-256 of its bytes, so that a damaged file is recognised.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getvalue()
    write_bytes(work / f"state-{step:08d}-{_digest(data)}.pt", data)
    for path in _newest_first(work)[_NUM_STATES:]:
        path.unlink(missing_ok=True)


def remove_damaged(work: Location) -> None:
    """Delete damaged states and log each; called once at the start, because the logs of workers are not shown."""
    for path in _newest_first(work):
        if _undamaged(path) is None:
            _LOGGER.warning(f"{path} is damaged; the training resumes from the state before it, or from its start")
            path.unlink()


def load_state(work: Location, *, device: torch.device | str = "cpu") -> StudentState | None:
    """The newest undamaged state; None if there is none, so that the training starts from the beginning."""
    for path in _newest_first(work):
        if (data := _undamaged(path)) is not None:
            state: StudentState = torch.load(io.BytesIO(data), map_location=device, weights_only=True)
            return state
    return None


def _newest_first(work: Location) -> list[Location]:
    return sorted(work.glob("state-*.pt"), key=lambda path: path.name, reverse=True)


def _undamaged(path: Location) -> bytes | None:
    data = path.read_bytes()
    return data if _digest(data) == path.stem.rpartition("-")[2] else None


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def report_progress(file: str, values: Mapping[str, object]) -> None:
    """Append a line of figures; the driver sees it only if it shares a disk with the worker."""
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a") as lines:
        lines.write(json.dumps(values) + "\n")


@contextmanager
def logged_progress(work: Location) -> Iterator[Path]:
    """The progress file of a training, whose new lines are logged while the block runs.

    It is in the working folder, or in a temporary folder of this machine if the working folder is in S3.
    """
    with folder_for_block("clearsep-training-") as folder:
        file = (work if isinstance(work, Path) else folder) / "progress.jsonl"
        file.touch()
        done = threading.Event()
        follower = threading.Thread(target=_follow, args=(file, done), daemon=True)
        follower.start()
        try:
            yield file
        finally:
            done.set()
            follower.join()


def _follow(file: Path, done: threading.Event) -> None:
    with file.open() as lines:
        lines.seek(0, os.SEEK_END)
        is_done = False
        while not is_done:
            is_done = done.wait(1.0)
            for line in lines:
                _LOGGER.info("  " + ", ".join(f"{key} {value:.5g}" for key, value in json.loads(line).items()))
