"""The account of a pass: the records of its parts, its failure rows, and what a second try of them came to.

A part is done when its record is there. A second try of failed clips is a *round*: ``stems/retry-<round>.parquet`` says
which clips, a row group a task, and parts named ``part-<task>-r<round>-<number>`` hold what came of it. Their records
count differences, what the round found less what it stands in for, so that the sums over all records remain the
account of the pass.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from engine.schema import CLIPS, FAILURES
from engine.storage.files import atomic_path, parquet_file, read_json, read_parquet, write_json
from engine.storage.paths import Location

Row = dict[str, Any]

_RETRY = pa.schema(
    [pa.field("task", pa.int64()), *(FAILURES.field(name) for name in ("clip_id", "path", "num_queries"))]
)
STEPS = ("decode", "separate", "assess", "score", "write")
_PART = re.compile(r"part-(\d+)(?:-r(\d+))?-(\d+)")


def part_name(task: int, round_: int, number: int) -> str:
    """Name of a part; ``round_`` 0 is the first try."""
    return f"part-{task:06d}-{number:04d}" if not round_ else f"part-{task:06d}-r{round_}-{number:04d}"


def parse_shard_name(part: str) -> tuple[int, int, int]:
    """Task, round and number of a part by its name."""
    found = _PART.fullmatch(part)
    assert found, part
    return int(found[1]), int(found[2] or 0), int(found[3])


def write_done(out: Location, part: str, record: dict[str, Any]) -> None:
    """Record that a part is whole."""
    write_json(out / "stems" / f"{part}.done.json", record)


def done_parts(out: Location) -> dict[str, dict[str, Any]]:
    """The record of every part that is whole, by part name."""
    return {part: read_json(out / "stems" / f"{part}.done.json") for part in done_names(out)}


def done_names(out: Location) -> list[str]:
    """The parts that are whole, in order."""
    return sorted(path.name.removesuffix(".done.json") for path in (out / "stems").glob("*.done.json"))


def done_records(out: Location, parts: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The records of some parts, read a few at a time, for each may be a request to a server."""
    with ThreadPoolExecutor(max_workers=16) as pool:
        for start in range(0, len(parts), 256):
            paths = [out / "stems" / f"{part}.done.json" for part in parts[start : start + 256]]
            yield from pool.map(read_json, paths)


def clips_in(out: Location, parts: Sequence[str]) -> set[str]:
    """The ids of all clips that have stems or a failure in some parts that are done."""
    ids, schema = set[str](), pa.schema([CLIPS.field("clip_id")])
    for part in parts:
        ids.update(read_parquet(out / "stems" / f"{part}.parquet", schema=schema)["clip_id"].to_pylist())
        if (failed := out / "failures" / f"{part}.parquet").is_file():
            ids.update(read_parquet(failed, schema=schema)["clip_id"].to_pylist())
    return ids


def failure_rows(out: Location) -> Iterator[tuple[int, Row]]:
    """Task (-1: the manifest) and row of every failure that stands: none that a later round tried again."""
    folder = out / "failures"
    if (folder / "manifest.parquet").is_file():
        yield from ((-1, row) for row in _rows(folder / "manifest.parquet"))
    done = set(done_names(out))
    paths = (path for path in folder.glob("part-*.parquet") if path.stem in done)
    parts = sorted((parse_shard_name(path.stem), path) for path in paths)
    rounds = {round_: {task: i for i, task in enumerate(retry_tasks(out, round_))} for round_ in _rounds(out)}
    for task, group in itertools.groupby(parts, key=lambda entry: entry[0][0]):
        tried = {
            round_: {row["clip_id"] for row in retry_rows(out, round_, groups[task])}
            for round_, groups in rounds.items()
            if part_name(task, round_, 0) in done
        }
        for (_, round_, _), path in group:
            again = set[str]().union(*(ids for later, ids in tried.items() if later > round_))
            yield from ((task, row) for row in _rows(path) if row["label"] is not None or row["clip_id"] not in again)


def _rows(path: Location) -> Iterator[Row]:
    yield from read_parquet(path, schema=FAILURES).to_pylist()


def _rounds(out: Location) -> list[int]:
    names = ((out / "stems").glob("retry-*.parquet")) if (out / "stems").is_dir() else ()
    return sorted(int(path.stem.removeprefix("retry-")) for path in names)


def retry_tasks(out: Location, round_: int) -> list[int]:
    """The tasks of a round, in the order of its row groups."""
    with parquet_file(out / "stems" / f"retry-{round_}.parquet") as file:
        return [file.metadata.row_group(i).column(0).statistics.min for i in range(file.num_row_groups)]


