"""A run: a seed separator, a corpus and a schedule, taken through all iterations; resumes where it was stopped."""

from __future__ import annotations

import functools
import itertools
import logging
import time
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from typing_extensions import TypedDict

from engine.passes.records import claim_files
from engine.passes.slices import SliceName, parse_slice
from engine.passes.tasks import WHOLE
from engine.separators import SeparatorSource, find_encoder, find_separator, load, read_description, save
from engine.settings import Tree, plain
from engine.storage.documents import MAX_SETTINGS_BYTES, bounded, parse_yaml
from engine.storage.files import open_binary, read_record, write_json
from engine.storage.fingerprints import claim
from engine.storage.lock import lock
from engine.storage.paths import Location, Name, location
from train.data.training_data import TrainingData
from train.distil import distil
from tune.config import RunConfig
from tune.inputs import Inputs, claim_inputs, contents_only, resolve
from tune.recipes import run_config
from tune.steps.artifacts import Artifacts
from tune.steps.iteration import IterationRecord, iterate, separate, validate
from tune.steps.judges import prepare_judges
from tune.steps.labels import TAGS, label_first
from tune.steps.work import Work

_LOGGER = logging.getLogger(__name__)


class RunSummary(TypedDict):
    """Summary of a run, as ``summary.json`` has it."""

    iterations: list[IterationRecord]


def run(
    config: RunConfig | Mapping[str, Any] | Name,
    out: Name,
    *,
    retry_failed: bool = False,
    slice: SliceName | None = None,
) -> RunSummary:
    """Take a run through all its iterations in folder ``out``; returns the summary, which is also written there.

    ``config`` is a recipe or YAML file by name, or a mapping of settings as such a file has them (``clearsep settings``
    lists them), which may name its ``recipe``. Ray must be connected (:func:`connect`). Every step leaves its result on
    disk; the same call again resumes after the last finished step. With ``retry_failed`` the failed clips of the
    current iteration are tried again. With ``slice``, such as ``"3/32"``, only that share of the current iteration's
    pass is done, as by :func:`run_pass`; the same call without it continues when all slices are done. Raises
    ``ValueError`` for inputs that cannot work, and if ``out`` is in use, holds a run with other settings (a schedule
    may only grow at its end) or of other audio (its folders may move), or has finished all iterations while
    ``retry_failed`` is set.

    >>> settings = {"recipe": "clearsep", "corpus": "natural.csv", "separator": "separator", "clean": "clips.csv"}
    >>> settings |= {"schedule": [{"min_re_sdr_db": -100}], "distil": {"steps": 2, "mix": {"batch_size": 2}}}
    >>> with cs.connect():
    ...     summary = cs.run(settings, "run")
    >>> [(record["iteration"], record["num_kept"]) for record in summary["iterations"]]
    [(0, 0), (1, 4)]
    """
    config, out = run_config(config), location(out)
    inputs, part = resolve(config), parse_slice(slice, retry_failed=retry_failed)
    with ExitStack() as held:
        if part != WHOLE:
            held.enter_context(lock(out, "slices", wait=True))  # they begin one after another
        held.enter_context(lock(out, "run"))
        is_begun = (out / "config.yaml").is_file()
        claim(
            out / "config.yaml",
            plain(config),
            what="a run",
            comparable=functools.partial(_comparable, num_iterations=_num_claimed(out)),
        )
        claim_inputs(inputs, out, what="a run", is_begun=is_begun)
        of_corpus = "*/corpus/tasks.json" if config.labels is None else f"0/{TAGS}/corpus/tasks.json"
        min_labels = config.engine.min_labels if config.labels is None else 0
        for tasks in (out / "iterations").glob(of_corpus) if part == WHOLE else ():
            claim_files(tasks.parent.parent, inputs.corpus, min_labels=min_labels, retry_failed=retry_failed)
        is_finished = (out / "iterations" / str(len(config.schedule)) / "iteration.json").is_file()
        if is_finished and retry_failed:
            raise ValueError(
                f"cannot retry failed clips of {out} (all its students are trained, so nothing would use their stems); "
                "start a new run, or a pass of the failed clips (separate-corpus)"
            )
        work = begin(config, inputs, out) if not is_finished else None
        if work is not None and part == WHOLE:
            _run_iterations(work, retry_failed=retry_failed)
        summary = summarise(out)
    if work is not None and part != WHOLE:
        number, teacher = _current(work)
        separate(work, number, teacher, slice=slice)
        _LOGGER.info("when all slices are done, the same command without --slice continues the run")
    return summary


