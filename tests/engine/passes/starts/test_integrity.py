"""A pass closes only when all of its plan is there, and files whose bytes are not those recorded are noticed."""

import dataclasses
import functools
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.corpus.read import read_corpus
from engine.errors import DamagedError
from engine.passes import run, shards
from engine.passes.config import PassConfig
from engine.passes.records import failure_rows, read_totals, shard_records, write_record
from engine.passes.shards import damaged_files, read_audio, read_clip, read_columns, stem_shards, write_shard
from engine.passes.tasks import Tasks
from engine.schema import STEMS, failure
from engine.selection.thresholds import Thresholds
from engine.selection.tracks import read_tracks, select_tracks
from engine.storage.files import write_json
from engine.storage.fingerprints import read_sealed, write_sealed
from engine.storage.paths import location
from tests.support.signals import RATE_HZ, mixture, open_bands, write_clips
from tests.support.this_process import InThisProcess, contents
from train.data.config import MixConfig
from train.data.items import pair_items, track_items
from train.data.pools import Pool

pytest_plugins = ["tests.support.s3_server"]

CONFIG = PassConfig(clip_s=2.0, min_clip_s=0.5, shard_s=4.0, batch_s=8.0, rows_per_task=4)
FILES = {f"{name}.wav": mixture(RATE_HZ, seed=number) for number, name in enumerate("abcdefgh")}
FILES |= {"long.wav": mixture(5 * RATE_HZ, seed=20), "gone.wav": None, "broken.wav": b"RIFF, but no WAV file"}


@pytest.fixture
def stream(monkeypatch):
    return InThisProcess(monkeypatch)


@pytest.fixture
def start(tmp_path, stream):
    """Starts the same pass again and again; returns its summary."""
    corpus = read_corpus(write_clips(tmp_path / "corpus", FILES))

    def started(**more):
        return run.run_pass(corpus, tmp_path / "out", separator=open_bands, config=CONFIG, **more)

    return started


def counts(summary):
    return {key: summary[key] for key in ("num_clips", "num_queries", "num_stems", "num_failed", "fingerprint")}


def flip(path, at=0.5, bit=1):
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= bit
    path.write_bytes(data)


# ---- closing


@pytest.mark.parametrize(
    "lost",
    [
        ["stems/shard-000000-0000.done.json"],
        ["stems/shard-000000-0000.parquet", "stems/shard-000001-0001.parquet"],
        ["stems/shard-000000-0000.*", "stems/shard-000000-0001.*", "stems/shard-000001-0000.*"],
        ["failures/*"],
        ["stems/shard-*"],
    ],
    ids=str,
)
def test_shards_that_are_removed_while_a_pass_runs_are_made_again(start, stream, tmp_path, lost):
    undisturbed, out = start(), tmp_path / "out"
    before = contents(out)
    for name in ("stems", "failures", "corpus"):
        for path in (out / name).iterdir():
            path.unlink()

    def remove(turn):
        for path in [path for pattern in lost for path in out.glob(pattern)] if turn == 2 else ():
            path.unlink()

    stream.after = remove
    assert counts(start()) == counts(undisturbed)
    assert len(stream.turns) == 3 and stream.turns[1] == [0, 1, 2]
    assert contents(out) == before


@pytest.mark.parametrize("hidden", [2, 1000])
def test_a_listing_that_lags_behind_loses_nothing(start, stream, tmp_path, monkeypatch, hidden):
    """As an object store lists late: the newest records are not listed, but there; nor are tables of tasks."""
    glob = Path.glob

    def lagging(folder, pattern):
        found = sorted(glob(folder, pattern))
        return found[:-hidden] if folder.name in ("stems", "failures", "corpus") else found

    monkeypatch.setattr(Path, "glob", lagging)
    lagged = start()
    assert stream.turns == [[0, 1, 2]]
    assert len(list(failure_rows(tmp_path / "out"))) == 2
    assert start(retry_failed=True)["num_failed"] == 4 and stream.turns[1:] == [[3]]
    monkeypatch.undo()
    stems = tmp_path / "out" / "stems"
    assert stem_shards(stems) == sorted(stems.glob("shard-*.parquet"))
    assert lagged["num_clips"] == 8 + 3 + 2 and lagged["num_queries"] == 26


