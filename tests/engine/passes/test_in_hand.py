"""Workers that really die: the clip in hand fails alone with its reason, and all others have the stems they would have.

A forked process stands for a Ray worker, and starting it again for Ray's endless retries.
"""

import os
import signal
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import engine.passes.decode
import engine.passes.separate
import engine.passes.write
from engine.audio.decoder import Decoder
from engine.corpus.read import read_corpus
from engine.errors import WorkerDiedError
from engine.passes import run
from engine.passes.config import PassConfig
from engine.passes.decode import Decode
from engine.passes.records import shard_records
from engine.passes.separate import Separate, separate_clips
from engine.passes.tasks import Tasks
from engine.passes.transport import DecodedShard, pack
from engine.passes.write import SeparateAndWrite, Write
from engine.separators.batching import BatchedSeparator
from engine.storage.in_hand import MAX_DEATHS, InHand
from engine.storage.paths import location
from tests.support.signals import (
    MARKER,
    RATE_HZ,
    BandSeparator,
    BandTagger,
    decoded,
    marked,
    mixture,
    read_failures,
    write_clips,
)

pytest_plugins = ["tests.support.s3_server"]
CONFIG = PassConfig(reseparate=True, min_clip_s=0.05)
SHARD = "shard-000000-0000"
PATHS = [f"clip-{number}.wav" for number in range(6)]


def work(act):
    """Do something in a process of its own; returns its exit code."""
    pid = os.fork()
    if pid == 0:
        try:
            act()
            os._exit(0)
        except BaseException:  # noqa: BLE001 - the child must not go on as the test
            traceback.print_exc()
            os._exit(77)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def work_until_done(act, *, most=20):
    """As Ray does; returns the number of workers that died."""
    for deaths in range(most):
        code = work(act)
        assert code != 77, "the worker raised"
        if code == 0:
            return deaths
    raise AssertionError("it goes round for ever")


def shard_of(*marked_ones, num_clips=6):
    clips = []
    for number in range(num_clips):
        samples_T = mixture(800 + number, seed=number)
        clips.append(decoded(marked(samples_T) if number in marked_ones else samples_T, clip_id=f"clip-{number}"))
    counts = {"num_shards": 1, "num_clips": num_clips, "num_queries": 2 * num_clips, "audio_s": 1.0, "decode_s": 0.1}
    return DecodedShard(name=SHARD, clips=clips, failures=[], counts=counts)


def is_marked(audio_BT):
    return bool((audio_BT == np.float32(MARKER)).any())


class EndingSeparator(BandSeparator):
    def __init__(self, end):
        super().__init__()
        self.end = end

    def inspect(self, mix_BT):
        if is_marked(mix_BT):
            self.end()


class EndingTagger(BandTagger):
    def tag(self, audio_BT, *, lengths=None):
        if 803 in lengths:
            os._exit(9)
        return super().tag(audio_BT, lengths=lengths)


class LostGpu:
    """Fails at every call after the first error, as a CUDA context does."""

    def __init__(self):
        self.is_lost = False

    def __call__(self):
        self.is_lost = True
        raise RuntimeError("CUDA error: device-side assert triggered\nCUDA kernel errors might be reported later")


class LosingSeparator(EndingSeparator):
    def inspect(self, mix_BT):
        if self.end.is_lost:
            self.end()
        super().inspect(mix_BT)


def actor(out, hand, separator=None, tagger=None, config=CONFIG):
    write = Write(str(out), RATE_HZ, hand)
    return SeparateAndWrite(write, lambda _: separator or BandSeparator(), lambda _: tagger or BandTagger(), config)


def stems_of(out):
    return {(row["path"], row["label"]): row for row in pq.read_table(out / "stems" / f"{SHARD}.parquet").to_pylist()}


def assert_only(out, *paths):
    """The shard has stems of all clips but these, whose failures are counted."""
    (record,) = dict(shard_records(out)).values()
    assert record["num_queries"] == record["num_stems"] + record["num_failed"] == 2 * len(PATHS)
    assert {path for path, _ in stems_of(out)} == set(PATHS) - set(paths)
    return sorted(read_failures_of(out), key=lambda row: row["path"])


def read_failures_of(out):
    path = out / "failures" / f"{SHARD}.parquet"
    return pq.read_table(path).to_pylist() if path.is_file() else []


