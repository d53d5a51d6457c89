"""One engine pass over a corpus with Ray Data: CPU tasks decode, actors separate, CPU tasks score and write."""

from __future__ import annotations

import functools
import logging
import re
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any

import ray
import ray.data
import ray.exceptions

from engine.corpus.table import Corpus, write_failures
from engine.passes.config import PassConfig
from engine.passes.decode import Decode
from engine.passes.parts import Source
from engine.passes.placement import _TASK_CPUS, Placement, _placement
from engine.passes.progress import PassProgress, require_few_failures
from engine.passes.records import STEPS, done_names, done_records, missing_tasks, plan_retry, sums
from engine.passes.separate import Separate
from engine.passes.tasks import Tasks
from engine.passes.write import ScoreAndWrite, SeparateScoreAndWrite
from engine.schema import SCORES_VERSION
from engine.separators import Separator, load, read_description
from engine.storage.files import read_json, remove_leftovers, write_json
from engine.storage.fingerprints import differences, fingerprint
from engine.storage.lock import lock
from engine.storage.paths import Location, Name, location
from engine.taggers import Tagger, open_tagger

_WAVE_TASKS = 4096  # tasks of one Ray Data execution, whose bookkeeping grows with them


def run_pass(
    corpus: Corpus,
    out: Name,
    *,
    separator: Name,
    tagger: Name | None = None,
    config: PassConfig | None = None,
    open_separator: Callable[[str], Separator] | None = None,
    sample_rate_hz: int | None = None,
    retry_failed: bool = False,
) -> dict[str, Any]:
    """Separate and score every clip of a corpus into ``out``; returns the summary, which is also written there.

    ``separator`` is a checkpoint folder, whose fingerprint guards against mixing results. Another kind of separator is
    given as ``open_separator(device)`` with its ``sample_rate_hz``; ``separator`` is then its name. ``tagger`` is the
    folder of a tagger. Started again, the pass does only what is missing; with ``retry_failed`` also the clips that
    failed as a whole, and nothing else. Raises ``ValueError`` where ``out`` holds a pass of other settings, corpus,
    tagger or separator or is in use, ``RuntimeError`` where more than ``max_failed_fraction`` of the queries failed.
    """
    config, out = config or PassConfig(), location(out)
    if open_separator is None:
        description = read_description(separator)
        separator_fingerprint, sample_rate_hz = description["fingerprint"], description["sample_rate_hz"]
        open_separator = functools.partial(_open, str(location(separator)))
    else:
        separator_fingerprint = str(separator)
    if sample_rate_hz is None:
        raise ValueError("open_separator needs sample_rate_hz; give the separator's rate")
    require_clips(corpus, config)
    identity = pass_identity(corpus, separator=separator_fingerprint, tagger=tagger, config=config)
    tagging = functools.partial(open_tagger, str(location(tagger))) if tagger else None
    manifest_path = out / "stems" / "manifest.json"
    _placement(config)  # refused before the folder is claimed
    with lock(out, "stems"):
        _claim(out, identity)
        for name in ("stems", "failures", "corpus"):
            remove_leftovers(out / name)
        if retry_failed:
            plan_retry(out)
        if not manifest_path.is_file():
            started, (before, num_parts) = time.perf_counter(), sums(out)
            counts = _prepare(corpus, out, config)
            tasks = missing_tasks(out, counts["num_tasks"], num_parts)
            source = Source(root=corpus.root, out=str(out), sample_rate_hz=sample_rate_hz)
            watch = PassProgress(out, config.max_failed_fraction, before, num_clips=counts["num_clips"])
            _stream(source, tasks, config, open_separator, tagging, watch)
            wall_s = time.perf_counter() - started
            _close(
                out,
                corpus,
                counts,
                identity,
                wall_s=wall_s,
                audio_s_before=before["audio_s"],
                limit=config.max_failed_fraction,
            )
        summary: dict[str, Any] = read_json(manifest_path)
        summary.pop("shards")
        write_json(out / "summary.json", summary)
    return summary


def pass_identity(corpus: Corpus, *, separator: str, tagger: Name | None, config: PassConfig) -> dict[str, Any]:
    """All that decides what a pass makes; ``separator`` is a fingerprint."""
    return {
        "score version": SCORES_VERSION,
        "settings": config.identity(),
        "separator": separator,
        "tagger": open_tagger(tagger, "cpu").fingerprint if tagger else None,
        "corpus": corpus.fingerprint,
    }


def _open(folder: str, device: str) -> Separator:
    return load(folder, device=device)


def require_clips(corpus: Corpus, config: PassConfig) -> None:
    """``ValueError`` where a corpus has no clip to separate."""
    if any(len(labels) >= config.min_labels for table in corpus.sorted_clips() for labels in table["labels"]):
        return
    if corpus.num_clips:
        raise ValueError(
            f"none of {corpus.num_clips} clips has {config.min_labels} labels or more: there is nothing to separate; "
            "give clips that name several sounds, or set min_labels to 1 (engine.min_labels in a run)"
        )
    first = next(iter(corpus.failure_tables())).to_pylist()[0]
    raise ValueError(f"none of {corpus.num_failures} rows is a clip; the first: {first['path']}: {first['message']}")


