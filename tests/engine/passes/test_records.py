"""Records of a pass: failures with reasons, retries, and totals that add up whatever happens in between."""

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import torch

from engine.corpus.read import read_corpus
from engine.passes.config import PassConfig
from engine.passes.records import (
    parse_shard_name,
    plan_retry,
    read_totals,
    shard_records,
    write_manifest_failures,
    write_record,
)
from engine.passes.shards import write_shard
from engine.passes.tasks import Tasks
from engine.schema import STEMS, failure
from tests.support.signals import (
    MARKER,
    RATE_HZ,
    BandSeparator,
    marked,
    mixture,
    read_failures,
    run_stages,
    write_clips,
)

CONFIG = PassConfig(clip_s=2.0, min_clip_s=0.5, shard_s=4.0, batch_s=8.0, rows_per_task=4)
SHORT = {f"{name}.wav": mixture(RATE_HZ, seed=number) for number, name in enumerate("abcdefgh")}
LONG_T = mixture(5 * RATE_HZ, seed=20)
HURT_T = np.concatenate([LONG_T[: 3 * RATE_HZ], np.full(100, np.nan, np.float32), LONG_T[3 * RATE_HZ + 100 :]])
GOOD = {**SHORT, "long.wav": LONG_T, "strange.wav": mixture(RATE_HZ, seed=30)}
BAD = {"b.wav": None, "e.wav": b"RIFF, but nothing that follows is a WAV file", "long.wav": HURT_T}
LABELS = {"strange.wav": ("low", "whale", "high")}


class CountingSeparator(BandSeparator):
    """Counts the stems that were separated of each clip, by the clip's samples."""

    def __init__(self):
        super().__init__()
        self.queries = Counter()

    def _band(self, mix_T, label):
        self.queries[mix_T.numpy().tobytes()] += 1
        return super()._band(mix_T, label)


class ForgetfulSeparator(BandSeparator):
    """Is out of memory for the marked clip."""

    def inspect(self, mix_BT):
        if bool((mix_BT == np.float32(MARKER)).any()):
            raise torch.OutOfMemoryError("the marked clip does not fit")