@pytest.mark.parametrize(
    ("make", "error_class", "cause"),
    [
        (lambda: EndingSeparator(lambda: os._exit(3)), "WorkerDied", "it crashed or was killed"),
        (lambda: EndingSeparator(lambda: os.kill(os.getpid(), signal.SIGKILL)), "WorkerDied", "lack of memory"),
        pytest.param(
            lambda: EndingSeparator(lambda: time.sleep(99)),
            "WorkerTimeout",
            "the separator took longer than 0.5 s",
            marks=pytest.mark.slow,
        ),
        (lambda: LosingSeparator(LostGpu()), "WorkerDied", "RuntimeError: CUDA error: device-side assert triggered)"),
    ],
    ids=["exit", "kill", "hang", "lost GPU"],
)
def test_a_clip_that_ends_its_worker_fails_alone(tmp_path, make, error_class, cause):
    shard, hand, out = pack(shard_of(2)), InHand(tmp_path / "in-hand"), tmp_path / "out"
    config = replace(CONFIG, separate_limit_s=0.5) if error_class == "WorkerTimeout" else CONFIG
    deaths = work_until_done(lambda: actor(out, hand, make(), config=config)(shard))
    assert deaths == 2 * MAX_DEATHS
    (row,) = assert_only(out, "clip-2.wav")
    assert (row["step"], row["error_class"], row["attempts"], row["label"]) == (
        "separate",
        error_class,
        MAX_DEATHS,
        None,
    )
    assert "'clip-2.wav'" in row["message"] and cause in row["message"] and "; remove or replace it" in row["message"]
    actor(tmp_path / "good", InHand())(pack(shard_of()))
    good = stems_of(tmp_path / "good")
    assert all(good[key]["audio_flac"] == row["audio_flac"] for key, row in stems_of(out).items())


def test_several_such_clips_in_one_shard(tmp_path):
    shard, hand = pack(shard_of(1, 4)), InHand(tmp_path / "in-hand")
    deaths = work_until_done(lambda: actor(tmp_path, hand, EndingSeparator(lambda: os._exit(3)))(shard))
    assert deaths == 3 * MAX_DEATHS
    rows = assert_only(tmp_path, "clip-1.wav", "clip-4.wav")
    assert [row["attempts"] for row in rows] == [MAX_DEATHS] * 2, "the deaths at one are not counted for the other"


def test_a_shard_before_it_in_the_same_task_is_made_once_and_not_blamed(tmp_path):
    """Ray repeats a task of several shards from its beginning."""
    hand, made = InHand(tmp_path / "in-hand"), tmp_path / "made"
    first = replace(shard_of(num_clips=2), name="shard-000007-0000")

    def both():
        separate = actor(tmp_path, hand, EndingSeparator(lambda: os._exit(3)))
        write = separate.write.write
        separate.write.write = lambda shard: made.open("a").write(f"{shard.name}\n") and write(shard)
        for shard in (first, shard_of(2)):
            separate(pack(shard))

    assert work_until_done(both) == 2 * MAX_DEATHS
    assert made.read_text().split() == [first.name, SHARD]
    records = dict(shard_records(tmp_path))
    assert (records[first.name]["num_failed"], records[SHARD]["num_failed"]) == (0, 2)
    assert not list((tmp_path / "in-hand").glob(f"*{first.name}*"))


def test_a_clip_that_ends_the_worker_of_the_tagger_fails_alone(tmp_path):
    shard, hand = pack(shard_of()), InHand(tmp_path / "in-hand")
    work_until_done(lambda: actor(tmp_path, hand, tagger=EndingTagger())(shard))
    (row,) = assert_only(tmp_path, "clip-3.wav")
    assert (row["error_class"], row["attempts"]) == ("WorkerDied", MAX_DEATHS)


def test_a_clip_that_ends_the_worker_of_scoring_fails_alone(tmp_path, monkeypatch):
    score = engine.passes.separate.score_together
    monkeypatch.setattr(
        engine.passes.separate,
        "score_together",
        lambda items, **given: os._exit(4) if PATHS[5] in paths(items) else score(items, **given),
    )
    shard, hand = pack(shard_of()), InHand(tmp_path / "in-hand")
    work_until_done(lambda: actor(tmp_path, hand)(shard))
    (row,) = assert_only(tmp_path, PATHS[5])
    assert (row["step"], row["error_class"]) == ("score", "WorkerDied")


