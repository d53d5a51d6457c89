"""Networks on disk: ``weights.safetensors`` and a description in JSON; loading one runs no code from its folder.

Nothing is allocated for what a description merely states: its network is first made without memory, on torch's device
``meta``, and compared with the header of the weights, whose size is that of the file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Generic, TypeVar

import torch
from pydantic import ConfigDict, Field, with_config
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import nn
from typing_extensions import TypedDict

from engine.cli.display import shown
from engine.schema import MAX_TEXT
from engine.settings import NEWER, deciding, fields_of
from engine.storage.documents import MAX_DESCRIPTION_BYTES, parse_json
from engine.storage.files import atomic_path, check_record, open_binary, read_json, sha256_file, write_json
from engine.storage.paths import Location, Name, location

_FORMAT = 1
_WEIGHTS = "weights.safetensors"
_MAX_HEADER_BYTES = 1 << 22
_MAX_UNSTORED_BYTES = 1 << 26  # windows and filters, which follow from the config and are in no file
_DTYPES = {torch.float32: "F32", torch.int64: "I64"}
_AGAIN = "copy the folder again, or use the version that wrote it"

Network = TypeVar("Network", bound=nn.Module)


@with_config(ConfigDict(extra="forbid"))
class Description(TypedDict):
    """The content of a network's JSON file, ``KIND.json``."""

    format: int
    architecture: str
    """Name of the network's code."""
    network: dict[str, int]
    """Fields of the network's config class."""
    labels: list[Annotated[str, Field(min_length=1, max_length=MAX_TEXT)]]
    weights_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    fingerprint: Annotated[str, Field(pattern="^[0-9a-f]{16}$")]
    """Equal for networks with equal outputs."""
    history: list[dict[str, Any]]
    """One entry for each training of the weights, in order."""


