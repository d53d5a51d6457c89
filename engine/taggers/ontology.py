"""An ontology: which label is a kind of which other, so that of a dog that barks only "bark" remains.

Its file is AudioSet's ``ontology.json`` (a list of objects with ``id``, ``name`` and ``child_ids``), or a mapping of
labels to what they are a kind of, in YAML or JSON::

    bark: [dog]
    dog: [animal]
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from typing import Any

from engine.cli.display import shown
from engine.schema import plain_label
from engine.storage.documents import MAX_DESCRIPTION_BYTES, bounded, parse_json, parse_yaml
from engine.storage.files import open_binary
from engine.storage.fingerprints import fingerprint
from engine.storage.paths import Name, location

_EXAMPLE = "write it like `bark: [dog]`, or give AudioSet's ontology.json"


class Ontology:
    """Which labels are kinds of others, directly or through a third; labels may be in any spelling."""

    def __init__(self, parents: Mapping[str, Iterable[str]]) -> None:
        """``parents`` of each label; raises ``ValueError`` for a label that is a kind of itself."""
        self._parents: dict[str, set[str]] = {}
        for label, above in parents.items():
            self._parents.setdefault(plain_label(label), set()).update(map(plain_label, above))
        try:
            TopologicalSorter(self._parents).prepare()
        except CycleError as error:
            loop = " > ".join(error.args[1])
            raise ValueError(f"an ontology must have no loop, got {shown(loop)}; remove one of its steps") from None

    @property
    def fingerprint(self) -> str:
        """Equal for equal ontologies."""
        return fingerprint({label: sorted(above) for label, above in sorted(self._parents.items())})

    @property
    def labels(self) -> set[str]:
        """All its labels, in plain spelling."""
        return set(self._parents).union(*self._parents.values())

    def above(self, label: str) -> set[str]:
        """All labels, in plain spelling, that a label is a kind of."""
        found: set[str] = set()
        waiting = [plain_label(label)]
        while waiting:
            new = self._parents.get(waiting.pop(), set()) - found
            found |= new
            waiting += new
        return found

    def lowest(self, labels: Iterable[str]) -> list[str]:
        """The labels of which no other is a kind."""
        given = list(labels)
        above = set[str]().union(*map(self.above, given))
        return [label for label in given if plain_label(label) not in above]


def read_ontology(path: Name) -> Ontology:
    """Read an ontology; ``ValueError`` for a file that is none, and for a loop."""
    file = location(path)
    if not file.is_file():
        raise ValueError(f"there is no ontology {path}; give AudioSet's ontology.json, or a file like `bark: [dog]`")
    try:
        with open_binary(file) as opened:
            data = bounded(opened, MAX_DESCRIPTION_BYTES)
        content = parse_json(data) if file.suffix == ".json" else parse_yaml(data)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path} as an ontology ({error}); {_EXAMPLE}") from None
    return Ontology(_audioset(content, path) if isinstance(content, list) else _mapping(content, path))


def _audioset(entries: list[Any], path: Name) -> dict[str, list[str]]:
    try:
        names = {entry["id"]: str(entry["name"]) for entry in entries}
        below = [(names[entry["id"]], names[child]) for entry in entries for child in entry["child_ids"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"cannot read {path} as an ontology (an entry lacks {error}); {_EXAMPLE}") from None
    parents: dict[str, list[str]] = {name: [] for name in names.values()}
    for parent, child in below:
        parents[child].append(parent)
    return parents


def _mapping(content: object, path: Name) -> dict[str, list[str]]:
    if not isinstance(content, dict):
        raise ValueError(f"{path} must be a mapping of labels, got a {type(content).__name__}; {_EXAMPLE}")
    parents = {str(label): [above] if isinstance(above, str) else above for label, above in content.items()}
    for label, above in parents.items():
        if not isinstance(above, list) or not all(isinstance(one, str) for one in above):
            raise ValueError(f"a label in {path} must have a list of labels, got {above!r} for {label!r}; {_EXAMPLE}")
    return parents
