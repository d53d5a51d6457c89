"""What every tagger offers, and the margin of a label over its rivals.

Shape legend: B rows, T samples, L labels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from engine.schema import plain_label

MAX_MARGIN_DB = 100.0


@runtime_checkable
class Tagger(Protocol):
    """Says how much of each label is in a signal; any object with these members can judge stems.

    It is only worth asking where it is independent of the separator whose stems it judges.
    """

    @property
    def sample_rate_hz(self) -> int:
        """Rate of the audio it takes."""

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels it knows."""

    @property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits: equal where two taggers give equal tags."""

    def tag(self, audio_BT: Tensor, *, lengths: Sequence[int] | None = None) -> Tensor:
        """Tags ``[B, L]`` (float32, dB, finite) of signals ``[B, T]``; differences of two labels' tags are margins.

        A gain changes nothing, silence has equal tags. Rows may be padded with zeros to a common length; ``lengths``
        says how many samples of each are real. Raises ``ValueError`` for NaN or infinite samples.
        """


def find_label(label: str, known: Iterable[str]) -> int | None:
    """Where a label stands among the known, whatever its spelling (``schema.plain_label``); None if it does not."""
    wanted = plain_label(label)
    return next((i for i, name in enumerate(known) if plain_label(name) == wanted), None)


def rivals_of(label: str, labels_present: Iterable[str], known: Sequence[str]) -> list[int]:
    """The rivals of a clip's label: the clip's other labels, or all others where it has none that are known."""
    own = find_label(label, known)
    found = {find_label(other, known) for other in labels_present} - {own, None}
    return sorted(i for i in found if i is not None) or [i for i in range(len(known)) if i != own]


def margin_db(tags_BL: Tensor, own_B: Sequence[int] | Tensor, rivals: Sequence[Sequence[int]]) -> Tensor:
    """How far ``[B]`` a row's own label lies over the strongest of its rivals, in dB, -100 to 100.

    ``own_B`` and ``rivals`` are places in the tagger's labels (:func:`find_label`, :func:`rivals_of`). Raises
    ``ValueError`` for a row without rivals, for a label that is its own rival, and for tags that are not finite.
    """
    own = [int(i) for i in own_B]
    if tags_BL.ndim != 2 or not len(tags_BL) == len(own) == len(rivals):
        raise ValueError(
            f"tags have shape {tuple(tags_BL.shape)} for {len(own)} labels and {len(rivals)} lists of rivals; "
            "give one of each a row"
        )
    if not torch.isfinite(tags_BL).all():
        raise ValueError("tags are finite, these have NaN or infinity; repair the tagger or drop the stem")
    for row, (label, others) in enumerate(zip(own, rivals, strict=True)):
        if not others or label in others or not all(0 <= i < tags_BL.shape[1] for i in (label, *others)):
            raise ValueError(
                f"rivals are other labels of {tags_BL.shape[1]}, row {row} is label {label} with rivals "
                f"{list(others)}; give at least one other"
            )
    strongest = [tags_BL[row, list(others)].max() for row, others in enumerate(rivals)]
    margins = [tags_BL[row, label] - rival for row, (label, rival) in enumerate(zip(own, strongest, strict=True))]
    return torch.stack(margins).clamp(-MAX_MARGIN_DB, MAX_MARGIN_DB) if margins else tags_BL.new_zeros(0)


def checked(audio_BT: Tensor, lengths: Sequence[int] | None) -> Tensor:
    """Signals to tag as float32 with a peak of 1 a row (silence stays), zero beyond their lengths.

    Raises ``ValueError`` for another shape, lengths that do not fit and samples that are not finite.
    """
    if audio_BT.ndim != 2:
        raise ValueError(f"audio to tag has shape [B, T], not {tuple(audio_BT.shape)}; add or merge dimensions")
    num_samples = audio_BT.shape[1]
    if lengths is not None:
        if len(lengths) != len(audio_BT) or not all(0 <= length <= num_samples for length in lengths):
            raise ValueError(f"lengths are one a row, 0 to {num_samples}, not {list(lengths)} for {len(audio_BT)} rows")
        lengths_B1 = torch.tensor(lengths, device=audio_BT.device)[:, None]
        inside_BT = torch.arange(num_samples, device=audio_BT.device) < lengths_B1
        audio_BT = torch.where(inside_BT, audio_BT, 0.0)
    if not torch.isfinite(audio_BT).all():
        raise ValueError("the audio to tag has NaN or infinite samples; repair or drop it")
    if not audio_BT.numel():
        return audio_BT.float()
    peak_B1 = audio_BT.abs().amax(1, keepdim=True)
    return (audio_BT / torch.where(peak_B1 > 0.0, peak_B1, 1.0)).float()
