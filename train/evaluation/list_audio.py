"""Audio of a published evaluation list: the published mixtures, or mixtures made here from the clips."""

from __future__ import annotations

import functools
import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.audio.decoder import shared_decoder
from engine.audio.levels import is_silent
from engine.corpus.roots import resolve
from train.evaluation.list_formats import ListRow
from train.evaluation.mixtures import EvaluationMixture

SAMPLE_RATE_HZ = 32000
"""Sample rate of all lists."""
_LENGTH_S = 10.0
_PEAK = 0.9
_PUBLISHED_FOLDER = re.compile(r"^evaluation/data/[^/]+/")


@dataclass(frozen=True, kw_only=True)
class ListAudio:
    """The two files of a row."""

    paths: tuple[str, str]
    """The source, and the mixture or the noise."""
    is_published: bool
    """True for the published source and mixture, False for clips to mix."""


def locate(row: ListRow, folder: Path) -> ListAudio:
    """Files of a row in a folder: the published ones if both exist, else the clips.

    Raises ``FileNotFoundError`` for missing audio, ``ValueError`` for an unreadable row and a path outside the folder.
    """
    if row.error is not None:
        raise ValueError(row.error)
    files = [(paths, paths is row.published) for paths in (row.published, row.clips) if paths is not None]
    for (first, second), is_published in files:
        source, other = _find(folder, first), _find(folder, second)
        if source is not None and other is not None:
            return ListAudio(paths=(source, other), is_published=is_published)
    wanted = " or ".join(" and ".join(paths) for paths, _ in files)
    raise FileNotFoundError(f"cannot find {wanted} in {folder} (no such files); download them or give another folder")


def load_mixture(row: ListRow, audio: ListAudio) -> EvaluationMixture:
    """The mixture of a row at 32 kHz; raises ``ValueError`` for audio that cannot be used."""
    make = _published if audio.is_published else _mixed
    target_T, rest_T = make(*audio.paths)
    if is_silent(target_T, sample_rate_hz=SAMPLE_RATE_HZ):
        raise ValueError(f"{audio.paths[0]} must contain sound, got silence; leave the row out")
    return EvaluationMixture(
        labels=(row.query,),
        clips=audio.paths,
        sources_ST=np.stack([target_T, rest_T]).astype(np.float32),
        other_labels=row.other_labels,
    )


def _published(target: str, mixture: str) -> tuple[np.ndarray, np.ndarray]:
    target_T, mix_T = (shared_decoder().decode(path, sample_rate_hz=SAMPLE_RATE_HZ) for path in (target, mixture))
    if len(target_T) != len(mix_T):
        raise ValueError(
            f"a source must be as long as its mixture, got {len(target_T)} samples of {target} and {len(mix_T)} of "
            f"{mixture} at {SAMPLE_RATE_HZ} Hz; download both again"
        )
    return target_T, mix_T - target_T


def _mixed(target: str, noise: str) -> tuple[np.ndarray, np.ndarray]:
    decode = functools.partial(shared_decoder().decode, sample_rate_hz=SAMPLE_RATE_HZ, duration_s=_LENGTH_S)
    clips = (decode(path) for path in (target, noise))
    num_samples = round(_LENGTH_S * SAMPLE_RATE_HZ)
    return mix_at_0_db(*(np.pad(clip_T, (0, num_samples - len(clip_T))) for clip_T in clips))


def mix_at_0_db(target_T: np.ndarray, noise_T: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Target and noise ``[T]`` of equal energy; if their sum peaks above 1, both are scaled so that it peaks at 0.9.

    Raises ``ValueError`` for silence, which has no level.
    """
    energies = [float(np.sum(np.square(sound_T, dtype=np.float64))) for sound_T in (target_T, noise_T)]
    if min(energies) == 0.0:
        raise ValueError(f"both clips of a mixture must contain sound, got energies of {energies}; leave the row out")
    noise_T = noise_T * (energies[0] / energies[1]) ** 0.5
    peak = float(np.abs(target_T + noise_T).max())
    gain = _PEAK / peak if peak > 1.0 else 1.0
    return gain * target_T, gain * noise_T


def _find(folder: Path, path: str) -> str | None:
    """The file of a list's path below a folder, which may be AudioSep's repository or one of its data folders."""
    plain = path.replace("\\", "/")
    is_absolute = plain.startswith("/") or "://" in plain or re.match("[A-Za-z]:", plain)
    if not plain or "\0" in plain or is_absolute or posixpath.normpath(plain).split("/")[0] == "..":
        raise ValueError(f"a path in a mixture list must stay in the audio folder, got {path!r}; correct the row")
    tries: Sequence[str] = [resolve(str(folder), name) for name in (plain, _PUBLISHED_FOLDER.sub("", plain))]
    return next((found for found in tries if Path(found).is_file()), None)
