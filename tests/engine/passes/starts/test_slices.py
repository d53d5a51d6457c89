"""Several commands make one pass: the same bytes as one command, whatever happens to them and in whatever order."""

import fcntl
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from engine.corpus.read import read_corpus
from engine.errors import DamagedError, InUseError
from engine.passes import run
from engine.passes.config import PassConfig
from engine.passes.records import done_names
from engine.passes.shards import damaged_files
from engine.passes.slices import parse_slice
from engine.passes.tasks import Slice
from engine.storage.files import read_json
from engine.storage.paths import location
from tests.support.signals import RATE_HZ, mixture, open_bands, write_clips
from tests.support.this_process import InThisProcess, contents

pytest_plugins = ["tests.support.s3_server"]
CONFIG = PassConfig(clip_s=0.5, min_clip_s=0.2, shard_s=1.0, batch_s=8.0, rows_per_task=2)
FILES = {f"{number}.wav": mixture(RATE_HZ // 2, seed=number) for number in range(6)}
FILES |= {"long.wav": mixture(5 * RATE_HZ // 4, seed=20), "gone.wav": None}
OF_SLICES = {"corpus/slices.json", *(f"corpus/slice-{number}-of-3.json" for number in (1, 2, 3))}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return read_corpus(write_clips(tmp_path_factory.mktemp("corpus"), FILES))


@pytest.fixture
def stream(monkeypatch):
    return InThisProcess(monkeypatch)


@pytest.fixture
def start(corpus, stream, tmp_path):
    """Starts the pass, or a slice of it, in a folder."""

    def started(part=None, out=tmp_path / "out", **more):
        return run.run_pass(corpus, out, separator=open_bands, config=CONFIG, slice=part, **more)

    return started


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """All files of the pass as one command makes it."""
    out = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patch:
        InThisProcess(patch)
        run.run_pass(corpus, out, separator=open_bands, config=CONFIG)
    return contents(out)


def without_slices(files):
    """The contents of files may have been noted again since, when the clock had moved on."""
    return {name: data for name, data in files.items() if name not in OF_SLICES | {"corpus/contents.parquet"}}


def test_slices_make_the_bytes_of_the_whole_and_the_last_closes_the_pass(start, whole, tmp_path, caplog):
    caplog.set_level("INFO")
    first, second = start("2/3"), start((1, 3))
    assert (first["missing_slices"], second["missing_slices"]) == (["1/3", "3/3"], ["3/3"])
    assert "slice 1/3 is done, 1 are not (3/3); the last of them closes the pass" in caplog.text
    assert not (tmp_path / "out" / "stems" / "manifest.json").exists() and "missing_slices" not in whole["summary.json"]
    last = start("3/3")
    assert "missing_slices" not in last and last["num_queries"] == whole["summary.json"]["num_queries"]
    assert sum(one["num_stems"] for one in (first, second)) < last["num_stems"]
    assert without_slices(contents(tmp_path / "out")) == without_slices(whole)
    assert start("1/3") == last == start() == start("2/4")  # a closed pass: nothing is left to do


def test_slices_in_s3_make_the_bytes_of_the_whole(start, whole, s3):
    out = location(f"{s3.root}/out")
    for number in (1, 2, 3):
        start((number, 3), out=out)
    files = {name: data for name, data in whole.items() if name.endswith(".parquet") and not name.startswith("corpus")}
    assert {name: s3.get(f"out/{name}") for name in files} == files
    assert read_json(out / "stems" / "manifest.json")["fingerprint"] == whole["stems/manifest.json"]["fingerprint"]


def test_slices_that_end_at_the_same_moment_close_the_pass_once(start, whole, stream, tmp_path):
    together = threading.Barrier(3, timeout=60)
    stream.after = lambda turns: together.wait()
    with ThreadPoolExecutor(3) as pool:
        summaries = list(pool.map(start, ("1/3", "2/3", "3/3")))
    assert sum("missing_slices" not in summary for summary in summaries) == 1
    assert without_slices(contents(tmp_path / "out")) == without_slices(whole)


def test_what_is_at_work_is_refused_and_not_disturbed(start, whole, stream, tmp_path):
    """While slice 1/3 is at work, others begin, are refused, fail and end."""
    out, tried = tmp_path / "out", []

    def meanwhile(shard):
        if tried:
            return shard
        tried.append(shard)
        for part in ("1/3", None, "1/4"):
            with pytest.raises(
                InUseError, match=r"cannot start \(slice 1/3 of .* is in use by process \d+ on .*; wait until"
            ):
                start(part)
        mark, unfinished = out / "in-hand-1-of-3" / "decode", out / "stems" / ".shard.parquet.12345678"
        mark.touch()
        with unfinished.open("wb") as writer:
            fcntl.flock(writer, fcntl.LOCK_EX)
            start("2/3")
            assert mark.exists() and unfinished.exists()
        return shard

    stream.decoded = meanwhile
    assert start("1/3")["missing_slices"] == ["3/3"]
    assert not list(out.glob("in-hand*"))
    start("3/3")
    assert without_slices(contents(out)) == without_slices(whole)


def test_a_slice_that_was_killed_is_started_again_alone(start, whole, stream, tmp_path):
    def killed(shard):
        if len(done_names(tmp_path / "out", part=Slice(1, 3))):
            raise KeyboardInterrupt
        return shard

    stream.decoded = killed
    with pytest.raises(KeyboardInterrupt):
        start("1/3")
    stream.decoded = lambda shard: shard
    start("2/3")
    assert start("3/3")["missing_slices"] == ["1/3"]
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "stems").glob("*.parquet")}
    assert "missing_slices" not in start("1/3")
    assert done.items() <= {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "stems").glob("*")}.items()
    assert without_slices(contents(tmp_path / "out")) == without_slices(whole)


def test_the_command_without_a_slice_makes_what_is_missing(start, whole, tmp_path):
    start("2/3")
    start()
    assert without_slices(contents(tmp_path / "out")) == without_slices(whole)
    assert [path.name for path in (tmp_path / "out" / "corpus").glob("slice*")] == ["slices.json"]


def test_a_slice_makes_its_own_damaged_shards_again_and_closes_the_pass_again(start, whole, stream, tmp_path):
    for number in (1, 2, 3):
        start((number, 3))
    for name in ("shard-000001-0000", "shard-000002-0000"):  # of the second and of the third slice
        path = tmp_path / "out" / "stems" / f"{name}.parquet"
        path.write_bytes(path.read_bytes()[:-1])
    stream.turns.clear()
    start("1/3")
    assert stream.turns == []
    assert "missing_slices" not in start("2/3")
    assert (stream.turns, damaged_files(tmp_path / "out")) == ([[1]], ["stems/shard-000002-0000.parquet"])
    start("3/3")
    assert without_slices(contents(tmp_path / "out")) == without_slices(whole)


def test_shards_that_another_slice_lost_are_named(start, tmp_path):
    start("1/3")
    start("2/3")
    (tmp_path / "out" / "stems" / "shard-000001-0000.done.json").unlink()
    with pytest.raises(RuntimeError, match=r"of 1 tasks are missing, the first is 1.*again, without --slice, or"):
        start("3/3")


def test_a_damaged_retry_is_for_the_command_without_a_slice(start, tmp_path):
    start()
    start(retry_failed=True)
    (retry,) = (tmp_path / "out" / "corpus").glob("retry-*")
    retry.write_bytes(b"")
    with pytest.raises(DamagedError, match=r"cannot use .*retry-.*; start the command without --slice"):
        start("1/3")
    assert start()["num_failed"] == 2


@pytest.mark.parametrize("given", ["0/4", "5/4", "x", "1/", "-1/4", "1/4/2", "1.0/4", "", (0, 4), (1,), "1/0"])
def test_bad_slices_are_refused(start, given, tmp_path):
    with pytest.raises(
        ValueError, match=r"slice must be a number and a count, from 1/4 to 4/4 for instance, got .*; give"
    ):
        start(given)
    with pytest.raises(ValueError, match=r"slice must be null for --retry-failed, got '1/4'; run it without --slice"):
        start("1/4", retry_failed=True)
    assert not (tmp_path / "out").exists()


def test_every_task_belongs_to_one_slice():
    parts = parse_slice("2/3").all()
    assert [sum(part.has(task) for part in parts) for task in range(10)] == [1] * 10
    assert [task for task in range(10) if parse_slice((3, 3)).has(task)] == [2, 5, 8]


def test_slices_of_one_cluster_start_with_a_share_of_it_and_may_grow(monkeypatch):
    monkeypatch.setattr(run, "require_connection", lambda: None)
    monkeypatch.setattr(run.ray, "cluster_resources", lambda: {"CPU": 64.0, "GPU": 8.0})
    pools = [run.choose_placement(CONFIG, Slice(1, count))[:3] for count in (1, 4, 32)]
    assert pools == [(1.0, 8, 8), (1.0, 2, 8), (1.0, 1, 8)]


@pytest.mark.parametrize(
    ("tasks", "actors", "blocks"), [(1, 3, 1), (95, 3, 95), (96, 3, 48), (1500, 3, 188), (15625, 100, 1954)]
)
def test_one_task_of_ray_takes_several_where_there_are_many_for_every_actor(tasks, actors, blocks):
    """At least sixteen blocks for each actor, of at most eight tasks."""
    assert run._num_blocks(tasks, actors) == blocks
