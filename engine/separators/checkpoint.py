"""A separator on disk: ``weights.safetensors`` and ``separator.json``; loading runs no code from either."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from engine.separators.base import nearest
from engine.separators.model import QuerySeparator
from engine.separators.network import NetworkConfig
from engine.storage import atomic_path, fingerprint, read_json, sha256_file, write_json

_FORMAT = 1
_ARCHITECTURE = "band_split_tcn"


def save(separator: QuerySeparator, folder: str | Path, *, history: Sequence[dict[str, Any]] = ()) -> None:
    """Write a checkpoint folder, weights first and description last, each atomically.

    ``history`` tells how the weights came to be, one JSON-like entry a training.
    """
    folder = Path(folder)
    weights = folder / "weights.safetensors"
    with atomic_path(weights) as aside:
        save_file({name: value.contiguous().cpu() for name, value in separator.state_dict().items()}, aside)
    description: dict[str, Any] = {
        "format": _FORMAT,
        "architecture": _ARCHITECTURE,
        "network": asdict(separator.config),
        "labels": list(separator.labels),
        "sample_rate_hz": separator.sample_rate_hz,
        "weights_sha256": sha256_file(weights),
    }
    description["fingerprint"] = fingerprint(description)
    write_json(folder / "separator.json", description | {"history": list(history)})


def read_description(folder: str | Path) -> dict[str, Any]:
    """What ``separator.json`` says, checked for format and architecture."""
    path = Path(folder) / "separator.json"
    if not path.is_file():
        raise ValueError(f"{folder} is not a checkpoint folder: it has no separator.json; give the folder itself")
    description = read_json(path)
    if not isinstance(description, dict) or description.get("format") != _FORMAT:
        raise ValueError(f"{path} is not of checkpoint format {_FORMAT}; it was made by another version")
    if description.get("architecture") != _ARCHITECTURE:
        raise ValueError(
            f"{path} is of architecture {description.get('architecture')!r}; this version loads {_ARCHITECTURE!r}"
        )
    return description


def load(folder: str | Path, *, device: str | torch.device = "cpu") -> QuerySeparator:
    """The separator in a checkpoint folder, ready to separate; ``ValueError`` says what does not fit."""
    description = read_description(folder)
    config = description.get("network", {})
    unknown = [key for key in config if key not in NetworkConfig.__dataclass_fields__]
    if unknown:
        raise ValueError(f"{folder}: network has no {unknown[0]!r}; {nearest(unknown[0], asdict(NetworkConfig()))}")
    separator = QuerySeparator(NetworkConfig(**config), description["labels"])
    weights = Path(folder) / "weights.safetensors"
    if not weights.is_file() or sha256_file(weights) != description["weights_sha256"]:
        raise ValueError(f"{weights} is missing or not the file that separator.json describes; copy both again")
    try:
        separator.load_state_dict(load_file(weights))
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"{weights} does not fit the architecture in separator.json: {error}") from None
    return separator.to(device).eval()
