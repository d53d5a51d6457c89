"""Corpora with more rows than fit into memory: sorted on disk, every row a clip or a failure, split into tasks."""

import csv
import gc
import random
import re
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import engine.corpus.table as clip_table
import engine.passes.tasks as task_files
from engine.corpus.clips import clip_id
from engine.corpus.read import read_corpus
from engine.passes.tasks import Tasks
from engine.schema import CLIPS, FAILURES, clip_columns

IN_MEMORY, BATCH, NUM_CLIPS = 7, 3, 40


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """Seven rows fit into memory, three are read at a time, and temporary folders are in the test's folder."""
    monkeypatch.setattr(clip_table, "_ROWS_IN_MEMORY", IN_MEMORY)
    monkeypatch.setattr(clip_table, "_BATCH_ROWS", BATCH)
    monkeypatch.setattr(task_files, "_TASKS_PER_FILE", 3)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def labels_of(number):
    return ["low", "high"] if number % 4 else ["low"]


def rows(numbers=range(NUM_CLIPS)):
    return [(f"clip{number}.wav", ";".join(labels_of(number))) for number in numbers]


def id_of(number):
    return clip_id(f"clip{number}.wav", labels_of(number), None, None)


def written(folder, cells):
    folder.mkdir()
    with (folder / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "labels"), *cells])
    return folder / "manifest.csv"


def test_clips_are_sorted_by_id_across_files(tmp_path):
    corpus = read_corpus(written(tmp_path / "corpus", rows()))
    assert [row["clip_id"] for row in corpus.sorted_clips()] == sorted(map(id_of, range(NUM_CLIPS)))
    assert all(set(row) == set(CLIPS.names) for row in corpus.sorted_clips())
    two_labels = [row["clip_id"] for row in corpus.sorted_clips(min_labels=2)]
    assert two_labels == sorted(id_of(number) for number in range(NUM_CLIPS) if number % 4)
    (file,) = tmp_path.glob("clearsep-corpus-*/clips.parquet")
    metadata = pq.read_metadata(file)
    assert all(metadata.row_group(group).num_rows <= BATCH for group in range(metadata.num_row_groups))
    assert corpus.clips["path"].to_pylist() == [
        path for path, _ in rows()
    ]  # all together they are in the order of the source
    assert (corpus.num_clips, corpus.num_failures) == (NUM_CLIPS, 0)


def test_every_row_is_a_clip_or_a_failure_and_a_repeated_clip_names_its_row(tmp_path):
    """Rows 1 and 41 are in different files, rows 2 and 3 in the same; a clip that occurs three times fails twice."""
    cells = [*rows(range(2)), *rows([1]), *rows(range(2, NUM_CLIPS)), *rows([0]), ("", "low"), *rows([20, 20])]
    corpus = read_corpus(written(tmp_path / "corpus", cells))
    assert corpus.num_clips == NUM_CLIPS and corpus.num_clips + corpus.num_failures == len(cells)
    failures = [row for table in corpus.failure_tables() for row in table.to_pylist()]
    assert len(failures) == corpus.num_failures == len(corpus.failures) == 5
    again = {
        int(re.search(r"row (\d+) which repeats", row["message"])[1]): row
        for row in failures
        if "repeats" in row["message"]
    }
    assert {number: row["path"] for number, row in again.items()} == {
        3: "clip1.wav",
        42: "clip0.wav",
        44: "clip20.wav",
        45: "clip20.wav",
    }
    assert all(row["step"] == "manifest" and row["num_queries"] in (1, 2) for row in failures)
    assert sum("must have a path" in row["message"] for row in failures) == 1
    assert corpus.failures.schema == FAILURES


def test_more_failures_than_fit_into_memory_can_be_read_more_than_once(tmp_path):
    corpus = read_corpus(written(tmp_path / "corpus", [*rows(range(2)), *[("", "low")] * 30, *rows([0])]))
    for _ in range(2):
        assert sum(len(table) for table in corpus.failure_tables()) == corpus.num_failures == 31
    assert Counter(corpus.failures["error_class"].to_pylist()) == {"ValueError": 31}


def test_the_fingerprint_depends_on_the_clips_and_not_on_their_order(tmp_path):
    shuffled = rows()
    random.Random(0).shuffle(shuffled)
    changed = [("clip0.wav", "low;middle"), *rows(range(1, NUM_CLIPS))]
    kinds = {"plain": rows(), "shuffled": shuffled, "again": [*rows(), *rows([3])], "changed": changed}
    kinds |= {"longer": rows(range(NUM_CLIPS + 1)), "shorter": rows(range(NUM_CLIPS - 1))}
    found = {name: read_corpus(written(tmp_path / name, cells)).fingerprint for name, cells in kinds.items()}
    assert found["plain"] == found["shuffled"] == found["again"]
    assert len(set(found.values())) == 4


