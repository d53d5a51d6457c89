"""Cost of telling corpora apart by the contents of their files.

    python -m benchmarks.scale.contents [--files 20000] [--rows 1000000] [--out runs/contents]

*Pieces*: the contents of files of 320 kB (ten seconds at 16 kHz), hashed by pieces of some sizes, read from the disk
and from memory; a pass uses three pieces of 16 kB. *Starts*: the files of a manifest are compared as at every start of
a pass: the first one, one without changes, one of a corpus whose folder was copied (so that every file is opened), and
the first one of a manifest whose rows share a thousand files. These files are sparse, so that a million of them fit:
opening them costs what it costs, reading them from a disk is what the upper table has. Memory is what the step added to
its process. Writes ``contents.md``.
"""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import pages
from benchmarks.scale.scale import in_own_process, write_manifest
from engine.corpus import contents
from engine.corpus.read import read_corpus

_FILE_BYTES = 320_044
_PIECES = ((2, 1 << 12), (3, 1 << 12), (2, 1 << 14), (3, 1 << 14), (2, 1 << 16), (3, 1 << 16))
_MEDIA = ("disk_s", "memory_s")
_PAGE = Path(__file__).with_name("contents.md")


def measure_pieces(num_files: int) -> list[dict[str, Any]]:
    """Seconds for the contents of a number of files, by number and size of the pieces."""
    with tempfile.TemporaryDirectory() as folder:
        noise, paths = np.random.default_rng(0).bytes(_FILE_BYTES + num_files), []
        for number in range(num_files):
            path = Path(folder) / f"{number // 1000:04d}" / f"{number:07d}.wav"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(noise[number : number + _FILE_BYTES])
            paths.append(str(path))
        os.sync()
        found: list[dict[str, Any]] = []
        for number, num_bytes in _PIECES:
            contents._NUM_PIECES, contents._PIECE_BYTES = number, num_bytes
            _forget(paths)
            found.append({"pieces": number, "bytes": num_bytes})
            for name in _MEDIA:
                started = time.perf_counter()
                assert None not in contents.contents_of(paths)
                found[-1][name] = time.perf_counter() - started
        return found


def _forget(paths: list[str]) -> None:
    """Drop files from the memory of the operating system."""
    for path in paths:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def start(folder: Path) -> dict[str, Any]:
    """Compare the files of a manifest, as at a start of a pass."""
    corpus = read_corpus(folder / "manifest.csv")
    started = time.perf_counter()
    files = corpus.files(min_labels=2)
    contents.claim_contents(folder.parent / "contents.parquet", corpus.root, files, what="files", may_change=set)
    return {"s": time.perf_counter() - started}


def measure_starts(num_rows: int) -> dict[str, dict[str, Any]]:
    """Time and memory of starts over a number of rows."""
    with tempfile.TemporaryDirectory() as name:
        folder, found = Path(name) / "corpus", {}
        _write_files(folder, num_rows)
        write_manifest(folder / "manifest.csv", num_rows)
        time.sleep(contents._SETTLED_S)
        found["the first start"] = in_own_process(start, folder)
        found["the same files again"] = in_own_process(start, folder)
        shutil.rmtree(folder)
        _write_files(folder, num_rows)
        write_manifest(folder / "manifest.csv", num_rows)
        found["a copy of the files"] = in_own_process(start, folder)
        (folder.parent / "contents.parquet").unlink()
        write_manifest(folder / "manifest.csv", num_rows, num_files=1000)
        found["the first start, 1,000 files"] = in_own_process(start, folder)
        return found


def _write_files(folder: Path, num_files: int) -> None:
    for number in range(num_files):
        if number % 1000 == 0:
            (folder / f"audio/{number // 1000:04d}").mkdir(parents=True)
        with open(folder / f"audio/{number // 1000:04d}/{number:07d}.wav", "wb") as file:
            file.truncate(_FILE_BYTES)


def main() -> None:
    """Command line."""
    parser = pages.parser(__doc__)
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path, default=Path("runs/contents"), help="working folder")
    arguments = parser.parse_args()

    def measured(kind: str, measure: Callable[[int], Any], size: int) -> Any:  # noqa: ANN401 - any JSON
        return pages.measured_once(arguments.out / f"{kind}-{size}.json", functools.partial(measure, size))

    pieces, starts = (
        measured("pieces", measure_pieces, arguments.files),
        measured("starts", measure_starts, arguments.rows),
    )
    per_million = 1e6 / arguments.files
    upper = [
        [f"{row['pieces']} × {row['bytes'] >> 10} kB", *(f"{row[name] * per_million:.0f} s" for name in _MEDIA)]
        for row in pieces
    ]
    lower = [[name, f"{row['s']:.0f} s", f"{row['mib']:.0f} MiB"] for name, row in starts.items()]
    pages.write_page(
        _PAGE,
        "Cost of telling corpora apart by their contents",
        pages.markdown(["pieces of a file", "a million files from a disk", "from memory"], upper),
        pages.markdown([f"{arguments.rows:,} rows", "time", "memory"], lower),
        f"The upper table was measured on {arguments.files:,} files. {pages.stamp()}",
    )
    print(_PAGE.read_text())


if __name__ == "__main__":
    main()
