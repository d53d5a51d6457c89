"""Decoded clips to stems: every label of every clip is one query."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from engine.passes.config import PassConfig
from engine.passes.parts import _SEPARATED, _clip, _row
from engine.schema import DecodedClip, SeparatedClip, failure
from engine.scoring.model_scores import Scorer
from engine.separators import Separator
from engine.separators.batching import BatchedSeparator, Query
from engine.storage.retry import is_transient
from engine.taggers import Tagger


def _fail(clip: DecodedClip, error: Exception, *, label: str | None = None) -> dict[str, Any]:
    """The failure of one query, or without a label of all of them."""
    row, number = clip.row, len(clip.row["labels"]) if label is None else 1
    return failure(
        clip_id=row["clip_id"], path=row["path"], label=label, num_queries=number, step="separate", error=error
    )


def _unknown(clips: list[DecodedClip], separator: Separator) -> dict[str, ValueError]:
    """What the separator says of each label that it does not know."""
    silence = torch.zeros(1, 0)
    problems: dict[str, ValueError] = {}
    for label in {label: None for clip in clips for label in clip.row["labels"]}:
        try:
            separator.separate(silence, [label])
        except ValueError as error:
            problems[label] = error
    return problems


def separate_clips(
    clips: list[DecodedClip], batched: BatchedSeparator
) -> tuple[list[SeparatedClip], list[dict[str, Any]]]:
    """Every label of every clip is one query; what cannot be separated is a row of ``schema.FAILURES``.

    A batch holds queries of different clips. A clip of which a query fails for a reason that may pass, such as memory,
    fails as a whole, so that it can be tried again as a whole.
    """
    problems = _unknown(clips, batched.separator)
    asked = [(number, label) for number, clip in enumerate(clips) for label in clip.row["labels"]]
    failures = [_fail(clips[number], problems[label], label=label) for number, label in asked if label in problems]
    places = [(number, label) for number, label in asked if label not in problems]
    answers = batched.ask([Query(samples_T=clips[number].samples_T, label=label) for number, label in places])
    stems: dict[int, dict[str, np.ndarray]] = {}
    passing = {
        number: answer
        for (number, _), answer in zip(places, answers, strict=True)
        if isinstance(answer, Exception) and is_transient(answer)
    }
    failures = [row for row in failures if row["clip_id"] not in {clips[number].row["clip_id"] for number in passing}]
    failures += [_fail(clips[number], error) for number, error in passing.items()]
    for (number, label), answer in zip(places, answers, strict=True):
        if number in passing:
            continue
        if isinstance(answer, Exception):
            failures.append(_fail(clips[number], answer, label=label))
        else:
            stems.setdefault(number, {})[label] = answer
    separated = [
        SeparatedClip(clip=clips[number], labels=list(found), stems_ST=np.stack(list(found.values())))
        for number, found in sorted(stems.items())
    ]
    return separated, failures


class Separate:
    """Actor: holds one separator, and a tagger where there is one, and turns parts of decoded clips into stems."""

    def __init__(
        self,
        open_separator: Callable[[str], Separator],
        config: PassConfig,
        on_gpu: bool,
        open_tagger: Callable[[str], Tagger] | None = None,
    ) -> None:
        torch.set_num_threads(max(1, int(config.num_cpus_per_actor)))
        self.device = "cuda" if on_gpu else "cpu"
        self.separator = open_separator(self.device)
        autocast = config.autocast and on_gpu
        batched = BatchedSeparator(
            separator=self.separator, batch_s=config.batch_s, device=self.device, autocast=autocast
        )
        tagger = open_tagger(self.device) if open_tagger is not None else None
        self.scorer = Scorer(batched=batched, tagger=tagger, reseparate=config.reseparate)

    def __call__(self, batch: pa.Table) -> pa.Table:
        part = self.separate(batch.to_pylist()[0])
        part["clips"] = [
            {
                **item.clip.row,
                "samples": item.clip.samples_T.tobytes(),
                "stem_labels": item.labels,
                "stems": np.ascontiguousarray(item.stems_ST, dtype=np.float32).tobytes(),
                "extra": [dict(row) for row in item.extra],
            }
            for item in part["clips"]
        ]
        return _row(part, _SEPARATED)

    def separate(self, part: dict[str, Any]) -> dict[str, Any]:
        """The part with its clips as :class:`SeparatedClip`."""
        started = time.perf_counter()
        clips = [_clip(entry) for entry in part["clips"]]
        separated, failures = separate_clips(clips, self.scorer.batched)
        part["failures"] += failures
        part["separate_s"] = time.perf_counter() - started
        started = time.perf_counter()
        extra = self.scorer.extra(separated)
        part["clips"] = [replace(item, extra=rows) for item, rows in zip(separated, extra, strict=True)]
        part["assess_s"] = time.perf_counter() - started
        part |= self._about(clips)
        return part

    def _about(self, clips: list[DecodedClip]) -> dict[str, Any]:
        """Which worker this is, and how well its batches and its memory are used."""
        place, vram_bytes = "cpu", 0
        if self.device == "cuda" and torch.cuda.is_available():  # tests have GPUs that only Ray believes in
            place, vram_bytes = f"gpu{os.environ.get('CUDA_VISIBLE_DEVICES', '')}", torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        sizes = [len(clip.samples_T) for clip in clips for _ in clip.row["labels"]]
        return {
            "worker": f"{socket.gethostname()}/{place}",
            "batch_fill_fraction": self.scorer.batched.fill_fraction(sizes),
            "vram_bytes": vram_bytes,
        }
