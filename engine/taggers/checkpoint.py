"""The built-in tagger on disk: ``weights.safetensors`` and ``tagger.json``; loading runs no code from either."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from engine.separators.base import nearest
from engine.storage import atomic_path, read_json, sha256_file, write_json
from engine.taggers.network import ARCHITECTURE, ShareTagger, TagNetworkConfig

_FORMAT = 1


def save_tagger(tagger: ShareTagger, folder: str | Path, *, history: Sequence[dict[str, Any]] = ()) -> None:
    """Write a tagger's folder, weights first and ``tagger.json`` last, each atomically.

    ``history`` tells how the weights came to be, one JSON-like entry a training.
    """
    weights = Path(folder) / "weights.safetensors"
    with atomic_path(weights) as aside:
        save_file({name: value.contiguous().cpu() for name, value in tagger.state_dict().items()}, aside)
    description: dict[str, Any] = {
        "format": _FORMAT,
        "architecture": ARCHITECTURE,
        "network": asdict(tagger.config),
        "labels": list(tagger.labels),
        "weights_sha256": sha256_file(weights),
        "fingerprint": tagger.fingerprint,
        "history": list(history),
    }
    write_json(Path(folder) / "tagger.json", description)


def read_tagger(folder: str | Path) -> dict[str, Any]:
    """What ``tagger.json`` says, checked for format and architecture."""
    path = Path(folder) / "tagger.json"
    if not path.is_file():
        raise ValueError(f"{folder} is not a tagger's folder: it has no tagger.json; give the folder itself")
    description = read_json(path)
    if not isinstance(description, dict) or description.get("format") != _FORMAT:
        raise ValueError(f"{path} is not of tagger format {_FORMAT}; it was made by another version")
    if description.get("architecture") != ARCHITECTURE:
        raise ValueError(f"{path} is of architecture {description.get('architecture')!r}; give {ARCHITECTURE!r}")
    return description


def load_tagger(folder: str | Path, *, device: str | torch.device = "cpu") -> ShareTagger:
    """The tagger in a folder, ready to tag; ``ValueError`` says what does not fit. No code in it is run."""
    description = read_tagger(folder)
    config = description.get("network", {})
    unknown = [key for key in config if key not in TagNetworkConfig.__dataclass_fields__]
    if unknown:
        raise ValueError(f"{folder}: network has no {unknown[0]!r}; {nearest(unknown[0], asdict(TagNetworkConfig()))}")
    tagger = ShareTagger(TagNetworkConfig(**config), description["labels"])
    weights = Path(folder) / "weights.safetensors"
    if not weights.is_file() or sha256_file(weights) != description["weights_sha256"]:
        raise ValueError(f"{weights} is missing or not the file that tagger.json describes; copy both again")
    try:
        tagger.load_state_dict(load_file(weights))
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"{weights} does not fit the architecture in tagger.json: {error}") from None
    return tagger.to(device).eval()
