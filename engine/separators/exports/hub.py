"""A separator as a folder that a model hub takes as it is: its files, those of its encoder, and a model card."""

from __future__ import annotations

import functools
import re
import shutil
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jinja2
import yaml

from engine.cli.display import markdown
from engine.separators.checkpoint import SeparatorDescription, read_description, require_fingerprint, terms_of
from engine.storage.factories import is_dotted_name
from engine.storage.files import atomic_path, open_binary, read_json, write_bytes, write_json
from engine.storage.fingerprints import require_unused
from engine.storage.paths import Location, Name, location, resolve_name

_ENCODER = "encoder"
_FILES = ("*.json", "*.safetensors")  # of an encoder
_WEIGHTS, _DESCRIPTION, _CARD = "weights.safetensors", "separator.json", "README.md"
_MAX_CURVE = 12
_MAX_LABELS = 100
_LICENCES = ("mit", "apache-2.0", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0")
"""Licences that hubs know by these names."""
_ABSOLUTE = re.compile(r"([A-Za-z][\w+.-]*:)?[/\\~]")
_INSIDE = re.compile(r"(?<![\w.~/\\])([A-Za-z][\w+.-]*:[/\\]|~/|/)[^\s\"',;]+")
"""An absolute path or an address inside a text."""


def require_folder(name: Name) -> Location:
    """The folder of a separator that can be exported; ``ValueError`` for a factory."""
    if is_dotted_name(name):
        raise ValueError(
            f"a separator for export must be a checkpoint folder, got the factory {name!s}; share the code that "
            "makes it instead"
        )
    read_description(name)
    require_fingerprint(name)
    return location(name)


def save_pretrained(name: Name, out: Name) -> None:
    """Write a separator's folder for a model hub: its files, those of its encoder, and a model card, ``README.md``.

    ``name`` is a checkpoint folder. Folders of this machine that its history names are left out; a model card that is
    there stays. :func:`load_separator` opens the folder. Raises ``ValueError`` if ``out`` has anything else.

    >>> cs.save_pretrained("separator", "shared-separator")
    >>> cs.from_pretrained("shared-separator").labels
    ('bell', 'dog')
    """
    folder, out = require_folder(name), location(out)
    description = _portable(read_description(folder))
    _require_own(folder, out, description)
    queries = read_description(folder).get("queries")
    if queries is not None:
        _copy_encoder(resolve_name(queries["encoder"], folder=folder), out / _ENCODER)
    _copy(folder / _WEIGHTS, out / _WEIGHTS)
    if not (out / _CARD).is_file():
        encoder = read_json(out / _ENCODER / "clap.json") if queries is not None else {}
        write_bytes(out / _CARD, _card(description, encoder, num_bytes=_num_bytes(out / _WEIGHTS)).encode())
    write_json(out / _DESCRIPTION, description)


def _require_own(folder: Location, out: Location, description: SeparatorDescription) -> None:
    if folder == out:
        raise ValueError(f"the folder for a hub must be another than the separator's, got {out} twice; give a new one")
    require_unused(out, own=(_WEIGHTS, _DESCRIPTION, _CARD, _ENCODER))
    if (out / _DESCRIPTION).is_file():
        found = read_json(out / _DESCRIPTION, remedy="give another folder")
        if not isinstance(found, dict) or found.get("fingerprint") != description["fingerprint"]:
            raise ValueError(f"{out} must hold the same separator, got another one; give another folder")


def _portable(description: SeparatorDescription) -> SeparatorDescription:
    """The description with the encoder in its own folder and without folders of this machine; of one fingerprint."""
    portable: dict[str, Any] = {**description, "history": [without_places(entry) for entry in description["history"]]}
    if "queries" in description:
        portable["queries"] = {**description["queries"], "encoder": _ENCODER}
    return cast(SeparatorDescription, portable)


def without_places(value: Any) -> Any:  # noqa: ANN401 - a JSON-like value
    """A JSON-like value whose texts have only the names of files, not where they are.

    >>> without_places({"tracks": "/home/me/run/tracks", "gain": "1/2", "clean": "s3://bucket/key/clips.csv"})
    {'tracks': 'tracks', 'gain': '1/2', 'clean': 'clips.csv'}
    """
    if isinstance(value, Mapping):
        return {key: without_places(one) for key, one in value.items()}
    if isinstance(value, list):
        return [without_places(one) for one in value]
    if not isinstance(value, str):
        return value
    return _last_part(value) if _ABSOLUTE.match(value) else _INSIDE.sub(lambda found: _last_part(found[0]), value)


def _last_part(place: str) -> str:
    """The name at the end of a path or of an address, which may have a query with secrets."""
    return re.split(r"[/\\]", place.partition("?")[0].rstrip("/\\"))[-1].rpartition("@")[2]


def _copy(source: Location, target: Location) -> None:
    with open_binary(source) as reader, atomic_path(target) as temporary, open(temporary, "wb") as writer:
        shutil.copyfileobj(reader, writer, 1 << 20)


def _copy_encoder(encoder: Location, out: Location) -> None:
    files: list[Location] = [path for pattern in _FILES for path in encoder.glob(pattern)]
    if not files:
        raise ValueError(
            f"there is no encoder of the separator's queries in {encoder}; convert the separator again, or put its "
            "folder there"
        )
    for path in files:
        _copy(path, out / path.name)


def _num_bytes(path: Location) -> int:
    with open_binary(path) as file:
        return file.seek(0, 2)


@functools.cache
def _template() -> jinja2.Template:
    loader = jinja2.PackageLoader("engine.separators.exports", "")
    environment = jinja2.Environment(
        loader=loader, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["markdown"] = markdown
    return environment.get_template("card.md.jinja")


def _card(description: SeparatorDescription, encoder: Mapping[str, Any], *, num_bytes: int) -> str:
    """The model card; ``encoder`` is the description of the encoder of its queries."""
    front: dict[str, Any] = {
        "library_name": "clearsep",
        "pipeline_tag": "audio-to-audio",
        "tags": ["audio", "sound-separation", "clearsep", description["architecture"]],
    }
    front |= _licence(description.get("licence"))
    return _template().render(
        front_matter=yaml.safe_dump(front, sort_keys=False),
        description=description,
        encoder=encoder,
        terms=terms_of(description)[1:] if "licence" in description else terms_of(description),
        num_bytes=num_bytes,
        trainings=[{**entry, "curve": _thinned(entry.get("curve") or [])} for entry in description["history"]],
        labels=description["labels"][:_MAX_LABELS],
    )


def _licence(name: str | None) -> Mapping[str, str]:
    """Fields of the card's head for a licence; nothing for an unknown one."""
    if not name:
        return {}
    known = name.strip().lower().replace(" ", "-")
    return {"license": known} if known in _LICENCES else {"license": "other", "license_name": name}


def _thinned(curve: Sequence[Mapping[str, float]]) -> list[Mapping[str, float]]:
    """Some points of a learning curve, the last one among them."""
    step = -(-len(curve) // _MAX_CURVE) or 1
    return list(curve[::-1][::step][::-1])
