"""Files are written completely or not at all, after errors and kills too; JSON, fingerprints and claims of folders."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.errors import DamagedError
from engine.passes.records import failure_rows, shard_records
from engine.storage.files import (
    atomic_path,
    read_json,
    remove_leftovers,
    sha256_file,
    temporary_folder,
    write_bytes,
    write_json,
    write_parquet,
)
from engine.storage.fingerprints import claim, fingerprint, read_sealed, write_sealed

KILLED_WRITER = """
import sys
from engine.storage.files import atomic_path
with atomic_path(sys.argv[1]) as aside:
    with aside.open("wb") as file:
        file.write(b"half of the n")
        file.flush()
        print("writing", flush=True)
        sys.stdin.read()
"""


def test_a_block_that_ends_replaces_the_file(tmp_path):
    target = tmp_path / "deep" / "er" / "a.txt"
    with atomic_path(target) as aside:
        assert aside.parent == target.parent
        aside.write_text("new")
        assert not target.exists()
    assert target.read_text() == "new"
    assert os.listdir(target.parent) == ["a.txt"]


@pytest.mark.parametrize("old", [None, b"old"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_block_that_raises_leaves_the_old_file_and_no_litter(tmp_path, old, error):
    target = tmp_path / "a.bin"
    if old is not None:
        target.write_bytes(old)
    with pytest.raises(error), atomic_path(target) as aside:
        aside.write_bytes(b"half of the n")
        raise error
    assert (target.read_bytes() if target.exists() else None) == old
    assert os.listdir(tmp_path) == ([] if old is None else ["a.bin"])


def test_a_killed_writer_leaves_the_old_file_and_nothing_that_a_reader_takes_for_one(tmp_path):
    target = tmp_path / "stems" / "shard-000000-0000.done.json"
    write_json(target, {"num_stems": 3})
    writer = subprocess.Popen(
        [sys.executable, "-c", KILLED_WRITER, str(target)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with writer:
        assert writer.stdout.readline() == b"writing\n"
        writer.kill()
    assert writer.returncode == -signal.SIGKILL
    assert len(os.listdir(target.parent)) == 2, "the writer was not in the middle of its file"
    assert dict(shard_records(tmp_path)) == {"shard-000000-0000": {"num_stems": 3}}
    write_json(target, {"num_stems": 4})
    assert read_json(target) == {"num_stems": 4}


def test_what_was_left_aside_is_no_failure_table(tmp_path):
    (tmp_path / "failures").mkdir()
    (tmp_path / "failures" / ".shard-000000-0000.parquet.x1y2z3").write_bytes(b"half")
    assert list(failure_rows(tmp_path)) == []


def test_others_may_read_what_was_written(tmp_path):
    write_bytes(tmp_path / "a", b"x")
    assert (tmp_path / "a").stat().st_mode & 0o444 == 0o444


def test_json_round_trip_and_the_last_write_wins(tmp_path):
    value = {"b": [1, 2.5, None, "ü"], "a": {"x": True}}
    write_json(tmp_path / "v.json", {"old": 1})
    write_json(tmp_path / "v.json", value)
    assert read_json(tmp_path / "v.json") == value
    assert list(read_json(tmp_path / "v.json")) == ["b", "a"]


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_json_refuses_numbers_that_are_not_finite_and_keeps_the_old_file(tmp_path, number):
    write_json(tmp_path / "v.json", {"old": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "v.json", {"deep": [{"x": number}]})
    assert read_json(tmp_path / "v.json") == {"old": 1}
    assert os.listdir(tmp_path) == ["v.json"]


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"\xff\xfe{}", b"PAR1"])
def test_a_file_that_is_not_json_is_named(tmp_path, content):
    (tmp_path / "broken.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot read .*broken\.json as JSON"):
        read_json(tmp_path / "broken.json")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.json"):
        read_json(tmp_path / "gone.json")


def test_parquet_is_cut_into_row_groups(tmp_path):
    table = pa.table({"x": list(range(20))})
    write_parquet(tmp_path / "t.parquet", table, rows_per_group=8)
    assert pq.read_table(tmp_path / "t.parquet").equals(table)
    assert pq.ParquetFile(tmp_path / "t.parquet").num_row_groups == 3


def test_sha256_is_the_known_one(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256_file(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_fingerprint_sees_values_but_not_the_order_of_keys():
    value = {"a": 1, "b": {"c": [1, 2], "d": "ü"}}
    assert fingerprint(value) == fingerprint({"b": {"d": "ü", "c": (1, 2)}, "a": 1})
    others = [{**value, "a": 2}, {**value, "b": {"c": [2, 1], "d": "ü"}}, {**value, "a": "1"}, {"a": 1}]
    assert len({fingerprint(other) for other in [value, *others]}) == 5


def test_fingerprint_is_the_same_in_every_version():
    """Checkpoints, passes and trainings on disk are recognised by it."""
    assert fingerprint({"labels": ["dog", "cat"], "seed": 0}) == "cab82e4003a7fea8"
    assert len(fingerprint(None)) == 16


def test_fingerprint_refuses_nan():
    with pytest.raises(ValueError, match="not JSON compliant"):
        fingerprint([float("nan")])


def test_the_temporary_files_of_killed_writers_are_removed_and_nothing_else(tmp_path):
    """A child is killed by SIGKILL in the middle of a write."""
    code = (
        "import os, signal, sys; from engine.storage.files import atomic_path\n"
        "with atomic_path(sys.argv[1]) as aside:\n"
        "    aside.write_bytes(b'half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    for name in ("part.parquet", "part.done.json"):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], check=False)
    kept = {"part-1.parquet", "part-1.done.json", ".stems.lock", ".hidden", "notes.txt"}
    for name in kept:
        (tmp_path / name).write_bytes(b"whole")
    assert len(list(tmp_path.iterdir())) == len(kept) + 2
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_the_file_of_a_living_writer_is_no_leftover_and_the_next_write_tidies_the_folder(tmp_path):
    """As of a filter that was killed in ``tracks/`` while another one writes there."""
    left = tmp_path / ".kept.parquet.abcd_123"
    left.write_bytes(b"half")
    with atomic_path(tmp_path / "rejected.parquet") as aside:
        aside.write_bytes(b"whole")
        remove_leftovers(tmp_path)
        assert aside.exists() and not left.exists()
        left.write_bytes(b"half")
    assert [path.name for path in tmp_path.iterdir()] == ["rejected.parquet"]


TEMPORARY = """
import os, signal, sys, time
from engine.storage.files import temporary_folder
class Owner: pass
owner = Owner()
(temporary_folder("clearsep-corpus-", owner=owner) / "clips.parquet").write_bytes(b"rows")
print("made", flush=True)
sys.stdin.read()
"""


def test_the_temporary_folders_of_killed_processes_are_deleted_at_the_next_start_and_those_of_living_ones_are_not(
    tmp_path, monkeypatch
):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": {"TMPDIR": str(tmp_path)}}
    started = [subprocess.Popen([sys.executable, "-c", TEMPORARY], **pipes) for _ in range(2)]
    assert [process.stdout.readline() for process in started] == ["made\n"] * 2
    killed, living = started
    killed.kill()
    killed.communicate()
    foreign = tmp_path / "clearsep-corpus-of-mine"
    foreign.mkdir()
    assert len(list(tmp_path.iterdir())) == 3
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    owner = type("Owner", (), {})()
    own = temporary_folder("clearsep-corpus-", owner=owner)
    assert own.is_dir() and foreign.is_dir() and len(list(tmp_path.iterdir())) == 3
    del owner
    assert not own.exists()
    living.communicate("")
    assert list(tmp_path.iterdir()) == [foreign]


MANY = """
from engine.storage.files import folder_for_block
for _ in range(500):
    with folder_for_block("clearsep-corpus-") as folder:
        (folder / "clips.parquet").write_bytes(b"rows")
