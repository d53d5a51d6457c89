"""What a pass over a corpus will cost, from a sample of it that is taken through the same stages on this machine."""

from __future__ import annotations

import heapq
import math
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from engine.corpus.table import Corpus
from engine.passes.config import PassConfig
from engine.passes.decode import Decode
from engine.passes.parts import Source
from engine.passes.records import done_parts
from engine.passes.separate import Separate
from engine.passes.tasks import Tasks
from engine.passes.write import ScoreAndWrite
from engine.separators import Separator
from engine.taggers import Tagger

_MODEL_STEPS = ("separate", "assess")  # on the GPU where there is one
_CPU_STEPS = ("decode", "score", "write")


def plan(
    corpus: Corpus,
    *,
    open_separator: Callable[[str], Separator],
    sample_rate_hz: int,
    config: PassConfig | None = None,
    open_tagger: Callable[[str], Tagger] | None = None,
    num_rows: int = 40,
    num_cpus: float | None = None,
    num_gpus: float | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Hours, bytes and failures that a pass over the corpus is expected to take and make.

    ``num_rows`` rows, drawn at random of those that a pass takes, are decoded, separated, scored and written into a
    temporary folder; the first part, in which things start up, is left out of the speeds. ``num_cpus`` and ``num_gpus``
    are of the cluster to be used (null: this machine's). Raises ``ValueError`` for a sample in which no clip works.
    """
    config = config or PassConfig()
    rows, num_taking = _sample(corpus, config.min_labels, num_rows, seed)
    on_gpu = torch.cuda.is_available()
    num_tasks = math.ceil(num_taking / config.rows_per_task)
    part_clips = max(1, int(config.part_s / config.clip_s))
    config = replace(config, part_s=max(config.clip_s, config.batch_s), rows_per_task=max(1, len(rows)))
    with tempfile.TemporaryDirectory(prefix="clearsep-plan-") as folder:
        out = Path(folder)
        _run(rows, corpus.root, out, config, open_separator, open_tagger, sample_rate_hz, on_gpu)
        records = list(done_parts(out).values())
        num_bytes = sum(path.stat().st_size for path in (out / "stems").glob("*.parquet"))
    measured = _sums(records)
    if not measured["audio_s"]:
        raise ValueError(f"none of the {len(rows)} sampled rows could be used; `clearsep separate-corpus` says why")
    speeds = _sums(records[1:]) if len(records) > 1 and _sums(records[1:])["audio_s"] else measured
    scale = num_taking / len(rows)
    audio_s = measured["audio_s"] * scale
    hours = {step: speeds[f"{step}_s"] / speeds["audio_s"] * audio_s / 3600.0 for step in _CPU_STEPS + _MODEL_STEPS}
    cpu_steps = _CPU_STEPS if on_gpu else _CPU_STEPS + _MODEL_STEPS
    core_h, gpu_h = sum(hours[step] for step in cpu_steps), sum(hours[step] for step in _MODEL_STEPS) if on_gpu else 0.0
    num_cpus = num_cpus or os.cpu_count() or 1
    num_gpus = (num_gpus or torch.cuda.device_count()) if on_gpu else 0
    not_clips = sum(sum(table["num_queries"].to_pylist()) for table in corpus.failure_tables())
    num_queries = measured["num_queries"] * scale + not_clips

    def whole(fraction: float) -> float:
        """A fraction of what is separated as one of all, with the rows of the manifest that are no clips."""
        return (fraction * measured["num_queries"] * scale + not_clips) / num_queries

    # Rows are what is drawn: the queries of one fail together.
    low, high = _interval(measured["num_failed"] / measured["num_queries"], len(rows))
    return {
        "num_rows": corpus.num_clips + corpus.num_failures,
        "num_set_aside": corpus.num_clips - num_taking,
        "num_clips": round(measured["num_clips"] * scale) + corpus.num_failures,
        "num_queries": round(num_queries),
        "audio_h": audio_s / 3600.0,
        "num_failed": round(measured["num_failed"] * scale) + not_clips,
        "failed_fraction": whole(measured["num_failed"] / measured["num_queries"]),
        "failed_fraction_low": whole(low),
        "failed_fraction_high": whole(high),
        "core_h": core_h,
        "gpu_h": gpu_h,
        "step_h": hours,
        "wall_h": max(core_h / num_cpus, gpu_h / num_gpus if num_gpus else 0.0),
        "num_cpus": num_cpus,
        "num_gpus": num_gpus,
        "stem_gib": num_bytes * scale / 2**30,
        "num_shards": num_tasks * math.ceil(measured["num_clips"] * scale / num_tasks / part_clips),
        "measured_on": torch.cuda.get_device_name() if on_gpu else "CPU, one thread",
        "sample_rows": len(rows),
        "sample_audio_s": measured["audio_s"],
    }


def _sample(corpus: Corpus, min_labels: int, num_rows: int, seed: int) -> tuple[list[dict[str, Any]], int]:
    """Rows drawn without replacement of those with labels enough, and how many those are."""
    draw, count = random.Random(seed), 0

    def keyed() -> Iterator[tuple[float, int, dict[str, Any]]]:
        nonlocal count
        for table in corpus.sorted_clips():
            for row in table.to_pylist():
                if len(row["labels"]) >= min_labels:
                    count += 1
                    yield draw.random(), count, row

    rows = [row for _, _, row in heapq.nsmallest(num_rows, keyed())]
    if not rows:
        raise ValueError(f"no clip has {min_labels} labels or more: there is nothing to plan; set min_labels to 1")
    return rows, count


def _run(
    rows: list[dict[str, Any]],
    root: str,
    out: Path,
    config: PassConfig,
    open_separator: Callable[[str], Separator],
    open_tagger: Callable[[str], Tagger] | None,
    sample_rate_hz: int,
    on_gpu: bool,
) -> None:
    threads = torch.get_num_threads()
    try:
        Tasks(out / "corpus").write_rows(rows, rows_per_task=config.rows_per_task)
        decode = Decode(Source(root=root, out=str(out), sample_rate_hz=sample_rate_hz), config)
        separate = Separate(open_separator, config, on_gpu, open_tagger)
        write = ScoreAndWrite(str(out), sample_rate_hz)
        for part in decode(pa.table({"task": [0], "round": [0], "group": [0]})):
            entry = part.to_pylist()[0]
            started = time.perf_counter()
            separated = separate.separate(entry)
            if on_gpu:
                torch.cuda.synchronize()
            separated["separate_s"] = time.perf_counter() - started - separated["assess_s"]
            write.write(separated)
    finally:
        torch.set_num_threads(threads)


def _sums(records: list[dict[str, Any]]) -> dict[str, float]:
    names = ("audio_s", "num_clips", "num_queries", "num_failed", *(f"{step}_s" for step in _CPU_STEPS + _MODEL_STEPS))
    return {name: float(sum(record[name] for record in records)) for name in names}


def _interval(fraction: float, trials: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a fraction."""
    z = 1.96
    middle = fraction + z * z / (2 * trials)
    reach = z * math.sqrt(fraction * (1 - fraction) / trials + z * z / (4 * trials * trials))
    size = 1 + z * z / trials
    return max(0.0, (middle - reach) / size), min(1.0, (middle + reach) / size)
