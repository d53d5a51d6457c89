"""Every kind of bad manifest or row of one is refused or becomes a failure with its reason."""

import json
import re

import pytest

from engine.corpus.read import read_corpus
from engine.schema import CLIPS

HEADER = "path,labels,start_s,end_s\n"
MANY = [f"label {number}" for number in range(500)]
BIG = "x" * 10_000_000


def jsonl(**row):
    return json.dumps({"path": "a.wav", "labels": ["dog"], **row})


ROWS = {
    "path_climbs": (HEADER + "../x.wav,dog,,", "climbs out"),
    "path_climbs_inside": (HEADER + "a/../../x.wav,dog,,", "climbs out"),
    "path_climbs_windows": (HEADER + "a\\..\\..\\x.wav,dog,,", "climbs out"),
    "no_path": (HEADER + ",dog,,", "must have a path"),
    "no_labels": (HEADER + "a.wav,,,", "at least one label"),
    "blank_labels": (HEADER + 'a.wav," ; ;",,', "at least one label"),
    "empty_list": (HEADER + "a.wav,[],,", "at least one label"),
    "start_after_end": (HEADER + "a.wav,dog,3,2", "start_s < end_s"),
    "infinite_start": (HEADER + "a.wav,dog,1e999,", "number of seconds"),
    "nul_in_path": (HEADER + "a\0b.wav,dog,,", "path must have no NUL"),
    "nul_in_label": (HEADER + "a.wav,d\0og,,", "label must have no NUL"),
    "long_label": (HEADER + f"a.wav,{BIG},,", "a label must have at most 4096 characters.*10000000"),
    "long_path": (HEADER + f"{BIG},dog,,", "path must have at most 4096 characters"),
    "deep_labels": (HEADER + "a.wav," + "[" * 100_000 + ",,", "JSON list"),
    "too_many_cells": (HEADER + "a.wav,dog,,,,", "quote cells"),
    "a_list": ("[1, 2]", "must be a JSON object"),
    "a_number": ("17", "must be a JSON object"),
    "a_word": ("null", "must be a JSON object"),
    "half_a_line": ('{"path": "a.wav", "lab', "cannot read line 1 as JSON"),
    "deep_list": ("[" * 100_000, "cannot read line 1 as JSON"),
    "deep_object": ('{"a":' * 100_000, "cannot read line 1 as JSON"),
    "deep_and_closed": (f'{{"path": "a.wav", "labels": {"[" * 100_000}{"]" * 100_000}}}', "cannot read line 1 as JSON"),
    "digits": (f'{{"path": "a.wav", "labels": ["dog"], "start_s": {"9" * 5000}}}', "cannot read line 1 as JSON"),
    "digits_400": (jsonl(start_s=10**400), "number of seconds"),
    "nan": (jsonl(start_s=float("nan")), "number of seconds"),
    "true": (jsonl(end_s=True), "number of seconds"),
    "list_for_path": (jsonl(path=["a.wav"]), "path must be a string"),
    "object_for_labels": (jsonl(labels={"dog": 1}), "list of strings"),
    "number_for_label": (jsonl(labels=[1]), "a label must be a string"),
    "surrogate": ('{"path": "a.wav", "labels": ["\\ud800"]}', "UTF-8"),
    "escaped_nul": ('{"path": "a\\u0000.wav", "labels": ["dog"]}', "no NUL"),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_bad_row_of_a_manifest_is_one_failure(tmp_path, name):
    content, reason = ROWS[name]
    good, suffix = ("good.wav,dog,,", "csv") if content.startswith(HEADER) else (jsonl(path="good.wav"), "jsonl")
    (tmp_path / f"m.{suffix}").write_text(f"{content}\n{good}\n")
    corpus = read_corpus(tmp_path / f"m.{suffix}")
    assert corpus.clips["path"].to_pylist() == ["good.wav"]
    (row,) = corpus.failures.to_pylist()
    assert re.search(reason, row["message"]) and row["step"] == "manifest"
    assert len(row["message"]) <= 2000 and len(row["path"]) <= 4096


GOOD = {
    "byte_order_mark": ("\ufeff" + HEADER + "a.wav,dog,,\n", [["dog"]]),
    "windows_lines": ((HEADER + "a.wav,dog,,\n").replace("\n", "\r\n"), [["dog"]]),
    "old_mac_lines": ((HEADER + "a.wav,dog,,\n").replace("\n", "\r"), [["dog"]]),
    "no_last_newline": (HEADER + "a.wav,dog,,", [["dog"]]),
    "label_with_a_comma": (HEADER + 'a.wav,"[""Speech, male"", ""dog""]",,\n', [["Speech, male", "dog"]]),
    "label_with_a_comma_and_semicolons": (HEADER + 'a.wav,"Speech, male;dog",,\n', [["Speech, male", "dog"]]),
    "500_labels": (HEADER + f"a.wav,{';'.join(MANY)},,\n", [MANY]),
    "newline_in_a_cell": (HEADER + 'a.wav,"dog;\nrain",,\n', [["dog", "rain"]]),
}


@pytest.mark.parametrize("name", GOOD)
def test_an_odd_manifest_is_read(tmp_path, name):
    content, labels = GOOD[name]
    (tmp_path / "m.csv").write_bytes(content.encode())
    corpus = read_corpus(tmp_path / "m.csv")
    assert corpus.clips["labels"].to_pylist() == labels and corpus.num_failures == 0
    assert corpus.clips.schema == CLIPS


def test_repeated_rows_are_failures(tmp_path):
    (tmp_path / "m.csv").write_text(HEADER + "a.wav,dog,,\n" * 3 + "a.wav,dog,0,1\n")
    corpus = read_corpus(tmp_path / "m.csv")
    assert corpus.num_clips == 2 and corpus.num_failures == 2
    assert all("must be in a corpus once" in row["message"] for row in corpus.failures.to_pylist())


REFUSED = {
    "missing_column": (b"path,start_s\na.wav,1\n", "must have a column labels or label"),
    "semicolons": (b"path;labels\na.wav;dog\n", "must have a column path"),
    "utf16": ((HEADER + "a.wav,dog,,\n").encode("utf-16"), "UTF-8 text"),
    "latin1": (HEADER.encode() + b"a\xe9.wav,dog,,\n", "UTF-8 text"),
    "open_quote": (HEADER.encode() + b'a.wav,"dog,,\n' + b"b.wav,dog,,\n" * 9, "check its quotes"),
    "no_list": (
        b"root:$6$notforyou:19000:0:99999:7:::\n",
        r"must have a column path, got \[\]; rename one, or name it",
    ),
    "only_a_header": (HEADER.encode(), "at least one row"),
    "nothing": (b"", "must have a column path"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_manifest_that_cannot_be_read_is_refused(tmp_path, name):
    content, reason = REFUSED[name]
    (tmp_path / "m.csv").write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        read_corpus(tmp_path / "m.csv")
