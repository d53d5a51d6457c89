"""Verdicts of listeners from reports, with the scores of their stems, as evidence for the SI-SDR estimator."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from engine.corpus.rows import csv_cells
from engine.passes.shards import read_manifest, stem_shards
from engine.schema import SCORES
from engine.scoring.estimator import JudgedStems
from engine.selection.index import read_index
from engine.storage.fingerprints import fingerprint
from engine.storage.paths import Location, Name, location

_COLUMNS = ("pass", "iteration", "clip_id", "path", "label", "outcome", "verdict")
_IS_GOOD = {"good": True, "bad": False, "wrong label": False}
_Key = tuple[str, str, str]  # pass, clip and label


def read_verdicts(files: Sequence[Name], passes: Sequence[Name]) -> JudgedStems:
    """The stems on which downloaded verdicts are, with their scores; ``passes`` are folders of passes or runs.

    "Wrong label" counts as bad. Verdicts on stems that the pass does not have, and stems with contradicting verdicts
    are left out and counted. Raises ``ValueError`` for a file that is no download of verdicts, a pass that is not among
    ``passes``, and without a good and a bad stem.
    """
    found: dict[_Key, set[bool]] = {}
    num_verdicts = 0
    for file in files:
        for key, verdict in _verdicts(location(file)):
            found.setdefault(key, set()).add(verdict)
            num_verdicts += 1
    judged = {key: verdicts == {True} for key, verdicts in found.items() if len(verdicts) == 1}
    folders = _folders(passes)
    if unknown := sorted({name for name, _, _ in found} - set(folders)):
        raise ValueError(
            f"every verdict must be on a stem of the given passes, got one of pass {unknown[0]!r}; give the run or "
            "pass whose report it is from with --passes"
        )
    stems = [_stems(folders[name], name, judged) for name in sorted({name for name, _, _ in judged})]
    keys = [key for some, _ in stems for key in some]
    is_good = [judged[key] for key in keys]
    num_good = sum(is_good)
    if not 0 < num_good < len(keys):
        raise ValueError(
            f"verdicts must be on good and on bad stems, got {num_good} good and {len(keys) - num_good} bad that the "
            "passes have and that do not contradict each other; judge more stems"
        )
    return JudgedStems(
        scores=pa.concat_tables([table for _, table in stems]),
        is_good=is_good,
        groups=[clip_id for _, clip_id, _ in keys],
        about={
            "fingerprint": fingerprint(sorted([*key, judged[key]] for key in keys)),
            "num_verdicts": num_verdicts,
            "num_good": num_good,
            "num_bad": len(keys) - num_good,
            "num_contradicting": len(found) - len(judged),
            "num_without_stem": len(judged) - len(keys),
        },
    )


def _verdicts(path: Location) -> Iterator[tuple[_Key, bool]]:
    lines = csv_cells(path)
    header = next(lines, [])
    if sorted(header) != sorted(_COLUMNS):
        wrong = sorted({*header}.symmetric_difference(_COLUMNS))
        raise ValueError(
            f"{path} must have the columns {','.join(_COLUMNS)}, got a difference in {wrong[:7]}; give the file that "
            "`Download verdicts` of a report writes"
        )
    for number, cells in enumerate(lines, 2):
        row = dict(zip(header, cells, strict=False))
        if len(cells) != len(header) or row["verdict"] not in _IS_GOOD:
            raise ValueError(
                f"a verdict must be a row of {len(header)} cells with {', '.join(_IS_GOOD)} as verdict, got "
                f"{cells[-1]!r} last in line {number} of {path}; correct it, or download the verdicts again"
            )
        yield (row["pass"], row["clip_id"], row["label"]), _IS_GOOD[row["verdict"]]


def _folders(passes: Sequence[Name]) -> dict[str, Location]:
    """The folders of stems of closed passes, by their fingerprints."""
    found: dict[str, Location] = {}
    for name in passes:
        folder = location(name)
        stems = [path.parent for path in folder.glob("iterations/*/stems/manifest.json")] or [folder / "stems"]
        found |= {read_manifest(one, "fingerprint")["fingerprint"]: one for one in stems}
    return found


def _stems(stems: Location, name: str, judged: Mapping[_Key, bool]) -> tuple[list[_Key], pa.Table]:
    """The judged stems that a pass has, and their scores."""
    clip_ids = pa.array(sorted({clip_id for one, clip_id, _ in judged if one == name}), pa.string())
    keys, tables = list[_Key](), [SCORES.empty_table()]
    for index in read_index(stem_shards(stems)):
        table = index.filter(pc.is_in(index["clip_id"], clip_ids))
        own = [
            (name, *pair) for pair in zip(*(table[column].to_pylist() for column in ("clip_id", "label")), strict=True)
        ]
        rows = [number for number, key in enumerate(own) if key in judged]
        keys += [own[number] for number in rows]
        tables.append(table.select(SCORES.names).take(pa.array(rows, pa.int64())))
    return keys, pa.concat_tables(tables)
