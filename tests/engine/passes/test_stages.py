"""A pass without Ray over real files: every query becomes a stem or a failure, and a rerun makes what is missing."""

import io
import itertools
import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import soxr
import torch

from engine.corpus.read import read_corpus
from engine.passes.config import PassConfig
from engine.passes.decode import Decode
from engine.passes.records import read_totals, shard_records
from engine.passes.separate import Separate
from engine.passes.shards import PassStart, pass_manifest, stem_shards, verify
from engine.passes.tasks import Tasks, require_clips
from engine.passes.write import SeparateAndWrite, Write
from engine.schema import FAILURES, SCORES, STEMS, clip_columns
from engine.scoring.scores import score_clip
from engine.separators import SeparatorSource, load_separator
from engine.settings import deciding
from engine.storage.files import sha256_file, write_json
from tests.support.signals import (
    RATE_HZ,
    BandSeparator,
    BandTagger,
    NanSeparator,
    close_pass,
    marked,
    mixture,
    open_bands,
    read_failures,
    run_stages,
    snr_db,
    tiny_checkpoint,
    two_bands,
    write_clips,
)

CONFIG = PassConfig(clip_s=2.0, min_clip_s=0.5, shard_s=4.0, batch_s=8.0, rows_per_task=3)
DURATIONS_S = {"short.wav": 1.0, "long.wav": 5.2, "tail.wav": 4.3, "strange.wav": 1.5, "single.wav": 1.0}
SAMPLES = {name: mixture(round(s * RATE_HZ), seed=i) for i, (name, s) in enumerate(DURATIONS_S.items())}
SAMPLES["silent.wav"] = np.zeros(RATE_HZ, np.float32)
FILES = {**SAMPLES, "broken.wav": b"RIFF, but nothing that follows is a WAV file", "missing.wav": None}
LABELS = {"strange.wav": ("low", "whale", "high"), "single.wav": ("low",)}
CLIPS_S = {  # times of the clips cut from each recording; the last 0.3 s of tail.wav are too short to keep
    "short.wav": [(None, None)],
    "long.wav": [(0.0, 2.0), (2.0, 4.0), (4.0, 5.2)],
    "tail.wav": [(0.0, 2.0), (2.0, 4.0)],
    "strange.wav": [(None, None)],
}
BY_MODEL = ("cycle_si_sdr_db", "rival_leak_db", "tagger_margin_db")
NUM_CLIPS, NUM_QUERIES = 10, 21  # with one clip and two queries each of broken.wav, missing.wav and silent.wav


def rows_of(corpus, min_labels=2):
    rows = corpus.clips.sort_by("clip_id").to_pylist()
    return [row for row in rows if len(row["labels"]) >= min_labels]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return read_corpus(write_clips(tmp_path_factory.mktemp("corpus"), FILES, labels=LABELS))


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("pass")
    run_stages(rows_of(corpus), corpus.root, out, config=CONFIG)
    return out


@pytest.fixture
def rerun(corpus, tmp_path):
    def run(**changes):
        return run_stages(rows_of(corpus), corpus.root, tmp_path / "out", config=CONFIG, **changes)

    return run