"""


def test_processes_that_make_and_tidy_folders_at_once_do_not_take_each_others(tmp_path):
    pipes = {"stderr": subprocess.PIPE, "text": True, "env": {"TMPDIR": str(tmp_path)}}
    started = [subprocess.Popen([sys.executable, "-c", MANY], **pipes) for _ in range(4)]
    assert [process.communicate()[1] for process in started] == [""] * 4
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", ["value", "key", "cut", "empty"])
def test_a_record_that_was_changed_is_noticed(tmp_path, change):
    path = tmp_path / "a.json"
    write_sealed(path, {"num_stems": 10, "name": "x"})
    assert read_sealed(path, dict) == {"num_stems": 10, "name": "x"}
    text = path.read_text()
    changed = {"value": text.replace("10", "11"), "key": text.replace("stems", "stemz"), "cut": text[:-9], "empty": ""}
    path.write_text(changed[change])
    with pytest.raises(DamagedError, match=r"cannot (use|read) .*a\.json .*; start the command that wrote it again"):
        read_sealed(path, dict)


def test_a_record_of_an_older_version_has_no_checksum_and_is_read(tmp_path):
    (tmp_path / "a.json").write_text('{"num_stems": 10}')
    assert read_sealed(tmp_path / "a.json", dict) == {"num_stems": 10}


@pytest.mark.parametrize("name", ["pass.json", "config.yaml"])
def test_a_folder_is_claimed_for_one_identity(tmp_path, name):
    identity = {"settings": {"clip_s": 10.0, "labels": ("dog", "cat")}, "seed": 0}
    claim(tmp_path / "out" / name, identity, what="a pass")
    before = (tmp_path / "out" / name).read_bytes()
    claim(tmp_path / "out" / name, identity, what="a pass")
    message = (
        r"out must hold a pass with .*, got a pass with another settings \(clip_s 10.0, not 3.0\); give another folder"
    )
    with pytest.raises(ValueError, match=message):
        claim(tmp_path / "out" / name, identity | {"settings": {**identity["settings"], "clip_s": 3.0}}, what="a pass")
    assert (tmp_path / "out" / name).read_bytes() == before


def test_a_claim_may_change_what_is_not_compared(tmp_path):
    def comparable(identity):
        return {key: value for key, value in identity.items() if key != "gpus"}

    path = tmp_path / "pass.json"
    claim(path, {"seed": 0, "gpus": 1}, what="a pass", comparable=comparable)
    claim(path, {"seed": 0, "gpus": 8}, what="a pass", comparable=comparable)
    assert read_json(path) == {"seed": 0, "gpus": 8}
    with pytest.raises(ValueError, match=r"another seed \(0, not 1\)"):
        claim(path, {"seed": 1, "gpus": 8}, what="a pass", comparable=comparable)


def test_a_written_file_and_its_name_are_on_the_disk_before_it_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order of a power cut's guarantee: bytes flushed, file renamed, the names in its folders flushed."""
    events: list[tuple[str, int]] = []
    fsync, replace = os.fsync, Path.replace

    def recorded_fsync(handle: int) -> None:
        events.append(("flush", os.fstat(handle).st_ino))
        fsync(handle)

    def recorded_replace(path: Path, target: Path) -> Path:
        events.append(("rename", path.stat().st_ino))
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(Path, "replace", recorded_replace)
    target = tmp_path / "new" / "folder" / "file.json"
    write_json(target, {"a": 1})
    file, folder, above, top = (path.stat().st_ino for path in (target, *list(target.parents)[:3]))
    renamed = events.index(("rename", file))
    assert ("flush", file) in events[:renamed]
    assert ("flush", folder) in events[renamed:]
    assert {("flush", above), ("flush", top)} <= set(events), "the names of new folders"
