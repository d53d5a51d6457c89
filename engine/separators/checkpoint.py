"""The built-in separator on disk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from engine.separators.model import QuerySeparator
from engine.separators.network import NetworkConfig
from engine.storage.fingerprints import fingerprint
from engine.storage.paths import Name
from engine.storage.weights import Checkpoint

_CHECKPOINT = Checkpoint(kind="separator", architecture="band_split_tcn", config=NetworkConfig, make=QuerySeparator)


def save(separator: QuerySeparator, folder: Name, *, history: Sequence[dict[str, Any]] = ()) -> None:
    """Write a separator's folder; ``history`` tells how its weights came to be, one entry a training."""

    def more(description: dict[str, Any]) -> dict[str, Any]:
        description = description | {"sample_rate_hz": separator.sample_rate_hz}
        return description | {"fingerprint": fingerprint(description)}

    _CHECKPOINT.save(separator, folder, config=separator.config, labels=separator.labels, more=more, history=history)


def read_description(folder: Name) -> dict[str, Any]:
    """What ``separator.json`` says, checked for format and architecture."""
    return _CHECKPOINT.read(folder)


def load(folder: Name, *, device: str | torch.device = "cpu") -> QuerySeparator:
    """The separator in a folder, ready to separate; ``ValueError`` says what does not fit."""
    return _CHECKPOINT.load(folder, device=device)