def test_a_pass_of_which_a_task_never_comes_ends_in_words(start, stream, tmp_path):
    stream.skip = {1}
    with pytest.raises(RuntimeError, match=r"cannot close the pass in .*out \(shards or clips of 1 tasks are missing"):
        start()
    assert stream.turns == [[0, 1, 2], [1], [1]]
    assert not (tmp_path / "out" / "stems" / "manifest.json").exists()
    stream.skip = set()
    assert start()["num_clips"] == 13 and stream.turns[3:] == [[1]]


def test_a_step_that_loses_a_clip_is_noticed(start, stream):
    stream.decoded = lambda shard: dataclasses.replace(shard, clips=shard.clips[1:])
    with pytest.raises(RuntimeError, match=r"cannot record shard-000000-0000 \(. stems and . failed queries are not"):
        start()


def test_a_task_with_fewer_clips_than_rows_is_noticed(start, stream):
    """All shards are there and each adds up, but rows of the table of tasks are in none of them."""

    def lose(shard):
        num_queries = sum(row["num_queries"] for row in shard.failures)
        lost = shard.counts | {"num_clips": len(shard.failures), "num_queries": num_queries}
        return dataclasses.replace(shard, clips=[], counts=lost)

    stream.decoded = lambda shard: lose(shard) if shard.name == "shard-000001-0000" else shard
    with pytest.raises(RuntimeError, match="shards or clips of 1 tasks are missing, the first is 1"):
        start()


def test_tasks_that_are_not_the_corpus_are_noticed(start, stream, monkeypatch):
    rows = Tasks.write_rows
    monkeypatch.setattr(Tasks, "write_rows", lambda tasks, some, **more: rows(tasks, list(some)[:-1], **more))
    monkeypatch.setattr(run.Tasks, "num_rows", lambda tasks: iter({0: 4, 1: 4, 2: 1}.items()))
    with pytest.raises(RuntimeError, match="the tasks have 10 of the corpus' 11 clips"):
        start()


# ---- checksums


@pytest.mark.parametrize(
    "name",
    [
        "stems/shard-000000-0000.parquet",
        "stems/shard-000001-0001.parquet",
        "stems/shard-000000-0000.done.json",
        "failures/shard-*.parquet",
        "corpus/tasks-000000.parquet",
        "corpus/tasks.json",
        "corpus/retry-*.parquet",
        "stems/manifest.json",
    ],
)
@pytest.mark.parametrize("damage", ["middle", "end", "cut", "gone"])
def test_a_pass_that_is_started_again_makes_damaged_files_again(start, stream, tmp_path, name, damage):
    """A closed one too; its bytes are then those from before."""
    out = tmp_path / "out"
    start()
    before_retry = start(retry_failed=True)
    before = contents(out)
    path = sorted(out.glob(name))[0]
    if damage == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif damage == "gone":
        path.unlink()
    else:
        flip(path, {"middle": 0.5, "end": 0.99}[damage])
    after = start(retry_failed="retry" in name)
    assert counts(after) == counts(before_retry)
    assert contents(out) == before
    assert damaged_files(out) == [] and read_totals(out).num_queries == 26


def test_a_pass_of_an_older_version_has_fewer_checksums_and_is_read_and_resumed(start, stream, tmp_path):
    out, new = tmp_path / "out", {"footer_sha256", "etag", "failures_sha256", "checksum"}
    start()
    before = start(retry_failed=True)
    for path in (*out.glob("stems/*.json"), out / "corpus" / "tasks.json"):
        if path.name != "pass.json":
            dropped = new | ({"sha256"} if path.name == "tasks.json" else set())
            write_json(path, {key: value for key, value in json.loads(path.read_text()).items() if key not in dropped})
    turns = len(stream.turns)
    assert counts(start()) == counts(before) and len(stream.turns) == turns
    assert select_tracks(out, tmp_path / "tracks", Thresholds())["num_stems"] == before["num_stems"]
    shard = stem_shards(out / "stems")[0]
    flip(shard)
    with pytest.raises(DamagedError, match="cannot use"):
        select_tracks(out, tmp_path / "tracks", Thresholds())
    assert counts(start()) == counts(before) and len(stream.turns) == turns + 1


