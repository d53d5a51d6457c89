"""What makes two files, corpora and lists the same: their contents, wherever and whenever they were written."""

import os
import shutil
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import engine.corpus.contents as contents_module
from engine.corpus.contents import claim_contents, contents_of
from engine.corpus.read import read_corpus
from engine.corpus.sources import read_sources
from engine.storage.paths import location

pytest_plugins = ["tests.support.s3_server"]
NAMES = [f"{label}/{number}.wav" for label in ("bell", "dog") for number in range(3)]
SMALL, LARGE = 5_000, 300_000  # bytes: one piece, three pieces


def bytes_of(name, num_bytes=LARGE, *, seed=0):
    """Other bytes for each name and seed."""
    start = f"{seed} {name} ".encode()
    return (start * (num_bytes // len(start) + 1))[:num_bytes]


def written(folder, *, num_bytes=LARGE, seed=0, names=NAMES):
    """A folder of files, a manifest and a list of single-source clips over them."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(bytes_of(name, num_bytes, seed=seed))
    rows = [f"{name},bell;dog" for name in names]
    (folder / "natural.csv").write_text("\n".join(["path,labels", *rows]))
    (folder / "clips.csv").write_text("\n".join(["path,label", *(f"{name},{name.split('/')[0]}" for name in names)]))
    return folder


def claimed(tmp_path, root, *, names=NAMES, **more):
    return claim_contents(location(tmp_path / "contents.parquet"), str(root), names, what="files of a test", **more)


def aged(folder, monkeypatch):
    """Let the clock go on, so that files count as settled."""
    now = time.time()
    monkeypatch.setattr(contents_module.time, "time", lambda: now + 3600)
    return folder


def edited(path, at):
    """Change one byte, and neither the size nor the times that a copy would keep."""
    status, data = path.stat(), bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def moved(folder, out):
    """A copy with other times, numbers on the disk and order of writing."""
    out.mkdir()
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_file():
            (out / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, out / path.relative_to(folder))
    return out


@pytest.mark.parametrize("num_bytes", [0, 1, SMALL, 3 << 14, (3 << 14) + 1, LARGE])
@pytest.mark.parametrize("position", ["first", "middle", "last"])
def test_a_byte_at_the_beginning_middle_or_end_makes_another_file(tmp_path, num_bytes, position):
    path = tmp_path / "a.wav"
    path.write_bytes(bytes_of("a", num_bytes))
    shutil.copyfile(path, tmp_path / "copy.wav")
    (before, copy) = contents_of([str(path), str(tmp_path / "copy.wav")])
    assert before == copy and before.startswith(f"{num_bytes}-")
    if num_bytes:
        edited(path, {"first": 0, "middle": num_bytes // 2, "last": num_bytes - 1}[position])
        assert contents_of([str(path)]) != [before]


def test_what_is_no_file_has_no_contents_and_a_pipe_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.wav")
    (tmp_path / "folder.wav").mkdir()
    paths = [*(str(tmp_path / name) for name in ("pipe.wav", "folder.wav", "gone.wav")), "/dev/zero", "/a\0b"]
    assert contents_of([*paths, "/" + "x" * 5000, "https://example.org/a.wav"]) == [None] * 7


@pytest.mark.parametrize("num_bytes", [SMALL, LARGE])
def test_a_folder_that_was_moved_is_the_same_and_one_of_the_same_names_is_not(tmp_path, monkeypatch, num_bytes):
    one, other = (written(tmp_path / str(seed), num_bytes=num_bytes, seed=seed) for seed in (0, 1))
    aged(tmp_path, monkeypatch)
    first = claimed(tmp_path, one)
    for may_change in (None, lambda names: set()):
        assert claimed(tmp_path, moved(one, tmp_path / f"moved-{may_change is None}"), may_change=may_change) == first
        with pytest.raises(
            ValueError, match=r"got 6 of 6 files that .*: 'bell/0.wav', 'bell/1.wav', 'bell/2.wav', \.\.\."
        ):
            claimed(tmp_path, other, may_change=may_change)
    assert claimed(tmp_path, one) == first


def test_a_replaced_file_is_named_whatever_its_size_and_times(tmp_path, monkeypatch):
    root = aged(written(tmp_path / "corpus"), monkeypatch)
    claimed(tmp_path, root)
    edited(root / "dog/1.wav", 0)
    with pytest.raises(
        ValueError, match=r"got 1 of 6 files that were replaced.* since: 'dog/1.wav'; restore them, or give"
    ):
        claimed(tmp_path, root)
    edited(root / "dog/1.wav", 0)  # restored
    claimed(tmp_path, root)


def test_a_file_that_is_written_again_at_once_is_not_trusted_by_its_times(tmp_path):
    root = written(tmp_path / "corpus")
    claimed(tmp_path, root)
    assert pq.read_table(tmp_path / "contents.parquet")["seen"].null_count == len(NAMES)


def test_what_has_not_changed_is_not_opened_again_nor_the_record_written(tmp_path, monkeypatch):
    root, opened = aged(written(tmp_path / "corpus"), monkeypatch), []
    hashed = contents_module._hashed
    monkeypatch.setattr(contents_module, "_hashed", lambda path: opened.append(Path(path).name) or hashed(path))
    claimed(tmp_path, root)
    assert len(opened) == len(NAMES)
    before = (tmp_path / "contents.parquet").stat()
    os.utime(root / "dog/2.wav")
    claimed(tmp_path, root)
    assert opened[len(NAMES) :] == ["2.wav"]
    claimed(tmp_path, root)
    assert len(opened) == len(NAMES) + 1 and (tmp_path / "contents.parquet").stat().st_ino != before.st_ino
    before = (tmp_path / "contents.parquet").stat()
    claimed(tmp_path, root)
    assert (tmp_path / "contents.parquet").stat() == before


def test_files_may_be_replaced_where_that_is_allowed_and_appear_and_vanish(tmp_path):
    root, asked = written(tmp_path / "corpus"), []

    def may_change(names):
        asked.append(names)
        return {"bell/1.wav"}

    (root / "bell/0.wav").rename(root / "aside")
    first = claimed(tmp_path, root, may_change=may_change)
    (root / "aside").rename(root / "bell/0.wav")
    second = claimed(tmp_path, root, may_change=may_change)
    assert asked == [] and second != first
    edited(root / "bell/1.wav", 0)
    third = claimed(tmp_path, root, may_change=may_change)
    assert asked == [{"bell/1.wav"}] and third != second
    (root / "dog/0.wav").unlink()
    assert claimed(tmp_path, root, may_change=may_change) == third, "a file that is gone may come back"
    (root / "dog/0.wav").write_bytes(b"another")
    with pytest.raises(ValueError, match=r"got 1 of 6 .*'dog/0.wav'; restore"):
        claimed(tmp_path, root, may_change=may_change)


@pytest.mark.parametrize("change", ["added", "removed", "gone", "appeared"])
def test_a_list_of_clips_may_not_change_at_all(tmp_path, change):
    root = written(tmp_path / "corpus")
    if change == "appeared":
        (root / "dog/2.wav").unlink()
    claimed(tmp_path, root, names=NAMES[:-1] if change == "added" else NAMES)
    if change == "appeared":
        (root / "dog/2.wav").write_bytes(b"it")
    if change == "gone":
        (root / "dog/2.wav").unlink()
    with pytest.raises(ValueError, match=r"got 1 of 6 files that .*: 'dog/2.wav'"):
        claimed(tmp_path, root, names=NAMES[:-1] if change == "removed" else NAMES)


def test_many_files_are_compared_a_few_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(contents_module, "_AT_ONCE", 4)
    monkeypatch.setattr(contents_module, "_PER_THREAD", 2)
    names = sorted(f"{number}.wav" for number in range(23))
    root = written(tmp_path / "corpus", num_bytes=SMALL, names=names)
    first = claimed(tmp_path, root, names=names)
    assert claimed(tmp_path, root, names=names) == first
    assert pq.read_table(tmp_path / "contents.parquet")["path"].to_pylist() == names
    edited(root / "7.wav", 0)
    with pytest.raises(ValueError, match=r"got 1 of 23 .*'7.wav'"):
        claimed(tmp_path, root, names=names)


def test_the_files_of_a_corpus_come_once_in_order_and_without_those_that_are_set_aside(tmp_path, monkeypatch):
    monkeypatch.setattr("engine.corpus.table._ROWS_IN_MEMORY", 3)
    monkeypatch.setattr("engine.corpus.table._BATCH_ROWS", 2)
    rows = [f"{name}.wav,a;b,{start},{start + 1}" for start in range(4) for name in ("zebra", "ape", "é")]
    (tmp_path / "m.csv").write_text("\n".join(["path,labels,start_s,end_s", *rows, "one.wav,a,,"]))
    corpus = read_corpus(tmp_path / "m.csv")
    for _ in range(2):
        assert list(corpus.files(min_labels=2)) == ["ape.wav", "zebra.wav", "é.wav"]
    assert list(corpus.files()) == ["ape.wav", "one.wav", "zebra.wav", "é.wav"]


def test_the_fingerprint_of_single_source_clips_is_of_their_contents(tmp_path):
    root = written(tmp_path / "clips")
    first = read_sources(root / "clips.csv").fingerprint
    assert read_sources(moved(root, tmp_path / "elsewhere") / "clips.csv").fingerprint == first
    assert read_sources(root).fingerprint == first, "the same clips as a folder"
    edited(root / "bell/2.wav", LARGE - 1)
    assert read_sources(root / "clips.csv").fingerprint != first


def put(s3, prefix, folder):
    for path in folder.rglob("*"):
        if path.is_file():
            s3.put(f"{prefix}/{path.relative_to(folder)}", path.read_bytes())
    return f"{s3.root}/{prefix}"


def test_objects_are_compared_by_one_listing(s3, tmp_path):
    here = written(tmp_path / "corpus", num_bytes=SMALL)
    there = put(s3, "a/b", here)
    s3.proxy.reset()
    first = claimed(tmp_path, there)
    assert [request.method for request in s3.proxy.requests] == ["GET"] and s3.proxy.requests[0].path == f"/{s3.bucket}"
    assert claimed(tmp_path, there) == first == claimed(tmp_path, put(s3, "moved", here))
    assert read_sources(f"{there}/clips.csv").fingerprint == read_sources(f"{s3.root}/moved/clips.csv").fingerprint
    s3.put("a/b/dog/1.wav", bytes_of("other", SMALL))
    with pytest.raises(ValueError, match=r"got 1 of 6 files that were replaced.* since: 'dog/1.wav'"):
        claimed(tmp_path, there)
    assert read_sources(f"{there}/clips.csv").fingerprint != read_sources(f"{s3.root}/moved/clips.csv").fingerprint


@pytest.mark.parametrize("num_bytes", [SMALL, LARGE])
def test_a_corpus_may_move_from_a_disk_to_s3_and_back(s3, tmp_path, num_bytes):
    here, other = (written(tmp_path / str(seed), num_bytes=num_bytes, seed=seed) for seed in (0, 1))
    there, other_there = put(s3, "here", here), put(s3, "other", other)
    for root in (here, there, here, there):
        claimed(tmp_path, root, may_change=lambda names: set())
        for wrong in (other, other_there):
            with pytest.raises(ValueError, match="got 6 of 6 files that were replaced"):
                claimed(tmp_path, wrong, may_change=lambda names: set())


def test_what_lies_between_wanted_objects_is_not_listed_and_missing_ones_are_left_out(s3, tmp_path, monkeypatch):
    from engine.storage import s3 as module

    for number in range(30):
        s3.put(f"many/{number:04d}.wav", b"x" * number)
    list_objects, asked = module.client().list_objects_v2, []

    def few(**arguments):
        asked.append(arguments)
        return list_objects(**arguments, MaxKeys=3)

    monkeypatch.setattr(module.client(), "list_objects_v2", few)
    wanted = [0, 1, 2, 20, 29]
    paths = [f"{s3.root}/many/{number:04d}.wav" for number in wanted] + [f"{s3.root}/many/gone.wav", f"{s3.root}/a"]
    found = contents_of(paths)
    assert [content and content.split("-")[0] for content in found] == [*map(str, wanted), None, None]
    assert len(asked) <= 8


def test_an_address_that_leads_nowhere_is_a_missing_file(s3):
    s3.put("a.wav", b"abc")
    paths = [f"{s3.root}/a.wav", "s3://", "s3://there-is-no-such-bucket/a.wav", "s3://No Bucket!/a.wav", s3.root]
    assert [content and content[:2] for content in contents_of(paths)] == ["3-", None, None, None, None]


def test_where_objects_may_be_read_but_not_listed_they_are_asked_one_by_one(s3, monkeypatch):
    from engine.storage import s3 as module

    s3.put("a.wav", b"abc")
    listed = contents_of([f"{s3.root}/a.wav", f"{s3.root}/gone.wav"])

    def refused(**arguments):
        raise PermissionError("no")

    monkeypatch.setattr(module.client(), "list_objects_v2", refused)
    assert contents_of([f"{s3.root}/a.wav", f"{s3.root}/gone.wav"]) == listed and listed[1] is None
