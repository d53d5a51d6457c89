"""CLAPs that others released: LAION's files, the encoder inside AudioSep's file, and folders of Hugging Face."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from engine.cli.display import shown
from engine.separators.clap import htsat
from engine.separators.clap.encoder import Clap, ClapConfig
from engine.separators.convert.keys import require_tensors

_LAION, _AUDIOSEP = "module.", "query_encoder.model."
_AUDIO, _LAYER = "audio_branch.", "text_branch.encoder.layer."
_HUGGING_FACE_AUDIO = "audio_model.audio_encoder."
_UNUSED = (
    "text_transform.",
    "audio_transform.",
    "logit_scale_t",
    "text_branch.embeddings.position_ids",
    "text_branch.embeddings.token_type_ids",
)
_RENAMED = {  # Hugging Face's parts of names, and LAION's; the first that fits
    "text_model.": "text_branch.",
    _HUGGING_FACE_AUDIO: _AUDIO,
    "_projection.linear1.": "_projection.0.",
    "_projection.linear2.": "_projection.2.",
}
_RENAMED_AUDIO = {
    "batch_norm.": "bn0.",
    ".layernorm_before.": ".norm1.",
    ".layernorm_after.": ".norm2.",
    ".attention.output.dense.": ".attn.proj.",
    ".attention.self.": ".attn.",
    ".intermediate.dense.": ".mlp.fc1.",
    ".output.dense.": ".mlp.fc2.",
}
_QUERY, _JOINED = ".attn.query.", (".attn.query.", ".attn.key.", ".attn.value.")
_NEEDED: dict[str, dict[str, object]] = {  # what the networks here have, by part of Hugging Face's config
    "audio_config": {
        "enable_fusion": False,
        "hidden_act": "gelu",
        "num_mel_bins": 64,
        "patch_size": 4,
        "projection_hidden_act": "relu",
        "qkv_bias": True,
        "spec_size": 256,
        "window_size": 8,
    },
    "text_config": {"hidden_act": "gelu", "projection_hidden_act": "relu"},
}


def recognises(names: Collection[str]) -> bool:
    """True for the names of the tensors in a file of LAION's CLAP, or in a ``ClapModel`` of Hugging Face."""
    begins = ("text_branch.", "audio_branch.", "text_model.", _HUGGING_FACE_AUDIO)
    return any(name.removeprefix(_LAION).startswith(begins) for name in names)


def from_laion(tensors: Mapping[str, Tensor]) -> Clap:
    """The CLAP in LAION's file, whose names may start with ``module.``; ``ValueError`` that lists what does not fit."""
    return _from({name.removeprefix(_LAION): value for name, value in tensors.items()}, what="a CLAP of LAION")


def from_audiosep(tensors: Mapping[str, Tensor]) -> Clap:
    """The CLAP inside AudioSep's file, with the audio encoder if the file has it; other tensors are not looked at."""
    return _from(_within(tensors, _AUDIOSEP), what="the CLAP in an AudioSep checkpoint")


def from_hugging_face(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Clap:
    """The CLAP in a ``ClapModel`` of Hugging Face's transformers, with the content of its ``config.json``.

    Raises ``ValueError`` for a CLAP with fusion or of another kind, and lists tensors that do not fit.
    """
    what, parts = "a ClapModel of Hugging Face", {name: config.get(name) or {} for name in _NEEDED}
    if not all(isinstance(part, dict) for part in parts.values()):
        raise ValueError(f"config.json of {what} must describe {' and '.join(parts)}, got other values; copy it again")
    for part, needed in _NEEDED.items():
        for name, value in needed.items():
            if (got := parts[part].get(name, value)) != value:
                raise ValueError(
                    f"{name} of {part} of {what} must be {value}, got {shown(repr(got))}; give a CLAP without fusion, "
                    "with HTSAT and RoBERTa"
                )
    named = {_laion_name(name): value for name, value in tensors.items()}
    for name in [name for name in named if _QUERY in name]:
        three = [name.replace(_QUERY, one) for one in _JOINED]
        if all(one in named for one in three):
            named[name.replace(_QUERY, ".attn.qkv.")] = torch.cat([named.pop(one) for one in three])
    return _from(named, what=what, text_heads=parts["text_config"].get("num_attention_heads", 12))


def _laion_name(name: str) -> str:
    for theirs, ours in _RENAMED.items():
        name = name.replace(theirs, ours, 1)
    for theirs, ours in _RENAMED_AUDIO.items() if name.startswith(_AUDIO) else ():
        name = name.replace(theirs, ours)
    return name


def _within(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _from(tensors: Mapping[str, Tensor], *, what: str, **fields: int) -> Clap:
    config = ClapConfig(**(_text_fields(tensors, what) | _audio_fields(tensors) | fields))
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
    branch = _within(tensors, _AUDIO)
    if not branch:
        return {"audio_channels": 0}
    return {f"audio_{name}": value for name, value in htsat.htsat_fields(branch).items()}
