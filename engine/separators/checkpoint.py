"""Checkpoint folders of the built-in separator: ``separator.json`` and ``weights.safetensors``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch

from engine.separators.model import QuerySeparator
from engine.separators.network import NetworkConfig
from engine.storage.files import damaged, require_intact
from engine.storage.fingerprints import fingerprint
from engine.storage.paths import Name, location
from engine.storage.weights import Checkpoint, Description


class SeparatorDescription(Description):
    """The content of ``separator.json``."""

    sample_rate_hz: int
    """Rate of the audio that the separator takes and returns."""


_CHECKPOINT = Checkpoint(
    kind="separator",
    architecture="band_split_tcn",
    config=NetworkConfig,
    make=QuerySeparator,
    description=SeparatorDescription,
)


def save(separator: QuerySeparator, folder: Name, *, history: Sequence[Mapping[str, Any]] = ()) -> None:
    """Write a separator's folder, with the ``history`` of its trainings."""

    def more(description: Mapping[str, Any]) -> Mapping[str, Any]:
        rate = {"sample_rate_hz": separator.sample_rate_hz}
        return rate | {"fingerprint": fingerprint({**description, **rate})}

    _CHECKPOINT.save(separator, folder, config=separator.config, labels=separator.labels, more=more, history=history)


def read_description(folder: Name) -> SeparatorDescription:
    """The description in ``separator.json``, checked for format and architecture."""
    return cast(SeparatorDescription, _CHECKPOINT.read(folder))


def load(folder: Name, *, device: str | torch.device = "cpu") -> QuerySeparator:
    """The separator in a folder, ready to separate; ``ValueError`` if its files do not fit."""
    separator = _CHECKPOINT.load(folder, device=device)
    require_fingerprint(folder)
    return separator


def require_fingerprint(folder: Name) -> None:
    """Raise ``DamagedError`` if the weights or the description of a separator are not those that were saved."""
    description = read_description(folder)
    values = {key: value for key, value in description.items() if key not in ("fingerprint", "history")}
    weights = location(folder) / "weights.safetensors"
    if not weights.is_file():
        raise damaged(weights)
    require_intact(weights, description["weights_sha256"])
    if description.get("fingerprint") != fingerprint(values):
        raise damaged(location(folder) / "separator.json")
