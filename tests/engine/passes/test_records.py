"""The account of a pass: what failed and why, second tries of it, and sums that hold whatever happens in between."""

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
    done_parts,
    last_round,
    plan_retry,
    retry_rows,
    retry_tasks,
    sums,
    waiting_rows,
    write_done,
)
from engine.passes.shards import read_failures, write_part
from tests.support.signals import MARKER, RATE_HZ, BandSeparator, marked, mixture, run_stages, write_clips

CONFIG = PassConfig(clip_s=2.0, min_clip_s=0.5, part_s=4.0, batch_s=8.0, rows_per_task=4)
SHORT = {f"{name}.wav": mixture(RATE_HZ, seed=number) for number, name in enumerate("abcdefgh")}
LONG_T = mixture(5 * RATE_HZ, seed=20)
HURT_T = np.concatenate([LONG_T[: 3 * RATE_HZ], np.full(100, np.nan, np.float32), LONG_T[3 * RATE_HZ + 100 :]])
GOOD = {**SHORT, "long.wav": LONG_T, "strange.wav": mixture(RATE_HZ, seed=30)}
BAD = {"b.wav": None, "e.wav": b"RIFF, but nothing that follows is a WAV file", "long.wav": HURT_T}
LABELS = {"strange.wav": ("low", "whale", "high")}


class CountingSeparator(BandSeparator):
    """Keeps how often it was asked for a stem of each clip, by the clip's samples."""

    def __init__(self):
        super().__init__()
        self.asked = Counter()

    def _band(self, mix_T, label):
        self.asked[mix_T.numpy().tobytes()] += 1
        return super()._band(mix_T, label)


class ForgetfulSeparator(BandSeparator):
    """Has no memory for the marked clip."""

    def inspect(self, mix_BT):
        if bool((mix_BT == np.float32(MARKER)).any()):
            raise torch.OutOfMemoryError("the marked clip does not fit")


class Pass:
    """A corpus of real files and the stages over it, started as often as a test likes."""

    def __init__(self, folder, files):
        self.folder, self.out = folder / "corpus", folder / "out"
        self.corpus = read_corpus(write_clips(self.folder, files, labels=LABELS))
        self.rows = self.corpus.clips.sort_by("clip_id").to_pylist()

    def run(self, separator=None, **changes):
        """Returns the parts that were written."""
        separator = separator or BandSeparator()
        given = {"config": CONFIG, "open_separator": lambda device: separator, **changes}
        return run_stages(self.rows, self.corpus.root, self.out, **given)

    def put(self, **files):
        """Write files (``a`` for ``a.wav``) as they are in ``GOOD``, or as given."""
        for name, samples_T in files.items():
            path = self.folder / f"{name}.wav"
            path.unlink(missing_ok=True)
            if samples_T is not None:
                soundfile.write(path, samples_T, RATE_HZ, subtype="FLOAT")

    @property
    def failures(self):
        return read_failures(self.out).to_pylist()

    @property
    def failed(self):
        """Path, label and beginning in seconds of what failed, sorted."""
        return sorted((row["path"], row["label"]) for row in self.failures)

    def stems(self):
        """What the pass made, as if nothing mattered but what it is of and what it holds."""
        shards = [self.out / "stems" / f"{part}.parquet" for part in done_parts(self.out)]
        return [row for shard in shards for row in pq.read_table(shard).to_pylist()]

    def check(self):
        """Nothing is there twice, and the sums over the records are of what is there."""
        stems, failures, total = self.stems(), self.failures, sums(self.out)[0]
        pairs = [(row["clip_id"], row["label"]) for row in stems]
        pairs += [(row["clip_id"], row["label"]) for row in failures]
        assert len(set(pairs)) == len(pairs)
        whole = {row["clip_id"] for row in failures if row["label"] is None}
        separated = {row["clip_id"] for row in stems}
        assert not whole & separated
        assert total["num_stems"] == len(stems)
        assert total["num_failed"] == sum(row["num_queries"] for row in failures)
        assert total["num_queries"] == total["num_stems"] + total["num_failed"]
        assert total["num_clips"] == len(separated | {row["clip_id"] for row in failures})
        return total


