"""JSON and YAML that others wrote: values of plain types, whose size and depth are bounded before they take memory.

Errors here are causes alone: who opens the file names it, and says what to do.
"""

from __future__ import annotations

import json
import math
from typing import Any, BinaryIO

import yaml

MAX_BYTES = 1 << 28
"""Of a JSON file that this project writes: the manifest of a pass has a line for each shard."""
MAX_DESCRIPTION_BYTES = 1 << 22
"""Of the description of a network, with its labels and its history, and of a row of a manifest."""
MAX_SETTINGS_BYTES = 1 << 18
"""Of a YAML file of settings; reading YAML takes a thousand times its size."""
MAX_DEPTH = 50
"""Of lists and mappings inside each other."""
_TOO_DEEP = f"it must be nested at most {MAX_DEPTH} deep, got more"
_MAX_EXPANDED = 1 << 20  # characters of YAML with a copy of its anchor for each alias


def bounded(file: BinaryIO, most: int) -> bytes:
    """The bytes of a file; ``ValueError``, without reading on, if there are more than ``most``."""
    data = file.read(most + 1)
    if len(data) > most:
        cause = f"it must have at most {most:,} bytes, got more"
        raise ValueError(cause)
    return data


def parse_json(text: str | bytes, *, most: int = MAX_BYTES, any_number: bool = False) -> Any:  # noqa: ANN401 - any shape
    """The value of a JSON text; ``ValueError`` for anything else, and without ``any_number`` for NaN and infinity."""
    if len(text) > most:
        cause = f"it must have at most {most:,} characters, got {len(text):,}"
        raise ValueError(cause)
    try:
        value = json.loads(text, parse_constant=None if any_number else _refuse)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    _require_plain(value, any_number=any_number)
    return value


def _refuse(name: str) -> float:
    cause = f"a number must be finite, got {name}"
    raise ValueError(cause)


def parse_yaml(text: str | bytes) -> Any:  # noqa: ANN401 - YAML is any shape
    """The value of a YAML text as JSON could have it; ``ValueError`` for anything else.

    Aliases are allowed as long as the text that they stand for is not long: a few lines of aliases of aliases stand for
    billions of values.
    """
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _expanded(node, {}) > _MAX_EXPANDED:
            cause = f"its aliases must stand for at most {_MAX_EXPANDED:,} characters, got more"
            raise ValueError(cause)
        value = loader.construct_document(node)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        cause = f"{error.problem}{where}"
        raise ValueError(cause) from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    _require_plain(value, is_finite=False)  # settings say themselves which numbers they take
    return value


def _expanded(node: yaml.Node, known: dict[int, int]) -> int:
    """Characters and values of a node with a copy of its anchor for each alias."""
    if (size := known.get(id(node))) is not None:
        if size < 0:
            cause = "an alias must not stand for what it is part of, got one that does"
            raise ValueError(cause)
        return size
    known[id(node)] = -1
    if isinstance(node, yaml.ScalarNode):
        size = 1 + len(node.value)
    else:
        inner = node.value if isinstance(node, yaml.SequenceNode) else [one for pair in node.value for one in pair]
        size = 1 + sum(_expanded(one, known) for one in inner)
    known[id(node)] = size
    return size


def _require_plain(value: object, *, any_number: bool = False, is_finite: bool = True) -> None:
    """``ValueError`` for types that JSON does not have, for great depth, and for numbers that few programs can hold."""
    level, depth = [value], 0
    while level:
        if depth > MAX_DEPTH:
            raise ValueError(_TOO_DEEP)
        inside: list[object] = []
        for one in level:
            if isinstance(one, dict):
                inside += [*one, *one.values()]
            elif isinstance(one, list):
                inside += one
            elif isinstance(one, (int, float)):
                is_large = one.bit_length() >= 64 if isinstance(one, int) else is_finite and math.isinf(one)
                if is_large and not any_number:
                    cause = "a number must be of 64 bits, got one that is larger"
                    raise ValueError(cause)
            elif one is not None and not isinstance(one, str):
                kind = type(one).__name__
                cause = f"values must be text, numbers, true, false, null, lists or mappings, got a {kind}"
                raise ValueError(cause)
        level, depth = inside, depth + 1
