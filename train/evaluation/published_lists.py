"""The published evaluation lists of AudioSep and CLAPSep, read as they are, and the papers' figures from them.

=========  ==========================================  ===========================================================
list       columns                                     audio, at 32 kHz, mono
=========  ==========================================  ===========================================================
AudioSep   idx, caption[, labels], src_wav, noise_wav  segment-IDX.wav is the source and mixture-IDX.wav the mixture
           (Clotho: noise_wav1 twice)
           the same, of AudioSet                       ``src_wav`` ends in source.wav, ``noise_wav`` is the mixture
           file_id, mix_wav, s0_wav, s0_text, s1_wav,  files as named; only ``s0_text`` is asked for
           s1_text (VGGSound)
CLAPSep    source_file, positive_caption, noise_file,  clips cut or padded to 10 s and mixed at 0 dB over all of it;
           negative_caption                            a mixture that peaks above 1 is brought to 0.9, its source too
=========  ==========================================  ===========================================================

AudioSep's tables are the plain SDR's improvement and absolute SI-SDR: means over rows, for MUSIC means of its ten
classes' means, for AudioSet the mean of the classes' medians. CLAPSep's are the improvements of BSS-eval SDR and of
SI-SDR, means over rows. Sources: github.com/Audio-AGI/AudioSep (evaluation/, benchmark.py) and
github.com/Aisaka0v0/CLAPSep (metadata/evaluation, evaluation/eval_audiocaps.py, model/CLAPSep.py). AudioSep's own
figures differ for clips below -100 dBFS, whose energies it raises.
"""

from __future__ import annotations

import csv
import logging
import posixpath
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.audio.decode import decode
from engine.corpus.clips import resolve
from engine.separators import Separator
from train.evaluation.evaluate import Scored, SeparationSystem, SeparatorSystem, score_mixture, summarise
from train.evaluation.mixtures import EvaluationMixture

_LOGGER = logging.getLogger(__name__)

SAMPLE_RATE_HZ = 32000
_LENGTH_S = 10.0
_PEAK = 0.9
_SENTENCE = "the sound of "
_PUBLISHED_FOLDER = re.compile(r"^evaluation/data/[^/]+/")
_MUSIC = frozenset(
    "accordion,acoustic guitar,cello,erhu,flute,saxophone,trumpet,tuba,violin,xylophone".split(",")
)  # the classes that AudioSep's evaluation of MUSIC averages over
_FORMATS = {
    "AudioSep": ("idx", "caption", "src_wav"),
    "AudioSep VGGSound": ("mix_wav", "s0_wav", "s0_text", "s1_text"),
    "CLAPSep": ("source_file", "positive_caption", "noise_file", "negative_caption"),
}
_NUM_SHOWN = 10
_RESAMPLES = 1000
_LOG_EVERY_ROWS = 500


@dataclass(frozen=True, kw_only=True)
class ListRow:
    """One mixture of a list and its one query."""

    query: str = ""
    published: tuple[str, str] | None = None
    """Files of the source and of the mixture."""
    clips: tuple[str, str] | None = None
    """Files of the source and of the noise, to be mixed where nothing is published."""
    other_labels: tuple[str, ...] | None = None
    """What else sounds in the mixture; None: not known."""
    error: str | None = None
    """Why the row cannot be read."""


@dataclass(frozen=True, kw_only=True)
class MixtureList:
    """A list and how its paper sums it up."""

    name: str
    format: str
    rows: tuple[ListRow, ...]
    metrics: tuple[str, ...]
    """Figures that the paper reports."""
    rule: str
    """How it gets one figure of many: ``mean``, ``mean of class means`` or ``mean of class medians``."""


