"""Fingerprints of settings and inputs, and the claim of an output folder for one set of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, cast

import yaml

from engine.errors import DamagedError
from engine.storage.documents import MAX_SETTINGS_BYTES, bounded, parse_yaml
from engine.storage.files import Record, check_record, damaged, open_binary, read_json, write_bytes, write_json
from engine.storage.paths import Location

_AGAIN = "start the command that wrote it again, which replaces it"


def fingerprint(value: object) -> str:
    """Sixteen hexadecimal digits of the SHA-256 of any JSON-like value."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def write_sealed(path: Location, record: Mapping[str, Any]) -> None:
    """Write a record as JSON with its own checksum."""
    write_json(path, {**record, "checksum": fingerprint(record)})


def read_sealed(path: Location, kind: type[Record], *, needs: Collection[str] = ()) -> Record:
    """Read what :func:`write_sealed` wrote; ``DamagedError`` if it is not that, or has not the fields of ``kind``.

    ``needs`` are those that must be there. Older versions wrote no checksum.
    """
    try:
        record = read_json(path, remedy=_AGAIN)
        checksum = record.pop("checksum", None) if isinstance(record, dict) else None
        check_record(record, kind, path, needs=needs, remedy=_AGAIN)
    except ValueError as error:
        raise DamagedError(str(error)) from error
    if checksum is not None and checksum != fingerprint(record):
        raise damaged(path)
    return cast(Record, record)


def claim(
    path: Location,
    identity: Mapping[str, Any],
    *,
    what: str,
    comparable: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
) -> None:
    """Store what a folder is for in ``path``, as YAML if its name ends in ``.yaml``, else as JSON.

    If the file exists, it must have the same ``identity``, and is then updated: ``comparable`` may leave out what is
    allowed to change. Raises ``ValueError`` if it differs; ``what`` is a noun such as "a pass".
    """
    is_yaml = path.suffix == ".yaml"
    wanted = json.loads(json.dumps(identity, allow_nan=False))
    if path.is_file():
        found = _read_yaml(path) if is_yaml else read_json(path, remedy="give another folder")
        if found == wanted:
            return
        if not isinstance(found, dict):
            kind = type(found).__name__
            raise ValueError(f"{path} must be a mapping of settings, got {kind}; give another folder")
        compare = comparable or (lambda settings: settings)
        if changed := differences(compare(found), compare(wanted)):
            raise ValueError(
                f"{path.parent} must hold {what} with these settings, got {what} with another {changed}; "
                "give another folder"
            )
    if is_yaml:
        write_bytes(path, yaml.safe_dump(wanted, sort_keys=False).encode())
    else:
        write_json(path, wanted)


def require_unused(out: Location, *, own: Collection[str] = ()) -> None:
    """Raise ``ValueError`` if an output folder has anything but hidden files and those named ``own``."""
    if isinstance(out, Path):
        names = [path.name for path in out.iterdir()] if out.is_dir() else [out.name] if out.exists() else []
    else:
        names = [child.name for child in out.children()]
    if others := sorted(name for name in names if not name.startswith(".") and name not in own):
        raise ValueError(f"{out} must be a new folder, got one with {others[0]}; give another folder")


def _read_yaml(path: Location) -> Any:  # noqa: ANN401 - YAML is any shape
    try:
        with open_binary(path) as file:
            return parse_yaml(bounded(file, MAX_SETTINGS_BYTES))
    except ValueError as error:
        raise ValueError(f"cannot read {path} as YAML ({error}); give another folder") from None


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The names whose values differ, such as ``settings (clip_s 3.0, not 10.0)``; empty if none does."""
    changes = []
    for name in wanted:
        before, now = found.get(name), wanted[name]
        if before == now:
            continue
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            keys = [key for key in {**now, **before} if before.get(key) != now.get(key)]
            changes.append(f"{name} ({', '.join(f'{key} {_change(before.get(key), now.get(key))}' for key in keys)})")
        else:
            changes.append(f"{name} ({_change(before, now)})")
    return " and ".join(changes)


def _change(before: object, now: object) -> str:
    return f"{_shortened(before)}, not {_shortened(now)}"


def _shortened(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
