"""TODO engine/passes/parts.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from engine.passes.records import STEPS
from engine.schema import CLIPS, FAILURES, SCORES, DecodedClip, SeparatedClip

Row = dict[str, Any]

_CLIP = pa.struct([*CLIPS, pa.field("samples", pa.large_binary())])
_EXTRA = pa.struct([SCORES.field(name) for name in ("cycle_si_sdr_db", "rival_leak_db", "tagger_margin_db")])
_SEPARATED = pa.struct(
    [
        *_CLIP,
        pa.field("stem_labels", pa.list_(pa.string())),
        pa.field("stems", pa.large_binary()),
        pa.field("extra", pa.list_(_EXTRA)),
    ]
)


_REPORT = pa.schema(
    [
        *(pa.field(name, pa.int64()) for name in ("num_clips", "num_queries", "num_failed", "num_failed_before")),
        *(pa.field(name, pa.float64()) for name in ("audio_s", *(f"{step}_s" for step in STEPS))),
        pa.field("worker", pa.string()),
        pa.field("batch_fill_fraction", pa.float64()),
        pa.field("vram_bytes", pa.int64()),
        pa.field("failed", pa.list_(pa.struct([FAILURES.field(n) for n in ("step", "error_class", "num_queries")]))),
    ]
)
"""What is told of a part when it is on disk."""


def _row(values: dict[str, Any], clip_type: pa.DataType) -> pa.Table:
    types = {"clips": pa.list_(clip_type), "failures": pa.list_(pa.struct(list(FAILURES)))}
    return pa.table({key: pa.array([value], types.get(key)) for key, value in values.items()})


def _samples(data: bytes) -> np.ndarray:
    return np.frombuffer(data, dtype=np.float32)


def _clip(entry: dict[str, Any]) -> DecodedClip:
    row = {name: entry[name] for name in CLIPS.names}
    return DecodedClip(row=row, samples_T=_samples(entry["samples"]))


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a pass finds its clips and puts what comes of them."""

    root: str
    """Folder or address that relative paths start from."""
    out: str
    """The pass's folder: its clips are in ``corpus/``."""
    sample_rate_hz: int


def _separated(entry: dict[str, Any]) -> SeparatedClip:
    labels = entry["stem_labels"]
    stems_ST = _samples(entry["stems"]).reshape(len(labels), -1)
    return SeparatedClip(clip=_clip(entry), labels=labels, stems_ST=stems_ST, extra=entry["extra"])