def paths(items):
    return [item.clip.row["path"] for item in items]


def test_a_clip_that_ends_the_worker_of_writing_fails_alone(tmp_path, monkeypatch):
    """With a GPU, writing has a process of its own."""
    encode = Write._encode
    monkeypatch.setattr(
        Write, "_encode", lambda self, clip: os._exit(4) if clip.row["path"] == PATHS[5] else encode(self, clip)
    )
    shard = Separate(lambda _: BandSeparator(), None, CONFIG, on_gpu=True)(pack(shard_of()))
    work_until_done(lambda: Write(str(tmp_path), RATE_HZ, InHand(tmp_path / "in-hand"))(shard))
    (row,) = assert_only(tmp_path, PATHS[5])
    assert (row["step"], row["error_class"]) == ("score", "WorkerDied")


def test_clips_that_were_in_hand_by_accident_do_not_fail(tmp_path):
    """Workers that are killed from outside with a shard in hand, again and again."""
    shard, hand = pack(shard_of()), InHand(tmp_path / "in-hand")
    alive = []

    def killed(number):
        separator = EndingSeparator(None)
        separator.inspect = lambda _: alive.append(1) or (len(alive) == number and os._exit(1))
        actor(tmp_path, hand, separator)(shard)

    for number in (1, 1, 1, 1, 5, 9):
        assert work(lambda number=number: killed(number)) == 1
    actor(tmp_path, hand)(shard)
    assert assert_only(tmp_path) == []


def test_clips_do_not_fail_on_a_machine_whose_memory_others_keep_full(tmp_path, monkeypatch):
    """Ray's memory monitor then ends every worker, whatever it has in hand."""
    monkeypatch.setenv("RAY_memory_usage_threshold", "0.0001")
    shard, hand = pack(shard_of(0)), InHand(tmp_path / "in-hand")
    ends = [work(lambda: actor(tmp_path, hand, EndingSeparator(lambda: os._exit(3)))(shard)) for _ in range(6)]
    assert ends == [3] * 6
    with pytest.raises(MemoryError, match=r"cannot separate it \(the memory of the machine is full.*; end what else"):
        actor(tmp_path, hand)(shard)


def test_a_shard_that_no_clip_alone_explains_ends_the_pass(tmp_path, monkeypatch):
    monkeypatch.setattr(engine.passes.write, "write_shard", lambda *_, **__: os._exit(3))
    shard, hand = pack(shard_of(num_clips=1)), InHand(tmp_path / "in-hand")
    assert [work(lambda: actor(tmp_path, hand)(shard)) for _ in range(3 * MAX_DEATHS)] == [3] * 3 * MAX_DEATHS
    with pytest.raises(WorkerDiedError, match=f"separate-{SHARD}: cannot finish it .9 workers ended.*; give"):
        actor(tmp_path, hand)(shard)


def test_an_undisturbed_shard_costs_one_mark_and_has_the_same_bytes(tmp_path):
    hand = InHand(tmp_path / "in-hand")
    actor(tmp_path / "with", hand)(pack(shard_of()))
    actor(tmp_path / "without", InHand())(pack(shard_of()))
    assert [path.name for path in (tmp_path / "in-hand").iterdir()] == [f"separate-{SHARD}.0"]
    ones = [(tmp_path / name / "stems" / f"{SHARD}.parquet").read_bytes() for name in ("with", "without")]
    assert ones[0] == ones[1]