def test_the_temporary_files_of_a_corpus_are_deleted_with_it(tmp_path):
    corpus = read_corpus(written(tmp_path / "corpus", rows()))
    (folder,) = tmp_path.glob("clearsep-corpus-*")
    assert [path.name for path in folder.iterdir()] == ["clips.parquet"]  # the unsorted files are deleted
    assert corpus.clips.num_rows == NUM_CLIPS
    del corpus
    gc.collect()
    assert list(tmp_path.glob("clearsep-*")) == []


def test_a_source_that_cannot_be_read_leaves_nothing_behind(tmp_path):
    path = written(tmp_path / "corpus", rows())
    path.write_bytes(path.read_bytes() + b'x.wav,"low')
    with pytest.raises(ValueError, match=r"as CSV \(near line"):
        read_corpus(path)
    gc.collect()
    assert list(tmp_path.glob("clearsep-*")) == []


@pytest.mark.parametrize("rows_per_task", [4, 100])
def test_tasks_are_row_groups_of_several_files(tmp_path, rows_per_task):
    corpus = read_corpus(written(tmp_path / "corpus", rows()))
    tasks = Tasks(tmp_path / "tasks")
    counts = tasks.write(corpus, rows_per_task=rows_per_task, min_labels=1)
    wanted = sorted(map(id_of, range(NUM_CLIPS)))
    groups = [wanted[i : i + rows_per_task] for i in range(0, NUM_CLIPS, rows_per_task)]
    assert counts == {"num_tasks": len(groups), "num_clips": NUM_CLIPS, "num_set_aside": 0}
    assert tasks.num_tasks() == len(groups)
    for number in random.Random(0).sample(range(len(groups)), len(groups)):
        found = Tasks(tmp_path / "tasks").rows(number)
        assert [row["clip_id"] for row in found] == groups[number]
        assert all(set(row) == {*CLIPS.names, "is_cut", "tried_in"} for row in found)
        assert not any(row["is_cut"] or row["tried_in"] for row in found)
    files = sorted(path.name for path in (tmp_path / "tasks").iterdir())
    assert files == [*(f"tasks-{i:06d}.parquet" for i in range(0, len(groups), 3)), "tasks.json"]


def test_retry_tasks_are_numbered_after_the_others_and_name_the_tasks_that_held_their_clips(tmp_path):
    corpus, tasks = read_corpus(written(tmp_path / "corpus", rows())), Tasks(tmp_path / "tasks")
    assert tasks.num_tasks() == 0 and tasks.retried() == {}
    tasks.write(corpus, rows_per_task=4, min_labels=1)
    first = [clip_columns(tasks.rows(task)[0]) for task in (1, 3, 8)]
    tried = zip(first, (1, 3, 8), strict=True)
    rows_of_retry = [{**row, "is_cut": False, "tried_in": [task]} for row, task in tried]
    assert tasks.append(rows_of_retry, rows_per_task=2) == 3
    assert tasks.num_tasks() == 12 and tasks.rows(10) == rows_of_retry[:2] and tasks.rows(11) == rows_of_retry[2:]
    again = {**first[2], "is_cut": True, "tried_in": [8, 11]}
    assert tasks.append([again], rows_per_task=2) == 1
    assert tasks.num_tasks() == 13 and tasks.rows(12) == [again] and tasks.rows(11) == rows_of_retry[2:]
    ids = [row["clip_id"] for row in first]
    assert tasks.retried() == {ids[0]: [1, 10], ids[1]: [3, 10], ids[2]: [8, 11, 12]}


@pytest.mark.parametrize(("min_labels", "num_clips"), [(1, 40), (2, 30), (3, 0)])
def test_clips_with_fewer_labels_are_set_aside_and_counted(tmp_path, min_labels, num_clips):
    corpus = read_corpus(written(tmp_path / "corpus", rows()))
    tasks = Tasks(tmp_path / "tasks")
    counts = tasks.write(corpus, rows_per_task=4, min_labels=min_labels)
    assert (counts["num_clips"], counts["num_set_aside"]) == (num_clips, NUM_CLIPS - num_clips)
    found = [row for task in range(counts["num_tasks"]) for row in tasks.rows(task)]
    assert len(found) == num_clips and all(len(row["labels"]) >= min_labels for row in found)


def test_a_folder_that_is_half_written_is_written_again_and_a_complete_one_is_not(tmp_path):
    corpus = read_corpus(written(tmp_path / "corpus", rows()))
    tasks = Tasks(tmp_path / "tasks")
    counts = tasks.write(corpus, rows_per_task=4, min_labels=1)
    files = {path: path.read_bytes() for path in (tmp_path / "tasks").iterdir()}
    Path(tmp_path / "tasks" / "tasks.json").unlink()
    (tmp_path / "tasks" / "tasks-000003.parquet").write_bytes(b"half")
    (tmp_path / "tasks" / "tasks-000009.parquet").unlink()
    assert tasks.write(corpus, rows_per_task=4, min_labels=1) == counts
    assert {path: path.read_bytes() for path in (tmp_path / "tasks").iterdir()} == files
    times = {path: path.stat().st_mtime_ns for path in files}
    assert tasks.write(corpus, rows_per_task=4, min_labels=1) == counts
    assert {path: path.stat().st_mtime_ns for path in files} == times
