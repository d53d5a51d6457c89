"""Separators and taggers that any process can open, and the user's own ones by the dotted name of a factory.

A factory takes a device, such as ``cpu`` or ``cuda``, and returns a separator or a tagger that runs on it.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from engine.errors import nearest

_DOTTED_NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")

Model = TypeVar("Model")


@dataclass(frozen=True, kw_only=True)
class ModelSource(Generic[Model]):
    """A separator or tagger that any process can open: described, checked and picklable."""

    name: str
    """Absolute folder, or name of the factory."""
    fingerprint: str
    """Equal for models with equal outputs; results of different fingerprints are never mixed."""
    factory: Callable[[str], Model] = field(compare=False, repr=False)
    """Opens the model on a device."""

    def open(self, device: str = "cpu") -> Model:
        """The model on a device such as ``cpu`` or ``cuda``."""
        return self.factory(device)


def own_device() -> str:
    """``cuda`` if this process has a GPU, else ``cpu``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_of(model: object) -> str:
    """Kind of the device that a model's attribute ``device`` names; ``cpu`` if it has none."""
    return torch.device(getattr(model, "device", "cpu")).type


@contextmanager
def in_32_bits(*, repeatable: bool = False) -> Iterator[None]:
    """Let a GPU convolve in 32 bits, of which it drops some by itself; ``repeatable``: with the same sums each time."""
    with torch.backends.cudnn.flags(enabled=True, deterministic=repeatable, allow_tf32=False):
        yield


def is_dotted_name(name: object) -> bool:
    """True for a name of the form ``package.module:factory`` that is no existing folder."""
    return _DOTTED_NAME.fullmatch(str(name)) is not None and not os.path.isdir(str(name))


def find_factory(name: str) -> Callable[[str], Any]:
    """The factory ``package.module:factory``, in a form that can be pickled: other processes import it by its name.

    Modules are found where Python finds them and in the current folder, in other processes too. Raises ``ValueError``
    if there is no such module or factory.
    """
    factory = functools.partial(_open, name, os.getcwd())
    if not callable(function := _function(factory)):
        raise ValueError(f"{name} must be callable, got {function!r}; give a function of the device")
    return factory


def described(
    factory: Callable[[str], Any], name: str | None, *, kind: str, members: Sequence[str]
) -> tuple[str, str, Any]:
    """Name and fingerprint of a factory's model, and the model on ``cpu``.

    The fingerprint is the model's own attribute ``fingerprint``, or else a hash of the name and of the file that
    defines the factory. Raises ``ValueError`` if the model lacks one of ``members`` or has a wrong rate or labels.
    """
    function = _function(factory)
    name = name or f"{function.__module__}:{getattr(function, '__qualname__', type(function).__qualname__)}"
    try:
        inspect.signature(function if getattr(factory, "func", None) is _open else factory).bind("cpu")
    except TypeError as error:
        raise ValueError(f"{name} must take one argument, the device, got a function with {error}; add it") from None
    model = factory("cpu")
    missing = [member for member in members if not hasattr(model, member)]
    if missing:
        given = type(model).__name__
        raise ValueError(f"{name} must return a {kind}, got {given} without {missing[0]}; add {missing[0]} to {given}")
    rate, labels = model.sample_rate_hz, model.labels
    if not isinstance(rate, int) or isinstance(rate, bool) or rate < 1:
        raise ValueError(f"sample_rate_hz of {name} must be a whole number above 0, got {rate!r}; correct it")
    if isinstance(labels, str) or not all(isinstance(label, str) for label in labels):
        raise ValueError(f"labels of {name} must be a tuple of text, got {labels!r}; correct them")
    return name, str(getattr(model, "fingerprint", "") or _file_fingerprint(function, name)), model


def _open(name: str, folder: str, device: str) -> Any:  # noqa: ANN401 - the user's own class
    return _import_factory(name, folder)(device)


def _import_factory(name: str, folder: str) -> Any:  # noqa: ANN401 - whatever the module has under this name
    module_name, _, attribute = name.partition(":")
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"cannot import {module_name} of {name} ({error}); install it, or start in the folder that has it"
        ) from error
    if not hasattr(module, attribute):
        raise ValueError(f"there is no {attribute!r} in {module_name}; {nearest(attribute, vars(module))}")
    return getattr(module, attribute)


def _function(factory: Any) -> Any:  # noqa: ANN401 - any callable
    """The callable inside a ``functools.partial``; a factory with a dotted name is imported."""
    if not isinstance(factory, functools.partial):
        return factory
    return _import_factory(*factory.args) if factory.func is _open else _function(factory.func)


def _file_fingerprint(function: Any, name: str) -> str:  # noqa: ANN401 - any callable
    try:
        data = Path(inspect.getfile(function if hasattr(function, "__qualname__") else type(function))).read_bytes()
    except (OSError, TypeError):
        raise ValueError(
            f"the model of {name} must have a fingerprint or be defined in a file, got neither; "
            "give it an attribute `fingerprint` that changes with its weights"
        ) from None
    return hashlib.sha256(f"{name}\0".encode() + data).hexdigest()[:16]