@pytest.mark.parametrize("way", ["decode", "probe"])
def test_a_file_that_ends_the_worker_of_decoding_fails_alone(tmp_path, monkeypatch, way):
    corpus = read_corpus(write_clips(tmp_path / "corpus", {path: mixture(800) for path in PATHS}))
    rows = corpus.clips.to_pylist()
    Tasks(tmp_path / "corpus").write_rows(rows, rows_per_task=len(rows))

    class EndingDecoder:
        cpu_s = time.process_time

        def __getattr__(self, name):
            def call(source, **_):
                if name == way and source.endswith("clip-2.wav"):
                    os._exit(5)
                return type("Info", (), {"duration_s": 0.1}) if name == "probe" else mixture(800)

            return call

    monkeypatch.setattr(engine.passes.decode, "shared_decoder", lambda _: EndingDecoder())
    hand, kept = InHand(tmp_path / "in-hand"), tmp_path / "kept"

    def act():
        decode = Decode(CONFIG, root=corpus.root, out=str(tmp_path), sample_rate_hz=RATE_HZ, hand=hand)
        (shard,) = decode.decode(task=0)
        (row,) = shard.failures
        paths = sorted(clip.row["path"] for clip in shard.clips)
        assert paths == sorted(set(PATHS) - {"clip-2.wav"}) and shard.counts["num_queries"] == 12
        kept.write_text(f"{row['path']} {row['step']} {row['error_class']} {row['attempts']}")

    assert work_until_done(act) == 2 * MAX_DEATHS
    assert kept.read_text() == f"clip-2.wav decode WorkerDied {MAX_DEATHS}"


@pytest.mark.parametrize("way", ["decode", "probe"])
def test_whatever_decoding_raises_costs_that_file_alone(tmp_path, monkeypatch, way):
    corpus = read_corpus(write_clips(tmp_path / "corpus", {path: mixture(800) for path in PATHS}))
    Tasks(tmp_path / "corpus").write_rows(corpus.clips.to_pylist(), rows_per_task=9)
    call = getattr(Decoder, way)

    def raising(self, source, **arguments):
        return {}["x"] if source.endswith("clip-2.wav") else call(self, source, **arguments)

    monkeypatch.setattr(Decoder, way, raising)
    (shard,) = Decode(CONFIG, root=corpus.root, out=str(tmp_path), sample_rate_hz=RATE_HZ).decode(task=0)
    assert [(row["path"], row["error_class"]) for row in shard.failures] == [("clip-2.wav", "KeyError")]
    assert len(shard.clips) == 5


def test_marks_of_another_start_do_not_count(tmp_path):
    assert [InHand(tmp_path / "one").begin("work") for _ in range(4)] == [0, 1, 2, 3]
    assert InHand(tmp_path / "two").begin("work") == 0
    hand = InHand(tmp_path / "one")
    hand.end("work", hand.begin("work"))
    assert list((tmp_path / "one").iterdir()) == [] and hand.begin("work") == 0


def test_marks_are_kept_in_s3_too(s3):
    folder = location(f"{s3.root}/in-hand")
    assert [InHand(folder).begin("work") for _ in range(4)] == [0, 1, 2, 3]
    hand = InHand(location(f"{s3.root}/other"))
    hand.begin("work")
    parts = [part.positions for part in hand.parts("separate", [("a", "a.wav"), ("b", "b.wav")])]
    assert parts == [range(2)]
    hand = InHand(folder)
    assert hand.begin("work") == 4
    parts = [part.positions for part in hand.parts("separate", [("a", "a.wav"), ("b", "b.wav")])]
    assert parts == [[0], [1]], "one by one, and their marks are gone"
    assert [part.error for part in hand.parts("separate", [("a", "a.wav"), ("b", "b.wav")])] == [None, None]


class Raising(BandSeparator):
    """Raises, or returns something wrong, where the marked clip is in the batch."""

    def __init__(self, outcome):
        super().__init__()
        self.outcome = outcome

    def separate(self, mix_BT, queries, *, lengths=None):
        stems_BT = super().separate(mix_BT, queries, lengths=lengths)
        if not is_marked(mix_BT):
            return stems_BT
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome(stems_BT)


