"""Rows of a corpus to decoded clips, cut to length and handed on part by part, so that memory stays bounded."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from engine.audio.worker import DecodeError, Decoder
from engine.corpus.clips import cut, resolve
from engine.errors import AudioError
from engine.passes.config import PassConfig
from engine.passes.parts import _CLIP, Row, Source, _row
from engine.passes.records import clips_in, done_records, parse_shard_name, part_name, retry_rows
from engine.passes.tasks import Tasks
from engine.schema import DecodedClip, failure
from engine.storage.paths import location
from engine.storage.retry import retried

Failures = list[dict[str, Any]]


def _fail(row: dict[str, Any], error: Exception) -> dict[str, Any]:
    return failure(clip_id=row["clip_id"], path=row["path"], num_queries=len(row["labels"]), step="decode", error=error)


def cut_rows(
    rows: list[dict[str, Any]], *, root: str, clip_s: float, min_clip_s: float, decoder: Decoder
) -> tuple[list[dict[str, Any]], Failures]:
    """Rows of ``schema.CLIPS``, each no longer than ``clip_s``, from headers alone; unreadable ones as failures."""
    pieces, failures = [], []
    for row in rows:
        try:
            info = retried(functools.partial(decoder.probe, resolve(root, row["path"])))
            pieces.extend(cut(row, duration_s=info.duration_s, clip_s=clip_s, min_clip_s=min_clip_s))
        except AudioError as error:
            failures.append(_fail(row, error))
    return pieces, failures


def parts(rows: list[dict[str, Any]], *, clip_s: float, part_s: float) -> list[list[dict[str, Any]]]:
    """Cut rows in groups of at most ``part_s`` seconds (at least one row each); there is always one part."""
    size = max(1, int(part_s / clip_s))
    return [rows[i : i + size] for i in range(0, len(rows), size)] or [[]]


def decode_rows(
    rows: list[dict[str, Any]], *, root: str, sample_rate_hz: int, clip_s: float, decoder: Decoder
) -> tuple[list[DecodedClip], Failures]:
    """Decoded mono clips, and a failure row for every clip that could not be decoded.

    A file that takes too long is tried once: its other clips among ``rows`` fail with the same error.
    """
    clips: list[DecodedClip] = []
    failures: Failures = []
    slow: dict[str, AudioError] = {}
    for row in rows:
        path, start_s = resolve(root, row["path"]), row["start_s"] or 0.0
        duration_s = clip_s if row["end_s"] is None else min(row["end_s"] - start_s, clip_s)
        decode = functools.partial(
            decoder.decode, path, sample_rate_hz=sample_rate_hz, start_s=start_s, duration_s=duration_s
        )
        try:
            if path in slow:
                raise slow[path]
            clips.append(DecodedClip(row=row, samples_T=retried(decode)))
        except AudioError as error:
            failures.append(_fail(row, error))
            if isinstance(error, DecodeError) and error.error_class == "DecoderTimeout":
                slow[path] = error
    return clips, failures


class Decode:
    """Task: rows of the manifest to parts of decoded clips, one at a time.

    A batch row names a task, a round (0: the first try), in a later round the task's place in its list, and the parts
    of the task that are done already: of this round, and in a later one of all. What they hold is not done again,
    whatever has become of the files since.
    """

    def __init__(self, source: Source, config: PassConfig) -> None:
        self.source, self.config = source, config

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        for entry in batch.to_pylist():
            yield from self._parts(**entry)

    def _parts(self, task: int, round: int, group: int, done: Sequence[str] = ()) -> Iterator[pa.Table]:
        started = time.perf_counter()
        source, config = self.source, self.config
        out = location(source.out)
        decoder = _decoder(config.decode_limit_s)
        mine = [name for name in done if parse_shard_name(name)[1] == round]
        others = [name for name in done if parse_shard_name(name)[1] != round]
        before = retry_rows(out, round, group) if round else []
        pieces, failures = self._missing(Tasks(out / "corpus").rows(task), before, mine, others, decoder)
        groups = parts(pieces, clip_s=config.clip_s, part_s=config.part_s)
        num_parts = max((record["num_parts"] for record in done_records(out, mine)), default=0)
        groups += [[]] * (num_parts - len(mine) - len(groups))  # files that are shorter by now, or gone
        taken = {parse_shard_name(name)[2] for name in mine}
        numbers = (number for number in itertools.count() if number not in taken)
        for number, group_rows in zip(numbers, groups, strict=False):
            clips, failed = decode_rows(
                group_rows,
                root=source.root,
                sample_rate_hz=source.sample_rate_hz,
                clip_s=config.clip_s,
                decoder=decoder,
            )
            less = before if number == 0 else []  # what this round stands in for
            num_queries_before = sum(row["num_queries"] for row in less)
            values = {
                "part": part_name(task, round, number),
                "task": task,
                "round": round,
                "num_parts": len(mine) + len(groups),
                "num_clips": len(group_rows) + len(failures) - len(less),
                "num_queries": sum(len(row["labels"]) for row in group_rows)
                + sum(row["num_queries"] for row in failures)
                - num_queries_before,
                "num_failed_before": num_queries_before,
                "audio_s": sum(len(clip.samples_T) for clip in clips) / source.sample_rate_hz,
                "clips": [{**clip.row, "samples": clip.samples_T.tobytes()} for clip in clips],
                "failures": failed + failures,
                "decode_s": time.perf_counter() - started,
            }
            yield _row(values, _CLIP)
            failures = []  # they are of the first part
            started = time.perf_counter()

    def _missing(
        self, rows: list[Row], before: list[Row], mine: Sequence[str], others: Sequence[str], decoder: Decoder
    ) -> tuple[list[Row], list[Row]]:
        """The clips of a task that no part holds yet, and those that fail as they are cut."""
        out = location(self.source.out)
        held = clips_in(out, mine)
        if not before:
            pieces, failures = self._cut([row for row in rows if row["clip_id"] not in held], decoder)
        else:
            tried = {row["clip_id"] for row in before}
            pieces, failures = self._cut_again(rows, [row for row in before if row["clip_id"] not in held], decoder)
            if any(
                piece["clip_id"] not in tried for piece in pieces
            ):  # a recording that broke off may be there in part
                held |= clips_in(out, others) - tried
        return [piece for piece in pieces if piece["clip_id"] not in held], failures

    def _cut(self, rows: list[Row], decoder: Decoder) -> tuple[list[Row], list[Row]]:
        config = self.config
        return cut_rows(
            rows, root=self.source.root, clip_s=config.clip_s, min_clip_s=config.min_clip_s, decoder=decoder
        )

    def _cut_again(self, rows: list[Row], before: list[Row], decoder: Decoder) -> tuple[list[Row], list[Row]]:
        """The clips of a task that failed before, and those of them that fail as they are cut."""
        wanted = {row["clip_id"]: row for row in before}
        paths = {row["path"] for row in before}
        pieces: list[Row] = []
        failures: list[Row] = []
        unreadable: dict[str, Row] = {}
        for row in (row for row in rows if row["path"] in paths):
            cut, failed = self._cut([row], decoder)
            unreadable |= {entry["path"]: entry for entry in failed}
            if wanted.pop(row["clip_id"], None):  # the file itself could not be read, or it is one clip
                pieces += cut
                failures += failed
            else:
                pieces += [piece for piece in cut if wanted.pop(piece["clip_id"], None)]
        for row in wanted.values():  # pieces that their files do not have any more
            same = {name: row[name] for name in ("clip_id", "path", "num_queries")}
            error = AudioError("its file is of another length by now and has no such clip: start a new pass")
            lost = failure(**same, step="decode", error=error)
            failures.append(unreadable.get(row["path"], lost) | same)
        return pieces, failures


@functools.lru_cache(maxsize=1)
def _decoder(limit_s: float) -> Decoder:
    """This process's decoder."""
    return Decoder(time_limit_s=limit_s)
