"""Checkpoint files of other projects, read without running anything that is in them.

Torch's files are zip archives of a pickle and of the tensors' numbers, or (before torch 1.6) a row of pickles followed
by the numbers. Their pickles are read by :mod:`engine.separators.convert.unpickler` alone. ``torch.load`` with
``weights_only=True`` is not used: it refuses pickles of protocol 4, which LAION's CLAP has, and a pickle of a hundred
bytes can hold it up for years. Tensors are mapped into memory, so that a file of 2 GB takes none before it is used.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from engine.cli.display import shown
from engine.separators.convert.unpickler import StoredTensor, read_pickle
from engine.storage.files import read_json, sha256_file
from engine.storage.paths import Name, is_s3, location

_MAX_INDEX_BYTES = 1 << 24
_MAX_TENSORS, _MAX_NAME = 20_000, 200
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_WRAPPERS, _PREFIX = ("state_dict", "model"), "module."
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Names of the files with weights in a folder of Hugging Face."""
_REMEDY = "give a checkpoint of AudioSep, CLAPSep or CLAP as its authors released it"


@dataclass(frozen=True, kw_only=True)
class ForeignCheckpoint:
    """The tensors of a file that another project wrote."""

    path: Path
    """The file with the tensors."""
    tensors: dict[str, Tensor]
    """Under their original names, without a ``module.`` that all have; they share the file's memory."""
    format: str
    """Name of the file's format."""
    sha256: str
    """Of the file's bytes."""
    ignored: tuple[str, ...] = ()
    """Other entries of the file, such as the optimiser's state."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The content of ``config.json`` in a folder of Hugging Face."""


def read_tensors(name: Name) -> ForeignCheckpoint:
    """Read a checkpoint file (safetensors, or torch's), or a folder with ``config.json`` and such a file.

    Nothing in the file is run. Raises ``ValueError`` for a file of another format, a damaged one, and one whose pickle
    has anything but tensors, plain values, ``OrderedDict`` and numpy's scalars.
    """
    path, config = _weights_of(name)
    try:
        kind, value, positions = _read(path)
        tensors, ignored = _unwrapped(value)
        if positions is not None:
            tensors = _mapped(tensors, positions, path)
    except zipfile.BadZipFile as error:
        raise ValueError(
            f"cannot read {path} (its end is missing or damaged: {shown(error)}); copy or download it again"
        ) from None
    except (ValueError, SafetensorError, OSError, EOFError, RuntimeError) as error:
        raise ValueError(f"cannot read {path} ({shown(error)}); {_REMEDY}") from None
    return ForeignCheckpoint(
        path=path, tensors=tensors, format=kind, sha256=sha256_file(path), ignored=ignored, config=config
    )


def _weights_of(name: Name) -> tuple[Path, Mapping[str, Any]]:
    """The local file with the tensors, and the content of the ``config.json`` in a folder."""
    path = location(name)
    if is_s3(path) or not isinstance(path, Path):
        raise ValueError(f"a checkpoint of another project must be a local file, got {path}; copy it to this machine")
    if path.is_file():
        return path, {}
    if not path.is_dir():
        raise ValueError(f"there is no {path}; give a checkpoint file, or a folder with config.json and the weights")
    found = [path / weights for weights in WEIGHTS if (path / weights).is_file()]
    if not found or not (path / "config.json").is_file():
        missing = "config.json" if found else " or ".join(WEIGHTS)
        raise ValueError(f"there is no checkpoint in {path} (no {missing}); give a folder that has it, or the file")
    config = read_json(path / "config.json", most_bytes=1 << 22, remedy="copy it again")
    return found[0], config if isinstance(config, dict) else {}


def _read(path: Path) -> tuple[str, Any, dict[str, int] | None]:
    """The format of a file, the value in it, and where the numbers of its tensors are."""
    with _Bounded(io.FileIO(path)) as file:
        start = file.read(9)
        file.seek(0)
        if start[8:] == b"{" and int.from_bytes(start[:8], "little") <= _MAX_INDEX_BYTES:
            return "safetensors", load_file(path), None
        if start.startswith(b"PK\x03\x04"):
            return "torch", *_read_archive(file)
        if start.startswith(b"\x80"):
            return "torch before 1.6", *_read_legacy(file)
    cause = "it is neither a safetensors file nor one that torch wrote"
    raise ValueError(cause)


