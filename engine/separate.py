"""Decoded clips to stems: every label of every clip is one query."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from engine.batched import Asker, Query
from engine.retry import is_transient
from engine.schema import DecodedClip, SeparatedClip, failure
from engine.separators import Separator


def _fail(clip: DecodedClip, error: Exception, *, label: str | None = None) -> dict[str, Any]:
    """The failure of one query, or without a label of all of them."""
    row, number = clip.row, len(clip.row["labels"]) if label is None else 1
    return failure(
        clip_id=row["clip_id"], path=row["path"], label=label, num_queries=number, step="separate", error=error
    )


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

    A batch holds queries of different clips. A clip of which a query fails for a reason that may pass, such as memory,
    fails as a whole, so that it can be tried again as a whole.
    """
    problems = _unknown(clips, asker.separator)
    asked = [(number, label) for number, clip in enumerate(clips) for label in clip.row["labels"]]
    failures = [_fail(clips[number], problems[label], label=label) for number, label in asked if label in problems]
    places = [(number, label) for number, label in asked if label not in problems]
    answers = asker.ask([Query(samples_T=clips[number].samples_T, label=label) for number, label in places])
    stems: dict[int, dict[str, np.ndarray]] = {}
    passing = {
        number: answer
        for (number, _), answer in zip(places, answers, strict=True)
        if isinstance(answer, Exception) and is_transient(answer)
    }
    failures = [row for row in failures if row["clip_id"] not in {clips[number].row["clip_id"] for number in passing}]
    failures += [_fail(clips[number], error) for number, error in passing.items()]
    for (number, label), answer in zip(places, answers, strict=True):
        if number in passing:
            continue
        if isinstance(answer, Exception):
            failures.append(_fail(clips[number], answer, label=label))
        else:
            stems.setdefault(number, {})[label] = answer
    separated = [
        SeparatedClip(clip=clips[number], labels=list(found), stems_ST=np.stack(list(found.values())))
        for number, found in sorted(stems.items())
    ]
    return separated, failures
