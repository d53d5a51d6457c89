"""A network on disk: ``weights.safetensors`` and a description in JSON; loading runs no code from either."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import nn

from engine.errors import nearest
from engine.storage.files import atomic_path, read_json, sha256_file, write_json
from engine.storage.paths import Name, location

_FORMAT = 1
_WEIGHTS = "weights.safetensors"

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Generic[Network]):
    """How one kind of network is kept in a folder."""

    kind: str
    """What the network is: the description is ``KIND.json``."""
    architecture: str
    config: type
    """The dataclass of the network's shape."""
    make: Callable[[Any, Sequence[str]], Network]
    """A network of a shape and labels."""

    def save(
        self,
        network: Network,
        folder: Name,
        *,
        config: Any,  # noqa: ANN401 - an instance of any config dataclass
        labels: Sequence[str],
        more: Callable[[dict[str, Any]], Mapping[str, Any]],
        history: Sequence[dict[str, Any]],
    ) -> None:
        """Write the folder, weights first and the description last, each atomically.

        ``more`` gives further fields from those that all descriptions have; ``history`` tells how the weights came to
        be, one JSON-like entry a training.
        """
        weights = location(folder) / _WEIGHTS
        with atomic_path(weights) as aside:
            save_file({name: value.contiguous().cpu() for name, value in network.state_dict().items()}, aside)
        description: dict[str, Any] = {
            "format": _FORMAT,
            "architecture": self.architecture,
            "network": asdict(config),
            "labels": list(labels),
            "weights_sha256": sha256_file(weights),
        }
        description |= more(description)
        write_json(location(folder) / f"{self.kind}.json", description | {"history": list(history)})

    def read(self, folder: Name) -> dict[str, Any]:
        """What the description says, checked for format and architecture; ``ValueError`` says what is wrong."""
        path = location(folder) / f"{self.kind}.json"
        if not path.is_file():
            raise ValueError(f"{folder} holds no {self.kind}: it has no {path.name}; give the folder itself")
        description = read_json(path)
        if not isinstance(description, dict) or description.get("format") != _FORMAT:
            raise ValueError(f"{path} is not of {self.kind} format {_FORMAT}; it was made by another version")
        if description.get("architecture") != self.architecture:
            told = description.get("architecture")
            raise ValueError(f"{path} is of architecture {told!r}; this version loads {self.architecture!r}")
        return description

    def load(self, folder: Name, *, device: str | torch.device = "cpu") -> Network:
        """The network in a folder, in evaluation mode; ``ValueError`` says what does not fit. No code in it is run."""
        description = self.read(folder)
        config = description.get("network", {})
        known = self.config.__dataclass_fields__  # type: ignore[attr-defined]
        unknown = [key for key in config if key not in known]
        if unknown:
            raise ValueError(f"{folder}: network has no {unknown[0]!r}; {nearest(unknown[0], known)}")
        network = self.make(self.config(**config), description["labels"])
        weights = location(folder) / _WEIGHTS
        if not weights.is_file() or sha256_file(weights) != description["weights_sha256"]:
            raise ValueError(f"{weights} is missing or not the file that {self.kind}.json describes; copy both again")
        try:
            network.load_state_dict(load(weights.read_bytes()))
        except (RuntimeError, SafetensorError) as error:
            raise ValueError(f"{weights} does not fit the architecture in {self.kind}.json: {error}") from None
        return network.to(device).eval()
