"""The work of a pass that tags: every clip, with or without labels, gets the tags of its windows.

A clip is one query of such a pass: it has a row in a shard (``TAGS``) or is a failure.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa
from torch import Tensor

from engine.corpus.table import Corpus
from engine.errors import as_exception
from engine.passes.config import PassConfig
from engine.passes.records import Totals
from engine.passes.separate import ShardWorker, uploaded
from engine.passes.shards import PassManifest, PassStart, pass_manifest
from engine.passes.tasks import TaskCounts
from engine.passes.transport import DecodedShard, SeparatedShard
from engine.passes.write import AndWrite, ShardRows, Write
from engine.schema import CLIPS, ClipRow, DecodedClip, FailureRow, failure
from engine.separators.batching import FIRST_S
from engine.settings import CountOrZero, config, deciding
from engine.storage.factories import ModelSource
from engine.storage.in_hand import InHand
from engine.storage.paths import Location
from engine.taggers import Tagger, TaggerSource
from engine.taggers.windows import HOP_S, WINDOW_S, WindowTags, tag_windows

TAGS = pa.schema(
    [
        *CLIPS,
        pa.field("window_start_s", pa.list_(pa.float64()), nullable=False),  # from the start of the clip
        pa.field("window_end_s", pa.list_(pa.float64()), nullable=False),
        pa.field("is_active", pa.list_(pa.bool_()), nullable=False),
        pa.field("tags_db", pa.list_(pa.float32()), nullable=False),  # of all labels in each window after the other
    ]
)
"""Columns of a shard of tags; the labels are those of ``tagger_labels`` in the manifest of the pass."""


@config
class TaggingConfig(PassConfig):
    """Settings of a pass that tags."""

    min_labels: CountOrZero = 0
    """All clips are tagged."""


@dataclass(frozen=True, kw_only=True)
class TaggedClip:
    """A clip with the tags of its windows."""

    row: ClipRow
    tags: WindowTags


class Tag(ShardWorker):
    """Holds a tagger; tags decoded shards."""

    def __init__(
        self,
        open_tagger: Callable[[str], Tagger],
        config: PassConfig,
        on_gpu: bool = False,
        hand: InHand | None = None,
    ) -> None:
        super().__init__(config, on_gpu, hand)
        self.tagger = self._guarded_model(open_tagger)

    def separate(self, shard: DecodedShard) -> SeparatedShard:
        """The tags of a shard."""
        failures: list[FailureRow] = [{**row, "num_queries": 1} for row in shard.failures]
        with self._guarded("uploading"):
            signals = uploaded(shard.clips, self.device)
        with self._turns:
            begun = time.perf_counter()
            tagged = self._tagged(shard.clips, signals, failures)
            tag_s = time.perf_counter() - begun
            use = self.use(shard.clips)
        counts = shard.counts | {"num_queries": shard.counts["num_clips"], "separate_s": tag_s}
        counts |= {"assess_s": 0.0, "score_s": 0.0} | ({"gpu_s": tag_s} if self.device != "cpu" else {})
        return SeparatedShard(name=shard.name, clips=tagged, failures=failures, counts=counts, use=use)

    def fill_fraction(self, clips: Sequence[DecodedClip]) -> float:
        """See :class:`ShardWorker`; windows are of one length."""
        return 1.0 if clips else 0.0

    def _tagged(
        self, clips: Sequence[DecodedClip], signals: Sequence[Tensor], failures: list[FailureRow]
    ) -> list[TaggedClip]:
        """The clips with their tags; those that cannot be tagged are added to the failures."""
        tagged: list[TaggedClip] = []
        for part in self.hand.parts("tag", [(clip.row["clip_id"], clip.row["path"]) for clip in clips]):
            results = self._tags(signals, part.positions) if part.error is None else [part.error]
            for position, result in zip(part.positions, results, strict=True):
                row = clips[position].row
                if isinstance(result, Exception):
                    failures.append(failure(row, step="tag", error=result, num_queries=1))
                else:
                    tagged.append(TaggedClip(row=row, tags=result))
        return tagged

    def _tags(self, signals: Sequence[Tensor], positions: Sequence[int]) -> list[WindowTags | Exception]:
        """The tags of the signals at some positions; if that fails, of each alone, or the exception."""
        some, rate_hz = [signals[position] for position in positions], self.tagger.sample_rate_hz
        try:
            with self._guarded("tagging"):
                return [*tag_windows(self.tagger, some, sample_rate_hz=rate_hz, batch_s=self.config.batch_s or FIRST_S)]
        except BaseException as error:  # noqa: BLE001 - whatever a tagger raises costs this clip
            if len(positions) == 1:
                return [as_exception(error)]
            as_exception(error)
        return [self._tags(signals, [position])[0] for position in positions]


class TagAndWrite(AndWrite, Tag):
    """Tags a shard and writes it."""


class WriteTags(Write):
    """Writes shards of tags."""

    def _new_rows(self) -> ShardRows:
        return _TagRows()

    def _failure(self, clip: TaggedClip, error: Exception) -> FailureRow:
        return failure(clip.row, step="tag", error=error, num_queries=1)


class _TagRows:
    def __init__(self) -> None:
        self._rows: list[dict[str, object]] = []

    def add(self, clip: TaggedClip) -> None:
        """Add a clip."""
        tags = clip.tags
        self._rows.append(
            {
                **clip.row,
                "window_start_s": tags.start_s_W,
                "window_end_s": tags.end_s_W,
                "is_active": tags.is_active_W,
                "tags_db": tags.tags_WL.ravel(),
            }
        )

    def table(self) -> pa.Table:
        """All of them."""
        return pa.Table.from_pylist(self._rows, schema=TAGS)


@dataclass(frozen=True, kw_only=True)
class Tagging:
    """Tags clips."""

    tagger: TaggerSource
    labels: tuple[str, ...]
    """Labels that are looked for; a tagger of fixed labels gives the tags of all its own."""
    what = "a pass that tags"
    doing = "tagging clips"
    terms = ()

    @property
    def fingerprint(self) -> str:
        """That of the tagger."""
        return self.tagger.fingerprint

    @property
    def sample_rate_hz(self) -> int:
        """Rate of the tagger."""
        return self.tagger.sample_rate_hz

    @property
    def models(self) -> Sequence[ModelSource[Any]]:
        """See :class:`~engine.passes.write.PassWork`."""
        return (self.tagger,)

    def actor(self, *, writes: bool) -> Callable[..., ShardWorker]:
        """See :class:`~engine.passes.write.PassWork`."""
        return TagAndWrite if writes else Tag

    def identity(self, corpus: Corpus, config: PassConfig) -> dict[str, object]:
        """See :class:`~engine.passes.write.PassWork`."""
        return {
            "windows": [WINDOW_S, HOP_S],
            "settings": deciding(config),
            "tagger": self.fingerprint,
            "labels": None if type(self.tagger) is TaggerSource else sorted(self.labels),
            "corpus": corpus.fingerprint,
        }

    def ready(self, labels: Sequence[str], out: Location) -> Tagging:
        """See :class:`~engine.passes.write.PassWork`; the labels of the corpus say nothing here."""
        return replace(self, tagger=self.tagger.with_labels(self.labels, out / "tagger"))

    def writer(self, out: Location, config: PassConfig, hand: InHand) -> Write:
        """See :class:`~engine.passes.write.PassWork`."""
        return WriteTags(str(out), self.sample_rate_hz, hand)

    def manifest(
        self, totals: Totals, *, corpus: Corpus, config: PassConfig, counts: TaskCounts, start: PassStart
    ) -> PassManifest:
        """See :class:`~engine.passes.write.PassWork`; a row of the list that is no clip counts as one that failed."""
        made = pass_manifest(totals, corpus, config, separator=self, counts=counts, start=start)
        return {
            **made,
            "num_queries": totals.num_queries + corpus.num_failures,
            "num_failed": totals.num_failed + corpus.num_failures,
            "num_tagged": totals.num_stems,
            "tagger_labels": list(self.tagger.labels),
        }


def tagging_config(settings: PassConfig) -> TaggingConfig:
    """The settings of a pass for one that tags."""
    return TaggingConfig(**{**asdict(settings), "min_labels": 0})
