"""One engine pass over a corpus with Ray Data: CPU tasks decode, actors separate, CPU tasks score and write."""

from __future__ import annotations

import functools
import logging
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.data
import ray.exceptions
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from engine.corpus import Corpus
from engine.schema import SCORES_VERSION
from engine.separators import Separator, load, read_description
from engine.shards import done_parts
from engine.stages import Decode, PassConfig, ScoreAndWrite, Separate, SeparateScoreAndWrite
from engine.storage import fingerprint, read_json, write_json, write_parquet
from engine.taggers import Tagger, open_tagger

_TASK_CPUS = 0.4  # of decoding and writing tasks; unlike the actors' share, else Ray fuses decoding into the actors
_STEPS = ("decode", "separate", "assess", "score", "write")


def run_pass(
    corpus: Corpus,
    out: str | Path,
    *,
    separator: str | Path,
    tagger: str | Path | None = None,
    config: PassConfig | None = None,
    open_separator: Callable[[str], Separator] | None = None,
    sample_rate_hz: int | None = None,
) -> dict[str, Any]:
    """Separate and score every clip of a corpus into ``out``; returns the summary, which is also written there.

    ``separator`` is a checkpoint folder, whose fingerprint guards against mixing results. Another kind of separator is
    given as ``open_separator(device)`` with its ``sample_rate_hz``; ``separator`` is then its name. ``tagger`` is the
    folder of a tagger. Started again, the pass does only what is missing. Raises ``ValueError`` where ``out`` holds a
    pass of other settings, corpus, tagger or separator.
    """
    config, out = config or PassConfig(), Path(out).resolve()
    if open_separator is None:
        description = read_description(separator)
        separator_fingerprint, sample_rate_hz = description["fingerprint"], description["sample_rate_hz"]
        folder = str(Path(separator).resolve())
        open_separator = functools.partial(_open, folder)
    else:
        separator_fingerprint = str(separator)
    if sample_rate_hz is None:
        raise ValueError("open_separator needs sample_rate_hz; give the separator's rate")
    rows = clips_to_separate(corpus, config)
    identity = {
        "score version": SCORES_VERSION,
        "settings": config.identity(),
        "separator": separator_fingerprint,
        "tagger": open_tagger(tagger, "cpu").fingerprint if tagger else None,
        "corpus": fingerprint([row["clip_id"] for row in rows]),
    }
    tagging = functools.partial(open_tagger, str(Path(tagger).resolve())) if tagger else None
    manifest_path = out / "stems" / "manifest.json"
    placement = None if manifest_path.is_file() else _placement(config)  # refused before the folder is claimed
    _claim(out, identity)
    if placement:
        started, done_before_s = time.perf_counter(), _done_audio_s(out)
        write_parquet(out / "failures" / "manifest.parquet", corpus.failures)
        _stream(rows, out, corpus.root, config, placement, open_separator, sample_rate_hz, tagging)
        wall_s = time.perf_counter() - started
        speed = {"wall_s": wall_s, "audio_s_per_s": (_done_audio_s(out) - done_before_s) / wall_s}
        _close(out, corpus, len(rows), identity, speed)
    summary: dict[str, Any] = read_json(manifest_path)
    summary.pop("shards")
    write_json(out / "summary.json", summary)
    return summary


def _open(folder: str, device: str) -> Separator:
    return load(folder, device=device)


def clips_to_separate(corpus: Corpus, config: PassConfig) -> list[dict[str, Any]]:
    """The rows of a pass in the order of their ids, so that parts are the same on every machine.

    Raises ``ValueError`` where there is none.
    """
    clips = corpus.clips.sort_by("clip_id").to_pylist()
    rows = [row for row in clips if len(row["labels"]) >= config.min_labels]
    if rows:
        return rows
    if clips:
        raise ValueError(
            f"none of {len(clips)} clips has {config.min_labels} labels or more, so there is nothing to separate; give "
            "clips that name several sounds, or set min_labels to 1 (engine.min_labels in a run)"
        )
    first = corpus.failures.to_pylist()[0]
    raise ValueError(f"none of {len(corpus.failures)} rows is a clip; the first: {first['path']}: {first['message']}")


def _done_audio_s(out: Path) -> float:
    """Audio in the parts that are done."""
    return float(sum(record["audio_s"] for record in done_parts(out).values()))


def _claim(out: Path, identity: dict[str, Any]) -> None:
    """Mark ``out`` as the place of this very pass, or refuse if it is another's."""
    path = out / "stems" / "pass.json"
    if not path.is_file():
        write_json(path, identity)
        return
    found = read_json(path)
    changed = [name for name in identity if found.get(name) != identity[name]]
    if changed:
        raise ValueError(
            f"{out} holds a pass of another {' and '.join(changed)}; give another folder, or delete this one to redo it"
        )


