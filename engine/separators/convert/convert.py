"""Conversion of a checkpoint into a folder of this project, with the encoder of its queries."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from engine.separators.checkpoint import QueryDescription, read_description, save
from engine.separators.clap import find_tokenizer, read_clap, save_clap
from engine.separators.clap.tokenizer import TOKENIZER, parse_tokenizer
from engine.separators.convert.sources import Convertible, Source, find_source, open_source
from engine.storage.files import write_bytes
from engine.storage.paths import Location, Name, location, resolve_name

_ENCODER, _LABEL = "encoder", "{label}"


class Conversion(TypedDict):
    """The outcome of a conversion."""

    kind: str
    """Architecture of the separator, or ``clap``."""
    folder: str
    queries: list[str]
    """Kinds of queries that it takes."""
    template: str | None
    """Sentence of a label; None without an encoder."""
    licence: str
    source: str
    source_sha256: str
    """Of the file that was converted."""
    notes: list[str]
    """Changes of the weights, and what is missing."""


def convert(
    checkpoint: Name,
    folder: Name,
    *,
    clap: Name | None = None,
    tokenizer: Name | None = None,
    template: str | None = None,
) -> Conversion:
    """Convert a checkpoint of AudioSep, CLAPSep or CLAP, or write a folder of this project again.

    ``clap`` is the CLAP that CLAPSep was trained on: a file, or a folder of Hugging Face or of this project.
    ``tokenizer`` is RoBERTa's ``tokenizer.json`` or a folder with it; without it, it is taken from the checkpoint's
    folder or from the cache of Hugging Face, never downloaded. ``template`` is the sentence of a label. Nothing in the
    files is run. A folder that has this very conversion is returned at once. Raises ``ValueError`` for a checkpoint of
    another model, one that is damaged or whose weights are not finite, and for a folder that has something else.
    """
    if template is not None and (template.count(_LABEL) != 1 or set("{}") & set(template.replace(_LABEL, ""))):
        raise ValueError(f"--template must have {_LABEL} exactly once, got {template!r}; write it like 'a {_LABEL}'")
    target = location(folder)
    source, clap_source = find_source(checkpoint), find_source(clap) if clap is not None else None
    if _is_done(target, source, clap_source, template):
        if tokenizer is not None:
            _add_tokenizer(_encoder_folder(target), tokenizer)
        return _outcome(target, [])
    found = open_source(source, clap_source)
    if template is not None and (found.separator is None or found.encoder is None):
        raise ValueError(f"--template must come with a separator that reads text, got {source.path}; leave it out")
    found.template = template or found.template
    _save(found, target, tokenizer)
    return _outcome(target, found.notes)


def _is_done(target: Location, source: Source, clap: Source | None, template: str | None) -> bool:
    """True if a folder has this conversion; ``ValueError`` if it has anything else of this project."""
    kinds = [kind for kind in ("separator", "clap", "tagger") if (target / f"{kind}.json").is_file()]
    if not kinds and not (isinstance(target, Path) and target.is_file()):
        return False
    got = "a file" if not kinds else f"a {kinds[0]}"
    if kinds and kinds[0] != "tagger":
        description: Mapping[str, Any] = read_description(target) if kinds[0] == "separator" else read_clap(target)
        sha256 = description.get("source_sha256", description["weights_sha256"])
        found_template = description.get("queries", {}).get("template")
        if sha256 == source.sha256 and template in (None, found_template):
            if clap is None or read_clap(_encoder_folder(target)).get("source_sha256") == clap.sha256:
                return True
        got += f" of the file {sha256[:12]}…" + (f" with the template {found_template!r}" if found_template else "")
    raise ValueError(f"{target} must be a new folder or hold this conversion, got {got}; give another folder")


def _save(found: Convertible, target: Location, tokenizer: Name | None) -> None:
    """Write the encoder, then the separator's weights, then its description."""
    about: dict[str, object] = dict(found.about)
    if found.encoder is not None:
        folder = target if found.separator is None else target / _ENCODER
        text = _tokenizer_for(found, tokenizer)
        save_clap(found.encoder, folder, tokenizer=text, about=found.about_encoder or found.about)
        about["queries"] = QueryDescription(
            template=found.template, encoder=_ENCODER, encoder_fingerprint=read_clap(folder)["fingerprint"]
        )
    if found.separator is not None:
        save(found.separator, target, history=found.history, about=about)


def _tokenizer_for(found: Convertible, tokenizer: Name | None) -> str | None:
    """The tokenizer that was given, or that of the checkpoint's folder, or that in the cache if it is the encoder's."""
    assert found.encoder is not None
    if tokenizer is not None:
        text = find_tokenizer(tokenizer)
        if text is not None:
            parse_tokenizer(text, vocabulary=found.encoder.config.vocabulary, source=tokenizer)
        return text
    for place in (found.tokenizer_folder, None):
        try:
            text = find_tokenizer(place)
            if text is not None:
                parse_tokenizer(text, vocabulary=found.encoder.config.vocabulary, source=place or TOKENIZER)
                return text
        except (ValueError, OSError):  # a folder without one, a file of weights, another encoder's
            continue
    return None


def _add_tokenizer(folder: Location, tokenizer: Name) -> None:
    """Put a tokenizer into the folder of an encoder that has none."""
    text = find_tokenizer(tokenizer)
    if text is not None and not (folder / TOKENIZER).is_file():
        parse_tokenizer(text, vocabulary=read_clap(folder)["network"]["vocabulary"], source=tokenizer)
        write_bytes(folder / TOKENIZER, text.encode())


def _encoder_folder(target: Location) -> Location:
    """The folder of the encoder of a separator, or of a CLAP alone."""
    if not (target / "separator.json").is_file():
        return target
    return _encoder_of(read_description(target), target)


def _encoder_of(description: Mapping[str, Any], target: Location) -> Location:
    queries = description.get("queries")
    return resolve_name(queries["encoder"], folder=target) if queries is not None else target / _ENCODER


def _outcome(target: Location, notes: list[str]) -> Conversion:
    """A report of what is in a folder."""
    is_separator = (target / "separator.json").is_file()
    description: Mapping[str, Any] = read_description(target) if is_separator else read_clap(target)
    encoder, kinds, notes = _encoder_of(description, target) if is_separator else target, [], list(notes)
    if (encoder / "clap.json").is_file():
        network = read_clap(encoder)["network"] if is_separator else description["network"]
        kinds = [kind for kind, size in (("text", "text_layers"), ("audio", "audio_channels")) if network[size]]
    elif is_separator and not description["labels"]:
        notes.append("it has no text encoder: queries by text and audio fail, vectors in Python work")
    if "text" in kinds and not (encoder / TOKENIZER).is_file():
        notes.append(
            f"there is no tokenizer: copy {TOKENIZER} of FacebookAI/roberta-base into {encoder}, or convert again with "
            "--tokenizer; until then text queries fail unless it is in the cache of Hugging Face"
        )
    return Conversion(
        kind=description["architecture"],
        folder=str(target),
        queries=kinds or (["labels"] if description["labels"] else []),
        template=description.get("queries", {}).get("template"),
        licence=description.get("licence", ""),
        source=description.get("source", ""),
        source_sha256=description.get("source_sha256", description["weights_sha256"]),
        notes=notes,
    )
