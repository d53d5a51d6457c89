"""Step 2 of a pass: separate decoded clips into stems, where every label of every clip is one query."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import pyarrow as pa
import torch

from engine.passes.config import PassConfig
from engine.passes.transport import DecodedShard, SeparatedShard, WorkerUse, pack, unpack
from engine.schema import DecodedClip, FailureRow, SeparatedClip, failure, plain_label
from engine.scoring.model_scores import Scorer
from engine.separators import Separator
from engine.separators.batching import BatchedSeparator, Query
from engine.storage.retry import is_transient
from engine.taggers import Tagger


def separate_clips(clips: list[DecodedClip], batched: BatchedSeparator) -> tuple[list[SeparatedClip], list[FailureRow]]:
    """Separate every label of every clip; labels and clips that fail are failure rows.

    A batch holds queries of different clips. If a query fails for a reason that may pass by itself, such as memory, its
    clip fails as a whole, so that a retry can process it as a whole.
    """
    unknown = unknown_labels((label for clip in clips for label in clip.row["labels"]), batched.separator)
    queries = [(number, label) for number, clip in enumerate(clips) for label in clip.row["labels"]]
    known = [(number, label) for number, label in queries if label not in unknown]
    answers = batched.separate([Query(samples_T=clips[number].samples_T, label=label) for number, label in known])
    errors = {query: answer for query, answer in zip(known, answers, strict=True) if isinstance(answer, Exception)}
    failed_clips = {number: error for (number, _), error in errors.items() if is_transient(error)}
    failures = [_failure(clips[number], error) for number, error in failed_clips.items()]
    problems = {query: unknown[query[1]] for query in queries if query[1] in unknown} | errors
    failures = [
        _failure(clips[number], error, label)
        for (number, label), error in problems.items()
        if number not in failed_clips
    ] + failures
    stems: dict[int, dict[str, np.ndarray]] = {}
    for (number, label), answer in zip(known, answers, strict=True):
        if number not in failed_clips and not isinstance(answer, Exception):
            stems.setdefault(number, {})[label] = answer
    separated = [
        SeparatedClip(clip=clips[number], labels=list(by_label), stems_ST=np.stack(list(by_label.values())))
        for number, by_label in sorted(stems.items())
    ]
    return separated, failures


def _failure(clip: DecodedClip, error: Exception, label: str | None = None) -> FailureRow:
    return failure(clip.row, step="separate", error=error, label=label)


def unknown_labels(labels: Iterable[str], separator: Separator) -> dict[str, ValueError]:
    """Labels that the separator does not know, with its error. Those that it does not list are tried without audio."""
    known, silence = {plain_label(label) for label in separator.labels}, torch.zeros(1, 0)
    errors: dict[str, ValueError] = {}
    for label in dict.fromkeys(labels):
        if plain_label(label) not in known:
            try:
                separator.separate(silence, [label])
            except ValueError as error:
                errors[label] = error
    return errors


class Separate:
    """Ray Data actor: holds one separator, and a tagger if the pass has one, and separates decoded shards."""

    def __init__(
        self,
        open_separator: Callable[[str], Separator],
        open_tagger: Callable[[str], Tagger] | None,
        config: PassConfig,
        on_gpu: bool = False,
    ) -> None:
        torch.set_num_threads(max(1, int(config.num_cpus_per_actor)))
        self.device = "cuda" if on_gpu else "cpu"
        batched = BatchedSeparator(
            separator=open_separator(self.device),
            batch_s=config.batch_s,
            device=self.device,
            autocast=config.autocast and on_gpu,
        )
        tagger = open_tagger(self.device) if open_tagger is not None else None
        self.scorer = Scorer(batched=batched, tagger=tagger, reseparate=config.reseparate)

    def __call__(self, batch: pa.Table) -> pa.Table:
        return pack(self.separate(unpack(batch)))

    def separate(self, shard: DecodedShard) -> SeparatedShard:
        """The stems of a shard, and the scores that need a separator or a tagger."""
        started = time.perf_counter()
        separated, failures = separate_clips(shard.clips, self.scorer.batched)
        separate_s = time.perf_counter() - started
        started = time.perf_counter()
        extra = self.scorer.model_scores(separated)
        assess_s = time.perf_counter() - started
        return SeparatedShard(
            name=shard.name,
            clips=[replace(item, extra=rows) for item, rows in zip(separated, extra, strict=True)],
            failures=shard.failures + failures,
            counts=shard.counts | {"separate_s": separate_s, "assess_s": assess_s},
            use=self._use(shard.clips),
        )

    def _use(self, clips: list[DecodedClip]) -> WorkerUse:
        device, vram_bytes = "cpu", 0
        if self.device == "cuda" and torch.cuda.is_available():  # a test may give Ray a GPU that does not exist
            device, vram_bytes = f"gpu{os.environ.get('CUDA_VISIBLE_DEVICES', '')}", torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        fill_fraction = self.scorer.batched.fill_fraction([len(c.samples_T) for c in clips for _ in c.row["labels"]])
        return WorkerUse(f"{socket.gethostname()}/{device}", fill_fraction, vram_bytes)
