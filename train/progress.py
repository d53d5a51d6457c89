"""Progress of a training: its first worker appends lines to a file, and the driver logs them."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from engine.storage.files import folder_for_block
from engine.storage.paths import Location

_LOGGER = logging.getLogger(__name__)


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
        while not done.wait(1.0):
            for line in lines:
                _LOGGER.info("  " + ", ".join(f"{key} {value:.5g}" for key, value in json.loads(line).items()))
