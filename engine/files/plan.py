"""The way to separate files, checked before one is opened: separators, targets and the format of the stems."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from engine.audio.writer import FileFormat
from engine.files.targets import StemQuery, check_targets
from engine.scoring.estimator import SiSdrEstimator, load_estimator
from engine.separators import Separator, SeparatorFactory, find_separator
from engine.separators.base import NetworkSeparator
from engine.storage.factories import own_device
from engine.storage.fingerprints import fingerprint
from engine.storage.paths import Name

_VERSION = 1  # of what decides a stem's samples, besides the separator
AnySeparator: TypeAlias = "Separator | SeparatorFactory | Name"


@dataclass(frozen=True, kw_only=True)
class SeparationPlan:
    """The way to separate every file: opened and checked separators, targets and the format of the stems."""

    separators: tuple[Separator, ...]
    """Several to choose from for each file."""
    targets: tuple[StemQuery, ...]
    file_format: FileFormat
    residual: bool
    complete: bool
    """The targets are all sounds of the inputs."""
    estimator: SiSdrEstimator | None
    overwrite: bool
    device: str
    identity: str
    """Equal for plans that give equal stems of equal targets."""

    @property
    def has_choice(self) -> bool:
        """Several separators, or several queries of one stem."""
        return len(self.separators) > 1 or any(len(target.alternatives) > 1 for target in self.targets)


def plan_separation(
    targets: Sequence[StemQuery],
    *,
    separator: AnySeparator | Sequence[AnySeparator],
    file_format: FileFormat = "wav",
    residual: bool = False,
    complete: bool = False,
    estimator: SiSdrEstimator | Name | None = None,
    overwrite: bool = False,
    device: str = "auto",
) -> SeparationPlan:
    """Open separators and check queries. Raises ``ValueError`` for whatever cannot work with any file."""
    if file_format not in ("wav", "flac"):
        raise ValueError(f"the format of stems must be wav or flac, got {file_format!r}; choose one")
    if complete and (len(targets) < 2 or residual):
        got = "a residual" if residual else "one"
        raise ValueError(
            f"a complete set of queries must be two or more without a residual, got {got}; name every sound, or leave "
            "it out"
        )
    device = _device(device)
    several = separator if isinstance(separator, list | tuple) else [separator]
    opened = [_opened(one, device) for one in several]
    for one, _ in opened:
        check_targets(targets, one)  # makes their embeddings
        if isinstance(one, NetworkSeparator) and one.embedder is not None:
            one.embedder.release()
    if estimator is not None and not isinstance(estimator, SiSdrEstimator):
        estimator = load_estimator(estimator)
    plan = SeparationPlan(
        separators=tuple(one for one, _ in opened),
        targets=tuple(targets),
        file_format=file_format,
        residual=residual,
        complete=complete,
        estimator=estimator,
        overwrite=overwrite,
        device=device,
        identity=fingerprint([_VERSION, file_format, [identity for _, identity in opened]]),
    )
    if plan.has_choice and estimator is None:
        raise ValueError("the best of several must be chosen by an estimator, got none; give one (`--estimator DIR`)")
    return plan


def _device(name: str) -> str:
    if name == "auto":
        return own_device()
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"the device must be one of this machine, got {name} where PyTorch finds no GPU; choose cpu")
    return name


def _opened(separator: AnySeparator | Sequence[AnySeparator], device: str) -> tuple[Separator, str]:
    """A separator and its fingerprint; one that an object does not have is different each time."""
    if isinstance(separator, Separator) and not isinstance(separator, type):
        return separator, str(getattr(separator, "fingerprint", "") or uuid.uuid4())
    source = find_separator(separator)  # type: ignore[arg-type]
    return source.open(device), source.fingerprint