def read_list(path: Path) -> MixtureList:
    """A list in one of the published formats, told by its columns; no audio is opened.

    Raises ValueError for a missing or unreadable file, unknown columns and a list without rows.
    """
    header, table = _read_csv(path)
    names = [name.strip().lower() for name in header]
    kind = next((kind for kind, columns in _FORMATS.items() if set(columns) <= set(names)), None)
    if kind is None or (kind == "AudioSep" and not {"noise_wav", "noise_wav1"} & set(names)):
        known = "; ".join(f"{name}: {', '.join(columns)}" for name, columns in _FORMATS.items())
        raise ValueError(
            f"a mixture list has the columns of a known format ({known}), {path} has {header}: rename them"
        )
    if not table:
        raise ValueError(f"a mixture list has at least one row, {path} has none: fetch it again")
    read = {"AudioSep": _audiosep, "AudioSep VGGSound": _vggsound, "CLAPSep": _clapsep}[kind]
    good = [dict(zip(names, cells, strict=True)) for cells in table if len(cells) == len(names)]
    made = read(path.name, good)
    rows, whole = [], iter(made.rows)
    for cells in table:
        bad = ListRow(error=f"a row has {len(names)} cells, this one has {len(cells)}: quote commas in {cells}")
        rows.append(next(whole) if len(cells) == len(names) else bad)
    return MixtureList(**{**vars(made), "rows": tuple(rows)})


def _read_csv(path: Path) -> tuple[list[str], list[list[str]]]:
    if not path.is_file():
        raise ValueError(f"a mixture list is a CSV file that exists, not {str(path)!r}: check the path")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = [[cell.strip() for cell in row] for row in csv.reader(file, skipinitialspace=True) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"a mixture list is CSV in UTF-8, {path} is not ({error}): convert it") from error
    return (lines[0], lines[1:]) if lines else ([], [])


def _audiosep(name: str, table: Sequence[dict[str, str]]) -> MixtureList:
    metrics = ("sdri_db", "si_sdr_db")
    if table and all(row.get("noise_wav", "").endswith("mixture.wav") for row in table):
        rows = [ListRow(query=row["caption"], published=(row["src_wav"], row["noise_wav"])) for row in table]
        return MixtureList(
            name=name, format="AudioSep AudioSet", rows=tuple(rows), metrics=metrics, rule="mean of class medians"
        )
    caption_of = {} if not table or "labels" in table[0] else {row["src_wav"]: row["caption"] for row in table}
    rows = []
    for row in table:
        noise = row.get("noise_wav")  # absent in Clotho's, which mixes two
        rows.append(
            ListRow(
                query=row["caption"],
                published=(f"segment-{row['idx']}.wav", f"mixture-{row['idx']}.wav"),
                clips=None if noise is None else (row["src_wav"], noise),
                other_labels=(caption_of[noise],) if noise in caption_of else None,
            )
        )
    is_music = {row["caption"] for row in table} <= _MUSIC
    rule = "mean of class means" if is_music else "mean"
    return MixtureList(name=name, format="AudioSep", rows=tuple(rows), metrics=metrics, rule=rule)


def _vggsound(name: str, table: Sequence[dict[str, str]]) -> MixtureList:
    rows = [
        ListRow(query=row["s0_text"], published=(row["s0_wav"], row["mix_wav"]), other_labels=(row["s1_text"],))
        for row in table
    ]
    metrics = ("sdri_db", "si_sdr_db")
    return MixtureList(name=name, format="AudioSep VGGSound", rows=tuple(rows), metrics=metrics, rule="mean")


def _clapsep(name: str, table: Sequence[dict[str, str]]) -> MixtureList:
    """Captions that all are "the sound of X" are classes; of free ones nobody knows what they leave out."""
    captions = [row[column] for row in table for column in ("positive_caption", "negative_caption")]
    are_classes = all(caption.lower().startswith(_SENTENCE) for caption in captions)
    rows = [
        ListRow(
            query=row["positive_caption"],
            clips=(row["source_file"], row["noise_file"]),
            other_labels=(row["negative_caption"],) if are_classes else None,
        )
        for row in table
    ]
    return MixtureList(
        name=name, format="CLAPSep", rows=tuple(rows), metrics=("bss_sdri_db", "si_sdri_db"), rule="mean"
    )


def load_mixture(row: ListRow, folder: Path) -> EvaluationMixture:
    """The mixture of a row at 32 kHz: the published files where they are, else mixed from the clips.

    Raises FileNotFoundError for missing audio, ValueError for audio that cannot be used, paths that leave the folder
    and rows that could not be read.
    """
    return _load(row, *_locate(row, folder))