def _prepare(corpus: Corpus, out: Location, config: PassConfig) -> dict[str, int]:
    """Put down the pass's clips and what of the manifest is none; returns how many there are."""
    counts = Tasks(out / "corpus").write(corpus, rows_per_task=config.rows_per_task, min_labels=config.min_labels)
    failures = out / "failures" / "manifest.parquet"
    if corpus.num_failures:  # anew at every start: rows that are no clip may be mended without it being another corpus
        write_failures(failures, corpus.failure_tables())
    else:
        failures.unlink(missing_ok=True)
    return counts


def _claim(out: Location, identity: dict[str, Any]) -> None:
    """Mark ``out`` as the place of this very pass, or refuse if it is another's."""
    path = out / "stems" / "pass.json"
    if not path.is_file():
        write_json(path, identity)
        return
    changed = differences(read_json(path), identity)
    if changed:
        raise ValueError(f"{out} holds a pass of another {changed}; give another folder, or delete this one to redo it")


def _stream(
    source: Source,
    tasks: list[dict[str, Any]],
    config: PassConfig,
    open_separator: Callable[[str], Separator],
    tagging: Callable[[str], Tagger] | None,
    watch: PassProgress,
) -> None:
    if not tasks:
        return
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True  # the worker's own error, for `_reason`
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # the pass says itself how it goes
    try:
        with watch.shown():
            for start in range(0, len(tasks), _WAVE_TASKS):
                wave = tasks[start : start + _WAVE_TASKS]
                placement = _placement(config)  # of the nodes that are there by now
                if placement.waits:
                    watch.console.print("no node has room for a separator yet; waiting for one", highlight=False)
                rows = iter(_results(wave, source, config, placement, open_separator, tagging).iter_rows())
                with closing(rows):  # ends the execution here: its threads must not outlive the connection to Ray
                    for row in rows:
                        watch.add(row)
    except ray.exceptions.RayError as error:
        raise RuntimeError(f"the pass broke off: {_reason(error)}") from error


def _results(
    tasks: list[dict[str, Any]],
    source: Source,
    config: PassConfig,
    placement: Placement,
    open_separator: Callable[[str], Separator],
    tagging: Callable[[str], Tagger] | None,
) -> ray.data.Dataset:
    """A row a part, when it is on disk."""
    num_gpus, min_actors, max_actors, _ = placement
    one_part = {"batch_size": 1, "batch_format": "pyarrow"}
    actors = {
        **one_part,
        "compute": ray.data.ActorPoolStrategy(min_size=min_actors, max_size=max_actors),
        "num_cpus": config.num_cpus_per_actor,
    }
    # A block for each task, made here: tasks that repartition or look at tables want a whole CPU of one node.
    blocks = ray.data.from_items(tasks, override_num_blocks=len(tasks))
    decoded = blocks.map_batches(Decode(source, config), num_cpus=_TASK_CPUS, **one_part)
    if not num_gpus:
        arguments = (open_separator, config, source.out, source.sample_rate_hz, tagging)
        return decoded.map_batches(SeparateScoreAndWrite, fn_constructor_args=arguments, **actors)
    separated = decoded.map_batches(
        Separate, fn_constructor_args=(open_separator, config, True, tagging), num_gpus=num_gpus, **actors
    )
    return separated.map_batches(ScoreAndWrite(source.out, source.sample_rate_hz), num_cpus=_TASK_CPUS, **one_part)


def _reason(error: Exception) -> str:
    """The line of a worker's traceback that names its last error, without the advice that Ray adds."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return next((line for line in reversed(lines) if re.match(r"[\w.]+(Error|Exception)\b", line)), lines[-1])


def _close(
    out: Location,
    corpus: Corpus,
    counts: dict[str, int],
    identity: dict[str, Any],
    *,
    wall_s: float,
    audio_s_before: float,
    limit: float,
) -> None:
    """Add up the parts and write the manifest that closes the pass."""
    total, _ = sums(out)
    not_clips = sum(sum(table["num_queries"].to_pylist()) for table in corpus.failure_tables())
    num_queries, num_failed = total["num_queries"] + not_clips, total["num_failed"] + not_clips
    require_few_failures(out, num_failed, num_queries, limit)
    parts = done_names(out)
    all_s = sum(total[f"{step}_s"] for step in STEPS) or 1.0
    manifest = {
        "num_clips": int(total["num_clips"]) + corpus.num_failures,
        "num_set_aside": counts["num_set_aside"],
        "num_queries": int(num_queries),
        "num_stems": int(total["num_stems"]),
        "num_failed": int(num_failed),
        "audio_h": total["audio_s"] / 3600.0,
        "wall_s": wall_s,  # of the start that closed the pass
        "audio_s_per_s": (total["audio_s"] - audio_s_before) / wall_s,
        "step_s": {step: total[f"{step}_s"] for step in STEPS},
        "step_fraction": {step: total[f"{step}_s"] / all_s for step in STEPS},
        "separator_fingerprint": identity["separator"],
        "config_fingerprint": fingerprint(identity["settings"]),
        "shards": {part: record["sha256"] for part, record in zip(parts, done_records(out, parts), strict=True)},
    }
    manifest["fingerprint"] = fingerprint([identity["separator"], manifest["shards"]])
    write_json(out / "stems" / "manifest.json", manifest)
