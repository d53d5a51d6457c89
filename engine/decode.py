"""Rows of a corpus to decoded clips, cut to length and handed on part by part, so that memory stays bounded."""

from __future__ import annotations

import functools
from typing import Any

from engine.audio import AudioError
from engine.corpus import cut, resolve
from engine.decoder import DecodeError, Decoder
from engine.retry import retried
from engine.schema import DecodedClip, failure

Failures = list[dict[str, Any]]


def _fail(row: dict[str, Any], error: Exception) -> dict[str, Any]:
    return failure(clip_id=row["clip_id"], path=row["path"], num_queries=len(row["labels"]), step="decode", error=error)


def cut_rows(
    rows: list[dict[str, Any]], *, root: str, clip_s: float, min_clip_s: float, decoder: Decoder
) -> tuple[list[dict[str, Any]], Failures]:
    """Rows of ``schema.CLIPS``, each no longer than ``clip_s``, from headers alone; unreadable ones as failures."""
    pieces, failures = [], []
    for row in rows:
        try:
            info = retried(functools.partial(decoder.probe, resolve(root, row["path"])))
            pieces.extend(cut(row, duration_s=info.duration_s, clip_s=clip_s, min_clip_s=min_clip_s))
        except AudioError as error:
            failures.append(_fail(row, error))
    return pieces, failures


def parts(rows: list[dict[str, Any]], *, clip_s: float, part_s: float) -> list[list[dict[str, Any]]]:
    """Cut rows in groups of at most ``part_s`` seconds (at least one row each); there is always one part."""
    size = max(1, int(part_s / clip_s))
    return [rows[i : i + size] for i in range(0, len(rows), size)] or [[]]


def decode_rows(
    rows: list[dict[str, Any]], *, root: str, sample_rate_hz: int, clip_s: float, decoder: Decoder
) -> tuple[list[DecodedClip], Failures]:
    """Decoded mono clips, and a failure row for every clip that could not be decoded.

    A file that takes too long is tried once: its other clips among ``rows`` fail with the same error.
    """
    clips: list[DecodedClip] = []
    failures: Failures = []
    slow: dict[str, AudioError] = {}
    for row in rows:
        path, start_s = resolve(root, row["path"]), row["start_s"] or 0.0
        duration_s = clip_s if row["end_s"] is None else min(row["end_s"] - start_s, clip_s)
        decode = functools.partial(
            decoder.decode, path, sample_rate_hz=sample_rate_hz, start_s=start_s, duration_s=duration_s
        )
        try:
            if path in slow:
                raise slow[path]
            clips.append(DecodedClip(row=row, samples_T=retried(decode)))
        except AudioError as error:
            failures.append(_fail(row, error))
            if isinstance(error, DecodeError) and error.error_class == "DecoderTimeout":
                slow[path] = error
    return clips, failures
