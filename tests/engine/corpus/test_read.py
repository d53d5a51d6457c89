"""Known answers for reading a corpus: every kind of source, every bad row, stable ids."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.corpus.clips import clip_id, cut, resolve
from engine.corpus.read import read_corpus
from engine.corpus.sources import read_sources
from engine.errors import AudioError, TooShortError
from engine.schema import CLIPS, FAILURES

ROWS = [
    {"path": "a.wav", "labels": ["dog", "rain"], "start_s": None, "end_s": None},
    {"path": "b/c.wav", "labels": ["cat"], "start_s": 1.5, "end_s": 3.0},
]


def rows_of(corpus):
    assert corpus.clips.schema == CLIPS and corpus.failures.schema == FAILURES
    rows = corpus.clips.to_pylist()
    assert {row.pop("num_tentative") for row in rows} <= {None}, "labels of a list are no guesses"
    return [{k: v for k, v in row.items() if k != "clip_id"} for row in rows]


def text(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def csv_of(folder, *lines, header="path,labels,start_s,end_s"):
    return text(folder, "m.csv", "\n".join([header, *lines]) + "\n")


@pytest.mark.parametrize("kind", ["csv", "bom.csv", "jsonl", "parquet"])
def test_every_manifest_gives_the_same_clips(tmp_path, kind):
    path = tmp_path / f"m.{kind}"
    if kind.endswith("csv"):
        content = 'path,labels,start_s,end_s\r\na.wav,"dog, rain,dog,",,\r\n\r\nb/c.wav,cat,1.5,3\r\n'
        text(tmp_path, path.name, content.encode("utf-8-sig" if "bom" in kind else "utf-8"))
    elif kind == "jsonl":
        text(tmp_path, path.name, "\n\n".join(map(json.dumps, ROWS)))
    else:
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    corpus = read_corpus(path)
    assert rows_of(corpus) == ROWS
    assert corpus.failures.num_rows == 0 and corpus.root == str(tmp_path)
    assert corpus.clips["clip_id"].to_pylist() == [clip_id(*row.values()) for row in ROWS]


@pytest.mark.parametrize(
    ("cell", "labels"),
    [
        ('"[""Speech, male"", ""dog""]"', ["Speech, male", "dog"]),
        ('"Speech, male; dog ;"', ["Speech, male", "dog"]),
        ("dog", ["dog"]),
        ("Dog_bark;rain;dog bark;The sound of RAIN", ["Dog_bark", "rain"]),
    ],
)
def test_csv_labels(tmp_path, cell, labels):
    corpus = read_corpus(csv_of(tmp_path, f"a.wav,{cell}", header="path,labels"))
    assert corpus.clips["labels"].to_pylist() == [labels]


def test_a_single_label_column_is_not_split(tmp_path):
    corpus = read_corpus(csv_of(tmp_path, 'a.wav,"Speech, male"', header="path,label"))
    assert corpus.clips["labels"].to_pylist() == [["Speech, male"]]


def test_ids_do_not_depend_on_order_or_root(tmp_path):
    lines = [f"x/{i}.wav,dog;cat,{i},{i + 1}" for i in range(20)]
    one = read_corpus(csv_of(tmp_path, *lines))
    two = read_corpus(csv_of(tmp_path / "two", *lines[::-1]))
    assert one.clips["clip_id"].to_pylist() == two.clips["clip_id"].to_pylist()[::-1]
    assert len(set(one.clips["clip_id"].to_pylist())) == 20


def test_clip_id_is_a_fixed_function():
    known = clip_id("a/b.wav", ["dog", "cat"], 0.1 + 0.2, None)
    assert known == clip_id("a\\b.wav", ["cat", "dog"], 0.3, None) == "c7c7676413f049b776d9"
    assert known != clip_id("a/b.wav", ["dog", "cat"], None, None)
    assert clip_id("a", ["b"], 1, 2) == clip_id("a", ["b"], 1.0, 2.0)


BAD_LINES = {
    ",dog,,": ("must have a path", 1),
    "a.wav,,,": ("must have at least one label", 1),
    "a.wav,dog;cat,3,2": ("must be 0 <= start_s < end_s", 2),
    "a.wav,dog,2,2": ("start_s < end_s", 1),
    "a.wav,dog,-1,2": ("0 <= start_s", 1),
    "a.wav,dog,one,2": ("must be a number of seconds", 1),
    "a.wav,dog,nan,2": ("must be a number of seconds", 1),
    "../a.wav,dog,,": ("must stay below the root", 1),
    "x/..\\../a.wav,dog,,": ("must stay below the root", 1),
    "a.wav,[dog,,": ("JSON list", 1),
    "a.wav,dog,,,extra": ("quote cells", 1),
    "good.wav,dog,,": ("repeats", 1),
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_row_is_a_failure_and_nothing_else(tmp_path, line):
    reason, num_queries = BAD_LINES[line]
    corpus = read_corpus(csv_of(tmp_path, "good.wav,dog,,", line, "also.wav,cat,,"))
    assert corpus.clips["path"].to_pylist() == ["good.wav", "also.wav"]
    (row,) = corpus.failures.to_pylist()
    assert reason in row["message"] and row["step"] == "manifest" and row["num_queries"] == num_queries


def test_rows_in_are_clips_plus_failures(tmp_path):
    corpus = read_corpus(csv_of(tmp_path, "good.wav,dog,,", *BAD_LINES))
    assert corpus.clips.num_rows + corpus.failures.num_rows == 1 + len(BAD_LINES)


def test_bad_jsonl_lines_are_failures(tmp_path):
    bad = ['{"path": 3, "labels": ["a"]}', '{"path": "a", "labels": [1]}', "[1]", "{", '{"path": "\\ud800"}']
    path = text(tmp_path, "m.jsonl", "\n".join([json.dumps(ROWS[0]), *bad]))
    corpus = read_corpus(path)
    assert (corpus.clips.num_rows, corpus.failures.num_rows) == (1, len(bad))


def test_a_folder_of_folders_is_labelled_by_its_folders(tmp_path):
    for name in ("dog/x/1.wav", "dog/2.FLAC", "cat/1.ogg", "cat/notes.txt", "cat/._1.ogg", "stray.wav"):
        text(tmp_path, name, b"x")
    corpus = read_corpus(tmp_path)
    found = {row["path"]: row["labels"] for row in rows_of(corpus)}
    assert found == {"cat/1.ogg": ["cat"], "dog/2.FLAC": ["dog"], "dog/x/1.wav": ["dog"]}
    assert corpus.failures["path"].to_pylist() == ["stray.wav"]


AUDIOSET = """# Segments csv created Sun Mar  5 10:54:31 2017
# num_ytids=4, num_segs=4
# YTID, start_seconds, end_seconds, positive_labels
--aE2O5G5WE, 0.000, 10.000, "/m/09x0r,/t/dd00088"
-0WhO_iPyUk, 30.000, 40.000, "/m/09x0r"
Y_1_2345678, 20.000, 30.000, "/t/dd00088"
missing1234, 30.000, 40.000, "/m/09x0r"
-0WhO_iPyUk, 50.000, 60.000, "/m/unknown"
"""


def test_audiosets_own_csv(tmp_path):
    class_map = text(tmp_path, "map.csv", 'index,mid,display_name\n0,/m/09x0r,"Speech, any"\n1,/t/dd00088,Gush\n')
    source = text(tmp_path, "eval_segments.csv", AUDIOSET)
    for name in ("Y--aE2O5G5WE.m4a", "a/-0WhO_iPyUk_30000_40000.wav", "YY_1_2345678_20000.flac"):
        text(tmp_path / "audio", name, b"x")
    corpus = read_corpus(source, class_map=class_map, audio_root=tmp_path / "audio")
    assert [tuple(row.values()) for row in rows_of(corpus)] == [
        ("Y--aE2O5G5WE.m4a", ["Speech, any", "Gush"], 0.0, 10.0),
        ("a/-0WhO_iPyUk_30000_40000.wav", ["Speech, any"], None, None),
        ("YY_1_2345678_20000.flac", ["Gush"], None, None),
    ]
    messages = corpus.failures["message"].to_pylist()
    assert "no audio named missing1234" in messages[0] and "/m/unknown" in messages[1]
    with pytest.raises(ValueError, match="class_map"):
        read_corpus(source)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("m.csv", None, "does not exist"),
        ("m.txt", "x", "'.txt'"),
        ("m.csv", "file,labels\na,b\n", "file"),
        ("m.csv", "path,tags\na,b\n", "tags"),
        ("m.jsonl", '{"file": "a", "labels": ["b"]}', "file"),
        ("m.csv", "path,labels\n", "at least one row"),
        ("m.jsonl", "", "at least one row"),
        ("m.csv", b"path,labels\n\xff\xfe,b\n", "UTF-8"),
        ("m.csv", 'path,labels\na,"dog\nb,cat\n', "quotes"),
        ("m.parquet", "x" * 100, "as Parquet"),
    ],
)
def test_an_unusable_source_raises(tmp_path, name, content, reason):
    if content is not None:
        text(tmp_path, name, content)
    with pytest.raises(ValueError, match=reason):
        read_corpus(tmp_path / name)


def test_resolve():
    assert resolve("/data/", "a\\b.wav") == "/data/a/b.wav"
    assert resolve("s3://bucket/x", "a.wav") == "s3://bucket/x/a.wav"
    assert resolve("/data", "/other/a.wav") == "/other/a.wav"
    assert resolve("/data", "s3://b/a.wav") == "s3://b/a.wav"


def row(start_s=None, end_s=None):
    return {
        "clip_id": clip_id("a.wav", ["dog"], start_s, end_s),
        "path": "a.wav",
        "labels": ["dog"],
        "start_s": start_s,
        "end_s": end_s,
    }


def spans(pieces):
    return [(piece["start_s"], piece["end_s"]) for piece in pieces]


@pytest.mark.parametrize(
    ("clip", "duration_s", "expected"),
    [
        (row(), 10.0, [(None, None)]),
        (row(), 10.03, [(None, 10.0)]),
        (row(), 1.0, [(None, None)]),
        (row(2.0, 3.0), 8.0, [(2.0, 3.0)]),
        (row(0.1, 1.1), 8.0, [(0.1, 1.1)]),
        (row(), 20.9, [(0.0, 10.0), (10.0, 20.0)]),
        (row(2.0, 9.0), 20.0, [(2.0, 9.0)]),
        (row(2.0, 99.0), 8.0, [(2.0, 8.0)]),
        (row(), 20.3, [(0.0, 10.0), (10.0, 20.0)]),
        (row(), 30.0, [(0.0, 10.0), (10.0, 20.0), (20.0, 30.0)]),
        (row(5.0, 27.0), 60.0, [(5.0, 15.0), (15.0, 25.0), (25.0, 27.0)]),
        (row(), 10.6, [(0.0, 10.0)]),
    ],
)
def test_cut(clip, duration_s, expected):
    pieces = cut(clip, duration_s=duration_s, clip_s=10.0)
    assert spans(pieces) == expected
    if len(pieces) > 1:
        ids = [piece["clip_id"] for piece in pieces]
        assert ids == [clip_id("a.wav", ["dog"], *span) for span in expected]
    elif duration_s != 10.6:
        assert pieces[0]["clip_id"] == clip["clip_id"]


@pytest.mark.parametrize(
    ("clip", "duration_s"), [(row(), 0.4), (row(), 0.0001), (row(2.0, 2.9), 8.0), (row(5.0, 10.0), 5.3)]
)
def test_a_clip_that_is_too_short_is_refused_be_it_a_complete_file_or_a_segment(clip, duration_s):
    with pytest.raises(TooShortError, match=r"at least min_clip_s=1 s, got 0\..* s of 'a\.wav'; .*min_clip_s lower"):
        cut(clip, duration_s=duration_s, clip_s=10.0)
    assert len(cut(clip, duration_s=duration_s, clip_s=10.0, min_clip_s=0.0)) == 1


def test_cut_after_the_end_raises():
    with pytest.raises(AudioError, match=r"a\.wav"):
        cut(row(10.0), duration_s=10.0, clip_s=10.0)


def test_read_sources(tmp_path):
    path = csv_of(tmp_path, "a.wav,dog,1,x", "/b/c.wav,cat,2,y", header="path,label,fold,licence")
    with pytest.raises(ValueError, match=r"row 2: a path must stay below the root.*'/b/c.wav'.*--allow-outside"):
        read_sources(path)
    sources = read_sources(path, allow_outside=True)
    assert sources.table.to_pylist() == [
        {"path": f"{tmp_path}/a.wav", "label": "dog", "fold": 1},
        {"path": "/b/c.wav", "label": "cat", "fold": 2},
    ]
    assert sources.table.schema.field("fold").type == pa.int32()
    assert read_sources(path, folds=[2], allow_outside=True).labels == ["cat"]
    with pytest.raises(ValueError, match=r"\[1, 2\]"):
        read_sources(path, folds=[5], allow_outside=True)
    for content, reason in (
        ("path,tag\na,b", "label"),
        ("path,label\n", "at least one"),
        ("path,label\na,", "row 1"),
        ("path,label\na.wav,Speech, male", "row 1: a row must have at most 2 cells, one for each column, got 3; quote"),
    ):
        with pytest.raises(ValueError, match=reason):
            read_sources(text(tmp_path, "bad.csv", content))
    text(tmp_path / "by", "dog/1.wav", b"x")
    assert read_sources(tmp_path / "by").table.to_pylist() == [
        {"path": f"{tmp_path}/by/dog/1.wav", "label": "dog", "fold": 0}
    ]