def retry_rows(out: Location, round_: int, group: int) -> list[Row]:
    """The failures that a round tries again in one of its tasks."""
    with parquet_file(out / "stems" / f"retry-{round_}.parquet") as file:
        rows: list[Row] = file.read_row_group(group).to_pylist()
    return rows


def last_round(out: Location) -> int:
    """The number of the last round that was begun; 0: there was none."""
    return max(_rounds(out), default=0)


def waiting_rows(out: Location) -> Iterator[Row]:
    """What a round that was begun has yet to try again."""
    done = set(done_names(out))
    for round_ in _rounds(out):
        with parquet_file(out / "stems" / f"retry-{round_}.parquet") as file:
            for group in range(file.num_row_groups):
                task = file.metadata.row_group(group).column(0).statistics.min
                if part_name(task, round_, 0) not in done:
                    yield from file.read_row_group(group).to_pylist()


def plan_retry(out: Location) -> int:
    """Put down the next round: every clip that failed as a whole; returns how many they are, 0 puts down nothing.

    A label that failed beside others that were separated is not among them: its clip has its stems already. Nor is a
    clip that an earlier round, which was broken off, has yet to try. A pass that was closed is open again.
    """
    waiting: dict[int, set[str]] = {}
    for row in waiting_rows(out):
        waiting.setdefault(row["task"], set()).add(row["clip_id"])
    whole = (
        (task, row)
        for task, row in failure_rows(out)
        if task >= 0 and row["label"] is None and row["clip_id"] not in waiting.get(task, ())
    )
    groups = itertools.groupby(whole, key=lambda entry: entry[0])
    first = next(groups, None)
    if first is None:
        return 0
    (out / "stems" / "manifest.json").unlink(missing_ok=True)  # first: a round without its pass open is never done
    count = 0
    path = out / "stems" / f"retry-{last_round(out) + 1}.parquet"
    with atomic_path(path) as aside, pq.ParquetWriter(aside, _RETRY) as writer:
        for task, rows in itertools.chain([(first[0], list(first[1]))], groups):
            wanted = {row["clip_id"]: {"task": task} | row for _, row in rows}
            writer.write_table(pa.Table.from_pylist(list(wanted.values()), schema=_RETRY))
            count += len(wanted)
    return count


def sums(out: Location) -> tuple[dict[str, float], dict[tuple[int, int], int]]:
    """Sums over the parts that are done, and how many parts the tasks have, by task and round, that have any done."""
    total = dict.fromkeys(("num_stems", "num_failed", "num_clips", "num_queries", "audio_s"), 0.0)
    total |= {f"{step}_s": 0.0 for step in STEPS}
    num_parts: dict[tuple[int, int], int] = {}
    names = done_names(out)
    for name, record in zip(names, done_records(out, names), strict=True):
        for key in total:
            total[key] += record[key]
        place = parse_shard_name(name)[:2]
        num_parts[place] = max(num_parts.get(place, 0), record["num_parts"])
    return total, num_parts


def missing_tasks(out: Location, num_tasks: int, num_parts: dict[tuple[int, int], int]) -> list[dict[str, Any]]:
    """The tasks that are not wholly done, in all rounds, as ``Decode`` takes them."""
    done: dict[int, list[str]] = {}
    for name in done_names(out):
        done.setdefault(parse_shard_name(name)[0], []).append(name)
    rounds = {0: range(num_tasks)} | {round_: retry_tasks(out, round_) for round_ in range(1, last_round(out) + 1)}
    missing = []
    for round_, tasks in rounds.items():
        for group, task in enumerate(tasks):
            mine = [name for name in done.get(task, ()) if parse_shard_name(name)[1] == round_]
            if len(mine) < num_parts.get((task, round_), 1):
                names = done.get(task, []) if round_ else mine
                missing.append({"task": task, "round": round_, "group": group, "done": names})
    return missing


def summarise_failures(out: Location, *, most: int = 10) -> dict[str, Any]:
    """How many queries failed, by step and error class, most first, with an example of each."""
    counts: Counter[tuple[str, str]] = Counter()
    examples: dict[tuple[str, str], Row] = {}
    num_rows = 0
    for _, row in failure_rows(out):
        key = (row["step"], row["error_class"])
        counts[key] += row["num_queries"]
        examples.setdefault(key, row)
        num_rows += 1
    reasons = [
        {"step": step, "error_class": kind, "num_queries": number, "example": _example(examples[step, kind])}
        for (step, kind), number in counts.most_common(most)
    ]
    return {"num_rows": num_rows, "num_queries": sum(counts.values()), "reasons": reasons}


def _example(row: Row) -> str:
    return f"{row['path']}: {row['message']}"[:300]
