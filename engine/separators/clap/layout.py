"""CLAPs that others released: LAION's files, the encoder inside AudioSep's file, and folders of Hugging Face."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from engine.separators.clap import htsat
from engine.separators.clap.encoder import Clap, ClapConfig
from engine.separators.convert.keys import require_tensors

_LAION, _AUDIOSEP = "module.", "query_encoder.model."
_AUDIO, _LAYER = "audio_branch.", "text_branch.encoder.layer."
_UNUSED = ("text_transform.", "audio_transform.", "logit_scale_t", "text_branch.embeddings.position_ids")


def recognises(names: Collection[str]) -> bool:
    """True for the names of the tensors in a file of LAION's CLAP."""
    return any(name.startswith(f"{_LAION}text_branch.") for name in names)


def from_laion(tensors: Mapping[str, Tensor]) -> Clap:
    """The CLAP in LAION's file, whose names start with ``module.``; ``ValueError`` that lists what does not fit."""
    return _from(within(tensors, _LAION), what="a CLAP of LAION")


def from_audiosep(tensors: Mapping[str, Tensor]) -> Clap:
    """The CLAP inside AudioSep's file, with the audio encoder if the file has it; other tensors are not looked at."""
    return _from(within(tensors, _AUDIOSEP), what="the CLAP in an AudioSep checkpoint")


def within(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _from(tensors: Mapping[str, Tensor], *, what: str) -> Clap:
    config = ClapConfig(**_text_fields(tensors, what), **_audio_fields(tensors))
    with torch.device("meta"):  # takes no memory
        clap = Clap(config)
    wanted = {name: value.shape for name, value in clap.state_dict().items()}
    found = require_tensors(tensors, wanted, ignored=_is_unused, what=what)
    clap = Clap(config)
    clap.load_state_dict(found)
    return clap.eval()


def _is_unused(name: str) -> bool:
    return name.startswith(_UNUSED) or (name.startswith(_AUDIO) and htsat.is_unused(name.removeprefix(_AUDIO)))


def _text_fields(tensors: Mapping[str, Tensor], what: str) -> dict[str, int]:
    """Fields of the config from the shapes of the text encoder's tensors, other tensors of which may be missing."""
    names = {
        "words": "text_branch.embeddings.word_embeddings.weight",
        "positions": "text_branch.embeddings.position_embeddings.weight",
        "hidden": f"{_LAYER}0.intermediate.dense.weight",
        "projection": "text_projection.0.weight",
    }
    if missing := [name for name in names.values() if name not in tensors or tensors[name].ndim != 2]:
        raise ValueError(
            f"{what} must have a text encoder, got none with the matrix {missing[0]}; give the file as its authors "
            "released it"
        )
    (vocabulary, width), (positions, _), (hidden, _), (embedding_width, _) = (
        tensors[name].shape for name in names.values()
    )
    return {
        "embedding_width": embedding_width,
        "text_layers": len({name.split(".")[3] for name in tensors if name.startswith(_LAYER)}),
        "text_width": width,
        "text_heads": max(1, width // 64),
        "text_hidden": hidden,
        "vocabulary": vocabulary,
        "positions": positions,
    }


def _audio_fields(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    branch = within(tensors, _AUDIO)
    if not branch:
        return {"audio_channels": 0}
    return {f"audio_{name}": value for name, value in htsat.htsat_fields(branch).items()}
