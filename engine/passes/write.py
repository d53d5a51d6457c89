"""Step 3 of a pass: encode the stems of a shard, score the audio as it is stored, write the shard and its record."""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable
from typing import cast

import numpy as np
import pyarrow as pa
import soxr
import torch

from engine.audio.flac import encode_flac24, round_flac24
from engine.passes.config import PassConfig
from engine.passes.records import ShardRecord, write_record
from engine.passes.separate import Separate
from engine.passes.shards import write_shard
from engine.passes.transport import SeparatedShard, ShardReport, pack, unpack
from engine.schema import SeparatedClip, failure
from engine.scoring.scores import score_clip
from engine.separators import Separator
from engine.storage.in_hand import InHand
from engine.storage.paths import location
from engine.storage.retry import retried
from engine.taggers import Tagger


class ScoreAndWrite:
    """Ray Data task: writes separated shards; the record comes last, so a shard counts as a whole or not at all."""

    def __init__(
        self, out: str, sample_rate_hz: int, hand: InHand | None = None, *, written_hz: int | None = None
    ) -> None:
        """Stems of ``sample_rate_hz`` are scored, and written at ``written_hz``; null: at the same rate."""
        self.out, self.sample_rate_hz, self.hand = location(out), sample_rate_hz, hand or InHand()
        self.written_hz = written_hz or sample_rate_hz

    def __call__(self, batch: pa.Table) -> pa.Table:
        torch.set_num_threads(1)
        shard = unpack(batch)
        self.hand.begin(f"write-{shard.name}", len(shard.clips))
        return pack(self.write(shard))

    def write(self, shard: SeparatedShard) -> ShardReport:
        """Score and write a shard."""
        started, score_s = time.perf_counter(), 0.0
        stems: list[dict[str, object]] = []  # the stems of a clip are consecutive
        failures = list(shard.failures)
        pieces = [(item.clip.row["clip_id"], item.clip.row["path"]) for item in shard.clips]
        for part in self.hand.parts("score", pieces):
            for item in (shard.clips[position] for position in part.positions):
                try:
                    if part.error is not None:
                        raise part.error
                    audio = self._encode(item)
                    encoded = time.perf_counter()
                    stems.extend(self._score(item, audio))
                    score_s += time.perf_counter() - encoded
                except Exception as error:  # noqa: BLE001 - whatever goes wrong with a clip costs this clip
                    num_queries = len(item.labels)
                    failures.append(failure(item.clip.row, step="score", error=error, num_queries=num_queries))
        written = retried(functools.partial(write_shard, self.out, shard.name, stems=stems, failures=failures))
        times = {"score_s": score_s, "write_s": time.perf_counter() - started - score_s}
        record = cast(ShardRecord, shard.counts | times | written)
        write_record(self.out, shard.name, record)
        failed: Counter[tuple[str, str]] = Counter()
        for row in failures:
            failed[row["step"], row["error_class"]] += row["num_queries"]
        return ShardReport(name=shard.name, record=record, failed=failed, use=shard.use)

    def _encode(self, item: SeparatedClip) -> list[dict[str, object]]:
        signals = [item.clip.samples_T, *item.stems_ST.numpy()]
        if self.written_hz != self.sample_rate_hz:
            signals = [soxr.resample(one, self.sample_rate_hz, self.written_hz, quality="HQ") for one in signals]
        common = {"sample_rate_hz": self.written_hz, "num_samples": len(signals[0])}
        mixture, *coded = (encode_flac24(signal_T, sample_rate_hz=self.written_hz) for signal_T in signals)
        audio: list[dict[str, object]] = [
            {**common, "audio_flac": data, "audio_exponent": exponent} for data, exponent in coded
        ]
        audio[0] |= {"mixture_flac": mixture[0], "mixture_exponent": mixture[1]}
        return audio

    def _score(self, item: SeparatedClip, audio: list[dict[str, object]]) -> list[dict[str, object]]:
        stored_ST = np.stack([round_flac24(stem_T) for stem_T in item.stems_ST.numpy()])
        scores = score_clip(
            mixture_T=item.mixture_T,
            stems_ST=torch.from_numpy(stored_ST),
            sample_rate_hz=self.sample_rate_hz,
        )
        extra = item.extra or [{}] * len(item.labels)
        return [
            {**item.clip.row, "label": label, **coded, **score, **more}
            for label, coded, score, more in zip(item.labels, audio, scores, extra, strict=True)
        ]


class SeparateScoreAndWrite(Separate):
    """Ray Data actor for CPUs: both steps in one process, so that no stems travel between processes."""

    def __init__(
        self,
        write: ScoreAndWrite,
        open_separator: Callable[[str], Separator],
        open_tagger: Callable[[str], Tagger] | None,
        config: PassConfig,
    ) -> None:
        super().__init__(open_separator, open_tagger, config, hand=write.hand)
        self.write = write

    def __call__(self, batch: pa.Table) -> pa.Table:
        shard = unpack(batch)
        self.hand.begin(f"separate-{shard.name}", len(shard.clips))
        return pack(self.write.write(self.separate(shard)))
