"""Step 3 of a pass: encode the stems of a shard, write the shard and its record."""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import pyarrow as pa
import soxr
import torch

from engine.audio.flac import encode_flac24, encode_steps
from engine.corpus.table import Corpus
from engine.passes.config import PassConfig, pass_identity
from engine.passes.records import ShardRecord, Totals, find_record, write_record
from engine.passes.separate import Separate, ShardWorker
from engine.passes.shards import PassManifest, PassStart, pass_manifest, write_shard
from engine.passes.tasks import TaskCounts
from engine.passes.transport import SeparatedShard, ShardReport, pack, unpack
from engine.schema import SCORES, STEMS, FailureRow, clip_columns, failure
from engine.scoring.stored import ScoredClip
from engine.separators import SeparatorSource
from engine.storage.factories import ModelSource
from engine.storage.in_hand import InHand
from engine.storage.paths import Location, location
from engine.storage.retry import retried
from engine.taggers import TaggerSource


class PassWork(Protocol):
    """The work of a pass on the clips of its corpus: it makes stems with their scores, or tags."""

    what: str
    """The pass with its article, such as "a pass"."""
    doing: str
    """What is done to the clips, for the progress."""

    def actor(self, *, writes: bool) -> Callable[..., ShardWorker]:
        """The class that holds the models; made of what opens them, the settings, true for a GPU and the work in hand.

        On a CPU it also ``writes``, and is made of :meth:`writer`, what opens the models and the settings.
        """

    @property
    def sample_rate_hz(self) -> int:
        """Rate of the decoded clips."""

    @property
    def models(self) -> Sequence[ModelSource[Any] | None]:
        """The models of an actor, in its order; None for one that is left out."""

    def identity(self, corpus: Corpus, config: PassConfig) -> dict[str, object]:
        """Everything that decides what the pass writes, models and corpus by their fingerprints."""

    def ready(self, labels: Sequence[str], out: Location) -> PassWork:
        """The same work with models that are ready for labels; what they need for that is kept in ``out``."""

    def writer(self, out: Location, config: PassConfig, hand: InHand) -> Write:
        """The step that writes the shards."""

    def manifest(
        self, totals: Totals, *, corpus: Corpus, config: PassConfig, counts: TaskCounts, start: PassStart
    ) -> PassManifest:
        """The manifest of the pass when all its tasks are done."""


@dataclass(frozen=True, kw_only=True)
class Separation:
    """Separates clips into stems and scores them."""

    separator: SeparatorSource
    tagger: TaggerSource | None

    what = "a pass"
    doing = "separating clips"

    def actor(self, *, writes: bool) -> Callable[..., ShardWorker]:
        """See :class:`PassWork`."""
        return SeparateAndWrite if writes else Separate

    @property
    def sample_rate_hz(self) -> int:
        """See :class:`PassWork`."""
        return self.separator.sample_rate_hz

    @property
    def models(self) -> Sequence[ModelSource[Any] | None]:
        """See :class:`PassWork`."""
        return (self.separator, self.tagger)

    def identity(self, corpus: Corpus, config: PassConfig) -> dict[str, object]:
        """See :class:`PassWork`."""
        return pass_identity(corpus, separator=self.separator, tagger=self.tagger, config=config)

    def ready(self, labels: Sequence[str], out: Location) -> Separation:
        """See :class:`PassWork`."""
        tagger = self.tagger.with_labels(labels, out / "tagger") if self.tagger is not None else None
        return Separation(separator=self.separator.with_labels(labels, out / "queries"), tagger=tagger)

    def writer(self, out: Location, config: PassConfig, hand: InHand) -> Write:
        """See :class:`PassWork`."""
        return Write(str(out), self.sample_rate_hz, hand, written_hz=config.stem_rate_hz)

    def manifest(
        self, totals: Totals, *, corpus: Corpus, config: PassConfig, counts: TaskCounts, start: PassStart
    ) -> PassManifest:
        """See :class:`PassWork`."""
        made = pass_manifest(totals, corpus, config, separator=self.separator, counts=counts, start=start)
        if self.tagger is not None and corpus.labels_move:
            made["tagger_labels"] = list(self.tagger.labels)
        return made


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

    def _in_parts(self, clips: list[Any], failures: list[FailureRow]) -> Iterator[Any]:
        """The clips; those that have ended too many workers are failures."""
        for part in self.hand.parts("write", [(clip.row["clip_id"], clip.row["path"]) for clip in clips]):
            for clip in (clips[position] for position in part.positions):
                if part.error is None:
                    yield clip
                else:
                    failures.append(self._failure(clip, part.error))

    def write(self, shard: SeparatedShard) -> ShardReport:
        """Write a shard."""
        started, score_s = time.perf_counter(), 0.0
        rows, failures, clips = self._new_rows(), shard.failures, iter(shard.clips)
        while True:
            taken = time.perf_counter()
            clip = next(clips, None)  # on a CPU it is scored now
            score_s += time.perf_counter() - taken
            if clip is None:
                break
            try:
                rows.add(clip)
            except Exception as error:  # noqa: BLE001 - whatever goes wrong with a clip costs this clip
                failures.append(self._failure(clip, error))
        table = rows.table()
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

    def _new_rows(self) -> ShardRows:
        return _Stems(self.written_hz, self._encode)

    def _failure(self, clip: Any, error: Exception) -> FailureRow:  # noqa: ANN401 - what the actor made of it
        return failure(clip.row, step="score", error=error, num_queries=len(clip.labels))

    def _encode(self, clip: ScoredClip) -> tuple[int, list[tuple[bytes, int]]]:
        """The number of samples, and the FLAC and exponent of each signal."""
        rate_hz = self.written_hz
        if clip.exponents is not None:
            pairs = zip(clip.signals_ST, clip.exponents, strict=True)
            coded = [(encode_steps(one_T, exponent, sample_rate_hz=rate_hz), exponent) for one_T, exponent in pairs]
            return clip.signals_ST.shape[1], coded
        signals = [soxr.resample(one_T, self.sample_rate_hz, rate_hz, quality="HQ") for one_T in clip.signals_ST]
        return len(signals[0]), [encode_flac24(one_T, sample_rate_hz=rate_hz) for one_T in signals]