def _num_claimed(out: Location) -> int | None:
    """Iterations of the run that is in ``out``; ``None`` if there is none."""
    path = out / "config.yaml"
    if not path.is_file():
        return None
    try:
        with open_binary(path) as file:
            return len(parse_yaml(bounded(file, MAX_SETTINGS_BYTES))["schedule"])
    except (ValueError, TypeError, KeyError):
        return None  # claim says what is wrong with the file


def _comparable(settings: Mapping[str, Any], *, num_iterations: int | None) -> Tree:
    """The settings that decide the results of the iterations that were claimed before."""
    schedule = settings.get("schedule")
    return contents_only(settings) | {"schedule": schedule[:num_iterations] if isinstance(schedule, list) else schedule}


def _run_iterations(work: Work, *, retry_failed: bool) -> None:
    folder = work.artifacts.out / "iterations"
    first, teacher = _current(work)
    for number, thresholds in enumerate(work.config.schedule[first - 1 :], first):
        record, teacher = iterate(work, number, thresholds, teacher, retry_failed=retry_failed)
        retry_failed = False
        write_json(folder / str(number) / "iteration.json", record)
        summarise(work.artifacts.out)


def _current(work: Work) -> tuple[int, SeparatorSource]:
    """The first iteration that is not finished, and its teacher."""
    folder = work.artifacts.out / "iterations"
    number = next(number for number in itertools.count(1) if not (folder / str(number) / "iteration.json").is_file())
    if work.labels is not None:
        work.labels = folder / str(number - 1) / "labels"
    return number, work.seed if number == 1 else find_separator(folder / str(number - 1) / "separator")


def begin(config: RunConfig, inputs: Inputs, out: Location) -> Work:
    """Make, or find in ``out``, everything before iteration 1: the seed with its figures, and the judges."""
    started, folder = time.perf_counter(), out / "iterations" / "0"
    seed = _seed(config, inputs, folder / "separator")
    work = Work(config=config, inputs=inputs, artifacts=Artifacts(out=out), seed=seed)
    if not (folder / "iteration.json").is_file():
        record: IterationRecord = {
            "iteration": 0,
            "num_clips": 0,
            "num_set_aside": 0,
            "num_queries": 0,
            "num_stems": 0,
            "num_kept": 0,
            "num_rejected": {},
            "num_failed": 0,
            "kept_h": 0.0,
            "thresholds": {},
            "validation": validate(work, 0, seed, folder, inputs.validation),
            "wall_s": 0.0,
        }
        if not seed.is_trainable:
            record["separator"] = seed.name
        record["wall_s"] = time.perf_counter() - started
        write_json(folder / "iteration.json", record)
        summarise(out)
    work.judges = prepare_judges(config, inputs, seed, out)
    if config.labels is not None:
        work.labels, labels = label_first(work, folder)
        first = read_record(folder / "iteration.json", IterationRecord, needs=["iteration"])
        write_json(folder / "iteration.json", {**first, "labels": labels})
        summarise(out)
    return work


def _seed(config: RunConfig, inputs: Inputs, folder: Location) -> SeparatorSource:
    """The separator of iteration 0: the given one, copied to ``folder`` if it is a checkpoint, or one trained there."""
    given = inputs.separator
    if given is not None and not given.is_trainable:
        return given
    if not (folder / "separator.json").is_file():
        if given is not None:
            queries = find_encoder(given.name)
            about = {"queries": dict(queries)} if queries is not None else {}
            save(load(given.name), folder, history=read_description(given.name)["history"], about=about)
        else:
            _LOGGER.info(f"iteration 0: training the seed for {config.seed_training.steps} steps")
            distil(
                folder,
                data=TrainingData(clean=inputs.clean),
                config=config.seed_training,
                network=config.network,
                validation=inputs.training_validation,
                text_encoder=config.text_encoder,
            )
    return find_separator(folder)


def summarise(out: Location) -> RunSummary:
    """Gather the finished iterations of a run into its ``summary.json``."""
    folders = {int(path.parent.name): path for path in (out / "iterations").glob("*/iteration.json")}
    records = [read_record(folders[number], IterationRecord, needs=["iteration"]) for number in sorted(folders)]
    summary: RunSummary = {"iterations": records}
    write_json(out / "summary.json", summary)
    return summary
