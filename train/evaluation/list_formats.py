"""The published evaluation lists of AudioSep and CLAPSep, read without any change.

=========  ==========================================  ===========================================================
list       columns                                     audio, at 32 kHz, mono
=========  ==========================================  ===========================================================
AudioSep   idx, caption[, labels], src_wav, noise_wav  segment-IDX.wav is the source and mixture-IDX.wav the mixture
           (Clotho: noise_wav1 twice)
           the same, of AudioSet                       ``src_wav`` ends in source.wav, ``noise_wav`` is the mixture
           file_id, mix_wav, s0_wav, s0_text, s1_wav,  files as named; only ``s0_text`` is a query
           s1_text (VGGSound)
CLAPSep    source_file, positive_caption, noise_file,  clips cut or padded to 10 s and mixed at 0 dB over all of it;
           negative_caption                            a mixture that peaks above 1 is brought to 0.9, its source too
=========  ==========================================  ===========================================================

AudioSep reports the improvement of the plain SDR and the absolute SI-SDR: means over rows, for MUSIC means of the means
of its ten classes, for AudioSet the mean of the classes' medians. CLAPSep reports the improvements of BSS-eval SDR and
of SI-SDR, means over rows. Sources: github.com/Audio-AGI/AudioSep (evaluation/, benchmark.py) and
github.com/Aisaka0v0/CLAPSep (metadata/evaluation, evaluation/eval_audiocaps.py, model/CLAPSep.py). AudioSep's own
figures differ for clips below -100 dBFS, whose energies it raises.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.storage.documents import bounded

_MAX_LIST_BYTES = 1 << 24  # a hundred times the longest published list
_SENTENCE = "the sound of "
_MUSIC = frozenset(
    "accordion,acoustic guitar,cello,erhu,flute,saxophone,trumpet,tuba,violin,xylophone".split(",")
)  # the classes of AudioSep's evaluation on MUSIC
_FORMATS = {
    "AudioSep": ("idx", "caption", "src_wav"),
    "AudioSep VGGSound": ("mix_wav", "s0_wav", "s0_text", "s1_text"),
    "CLAPSep": ("source_file", "positive_caption", "noise_file", "negative_caption"),
}

_Cells = dict[str, str]
"""Cells of a row by the name of their column."""


@dataclass(frozen=True, kw_only=True)
class ListRow:
    """One mixture of a list and its one query."""

    query: str = ""
    """The query."""
    published: tuple[str, str] | None = None
    """Files of the source and of the mixture."""
    clips: tuple[str, str] | None = None
    """Files of the source and of the noise, to be mixed if the published files are missing."""
    other_labels: tuple[str, ...] | None = None
    """Labels of the other sounds in the mixture; None: unknown."""
    error: str | None = None
    """Why the row cannot be read; None if it can."""


@dataclass(frozen=True, kw_only=True)
class MixtureList:
    """A list and how its paper averages it."""

    name: str
    """Name of the file."""
    format: str
    """Name of the format."""
    rows: tuple[ListRow, ...]
    """All rows, in order."""
    metrics: tuple[str, ...]
    """Figures that the paper reports."""
    rule: str
    """How the paper averages: ``mean``, ``mean of class means`` or ``mean of class medians``."""


def read_list(path: Path) -> MixtureList:
    """A list in one of the published formats, recognised by its columns; no audio is opened.

    Raises ``ValueError`` for a missing or unreadable file, unknown columns and a list without rows.
    """
    header, table = _read_csv(path)
    names = [name.strip().lower() for name in header]
    kind = next((kind for kind, columns in _FORMATS.items() if set(columns) <= set(names)), None)
    if kind is None or (kind == "AudioSep" and not {"noise_wav", "noise_wav1"} & set(names)):
        known = "; ".join(f"{name}: {', '.join(columns)}" for name, columns in _FORMATS.items())
        raise ValueError(f"{path} must have the columns of a known format ({known}), got {header}; rename them")
    if not table:
        raise ValueError(f"{path} must have at least one row, got none; download it again")
    read = {"AudioSep": _audiosep, "AudioSep VGGSound": _vggsound, "CLAPSep": _clapsep}[kind]
    good = [dict(zip(names, cells, strict=True)) for cells in table if len(cells) == len(names)]
    made = read(path.name, good)
    rows, complete = [], iter(made.rows)
    for cells in table:
        bad = ListRow(error=f"a row must have {len(names)} cells, got {len(cells)}; quote commas in {cells}")
        rows.append(next(complete) if len(cells) == len(names) else bad)
    return MixtureList(**{**vars(made), "rows": tuple(rows)})


def _read_csv(path: Path) -> tuple[list[str], list[list[str]]]:
    if not path.is_file():
        raise ValueError(f"a mixture list must be a CSV file that exists, got {str(path)!r}; check the path")
    try:
        with path.open("rb") as file:
            text = io.StringIO(bounded(file, _MAX_LIST_BYTES).decode("utf-8-sig"), newline="")
        lines = [[cell.strip() for cell in row] for row in csv.reader(text, skipinitialspace=True) if row]
    except (ValueError, csv.Error) as error:
        raise ValueError(f"cannot read {path} as CSV in UTF-8 ({error}); convert it") from error
    return (lines[0], lines[1:]) if lines else ([], [])


def _audiosep(name: str, table: Sequence[_Cells]) -> MixtureList:
    metrics = ("sdri_db", "si_sdr_db")
    if table and all(row.get("noise_wav", "").endswith("mixture.wav") for row in table):
        rows = [ListRow(query=row["caption"], published=(row["src_wav"], row["noise_wav"])) for row in table]
        return MixtureList(
            name=name, format="AudioSep AudioSet", rows=tuple(rows), metrics=metrics, rule="mean of class medians"
        )
    caption_of = {} if not table or "labels" in table[0] else {row["src_wav"]: row["caption"] for row in table}
    rows = []
    for row in table:
        noise = row.get("noise_wav")  # absent in Clotho's list, which mixes two
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


def _vggsound(name: str, table: Sequence[_Cells]) -> MixtureList:
    rows = [
        ListRow(query=row["s0_text"], published=(row["s0_wav"], row["mix_wav"]), other_labels=(row["s1_text"],))
        for row in table
    ]
    metrics = ("sdri_db", "si_sdr_db")
    return MixtureList(name=name, format="AudioSep VGGSound", rows=tuple(rows), metrics=metrics, rule="mean")


def _clapsep(name: str, table: Sequence[_Cells]) -> MixtureList:
    """Captions that all read "the sound of X" are classes; free captions may leave out sounds of their clip."""
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
