"""The built-in tagger on disk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from engine.storage.paths import Name
from engine.storage.weights import Checkpoint
from engine.taggers.network import ARCHITECTURE, ShareTagger, TagNetworkConfig

_CHECKPOINT = Checkpoint(kind="tagger", architecture=ARCHITECTURE, config=TagNetworkConfig, make=ShareTagger)


def save_tagger(tagger: ShareTagger, folder: Name, *, history: Sequence[dict[str, Any]] = ()) -> None:
    """Write a tagger's folder; ``history`` tells how its weights came to be, one entry a training."""
    _CHECKPOINT.save(
        tagger,
        folder,
        config=tagger.config,
        labels=tagger.labels,
        more=lambda _: {"fingerprint": tagger.fingerprint},
        history=history,
    )


def read_tagger(folder: Name) -> dict[str, Any]:
    """What ``tagger.json`` says, checked for format and architecture."""
    return _CHECKPOINT.read(folder)


def load_tagger(folder: Name, *, device: str | torch.device = "cpu") -> ShareTagger:
    """The tagger in a folder, ready to tag; ``ValueError`` says what does not fit."""
    return _CHECKPOINT.load(folder, device=device)