def test_a_pass_whose_shards_come_out_different_makes_its_selection_stale(start, tmp_path, caplog):
    out = tmp_path / "out"
    start()
    select_tracks(out, tmp_path / "tracks", Thresholds())
    shard = stem_shards(out / "stems")[0]
    flip(shard)
    start()
    read_tracks(tmp_path / "tracks")  # the same bytes came out
    flip(shard)
    (tmp_path / "corpus" / pq.read_table(shard.with_name("shard-000000-0001.parquet"))["path"][0].as_py()).unlink()
    (tmp_path / "corpus" / json.loads(json.dumps(_first_path(out)))).unlink(missing_ok=True)
    start()
    with pytest.raises(ValueError, match=r"got other stems \(the selection is stale\); run the filter again"):
        read_tracks(tmp_path / "tracks")


def _first_path(out):
    return Tasks(out / "corpus").rows(0)[0]["path"]


@pytest.fixture
def selected(write_pass, tmp_path):
    """A pass of eight clips with random audio, and a selection of all its stems."""
    rng = np.random.default_rng(0)
    stems = [
        (f"clip{i}", label, rng.uniform(-0.5, 0.5, 500).astype("f4"), {"re_sdr_db": float(rng.normal(10, 3))})
        for i in range(8)
        for label in ("rain", "bell")
    ]
    out = write_pass(stems)
    record = dict(shard_records(out))["shard-000000-0000"]
    manifest = read_sealed(out / "stems" / "manifest.json", dict)
    write_sealed(
        out / "stems" / "manifest.json", manifest | {"footer_sha256": {"shard-000000-0000": record["footer_sha256"]}}
    )
    select_tracks(out, tmp_path / "tracks", Thresholds())
    return out


def chunks(shard):
    """Name, first byte and end of every column chunk, and of the footer."""
    metadata = pq.read_metadata(shard)
    for group in range(metadata.num_row_groups):
        for number in range(metadata.num_columns):
            column = metadata.row_group(group).column(number)
            first = column.dictionary_page_offset or column.data_page_offset
            yield column.path_in_schema, first, first + column.total_compressed_size
    size = shard.stat().st_size
    yield "footer", size - 8 - metadata.serialized_size, size


def test_a_flipped_byte_never_changes_a_selection_or_a_sound(selected, tmp_path):
    """Whatever byte of the scores, of the audio or of the footer it is: an error that names the shard, or the same."""
    (shard,) = stem_shards(selected / "stems")
    good, rng = shard.read_bytes(), np.random.default_rng(1)
    verdicts = select_tracks(selected, tmp_path / "good", Thresholds(min_re_sdr_db=10.0))["kept_sha256"]
    sounds = read_audio(selected / "stems", shard.name, range(16))
    places = [(name, int(at)) for name, first, end in chunks(shard) for at in rng.integers(first, end, 3)]
    noticed = {"filter": 0, "audio": 0}
    for name, at in places:
        data = bytearray(good)
        data[at] ^= 1 << int(rng.integers(8))
        shard.write_bytes(data)
        try:
            selection = select_tracks(selected, tmp_path / "again", Thresholds(min_re_sdr_db=10.0))
            assert selection["kept_sha256"] == verdicts, (name, at)
            assert name != "footer", (name, at)
        except DamagedError as error:
            assert shard.name in str(error) and "; start the command" in str(error)
            noticed["filter"] += 1
        try:
            found = read_audio(selected / "stems", shard.name, range(16))
            assert all(np.array_equal(one, other) for one, other in zip(sounds, found, strict=True)), (name, at)
            assert name != "footer", (name, at)
        except DamagedError as error:
            assert shard.name in str(error)
            noticed["audio"] += 1
    assert min(noticed.values()) > 20
    shard.write_bytes(good)
    assert select_tracks(selected, tmp_path / "again", Thresholds(min_re_sdr_db=10.0))["kept_sha256"] == verdicts


