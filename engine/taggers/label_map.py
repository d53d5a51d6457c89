"""Labels of a corpus as classes of a tagger: by their names, or by a map in a file of the user's.

A tagger's file, ``tagger.yaml``, names a tagger and, for labels of the corpus, one or more of its classes::

    model: models/ast
    labels:
      dog: [Dog, Bark]
      crying_baby: Baby cry, infant cry

Shape legend: B rows, T samples, C classes of the tagger, L labels.
"""

from __future__ import annotations

import difflib
import logging
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from pydantic import ConfigDict, with_config
from torch import Tensor
from typing_extensions import TypedDict

from engine.cli.display import shown
from engine.schema import plain_label
from engine.settings import read_yaml
from engine.storage.files import check_record
from engine.storage.fingerprints import fingerprint
from engine.taggers.base import Tagger, find_label, normalized

LabelMap = Mapping[str, Sequence[str]]
"""Classes of a tagger for each label."""

_LOGGER = logging.getLogger(__name__)
_EXAMPLE = "model: models/ast"
_MOST_NAMED = 5
_MIN_FRACTION = 1e-12  # -120 dB


@with_config(ConfigDict(extra="forbid"))
class TaggerFile(TypedDict):
    """The content of a tagger's file."""

    model: str
    """The tagger, by any of its names; relative ones start from the file's folder."""
    labels: dict[str, str | list[str]]
    """One or more classes of the tagger for labels; other labels are looked up among the classes by name."""


def read_tagger_file(path: Path) -> tuple[str, LabelMap]:
    """The name of the tagger in a YAML or JSON file, and its label map; ``ValueError`` if the file is not one."""
    remedy = f"write it like `{_EXAMPLE}` and `labels: {{dog: [Dog, Bark]}}`"
    record: TaggerFile = check_record(read_yaml(path, _EXAMPLE), TaggerFile, path, remedy=remedy)
    label_map = {label: [names] if isinstance(names, str) else names for label, names in record["labels"].items()}
    spelled = [plain_label(label) for label in label_map]
    for label, names in label_map.items():
        if not all([names, *map(plain_label, names)]) or spelled.count(plain_label(label)) > 1:
            got = "it twice" if spelled.count(plain_label(label)) > 1 else "no class"
            raise ValueError(f"a label in {path} must be there once, with classes, got {got} for {label!r}; {remedy}")
    return record["model"], label_map


def require_classes(label_map: LabelMap, known: Collection[str], name: object) -> None:
    """Raise ``ValueError`` if a label maps to classes that a tagger does not have, with the most similar of its own."""
    names = dict.fromkeys(one for names in label_map.values() for one in names)
    if unknown := [one for one in names if find_label(one, known) is None]:
        raise ValueError(
            f"labels must map to classes of the tagger {name}, got {_with_nearest(unknown, known)}; correct the map"
        )


def report_unknown(labels: Collection[str], known: Collection[str], name: object) -> None:
    """Warn of labels that a tagger does not know, whose stems get no score; ``ValueError`` if it knows none."""
    unknown = [label for label in labels if find_label(label, known) is None]
    listed = _with_nearest(unknown, known)
    if unknown and len(unknown) == len(labels):
        raise ValueError(
            f"a tagger must know the labels of the clips, got {name}, which knows none of {listed}; map labels to its "
            "classes in a file, as docs/extending.md shows"
        )
    if unknown:
        _LOGGER.warning(
            f"the tagger {name} does not know {len(unknown)} of {len(labels)} labels, which get no tags and "
            f"whose stems pass a threshold on tagger_margin_db: {listed}; map them to its classes in a file, as "
            "docs/extending.md shows"
        )


def _with_nearest(names: Sequence[str], known: Iterable[str]) -> str:
    classes = {plain_label(one): one for one in known}
    listed = []
    for name in names[:_MOST_NAMED]:
        close = difflib.get_close_matches(plain_label(name), classes, n=1, cutoff=0.5)
        listed.append(shown(repr(name)) + (f" (nearest: {shown(repr(classes[close[0]]))})" if close else ""))
    return ", ".join(listed) + (f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else "")


class MappedTagger:
    """A tagger whose labels stand for one or more classes of another; a label's fraction is the sum of theirs."""

    def __init__(self, tagger: Tagger, label_map: LabelMap) -> None:
        self._tagger, self.labels, self.sample_rate_hz = tagger, tuple(label_map), tagger.sample_rate_hz
        self.fingerprint = fingerprint([getattr(tagger, "fingerprint", ""), [*label_map.items()]])
        self._member_CL = torch.zeros(len(tagger.labels), len(label_map), dtype=torch.float64)
        for column, names in enumerate(label_map.values()):
            self._member_CL[[find_label(one, tagger.labels) for one in names], column] = 1.0

    def tag(self, audio_BT: Tensor, *, lengths: Sequence[int] | None = None) -> Tensor:
        """See the protocol."""
        silent_B1 = ~normalized(audio_BT, lengths).cpu().any(1, keepdim=True)
        fraction_BC = 10.0 ** (self._tagger.tag(audio_BT, lengths=lengths).cpu().double() / 10.0)
        tags_BL = 10.0 * torch.log10(fraction_BC @ self._member_CL + _MIN_FRACTION)
        return torch.where(silent_B1, -10.0 * math.log10(len(self.labels)), tags_BL).float()
