"""The protocol that every tagger follows, and the margin of a label over its rivals.

Shape legend: B rows, T samples, L labels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from engine.schema import plain_label
from engine.separators.base import small_tensor

MAX_MARGIN_DB = 100.0


@runtime_checkable
class Tagger(Protocol):
    """A tagger estimates how much of each label is in a signal; any object with these members can score stems.

    Its tags are evidence only if it was trained independently of the separator whose stems it scores.
    """

    @property
    def sample_rate_hz(self) -> int:
        """Rate of the audio that it takes."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels that it knows."""

    @property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits: equal for taggers that give equal tags."""

    def tag(self, audio_BT: Tensor, *, lengths: Sequence[int] | None = None) -> Tensor:
        """Tags ``[B, L]`` (float32, dB, finite) of signals ``[B, T]``; the difference of two labels' tags is a margin.

        Tags do not depend on the gain of a signal; those of silence are equal. Signals may be padded with zeros to a
        common length; ``lengths`` has the number of samples of each without padding. Raises ``ValueError`` for NaN or
        infinite samples.
        """


def find_label(label: str, known: Iterable[str]) -> int | None:
    """Position of a label among the known ones in any spelling (``schema.plain_label``); None for an unknown label."""
    wanted = plain_label(label)
    return next((i for i, name in enumerate(known) if plain_label(name) == wanted), None)


def rivals_of(label: str, labels_present: Iterable[str], known: Sequence[str]) -> list[int]:
    """Positions of a label's rivals: the other known labels of its clip, or all others if the clip has none."""
    own = find_label(label, known)
    others = {find_label(other, known) for other in labels_present} - {own}
    return sorted(i for i in others if i is not None) or [i for i in range(len(known)) if i != own]


def margin_db(tags_BL: Tensor, own_B: Sequence[int] | Tensor, rivals: Sequence[Sequence[int]]) -> Tensor:
    """Margins ``[B]`` of each row's own label over the strongest of its rivals, in dB, -100 to 100.

    ``own_B`` and ``rivals`` are positions in the tagger's labels (:func:`find_label`, :func:`rivals_of`). Raises
    ``ValueError`` for a row without rivals, for a label that is its own rival, and for tags that are not finite.
    """
    own = [int(i) for i in own_B]
    if tags_BL.ndim != 2 or not len(tags_BL) == len(own) == len(rivals):
        raise ValueError(
            f"tags must have a row for each label and its rivals, got shape {tuple(tags_BL.shape)} for {len(own)} "
            f"labels and {len(rivals)} lists of rivals; give one of each per row"
        )
    require_finite(tags_BL)
    for row, (label, others) in enumerate(zip(own, rivals, strict=True)):
        if not others or label in others or not all(0 <= i < tags_BL.shape[1] for i in (label, *others)):
            raise ValueError(
                f"rivals must be one or more other labels of {tags_BL.shape[1]}, got {list(others)} for label {label} "
                f"in row {row}; give at least one other"
            )
    strongest = [tags_BL[row, list(others)].max() for row, others in enumerate(rivals)]
    margins = [tags_BL[row, label] - rival for row, (label, rival) in enumerate(zip(own, strongest, strict=True))]
    return torch.stack(margins).clamp(-MAX_MARGIN_DB, MAX_MARGIN_DB) if margins else tags_BL.new_zeros(0)


def require_finite(tags_BL: Tensor) -> None:
    """Raise ``ValueError`` for tags that are not finite."""
    if not torch.isfinite(tags_BL).all():
        raise ValueError("tags must be finite, got NaN or infinity; repair the tagger or drop the stem")


def tags_of(tagger: Tagger, signals: Sequence[Tensor]) -> Tensor:
    """Tags ``[B, L]`` (float32, dB, on the CPU) of signals ``[T]`` at the tagger's rate, which are padded.

    Raises ``ValueError`` if the tagger returns anything but finite tags of this shape.
    """
    padded_BT = torch.nn.utils.rnn.pad_sequence([*signals], batch_first=True)
    tags_BL = tagger.tag(padded_BT, lengths=[len(signal_T) for signal_T in signals])
    shape = (len(signals), len(tagger.labels))
    if not isinstance(tags_BL, Tensor) or tuple(tags_BL.shape) != shape:
        got = tuple(tags_BL.shape) if isinstance(tags_BL, Tensor) else type(tags_BL).__name__
        raise ValueError(f"tags of a tagger must have shape [B, L] = {shape}, got {got}; correct the tagger")
    tags_BL = tags_BL.float().cpu()
    require_finite(tags_BL)
    return tags_BL


def normalized(audio_BT: Tensor, lengths: Sequence[int] | None) -> Tensor:
    """Signals to tag as float32, each with a peak of 1 (silence stays silent), zero after their lengths.

    Raises ``ValueError`` for another shape, lengths that do not fit and samples that are not finite.
    """
    if audio_BT.ndim != 2:
        raise ValueError(f"audio to tag must have shape [B, T], got {tuple(audio_BT.shape)}; add or merge dimensions")
    num_samples = audio_BT.shape[1]
    if lengths is not None:
        if len(lengths) != len(audio_BT) or not all(0 <= length <= num_samples for length in lengths):
            raise ValueError(
                f"lengths must be one per row from 0 to {num_samples}, got {list(lengths)} for {len(audio_BT)} rows; "
                "give the number of samples of each row without padding"
            )
        lengths_B1 = small_tensor(lengths, audio_BT.device)[:, None]
        inside_BT = torch.arange(num_samples, device=audio_BT.device) < lengths_B1
        audio_BT = torch.where(inside_BT, audio_BT, 0.0)
    if not torch.isfinite(audio_BT).all():
        raise ValueError("audio to tag must be finite, got NaN or infinite samples; repair or drop it")
    if not audio_BT.numel():
        return audio_BT.float()
    peak_B1 = audio_BT.abs().amax(1, keepdim=True)
    return (audio_BT / torch.where(peak_B1 > 0.0, peak_B1, 1.0)).float()
