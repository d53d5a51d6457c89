"""Tensors by name and shape: every tensor of a checkpoint is used, ignored on purpose, or an error."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from torch import Tensor

from engine.cli.display import shown

_MOST_NAMES = 3
"""Names of each sort that an error lists."""


def require_tensors(
    tensors: Mapping[str, Tensor],
    wanted: Mapping[str, Sequence[int]],
    *,
    ignored: Callable[[str], bool],
    what: str,
) -> dict[str, Tensor]:
    """The tensors with the names and shapes of ``wanted``, in that order.

    ``ignored`` is true for the names of tensors that are in such files and used by nothing; ``what`` is a noun such as
    "an AudioSep checkpoint". Raises ``ValueError`` that lists missing, misshapen and surplus tensors.
    """
    missing = [name for name in wanted if name not in tensors]
    surplus = [name for name in tensors if name not in wanted and not ignored(name)]
    misshapen = [
        f"{name} {_shape(tensors[name].shape)}, not {_shape(shape)}"
        for name, shape in wanted.items()
        if name in tensors and tuple(tensors[name].shape) != tuple(shape)
    ]
    problems = {"missing": missing, "of another shape": misshapen, "surplus": surplus}
    if found := [_listed(sort, names) for sort, names in problems.items() if names]:
        raise ValueError(
            f"{what} must have {len(wanted):,} tensors of fixed names and shapes, got one with {'; '.join(found)}; "
            "give the file as its authors released it"
        )
    return {name: tensors[name] for name in wanted}


def _listed(sort: str, names: Collection[str]) -> str:
    first = ", ".join(shown(name, most=120) for name in list(names)[:_MOST_NAMES])
    return f"{len(names):,} {sort} ({first}{', ...' if len(names) > _MOST_NAMES else ''})"


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"
