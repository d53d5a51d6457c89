"""Lists and folders without labels: every row is a clip with no label, and one with labels stays what it was."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.corpus.read import read_corpus

pytest_plugins = ["tests.support.s3_server"]


def labels_of(corpus):
    return {row["path"]: row["labels"] for row in corpus.clips.to_pylist()}


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


def test_files_directly_in_a_folder_are_clips_without_labels(tmp_path):
    folder = touch(tmp_path, "a.wav", "b.flac", "dog/c.wav", "notes.txt")
    corpus = read_corpus(folder, needs_labels=False)
    assert labels_of(corpus) == {"a.wav": [], "b.flac": [], "dog/c.wav": ["dog"]}
    assert corpus.num_failures == 0
    assert read_corpus(folder).num_failures == 2  # as before


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_manifest_needs_no_column_of_labels(tmp_path, kind):
    rows = [{"path": "a.wav", "start_s": 0.0, "end_s": 2.0}, {"path": "a.wav", "start_s": 2.0, "end_s": 4.0}]
    path = tmp_path / f"m.{kind}"
    if kind == "csv":
        path.write_text("path,start_s,end_s\na.wav,0,2\na.wav,2,4\n")
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    corpus = read_corpus(path, needs_labels=False)
    assert [(row["start_s"], row["end_s"], row["labels"]) for row in corpus.clips.to_pylist()] == [
        (0.0, 2.0, []),
        (2.0, 4.0, []),
    ]
    with pytest.raises(ValueError, match="must have a column labels or label"):
        read_corpus(path)


def test_rows_with_and_without_labels_are_clips_of_one_list_and_the_ids_do_not_depend_on_it(tmp_path):
    path = tmp_path / "m.csv"
    path.write_text("path,labels\na.wav,dog;rain\nb.wav,\n,dog\n")
    every, labelled = read_corpus(path, needs_labels=False), read_corpus(path)
    assert labels_of(every) == {"a.wav": ["dog", "rain"], "b.wav": []}
    assert labelled.clips["clip_id"].to_pylist() == every.clips["clip_id"].to_pylist()[:1]
    assert (every.num_failures, labelled.num_failures) == (1, 2)
    assert "must have a path" in every.failures["message"][0].as_py()


def test_clips_without_labels_are_counted_where_none_is_needed(tmp_path):
    corpus = read_corpus(touch(tmp_path, "a.wav", "dog/b.wav"), needs_labels=False)
    assert [len(list(corpus.sorted_clips(min_labels=number))) for number in (0, 1, 2)] == [2, 1, 0]
    assert [list(corpus.files(min_labels=number)) for number in (0, 1)] == [["a.wav", "dog/b.wav"], ["dog/b.wav"]]
    assert corpus.labels(min_labels=0) == ["dog"]


def test_objects_in_s3_alike(s3):
    for name in ("rain.wav", "more/wind.wav"):
        s3.put(f"sounds/{name}", b"")
    s3.put("list.csv", b"path\nsounds/rain.wav\n")
    assert labels_of(read_corpus(f"{s3.root}/sounds", needs_labels=False)) == {
        "rain.wav": [],
        "more/wind.wav": ["more"],
    }
    assert labels_of(read_corpus(f"{s3.root}/list.csv", needs_labels=False)) == {"sounds/rain.wav": []}
