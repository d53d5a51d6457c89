"""Cost of a pass, measured on a random sample of the corpus that goes through the same steps on this machine."""

from __future__ import annotations

import heapq
import itertools
import math
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypedDict

import torch

from engine.corpus.table import Corpus
from engine.passes.config import PassConfig
from engine.passes.decode import Decode
from engine.passes.labels.tag import Tagging, tagging_config
from engine.passes.records import STEPS, ShardRecord, shard_records
from engine.passes.speed.limits import PassLimit, PassTimes, limit_of
from engine.passes.tasks import Tasks, require_clips
from engine.passes.write import PassWork, Separation
from engine.schema import ClipRow
from engine.separators import SeparatorSource
from engine.separators.batching import FIRST_S
from engine.storage.files import folder_for_block
from engine.storage.in_hand import InHand
from engine.taggers import TaggerSource

_ANY_LABELS = ("speech", "music")  # for a tagger that reads text: the time does not depend on them


class ExpectedFailures(TypedDict):
    """Queries of a pass, and how many of them will fail; ``low`` to ``high`` is the 95 % confidence interval."""

    num_queries: int
    num_failed: int
    failed_fraction: float
    failed_fraction_low: float
    failed_fraction_high: float


class PassPlan(ExpectedFailures):
    """Expected cost and outcome of a pass."""

    num_rows: int
    """Rows of the manifest."""
    num_set_aside: int
    """Rows with too few labels."""
    num_clips: int
    audio_h: float
    core_h: float
    """CPU time on one core, in hours."""
    gpu_h: float
    read_wait_h: float
    """Time in which decoding waits for audio; it is part of the step's time, but not of ``core_h``."""
    write_wait_h: float
    """The same of writing."""
    step_h: dict[str, float]
    wall_h: float
    limit: PassLimit
    """What will limit it."""
    num_cpus: float
    num_gpus: float
    stem_gib: float
    num_shards: int
    measured_on: str
    sample_rows: int
    sample_audio_s: float


@dataclass(frozen=True, kw_only=True)
class _Sample:
    """Rows that were measured."""

    num_rows: int
    scale: float
    """Rows of the pass for one row of the sample."""
    records: list[ShardRecord]
    num_bytes: int

    def total(self, name: str, *, skip: int = 0) -> float:
        """Sum of a count over the records, without the first ``skip``."""
        return float(sum(record.get(name, 0.0) for record in self.records[skip:]))  # type: ignore[misc]

    def step_h(self, step: str) -> float:
        """Hours of a step in the pass; the first shard, which includes start-up, is left out if there are others."""
        skip = 1 if self.total("audio_s", skip=1) else 0
        speed = self.total(f"{step}_s", skip=skip) / self.total("audio_s", skip=skip)
        return speed * self.total("audio_s") * self.scale / 3600.0


def plan_pass(
    corpus: Corpus,
    *,
    separator: SeparatorSource | None,
    tagger: TaggerSource | None = None,
    config: PassConfig | None = None,
    num_rows: int = 40,
    num_cpus: float | None = None,
    num_gpus: float | None = None,
    seed: int = 0,
) -> PassPlan:
    """Measure ``num_rows`` random rows of a corpus and estimate the time, bytes and failures of a pass over all.

    Without a separator it is a pass that tags, of which a clip is a query.
    ``num_cpus`` and ``num_gpus`` are those of the cluster to be used; null: this machine's. Raises ``ValueError`` if no
    row of the sample could be separated.
    """
    config, on_gpu = config or PassConfig(), torch.cuda.is_available()
    work, config = _work(separator, tagger, config)
    require_clips(corpus, config)
    rows, num_eligible = _draw(corpus, config.min_labels, num_rows, seed)
    sample = _measure(rows, num_eligible, corpus.root, config, work, on_gpu)
    if not sample.total("audio_s"):
        raise ValueError(
            f"at least one sampled row must be separated, got none of {len(rows)}; `clearsep separate-corpus` and "
            "`clearsep failures` show the reasons"
        )
    step_h = {step: sample.step_h(step) for step in STEPS}
    gpu_h = sample.step_h("gpu") if on_gpu else 0.0
    num_cpus = num_cpus or os.cpu_count() or 1
    num_gpus = (num_gpus or torch.cuda.device_count()) if on_gpu else 0
    times = PassTimes(
        step_s={step: 3600.0 * hours for step, hours in step_h.items()},
        gpu_s=3600.0 * gpu_h,
        read_wait_s=3600.0 * sample.step_h("read_wait"),
        write_wait_s=3600.0 * sample.step_h("write_wait"),
        num_cpus=num_cpus,
        num_gpus=num_gpus,
    )
    num_tasks = math.ceil(num_eligible / config.rows_per_task)
    num_clips = sample.total("num_clips") * sample.scale
    return {
        "num_rows": corpus.num_clips + corpus.num_failures,
        "num_set_aside": corpus.num_clips - num_eligible,
        "num_clips": round(num_clips) + corpus.num_failures,
        **_failures(sample, corpus),
        "audio_h": sample.total("audio_s") * sample.scale / 3600.0,
        "core_h": sum(times.cpu_s.values()) / 3600.0,
        "gpu_h": gpu_h,
        "read_wait_h": times.read_wait_s / 3600.0,
        "write_wait_h": times.write_wait_s / 3600.0,
        "step_h": step_h,
        "wall_h": max(times.needed_s.values()) / 3600.0,
        "limit": limit_of(times),
        "num_cpus": num_cpus,
        "num_gpus": num_gpus,
        "stem_gib": sample.num_bytes * sample.scale / 2**30,
        "num_shards": num_tasks * math.ceil(num_clips / num_tasks / config.clips_per_shard),
        "measured_on": torch.cuda.get_device_name() if on_gpu else "CPU, one thread",
        "sample_rows": len(rows),
        "sample_audio_s": sample.total("audio_s"),
    }