class ShardRows(Protocol):
    """The rows of a shard that is about to be written."""

    def add(self, clip: Any) -> None:  # noqa: ANN401 - what the actor made of it
        """Add the rows of a clip."""

    def table(self) -> pa.Table:
        """All of them."""


class _Stems:
    """The columns of a shard; the stems of a clip are consecutive, and its first has the mixture."""

    def __init__(
        self, sample_rate_hz: int, encode: Callable[[ScoredClip], tuple[int, list[tuple[bytes, int]]]]
    ) -> None:
        self._sample_rate_hz, self._encode = sample_rate_hz, encode
        self._columns: dict[str, list[object]] = {name: [] for name in STEMS.names}

    def add(self, clip: ScoredClip) -> None:
        """Add the stems of a clip."""
        num_samples, coded = self._encode(clip)
        num_stems, (mixture, *stems) = len(clip.labels), coded
        values: dict[str, list[object]] = {name: [value] * num_stems for name, value in clip_columns(clip.row).items()}
        values |= {name: [row[name] for row in clip.scores] for name in SCORES.names}
        values |= {
            "label": [*clip.labels],
            "sample_rate_hz": [self._sample_rate_hz] * num_stems,
            "num_samples": [num_samples] * num_stems,
            "audio_flac": [data for data, _ in stems],
            "audio_exponent": [exponent for _, exponent in stems],
            "tags_db": [None] * num_stems if clip.tags is None else [*clip.tags.stems_SL],
        }
        once: dict[str, object] = {
            "mixture_flac": mixture[0],
            "mixture_exponent": mixture[1],
            "residual_level_db": clip.residual_level_db,
            "clip_tags_db": clip.tags and clip.tags.clip_L,
            "residual_tags_db": clip.tags and clip.tags.residual_L,
        }
        values |= {name: [value, *[None] * (num_stems - 1)] for name, value in once.items()}
        for name, added in values.items():
            self._columns[name] += added

    def table(self) -> pa.Table:
        """All of them."""
        return pa.table([pa.array(self._columns[field.name], field.type) for field in STEMS], schema=STEMS)


class AndWrite(ShardWorker):
    """Ray Data actor for CPUs: both steps in one process, so that no stems travel between processes."""

    def __init__(self, write: Write, *arguments: Any) -> None:  # noqa: ANN401 - those of the class that makes them
        super().__init__(*arguments, hand=write.hand)  # type: ignore[misc]  # that of the other base class
        self.write = write

    def __call__(self, batch: pa.Table) -> pa.Table:
        shard = unpack(batch)
        done = find_record(self.write.out, shard.name)
        if done is not None:  # by a worker that ended before it had done all shards of its task
            return pack(ShardReport(name=shard.name, record=done, failed={}, use=self.use(shard.clips)))
        with self.hand.work(f"separate-{shard.name}", len(shard.clips)):
            return pack(self.write.write(self.separate(shard)))


class SeparateAndWrite(AndWrite, Separate):
    """Separates a shard and writes it."""
