"""A run: a seed separator, a corpus and a schedule, taken through all iterations; goes on where it was stopped."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import yaml

from engine.clip_table import Corpus
from engine.corpus import read_corpus, read_sources
from engine.filter import Thresholds
from engine.gauges import tell_kept, tell_validation
from engine.iteration import pass_identity, require_clips, run_pass
from engine.lock import held
from engine.schema import plain_label
from engine.separators import NetworkConfig, load, read_description, save
from engine.shards import write_tracks
from engine.stages import PassConfig
from engine.storage import Location, Name, differences, fingerprint, location, read_json, write_bytes, write_json
from train.calibrate import CalibrationConfig
from train.distil import HOW, Material, distil, training_identity
from train.evaluate import Mixture, ValidationConfig, draw_mixtures, estimator, evaluate
from train.student import DistilConfig
from train.tagger import TaggerConfig
from tune.pieces import Pieces
from tune.quality import Judges, check_judges, prepare_judges


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides what a run does."""

    corpus: str
    """Natural clips with their labels: a manifest, AudioSet's segment CSV, or a folder of folders by label."""
    class_map: str | None = None
    """AudioSet's ``class_labels_indices.csv``, for its segment CSV."""
    audio_root: str | None = None
    """Where AudioSet's audio files are; null: beside its CSV."""
    clean: str | None = None
    """Single-source clips, CSV ``path,label[,fold]``: they train the seed and are mixed into every distillation."""
    clean_folds: tuple[int, ...] | None = None
    """Folds of ``clean``; null: all."""
    separator: str | None = None
    """Checkpoint folder of the seed; null: a seed is trained from the clean clips."""
    network: NetworkConfig = field(default_factory=NetworkConfig)
    """Shape of a seed that is trained here."""
    seed_training: DistilConfig = field(default_factory=lambda: DistilConfig(steps=1600))
    """How that seed is trained."""
    engine: PassConfig = field(default_factory=PassConfig)
    """How every iteration separates the corpus."""
    schedule: tuple[Thresholds, ...] = (Thresholds(min_re_sdr_db=10.0), Thresholds(min_re_sdr_db=15.0))
    """Thresholds of every iteration, whose number is the number of iterations.

    In settings also a mapping of ``iterations`` and a shape for every threshold: see ``tune.schedule``.
    """
    quality: str | None = None
    """Folder of a calibrated estimator; null: one is calibrated on the clean clips where the schedule asks for it."""
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    """How that estimator is calibrated."""
    tagger: str | None = None
    """Folder of a tagger, built-in or of Hugging Face; null: trained on the clean clips where the schedule asks."""
    tagger_training: TaggerConfig = field(default_factory=TaggerConfig)
    """How that tagger is trained."""
    distil: DistilConfig = field(default_factory=DistilConfig)
    """How every student is trained from its teacher."""
    validation: ValidationConfig | None = None
    """Mixtures on which every separator is measured; null: none."""
    training_validation: ValidationConfig | None = None
    """Mixtures that students are followed on as they learn, and chosen by under ``patience``; null: none.

    Other clips than those of ``validation``, or its figures are of what was chosen by them.
    """

    def __post_init__(self) -> None:
        if not self.corpus:
            raise ValueError("corpus is missing; name the manifest or folder of natural clips: --set corpus=PATH")
        if self.separator is None and self.clean is None:
            raise ValueError("a run starts from a separator, or from clean clips to train one; set separator or clean")
        patient = any(training.patience is not None for training in (self.distil, self.seed_training))
        if patient and self.training_validation is None:
            raise ValueError("patience chooses by training_validation; set its clips, or leave patience null")


Say = Callable[[str], None]


