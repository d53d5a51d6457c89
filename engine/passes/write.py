"""The three stages of a pass, as callables over Arrow batches that know no Ray: decode, separate, score and write.

A batch has one row, a *part*: some minutes of clips that travel together and end as one stem shard. A part is written
whole or not at all and then recorded as done, so a pass that is started again does only the parts that are missing.
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from engine.audio.flac import encode_flac24, round_flac24
from engine.passes.config import PassConfig
from engine.passes.parts import _REPORT, _separated
from engine.passes.records import write_done
from engine.passes.separate import Separate
from engine.passes.shards import write_part
from engine.schema import SeparatedClip, failure
from engine.scoring.scores import score_clip
from engine.separators import Separator
from engine.storage.paths import location
from engine.storage.retry import retried
from engine.taggers import Tagger


def _unscored(item: SeparatedClip, error: Exception) -> dict[str, Any]:
    row, num_queries = item.clip.row, len(item.labels)
    return failure(clip_id=row["clip_id"], path=row["path"], num_queries=num_queries, step="score", error=error)


def _by_reason(failures: list[dict[str, Any]]) -> list[dict[str, Any]]:
    numbers: Counter[tuple[str, str]] = Counter()
    for row in failures:
        numbers[row["step"], row["error_class"]] += row["num_queries"]
    return [
        {"step": step, "error_class": error_class, "num_queries": number}
        for (step, error_class), number in sorted(numbers.items())
    ]


class ScoreAndWrite:
    """Task: stores the stems of a part, scores what is stored, writes the shard and then the record that it is done."""

    def __init__(self, out: str, sample_rate_hz: int) -> None:
        self.out, self.sample_rate_hz = location(out), sample_rate_hz

    def __call__(self, batch: pa.Table) -> pa.Table:
        torch.set_num_threads(1)
        part = batch.to_pylist()[0]
        part["clips"] = [_separated(entry) for entry in part["clips"]]
        return self.write(part)

    def write(self, part: dict[str, Any]) -> pa.Table:
        """What became of a part, once it is on disk."""
        name, clips, failures = part.pop("part"), part.pop("clips"), part.pop("failures")
        about = {key: part.pop(key) for key in ("worker", "batch_fill_fraction", "vram_bytes")}
        started = time.perf_counter()
        stems: list[dict[str, Any]] = []  # those of a clip one after another
        part["score_s"] = 0.0
        for item in clips:
            try:
                audio = self._encode(item)
                encoded = time.perf_counter()
                stems.extend(self._score(item, audio))
                part["score_s"] += time.perf_counter() - encoded
            except (ValueError, RuntimeError) as error:
                failures.append(_unscored(item, error))
        written = retried(functools.partial(write_part, self.out, name, stems=stems, failures=failures))
        before = {"num_failed_before": part.pop("num_failed_before")}
        written["num_failed"] -= before["num_failed_before"]
        part["write_s"] = time.perf_counter() - started - part["score_s"]
        write_done(self.out, name, part | written)
        told = part | written | before | about | {"failed": _by_reason(failures)}
        return pa.table({field.name: pa.array([told[field.name]], field.type) for field in _REPORT})

    def _encode(self, item: SeparatedClip) -> list[dict[str, Any]]:
        signals = (item.clip.samples_T, *item.stems_ST)
        mixture, *coded = (encode_flac24(signal_T, sample_rate_hz=self.sample_rate_hz) for signal_T in signals)
        audio: list[dict[str, Any]] = [{"audio_flac": data, "audio_exponent": exponent} for data, exponent in coded]
        audio[0] |= {"mixture_flac": mixture[0], "mixture_exponent": mixture[1]}
        return audio

    def _score(self, item: SeparatedClip, audio: list[dict[str, Any]]) -> list[dict[str, Any]]:
        stored_ST = np.stack([round_flac24(stem_T) for stem_T in item.stems_ST])
        scores = score_clip(
            mixture_T=torch.from_numpy(item.clip.samples_T.copy()),
            stems_ST=torch.from_numpy(stored_ST),
            sample_rate_hz=self.sample_rate_hz,
        )
        common = {
            **item.clip.row,
            "sample_rate_hz": self.sample_rate_hz,
            "num_samples": len(item.clip.samples_T),
        }
        extra = item.extra or [{}] * len(item.labels)
        return [
            {**common, "label": label, **entry, **score, **more}
            for label, entry, score, more in zip(item.labels, audio, scores, extra, strict=True)
        ]


class SeparateScoreAndWrite:
    """Actor: both of these in one process, where separating is CPU work too, so that no stem travels."""

    def __init__(
        self,
        open_separator: Callable[[str], Separator],
        config: PassConfig,
        out: str,
        sample_rate_hz: int,
        open_tagger: Callable[[str], Tagger] | None = None,
    ) -> None:
        self.first = Separate(open_separator, config, False, open_tagger)
        self.then = ScoreAndWrite(out, sample_rate_hz)

    def __call__(self, batch: pa.Table) -> pa.Table:
        return self.then.write(self.first.separate(batch.to_pylist()[0]))