def contents(stems):
    """Stems as a set that two passes have in common where they made the same of the same clips."""
    assert len({(row["clip_id"], row["label"]) for row in stems}) == len(stems)
    names = [name for name in stems[0] if name not in ("labels", "mixture_exponent")]
    return {tuple(row[name] for name in names) for row in stems}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A pass over files of which none is bad."""
    made = Pass(tmp_path_factory.mktemp("good"), GOOD)
    made.run()
    return made


@pytest.fixture
def bad(tmp_path):
    """A pass over the same files, of which one is missing, one is no audio and one has a hole in the middle."""
    made = Pass(tmp_path, GOOD | BAD)
    made.run()
    return made


def test_a_part_counts_only_with_its_record(tmp_path):
    record = write_part(tmp_path, "part-000000-0000", stems=[], failures=[])
    assert done_parts(tmp_path) == {}
    write_done(tmp_path, "part-000000-0000", record)
    assert done_parts(tmp_path) == {"part-000000-0000": record}
    assert (record["num_stems"], record["num_failed"]) == (0, 0)


def test_failures_of_all_parts_are_read_together(tmp_path):
    assert len(read_failures(tmp_path)) == 0
    row = {
        "path": "a.wav",
        "label": None,
        "num_queries": 2,
        "step": "decode",
        "error_class": "E",
        "message": "m",
        "attempts": 1,
    }
    for number in (0, 1):
        part = f"part-{number:06d}-0000"
        record = write_part(tmp_path, part, stems=[], failures=[{"clip_id": f"clip-{number}", **row}])
        assert len(read_failures(tmp_path)) == number  # what is not recorded as done will be done again
        write_done(tmp_path, part, record)
    assert read_failures(tmp_path)["clip_id"].to_pylist() == ["clip-0", "clip-1"]


def test_failures_say_how_often_was_tried(tmp_path, monkeypatch):
    """What does not pass by itself is tried once; what may pass, such as memory, several times."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    files = {"a.wav": SHORT["a.wav"], "full.wav": marked(SHORT["b.wav"]), "gone.wav": None}
    made = Pass(tmp_path, files)
    made.run(ForgetfulSeparator())
    rows = {row["path"]: row for row in made.failures}
    assert rows.keys() == {"full.wav", "gone.wav"}
    assert rows["gone.wav"]["attempts"] == 1 and rows["full.wav"]["attempts"] > 1
    assert rows["full.wav"]["label"] is None and rows["full.wav"]["error_class"] == "OutOfMemoryError"
    made.check()


def test_a_round_is_of_the_clips_that_failed_as_a_whole(bad):
    assert bad.failed == [("b.wav", None), ("e.wav", None), ("long.wav", None), ("strange.wav", "whale")]
    assert (plan_retry(bad.out), last_round(bad.out)) == (3, 1)
    rows = [row for group in range(len(retry_tasks(bad.out, 1))) for row in retry_rows(bad.out, 1, group)]
    assert sorted(row["path"] for row in rows) == ["b.wav", "e.wav", "long.wav"]
    assert retry_tasks(bad.out, 1) == sorted({row["task"] for row in rows})
    assert sorted(row["clip_id"] for row in waiting_rows(bad.out)) == sorted(row["clip_id"] for row in rows)


def test_rows_of_the_manifest_that_are_no_clips_and_labels_that_fail_are_not_tried_again(tmp_path):
    from engine.corpus.table import write_failures

    made = Pass(tmp_path, {"a.wav": SHORT["a.wav"], "strange.wav": SHORT["b.wav"]})
    manifest = made.folder / "manifest.csv"
    manifest.write_text(manifest.read_text() + ",low\na.wav,low; high\n")
    corpus = read_corpus(manifest)
    made.run()
    write_failures(made.out / "failures" / "manifest.parquet", corpus.failure_tables())
    assert made.failed == [("", None), ("a.wav", None), ("strange.wav", "whale")]
    assert plan_retry(made.out) == 0 and last_round(made.out) == 0


def test_what_was_mended_is_separated_once_and_the_account_is_that_of_a_pass_over_good_files(bad, good):
    """Only the three clips are asked for, of the long recording only the piece in which the hole was."""
    plan_retry(bad.out)
    bad.put(**{name: GOOD[f"{name}.wav"] for name in ("b", "e", "long")})
    untouched = {path: path.stat().st_mtime_ns for path in (bad.out / "stems").iterdir()}
    separator = CountingSeparator()
    written = bad.run(separator)
    assert separator.asked == {
        SHORT["b.wav"].tobytes(): 2,
        SHORT["e.wav"].tobytes(): 2,
        LONG_T[2 * RATE_HZ : 4 * RATE_HZ].tobytes(): 2,
    }
    assert all("-r1-" in part for part in written)
    assert {path: path.stat().st_mtime_ns for path in untouched} == untouched
    assert bad.failed == [("strange.wav", "whale")]
    assert contents(bad.stems()) == contents(good.stems())
    again, plain = bad.check(), good.check()
    names = ("num_clips", "num_queries", "num_stems", "num_failed")
    assert {name: again[name] for name in names} == {name: plain[name] for name in names}
    assert again["audio_s"] == pytest.approx(plain["audio_s"])
    assert bad.run() == [] and list(waiting_rows(bad.out)) == []
    assert plan_retry(bad.out) == 0 and last_round(bad.out) == 1