class _Tensor(TypedDict):
    """A tensor in the header of the weights."""

    dtype: str
    shape: list[int]


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Generic[Network]):
    """The layout of the folders of one kind of network."""

    kind: str
    """Name of the kind; the description is ``KIND.json``."""
    architecture: str
    """Name of the network's code; folders of another are refused."""
    config: type
    """Config class of the network's shape."""
    make: Callable[[Any, Sequence[str]], Network]
    """Makes a network from its config object and its labels."""
    description: type = Description
    """Type of the description: a :class:`Description`, perhaps with further fields."""
    newer: tuple[str, ...] = ()
    """Weights that folders of earlier versions lack; they are zeros there."""

    def save(
        self,
        network: Network,
        folder: Name,
        *,
        config: Any,  # noqa: ANN401 - an instance of any config class
        labels: Sequence[str],
        more: Callable[[Mapping[str, Any]], Mapping[str, Any]],
        history: Sequence[Mapping[str, Any]],
    ) -> None:
        """Write the folder, weights first and the description last, each atomically.

        ``more`` returns further fields, from those that every description has; ``history`` has one JSON-like entry for
        each training of the weights.
        """
        weights = location(folder) / _WEIGHTS
        with atomic_path(weights) as temporary:
            save_file({name: value.contiguous().cpu() for name, value in network.state_dict().items()}, temporary)
        description: dict[str, Any] = {
            "format": _FORMAT,
            "architecture": self.architecture,
            "network": deciding(config),
            "labels": list(labels),
            "weights_sha256": sha256_file(weights),
        }
        description |= more(description)
        write_json(location(folder) / f"{self.kind}.json", description | {"history": list(history)})

    def read(self, folder: Name) -> Description:
        """Read the description; raises ``ValueError`` if it is missing or wrong, or if the weights are of another.

        Of the weights only the header is read, and nothing if they are not there.
        """
        description, weights = self._describe(folder), location(folder) / _WEIGHTS
        if weights.is_file():
            self._require_fit(description, folder)
        return description

    def _describe(self, folder: Name) -> Description:
        path = location(folder) / f"{self.kind}.json"
        if not path.is_file():
            raise ValueError(f"there is no {self.kind} in {folder} (no {path.name}); give the folder with this file")
        description = read_json(path, most_bytes=MAX_DESCRIPTION_BYTES, remedy=_AGAIN)
        for key, wanted in (("format", _FORMAT), ("architecture", self.architecture)):
            found = description.get(key) if isinstance(description, dict) else None
            if found != wanted:
                got = shown(repr(found), most=80)
                raise ValueError(f"{path} must have {key} {wanted!r}, got {got}; use the version that wrote it")
        checked: Description = check_record(description, self.description, path, remedy=_AGAIN)
        for key, value in checked["network"].items():
            if (found := description.get(key, value)) != value:
                raise ValueError(f"{key} of {path} must be its network's {value}, got {found}; {_AGAIN}")
        return checked

    def _make(self, description: Description, folder: Name) -> Network:
        """The network of a description, with weights drawn at random."""
        try:
            config = self.config(**description["network"])
            needed = {name for name, field in fields_of(self.config).items() if NEWER not in field.metadata}
            if missing := sorted(needed - set(description["network"])):
                cause = f"{missing[0]} must be set, got nothing"
                raise ValueError(cause)
            labels = description["labels"]
            if repeated := [label for label, count in Counter(labels).items() if count > 1]:
                cause = f"labels must differ, got {shown(repr(repeated[0]))} more than once"
                raise ValueError(cause)
            return self.make(config, labels)
        except ValueError as error:
            why = f"network or labels of {self.kind}.json: {error}"
            raise ValueError(f"cannot load the {self.kind} in {folder} ({why}); {_AGAIN}") from None

    def load(self, folder: Name, *, device: str | torch.device = "cpu") -> Network:
        """Load the network in a folder, in evaluation mode; raises ``ValueError`` if its files do not fit together."""
        description, weights = self._describe(folder), location(folder) / _WEIGHTS
        if not weights.is_file() or sha256_file(weights) != description["weights_sha256"]:
            raise ValueError(f"{weights} must be the file that {self.kind}.json describes, got another; copy both")
        self._require_fit(description, folder)
        try:
            values = load(weights.read_bytes())  # before the network takes memory, for the bytes are freed after it
            network = self._make(description, folder)
            own = network.state_dict()
            zeros = {key: torch.zeros_like(own[key]) for key in self.newer if key in own}
            network.load_state_dict(zeros | values)
        except (RuntimeError, SafetensorError) as error:
            raise ValueError(self._misfit(folder, error)) from None
        return network.to(device).eval()

    def _require_fit(self, description: Description, folder: Name) -> None:
        """Raise ``ValueError`` unless the weights have the names, types, shapes and size of the described network."""
        with torch.device("meta"):  # takes no memory
            network = self._make(description, folder)
        stored = network.state_dict()
        unstored = sum(value.nbytes for key, value in network.named_buffers() if key not in stored)
        if unstored > _MAX_UNSTORED_BYTES:
            cause = f"the network of {self.kind}.json has filters of {unstored:,} bytes, over {_MAX_UNSTORED_BYTES:,}"
            raise ValueError(f"cannot load the {self.kind} in {folder} ({cause}); {_AGAIN}")
        wanted = {key: (_DTYPES.get(one.dtype, str(one.dtype)), list(one.shape)) for key, one in stored.items()}
        try:
            found, num_bytes = _read_header(location(folder) / _WEIGHTS)
        except ValueError as error:
            raise ValueError(self._misfit(folder, error)) from None
        wanted = {key: one for key, one in wanted.items() if key in found or key not in self.newer}
        for key in sorted({*found, *wanted}):
            if found.get(key) != wanted.get(key):
                got, needed = (" of shape ".join(map(str, one.get(key, ("none",)))) for one in (found, wanted))
                raise ValueError(self._misfit(folder, f"{key} must be {needed}, got {got}"))
        if num_bytes != (needs := sum(stored[key].nbytes for key in wanted)):
            raise ValueError(self._misfit(folder, f"weights must have {needs:,} bytes, got {num_bytes:,}"))

    def _misfit(self, folder: Name, cause: object) -> str:
        weights = location(folder) / _WEIGHTS
        return f"cannot load {weights} into a network of {self.kind}.json ({cause}); copy both again"


def _read_header(weights: Location) -> tuple[dict[str, tuple[str, list[int]]], int]:
    """Type and shape of every tensor in a safetensors file, as the file states them, and the bytes after its header."""
    with open_binary(weights) as file:
        size = file.seek(0, 2)
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, _MAX_HEADER_BYTES):
            cause = f"its header must be in the file and at most {_MAX_HEADER_BYTES:,} bytes, got {length:,}"
            raise ValueError(cause)
        header = parse_json(file.read(length))
    if isinstance(header, dict):
        header.pop("__metadata__", None)
    tensors: dict[str, _Tensor] = check_record(header, dict[str, _Tensor], weights, remedy="copy it again")
    return {key: (tensor["dtype"], tensor["shape"]) for key, tensor in tensors.items()}, size - 8 - length
