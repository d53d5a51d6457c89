"""Labels and columns of lists as people have them: separators, Unicode forms, other names, bounds."""

from __future__ import annotations

import json
import logging
import re
import resource
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.corpus.labels import MAX_LABELS, MAX_LABELS_TEXT
from engine.corpus.read import read_corpus
from engine.corpus.sources import read_sources
from engine.schema import plain_label
from tests.support import ROOT

COMPOSED, APART = (unicodedata.normalize(form, "Café-Gespräch") for form in ("NFC", "NFD"))
DATA_PAGE = (ROOT / "docs/guides/data.md").read_text()
MALE = "Male speech, man speaking"


def written(folder: Path, text: str, name: str = "m.csv") -> Path:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def labels_in(path: Path, **options: object) -> list[list[str]]:
    corpus = read_corpus(path, **options)  # type: ignore[arg-type]
    assert corpus.num_failures == 0, corpus.failures["message"].to_pylist()
    found: list[list[str]] = corpus.clips["labels"].to_pylist()
    return found


COLUMNS = {
    "one_semicolon_decides_for_all": ([MALE, f"{MALE};Rain"], [[MALE], [MALE, "Rain"]]),
    "also_when_it_comes_first": ([f"{MALE};Rain", MALE], [[MALE, "Rain"], [MALE]]),
    "also_at_the_end_of_a_cell": ([MALE, "Rain;"], [[MALE], ["Rain"]]),
    "pipes": ([f"{MALE}|Rain", MALE], [[MALE, "Rain"], [MALE]]),
    "semicolons_before_pipes": (["a|b", "c;d"], [["a|b"], ["c", "d"]]),
    "commas": (["Music,Guitar", "Rain"], [["Music", "Guitar"], ["Rain"]]),
    "quoted_in_a_column_of_commas": ([f'"{MALE}",Rain', "dog"], [[MALE, "Rain"], ["dog"]]),
    "quoted_with_semicolons": (['"a;b";c'], [["a;b", "c"]]),
    "a_quotation_mark_in_a_name": (['6" gun;rain', '"x;y'], [['6" gun', "rain"], ['"x', "y"]]),
    "json_lists_next_to_commas": ([json.dumps([MALE, "Rain; heavy"]), "a,b"], [[MALE, "Rain; heavy"], ["a", "b"]]),
    "no_separator": (["dog", "cat"], [["dog"], ["cat"]]),
}


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("name", COLUMNS)
def test_one_rule_separates_the_labels_of_a_column(tmp_path: Path, name: str, kind: str) -> None:
    cells, wanted = COLUMNS[name]
    rows = [{"path": f"{number}.wav", "labels": cell} for number, cell in enumerate(cells)]
    path = tmp_path / f"m.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        quoted = ['"' + str(row["labels"]).replace('"', '""') + '"' for row in rows]
        path.write_text("path,labels\n" + "\n".join(f"{i}.wav,{cell}" for i, cell in enumerate(quoted)))
    assert labels_in(path) == wanted


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_lists_are_not_separated_and_decide_nothing(tmp_path: Path, kind: str) -> None:
    rows = [{"path": "a.wav", "labels": [MALE, "a;b"]}, {"path": "b.wav", "labels": ["Rain"]}]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "m.parquet")
    else:
        (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert labels_in(tmp_path / f"m.{kind}") == [[MALE, "a;b"], ["Rain"]]


def test_names_that_commas_may_have_cut_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    path = written(tmp_path, f'path,labels\na.wav,"{MALE}"\n')
    assert labels_in(path) == [["Male speech", "man speaking"]]
    assert "the list separates labels at commas" in caplog.text and "label=labels" in caplog.text
    caplog.clear()
    assert labels_in(path, columns="label=labels") == [[MALE]], "the whole cell is one label"
    assert labels_in(written(tmp_path, 'path,labels\na.wav,"a,b"\nb.wav,"c, d;e"\n')) == [["a,b"], ["c, d", "e"]]
    assert caplog.text == ""


def test_composed_and_decomposed_labels_are_one(tmp_path: Path) -> None:
    path = written(tmp_path, f"path,labels\na.wav,{COMPOSED};{APART};rain\nb.wav,{APART}\nc.wav,{COMPOSED}\n")
    assert labels_in(path) == [[COMPOSED, "rain"], [COMPOSED], [COMPOSED]]
    assert plain_label(APART) == plain_label(COMPOSED)
    for label in (COMPOSED, APART):
        (tmp_path / "by" / label).mkdir(parents=True)
        (tmp_path / "by" / label / "a.wav").touch()
    counts = Counter(label for labels in labels_in(tmp_path / "by") for label in labels)
    assert counts == {COMPOSED: 2}
    sources = written(tmp_path, f"path,label\na.wav,{COMPOSED}\nb.wav,{APART}\n", "clips.csv")
    assert read_sources(sources).labels == [COMPOSED, COMPOSED]
    ids = read_corpus(path).clips["clip_id"].to_pylist()
    assert ids[2] == read_corpus(written(tmp_path, f"path,labels\nc.wav,{APART}\n")).clips["clip_id"].to_pylist()[0]


def test_ids_of_ordinary_rows_are_those_of_earlier_versions(tmp_path: Path) -> None:
    """Known ids of commit 036520d: a pass that was begun with it goes on."""
    text = 'path,labels,start_s,end_s\nstreet/0017.mp3,"dog_bark;siren",,\nharbour.flac,"sea_waves,bell",60,75\n'
    corpus = read_corpus(written(tmp_path, text.replace(",bell", ";bell")))
    assert corpus.clips["clip_id"].to_pylist() == ["750494f9e19d691ef889", "ff2505682515b73ea503"]
    assert corpus.fingerprint == "6aa7f161c43d6189"


ESC50 = "filename,fold,target,category,esc10,src_file,take\n1-100032-A-0.wav,1,0,dog,True,100032,A\n"
ESC50 += "1-100038-A-14.wav,2,14,chirping_birds,False,100038,A\n"
URBAN = "slice_file_name,fsID,start,end,salience,fold,classID,class\n"
URBAN += "100032-3-0-0.wav,100032,0.0,0.317551,1,5,3,dog_bark\n100263-2-0-117.wav,100263,58.5,62.5,1,10,2,siren\n"
FSD50K = 'fname,labels,mids,split\n64760,"Electric_guitar,Guitar,Music","/m/02sgy,/m/0342h,/m/04rlf",train\n'
FSD50K += '16399,"Rain","/m/06mb1",val\n'
VGGSOUND = '---g-f_I2yQ,1,"people marching",test\n--0PQM4-hqg,30,"waterfall burbling, loud",train\n'
PUBLISHED = {  # the recipes of docs/guides/data.md
    "ESC-50": (
        ESC50,
        "path=filename,label=category",
        [("1-100032-A-0.wav", ["dog"]), ("1-100038-A-14.wav", ["chirping_birds"])],
        [1, 2],
    ),
    "UrbanSound8K": (
        URBAN,
        "path=fold{fold}/{slice_file_name},label=class",
        [("fold5/100032-3-0-0.wav", ["dog_bark"]), ("fold10/100263-2-0-117.wav", ["siren"])],
        [5, 10],
    ),
    "FSD50K": (
        FSD50K,
        "path={fname}.wav,labels=labels",
        [("64760.wav", ["Electric_guitar", "Guitar", "Music"]), ("16399.wav", ["Rain"])],
        None,
    ),
    "VGGSound": (
        VGGSOUND,
        "path={1}_{2:0>6}.mp4,label=3",
        [("---g-f_I2yQ_000001.mp4", ["people marching"]), ("--0PQM4-hqg_000030.mp4", ["waterfall burbling, loud"])],
        [0, 0],
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_lists_are_read_as_they_are(tmp_path: Path, name: str) -> None:
    text, columns, wanted, folds = PUBLISHED[name]
    assert f"| {name} | `--columns " in DATA_PAGE and columns in DATA_PAGE
    path = written(tmp_path / "lists", text)
    corpus = read_corpus(path, columns=columns, audio_root=tmp_path / "audio")
    rows = corpus.clips.to_pylist()
    assert [(row["path"], row["labels"]) for row in rows] == wanted
    assert corpus.root == str(tmp_path / "audio") and corpus.num_failures == 0
    assert all(row["start_s"] is None and row["end_s"] is None for row in rows)
    if folds is not None:
        sources = read_sources(path, columns=columns, audio_root=tmp_path / "audio").table.to_pylist()
        assert [row["fold"] for row in sources] == folds
        assert [row["path"] for row in sources] == [f"{tmp_path}/audio/{row['path']}" for row in rows]


def test_columns_are_named_in_every_kind_of_list_and_times_too(tmp_path: Path) -> None:
    rows = [{"fname": 7, "tags": "dog;cat", "t0": 1.5, "t1": 3, "path": "no", "labels": "none"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "m.parquet")
    written(tmp_path, json.dumps(rows[0]), "m.jsonl")
    written(tmp_path, "fname,tags,t0,t1,path,labels\n7,dog;cat,1.5,3,no,none\n")
    for kind in ("csv", "jsonl", "parquet"):
        columns = {"path": "{fname}.wav", "labels": "tags", "start_s": "t0", "end_s": "t1"}
        (row,) = read_corpus(tmp_path / f"m.{kind}", columns=columns).clips.to_pylist()
        assert [row[name] for name in ("path", "labels", "start_s", "end_s")] == ["7.wav", ["dog", "cat"], 1.5, 3.0]


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ("path=file", "must have a column file, got .*rename one, or name it"),
        ("path=path,tags=labels", "columns must be like path=fname,labels=tags, got tags='labels'"),
        ("path", "columns must be like"),
        ("path=", "columns must be like"),
        ("path={x", "columns must have braces like"),
        ("path={}.wav", "columns must have a name or number in braces"),
        ("path={path:06d}", "columns must have braces like"),
        ("path={nowhere}.wav", "must have a column nowhere"),
        ("path=1,label=9", "must have a column 9"),
    ],
)
def test_columns_that_cannot_be_are_refused(tmp_path: Path, columns: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read_corpus(written(tmp_path, "path,labels\na.wav,dog\n"), columns=columns)


def test_columns_are_those_of_a_manifest(tmp_path: Path) -> None:
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / "a.wav").touch()
    with pytest.raises(ValueError, match="columns must be those of a manifest"):
        read_corpus(tmp_path, columns="path=p")


@pytest.mark.parametrize(("cell", "fold"), [("1", 1), ("1.0", 1), (" 2 ", 2), ("", 0), ("-1", -1), ("1e1", 10)])
def test_a_fold_is_a_whole_number(tmp_path: Path, cell: str, fold: int) -> None:
    sources = read_sources(written(tmp_path, f"path,label,fold\na.wav,dog,{cell}\n"))
    assert sources.table["fold"].to_pylist() == [fold]
    rows = json.dumps({"path": "a.wav", "label": "dog", "fold": float(fold)})
    assert read_sources(written(tmp_path, rows, "m.jsonl")).table["fold"].to_pylist() == [fold]


@pytest.mark.parametrize("cell", ["1.5", "one", "nan", "inf", "9999999999", "True"])
def test_another_fold_is_an_error_in_words(tmp_path: Path, cell: str) -> None:
    with pytest.raises(ValueError, match=r"row 1: fold must be a whole number or empty, got .*; correct the row"):
        read_sources(written(tmp_path, f"path,label,fold\na.wav,dog,{cell}\n"))


def many(number: int) -> list[str]:
    return [f"label {i}" for i in range(number)]


TOO_MUCH = {
    "labels": (many(200_000), f"at most {MAX_LABELS} labels.*got 200000"),
    "one_label_too_many": (many(MAX_LABELS + 1), f"at most {MAX_LABELS} labels"),
    "characters": ([f"{i:03d}" + "x" * 1000 for i in range(100)], f"{MAX_LABELS_TEXT} characters"),
    "a_label": (["x" * 5000], "a label must have at most 4096 characters"),
}


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("name", TOO_MUCH)
def test_a_row_of_too_many_labels_is_a_failure_and_nothing_else(tmp_path: Path, name: str, kind: str) -> None:
    labels, reason = TOO_MUCH[name]
    rows = [
        {"path": "a.wav", "labels": ["dog"]},
        {"path": "b.wav", "labels": labels},
        {"path": "c.wav", "labels": ["x"]},
    ]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "m.parquet")
    elif kind == "jsonl":
        written(tmp_path, "\n".join(map(json.dumps, rows)), "m.jsonl")
    else:
        written(tmp_path, "path,labels\n" + "\n".join(f"{row['path']},{';'.join(row['labels'])}" for row in rows))
    corpus = read_corpus(tmp_path / f"m.{kind}")
    assert corpus.clips["path"].to_pylist() == ["a.wav", "c.wav"]
    (row,) = corpus.failures.to_pylist()
    assert re.search(reason, row["message"]) and row["labels"] == []


def test_as_many_labels_as_allowed_are_read(tmp_path: Path) -> None:
    text = f"path,labels\na.wav,{';'.join(many(MAX_LABELS))}\nb.wav,{'dog;' * 100_000}\n"
    assert labels_in(written(tmp_path, text)) == [many(MAX_LABELS), ["dog"]], "repeats do not count"


def test_a_small_parquet_file_does_not_take_much_memory(tmp_path: Path) -> None:
    """Parquet stores equal values once: this file of less than 2 MB has 26 GB of labels, and 1.3 GB in one column."""
    num_rows, num_labels = 64, 100_000
    codes = pa.DictionaryArray.from_arrays(pa.array(np.zeros(num_rows * num_labels, np.int32)), ["y" * 4096])
    labels = pa.ListArray.from_arrays(np.arange(num_rows + 1, dtype=np.int32) * num_labels, codes)
    other = pa.DictionaryArray.from_arrays(pa.array(np.zeros(num_rows, np.int32)), ["z" * 20_000_000])
    table = pa.table({"path": [f"{i}.wav" for i in range(num_rows)], "labels": labels, "label": other})
    pq.write_table(table, tmp_path / "m.parquet", store_schema=False)
    assert (tmp_path / "m.parquet").stat().st_size < 2e6
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for columns in ("labels=labels", "label=label"):
        assert read_corpus(tmp_path / "m.parquet", columns=columns).num_failures == num_rows
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000, "KiB"