def test_what_fails_again_is_listed_once_and_tried_in_another_round(bad, good):
    plan_retry(bad.out)
    bad.put(b=GOOD["b.wav"])
    bad.run()
    assert bad.failed == [("e.wav", None), ("long.wav", None), ("strange.wav", "whale")]
    bad.check()
    assert (plan_retry(bad.out), last_round(bad.out)) == (2, 2)
    bad.put(e=GOOD["e.wav"], long=LONG_T)
    separator = CountingSeparator()
    assert all("-r2-" in part for part in bad.run(separator))
    assert sum(separator.asked.values()) == 4 and SHORT["b.wav"].tobytes() not in separator.asked
    assert contents(bad.stems()) == contents(good.stems())
    bad.check()


def test_a_file_of_another_length_has_its_clips_in_the_account_still(bad):
    """The piece from 2 s to 4 s is not there any more in a recording of 3 s."""
    before = bad.check()
    plan_retry(bad.out)
    bad.put(long=LONG_T[: 3 * RATE_HZ])
    bad.run()
    (row,) = (row for row in bad.failures if row["path"] == "long.wav")
    assert "another length by now" in row["message"] and row["num_queries"] == 2
    after = bad.check()
    assert {name: after[name] for name in ("num_clips", "num_queries", "num_failed")} == {
        name: before[name] for name in ("num_clips", "num_queries", "num_failed")
    }


def test_a_piece_whose_recording_is_gone_by_now_fails_once_and_as_that_piece(bad):
    before = bad.check()
    piece = next(row for row in bad.failures if row["path"] == "long.wav")
    plan_retry(bad.out)
    bad.put(long=None)
    bad.run()
    (row,) = (row for row in bad.failures if row["path"] == "long.wav")
    assert row["clip_id"] == piece["clip_id"] and "cannot be opened" in row["message"]
    assert bad.check()["num_queries"] == before["num_queries"]


def test_a_long_recording_that_was_missing_is_separated_in_all_its_pieces(tmp_path, good):
    made = Pass(tmp_path, GOOD | {"long.wav": None, "a.wav": None})
    made.run()
    assert [row["num_queries"] for row in made.failures if row["path"] == "long.wav"] == [2]
    plan_retry(made.out)
    made.put(long=LONG_T, a=GOOD["a.wav"])
    made.run()
    assert contents(made.stems()) == contents(good.stems())
    made.check()


@pytest.mark.parametrize("number", [0, -1])
def test_a_round_that_was_broken_off_goes_on(bad, good, number):
    """As after a kill between the shard and its record: the failures that it stands in for are failures until then."""
    plan_retry(bad.out)
    bad.put(**{name: GOOD[f"{name}.wav"] for name in ("b", "e", "long")})
    written = bad.run()
    whole = {part: record["sha256"] for part, record in done_parts(bad.out).items()}
    (bad.out / "stems" / f"{written[number]}.done.json").unlink()
    num_waiting = len(bad.failed) - 1
    assert num_waiting == len(list(waiting_rows(bad.out))) > 0
    bad.check()
    assert bad.run() == [written[number]]
    assert {part: record["sha256"] for part, record in done_parts(bad.out).items()} == whole
    assert contents(bad.stems()) == contents(good.stems())
    bad.check()


@pytest.mark.parametrize("most_parts", [0, 1])
def test_a_round_that_was_broken_off_and_is_asked_for_again_tries_no_clip_twice(bad, good, most_parts):
    """The command that is started again says --retry-failed again."""
    plan_retry(bad.out)
    bad.put(**{name: GOOD[f"{name}.wav"] for name in ("b", "e", "long")})
    bad.run(most_parts=most_parts)
    assert plan_retry(bad.out) == 0 and last_round(bad.out) == 1
    separator = CountingSeparator()
    bad.run(separator)
    assert set(separator.asked.values()) == {2}
    assert contents(bad.stems()) == contents(good.stems())
    bad.check()