def _locate(row: ListRow, folder: Path) -> tuple[list[str], bool]:
    """Two files of a row, and whether they are the published source and mixture or clips to mix."""
    if row.error is not None:
        raise ValueError(row.error)
    files = [(paths, paths is row.published) for paths in (row.published, row.clips) if paths is not None]
    for paths, is_published in files:
        found = [path for name in paths if (path := _find(folder, name)) is not None]
        if len(found) == len(paths):
            return found, is_published
    wanted = " or ".join(" and ".join(paths) for paths, _ in files)
    raise FileNotFoundError(f"{folder} has to hold {wanted}: fetch them or name another folder")


def _load(row: ListRow, paths: Sequence[str], is_published: bool) -> EvaluationMixture:
    make = _published if is_published else _mixed
    target_T, rest_T = make(*paths)
    if not np.any(target_T):
        raise ValueError(f"{paths[0]} is silent, and nothing can be measured against silence: leave the row out")
    return EvaluationMixture(
        labels=(row.query,),
        clips=tuple(paths),
        sources_ST=np.stack([target_T, rest_T]).astype(np.float32),
        other_labels=row.other_labels,
    )


def _published(target: str, mixture: str) -> tuple[np.ndarray, np.ndarray]:
    target_T, mix_T = (decode(path, sample_rate_hz=SAMPLE_RATE_HZ) for path in (target, mixture))
    if len(target_T) != len(mix_T):
        raise ValueError(
            f"a source is as long as its mixture, {target} has {len(target_T)} samples and {mixture} {len(mix_T)} "
            f"at {SAMPLE_RATE_HZ} Hz: fetch both again"
        )
    return target_T, mix_T - target_T


def _mixed(target: str, noise: str) -> tuple[np.ndarray, np.ndarray]:
    clips = (decode(path, sample_rate_hz=SAMPLE_RATE_HZ, duration_s=_LENGTH_S) for path in (target, noise))
    num_samples = round(_LENGTH_S * SAMPLE_RATE_HZ)
    return mix_at_0_db(*(np.pad(clip_T, (0, num_samples - len(clip_T))) for clip_T in clips))