class Pass:
    """A corpus of real files and the steps of a pass over it, started as often as a test likes."""

    def __init__(self, folder, files):
        self.folder, self.out = folder / "corpus", folder / "out"
        self.corpus = read_corpus(write_clips(self.folder, files, labels=LABELS))
        self.rows = self.corpus.clips.sort_by("clip_id").to_pylist()
        self.num_tasks = -(-len(self.rows) // CONFIG.rows_per_task)

    def run(self, separator=None, **changes):
        """Returns the names of the shards that were written."""
        separator = separator or BandSeparator()
        given = {"config": CONFIG, "open_separator": lambda device: separator, **changes}
        return run_stages(self.rows, self.corpus.root, self.out, **given)

    def plan_retry(self, rows_per_task=CONFIG.rows_per_task):
        return plan_retry(self.out, rows_per_task=rows_per_task)

    @property
    def tasks(self):
        return Tasks(self.out / "corpus")

    @property
    def retry_tasks(self):
        """Numbers of the tasks that retries appended."""
        return range(self.num_tasks, self.tasks.num_tasks())

    def write(self, **files):
        """Write files (``a`` for ``a.wav``), or remove those that are None."""
        for name, samples_T in files.items():
            path = self.folder / f"{name}.wav"
            path.unlink(missing_ok=True)
            if samples_T is not None:
                soundfile.write(path, samples_T, RATE_HZ, subtype="FLOAT")

    def repair(self, *names):
        """Write files as they are in ``GOOD``."""
        self.write(**{name: GOOD[f"{name}.wav"] for name in names})

    @property
    def failures(self):
        return read_failures(self.out).to_pylist()

    @property
    def failed(self):
        """Path and label of every failure that stands, sorted."""
        return sorted((row["path"], row["label"]) for row in self.failures)

    def stems(self):
        """All rows of the shards that are done."""
        shards = [self.out / "stems" / f"{name}.parquet" for name, _ in shard_records(self.out)]
        return [row for shard in shards for row in pq.read_table(shard).to_pylist()]

    def check(self):
        """No stem or failure exists twice, and the totals are those of the stems and failures that exist."""
        stems, failures, totals = self.stems(), self.failures, read_totals(self.out)
        pairs = [(row["clip_id"], row["label"]) for row in stems]
        pairs += [(row["clip_id"], row["label"]) for row in failures]
        assert len(set(pairs)) == len(pairs)
        failed_clips = {row["clip_id"] for row in failures if row["label"] is None}
        separated = {row["clip_id"] for row in stems}
        assert not failed_clips & separated
        assert totals.num_stems == len(stems)
        assert totals.num_failed == sum(row["num_queries"] for row in failures)
        assert totals.num_queries == totals.num_stems + totals.num_failed
        assert totals.num_clips == len(separated | {row["clip_id"] for row in failures})
        return totals


def counts(totals):
    return totals.num_clips, totals.num_queries, totals.num_stems, totals.num_failed


def contents(stems):
    """Stems as a set, equal for two passes that made the same stems of the same clips."""
    assert len({(row["clip_id"], row["label"]) for row in stems}) == len(stems)
    names = [name for name in stems[0] if name not in ("labels", "mixture_exponent")]
    return {tuple(row[name] for name in names) for row in stems}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A pass over good files."""
    made = Pass(tmp_path_factory.mktemp("good"), GOOD)
    made.run()
    return made


@pytest.fixture
def bad(tmp_path):
    """A pass over the same files, but one is missing, one is no audio and one has a hole in the middle."""
    made = Pass(tmp_path, GOOD | BAD)
    made.run()
    return made


def test_a_shard_counts_only_with_its_record(tmp_path):
    record = write_shard(tmp_path, "shard-000000-0000", stems=STEMS.empty_table(), failures=[])
    assert dict(shard_records(tmp_path)) == {}
    write_record(tmp_path, "shard-000000-0000", record)
    assert dict(shard_records(tmp_path)) == {"shard-000000-0000": record}
    assert (record["num_stems"], record["num_failed"]) == (0, 0)


def test_failures_of_all_shards_are_read_together(tmp_path):
    assert len(read_failures(tmp_path)) == 0
    clip = {"path": "a.wav", "labels": ["low", "high"], "start_s": 0.5, "end_s": None}
    rows = [failure({"clip_id": f"clip-{n}", **clip}, step="decode", error=ValueError("m")) for n in (0, 1)]
    for number, row in enumerate(rows):
        name = f"shard-{number:06d}-0000"
        record = write_shard(tmp_path, name, stems=STEMS.empty_table(), failures=[row])
        assert len(read_failures(tmp_path)) == number  # a shard without a record will be made again
        write_record(tmp_path, name, record)
    assert read_failures(tmp_path).to_pylist() == rows


def test_failures_have_the_number_of_attempts(tmp_path, monkeypatch):
    """Errors that may pass by themselves, such as memory, are tried several times, others once."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    files = {"a.wav": SHORT["a.wav"], "full.wav": marked(SHORT["b.wav"]), "gone.wav": None}
    made = Pass(tmp_path, files)
    made.run(ForgetfulSeparator())
    rows = {row["path"]: row for row in made.failures}
    assert rows.keys() == {"full.wav", "gone.wav"}
    assert rows["gone.wav"]["attempts"] == 1 and rows["full.wav"]["attempts"] > 1
    assert rows["full.wav"]["label"] is None and rows["full.wav"]["error_class"] == "OutOfMemoryError"
    made.check()


def test_a_failure_keeps_its_clip(bad):
    """Whether its times are those of the manifest, or of a clip that was cut from a recording."""
    rows = {row["path"]: row for row in bad.failures}
    manifest = {row["path"]: row for row in bad.rows}
    for path in ("b.wav", "e.wav", "strange.wav"):
        assert {name: rows[path][name] for name in manifest[path]} == manifest[path]
        assert not rows[path]["is_cut"]
    assert (rows["long.wav"]["start_s"], rows["long.wav"]["end_s"]) == (2.0, 4.0)
    assert rows["long.wav"]["is_cut"] and rows["long.wav"]["clip_id"] != manifest["long.wav"]["clip_id"]


def test_a_retry_has_the_clips_that_failed_as_a_whole_in_new_tasks(bad):
    assert bad.failed == [("b.wav", None), ("e.wav", None), ("long.wav", None), ("strange.wav", "whale")]
    failures = {row["clip_id"]: row for row in bad.failures if row["label"] is None}
    assert bad.plan_retry(rows_per_task=2) == 3
    assert len(bad.retry_tasks) == 2
    rows = [row for task in bad.retry_tasks for row in bad.tasks.rows(task)]
    assert {row["clip_id"] for row in rows} == failures.keys()
    for row in rows:
        failed = failures[row["clip_id"]]
        assert all(row[name] == failed[name] for name in ("path", "labels", "start_s", "end_s", "is_cut"))
        (task,) = row["tried_in"]
        assert task < bad.num_tasks
    assert bad.failed == [("strange.wav", "whale")]  # the others are still to come
    bad.check()


def test_rows_of_the_manifest_that_are_no_clips_and_labels_that_fail_are_not_retried(tmp_path):
    made = Pass(tmp_path, {"a.wav": SHORT["a.wav"], "strange.wav": SHORT["b.wav"]})
    manifest = made.folder / "manifest.csv"
    manifest.write_text(manifest.read_text() + ",low\na.wav,low; high\n")
    corpus = read_corpus(manifest)
    made.run()
    write_manifest_failures(made.out, corpus)
    assert made.failed == [("", None), ("a.wav", None), ("strange.wav", "whale")]
    assert made.plan_retry() == 0 and list(made.retry_tasks) == []


def test_repaired_files_are_separated_once_and_the_totals_are_those_of_a_pass_over_good_files(bad, good):
    """Only the three clips are separated, and of the long recording only the clip that had the hole."""
    bad.plan_retry()
    bad.repair("b", "e", "long")
    untouched = {path: path.stat().st_mtime_ns for path in (bad.out / "stems").iterdir()}
    separator = CountingSeparator()
    written = bad.run(separator)
    assert separator.queries == {
        SHORT["b.wav"].tobytes(): 2,
        SHORT["e.wav"].tobytes(): 2,
        LONG_T[2 * RATE_HZ : 4 * RATE_HZ].tobytes(): 2,
    }
    assert {parse_shard_name(name)[0] for name in written} == set(bad.retry_tasks)
    assert {path: path.stat().st_mtime_ns for path in untouched} == untouched
    assert bad.failed == [("strange.wav", "whale")]
    assert contents(bad.stems()) == contents(good.stems())
    again, plain = bad.check(), good.check()
    assert counts(again) == counts(plain)
    assert again.audio_s == pytest.approx(plain.audio_s)
    num_tasks = bad.tasks.num_tasks()
    assert bad.run() == [] and bad.plan_retry() == 0 and bad.tasks.num_tasks() == num_tasks


def test_a_clip_that_fails_again_is_listed_once_and_can_be_retried_again(bad, good):
    bad.plan_retry()
    bad.repair("b")
    bad.run()
    assert bad.failed == [("e.wav", None), ("long.wav", None), ("strange.wav", "whale")]
    bad.check()
    before = bad.tasks.num_tasks()
    assert bad.plan_retry() == 2
    assert all(len(row["tried_in"]) == 2 for row in bad.tasks.rows(before))
    bad.repair("e", "long")
    separator = CountingSeparator()
    assert {parse_shard_name(name)[0] for name in bad.run(separator)} == {before}
    assert sum(separator.queries.values()) == 4 and SHORT["b.wav"].tobytes() not in separator.queries
    assert contents(bad.stems()) == contents(good.stems())
    bad.check()


def test_the_clips_of_a_file_that_became_shorter_still_count(bad):
    """The clip from 2 s to 4 s no longer exists in a recording of 3 s."""
    before = bad.check()
    bad.plan_retry()
    bad.write(long=LONG_T[: 3 * RATE_HZ])
    bad.run()
    (row,) = (row for row in bad.failures if row["path"] == "long.wav")
    assert "another length by now" in row["message"] and row["num_queries"] == 2
    after = bad.check()
    assert counts(after) == counts(before)


def test_a_clip_whose_recording_was_lost_fails_once_and_as_that_clip(bad):
    before = bad.check()
    clip = next(row for row in bad.failures if row["path"] == "long.wav")
    bad.plan_retry()
    bad.write(long=None)
    bad.run()
    (row,) = (row for row in bad.failures if row["path"] == "long.wav")
    assert row["clip_id"] == clip["clip_id"] and "cannot open" in row["message"]
    assert bad.check().num_queries == before.num_queries


def test_a_long_recording_that_was_missing_is_separated_in_all_its_clips(tmp_path, good):
    made = Pass(tmp_path, GOOD | {"long.wav": None, "a.wav": None})
    made.run()
    assert [row["num_queries"] for row in made.failures if row["path"] == "long.wav"] == [2]
    made.plan_retry()
    made.repair("long", "a")
    made.run()
    assert contents(made.stems()) == contents(good.stems())
    made.check()


@pytest.mark.parametrize("number", [0, -1])
def test_an_interrupted_retry_resumes(bad, good, number):
    """As after a kill between a shard and its record; clips of the lost shard are still to come, not failed."""
    bad.plan_retry(rows_per_task=1)
    bad.repair("b", "e", "long")
    written = bad.run()
    records = {name: record["sha256"] for name, record in shard_records(bad.out)}
    (bad.out / "stems" / f"{written[number]}.done.json").unlink()
    assert bad.failed == [("strange.wav", "whale")]
    assert read_totals(bad.out).num_clips == good.check().num_clips - 1
    bad.check()
    assert bad.run() == [written[number]]
    assert {name: record["sha256"] for name, record in shard_records(bad.out)} == records
    assert contents(bad.stems()) == contents(good.stems())
    bad.check()


@pytest.mark.parametrize("max_shards", [0, 1])
def test_an_interrupted_retry_that_is_planned_again_tries_no_clip_twice(bad, good, max_shards):
    """A command that is started again has --retry-failed again."""
    bad.plan_retry()
    num_tasks = bad.tasks.num_tasks()
    bad.repair("b", "e", "long")
    bad.run(max_shards=max_shards)
    assert bad.plan_retry() == 0 and bad.tasks.num_tasks() == num_tasks
    separator = CountingSeparator()
    bad.run(separator)
    assert set(separator.queries.values()) == {2}
    assert contents(bad.stems()) == contents(good.stems())
    bad.check()


def test_a_retry_opens_a_closed_pass_if_there_is_something_to_retry(bad):
    closed = bad.out / "stems" / "manifest.json"
    closed.write_text("{}")
    assert bad.plan_retry() == 3 and not closed.exists()
    bad.repair("b", "e", "long")
    bad.run()
    closed.write_text("{}")
    assert bad.plan_retry() == 0 and closed.exists()


@pytest.mark.parametrize("max_shards", range(1, 6))
def test_files_that_appear_while_a_pass_is_interrupted_neither_double_a_clip_nor_lose_one(tmp_path, good, max_shards):
    """The files are cut into other clips than when the first shards of a task were made."""
    made = Pass(tmp_path, GOOD | {"a.wav": None, "c.wav": None, "long.wav": None, "g.wav": b"no audio"})
    config = replace(CONFIG, rows_per_task=5)
    made.run(config=config, max_shards=max_shards)
    made.repair("a", "c", "long", "g")
    made.run(config=config)
    made.check()
    assert made.run(config=config) == []
    made.plan_retry()
    made.run(config=config)
    made.check()
    assert contents(made.stems()) == contents(good.stems())


@pytest.mark.parametrize("max_shards", range(1, 6))
def test_files_that_disappear_while_a_pass_is_interrupted_fail_and_are_not_lost(tmp_path, good, max_shards):
    """Whether or not their task had started; when they are back, a retry makes only what is missing."""
    made = Pass(tmp_path, GOOD)
    config = replace(CONFIG, rows_per_task=5)
    made.run(config=config, max_shards=max_shards)
    names = ("a", "c", "long", "g", "h")
    made.write(**dict.fromkeys(names))
    made.run(config=config)
    made.check()
    paths = {row["path"] for row in (*made.stems(), *made.failures)}
    assert paths == GOOD.keys() and made.run(config=config) == []
    made.plan_retry()
    made.repair(*names)
    made.run(config=config)
    made.check()
    assert contents(made.stems()) == contents(good.stems())


@pytest.mark.parametrize("rows_per_task", [1, CONFIG.rows_per_task])
def test_a_pass_that_is_interrupted_again_and_again_ends_as_one_that_was_not(tmp_path, good, rows_per_task):
    """Every start stops after two shards, and plans a retry."""
    made = Pass(tmp_path, GOOD | {"b.wav": None, "f.wav": None, "long.wav": None})
    repaired = itertools.chain(("long", "f", "b"), itertools.repeat("b"))
    for _ in range(20):
        made.plan_retry(rows_per_task)
        if not made.run(max_shards=2) and made.failed == [("strange.wav", "whale")]:
            break
        made.check()
        made.repair(next(repaired))
    assert contents(made.stems()) == contents(good.stems())
    made.check()


@pytest.mark.parametrize("max_shards", [1, 2])
def test_a_long_recording_that_is_lost_half_way_is_completed_when_it_is_back(tmp_path, max_shards):
    """Twelve seconds in six clips, two of them in a shard; the recording fails as a whole if its file is lost."""
    long_T = mixture(12 * RATE_HZ, seed=40)
    complete, made = (Pass(tmp_path / name, {"long.wav": long_T}) for name in ("complete", "made"))
    assert len(complete.run()) == 3
    made.run(max_shards=max_shards)
    made.write(long=None)
    made.run()
    assert made.failed == [("long.wav", None)] and len(made.stems()) == 4 * max_shards
    made.plan_retry()
    made.write(long=long_T)
    separator = CountingSeparator()
    made.run(separator)
    assert sum(separator.queries.values()) == 12 - 4 * max_shards
    assert contents(made.stems()) == contents(complete.stems())
    assert made.failed == [] and made.check().num_clips == 6


def test_a_long_recording_that_is_lost_in_a_retry_too_is_completed_by_the_next(tmp_path):
    """Its clips are then in shards of two tasks, and one of them failed on its own."""
    long_T = mixture(12 * RATE_HZ, seed=40)
    hurt_T = long_T.copy()
    hurt_T[RATE_HZ // 2] = np.nan
    complete, made = (Pass(tmp_path / name, {"long.wav": long_T}) for name in ("complete", "made"))
    complete.run()
    made.write(long=hurt_T)
    made.run(max_shards=1)  # the first clip fails, the second has stems
    made.write(long=None)
    made.run()
    assert len(made.failed) == 2 and len(made.stems()) == 2
    made.plan_retry()
    made.write(long=long_T)
    made.run(max_shards=1)
    made.check()
    made.write(long=None)
    made.run()
    made.check()
    assert made.failed == [("long.wav", None)]
    made.plan_retry()
    made.write(long=long_T)
    separator = CountingSeparator()
    made.run(separator)
    assert set(separator.queries.values()) == {2}
    assert contents(made.stems()) == contents(complete.stems())
    assert made.failed == [] and made.check().num_clips == 6


def test_a_recording_that_grew_while_a_pass_was_interrupted_is_processed_to_its_end(tmp_path):
    """Its task then has more shards than it had recorded, and is interrupted again among these."""
    made = Pass(tmp_path, {name: SHORT[name] for name in ("a.wav", "b.wav", "c.wav", "d.wav")})
    last = made.rows[-1]["path"].removesuffix(".wav")
    made.run(max_shards=1)
    made.write(**{last: mixture(9 * RATE_HZ, seed=50)})
    assert len(made.run(max_shards=1)) == 1
    assert len(made.run()) == 2 and made.run() == []
    assert sum(row["path"] == f"{last}.wav" for row in made.stems()) == 2 * 5
    assert made.failed == [] and made.check().num_clips == 3 + 5