def _missing(rows: list[dict[str, Any]], out: Path, config: PassConfig) -> tuple[pa.Table, frozenset[str]]:
    """The decoding tasks that are not wholly done, and the names of the parts that are."""
    size = config.rows_per_task
    tasks = [{"task": i // size, "rows": rows[i : i + size]} for i in range(0, len(rows), size)]
    done = done_parts(out)
    seen: dict[int, int] = {}
    expected: dict[int, int] = {}
    for record in done.values():
        seen[record["task"]] = seen.get(record["task"], 0) + 1
        expected[record["task"]] = record["num_parts"]
    missing = [task for number, task in enumerate(tasks) if seen.get(number, 0) < expected.get(number, 1)]
    return pa.Table.from_pylist(missing), frozenset(done)


def _stream(
    rows: list[dict[str, Any]],
    out: Path,
    root: str,
    config: PassConfig,
    placement: tuple[float, int],
    open_separator: Callable[[str], Separator],
    sample_rate_hz: int,
    tagging: Callable[[str], Tagger] | None,
) -> None:
    tasks, done = _missing(rows, out, config)
    if not len(tasks):
        return
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True  # the worker's own error, for `_reason`
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # the pass says itself how it goes
    num_gpus, num_actors = placement
    one_part = {"batch_size": 1, "batch_format": "pyarrow"}
    actors = {
        **one_part,
        "compute": ray.data.ActorPoolStrategy(
            min_size=min(config.min_actors or num_actors, num_actors), max_size=num_actors
        ),
        "num_cpus": config.num_cpus_per_actor,
    }
    decoded = (
        ray.data.from_arrow(tasks)
        .repartition(len(tasks))
        .map_batches(Decode(root, sample_rate_hz, config, done), num_cpus=_TASK_CPUS, **one_part)
    )
    if num_gpus:
        separated = decoded.map_batches(
            Separate, fn_constructor_args=(open_separator, config, True, tagging), num_gpus=num_gpus, **actors
        )
        results = separated.map_batches(ScoreAndWrite(str(out), sample_rate_hz), num_cpus=_TASK_CPUS, **one_part)
    else:
        arguments = (open_separator, config, str(out), sample_rate_hz, tagging)
        results = decoded.map_batches(SeparateScoreAndWrite, fn_constructor_args=arguments, **actors)
    try:
        _show(results, total_clips=sum(len(task) for task in tasks["rows"].to_pylist()))
    except ray.exceptions.RayError as error:
        raise RuntimeError(f"the pass broke off: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """The line of a worker's traceback that names its last error, without the advice that Ray adds."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return next((line for line in reversed(lines) if re.match(r"[\w.]+(Error|Exception)\b", line)), lines[-1])


def _placement(config: PassConfig) -> tuple[float, int]:
    """GPU share of an actor and the largest pool that the cluster holds."""
    resources = ray.cluster_resources()
    available_gpus = resources.get("GPU", 0.0)
    num_gpus = config.num_gpus_per_actor
    if num_gpus is None:
        num_gpus = 1.0 if available_gpus else 0.0
    if num_gpus > available_gpus:
        raise ValueError(f"num_gpus_per_actor is {num_gpus}, the cluster has {available_gpus:g}; set it to 0")
    num_cpus, share = resources.get("CPU", 1.0), config.num_cpus_per_actor
    room = available_gpus / num_gpus if num_gpus else num_cpus / max(1.0, share)
    most = int(min(room, (num_cpus - _TASK_CPUS) / share))
    if not most:
        raise ValueError(
            f"num_cpus_per_actor is {share:g}, but of the cluster's {num_cpus:g} CPUs {_TASK_CPUS:g} are needed to "
            "decode with; lower it"
        )
    return num_gpus, min(config.max_actors or most, most)


def _show(results: ray.data.Dataset, *, total_clips: int) -> None:
    """Run the pass, its progress on standard error (a line now and then where that is no terminal)."""
    console = Console(file=sys.stderr)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    started, audio_s, clips, said = time.perf_counter(), 0.0, 0, 0.0
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("separating clips", total=total_clips)
        for row in results.iter_rows():
            audio_s += row["audio_s"]
            clips += row["num_clips"]
            elapsed = time.perf_counter() - started
            speed = f"separating clips, {audio_s / elapsed:.0f} s of audio per second"
            progress.update(bar, completed=clips, total=max(total_clips, clips), description=speed)
            if not console.is_terminal and elapsed - said > 30:
                said = elapsed
                console.print(f"{speed}, {clips} of about {total_clips} clips", highlight=False)


def _close(out: Path, corpus: Corpus, num_rows: int, identity: dict[str, Any], speed: dict[str, float]) -> None:
    """Add up the parts and write the manifest that closes the pass."""
    done = done_parts(out)
    total = {
        key: sum(record[key] for record in done.values())
        for key in ("num_stems", "num_failed", "num_clips", "num_queries")
    }
    audio_s = sum(record["audio_s"] for record in done.values())
    step_s = {step: sum(record[f"{step}_s"] for record in done.values()) for step in _STEPS}
    all_s = sum(step_s.values()) or 1.0
    in_manifest = len(corpus.failures)
    not_clips = sum(corpus.failures["num_queries"].to_pylist())
    manifest = {
        "num_clips": total["num_clips"] + in_manifest,
        "num_set_aside": len(corpus.clips) - num_rows,
        "num_queries": total["num_queries"] + not_clips,
        "num_stems": total["num_stems"],
        "num_failed": total["num_failed"] + not_clips,
        "audio_h": audio_s / 3600.0,
        **speed,  # of the start that closed the pass
        "step_s": step_s,
        "step_fraction": {step: seconds / all_s for step, seconds in step_s.items()},
        "separator_fingerprint": identity["separator"],
        "config_fingerprint": fingerprint(identity["settings"]),
        "shards": {part: record["sha256"] for part, record in done.items()},
    }
    manifest["fingerprint"] = fingerprint([identity["separator"], manifest["shards"]])
    write_json(out / "stems" / "manifest.json", manifest)