class _Bounded(io.BufferedReader):
    """A file of which nobody reads much at once: the list of entries of a zip archive may be as large as the file."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > _MAX_INDEX_BYTES:
            cause = f"its index must have at most {_MAX_INDEX_BYTES:,} bytes, got {size:,}"
            raise ValueError(cause)
        return super().read(size)


def _read_archive(file: _Bounded) -> tuple[Any, dict[str, int]]:
    """The value of a zip archive's pickle, and the position of every storage."""
    with zipfile.ZipFile(file) as archive:
        entries = {one.filename: one for one in archive.infolist()}
        if packed := [name for name, one in entries.items() if one.compress_type or one.compress_size != one.file_size]:
            cause = f"its entry {shown(packed[0], most=60)} is compressed, which torch's files are not"
            raise ValueError(cause)
        pickles = [name for name in entries if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            cause = "it is a zip archive, but not one that torch wrote"
            raise ValueError(cause)
        root = pickles[0].removesuffix("data.pkl")
        if f"{root}byteorder" in entries and archive.read(f"{root}byteorder") != b"little":
            cause = "its numbers have the byte order of another machine"
            raise ValueError(cause)
        value, stored = read_pickle(io.BytesIO(archive.read(pickles[0])))
    positions = {}
    for key, numbers in stored.items():
        entry = entries.get(f"{root}data/{key}")
        if entry is None or entry.file_size < numbers.count * numbers.dtype.itemsize:
            cause = f"the numbers of its storage {shown(key, most=30)} are missing"
            raise ValueError(cause)
        file.seek(entry.header_offset)
        header = file.read(30)
        if len(header) < 30:
            cause = "its list of entries is damaged"
            raise ValueError(cause)
        positions[key] = entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))
    return value, positions


def _read_legacy(file: _Bounded) -> tuple[Any, dict[str, int]]:
    """The same of a row of pickles: a number, a version, facts of the machine, the value, the keys of the storages."""
    pickles = io.BytesIO(file.read(_MAX_INDEX_BYTES))
    if read_pickle(pickles)[0] != _LEGACY_MAGIC:
        cause = "it is a pickle, but not one that torch wrote"
        raise ValueError(cause)
    read_pickle(pickles), read_pickle(pickles)
    value, stored = read_pickle(pickles)
    keys, _ = read_pickle(pickles)
    if not isinstance(keys, list):
        cause = "its list of storages is missing"
        raise ValueError(cause)
    positions, position = {}, pickles.tell()
    for numbers in [stored[key] for key in keys if type(key) is str and key in stored]:
        positions[numbers.key] = position + 8
        position += 8 + numbers.count * numbers.dtype.itemsize
    return value, positions


def _mapped(tensors: Mapping[str, StoredTensor], positions: Mapping[str, int], path: Path) -> dict[str, Tensor]:
    """Tensors whose numbers are mapped from the file into memory; writing to them does not change the file."""
    size = path.stat().st_size
    total = sum(math.prod(one.shape) * one.numbers.dtype.itemsize for one in tensors.values())
    if total > 2 * size:  # names may share numbers, but hardly all
        cause = f"its tensors have {total:,} bytes, and the file only {size:,}"
        raise ValueError(cause)
    file = torch.UntypedStorage.from_file(str(path), False, size)
    found = {}
    for name, tensor in tensors.items():
        numbers, start = tensor.numbers, positions.get(tensor.numbers.key, size)
        end = start + numbers.count * numbers.dtype.itemsize
        if end > size:
            cause = f"it ends before the numbers of {shown(name, most=100)}"
            raise ValueError(cause)
        part = file[start:end]
        if start % numbers.dtype.itemsize:
            part = part.clone()
        found[name] = torch.empty(0, dtype=numbers.dtype).set_(part, tensor.offset, tensor.shape, tensor.stride)
    return found


def _unwrapped(value: Any) -> tuple[dict[str, Any], tuple[str, ...]]:  # noqa: ANN401 - any value
    """The tensors by name in the value of a file, and the names of its other entries."""
    ignored: list[str] = []
    for _ in range(2):
        if isinstance(value, dict) and (inner := [key for key in _WRAPPERS if isinstance(value.get(key), dict)]):
            ignored += [str(key) for key in value if key != inner[0]]
            value = value[inner[0]]
    entries = value if isinstance(value, dict) else {}
    tensors = {str(name): one for name, one in entries.items() if isinstance(one, StoredTensor | Tensor)}
    ignored += [str(name) for name in entries if str(name) not in tensors]
    if not 0 < len(tensors) <= _MAX_TENSORS:
        cause = f"it must have from 1 to {_MAX_TENSORS:,} tensors by name, got {len(tensors):,}"
        raise ValueError(cause)
    if longest := [name for name in tensors if len(name) > _MAX_NAME]:
        cause = f"names of tensors must have at most {_MAX_NAME} characters, got {len(longest[0]):,}"
        raise ValueError(cause)
    if all(name.startswith(_PREFIX) for name in tensors):
        tensors = {name.removeprefix(_PREFIX): one for name, one in tensors.items()}
    return tensors, tuple(ignored)
