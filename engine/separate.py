"""Decoded clips to stems, in batches measured in seconds of audio; a batch that does not fit is halved."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.schema import DecodedClip, SeparatedClip, failure
from engine.separators import Separator


@dataclass(frozen=True, kw_only=True)
class _Query:
    clip: int
    label: str
    num_samples: int


def pack(num_samples: Iterable[int], *, batch_samples: int) -> Iterator[list[int]]:
    """Positions packed into batches: longest first, ``rows x longest <= batch_samples`` (at least one row each)."""
    sizes = list(num_samples)
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) + 1) * sizes[batch[0]] > batch_samples:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _fail(clip: DecodedClip, error: Exception, *, label: str | None = None) -> dict[str, Any]:
    row = clip.row
    num_queries = 1 if label is not None else len(clip.row["labels"])
    return failure(
        clip_id=row["clip_id"],
        path=row["path"],
        label=label,
        num_queries=num_queries,
        step="separate",
        error=error,
    )


def _known_queries(clips: list[DecodedClip], separator: Separator) -> tuple[list[_Query], list[dict[str, Any]]]:
    """One query for every clip and label, and a failure row for every label that the separator does not know."""
    silence = torch.zeros(1, 0)
    problems: dict[str, ValueError | None] = {}
    queries, failures = [], []
    for number, clip in enumerate(clips):
        for label in clip.row["labels"]:
            if label not in problems:
                try:
                    separator.separate(silence, [label])
                    problems[label] = None
                except ValueError as error:
                    problems[label] = error
            problem = problems[label]
            if problem is None:
                queries.append(_Query(clip=number, label=label, num_samples=len(clip.samples_T)))
            else:
                failures.append(_fail(clip, problem, label=label))
    return queries, failures


def _stack(clips: list[DecodedClip], batch: list[_Query]) -> Tensor:
    longest = max(query.num_samples for query in batch)
    mix_BT = np.zeros((len(batch), longest), dtype=np.float32)
    for row, query in enumerate(batch):
        mix_BT[row, : query.num_samples] = clips[query.clip].samples_T
    return torch.from_numpy(mix_BT)


@dataclass(frozen=True, kw_only=True)
class _Work:
    """What a batch runs on."""

    separator: Separator
    clips: list[DecodedClip]
    device: str
    autocast: bool

    def attempt(self, batch: list[_Query]) -> list[np.ndarray] | Exception:
        """The stems of a batch, or what went wrong, without the traceback: that would keep the batch in memory."""
        try:
            with torch.autocast(self.device, enabled=self.autocast):
                stems_BT = self.separator.separate(
                    _stack(self.clips, batch),
                    [query.label for query in batch],
                    lengths=[query.num_samples for query in batch],
                )
            stems = stems_BT.float().cpu().numpy()
        except (RuntimeError, ValueError) as error:  # torch.OutOfMemoryError is a RuntimeError
            return error.with_traceback(None)
        return [stem_T[: query.num_samples] for stem_T, query in zip(stems, batch, strict=True)]

    def run(self, batch: list[_Query]) -> tuple[dict[tuple[int, str], np.ndarray], list[dict[str, Any]]]:
        """Stems by clip and label, and failures; a batch that fails is halved: a fault costs its query alone."""
        outcome = self.attempt(batch)
        if not isinstance(outcome, Exception):
            return {(query.clip, query.label): stem_T for query, stem_T in zip(batch, outcome, strict=True)}, []
        if len(batch) == 1:
            return {}, [_fail(self.clips[batch[0].clip], outcome, label=batch[0].label)]
        if self.device == "cuda":
            torch.cuda.empty_cache()
        half = len(batch) // 2
        (stems, failures), (more_stems, more_failures) = self.run(batch[:half]), self.run(batch[half:])
        return stems | more_stems, failures + more_failures


def separate_clips(
    clips: list[DecodedClip],
    separator: Separator,
    *,
    batch_s: float,
    device: str = "cpu",
    autocast: bool = False,
) -> tuple[list[SeparatedClip], list[dict[str, Any]]]:
    """Every label of every clip is one query; what cannot be separated is a row of ``schema.FAILURES``.

    A batch holds queries of different clips, at most ``batch_s`` seconds of audio with its padding.
    """
    queries, failures = _known_queries(clips, separator)
    stems: dict[tuple[int, str], np.ndarray] = {}
    work = _Work(separator=separator, clips=clips, device=device, autocast=autocast)
    batch_samples = max(1, int(batch_s * separator.sample_rate_hz))
    for positions in pack((query.num_samples for query in queries), batch_samples=batch_samples):
        made, failed = work.run([queries[i] for i in positions])
        stems |= made
        failures += failed
    return _by_clip(clips, queries, stems), failures


def _by_clip(
    clips: list[DecodedClip], queries: list[_Query], stems: dict[tuple[int, str], np.ndarray]
) -> list[SeparatedClip]:
    labels: dict[int, list[str]] = {}
    for query in queries:
        if (query.clip, query.label) in stems:
            labels.setdefault(query.clip, []).append(query.label)
    return [
        SeparatedClip(clip=clips[i], labels=names, stems_ST=np.stack([stems[i, name] for name in names]))
        for i, names in labels.items()
    ]