def test_every_flipped_byte_of_the_scores_is_noticed_or_changes_nothing(selected):
    """Compressed small pages are stored as they are: without a checksum, a flipped bit is another score."""
    (shard,) = stem_shards(selected / "stems")
    good, scores, noticed = shard.read_bytes(), read_columns(shard, ["re_sdr_db"]), 0
    for at in (at for name, first, end in list(chunks(shard)) if name == "re_sdr_db" for at in range(first, end)):
        shard.write_bytes(good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :])
        try:
            assert read_columns(shard, ["re_sdr_db"]).equals(scores), at
        except DamagedError:
            noticed += 1
    assert noticed > 60


@pytest.mark.parametrize("items", [track_items, pair_items])
def test_training_on_damaged_audio_is_an_error_that_names_the_shard(selected, tmp_path, items):
    (shard,) = stem_shards(selected / "stems")
    (first, end) = next((first, end) for name, first, end in chunks(shard) if name == "audio_flac")
    flip(shard, (first + end) / 2 / shard.stat().st_size)
    pool_of = functools.partial(Pool, config=MixConfig(), sample_rate_hz=RATE_HZ, seed=0, rank=0, num_ranks=1)
    pool = pool_of(items(tmp_path / "tracks", sample_rate_hz=RATE_HZ))
    message = r"cannot load '(rain|bell)' of clip clip\d \(cannot use .*shard-000000-0000\.parquet \(its bytes are not"
    with pytest.raises(DamagedError, match=message):
        pool.prepare(0)
    assert not pool.unusable, "it is no sound to do without"


def test_audio_that_was_damaged_before_it_was_recorded_is_named_by_shard_clip_and_label(selected, tmp_path):
    """libsndfile's error says neither; its class is a RuntimeError."""
    (shard,) = stem_shards(selected / "stems")
    rows = pq.read_table(shard).to_pylist()
    rows[3]["audio_flac"] = rows[3]["audio_flac"][:60] + bytes(40)
    written = write_shard(selected, shard.stem, stems=pa.Table.from_pylist(rows, schema=STEMS), failures=[])
    manifest = read_sealed(selected / "stems" / "manifest.json", dict)
    manifest |= {"shards": {shard.stem: written["sha256"]}, "footer_sha256": {shard.stem: written["footer_sha256"]}}
    write_sealed(selected / "stems" / "manifest.json", manifest)
    message = r"cannot decode the audio of 'bell' of clip clip1 in .*shard-000000-0000\.parquet \(.*\); start the"
    with pytest.raises(DamagedError, match=message):
        read_audio(selected / "stems", shard.name, [3])
    with pytest.raises(DamagedError, match=message):
        read_clip(selected / "stems", shard.name, first_row=2, num_stems=2)


@pytest.mark.parametrize("part", ["stems", "scores", "failures", "record", "manifest"])
def test_inspect_fails_for_a_damaged_pass_and_names_the_file(cli, write_pass, part):
    clip = {"clip_id": "lost", "path": "c.wav", "labels": ["bell", "dog"], "start_s": None, "end_s": None}
    stems = [("clip", label, mixture(500, seed=3), {"re_sdr_db": 10.0}) for label in ("rain", "bell")]
    out = write_pass(stems, failures=[failure(clip, step="decode", error=ValueError("it is empty"))])
    write_sealed(out / "stems" / "manifest.json", read_sealed(out / "stems" / "manifest.json", dict))
    assert cli("inspect", out).code == 0
    names = {"failures": "failures/shard-000000-0000.parquet", "record": "stems/shard-000000-0000.done.json"}
    name = names.get(part, "stems/manifest.json" if part == "manifest" else "stems/shard-000000-0000.parquet")
    flip(out / name, 0.3 if part == "stems" else 0.6)
    for words in (["inspect", out], ["inspect", out, "--json"]):
        outcome = cli(*words)
        assert outcome.code == 1 and name.rpartition("/")[2] in outcome.err and "; start the command" in outcome.err
    if part not in ("manifest", "record", "failures"):
        assert json.loads(outcome.out)["damaged_shards"] == ["shard-000000-0000.parquet"]


