"""One pass over a corpus with Ray Data: CPU tasks decode, actors separate and score, CPU tasks write."""

from __future__ import annotations

import ctypes
import functools
import logging
import math
import re
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from typing import Any, NamedTuple

import ray
import ray.data
import ray.exceptions

from cluster.session import require_connection
from engine.corpus.table import Corpus
from engine.errors import as_exception
from engine.passes.config import PassConfig
from engine.passes.decode import Decode
from engine.passes.records import (
    STEPS,
    PendingTask,
    Totals,
    missing_tasks,
    plan_retry,
    read_totals,
    require_complete,
    write_manifest_failures,
)
from engine.passes.shards import (
    PassStart,
    PassSummary,
    damaged_files,
    remove_damaged_manifest,
    reopen_damaged,
)
from engine.passes.slices import (
    SliceName,
    alone,
    begin_slice,
    claim_corpus,
    close,
    hand_folder,
    is_closed,
    parse_slice,
    summarise,
    take,
)
from engine.passes.speed.limits import PassLimit, PassTimes, limit_of
from engine.passes.speed.progress import PassProgress
from engine.passes.speed.ray_metrics import num_ended_for_memory
from engine.passes.tasks import WHOLE, Slice, Tasks, require_clips
from engine.passes.transport import unpack
from engine.passes.write import PassWork, Separation, Write
from engine.separators import SeparatorFactory, SeparatorSource, find_separator
from engine.settings import build
from engine.storage.factories import Model, ModelSource
from engine.storage.files import remove_leftovers
from engine.storage.fingerprints import claim
from engine.storage.in_hand import MAX_DEATHS, InHand
from engine.storage.paths import Location, Name, location
from engine.taggers import TaggerSource, find_tagger

_LOGGER = logging.getLogger(__name__)
_MAX_TURNS = 3  # attempts to make shards that are missing when all tasks have ended
_STALL_S, _STALL_DEATHS = 90.0, 25  # a machine is full if no shard is done while so many workers end
_MEMORY_FULL = (
    f"cannot finish the pass (in {_STALL_S:g} s no shard was done: the memory of the machine is full, above "
    "RAY_memory_usage_threshold, by default 0.95 of it, and Ray ended worker after worker); end what else needs memory "
    "there, take a machine with more, or lower batch_s and max_actors, then start the same command again to resume"
)
_MOST_IN_BLOCK, _BLOCKS_PER_ACTOR = 8, 16  # tasks that one task of Ray decodes, if as many are left for every actor
_TASKS_AT_ONCE = 4096  # in one execution of Ray Data, whose bookkeeping grows with them
_SHARDS_AT_ONCE = 3  # in an actor with a GPU: one has it, while another is fetched and packed and a third is unpacked
_TASK_CPUS = 0.4  # of decoding and writing; must differ from the actors' CPUs, or Ray fuses decoding into the actors


def run_pass(
    corpus: Corpus,
    out: Name,
    *,
    separator: SeparatorSource | SeparatorFactory | Name,
    tagger: TaggerSource | Name | None = None,
    config: PassConfig | Mapping[str, Any] | None = None,
    retry_failed: bool = False,
    slice: SliceName | None = None,
) -> PassSummary:
    """Separate and score every clip of a corpus into the folder ``out``; returns the summary of the pass.

    ``separator`` is one of :func:`load_separator`'s names, ``tagger`` a folder; ``config`` has settings by name, as
    ``clearsep settings engine`` lists them. Start it again to resume an interrupted pass: only missing shards are made.
    With ``retry_failed`` the clips that failed as a whole are processed once more. With ``slice``, such as ``"3/32"``,
    only that share of the work is done: 32 commands, on one Ray cluster or on several, make one pass. The last to end
    closes it, and the summary of the others lists the ``missing_slices``. Ray must be connected (:func:`connect`).
    Raises ``ValueError`` if ``out`` is in use or holds a pass of another corpus (a corpus that moved is the same, one
    whose files were replaced is another), separator, tagger or settings, and ``TooManyFailuresError`` if a larger
    fraction of the queries than ``max_failed_fraction`` failed.

    >>> with cs.connect():
    ...     summary = cs.run_pass(cs.read_corpus("natural.csv"), "pass", separator="separator", config={"clip_s": 5})
    >>> summary["num_queries"], summary["num_stems"], summary["num_failed"]
    (4, 4, 0)
    """
    config = build(PassConfig, config or {})
    tagging = find_tagger(tagger) if tagger is not None else None
    work = Separation(separator=find_separator(separator), tagger=tagging)
    return run_work(corpus, location(out), work, config, retry_failed=retry_failed, slice=slice)


