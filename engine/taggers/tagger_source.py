"""Taggers by name, and the built-in tagger on disk."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from engine.storage.factories import ModelSource, described, find_factory, is_dotted_name
from engine.storage.files import damaged
from engine.storage.paths import Name, location
from engine.storage.weights import Checkpoint, Description
from engine.taggers.base import Tagger
from engine.taggers.network import ARCHITECTURE, ShareTagger, TagNetworkConfig

_CHECKPOINT = Checkpoint(kind="tagger", architecture=ARCHITECTURE, config=TagNetworkConfig, make=ShareTagger)


class TaggerSource(ModelSource[Tagger]):
    """A tagger that any process can open: described, checked and picklable."""


def find_tagger(name: TaggerSource | Name) -> TaggerSource:
    """Find a tagger by name: a folder, or ``package.module:factory``, called as ``factory(device)``.

    The folder holds the built-in tagger or an audio classifier of Hugging Face's format. Raises ``ValueError`` if there
    is no such folder, module or factory, or if the factory returns something else. A source is returned unchanged.
    """
    if isinstance(name, TaggerSource):
        return name
    if is_dotted_name(name):
        full_name, factory = str(name), find_factory(str(name))
    else:
        full_name = str(location(name))
        factory = functools.partial(_open_folder, full_name)
    _, own_fingerprint, _ = described(factory, full_name, kind="Tagger", members=("sample_rate_hz", "labels", "tag"))
    return TaggerSource(name=full_name, fingerprint=own_fingerprint, factory=factory)


def _open_folder(folder: str, device: str) -> Tagger:
    if (location(folder) / "config.json").is_file():
        from engine.taggers.adapters import HuggingFaceTagger

        return HuggingFaceTagger(folder, device=device)
    return load_tagger(folder, device=device)


def save_tagger(tagger: ShareTagger, folder: Name, *, history: Sequence[Mapping[str, Any]] = ()) -> None:
    """Write a tagger's folder, with the ``history`` of its trainings."""
    _CHECKPOINT.save(
        tagger,
        folder,
        config=tagger.config,
        labels=tagger.labels,
        more=lambda _: {"fingerprint": tagger.fingerprint},
        history=history,
    )


def read_tagger(folder: Name) -> Description:
    """The description in ``tagger.json``, checked for format and architecture."""
    return _CHECKPOINT.read(folder)


def load_tagger(folder: Name, *, device: str | torch.device = "cpu") -> ShareTagger:
    """The built-in tagger in a folder, ready to tag; ``ValueError`` if its files do not fit."""
    tagger = _CHECKPOINT.load(folder, device=device)
    if tagger.fingerprint != read_tagger(folder)["fingerprint"]:
        raise damaged(location(folder) / "tagger.json")
    return tagger