@pytest.mark.parametrize(
    ("outcome", "error_class", "message"),
    [
        (TypeError("no"), "TypeError", "no"),
        (KeyError("x"), "KeyError", "'x'"),
        (IndexError("out of range"), "IndexError", "out of range"),
        (AssertionError(), "AssertionError", "AssertionError()"),
        (FileNotFoundError(2, "gone"), "FileNotFoundError", "gone"),
        (NotImplementedError("later"), "NotImplementedError", "later"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), "UnicodeDecodeError", "bad"),
        (OSError("name \udcff"), "OSError", r"name \udcff"),
        (SystemExit(3), "RuntimeError", "SystemExit: 3"),
        (RuntimeError("CUDA error: out of memory"), "RuntimeError", "out of memory"),
        (lambda stems_BT: stems_BT[:, :-1], "ValueError", "stems of a separator must have shape"),
        (lambda stems_BT: stems_BT[None], "ValueError", "stems of a separator must have shape"),
        (lambda stems_BT: stems_BT[:0], "ValueError", "stems of a separator must have shape"),
        (lambda stems_BT: torch.full_like(stems_BT, torch.nan), "ValueError", "a stem must be finite"),
        (lambda stems_BT: torch.full_like(stems_BT, torch.inf), "ValueError", "a stem must be finite"),
        (lambda stems_BT: (32767 * stems_BT).short(), "TypeError", "got torch.int16"),
        (lambda stems_BT: stems_BT.cfloat(), "TypeError", "got torch.complex64"),
        (lambda stems_BT: stems_BT.numpy(), "TypeError", "got ndarray"),
        (lambda stems_BT: None, "TypeError", "got NoneType"),
        (lambda stems_BT: [stems_BT], "TypeError", "got list"),
        (lambda stems_BT: stems_BT.to("meta"), "NotImplementedError", "meta"),
    ],
)
@pytest.mark.parametrize("batch_s", [0.1, 100.0])
def test_whatever_a_separator_raises_or_returns_costs_that_clip_alone(tmp_path, outcome, error_class, message, batch_s):
    actor(tmp_path, InHand(), Raising(outcome), config=replace(CONFIG, batch_s=batch_s))(pack(shard_of(2)))
    rows = assert_only(tmp_path, "clip-2.wav")
    assert [row["label"] for row in rows] == ["low", "high"]
    assert {(row["step"], row["error_class"]) for row in rows} == {("separate", error_class)}
    assert all(message in row["message"] for row in rows)


@pytest.mark.parametrize("convert", [torch.Tensor.double, torch.Tensor.half, lambda x: x.requires_grad_()])
def test_stems_of_another_float_type_are_stems(convert):
    separated, failures = separate_clips(shard_of(2).clips, BatchedSeparator(separator=Raising(convert), batch_s=100.0))
    assert len(separated) == 6 and failures == []
    assert all(item.stems_ST.dtype == torch.float32 for item in separated)


