"""Networks on disk: ``weights.safetensors`` and a description in JSON; loading one runs no code from its folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Generic, TypedDict, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import nn

from engine.storage.files import atomic_path, read_json, sha256_file, write_json
from engine.storage.paths import Name, location

_FORMAT = 1
_WEIGHTS = "weights.safetensors"

Network = TypeVar("Network", bound=nn.Module)


class Description(TypedDict):
    """The content of a network's JSON file, ``KIND.json``."""

    format: int
    architecture: str
    """Name of the network's code."""
    network: dict[str, int]
    """Fields of the network's config class."""
    labels: list[str]
    weights_sha256: str
    fingerprint: str
    """Equal for networks with equal outputs."""
    history: list[dict[str, Any]]
    """One entry for each training of the weights, in order."""


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
            "network": asdict(config),
            "labels": list(labels),
            "weights_sha256": sha256_file(weights),
        }
        description |= more(description)
        write_json(location(folder) / f"{self.kind}.json", description | {"history": list(history)})

    def read(self, folder: Name) -> Description:
        """Read the description; raises ``ValueError`` if it is missing or of another format or architecture."""
        path = location(folder) / f"{self.kind}.json"
        if not path.is_file():
            raise ValueError(f"there is no {self.kind} in {folder} (no {path.name}); give the folder with this file")
        description = read_json(path)
        for key, wanted in (("format", _FORMAT), ("architecture", self.architecture)):
            found = description.get(key) if isinstance(description, dict) else None
            if found != wanted:
                raise ValueError(f"{path} must have {key} {wanted!r}, got {found!r}; use the version that wrote it")
        result: Description = description
        return result

    def load(self, folder: Name, *, device: str | torch.device = "cpu") -> Network:
        """Load the network in a folder, in evaluation mode; raises ``ValueError`` if its files do not fit together."""
        description = self.read(folder)
        try:
            config = self.config(**description.get("network", {}))
        except ValueError as error:
            message = f"cannot load the {self.kind} in {folder} ({error}); use the version that wrote it"
            raise ValueError(message) from None
        network = self.make(config, description["labels"])
        weights = location(folder) / _WEIGHTS
        if not weights.is_file() or sha256_file(weights) != description["weights_sha256"]:
            raise ValueError(f"{weights} must be the file that {self.kind}.json describes, got another; copy both")
        try:
            network.load_state_dict(load(weights.read_bytes()))
        except (RuntimeError, SafetensorError) as error:
            message = f"cannot load {weights} into a network of {self.kind}.json ({error}); copy both again"
            raise ValueError(message) from None
        return network.to(device).eval()
