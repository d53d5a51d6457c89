"""Checkpoints that can be converted, opened as a separator, as the encoder of its queries, or as both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from engine.cli.display import shown
from engine.separators import audiosep
from engine.separators.base import NetworkSeparator
from engine.separators.checkpoint import open_checkpoint, read_description
from engine.separators.clap import Clap, open_clap, read_clap
from engine.separators.clap.layout import from_audiosep, from_hugging_face, from_laion
from engine.separators.clapsep import layout as clapsep
from engine.separators.convert.identify import Identity, identify
from engine.separators.convert.pickles import ForeignCheckpoint, read_tensors
from engine.storage.paths import Location, Name, location, resolve_name

_TEMPLATES = {"audiosep": "{label}", "clapsep": "The sound of {label}"}
_OPTIONAL = ("licence", "source", "source_sha256")
_AUDIOSEP_CLAP, _CLAPSEP_CLAP = "query_encoder.model.", "clap_model.model."


@dataclass(frozen=True, kw_only=True)
class Source:
    """A checkpoint that was found: of another project, or a folder of this one."""

    path: Location
    sha256: str
    """Of the file that was converted, now or before, or of the weights of a folder of this project."""
    foreign: ForeignCheckpoint | None = None
    identity: Identity | None = None
    """The model in a foreign checkpoint."""


@dataclass(kw_only=True)
class Convertible:
    """A separator, an encoder, or both, and what is known of them."""

    separator: NetworkSeparator | None = None
    encoder: Clap | None = None
    template: str = "{label}"
    about: dict[str, str]
    """Optional fields of the description."""
    about_encoder: dict[str, str] = field(default_factory=dict)
    history: Sequence[Mapping[str, Any]] = ()
    tokenizer_folder: Location
    """Where the tokenizer may be."""
    notes: list[str] = field(default_factory=list)
    """Changes of the weights."""


def find_source(name: Name) -> Source:
    """Read the header of a checkpoint, or the description in a folder of this project."""
    path = location(name)
    if (path / "tagger.json").is_file():
        raise ValueError(f"cannot convert {path} (it is a tagger of this project); give it as tagger=DIR as it is")
    for kind, read in (("separator", read_description), ("clap", read_clap)):
        if (path / f"{kind}.json").is_file():
            description: Mapping[str, Any] = read(path)
            return Source(path=path, sha256=description.get("source_sha256", description["weights_sha256"]))
    foreign = read_tensors(path)
    return Source(path=path, sha256=foreign.sha256, foreign=foreign, identity=identify(foreign))


def open_source(source: Source, clap: Source | None) -> Convertible:
    """Make the networks of a checkpoint; ``ValueError`` if it is of another kind, or does not fit together."""
    if source.foreign is None or source.identity is None:
        if clap is not None:
            raise ValueError(
                f"--clap must come with a file of CLAPSep, got {source.path} of this project; leave it out"
            )
        return _open_own(source.path)
    identity, notes = source.identity, list[str]()
    about = {"licence": identity.licence, "source": identity.source, "source_sha256": source.sha256}
    found = Convertible(about=about, notes=notes, tokenizer_folder=_folder(source.path))
    if identity.kind not in ("audiosep", "clapsep", "clap"):
        raise ValueError(f"cannot convert {source.path} ({identity.name}); {identity.next}")
    if clap is not None and (identity.kind != "clapsep"):
        raise ValueError(f"--clap must come with a file of CLAPSep, got {identity.name}; leave it out")
    tensors = _checked(source.foreign, notes)
    if identity.kind == "clap":
        found.encoder = _clap_of(tensors, source.foreign)
        if found.encoder is None:
            raise ValueError(f"a CLAP must have a text encoder, got {source.path} without; give a complete file")
        return found
    found.template = _TEMPLATES[identity.kind]
    if identity.kind == "audiosep":
        found.separator = audiosep.from_original(tensors)
        has_text = any(name.startswith(f"{_AUDIOSEP_CLAP}text_branch.") for name in tensors)
        found.encoder, found.about_encoder = from_audiosep(tensors) if has_text else None, about
    elif clap is None:
        found.separator = clapsep.from_original(tensors)
        inside = {k.removeprefix(_CLAPSEP_CLAP): v for k, v in tensors.items() if k.startswith(_CLAPSEP_CLAP)}
        found.encoder, found.about_encoder = _clap_of(inside, source.foreign), about
    else:
        found.encoder, found.about_encoder, branch = _open_clap(clap, notes)
        found.separator, found.tokenizer_folder = clapsep.from_original(tensors, clap=branch), _folder(clap.path)
    _require_one_space(found)
    return found


def _open_clap(source: Source, notes: list[str]) -> tuple[Clap | None, dict[str, str], Mapping[str, Tensor]]:
    """The encoder in a CLAP, what is known of it, and tensors with those of its audio encoder."""
    if source.foreign is None or source.identity is None:
        own = open_clap(source.path)
        return own, _optional(read_clap(source.path)), own.state_dict()
    if source.identity.kind != "clap":
        raise ValueError(
            f"--clap must be a CLAP, got {source.path} with {source.identity.name}; give the CLAP that the separator "
            "was trained on"
        )
    tensors = _checked(source.foreign, notes)
    encoder = _clap_of(tensors, source.foreign)
    about = {"licence": source.identity.licence, "source": source.identity.source, "source_sha256": source.sha256}
    return encoder, about, tensors if encoder is None else encoder.state_dict()


def _clap_of(tensors: Mapping[str, Tensor], foreign: ForeignCheckpoint) -> Clap | None:
    """The CLAP in LAION's or Hugging Face's tensors; None if they have no encoder of text."""
    if any(name.startswith("text_model.") for name in tensors):
        return from_hugging_face(tensors, foreign.config)
    return from_laion(tensors) if any(name.startswith("text_branch.") for name in tensors) else None


def _checked(foreign: ForeignCheckpoint, notes: list[str]) -> dict[str, Tensor]:
    """The tensors in float32; ``ValueError`` that names one with weights that are not finite."""
    floating = {name: tensor for name, tensor in foreign.tensors.items() if tensor.is_floating_point()}
    for name, tensor in floating.items():
        if not tensor.isfinite().all():
            raise ValueError(
                f"the weights of {shown(name, most=120)} in {foreign.path} must be finite, got NaN or infinity; give a "
                "file of a training that did not diverge"
            )
    if others := sorted({str(one.dtype).removeprefix("torch.") for one in floating.values()} - {"float32"}):
        notes.append(f"weights of {' and '.join(others)} in {foreign.path.name} were converted to float32")
    return foreign.tensors | {name: tensor.float() for name, tensor in floating.items()}


def _require_one_space(found: Convertible) -> None:
    """Raise ``ValueError`` unless the separator's queries are made of the encoder's embeddings."""
    if found.encoder is None or found.separator is None:
        return
    sides = 2 if found.separator.uses_unwanted else 1
    needed, got = found.separator.config.query_features // sides, found.encoder.config.embedding_width
    if needed != got:
        raise ValueError(
            f"the encoder of its queries must have {needed} features, got {got}; give the CLAP that the separator was "
            "trained with"
        )


def _open_own(folder: Location) -> Convertible:
    """The separator or CLAP in a folder of this project."""
    if not (folder / "separator.json").is_file():
        return Convertible(encoder=open_clap(folder), about=_optional(read_clap(folder)), tokenizer_folder=folder)
    description = read_description(folder)
    found = Convertible(
        separator=open_checkpoint(folder),
        about=_optional(description),
        history=description["history"],
        tokenizer_folder=folder,
    )
    if (queries := description.get("queries")) is not None:
        found.tokenizer_folder = resolve_name(queries["encoder"], folder=folder)
        found.encoder = open_clap(found.tokenizer_folder, fingerprint=queries["encoder_fingerprint"])
        found.about_encoder = _optional(read_clap(found.tokenizer_folder))
        found.template = queries["template"]
    return found


def _folder(path: Location) -> Location:
    return path if path.is_dir() else path.parent


def _optional(description: Mapping[str, Any]) -> dict[str, str]:
    return {key: description[key] for key in _OPTIONAL if key in description}