@dataclass(kw_only=True)
class Work:
    """A run as it goes."""

    config: RunConfig
    """What it does."""
    corpus: Corpus
    """What ``config`` names."""
    pieces: Pieces
    """Where its pieces lie."""
    judges: Judges
    """What its stems are judged with."""
    say: Say
    """Where it tells how it goes."""
    distil: Callable[..., dict[str, Any]] = distil
    """What trains its students: :func:`train.distil.distil`, here or elsewhere."""
    mixtures: list[Mixture] = field(default_factory=list)
    """Those of its validation, once they are drawn."""


def run(config: RunConfig, out: Name, *, retry_failed: bool = False, say: Say = print) -> dict[str, Any]:
    """Take a run through all its iterations in folder ``out``; returns the summary that is kept in ``summary.json``.

    Every step leaves its result on disk; the same call again goes on after the last one that is whole. With
    ``retry_failed`` the clips that failed in the iteration at hand are tried again. Raises ``ValueError`` where ``out``
    is in use, holds a run of another config, other than one whose schedule this one continues, or has all its
    iterations behind it and nothing to try again.
    """
    out = location(out)
    corpus = check(config)
    with held(out, "run"):
        _claim(config, out)
        if retry_failed and (out / "iterations" / str(len(config.schedule)) / "iteration.json").is_file():
            raise ValueError(
                f"all iterations of {out} are done and their students have learned: a clip that is separated now "
                "changes nothing; start a new run, or a pass of the failed clips (separate-corpus)"
            )
        work = begin(config, corpus, out, say)
        for number, thresholds in enumerate(config.schedule, 1):
            folder = out / "iterations" / str(number)
            if not (folder / "iteration.json").is_file():
                teacher = out / "iterations" / str(number - 1) / "separator"
                entry, _ = iterate(work, number, thresholds, teacher, retry_failed=retry_failed)
                retry_failed = False
                write_json(folder / "iteration.json", entry)
                summarise(out)
        return summarise(out)


def begin(config: RunConfig, corpus: Corpus, out: Location, say: Say) -> Work:
    """Make, or find in ``out``, what comes before the first iteration: the seed, its figures, and the judges."""
    work = Work(config=config, corpus=corpus, pieces=Pieces(out=out), judges=Judges(), say=say)
    _seed(work)
    work.judges = prepare_judges(config, out, say)
    return work


def absolute(config: RunConfig) -> RunConfig:
    """The run with its inputs named as processes in other folders understand them."""
    names = ("corpus", "class_map", "audio_root", "clean", "separator", "quality", "tagger")
    found: dict[str, Any] = {name: str(location(value)) for name in names if (value := getattr(config, name))}
    for name in ("validation", "training_validation"):
        validation: ValidationConfig | None = getattr(config, name)
        found[name] = validation and replace(validation, clips=str(location(validation.clips)))
    return replace(config, **found)


def check(config: RunConfig) -> Corpus:
    """Read all inputs before anything is made or trained; ``ValueError`` for what could only fail hours later."""
    corpus = read_corpus(config.corpus, class_map=config.class_map, audio_root=config.audio_root)
    require_clips(corpus, config.engine)
    check_judges(config)
    labels: list[str] = []
    if config.clean is not None:
        labels = read_sources(config.clean, folds=config.clean_folds)["label"].to_pylist()
    if config.separator is not None:
        labels = read_description(config.separator)["labels"]
    known = {plain_label(label) for label in labels}
    for name in ("validation", "training_validation"):
        validation: ValidationConfig | None = getattr(config, name)
        if validation is None:
            continue
        wanted = set(read_sources(validation.clips, folds=validation.folds)["label"].to_pylist())
        if unknown := sorted(label for label in wanted if plain_label(label) not in known):
            raise ValueError(f"{name} has clips of {unknown}, which the seed cannot know; take them out of its clips")
    return corpus