def mix_at_0_db(target_T: np.ndarray, noise_T: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Target and noise ``[T]`` of equal energy; where their sum peaks above 1, both are scaled to bring it to 0.9.

    Silence has no level to be brought to and raises ValueError.
    """
    energies = [float(np.sum(np.square(sound_T, dtype=np.float64))) for sound_T in (target_T, noise_T)]
    if min(energies) == 0.0:
        raise ValueError(f"clips mixed at 0 dB both sound, their energies are {energies}: leave the row out")
    noise_T = noise_T * (energies[0] / energies[1]) ** 0.5
    peak = float(np.abs(target_T + noise_T).max())
    gain = _PEAK / peak if peak > 1.0 else 1.0
    return gain * target_T, gain * noise_T


def _find(folder: Path, path: str) -> str | None:
    """The file of a list's path below a folder, which may be AudioSep's repository or one of its data folders."""
    plain = path.replace("\\", "/")
    is_absolute = plain.startswith("/") or "://" in plain or re.match("[A-Za-z]:", plain)
    if not plain or "\0" in plain or is_absolute or posixpath.normpath(plain).split("/")[0] == "..":
        raise ValueError(f"a path in a mixture list leads into the audio folder, not {path!r}: correct the row")
    tries = (resolve(str(folder), name) for name in (plain, _PUBLISHED_FOLDER.sub("", plain)))
    return next((found for found in tries if Path(found).is_file()), None)


def evaluate_list(
    separator: Separator | SeparationSystem,
    mixtures: MixtureList,
    folder: Path,
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """A separator, or an oracle, on a list: the report of `evaluate`, the ``paper``'s figures and what failed.

    ``num_mixtures`` and ``num_failed`` add up to ``num_rows``; ``failures`` are the first of them, row 1 being the
    first after the header. ``num_mixed_here`` mixtures were made from clips, for the published ones are missing.
    Raises ValueError where all rows failed.
    """
    if not folder.is_dir():
        raise ValueError(f"the audio of a mixture list is in a folder that exists, not {str(folder)!r}: check the path")
    estimate = (
        SeparatorSystem(separator, sample_rate_hz=SAMPLE_RATE_HZ) if isinstance(separator, Separator) else separator
    )
    scored: list[Scored] = []
    failures: list[dict[str, Any]] = []
    num_mixed_here = 0
    for number, row in enumerate(mixtures.rows):
        try:
            one, is_published = _score_row(estimate, row, folder, number=number, seed=seed)
            scored.append(one)
            num_mixed_here += row.published is not None and not is_published
        except _FailedRowError as failed:
            failures.append({"row": number + 1, "query": row.query, "reason": failed.reason, "message": str(failed)})
        if (number + 1) % _LOG_EVERY_ROWS == 0:
            _LOGGER.info(f"{number + 1} of {len(mixtures.rows)} rows, {len(failures)} of them failed")
    if not scored:
        first = failures[0]["message"]
        raise ValueError(f"some row of {mixtures.name} can be evaluated, all {len(failures)} failed: first {first}")
    return summarise(scored, seed=seed) | {
        "list": mixtures.name,
        "format": mixtures.format,
        "sample_rate_hz": SAMPLE_RATE_HZ,
        "paper": paper_figures(mixtures, scored, seed=seed),
        "num_rows": len(mixtures.rows),
        "num_mixed_here": num_mixed_here,
        "num_failed": len(failures),
        "num_failed_by_reason": dict(Counter(failure["reason"] for failure in failures)),
        "failures": failures[:_NUM_SHOWN],
    }


class _FailedRowError(Exception):
    """A row that gives no figure; its text says why, in a word its reason."""

    def __init__(self, reason: str, error: Exception) -> None:
        super().__init__(str(error))
        self.reason = reason


def _score_row(
    estimate: SeparationSystem, row: ListRow, folder: Path, *, number: int, seed: int
) -> tuple[Scored, bool]:
    """The scores of a row, and whether its mixture is the published one."""
    try:
        paths, is_published = _locate(row, folder)
    except FileNotFoundError as error:
        raise _FailedRowError("missing audio", error) from error
    except (OSError, ValueError) as error:  # OSError: a name that is too long
        raise _FailedRowError("unusable row", error) from error
    try:
        mixture = _load(row, paths, is_published)
    except (OSError, ValueError) as error:
        raise _FailedRowError("unusable audio", error) from error
    try:
        return score_mixture(estimate, mixture, number=number, seed=seed), is_published
    except ValueError as error:
        raise _FailedRowError("refused by the separator", error) from error


def paper_figures(mixtures: MixtureList, scored: Sequence[Scored], *, seed: int = 0) -> dict[str, Any]:
    """What the list's paper reports, by its own ``rule``; 95 % bounds by the bootstrap over the rows of each class."""
    of_query: dict[str, list[list[float]]] = {}
    for one in scored:
        for label, stem in zip(one.labels, one.stems, strict=True):
            of_query.setdefault(label, []).append([stem[name] for name in mixtures.metrics])
    groups = [np.array(rows) for rows in of_query.values()]
    if mixtures.rule == "mean":
        groups = [np.concatenate(groups)]
    middle = np.median if mixtures.rule == "mean of class medians" else np.mean
    figures_K = np.mean([middle(group_NK, axis=0) for group_NK in groups], axis=0)
    rng, drawn_RK = np.random.default_rng(seed), np.zeros((_RESAMPLES, len(mixtures.metrics)))
    for group_NK in groups:
        for draws in np.array_split(np.arange(_RESAMPLES), -(-len(group_NK) // 1000)):  # bounds the memory
            again_RN = rng.integers(len(group_NK), size=(len(draws), len(group_NK)))
            drawn_RK[draws] += middle(group_NK[again_RN], axis=1) / len(groups)
    bounds = np.percentile(drawn_RK, (2.5, 97.5), axis=0).T.tolist()
    can_vary = max(map(len, groups)) > 1
    return {
        "rule": mixtures.rule,
        **dict(zip(mixtures.metrics, figures_K.tolist(), strict=True)),
        "confidence_95": dict(zip(mixtures.metrics, bounds if can_vary else [None] * len(bounds), strict=True)),
    }
