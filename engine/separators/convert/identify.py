"""The model that a foreign checkpoint holds, by the names and shapes of its tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from engine.cli.display import shown
from engine.separators.audiosep import recognises as is_audiosep
from engine.separators.clap.layout import recognises as is_clap
from engine.separators.clapsep.layout import recognises as is_clapsep
from engine.separators.convert.pickles import ForeignCheckpoint

_PATCHES = ("audio_branch.patch_embed.proj.weight", "audio_model.audio_encoder.patch_embed.proj.weight")
_SIZES = {128: "HTSAT-base", 96: "HTSAT-tiny"}


@dataclass(frozen=True, kw_only=True)
class Identity:
    """The model in a checkpoint."""

    kind: Literal["audiosep", "clapsep", "clap", "tagger", "unknown"]
    name: str
    """The model in words."""
    licence: str = ""
    """Licence of its weights, as far as its authors state one."""
    source: str = ""
    """The project that released it."""
    next: str
    """Advice on what to do with the file."""


def identify(checkpoint: ForeignCheckpoint) -> Identity:
    """The model in a checkpoint; its kind is ``unknown`` if it is none that this project reads."""
    names, tensors = checkpoint.tensors.keys(), checkpoint.tensors
    if is_audiosep(names):
        return Identity(
            kind="audiosep",
            name=f"AudioSep {'with' if _has(tensors, 'query_encoder.') else 'without'} its text encoder",
            licence="MIT",
            source="AudioSep (github.com/Audio-AGI/AudioSep)",
            next="clearsep convert FILE -o DIR",
        )
    if is_clapsep(names):
        is_full = any(name in tensors for name in _PATCHES)
        has_clap = _has(tensors, "clap_model.model.text_branch.")
        return Identity(
            kind="clapsep",
            name="CLAPSep, full" if is_full else "CLAPSep, slim (what its authors trained, without their CLAP)",
            licence="none stated: all rights reserved by the authors; do not redistribute",
            source="CLAPSep (github.com/Aisaka0v0/CLAPSep)",
            next="clearsep convert FILE -o DIR"
            + ("" if is_full and has_clap else " --clap CLAP (CLAP: the file of the CLAP that it was trained on)"),
        )
    if is_clap(names):
        return _clap(checkpoint)
    architectures = checkpoint.config.get("architectures")
    if isinstance(architectures, list) and any(str(one).endswith("ForAudioClassification") for one in architectures):
        return Identity(
            kind="tagger",
            name="audio classifier of Hugging Face",
            next="give its folder as tagger=DIR; it needs no conversion",
        )
    first = ", ".join(shown(name, most=80) for name in list(names)[:5])
    groups = Counter(name.partition(".")[0] for name in names).most_common(5)
    counts = ", ".join(f"{count:,} {shown(group, most=40)}.*" for group, count in groups)
    return Identity(
        kind="unknown",
        name=f"unknown: {len(names):,} tensors ({counts}), the first are {first}",
        next="give a checkpoint of AudioSep, CLAPSep or CLAP as its authors released it; write a factory for another "
        "separator (docs/extending.md)",
    )


def _clap(checkpoint: ForeignCheckpoint) -> Identity:
    tensors = checkpoint.tensors
    is_hugging_face = _has(tensors, "audio_model.") or _has(tensors, "text_model.")
    width = next((tensors[name].shape[0] for name in _PATCHES if name in tensors and tensors[name].ndim), 0)
    size = _SIZES.get(width, f"an HTSAT of {width} channels" if width else "no audio encoder")
    if is_hugging_face:
        owner, licence = "Hugging Face", "see the README.md of its folder; LAION's own are Apache-2.0"
    else:
        owner, licence = "LAION", "CC0-1.0, by the LICENSE of its project; none is stated for the weights alone"
    return Identity(
        kind="clap",
        name=f"CLAP of {owner}, with {size}",
        licence=licence,
        source="CLAP (github.com/LAION-AI/CLAP)",
        next="clearsep convert FILE -o DIR (for a tagger or a student), or clearsep convert CLAPSEP --clap FILE -o DIR",
    )


def _has(tensors: Mapping[str, Tensor], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in tensors)
