"""The folder of a CLAP: ``clap.json``, ``weights.safetensors`` and, for text, ``tokenizer.json``."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NotRequired, cast

import torch

from engine.separators.clap.encoder import Clap, ClapConfig
from engine.separators.clap.tokenizer import TOKENIZER, open_tokenizer, parse_tokenizer
from engine.storage.files import damaged, require_intact, sha256_file, write_bytes
from engine.storage.fingerprints import fingerprint as fingerprint_of
from engine.storage.paths import Name, location
from engine.storage.weights import Checkpoint, Description

_DECIDING = ("architecture", "network", "weights_sha256")


class ClapDescription(Description):
    """The content of ``clap.json``."""

    tokenizer_sha256: NotRequired[str]
    """SHA-256 of ``tokenizer.json``, if it was saved with the weights."""
    licence: NotRequired[str]
    """Licence of converted weights."""
    source: NotRequired[str]
    """Project whose weights were converted."""
    source_sha256: NotRequired[str]
    """SHA-256 of the file that was converted."""


_CHECKPOINT = Checkpoint(
    kind="clap",
    architecture="clap",
    config=ClapConfig,
    make=lambda config, _labels: Clap(config),
    description=ClapDescription,
)


def save_clap(
    clap: Clap, folder: Name, *, tokenizer: str | None = None, about: Mapping[str, object] | None = None
) -> None:
    """Write the folder of a CLAP.

    ``tokenizer`` is the content of its ``tokenizer.json``, as :func:`find_tokenizer` returns it; without it a tokenizer
    is looked for in the folder and in the cache of Hugging Face when there is a text to read. ``about`` has the
    optional fields of :class:`ClapDescription`. Raises ``ValueError`` for another encoder's tokenizer.
    """
    more: dict[str, object] = dict(about or {})
    if tokenizer is not None and clap.config.text_layers:
        parse_tokenizer(tokenizer, vocabulary=clap.config.vocabulary, source=TOKENIZER)
        write_bytes(location(folder) / TOKENIZER, tokenizer.encode())
        more["tokenizer_sha256"] = sha256_file(location(folder) / TOKENIZER)
    _CHECKPOINT.save(
        clap,
        folder,
        config=clap.config,
        labels=(),
        more=lambda described: more | {"fingerprint": _fingerprint(described)},
        history=(),
    )


def read_clap(folder: Name) -> ClapDescription:
    """The description in ``clap.json``, with the fingerprint of the networks; ``ValueError`` if it is wrong."""
    description = cast(ClapDescription, _CHECKPOINT.read(folder))
    if description["fingerprint"] != _fingerprint(description):
        raise damaged(location(folder) / "clap.json")
    return description


def open_clap(folder: Name, *, fingerprint: str | None = None, device: str | torch.device = "cpu") -> Clap:
    """The CLAP in a folder, ready to embed.

    ``fingerprint`` is that of the encoder that a separator was made for. Raises ``ValueError`` if there is no CLAP in
    the folder, or another one, and ``DamagedError`` if its files are not those that were saved. A missing tokenizer is
    an error of the first text.
    """
    if not (location(folder) / "clap.json").is_file():
        raise ValueError(
            f"there is no CLAP encoder in {folder} (no clap.json); put the encoder's folder there, or convert the "
            "checkpoint again"
        )
    description = read_clap(folder)
    if fingerprint is not None and description["fingerprint"] != fingerprint:
        raise ValueError(
            f"the encoder in {folder} must have the fingerprint {fingerprint}, got {description['fingerprint']}; give "
            "the folder of the encoder that the separator was converted or trained with"
        )
    if "tokenizer_sha256" in description and (location(folder) / TOKENIZER).is_file():
        require_intact(location(folder) / TOKENIZER, description["tokenizer_sha256"])
    clap = _CHECKPOINT.load(folder, device=device)
    config = clap.config
    clap.open_tokenizer = functools.partial(
        open_tokenizer, location(folder), vocabulary=config.vocabulary, positions=config.positions
    )
    return clap


def _fingerprint(description: Mapping[str, Any]) -> str:
    return fingerprint_of([description[key] for key in _DECIDING])