def run_work(
    corpus: Corpus,
    out: Location,
    work: PassWork,
    config: PassConfig,
    *,
    retry_failed: bool = False,
    slice: SliceName | None = None,
) -> PassSummary:
    """A pass that does any work, as :func:`run_pass` does one that separates."""
    part = parse_slice(slice, retry_failed=retry_failed)
    require_clips(corpus, config)
    identity = work.identity(corpus, config)
    choose_placement(config)  # raises before the folder is claimed
    with ExitStack() as held:
        with alone(out):
            claim(out / "stems" / "pass.json", identity, what=work.what)
            take(out, part, held)
            for name in ("stems", "failures", "corpus"):
                remove_leftovers(out / name)  # a writer that lives, of another slice, has its own locked
            remove_damaged_manifest(out)
        damaged = damaged_files(out, part)
        with alone(out):
            done = reopen_damaged(out, damaged, part)
            if not is_closed(out):
                begin_slice(out, part)
        claim_corpus(out, corpus, config, retry_failed=retry_failed)
        if retry_failed:
            plan_retry(out, rows_per_task=config.rows_per_task)
        if not is_closed(out):
            return _run_missing_tasks(corpus, out, work, config, done, part)
        return summarise(out)


def _run_missing_tasks(
    corpus: Corpus,
    out: Location,
    work: PassWork,
    config: PassConfig,
    done: list[str],
    part: Slice,
) -> PassSummary:
    started, before = time.perf_counter(), read_totals(out, done, part=part)
    labels, tasks = corpus.labels(min_labels=config.min_labels), Tasks(out / "corpus")
    with alone(out):
        work = work.ready(labels, out)
        counts = tasks.write(corpus, rows_per_task=config.rows_per_task, min_labels=config.min_labels)
        write_manifest_failures(out, corpus)
    num_clips = counts["num_clips"] if part == WHOLE else sum(rows for task, rows in tasks.num_rows() if part.has(task))
    progress = PassProgress(out, config.max_failed_fraction, before, num_clips=num_clips, doing=work.doing)
    hand = InHand(hand_folder(out, part) / uuid.uuid4().hex)  # marks of this start alone
    models = tuple(functools.partial(_open, model, hand) if model is not None else None for model in work.models)
    decode = Decode(config, root=corpus.root, out=str(out), sample_rate_hz=work.sample_rate_hz, hand=hand)
    steps = _Steps(config, decode, models, work, work.writer(out, config, hand), hand, part)
    totals = before
    for number in range(_MAX_TURNS):
        if not (missing := missing_tasks(out, totals, part=part)):
            break
        if number:
            _LOGGER.warning(
                "%d tasks lack shards at the end (the first is %d); making them", len(missing), missing[0]["task"]
            )
        _stream(missing, steps, progress)
        totals = read_totals(out, progress.reported, part=part)
    require_complete(out, totals, corpus, counts, part=part)
    wall_s, audio_s = time.perf_counter() - started, totals.audio_s - before.audio_s
    limit = _limit(config, before, totals, wall_s, progress.start_s) if audio_s and part == WHOLE else None
    start = PassStart(wall_s=wall_s, audio_s=audio_s, limit=limit)
    closed = functools.partial(work.manifest, corpus=corpus, config=config, counts=counts, start=start)
    with alone(out):
        return close(out, corpus, config, counts, totals, closed, part)


