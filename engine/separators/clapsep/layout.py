"""CLAPSep's files: a slim one with what its authors trained, laid over a CLAP, and a full one with all of it.

Facts: tensors of the original training class (Aisaka0v0/CLAPSep); no file was at hand, so both layouts are read.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from engine.separators.clap.htsat import htsat_fields, is_unused
from engine.separators.clapsep.network import ClapSepConfig
from engine.separators.clapsep.separator import ClapSep
from engine.separators.convert.keys import require_tensors

_ENCODER, _DECODER = "audio_branch.", "decoder_model."
_COPIES = ("clap_model.", "stft.", "istft.")  # the CLAP of the queries, and kernels that follow from the window
_ADAPTED = re.compile(r"(audio_branch\.layers\.\d+\.blocks\.\d+\.attn\.(?:qkv|proj))\.weight")
"""Weights of the encoder to which CLAPSep adds a product of two narrow matrices (LoRA, arXiv 2106.09685)."""


def recognises(names: Collection[str]) -> bool:
    """A file with tensors of these names has a CLAPSep's decoder."""
    return _DECODER + "mask_net.0.weight" in names


def from_original(tensors: Mapping[str, Tensor], clap: Mapping[str, Tensor] | None = None) -> ClapSep:
    """The separator of an original file's tensors.

    ``clap`` has the tensors of the CLAP that it was trained with; a slim file needs them. What both have is taken from
    CLAPSep's. Raises ``ValueError`` for a tensor that is missing, misshapen, or used by nothing.
    """
    merged = _encoder_of(clap or {}) | dict(tensors)
    if _ENCODER + "patch_embed.proj.weight" not in merged:
        raise ValueError(
            "a CLAPSep file of its trained tensors alone must come with its CLAP, got one without an audio encoder; "
            "add --clap FILE with the CLAP that it was trained on, HTSAT-base of LAION"
        )
    config = _config_of(merged)
    with torch.device("meta"):
        wanted = {name: tuple(value.shape) for name, value in ClapSep(config).state_dict().items()}
    ranks = [value.shape[0] for name, value in merged.items() if name.endswith(".lora_A") and value.ndim]
    adapters = _adapters(wanted, ranks[0]) if ranks else {}
    found = require_tensors(merged, wanted | adapters, ignored=_is_ignored, what="a CLAPSep checkpoint")
    separator = ClapSep(config)
    separator.load_state_dict({name: _merged(name, found) for name in wanted})
    return separator.eval()


def _encoder_of(clap: Mapping[str, Tensor]) -> dict[str, Tensor]:
    parts = {name: name.partition(_ENCODER) for name in clap}
    return {_ENCODER + rest: clap[name] for name, (_, prefix, rest) in parts.items() if prefix}


def _config_of(tensors: Mapping[str, Tensor]) -> ClapSepConfig:
    """The config that shapes state; a tensor that is missing leaves the default, and is listed later."""
    fields = htsat_fields({name.removeprefix(_ENCODER): value for name, value in tensors.items()})
    layers = {match[0] for name in tensors if (match := re.match(r"decoder_model\.mask_net\.2\.layers\.\d+\.", name))}
    for field, name, axis in (
        ("query_features", "film.skip_conv.beta.weight", 1),
        ("mask_channels", "mask_net.0.weight", 0),
        ("mask_hidden", "mask_net.2.layers.0.linear1.weight", 0),
    ):
        value = tensors.get(_DECODER + name)
        if value is not None and value.ndim == 2:
            fields[field] = value.shape[axis]
    return ClapSepConfig(**fields, mask_depth=max(1, len(layers)))


def _adapters(wanted: Mapping[str, tuple[int, ...]], rank: int) -> dict[str, tuple[int, ...]]:
    adapted = {match[1]: wanted[name] for name in wanted if (match := _ADAPTED.fullmatch(name))}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (num_out, num_in) in adapted.items():
        shapes |= {f"{name}.lora_A": (rank, num_in), f"{name}.lora_B": (num_out, rank)}
    return shapes


def _is_ignored(name: str) -> bool:
    return name.startswith(_COPIES) or is_unused(name.removeprefix(_ENCODER).removeprefix(_DECODER))


def _merged(name: str, found: Mapping[str, Tensor]) -> Tensor:
    """A tensor of the separator, with its narrow matrices A and B added as B A / rank."""
    base = name.removesuffix(".weight")
    if not name.endswith(".weight") or f"{base}.lora_A" not in found:
        return found[name]
    narrow, wide = found[f"{base}.lora_A"].float(), found[f"{base}.lora_B"].float()
    return torch.addmm(found[name].float(), wide, narrow, alpha=1.0 / len(narrow))
