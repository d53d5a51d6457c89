"""Labels of a row: separated by one rule for the whole column, in one Unicode form, and bounded."""

from __future__ import annotations

import csv
import logging
import unicodedata
from collections.abc import Iterable, Mapping

from engine.schema import MAX_TEXT, plain_label
from engine.storage.documents import MAX_DESCRIPTION_BYTES, parse_json

_LOGGER = logging.getLogger(__name__)
MAX_LABELS = 512
"""Labels of a clip: every label is one stem, which a worker holds in memory."""
MAX_LABELS_TEXT = 1 << 14
"""Characters of all labels of a clip together."""


def separator_of(cells: Iterable[object]) -> str:
    """The separator of a column of labels: the first of ``;``, ``|`` and ``,`` that any of its cells has.

    So one cell with a semicolon makes commas a part of names everywhere in the column, such as "Male speech, man
    speaking". Lists, also those in JSON, separate their labels by themselves and are left out.
    """
    found, example = ",", ""
    for cell in cells:
        if isinstance(cell, str) and not cell.lstrip().startswith("["):
            if ";" in cell:
                return ";"
            found = "|" if "|" in cell else found
            example = example or (cell if ", " in cell and '"' not in cell else "")
    if found == "," and example:
        _LOGGER.warning(
            f"the list separates labels at commas, such as {example[:80]!r}; if that is one label, put semicolons "
            "between labels, or read each cell as one label with --columns label=labels"
        )
    return found


def labels_of(row: Mapping[str, object]) -> list[str]:
    """Labels in the order of the row, composed (NFC), without blanks and repeats (also repeats in another spelling).

    A text in column ``labels`` is separated by the row's ``separator``; one in column ``label`` is one label.
    """
    cell = row.get("labels", row.get("label"))
    if isinstance(cell, str) and "labels" in row:
        cell = split(cell, str(row.get("separator", ",")))
    items = [] if cell is None else [cell] if isinstance(cell, str) else cell
    if not isinstance(items, list):
        raise ValueError(f"labels must be a list of strings, got {cell!r}; correct the row")
    spelled: dict[str, str] = {}
    for item in items:
        if label := label_of(item):
            spelled.setdefault(plain_label(label), label)
    num_characters = sum(map(len, spelled.values()))
    if len(spelled) > MAX_LABELS or num_characters > MAX_LABELS_TEXT:
        raise ValueError(
            f"a clip must have at most {MAX_LABELS} labels of {MAX_LABELS_TEXT} characters together, got "
            f"{len(spelled)} of {num_characters}; check what separates them"
        )
    return list(spelled.values())


def label_of(value: object) -> str:
    """The label in a cell, composed (NFC) and without surrounding spaces; empty if there is none."""
    return unicodedata.normalize("NFC", text_of(value, "a label")).strip()


def split(cell: str, separator: str) -> object:
    """The labels in a text: a JSON list, or separated by ``separator`` except inside quotation marks."""
    cell = cell.strip()
    if cell.startswith("["):
        try:
            return parse_json(cell, most=MAX_DESCRIPTION_BYTES, any_number=True)
        except ValueError as error:
            raise ValueError(
                f"labels in brackets must be a JSON list, got {cell[:80]!r} ({error}); correct it"
            ) from error
    if '"' in cell:  # a quoted label may have the separator inside
        try:
            return next(csv.reader([cell], delimiter=separator, skipinitialspace=True, strict=True), [])
        except csv.Error:  # a quotation mark that belongs to a name
            pass
    return cell.split(separator)


def text_of(value: object, name: str) -> str:
    """The text in a cell, empty if it is null; ValueError for other types, NUL, and text that is too long."""
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{name} must be a string, got {value!r}; correct the row")
    text = value or ""
    if len(text) > MAX_TEXT:
        raise ValueError(f"{name} must have at most {MAX_TEXT} characters, got {len(text)}; correct the row")
    if "\0" in text:
        raise ValueError(f"{name} must have no NUL, got {text!r}; correct the row")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} must be UTF-8, got {text!r}; rename it") from error
    return text
