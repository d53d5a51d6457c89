"""Targets: each is one stem of every input, described by one query or by several to choose from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from engine.errors import as_exception
from engine.files.names import RESIDUAL, distinct, safe_name
from engine.schema import plain_label
from engine.separators import AudioExample, Query, Separator
from engine.separators.queries import QueryPart, Sounds, as_query

OneQuery = str | Query
Queries = OneQuery | Sequence[OneQuery | Sequence[OneQuery]]
"""Queries, each for one stem; several descriptions of one stem are a list inside the list."""


@dataclass(frozen=True, kw_only=True)
class StemQuery:
    """One stem of every input."""

    name: str
    """Part of the names of its files."""
    alternatives: tuple[OneQuery, ...]
    """Descriptions of the sound, of which the best is chosen for each input."""

    @property
    def text(self) -> str:
        """The target in words, for tables and messages."""
        return " | ".join(as_query(one).text for one in self.alternatives)

    @property
    def identity(self) -> list[object]:
        """Equal for targets that have equal stems; an encoder reads words in their case."""
        return _identity(self.alternatives, lambda text: " ".join(text.replace("_", " ").split()))


def make_targets(queries: Queries, *, unwanted: Sounds = (), names: Sequence[str | None] = ()) -> list[StemQuery]:
    """Targets of queries, with sounds that no stem must contain, and names for those that have no words.

    Raises ``ValueError`` if there is no query, an empty one, one twice, or one that excludes what it wants.
    """
    several = [queries] if isinstance(queries, str | Query) else list(queries)
    if not several:
        raise ValueError("queries must name at least one sound, got none; give a label, text or an audio example")
    groups = [tuple([one] if isinstance(one, str | Query) else one) for one in several]
    if not all(groups):
        raise ValueError(f"a list of alternatives must have a query, got an empty one in {several!r}; remove it")
    full = [tuple(_with_unwanted(one, unwanted) for one in group) for group in groups]
    targets = [StemQuery(name="", alternatives=group) for group in full]
    identities = [repr(_identity(target.alternatives, plain_label)) for target in targets]
    twice = [target.text for number, target in enumerate(targets) if identities[number] in identities[:number]]
    if twice:
        raise ValueError(f"queries must be different, got {twice[0]!r} twice; remove one")
    given = [*names, *[None] * (len(targets) - len(names))]
    plain = [
        safe_name(name or as_query(target.alternatives[0]).text).replace(".", "_")
        for name, target in zip(given, targets, strict=True)
    ]
    unique = distinct(plain, identities, reserved=[RESIDUAL])
    return [StemQuery(name=name, alternatives=one.alternatives) for name, one in zip(unique, targets, strict=True)]


def with_rivals(queries: Sequence[OneQuery]) -> list[OneQuery]:
    """Queries for all sounds of a mixture: each excludes what the others want."""
    return [excluding(query, [other for other in queries if other is not query]) for query in queries]


def excluding(query: OneQuery, others: Sequence[OneQuery]) -> Query:
    """A query that also excludes what others want, but for sounds that it names itself."""
    own = as_query(query)
    named = {_sound(part.sound, plain_label) for part in (*own.wanted, *own.unwanted)}
    parts = [part for other in others for part in as_query(other).wanted]
    return Query(own.wanted, (*own.unwanted, *(part for part in parts if _sound(part.sound, plain_label) not in named)))


def _with_unwanted(query: OneQuery, unwanted: Sounds) -> OneQuery:
    """A plain text stays one, for separators that know labels alone."""
    more = Query("all", unwanted).unwanted
    full = as_query(query)
    return Query(full.wanted, (*full.unwanted, *more)) if more else query


def _identity(queries: Sequence[OneQuery], spelled: Callable[[str], str]) -> list[object]:
    def described(parts: Iterable[QueryPart]) -> list[object]:
        return [[_sound(part.sound, spelled), part.weight] for part in parts]

    return [[described(query.wanted), described(query.unwanted)] for query in map(as_query, queries)]


def _sound(sound: str | AudioExample, spelled: Callable[[str], str]) -> str:
    if isinstance(sound, str):
        return spelled(sound)
    return hashlib.sha256(sound.samples_T.tobytes()).hexdigest() + f" {sound.sample_rate_hz}"


def check_targets(targets: Sequence[StemQuery], separator: Separator) -> None:
    """Raise ``ValueError`` for queries that a separator cannot answer, before a file is opened."""
    known = {plain_label(label) for label in separator.labels}
    for query in (query for target in targets for query in target.alternatives):
        if as_query(query).unwanted and not getattr(separator, "uses_unwanted", False):
            name = as_query(query).unwanted[0].sound
            name = repr(name) if isinstance(name, str) else "an audio example"
            raise ValueError(
                f"cannot exclude {name} (the separator's queries have no unwanted sounds); leave it out, or take a "
                "separator that learned with them, such as CLAPSep or a student of this project"
            )
        if isinstance(query, str) and plain_label(query) in known:
            continue
        try:
            separator.separate(torch.zeros(1, 0), [query])
        except ValueError:
            raise
        except BaseException as error:  # noqa: BLE001 - it may only refuse to separate nothing: the file will tell
            as_exception(error)