def _limit(config: PassConfig, before: Totals, after: Totals, wall_s: float, start_s: float) -> PassLimit:
    """The limit of this start, on the cluster as it is now."""
    resources, num_gpus = ray.cluster_resources(), config.num_gpus_per_actor
    times = PassTimes(
        step_s={step: after.step_s[step] - before.step_s[step] for step in STEPS},
        gpu_s=after.gpu_s - before.gpu_s,
        read_wait_s=after.read_wait_s - before.read_wait_s,
        write_wait_s=after.write_wait_s - before.write_wait_s,
        num_cpus=resources.get("CPU", 1.0),
        num_gpus=resources.get("GPU", 0.0) if num_gpus is None or num_gpus else 0.0,
        threads=max(1, int(config.num_cpus_per_actor)),
    )
    return limit_of(times, wall_s=wall_s, start_s=start_s)


class Placement(NamedTuple):
    """Resources of the separator actors."""

    num_gpus: float
    """GPUs of one actor."""
    min_actors: int
    """Actors to start with."""
    max_actors: int
    """Actors that the pool may grow to, also on nodes that join later."""
    waits: bool = False
    """No node has room for an actor yet."""


def choose_placement(config: PassConfig, part: Slice = WHOLE) -> Placement:
    """The actor pool for the cluster as it is now; ``ValueError`` if no actor fits and ``max_actors`` is not set.

    Nobody knows what an autoscaler will add. If ``max_actors`` is set, the pool waits for new nodes. A slice starts
    with its share of the cluster, and its pool grows where the other slices leave room.
    """
    require_connection()
    resources = ray.cluster_resources()
    available_cpus, available_gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
    num_cpus, num_gpus = config.num_cpus_per_actor, config.num_gpus_per_actor
    if num_gpus is None:
        num_gpus = 1.0 if available_gpus else 0.0
    fitting = available_gpus / num_gpus if num_gpus else available_cpus / max(1.0, num_cpus)
    room = int(min(fitting, (available_cpus - _TASK_CPUS) / num_cpus))
    if config.max_actors is not None:
        first = min(config.min_actors or max(1, room // part.count), config.max_actors)
        return Placement(num_gpus, first, config.max_actors, waits=room < 1)
    if num_gpus > available_gpus:
        raise ValueError(
            f"num_gpus_per_actor must be at most the cluster's {available_gpus:g} GPUs, got {num_gpus:g}; set it to 0, "
            "or set max_actors if nodes with GPUs will join"
        )
    if room < 1:
        raise ValueError(
            f"num_cpus_per_actor must leave {_TASK_CPUS:g} of the cluster's {available_cpus:g} CPUs for decoding, got "
            f"{num_cpus:g}; lower it, or set max_actors if nodes will join"
        )
    return Placement(num_gpus, min(config.min_actors or max(1, room // part.count), room), room)


class _Steps(NamedTuple):
    """The steps of a pass."""

    config: PassConfig
    decode: Decode
    models: tuple[Any, ...]
    """What opens each model of the work on a device, or None."""
    work: PassWork
    write: Write
    hand: InHand
    part: Slice


def _open(model: ModelSource[Model], hand: InHand, device: str) -> Model:
    """Open a model in an actor, whose constructor Ray repeats without end if its process dies."""
    mark = f"open-{ray.get_runtime_context().get_actor_id() if ray.is_initialized() else 'here'}"
    deaths = hand.begin(mark)
    if deaths >= MAX_DEATHS:
        what = f"cannot open {model.name} in a worker"
        raise hand.error(what, deaths, "repair it, or give the machine more memory")
    try:
        opened = model.open(device)
    except BaseException as error:  # noqa: BLE001 - whatever a model raises is the reason
        cause = as_exception(error)
        message = f"cannot open {model.name} in a worker ({type(cause).__name__}: {cause}); correct it"
        raise RuntimeError(message) from None
    hand.end(mark, deaths)
    return opened


def _stream(tasks: list[PendingTask], steps: _Steps, progress: PassProgress) -> None:
    """Run tasks, some thousand at a time, and add their reports to the progress."""
    if not tasks:
        return
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True  # the worker's own error, for `_reason`
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # the pass has a display of its own
    try:
        with progress.shown(), _memory_watched(progress):
            for start in range(0, len(tasks), _TASKS_AT_ONCE):
                placement = choose_placement(steps.config, steps.part)  # nodes may have joined
                if placement.waits:
                    _LOGGER.info("no node has room for a separator yet; waiting for one")
                reports = iter(_reports(tasks[start : start + _TASKS_AT_ONCE], steps, placement).iter_rows())
                with closing(reports):  # ends the execution, whose threads must not outlive the connection to Ray
                    for report in reports:
                        progress.add(unpack(report))
    except _MemoryFullError:
        raise RuntimeError(_MEMORY_FULL) from None
    except ray.exceptions.RayError as error:
        reason = _reason(error)
        raise RuntimeError(f"cannot finish the pass ({reason}); start the same command again to resume") from error


class _MemoryFullError(BaseException):
    """Ray's memory monitor ends worker after worker."""


@contextmanager
def _memory_watched(progress: PassProgress) -> Iterator[None]:
    """End the block if no shard is done because Ray ends worker after worker for lack of memory, which it repeats.

    A clip that takes too much memory ends fewer before it fails. Ray Data itself may wait for such a worker, so the
    error is raised in this thread from outside, as an interrupt is.
    """
    thread, over = ctypes.c_ulong(threading.get_ident()), threading.Event()

    def watch() -> None:
        last = (progress.clips_done, time.monotonic(), num_ended_for_memory())
        while not over.wait(_STALL_S / 12):
            clips, since, ended = last
            if progress.clips_done != clips:
                last = (progress.clips_done, time.monotonic(), num_ended_for_memory())
            elif time.monotonic() - since > _STALL_S and num_ended_for_memory() - ended >= _STALL_DEATHS:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(_MemoryFullError))
                return

    watcher = threading.Thread(target=watch, daemon=True, name="memory of the workers")
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def _reports(tasks: list[PendingTask], steps: _Steps, placement: Placement) -> ray.data.Dataset:
    """A report for every shard, when it is on disk."""
    one_shard = {"batch_size": 1, "batch_format": "pyarrow"}
    actors: dict[str, Any] = {
        **one_shard,
        "compute": ray.data.ActorPoolStrategy(min_size=placement.min_actors, max_size=placement.max_actors),
        "num_cpus": steps.config.num_cpus_per_actor,
    }
    # Blocks are made here: Ray's tasks that repartition or inspect tables need a whole CPU of one node.
    blocks = ray.data.from_items(tasks, override_num_blocks=_num_blocks(len(tasks), placement.max_actors))
    decoded = blocks.map_batches(steps.decode, num_cpus=_TASK_CPUS, **one_shard)
    if not placement.num_gpus:
        arguments: tuple[Any, ...] = (steps.write, *steps.models, steps.config)
        return decoded.map_batches(steps.work.actor(writes=True), fn_constructor_args=arguments, **actors)
    arguments = (*steps.models, steps.config, True, steps.hand)
    actors["compute"] = ray.data.ActorPoolStrategy(
        min_size=placement.min_actors,
        max_size=placement.max_actors,
        max_concurrent_calls_per_actor=_SHARDS_AT_ONCE,
        enable_true_multi_threading=True,
    )
    separated = decoded.map_batches(
        steps.work.actor(writes=False), fn_constructor_args=arguments, num_gpus=placement.num_gpus, **actors
    )
    return separated.map_batches(steps.write, num_cpus=_TASK_CPUS, **one_shard)


def _num_blocks(num_tasks: int, num_actors: int) -> int:
    """Blocks for tasks: one for each, or for several where there are many; each costs the command's process time."""
    size = num_tasks // (_BLOCKS_PER_ACTOR * num_actors)
    return math.ceil(num_tasks / min(max(1, size), _MOST_IN_BLOCK))


def _reason(error: Exception) -> str:
    """The line of a worker's traceback that names its last error, without the advice that Ray adds."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return next((line for line in reversed(lines) if re.match(r"[\w.]+(Error|Exception)\b", line)), lines[-1])