def test_a_closed_pass_is_open_again_when_there_is_something_to_try(bad):
    closed = bad.out / "stems" / "manifest.json"
    closed.write_text("{}")
    assert plan_retry(bad.out) == 3 and not closed.exists()
    bad.put(**{name: GOOD[f"{name}.wav"] for name in ("b", "e", "long")})
    bad.run()
    closed.write_text("{}")
    assert plan_retry(bad.out) == 0 and closed.exists()


@pytest.mark.parametrize("most_parts", range(1, 6))
def test_files_that_come_while_a_pass_is_broken_off_neither_double_a_clip_nor_lose_one(tmp_path, good, most_parts):
    """What is cut of the files is not what it was when the first parts of a task were made."""
    made = Pass(tmp_path, GOOD | {"a.wav": None, "c.wav": None, "long.wav": None, "g.wav": b"no audio"})
    config = replace(CONFIG, rows_per_task=5)
    made.run(config=config, most_parts=most_parts)
    made.put(**{name: GOOD[f"{name}.wav"] for name in ("a", "c", "long", "g")})
    made.run(config=config)
    made.check()
    assert made.run(config=config) == []
    plan_retry(made.out)
    made.run(config=config)
    made.check()
    assert contents(made.stems()) == contents(good.stems())


@pytest.mark.parametrize("most_parts", range(1, 6))
def test_files_that_go_while_a_pass_is_broken_off_fail_and_are_not_lost(tmp_path, good, most_parts):
    """Whether or not their task had begun; when they are there again, another try makes what was missing alone."""
    made = Pass(tmp_path, GOOD)
    config = replace(CONFIG, rows_per_task=5)
    made.run(config=config, most_parts=most_parts)
    names = ("a", "c", "long", "g", "h")
    made.put(**dict.fromkeys(names))
    made.run(config=config)
    made.check()
    paths = {row["path"] for row in (*made.stems(), *made.failures)}
    assert paths == GOOD.keys() and made.run(config=config) == []
    plan_retry(made.out)
    made.put(**{name: GOOD[f"{name}.wav"] for name in names})
    made.run(config=config)
    made.check()
    assert contents(made.stems()) == contents(good.stems())


def test_a_pass_that_is_disturbed_again_and_again_ends_as_one_that_was_not(tmp_path, good):
    """Every start breaks off after two parts, and a round is asked for at each."""
    made = Pass(tmp_path, GOOD | {"b.wav": None, "f.wav": None, "long.wav": None})
    mended = itertools.chain(("long", "f", "b"), itertools.repeat("b"))
    for _ in range(20):
        plan_retry(made.out)
        if not made.run(most_parts=2) and made.failed == [("strange.wav", "whale")]:
            break
        made.check()
        name = next(mended)
        made.put(**{name: GOOD[f"{name}.wav"]})
    assert contents(made.stems()) == contents(good.stems())
    made.check()


@pytest.mark.parametrize("most_parts", [1, 2])
def test_a_long_recording_that_goes_in_the_middle_of_its_pieces_comes_back_in_the_rest_of_them(tmp_path, most_parts):
    """Twelve seconds in six pieces, two of them a part; it fails as a whole where its file cannot be read."""
    long_T = mixture(12 * RATE_HZ, seed=40)
    whole, made = (Pass(tmp_path / name, {"long.wav": long_T}) for name in ("whole", "made"))
    assert len(whole.run()) == 3
    made.run(most_parts=most_parts)
    made.put(long=None)
    made.run()
    assert made.failed == [("long.wav", None)] and len(made.stems()) == 4 * most_parts
    plan_retry(made.out)
    made.put(long=long_T)
    separator = CountingSeparator()
    made.run(separator)
    assert sum(separator.asked.values()) == 12 - 4 * most_parts
    assert contents(made.stems()) == contents(whole.stems())
    assert made.failed == [] and made.check()["num_clips"] == 6


def test_a_recording_that_grew_while_a_pass_was_broken_off_is_done_to_its_end(tmp_path):
    """Its task then has more parts than was thought at first, and is broken off again among those."""
    made = Pass(tmp_path, {name: SHORT[name] for name in ("a.wav", "b.wav", "c.wav", "d.wav")})
    last = made.rows[-1]["path"].removesuffix(".wav")
    made.run(most_parts=1)
    made.put(**{last: mixture(9 * RATE_HZ, seed=50)})
    assert len(made.run(most_parts=1)) == 1
    assert len(made.run()) == 2 and made.run() == []
    assert sum(row["path"] == f"{last}.wav" for row in made.stems()) == 2 * 5
    assert made.failed == [] and made.check()["num_clips"] == 3 + 5
