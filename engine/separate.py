"""Decoded clips to stems: every label of every clip is one query."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from engine.batched import Asker, Query
from engine.schema import DecodedClip, SeparatedClip, failure
from engine.separators import Separator


def _fail(clip: DecodedClip, error: Exception, *, label: str) -> dict[str, Any]:
    row = clip.row
    return failure(clip_id=row["clip_id"], path=row["path"], label=label, num_queries=1, step="separate", error=error)


def _unknown(clips: list[DecodedClip], separator: Separator) -> dict[str, ValueError]:
    """What the separator says of each label that it does not know."""
    silence = torch.zeros(1, 0)
    problems: dict[str, ValueError] = {}
    for label in {label: None for clip in clips for label in clip.row["labels"]}:
        try:
            separator.separate(silence, [label])
        except ValueError as error:
            problems[label] = error
    return problems


def separate_clips(clips: list[DecodedClip], asker: Asker) -> tuple[list[SeparatedClip], list[dict[str, Any]]]:
    """Every label of every clip is one query; what cannot be separated is a row of ``schema.FAILURES``.

    A batch holds queries of different clips.
    """
    problems = _unknown(clips, asker.separator)
    asked = [(number, label) for number, clip in enumerate(clips) for label in clip.row["labels"]]
    failures = [_fail(clips[number], problems[label], label=label) for number, label in asked if label in problems]
    places = [(number, label) for number, label in asked if label not in problems]
    answers = asker.ask([Query(samples_T=clips[number].samples_T, label=label) for number, label in places])
    stems: dict[int, dict[str, np.ndarray]] = {}
    for (number, label), answer in zip(places, answers, strict=True):
        if isinstance(answer, Exception):
            failures.append(_fail(clips[number], answer, label=label))
        else:
            stems.setdefault(number, {})[label] = answer
    separated = [
        SeparatedClip(clip=clips[number], labels=list(found), stems_ST=np.stack(list(found.values())))
        for number, found in sorted(stems.items())
    ]
    return separated, failures