def stems_of(out):
    return [row for path in sorted((out / "stems").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def stored_audio(row, what="audio"):
    """The stem by soundfile and the schema's comment alone: 24-bit FLAC of stem / 2**audio_exponent."""
    if not row["num_samples"]:
        return np.zeros(0)
    samples_T, rate_hz = soundfile.read(io.BytesIO(row[f"{what}_flac"]), dtype="float64")
    assert rate_hz == row["sample_rate_hz"] and len(samples_T) == row["num_samples"]
    return samples_T * 2.0 ** row[f"{what}_exponent"]


def mixture_of(row):
    start_s, end_s = row["start_s"] or 0.0, row["end_s"]
    samples_T = SAMPLES[row["path"]]
    return samples_T[round(start_s * RATE_HZ) : None if end_s is None else round(end_s * RATE_HZ)]


def test_recordings_become_clips_of_bounded_length(finished):
    found = {}
    for row in stems_of(finished):
        found.setdefault(row["path"], set()).add((row["start_s"], row["end_s"]))
    assert found == {path: set(times) for path, times in CLIPS_S.items()}


def test_clips_cut_from_a_recording_have_their_own_ids(finished):
    ids = {(row["path"], row["start_s"]): row["clip_id"] for row in stems_of(finished)}
    assert len(set(ids.values())) == len(ids) == 7


def test_every_query_is_a_stem_or_a_failure(finished):
    records, failures = dict(shard_records(finished)).values(), read_failures(finished).to_pylist()
    assert sum(record["num_clips"] for record in records) == NUM_CLIPS
    assert sum(record["num_queries"] for record in records) == NUM_QUERIES
    assert sum(record["num_stems"] for record in records) == len(stems_of(finished)) == 14
    assert sum(row["num_queries"] for row in failures) == NUM_QUERIES - 14
    assert sum(record["num_failed"] for record in records) == NUM_QUERIES - 14
    assert sum(record["audio_s"] for record in records) == pytest.approx(1.0 + 5.2 + 4.0 + 1.5)


def test_failures_have_a_step_and_a_reason(finished):
    rows = {row["path"]: row for row in read_failures(finished).to_pylist()}
    assert {path: (row["step"], row["label"], row["num_queries"]) for path, row in rows.items()} == {
        "broken.wav": ("decode", None, 2),
        "missing.wav": ("decode", None, 2),
        "silent.wav": ("decode", None, 2),
        "strange.wav": ("separate", "whale", 1),
    }
    assert "cannot decode it with libsndfile or FFmpeg" in rows["broken.wav"]["message"]
    assert "cannot open it" in rows["missing.wav"]["message"]
    assert "does not know 'whale'" in rows["strange.wav"]["message"]
    assert rows["silent.wav"]["error_class"] == "SilentError"
    assert "must have sound above -90 dBFS, got silence from 0 to 1 s" in rows["silent.wav"]["message"]


def test_shards_are_plain_parquet_with_the_columns_of_the_schema(finished):
    paths = sorted((finished / "stems").glob("*.parquet"))
    assert len(paths) >= 4
    for path in paths:
        assert pq.read_schema(path).equals(STEMS)
        assert (
            2 * CONFIG.clip_s <= CONFIG.shard_s
            and len({row["clip_id"] for row in pq.read_table(path).to_pylist()}) <= 2
        )
    failures = list((finished / "failures").glob("*.parquet"))
    assert failures and all(pq.read_schema(path).equals(FAILURES) for path in failures)


def test_records_match_the_files_on_disk(finished):
    records = dict(shard_records(finished))
    assert {path.stem for path in (finished / "stems").glob("*.parquet")} == set(records)
    for name, record in records.items():
        assert record["sha256"] == sha256_file(finished / "stems" / f"{name}.parquet")
        assert record["num_shards"] == sum(other.startswith(name[:13]) for other in records)
        assert all(record[f"{step}_s"] >= 0 for step in ("decode", "separate", "assess", "score", "write"))


def test_stored_stems_are_the_separators_to_24_bits(finished):
    for row in stems_of(finished):
        mix_T = mixture_of(row)
        (expected_T,) = BandSeparator().separate(torch.from_numpy(mix_T)[None], [row["label"]]).numpy()
        error = np.abs(stored_audio(row) - expected_T).max()
        assert error <= 2.0 ** (row["audio_exponent"] - 24), (row["path"], row["label"])
        assert row["num_samples"] == len(mix_T) and row["sample_rate_hz"] == RATE_HZ


def assert_mixtures_are_stored_once(out):
    """The first stem of a clip has its mixture to 24 bits, the others none; the stems of a clip are consecutive."""
    for path in (out / "stems").glob("*.parquet"):
        rows = pq.read_table(path).to_pylist()
        groups = [list(group) for _, group in itertools.groupby(rows, key=lambda row: row["clip_id"])]
        assert len(groups) == len({row["clip_id"] for row in rows})
        for first, *others in groups:
            error = np.abs(stored_audio(first, "mixture") - mixture_of(first)).max()
            assert error <= 2.0 ** (first["mixture_exponent"] - 24), first["path"]
            assert all(row["mixture_flac"] is row["mixture_exponent"] is None for row in others)


def test_the_mixture_is_stored_with_the_first_stem_of_a_clip_alone(finished):
    assert_mixtures_are_stored_once(finished)
    assert sum(row["mixture_flac"] is not None for row in stems_of(finished)) == 7


@pytest.mark.parametrize(
    ("labels", "stored"), [(("whale", "low", "high"), ["low", "high"]), (("whale", "high"), ["high"])]
)
def test_the_mixture_is_stored_also_if_the_first_label_has_no_stem(tmp_path, labels, stored):
    manifest = write_clips(tmp_path / "corpus", {"short.wav": SAMPLES["short.wav"]}, labels={"short.wav": labels})
    corpus = read_corpus(manifest)
    run_stages(rows_of(corpus), corpus.root, tmp_path / "out", config=CONFIG)
    rows = stems_of(tmp_path / "out")
    assert [row["label"] for row in rows] == stored and rows[0]["mixture_flac"]
    assert_mixtures_are_stored_once(tmp_path / "out")


def test_a_complete_recording_gives_its_sources(finished):
    low_T, high_T = two_bands(RATE_HZ, seed=0)
    short = {row["label"]: stored_audio(row) for row in stems_of(finished) if row["path"] == "short.wav"}
    assert snr_db(estimate=short["low"], reference=low_T) > 100
    assert snr_db(estimate=short["high"], reference=high_T) > 100


def test_stored_scores_are_those_of_the_stored_audio(finished):
    clips = {}
    for row in stems_of(finished):
        clips.setdefault(row["clip_id"], []).append(row)
    for rows in clips.values():
        assert [row["label"] for row in rows] == [label for label in rows[0]["labels"] if label != "whale"]
        scores = score_clip(
            mixture_T=torch.from_numpy(mixture_of(rows[0])),
            stems_ST=torch.from_numpy(np.float32([stored_audio(row) for row in rows])),
            sample_rate_hz=RATE_HZ,
        )
        assert [{name: row[name] for name in SCORES.names} for row in rows] == scores


def test_scores_are_the_known_ones(finished):
    for row in stems_of(finished):
        assert row["remix_snr_db"] > 90 and row["re_si_sdr_db"] > 90
        assert row["stem_level_db"] == pytest.approx(-3.0, abs=1.0)
        assert row["coherence_fraction"] < 0.2


def test_a_finished_pass_has_nothing_left_to_do(rerun):
    assert len(rerun()) >= 4
    assert rerun() == []


@pytest.mark.parametrize("which", [0, -1])
def test_a_shard_without_a_record_is_made_again_with_the_same_bytes(rerun, tmp_path, which):
    names = rerun()
    before = {name: record["sha256"] for name, record in dict(shard_records(tmp_path / "out")).items()}
    shard = tmp_path / "out" / "stems" / f"{names[which]}.parquet"
    shard.with_suffix(".done.json").unlink()
    shard.write_bytes(b"half a shard")
    untouched = {path: path.stat().st_mtime_ns for path in shard.parent.iterdir() if path != shard}
    assert rerun() == [names[which]]
    assert {name: record["sha256"] for name, record in dict(shard_records(tmp_path / "out")).items()} == before
    assert {path: path.stat().st_mtime_ns for path in untouched} == untouched
    assert len(read_failures(tmp_path / "out")) == 4


def test_a_shard_in_which_everything_fails_is_empty(tmp_path):
    files = {"broken.wav": b"x" * 100, "missing.wav": None}
    corpus = read_corpus(write_clips(tmp_path / "corpus", files))
    (name,) = run_stages(rows_of(corpus), corpus.root, tmp_path / "out", config=CONFIG)
    record = dict(shard_records(tmp_path / "out"))[name]
    assert (record["num_clips"], record["num_queries"], record["num_stems"], record["num_failed"]) == (2, 4, 0, 4)
    assert pq.read_table(tmp_path / "out" / "stems" / f"{name}.parquet").schema.equals(STEMS)


def test_a_separator_that_returns_nan_costs_that_clip_alone(tmp_path):
    files = {"good.wav": mixture(RATE_HZ), "overflow.wav": marked(mixture(RATE_HZ, seed=1))}
    corpus = read_corpus(write_clips(tmp_path / "corpus", files))
    run_stages(rows_of(corpus), corpus.root, tmp_path / "out", config=CONFIG, open_separator=lambda _: NanSeparator())
    assert {row["path"] for row in stems_of(tmp_path / "out")} == {"good.wav"}
    failures = read_failures(tmp_path / "out").to_pylist()
    assert {row["path"] for row in failures} == {"overflow.wav"}
    assert sum(row["num_queries"] for row in failures) == 2


@pytest.fixture(scope="module")
def judged(corpus, tmp_path_factory):
    """The same pass with re-separation and a tagger."""
    out = tmp_path_factory.mktemp("judged")
    config = replace(CONFIG, reseparate=True)
    run_stages(rows_of(corpus), corpus.root, out, config=config, open_tagger=lambda _: BandTagger())
    return out


def test_re_separation_and_a_tagger_change_no_other_column(finished, judged):
    assert sorted(path.name for path in (judged / "stems").iterdir()) == sorted(
        path.name for path in (finished / "stems").iterdir()
    )
    for row, plain in zip(stems_of(judged), stems_of(finished), strict=True):
        assert {name for name in row if row[name] != plain[name]} <= set(BY_MODEL)
        assert all(plain[name] is None for name in BY_MODEL)
    assert read_failures(judged).equals(read_failures(finished))


def test_scores_of_models_are_stored_with_their_stem(judged):
    rows = stems_of(judged)
    for row in rows:
        assert row["rival_leak_db"] < -80 and row["tagger_margin_db"] > 60
        assert row["cycle_si_sdr_db"] is None, "no clip has other labels"
    assert any(record["assess_s"] > 0 for record in dict(shard_records(judged)).values())


def test_stems_are_remixed_with_those_of_other_clips_of_their_shard(tmp_path):
    files = {"low.wav": SAMPLES["short.wav"], "high.wav": SAMPLES["single.wav"]}
    labels = {"low.wav": ("low",), "high.wav": ("high",)}
    corpus = read_corpus(write_clips(tmp_path / "corpus", files, labels=labels))
    config = replace(CONFIG, reseparate=True, min_labels=1)
    run_stages(rows_of(corpus, min_labels=1), corpus.root, tmp_path / "out", config=config)
    for row in stems_of(tmp_path / "out"):
        assert row["cycle_si_sdr_db"] > 80
        assert row["rival_leak_db"] is row["tagger_margin_db"] is None


def test_one_actor_that_does_all_steps_writes_the_same_shard(corpus, judged, tmp_path):
    config, rows = replace(CONFIG, reseparate=True), rows_of(corpus)
    out = tmp_path / "out"
    Tasks(out / "corpus").write_rows(rows, rows_per_task=config.rows_per_task)
    decode = Decode(config, root=corpus.root, out=str(out), sample_rate_hz=RATE_HZ)
    write = Write(str(out), RATE_HZ)
    actor = SeparateAndWrite(write, lambda _: BandSeparator(), lambda _: BandTagger(), config)
    for shard in decode(pa.Table.from_pylist([{"task": 0, "done": []}])):
        actor(shard)
    written = sorted((tmp_path / "out" / "stems").glob("*.parquet"))
    assert written
    for path in written:
        assert path.read_bytes() == (judged / "stems" / path.name).read_bytes()


def test_stems_are_written_at_another_rate_and_scored_at_their_own(corpus, finished, tmp_path):
    config = replace(CONFIG, stem_rate_hz=RATE_HZ // 2)
    run_stages(rows_of(corpus), corpus.root, tmp_path / "out", config=config)
    audio = ("sample_rate_hz", "num_samples", "audio_flac", "audio_exponent", "mixture_flac", "mixture_exponent")
    for row, plain in zip(stems_of(tmp_path / "out"), stems_of(finished), strict=True):
        assert (row["sample_rate_hz"], row["num_samples"]) == (RATE_HZ // 2, -(-plain["num_samples"] // 2))
        assert {name for name in row if row[name] != plain[name]} <= set(audio)
        for what in ("audio", "mixture") if row["mixture_flac"] else ("audio",):
            expected_T = soxr.resample(stored_audio(plain, what), RATE_HZ, RATE_HZ // 2, quality="HQ")
            assert snr_db(estimate=stored_audio(row, what), reference=expected_T) > 90.0
    assert "stem_rate_hz" not in deciding(CONFIG) and deciding(config)["stem_rate_hz"] == RATE_HZ // 2


def test_a_separator_that_returns_nan_costs_that_clip_alone_with_judges_too(tmp_path):
    files = {"good.wav": mixture(RATE_HZ), "overflow.wav": marked(mixture(RATE_HZ, seed=1))}
    corpus = read_corpus(write_clips(tmp_path / "corpus", files))
    judges = {"open_separator": lambda _: NanSeparator(), "open_tagger": lambda _: BandTagger()}
    run_stages(rows_of(corpus), corpus.root, tmp_path / "out", config=replace(CONFIG, reseparate=True), **judges)
    assert {row["path"] for row in stems_of(tmp_path / "out")} == {"good.wav"}
    assert all(row["rival_leak_db"] < -80 and row["tagger_margin_db"] > 60 for row in stems_of(tmp_path / "out"))
    assert {row["path"] for row in read_failures(tmp_path / "out").to_pylist()} == {"overflow.wav"}


def test_a_checkpoint_drives_the_pass(corpus, tmp_path):
    folder = tiny_checkpoint(tmp_path / "separator")
    rows = [row for row in rows_of(corpus) if row["path"] == "short.wav"]
    run_stages(
        rows, corpus.root, tmp_path / "out", config=CONFIG, open_separator=lambda device: load_separator(folder, device)
    )
    expected_BT = load_separator(folder).separate(
        torch.from_numpy(SAMPLES["short.wav"])[None].expand(2, -1), ["low", "high"]
    )
    for row, expected_T in zip(stems_of(tmp_path / "out"), expected_BT.numpy(), strict=True):
        np.testing.assert_allclose(stored_audio(row), expected_T, rtol=0, atol=2e-7)


def test_the_separator_is_opened_once_on_the_device():
    opened = []
    Separate(lambda device: opened.append(device) or BandSeparator(), None, CONFIG)
    assert opened == ["cpu"]


def test_clips_with_too_few_labels_are_set_aside_and_the_sums_of_a_closed_pass_add_up(corpus, finished, tmp_path):
    def chosen(min_labels):
        tasks = Tasks(tmp_path / str(min_labels))
        counts = tasks.write(corpus, rows_per_task=2, min_labels=min_labels)
        assert counts["num_clips"] + counts["num_set_aside"] == len(FILES)
        return [clip_columns(row) for task in range(counts["num_tasks"]) for row in tasks.rows(task)]

    def paths(min_labels):
        return {row["path"] for row in chosen(min_labels)}

    assert chosen(2) == rows_of(corpus)
    assert (paths(1), paths(2), paths(3)) == (FILES.keys(), FILES.keys() - {"single.wav"}, {"strange.wav"})
    with pytest.raises(ValueError, match=r"at least one clip must have 4 or more labels.*`--set min_labels=1`"):
        require_clips(corpus, PassConfig(min_labels=4))
    bands = replace(SeparatorSource.from_factory(open_bands), fingerprint="bands", terms=("AudioSep: MIT",))
    counts = {"num_tasks": 1, "num_clips": NUM_CLIPS, "num_set_aside": 1}
    given = {"separator": bands, "counts": counts, "start": PassStart(wall_s=2.0, audio_s=11.7, limit=None)}
    manifest = pass_manifest(read_totals(finished), corpus, CONFIG, **given)
    write_json(finished / "stems" / "manifest.json", manifest)
    assert manifest["num_clips"] == NUM_CLIPS and manifest["num_set_aside"] == 1
    missing = sum(read_failures(finished)["num_queries"].to_pylist())
    assert manifest["num_queries"] == NUM_QUERIES == manifest["num_stems"] + missing
    assert manifest["separator_terms"] == ["AudioSep: MIT"]
    assert manifest["num_failed"] == missing and manifest["separator_fingerprint"] == "bands"
    assert manifest["audio_h"] == pytest.approx(11.7 / 3600)
    assert sum(manifest["step_fraction"].values()) == pytest.approx(1.0)
    assert verify(finished / "stems") == []
    shards = manifest["shards"]
    close_pass(finished)
    assert json.loads((finished / "stems" / "manifest.json").read_text())["shards"] == shards
    assert [path.stem for path in stem_shards(finished / "stems")] == sorted(shards)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip_s": 0.0}, r"clip_s must be above 0, got 0\.0; "),
        ({"batch_s": -1.0}, r"batch_s must be above 0, got -1\.0; "),
        ({"rows_per_task": 0}, "rows_per_task must be at least 1, got 0; "),
        ({"clip_s": 900.0}, r"clip_s must be at most 600\.0, got 900\.0; "),
        ({"min_actors": 3, "max_actors": 2}, r"max_actors must be at least min_actors \(3\), got 2; raise"),
    ],
)
def test_settings_that_cannot_work_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        PassConfig(**settings)


def test_settings_decide_the_result_or_only_its_speed():
    slow = PassConfig(batch_s=1.0, max_actors=1, num_cpus_per_actor=1.0, autocast=False)
    assert deciding(slow) == deciding(PassConfig())
    for change in (
        {"clip_s": 5.0},
        {"min_clip_s": 2.0},
        {"min_labels": 1},
        {"shard_s": 9.0},
        {"rows_per_task": 2},
        {"reseparate": True},
    ):
        assert deciding(PassConfig(**change)) != deciding(PassConfig())
