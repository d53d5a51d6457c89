"""Step 3 of a pass: encode the stems of a shard, write the shard and its record."""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import cast

import pyarrow as pa
import soxr
import torch

from engine.audio.flac import encode_flac24, encode_steps
from engine.passes.config import PassConfig
from engine.passes.records import ShardRecord, find_record, write_record
from engine.passes.separate import Separate
from engine.passes.shards import write_shard
from engine.passes.transport import SeparatedShard, ShardReport, pack, unpack
from engine.schema import CLIPS, SCORES, STEMS, FailureRow, failure
from engine.scoring.stored import ScoredClip
from engine.separators import Separator
from engine.storage.in_hand import InHand
from engine.storage.paths import location
from engine.storage.retry import retried
from engine.taggers import Tagger


class Write:
    """Ray Data task: writes separated shards; the record comes last, so a shard counts as a whole or not at all."""

    def __init__(
        self, out: str, sample_rate_hz: int, hand: InHand | None = None, *, written_hz: int | None = None
    ) -> None:
        """Stems of ``sample_rate_hz`` are written at ``written_hz``; null: at the same rate."""
        self.out, self.sample_rate_hz, self.hand = location(out), sample_rate_hz, hand or InHand()
        self.written_hz = written_hz or sample_rate_hz

    def __call__(self, batch: pa.Table) -> pa.Table:
        torch.set_num_threads(1)
        shard = unpack(batch)
        clips = list(shard.clips)
        with self.hand.work(f"write-{shard.name}", len(clips)):
            return pack(self.write(replace(shard, clips=self._in_parts(clips, shard.failures))))

    def _in_parts(self, clips: list[ScoredClip], failures: list[FailureRow]) -> Iterator[ScoredClip]:
        """The clips; those that have ended too many workers are failures."""
        for part in self.hand.parts("write", [(clip.row["clip_id"], clip.row["path"]) for clip in clips]):
            for clip in (clips[position] for position in part.positions):
                if part.error is None:
                    yield clip
                else:
                    failures.append(_failure(clip, part.error))

    def write(self, shard: SeparatedShard) -> ShardReport:
        """Write a shard."""
        started, score_s = time.perf_counter(), 0.0
        stems, failures, clips = _Stems(self.written_hz), shard.failures, iter(shard.clips)
        while True:
            taken = time.perf_counter()
            clip = next(clips, None)  # on a CPU it is scored now
            score_s += time.perf_counter() - taken
            if clip is None:
                break
            try:
                stems.add(clip, *self._encode(clip))
            except Exception as error:  # noqa: BLE001 - whatever goes wrong with a clip costs this clip
                failures.append(_failure(clip, error))
        table = stems.table()
        stored, worked_s = time.perf_counter(), time.process_time()
        written = retried(functools.partial(write_shard, self.out, shard.name, stems=table, failures=failures))
        ended, worked_s = time.perf_counter(), time.process_time() - worked_s
        times = {"score_s": shard.counts["score_s"] + score_s, "write_s": ended - started - score_s}
        times["write_wait_s"] = max(0.0, ended - stored - worked_s)
        record = cast(ShardRecord, shard.counts | times | written)
        write_record(self.out, shard.name, record)
        failed: Counter[tuple[str, str]] = Counter()
        for row in failures:
            failed[row["step"], row["error_class"]] += row["num_queries"]
        return ShardReport(name=shard.name, record=record, failed=failed, use=shard.use)

    def _encode(self, clip: ScoredClip) -> tuple[int, list[tuple[bytes, int]]]:
        """The number of samples, and the FLAC and exponent of each signal."""
        rate_hz = self.written_hz
        if clip.exponents is not None:
            pairs = zip(clip.signals_ST, clip.exponents, strict=True)
            coded = [(encode_steps(one_T, exponent, sample_rate_hz=rate_hz), exponent) for one_T, exponent in pairs]
            return clip.signals_ST.shape[1], coded
        signals = [soxr.resample(one_T, self.sample_rate_hz, rate_hz, quality="HQ") for one_T in clip.signals_ST]
        return len(signals[0]), [encode_flac24(one_T, sample_rate_hz=rate_hz) for one_T in signals]


class _Stems:
    """The columns of a shard; the stems of a clip are consecutive, and its first has the mixture."""

    def __init__(self, sample_rate_hz: int) -> None:
        self._sample_rate_hz = sample_rate_hz
        self._columns: dict[str, list[object]] = {name: [] for name in STEMS.names}

    def add(self, clip: ScoredClip, num_samples: int, coded: list[tuple[bytes, int]]) -> None:
        """Add the stems of a clip."""
        num_stems, (mixture, *stems) = len(clip.labels), coded
        values: dict[str, list[object]] = {name: [clip.row[name]] * num_stems for name in CLIPS.names}  # type: ignore[literal-required]
        values |= {name: [row[name] for row in clip.scores] for name in SCORES.names}
        values |= {
            "label": [*clip.labels],
            "sample_rate_hz": [self._sample_rate_hz] * num_stems,
            "num_samples": [num_samples] * num_stems,
            "audio_flac": [data for data, _ in stems],
            "audio_exponent": [exponent for _, exponent in stems],
            "mixture_flac": [mixture[0], *[None] * (num_stems - 1)],
            "mixture_exponent": [mixture[1], *[None] * (num_stems - 1)],
        }
        for name, added in values.items():
            self._columns[name] += added

    def table(self) -> pa.Table:
        """All of them."""
        return pa.table([pa.array(self._columns[field.name], field.type) for field in STEMS], schema=STEMS)


def _failure(clip: ScoredClip, error: Exception) -> FailureRow:
    return failure(clip.row, step="score", error=error, num_queries=len(clip.labels))


class SeparateAndWrite(Separate):
    """Ray Data actor for CPUs: both steps in one process, so that no stems travel between processes."""

    def __init__(
        self,
        write: Write,
        open_separator: Callable[[str], Separator],
        open_tagger: Callable[[str], Tagger] | None,
        config: PassConfig,
    ) -> None:
        super().__init__(open_separator, open_tagger, config, hand=write.hand)
        self.write = write

    def __call__(self, batch: pa.Table) -> pa.Table:
        shard = unpack(batch)
        done = find_record(self.write.out, shard.name)
        if done is not None:  # by a worker that ended before it had done all shards of its task
            return pack(ShardReport(name=shard.name, record=done, failed={}, use=self._use(shard.clips)))
        with self.hand.work(f"separate-{shard.name}", len(shard.clips)):
            return pack(self.write.write(self.separate(shard)))
