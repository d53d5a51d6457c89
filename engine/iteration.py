"""One engine pass over a corpus with Ray Data: CPU tasks decode, actors separate, CPU tasks score and write."""

from __future__ import annotations

import functools
import logging
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any, NamedTuple

import ray
import ray.data
import ray.exceptions
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from engine.account import (
    STEPS,
    done_names,
    done_records,
    missing_tasks,
    plan_retry,
    summarise_failures,
    sums,
    waiting_rows,
)
from engine.clip_table import Corpus, Tasks, write_failures
from engine.gauges import tell_part
from engine.lock import held
from engine.schema import SCORES_VERSION
from engine.separators import Separator, load, read_description
from engine.stages import Decode, PassConfig, ScoreAndWrite, Separate, SeparateScoreAndWrite, Source
from engine.storage import Location, Name, differences, fingerprint, location, read_json, remove_leftovers, write_json
from engine.taggers import Tagger, open_tagger

_TASK_CPUS = 0.4  # of decoding and writing tasks; unlike the actors' share, else Ray fuses decoding into the actors
_WAVE_TASKS = 4096  # tasks of one Ray Data execution, whose bookkeeping grows with them
_ENOUGH_QUERIES = 200  # to judge by what fraction of them fails


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
    with held(out, "stems"):
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
            watch = Watch(out, config.max_failed_fraction, before, num_clips=counts["num_clips"])
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
    watch: Watch,
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


class Placement(NamedTuple):
    """Where the separators go."""

    num_gpus: float
    """GPU share of an actor."""
    min_actors: int
    """Actors to begin with."""
    max_actors: int
    """Actors that the pool may grow to as work piles up, also on nodes that are still to come."""
    waits: bool = False
    """Whether no node has room for one yet."""


def _placement(config: PassConfig) -> Placement:
    """The pool for the cluster as it is; with ``max_actors`` for one that nodes come to.

    What an autoscaler may add is known to nobody before it has: who names ``max_actors`` has the pool wait for it.
    """
    resources = ray.cluster_resources()
    num_cpus, share = resources.get("CPU", 0.0), config.num_cpus_per_actor
    available_gpus = resources.get("GPU", 0.0)
    num_gpus = config.num_gpus_per_actor
    if num_gpus is None:
        num_gpus = 1.0 if available_gpus else 0.0
    held = available_gpus / num_gpus if num_gpus else num_cpus / max(1.0, share)
    room = int(min(held, (num_cpus - _TASK_CPUS) / share))
    if config.max_actors is not None:
        first = min(config.min_actors or max(1, room), config.max_actors)
        return Placement(num_gpus, first, config.max_actors, waits=room < 1)
    if num_gpus > available_gpus:
        raise ValueError(
            f"num_gpus_per_actor is {num_gpus}, the cluster has {available_gpus:g}; set it to 0, or where nodes with "
            "GPUs are still to come set max_actors too"
        )
    if room < 1:
        raise ValueError(
            f"num_cpus_per_actor is {share:g}, but of the cluster's {num_cpus:g} CPUs {_TASK_CPUS:g} are needed to "
            "decode with; lower it, or where nodes are still to come set max_actors"
        )
    return Placement(num_gpus, min(config.min_actors or room, room), room)


class Watch:
    """How a pass goes: shown on standard error, and stopped where too much fails."""

    def __init__(self, out: Location, max_failed_fraction: float, before: dict[str, float], *, num_clips: int) -> None:
        self.out, self.limit, self.num_clips = out, max_failed_fraction, num_clips
        # What is to be tried again has not failed yet: else a pass that too much failed in could not be mended.
        again = sum(row["num_queries"] for row in waiting_rows(out))
        self.num_queries, self.num_failed = before["num_queries"] - again, before["num_failed"] - again
        self.clips_before = before["num_clips"]
        self.audio_s, self.clips, self.said = 0.0, 0, 0.0
        self.started = time.perf_counter()
        self.console = Console(file=sys.stderr)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.progress = Progress(*columns, console=self.console, disable=not self.console.is_terminal)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """The progress bar (a line now and then where standard error is no terminal)."""
        with self.progress:
            self.bar = self.progress.add_task("separating clips", total=self.num_clips)
            yield

    def add(self, row: dict[str, Any]) -> None:
        """Take in what became of a part."""
        self.audio_s += row["audio_s"]
        self.clips += row["num_clips"]
        self.num_queries += row["num_queries"] + row["num_failed_before"]
        self.num_failed += row["num_failed"] + row["num_failed_before"]
        elapsed = time.perf_counter() - self.started
        speed = f"separating clips, {self.audio_s / elapsed:.0f} s of audio per second"
        clips, total = int(self.clips + self.clips_before), self.num_clips
        self.progress.update(self.bar, completed=clips, total=max(total, clips), description=speed)
        if not self.console.is_terminal and elapsed - self.said > 30:
            self.said = elapsed
            self.console.print(f"{speed}, {clips} of about {total} clips", highlight=False)
        tell_part(row, clips_waiting=total - clips)
        if self.num_queries >= _ENOUGH_QUERIES:
            require_few_failures(self.out, self.num_failed, self.num_queries, self.limit)


class TooManyFailuresError(RuntimeError):
    """More of a pass's queries failed than it lets; the words say what to do."""

    says_how_to_go_on = True


def require_few_failures(out: Location, num_failed: float, num_queries: float, limit: float) -> None:
    """:class:`TooManyFailuresError` with the reasons where more of the queries failed than the limit lets."""
    if num_failed <= limit * num_queries:
        return
    reasons = summarise_failures(out, most=3)["reasons"]
    told = "; ".join("{num_queries} in {step}, {error_class} ({example})".format(**entry) for entry in reasons)
    raise TooManyFailuresError(
        f"{num_failed:.0f} of {num_queries:.0f} queries failed, more than max_failed_fraction {limit:g} lets: {told}. "
        f"`clearsep failures {out}` lists them; when the cause is mended, --retry-failed tries them again; a higher "
        "max_failed_fraction does without them. What was done stays"
    )


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