def _work(
    separator: SeparatorSource | None, tagger: TaggerSource | None, config: PassConfig
) -> tuple[PassWork, PassConfig]:
    """The work of the pass, with its settings."""
    if separator is not None:
        return Separation(separator=separator, tagger=tagger), config
    if tagger is None:
        raise ValueError("there is no model; give --separator, or --tagger alone for a pass that tags")
    return Tagging(tagger=tagger, labels=tagger.labels or _ANY_LABELS), tagging_config(config)


def _failures(sample: _Sample, corpus: Corpus) -> ExpectedFailures:
    """Failures of the pass; every row of the manifest that is no clip is one too."""
    num_separated = sample.total("num_queries") * sample.scale
    num_queries = num_separated + corpus.num_failed_queries
    fraction = sample.total("num_failed") / sample.total("num_queries")
    # The queries of a row fail together, so the rows are the independent trials.
    low, high = _interval(fraction, sample.num_rows)
    return {
        "num_queries": round(num_queries),
        "num_failed": round(fraction * num_separated) + corpus.num_failed_queries,
        "failed_fraction": (fraction * num_separated + corpus.num_failed_queries) / num_queries,
        "failed_fraction_low": (low * num_separated + corpus.num_failed_queries) / num_queries,
        "failed_fraction_high": (high * num_separated + corpus.num_failed_queries) / num_queries,
    }


def _draw(corpus: Corpus, min_labels: int, num_rows: int, seed: int) -> tuple[list[ClipRow], int]:
    """Rows with enough labels, drawn without replacement, and the number of all such rows."""
    draw, numbers = random.Random(seed), itertools.count()
    keyed = ((draw.random(), next(numbers), row) for row in corpus.sorted_clips(min_labels=min_labels))
    rows = [row for _, _, row in heapq.nsmallest(num_rows, keyed)]
    return rows, next(numbers)


def _measure(
    rows: Sequence[ClipRow],
    num_eligible: int,
    root: str,
    config: PassConfig,
    work: PassWork,
    on_gpu: bool,
) -> _Sample:
    """Take rows through the steps of a pass, in small shards and in a temporary folder."""
    config, threads = replace(config, shard_s=max(config.clip_s, config.batch_s or FIRST_S)), torch.get_num_threads()
    with folder_for_block("clearsep-plan-") as out:
        try:
            Tasks(out / "corpus").write_rows(rows, rows_per_task=len(rows))
            decode = Decode(config, root=root, out=str(out), sample_rate_hz=work.sample_rate_hz)
            work = work.ready([label for row in rows for label in row["labels"]], out)
            models = [model and model.open for model in work.models]
            actor, write = work.actor(writes=False)(*models, config, on_gpu), work.writer(out, config, InHand())
            for shard in decode.decode(task=0):
                write.write(actor.separate(shard))
        finally:
            torch.set_num_threads(threads)
        return _Sample(
            num_rows=len(rows),
            scale=num_eligible / len(rows),
            records=[record for _, record in shard_records(out)],
            num_bytes=sum(path.stat().st_size for path in (out / "stems").glob("*.parquet")),
        )


def _interval(fraction: float, trials: int) -> tuple[float, float]:
    """Wilson's 95 % confidence interval of a fraction."""
    z = 1.96
    middle = fraction + z * z / (2 * trials)
    reach = z * math.sqrt(fraction * (1 - fraction) / trials + z * z / (4 * trials * trials))
    size = 1 + z * z / trials
    return max(0.0, (middle - reach) / size), min(1.0, (middle + reach) / size)