def test_a_damaged_object_in_s3_is_noticed_and_a_good_one_is_not_read_for_it(s3, selected, tmp_path, monkeypatch):
    """Its tag is compared, which the server derives from its bytes; the bytes only if the tag is another."""
    out = location(f"{s3.root}/pass")
    rows = pq.read_table(stem_shards(selected / "stems")[0]).to_pylist()
    record = write_shard(out, "shard-000000-0000", stems=pa.Table.from_pylist(rows, schema=STEMS), failures=[])
    write_record(out, "shard-000000-0000", record)
    manifest = {"num_stems": 16, "separator_fingerprint": "s", "config_fingerprint": "c", "fingerprint": "f"}
    manifest |= {"shards": {"shard-000000-0000": record["sha256"]}}
    write_sealed(out / "stems" / "manifest.json", manifest | {"footer_sha256": {}})
    with monkeypatch.context() as patch:
        patch.setattr(shards, "sha256_file", None)  # it is not called
        assert record["etag"] and damaged_files(out) == []
    shard = out / "stems" / "shard-000000-0000.parquet"
    good = shard.read_bytes()
    shard.write_bytes(good[:3000] + bytes([good[3000] ^ 1]) + good[3001:])
    assert damaged_files(out) == ["stems/shard-000000-0000.parquet"]
    with pytest.raises(DamagedError, match=r"cannot use s3://.*/shard-000000-0000\.parquet"):
        select_tracks(out, tmp_path / "tracks-of-s3", Thresholds())
    write_record(out, "shard-000000-0000", record | {"etag": "of a copy in another bucket"})
    shard.write_bytes(good)
    assert damaged_files(out) == []


# ---- what mutations of the code would change


def test_failures_of_an_interrupted_attempt_are_removed(tmp_path):
    """The first attempt had failures and was killed before its record; the second has none."""
    clip = {"clip_id": "clip", "path": "a.wav", "labels": ["low", "high"], "start_s": None, "end_s": None}
    row = failure(clip, step="decode", error=ValueError("it was not there yet"))
    write_shard(tmp_path, "shard-000000-0000", stems=STEMS.empty_table(), failures=[row])
    record = write_shard(tmp_path, "shard-000000-0000", stems=STEMS.empty_table(), failures=[])
    write_record(tmp_path, "shard-000000-0000", record)
    assert list(failure_rows(tmp_path)) == [] and list((tmp_path / "failures").iterdir()) == []


def test_tracks_of_another_pass_are_refused(selected, tmp_path):
    read_tracks(tmp_path / "tracks")
    manifest = read_sealed(selected / "stems" / "manifest.json", dict)
    write_json(selected / "stems" / "manifest.json", manifest | {"fingerprint": "of another pass"})
    with pytest.raises(ValueError, match=r"tracks must select from the pass in .*stems as it is now, got other stems"):
        read_tracks(tmp_path / "tracks")


def test_a_selection_whose_manifest_was_changed_is_refused(selected, tmp_path):
    path = tmp_path / "tracks" / "manifest.json"
    write_json(path, json.loads(path.read_text()) | {"num_kept": 15})
    with pytest.raises(DamagedError, match=r"manifest\.json must have the fingerprint of its values"):
        read_tracks(tmp_path / "tracks")


@pytest.mark.parametrize("change", [{"num_stems": 17}, {"num_queries": 17}, {"num_failed": 1}])
def test_a_selection_that_does_not_add_up_to_its_pass_is_not_closed(selected, tmp_path, change):
    manifest = read_sealed(selected / "stems" / "manifest.json", dict)
    write_sealed(selected / "stems" / "manifest.json", manifest | change)
    with pytest.raises(RuntimeError, match=r"cannot close the selection in .*again \(16 kept, 0 rejected and"):
        select_tracks(selected, tmp_path / "again", Thresholds())
    assert not (tmp_path / "again" / "manifest.json").exists()
