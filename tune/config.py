"""Settings of a run, with names as the user wrote them; :mod:`tune.inputs` resolves these."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated

from pydantic import BeforeValidator

from engine.passes.config import PassConfig
from engine.selection.thresholds import Thresholds, moves_labels
from engine.separators import NetworkConfig
from engine.settings import NEWER, RUNTIME, CountOrZero, Fraction, config
from train.evaluation.mixtures import ValidationConfig
from train.judges.calibrate import CalibrationConfig
from train.judges.tagger import TaggerConfig
from train.student import DistilConfig
from tune.schedule import resolve_shapes


@config
class LabelConfig:
    """Labels of a corpus that has none, or weak or wrong ones; the thresholds ``drop_label_below`` and
    ``add_label_from`` move them in every iteration."""

    precision: Fraction = 0.7
    """Precision asked of the labels that the tagger gives to clips without labels, measured in the calibration."""
    num_tentative: CountOrZero = 2
    """Labels of a clip, at most, that a pass also queries to find out whether they sound; the likeliest ones.

    Their stems become tracks only if ``add_label_from`` accepts the label. A clip without labels has at least one.
    """
    presence: str | None = None
    """Folder of a calibrated presence model; null: one is calibrated on ``clean``."""
    ontology: str | None = None
    """AudioSet's ``ontology.json``, or a file with lines such as ``bark: [dog]``; of a label and its kinds only the
    lowest are given."""


@config
class RunConfig:
    """Everything that decides what a run does."""

    corpus: str
    """Natural clips with their labels: a manifest, AudioSet's segment CSV, or a folder with a subfolder per label."""
    class_map: str | None = None
    """AudioSet's ``class_labels_indices.csv``; only for AudioSet's segment CSV."""
    audio_root: str | None = None
    """Folder of the corpus' audio files; null: the folder of its manifest."""
    columns: str | None = None
    """Names of columns in the corpus' manifest, such as ``path=fname,labels=tags``; null: path, labels and so on."""
    allow_outside: Annotated[bool, RUNTIME] = False
    """Whether the lists of this run may name files outside their folders (or ``audio_root``), for lists you trust."""
    clean: str | None = None
    """Single-source clips, CSV ``path,label[,fold]`` or a folder with a subfolder per label.

    The seed is trained on them, and every distillation mixes them with its tracks.
    """
    clean_folds: tuple[int, ...] | None = None
    """Folds of ``clean`` to use; null: all."""
    clean_columns: str | None = None
    """Names of columns in the list ``clean``, such as ``path=filename,label=category``; null: path, label and fold."""
    clean_audio_root: str | None = None
    """Folder of the audio files of ``clean``; null: the folder of its list."""
    separator: str | None = None
    """Seed: a checkpoint folder, or the dotted name ``package.module:factory`` of a separator of your own.

    A folder of the built-in network is trained further. With any other (one that ``clearsep convert`` made, or your
    own) the student of iteration 1 is trained from scratch. Null: the seed is trained on ``clean``.
    """
    text_encoder: Annotated[str | None, NEWER] = None
    """Separators that are trained from scratch read text: the folder of a CLAP, or of a separator that has one; null:
    their queries are labels."""
    network: NetworkConfig = field(default_factory=NetworkConfig)
    """Architecture of a separator that is trained from scratch."""
    seed_training: DistilConfig = field(default_factory=lambda: DistilConfig(steps=1600))
    """Training of the seed, if ``separator`` is null."""
    engine: PassConfig = field(default_factory=PassConfig)
    """Separation and scoring of the corpus, in every iteration."""
    schedule: Annotated[tuple[Thresholds, ...], BeforeValidator(resolve_shapes)] = (
        Thresholds(min_re_sdr_db=10.0),
        Thresholds(min_re_sdr_db=15.0),
    )
    """Thresholds of every iteration: a list with one mapping for each iteration, or a mapping of ``iterations`` and a
    shape for each threshold (see ``tune/schedule.py``)."""
    estimator: str | None = None
    """Folder of a calibrated SI-SDR estimator; null: one is calibrated on ``clean`` if the schedule needs it."""
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    """Calibration of that estimator, if ``estimator`` is null."""
    tagger: str | None = None
    """Folder of a tagger (built-in, of Hugging Face or a CLAP), or a file that maps labels to its classes; null: one is
    trained on ``clean`` if the schedule needs it."""
    labels: Annotated[LabelConfig | None, NEWER] = None
    """Labels that a tagger gives and the evidence of passes moves; null: clips have the labels of the corpus."""
    tagger_training: TaggerConfig = field(default_factory=TaggerConfig)
    """Training of that tagger, if ``tagger`` is null."""
    distil: DistilConfig = field(default_factory=DistilConfig)
    """Training of every student from its teacher."""
    validation: ValidationConfig | None = None
    """Mixtures on which the separator of every iteration is measured; null: none."""
    training_validation: ValidationConfig | None = None
    """Mixtures on which a student is measured while it learns, and by which ``patience`` chooses; null: none.

    Use other clips than those of ``validation``, so that its figures stay independent of the choice.
    """

    def __post_init__(self) -> None:
        if not self.corpus:
            raise ValueError("corpus must be the path of a manifest or folder, got an empty text; set corpus=PATH")
        if self.separator is None and self.clean is None:
            raise ValueError("separator or clean must be set, got neither; give a seed, or clean clips to train one")
        if self.labels is None and any(map(moves_labels, self.schedule)):
            raise ValueError(
                "labels must be set for a schedule with drop_label_below, add_label_from or event_from, got null; set "
                "labels.precision=0.7, or remove those thresholds"
            )
        patient = any(training.patience is not None for training in (self.distil, self.seed_training))
        if patient and self.training_validation is None:
            raise ValueError("training_validation must be set for patience, got null; set its clips, or patience=null")