def test_an_interrupt_inside_a_separator_is_an_interrupt(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        actor(tmp_path, InHand(), Raising(KeyboardInterrupt()))(pack(shard_of(2)))


def test_a_label_that_the_separator_does_not_list_is_not_unknown_because_it_cannot_separate_nothing():
    class Asked(BandSeparator):
        def separate(self, mix_BT, queries, *, lengths=None):
            if not mix_BT.numel():
                raise IndexError("cannot separate nothing")
            return 0.5 * mix_BT

    clip = decoded(mixture(800), ("low", "whale"), clip_id="a")
    (item,), failures = separate_clips([clip], BatchedSeparator(separator=Asked(), batch_s=9.0))
    assert item.labels == ["low", "whale"] and failures == []


class RaisingTagger(BandTagger):
    def __init__(self, outcome):
        super().__init__()
        self.outcome = outcome

    def tag(self, audio_BT, *, lengths=None):
        tags_BL = super().tag(audio_BT, lengths=lengths)
        if 803 not in lengths:
            return tags_BL
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome(tags_BL)


@pytest.mark.parametrize(
    "outcome",
    [KeyError("x"), OSError("gone"), SystemExit(2), lambda _: None, lambda x: x[:, :1], lambda x: x * torch.nan],
)
def test_whatever_a_tagger_raises_or_returns_costs_that_clip_alone(tmp_path, outcome):
    actor(tmp_path, InHand(), tagger=RaisingTagger(outcome))(pack(shard_of()))
    (row,) = assert_only(tmp_path, "clip-3.wav")
    assert (row["step"], row["label"], row["num_queries"]) == ("score", None, 2)
    assert all(row["tagger_margin_db"] is not None for row in stems_of(tmp_path).values())


def test_whatever_scoring_raises_costs_that_clip_alone(tmp_path, monkeypatch):
    encode = Write._encode

    def raising(self, clip):
        return {}["x"] if clip.row["path"] == PATHS[1] else encode(self, clip)

    monkeypatch.setattr(Write, "_encode", raising)
    actor(tmp_path, InHand())(pack(shard_of()))
    (row,) = assert_only(tmp_path, PATHS[1])
    assert (row["step"], row["error_class"]) == ("score", "KeyError")


class Progress:
    clips_done = 0


@pytest.mark.parametrize(("deaths", "progress", "ends"), [(9, 0, True), (0, 0, False), (9, 1, False)])
def test_a_pass_whose_workers_end_for_memory_without_progress_ends(monkeypatch, deaths, progress, ends):
    count, ended = Progress(), iter(range(0, 10**9, deaths or 10**9) if deaths else [])
    monkeypatch.setattr(run, "_STALL_S", 0.24)
    monkeypatch.setattr(run, "_STALL_DEATHS", 20)
    monkeypatch.setattr(run, "num_ended_for_memory", lambda: next(ended, 0))
    is_over = False
    try:
        with run._memory_watched(count):
            for _ in range(80):
                time.sleep(0.01)
                count.clips_done += progress
    except run._MemoryFullError:
        is_over = True
    assert is_over == ends


def test_failures_of_a_dead_worker_can_be_read_back(tmp_path):
    actor(tmp_path, InHand(), Raising(OSError("name \udcff")))(pack(shard_of(2)))
    assert [row["message"] for row in read_failures(tmp_path).to_pylist()] == [r"name \udcff"] * 2


def shards_of(*marked_ones):
    """Three shards of two clips; the first clips of some are marked."""
    for number in range(3):
        shard = shard_of(*([0] if number in marked_ones else []), num_clips=2)
        yield replace(shard, name=f"shard-000000-{number:04d}", counts=shard.counts | {"num_shards": 3})


def test_a_clip_that_ends_a_worker_with_several_shards_in_hand_fails_alone(tmp_path):
    """Three threads have a shard each, as in an actor with a GPU; Ray repeats those that are not done."""
    shards = {shard.name: pack(shard) for shard in shards_of(1)}
    hand = InHand(tmp_path / "in-hand")

    def end():
        time.sleep(0.2)  # the other threads have begun too
        os._exit(3)

    def act():
        done, one = dict(shard_records(tmp_path)), actor(tmp_path, hand, EndingSeparator(end))
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(one, [shard for name, shard in shards.items() if name not in done]))

    deaths = work_until_done(act)
    assert deaths == 2 * MAX_DEATHS, "no more than if it had been alone"
    records = dict(shard_records(tmp_path))
    assert {name: record["num_failed"] for name, record in records.items()} == dict(zip(shards, (0, 2, 0), strict=True))
    (row,) = pq.read_table(tmp_path / "failures" / "shard-000000-0001.parquet").to_pylist()
    assert (row["path"], row["error_class"], row["attempts"]) == ("clip-0.wav", "WorkerDied", MAX_DEATHS)
    assert {len(list((tmp_path / "in-hand").glob(f"separate-{name}.[0-9]"))) for name in (*shards,)[::2]} <= {1, 2}


def test_a_thread_whose_work_has_ended_a_worker_waits_until_it_is_alone(tmp_path):
    InHand(tmp_path).begin("deadly")
    hand, log = InHand(tmp_path), []

    def act(name, wait_s):
        with hand.work(name, 1):
            log.append(f"{name} begins")
            time.sleep(wait_s)
            log.append(f"{name} ends")

    threads = [threading.Thread(target=act, args=args) for args in (("a", 0.2), ("deadly", 0.1), ("b", 0.0))]
    for thread in threads:
        thread.start()
        time.sleep(0.05)
    for thread in threads:
        thread.join()
    assert log == [f"{name} {what}" for name in ("a", "deadly", "b") for what in ("begins", "ends")]


@pytest.mark.parametrize("slow", [0, 1])
def test_each_thread_has_a_time_limit_of_its_own(tmp_path, slow):
    def act():
        hand = InHand(tmp_path / "in-hand")

        def limited(number):
            hand.begin(f"work-{number}")
            with hand.limit(0.4, f"thread {number}"):
                time.sleep(9.0 if number == slow else 0.1)

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(limited, range(2)))

    assert work(act) == 1
    assert [path.name for path in (tmp_path / "in-hand").glob("*.cause")] == [f"work-{slow}.cause"]
    assert f"thread {slow} took longer than 0.4 s" in (tmp_path / "in-hand" / f"work-{slow}.cause").read_text()