def _claim(config: RunConfig, out: Location) -> None:
    """Store the resolved config, or compare it with the one that is there."""
    path = out / "config.yaml"
    wanted = yaml.safe_load(yaml.safe_dump(_plain(asdict(config))))
    if path.is_file():
        found = yaml.safe_load(path.read_text())
        done = len(found.get("schedule", []))
        comparable = wanted | {"schedule": wanted["schedule"][:done]}
        if changed := differences(_deciding(found), _deciding(comparable)):
            raise ValueError(f"{out} holds a run with another {changed}; give another folder")
    write_bytes(path, yaml.safe_dump(wanted, sort_keys=False).encode())


def _deciding(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without those that say only how fast a pass is and when it gives up: they may change as a run goes."""
    kept = PassConfig().identity()
    found = settings | {"engine": {key: value for key, value in settings.get("engine", {}).items() if key in kept}}
    for name in ("distil", "seed_training"):
        found[name] = {key: value for key, value in settings.get(name, {}).items() if key not in HOW}
    return found


def _plain(value: Any) -> Any:  # noqa: ANN401 - walks any JSON-like value
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _seed(work: Work) -> None:
    """Iteration 0: a separator and its validation."""
    config, folder = work.config, work.pieces.place("seed", 0, None)
    if (folder / "iteration.json").is_file():
        return
    started = time.perf_counter()
    if config.separator is not None:
        history = read_description(config.separator)["history"]
        save(load(config.separator), folder / "separator", history=history)
    else:
        work.say(f"iteration 0: training the seed for {config.seed_training.steps} steps")
        distil(
            folder / "separator",
            material=Material(clean=config.clean, clean_folds=config.clean_folds),
            config=config.seed_training,
            network=config.network,
            validation=config.training_validation,
            say=work.say,
        )
    counts = {
        "num_clips": 0,
        "num_set_aside": 0,
        "num_queries": 0,
        "num_stems": 0,
        "num_kept": 0,
        "num_rejected": {},
        "num_failed": 0,
        "kept_h": 0.0,
    }
    entry = {"iteration": 0, **counts, "thresholds": {}, "validation": validate(work, 0, folder / "separator")}
    write_json(folder / "iteration.json", entry | {"wall_s": time.perf_counter() - started})
    summarise(work.pieces.out)


def iterate(
    work: Work, number: int, thresholds: Thresholds, teacher: Location, *, retry_failed: bool = False
) -> tuple[dict[str, Any], Location]:
    """Separate, score, filter, distil, evaluate; returns what is recorded of the iteration, and its separator.

    ``cost_s`` of the record is the wall time of all its pieces, whoever made them.
    """
    started = time.perf_counter()
    stems, engine = _pass(work, number, teacher, retry_failed=retry_failed)
    selection, tracks = _select(work, number, thresholds, stems)
    if not tracks["num_kept"]:
        raise ValueError(
            f"iteration {number} kept none of {tracks['num_stems']} stems (rejected: {tracks['num_rejected']}, failed: "
            f"{engine['num_failed']}); loosen its thresholds in a new run, or look with `clearsep inspect {stems}`"
        )
    tell_kept(number, num_kept=tracks["num_kept"], num_stems=tracks["num_stems"])
    work.say(f"iteration {number}: kept {tracks['num_kept']} of {tracks['num_stems']} stems; distilling")
    separator, training = _distil(work, number, teacher, selection)
    names = ("num_clips", "num_set_aside", "num_queries", "num_stems", "num_failed", "audio_h")
    entry = {"iteration": number, **{name: engine[name] for name in names}}
    names = ("num_kept", "num_kept_by_floor", "num_rejected", "kept_h", "kept_by_label", "thresholds")
    entry["estimated_si_sdr_db"] = tracks["kept_estimated_si_sdr_db"]  # null where nothing asked for an estimate
    entry |= {name: tracks[name] for name in names} | {"validation": validate(work, number, separator)}
    entry |= {"cost_s": engine["wall_s"] + training["wall_s"], "wall_s": time.perf_counter() - started}
    return entry, separator


def _pass(work: Work, number: int, teacher: Location, *, retry_failed: bool) -> tuple[Location, dict[str, Any]]:
    """Separate and score the corpus; returns the pass's folder and its summary."""
    config, tagger = work.config, work.judges.tagger
    inputs = pass_identity(
        work.corpus, separator=read_description(teacher)["fingerprint"], tagger=tagger, config=config.engine
    )
    folder = work.pieces.place("passes", number, inputs)
    if retry_failed and (folder / "separator" / "separator.json").is_file():
        raise ValueError(
            f"the student of iteration {number} of {work.pieces.out} has learned already, from tracks that other clips "
            "would change; start the command without --retry-failed to go on, or delete the iteration's separator"
        )
    with work.pieces.making(folder, alone="passes"):  # a pass wants the whole cluster, two would starve each other
        work.say(f"iteration {number}: separating {config.corpus}")
        engine = run_pass(
            work.corpus, folder, separator=teacher, tagger=tagger, config=config.engine, retry_failed=retry_failed
        )
        shares = ", ".join(f"{step} {share:.0%}" for step, share in engine["step_fraction"].items())
        work.say(f"iteration {number}: {engine['audio_s_per_s']:.0f} s of audio per second ({shares})")
    return folder, engine


def _select(work: Work, number: int, thresholds: Thresholds, stems: Location) -> tuple[Location, dict[str, Any]]:
    """Decide what is kept; returns the selection's folder and its manifest."""
    quality = work.judges.quality
    judge = quality.fingerprint if quality else None
    inputs = [read_json(stems / "stems" / "manifest.json")["fingerprint"], asdict(thresholds), judge]
    folder = work.pieces.place("tracks", number, inputs) / "tracks"
    with work.pieces.making(folder.parent):
        if work.pieces.shared and (folder / "manifest.json").is_file():
            return folder, read_json(folder / "manifest.json")
        manifest = write_tracks(
            stems / "stems",
            folder,
            thresholds,
            estimate=quality.estimate if quality else None,
            estimator_fingerprint=judge,
        )
    return folder, manifest


def _distil(work: Work, number: int, teacher: Location, tracks: Location) -> tuple[Location, dict[str, Any]]:
    """Train the student; returns its folder and what its history says of the training."""
    config = work.config
    material = Material(clean=config.clean, clean_folds=config.clean_folds, tracks=str(tracks))
    training: dict[str, Any] = {
        "material": material,
        "config": config.distil,
        "start": teacher,
        "validation": config.training_validation,
    }
    folder = work.pieces.place("separators", number, training_identity(**training)) / "separator"
    with work.pieces.making(folder.parent):
        entry = work.distil(folder, **training, say=work.say)
    return folder, entry


def validate(work: Work, number: int, separator: Location) -> dict[str, Any] | None:
    """Figures of an iteration's separator on the run's validation; null where it has none."""
    config = work.config.validation
    if config is None:
        return None
    kept = separator.parent / f"validation-{fingerprint(asdict(config))}.json"
    with work.pieces.making(separator.parent):
        if work.pieces.shared and kept.is_file():
            figures: dict[str, Any] = read_json(kept)
            return figures
        loaded = load(separator)
        if not work.mixtures:
            work.mixtures.extend(draw_mixtures(config, sample_rate_hz=loaded.sample_rate_hz))
        figures = evaluate(estimator(loaded), work.mixtures)
        if work.pieces.shared:
            write_json(kept, figures)
    tell_validation(number, figures["sdri_db"])
    work.say(f"iteration {number}: validation SDRi {figures['sdri_db']:.2f} dB")
    return figures


def summarise(out: Location) -> dict[str, Any]:
    """Gather the finished iterations of a run into its ``summary.json``."""
    folders = {int(path.parent.name): path for path in (out / "iterations").glob("*/iteration.json")}
    summary = {"iterations": [read_json(folders[number]) for number in sorted(folders)]}
    write_json(out / "summary.json", summary)
    return summary
