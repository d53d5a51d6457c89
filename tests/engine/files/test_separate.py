"""Separating files: formats, names, resuming, the residual, the best of several, and what cannot be done."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch

import clearsep as cs
from engine.audio.decoder import shared_decoder
from engine.errors import AudioError
from engine.files import separate as separate_module
from engine.files.names import find_inputs, safe_name
from engine.files.plan import plan_separation
from engine.files.separate import separate_files
from engine.files.targets import make_targets, with_rivals
from engine.schema import SCORES
from engine.scoring.estimator import SiSdrEstimator
from engine.storage.paths import location
from tests.support.answers import BandPass, open_band_pass, snr_db

pytest_plugins = ["tests.support.s3_server"]
RATE_HZ = 8000
SIGNAL_T = 0.1 * np.random.default_rng(0).standard_normal(12 * RATE_HZ).astype(np.float32)
TIME_T = np.arange(len(SIGNAL_T)) / RATE_HZ


@pytest.fixture
def mixture(tmp_path: Path) -> Path:
    """Stereo at 11,025 Hz: the left side is louder."""
    signal_TC = np.stack([SIGNAL_T, 0.25 * SIGNAL_T], axis=1)
    sf.write(tmp_path / "street.flac", signal_TC, 11_025)
    return tmp_path / "street.flac"


def estimator(name: str, weight: float) -> SiSdrEstimator:
    one = (1.0,)
    return SiSdrEstimator(
        names=(name,), lowest=(-100.0,), highest=(100.0,), mean=(0.0,), deviation=one, weight=(weight,), bias=0.0,
        error_at_db=one, error_db=one, about={},
    )  # fmt: skip


def separate(path: Path, queries: object, **more: object) -> list:
    more = {"separator": open_band_pass, "out": path.parent / "out"} | more
    return cs.separate_file(path, queries, **more)  # type: ignore[arg-type]


def summary_of(names: list, out: Path, **more: object) -> dict:
    plan = plan_separation(make_targets(["low"]), separator=open_band_pass, **more)  # type: ignore[arg-type]
    return dict(separate_files(find_inputs([str(name) for name in names]), plan, out))


# Outputs.


def test_stems_have_the_rate_channels_and_length_of_the_file_and_add_up(mixture):
    stems = separate(mixture, ["low", "high"], residual=True)
    signal_TC, _ = sf.read(mixture, dtype="float32")
    parts = []
    for stem, name in zip(stems, ["low", "high", "residual"], strict=True):
        info = sf.info(stem["path"])
        assert stem["path"] == str(mixture.parent / "out" / f"street.{name}.wav")
        assert (info.samplerate, info.channels, info.frames) == (11_025, 2, len(signal_TC))
        assert (info.subtype, stem["duration_s"], stem["is_new"]) == ("FLOAT", len(signal_TC) / 11_025, True)
        parts.append(sf.read(stem["path"], dtype="float32")[0])
    assert snr_db(sum(parts), signal_TC) > 120
    assert snr_db(4 * parts[0][:, 1], parts[0][:, 0]) > 60


def test_scores_are_those_of_the_schema_and_levels_of_the_complete_file(mixture):
    low, high = separate(mixture, ["low", "high"], estimator=estimator("mask_snr_db", 1.0))
    assert set(low["scores"]) == {*SCORES.names, "estimated_si_sdr_db", "estimated_error_db"}
    assert low["scores"]["stem_level_db"] == pytest.approx(-6.0, abs=0.2)  # 1 of 4 kHz
    assert low["scores"]["remix_snr_db"] > 30
    assert low["scores"]["estimated_si_sdr_db"] == pytest.approx(low["scores"]["mask_snr_db"], abs=0.1)
    assert high["scores"]["stem_level_db"] > low["scores"]["stem_level_db"]


def test_flac_has_24_bits_and_counts_what_it_clips(tmp_path, caplog):
    sf.write(tmp_path / "loud.wav", np.full(RATE_HZ, 1.5, "f4"), RATE_HZ, subtype="FLOAT")
    (stem,) = separate(tmp_path / "loud.wav", "all", file_format="flac")
    assert sf.info(stem["path"]).subtype == "PCM_24"
    assert stem["num_clipped"] == RATE_HZ
    sf.write(tmp_path / "many.wav", np.zeros((RATE_HZ, 9)), RATE_HZ)
    with pytest.raises(ValueError, match="at most 8 channels"):
        separate(tmp_path / "many.wav", "all", file_format="flac")
    (stem,) = separate(tmp_path / "many.wav", "all")
    assert sf.info(stem["path"]).channels == 9


@pytest.mark.parametrize("suffix", ["ogg", "mp3", "aiff", "w64"])
def test_other_formats_are_read(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    sf.write(path, 0.1 * SIGNAL_T, RATE_HZ)
    (stem,) = separate(path, "all")
    decoded_T = shared_decoder().decode(str(path), sample_rate_hz=RATE_HZ)
    assert snr_db(sf.read(stem["path"], dtype="float32")[0], decoded_T) > 80


# Names.


def test_files_in_folders_keep_them_and_equal_names_get_a_checksum(tmp_path):
    for name in ("in/a/x.wav", "in/b/x.wav", "in/x.wav", "in/x.flac", "in/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        sf.write(tmp_path / name, SIGNAL_T[:1000], RATE_HZ, format="WAV" if name.endswith("txt") else None)
    summary = summary_of([tmp_path / "in"], tmp_path / "out")
    paths = sorted(str(Path(stem["path"]).relative_to(tmp_path / "out")) for stem in summary["stems"])
    assert len(paths) == 4 and {"a/x.low.wav", "b/x.low.wav"} < set(paths)
    assert all(path.startswith("x-") for path in set(paths) - {"a/x.low.wav", "b/x.low.wav"})
    found = find_inputs([str(tmp_path / "in" / "a" / "x.wav"), str(tmp_path / "in" / "b" / "x.wav")])
    assert len({one.name for one in found}) == 2
    assert [one.source for one in find_inputs([str(tmp_path / "in" / "*.wav")] * 2)] == [str(tmp_path / "in" / "x.wav")]


def test_a_command_on_the_folder_of_its_outputs_is_repeatable(tmp_path):
    sf.write(tmp_path / "x.wav", SIGNAL_T[:1000], RATE_HZ)
    plan = plan_separation(make_targets(["low"]), separator=open_band_pass)
    for is_new in (True, False):
        inputs = find_inputs([str(tmp_path), str(tmp_path / "*.wav")], out=tmp_path)
        assert [stem["is_new"] for stem in separate_files(inputs, plan, tmp_path)["stems"]] == [is_new]
    named = find_inputs([str(tmp_path / "x.low.wav"), f"{tmp_path}/../{tmp_path.name}/x.low.wav"], out=tmp_path)
    assert [one.name for one in named] == ["x.low"]
    (tmp_path / "x.wav").unlink()
    with pytest.raises(ValueError, match=r"there is no recording in .* but stems of earlier commands; name the files"):
        find_inputs([str(tmp_path)], out=tmp_path)


def test_a_stem_never_replaces_an_input(tmp_path):
    for name in ("x.wav", "x.low.wav"):
        sf.write(tmp_path / name, SIGNAL_T[:1000], RATE_HZ)
    with pytest.raises(ValueError, match=r"a stem must not replace an input, got .*x\.low\.wav'; choose another fold"):
        summary_of([tmp_path], tmp_path, overwrite=True)


@pytest.mark.parametrize(
    "text", ["../../etc/passwd", "a/b", "..", ".hidden", "a\x00b\n", "x" * 300, "Ünï", "日本" * 99]
)
def test_names_are_safe(text):
    name = safe_name(text)
    assert name and len(name.encode()) <= 80 and not set("/\\\0\n ") & set(name) and not name.startswith(".")


def test_queries_of_equal_names_have_different_files():
    names = [target.name for target in make_targets(["dog bark", "dog-bark", "dog/bark", "residual"])]
    assert len(set(names)) == 4 and "residual" not in names


def test_inputs_and_outputs_may_be_in_s3(s3, mixture):
    bucket = s3.root
    for name in ("a", "b"):
        (location(bucket) / "in" / f"{name}.flac").write_bytes(mixture.read_bytes())
    plan = plan_separation(make_targets(["low"]), separator=open_band_pass)
    for is_new in (True, False):
        summary = separate_files(find_inputs([f"{bucket}/in/*.flac"]), plan, location(f"{bucket}/out"))
        assert [stem["path"] for stem in summary["stems"]] == [f"{bucket}/out/{name}.low.wav" for name in "ab"]
        assert [stem["is_new"] for stem in summary["stems"]] == [is_new] * 2 and not summary["failures"]
    assert [one.name for one in find_inputs([f"{bucket}/in"])] == ["a", "b"]
    samples_TC, _ = sf.read(io.BytesIO((location(bucket) / "out" / "a.low.wav").read_bytes()))
    assert samples_TC.shape == (len(SIGNAL_T), 2)


def test_a_complete_set_of_stems_divides_the_file(tmp_path):
    """Of "all" and "low" the file is divided evenly below 1 kHz: what both took is counted once."""
    sf.write(tmp_path / "street.wav", SIGNAL_T, RATE_HZ, subtype="FLOAT")
    stems = separate(tmp_path / "street.wav", ["all", "low"], complete=True)
    parts = [sf.read(stem["path"], dtype="float32")[0] for stem in stems]
    assert snr_db(sum(parts), SIGNAL_T) > 80
    levels = [np.square(part).sum() / np.square(SIGNAL_T).sum() for part in parts]
    assert levels == pytest.approx([3 / 4 + 1 / 4 / 4, 1 / 4 / 4], abs=0.02)
    scores = [stem["scores"] for stem in stems]  # of the stems before: the shares always add up
    assert scores[0]["remix_snr_db"] == pytest.approx(6.0, abs=0.3)
    assert scores[1]["stem_level_db"] == pytest.approx(-6.0, abs=0.3)


def test_queries_of_a_complete_set_exclude_each_other(mixture, monkeypatch):
    seen = []

    def separated(self, mix_BT, queries, *, lengths=None):
        seen.extend(queries)
        return mix_BT / 2

    monkeypatch.setattr(BandPass, "separate", separated)
    separate(mixture, ["low", "high"], complete=True)
    assert {type(query) for query in seen} == {str}
    seen.clear()
    monkeypatch.setattr(BandPass, "uses_unwanted", True, raising=False)
    separate(mixture, ["low", "high"], complete=True, overwrite=True, unwanted="hum")
    pairs = {(query.text, tuple(part.sound for part in query.unwanted)) for query in seen}
    assert pairs == {("low", ("hum", "high")), ("high", ("hum", "low"))} | {(one, ("hum",)) for one in ("low", "high")}


def test_the_best_of_a_complete_set_is_chosen_by_queries_that_exclude_each_other(mixture, monkeypatch):
    seen = []

    class Excluding(BandPass):
        uses_unwanted = True

        def separate(self, mix_BT, queries, *, lengths=None):
            seen.extend(query for query in queries if mix_BT.shape[1])
            return super().separate(mix_BT, [query if isinstance(query, str) else query.text for query in queries])

    more = {"separator": Excluding(), "estimator": estimator("stem_level_db", 1.0), "complete": True}
    stems = separate(mixture, [["nothing", "low"], "high"], **more)
    assert [stem["query"] for stem in stems] == ["low", "high"]
    assert {(query.text, tuple(part.sound for part in query.unwanted)) for query in seen} == {
        ("nothing", ("high",)), ("low", ("high",)), ("high", ("nothing",)), ("high", ("low",))
    }  # fmt: skip


def test_a_sound_that_a_query_names_itself_is_not_excluded_by_another():
    howl = cs.Query([cs.QueryPart("howl", 2.0), "wolf"], unwanted="rain")
    bark = cs.Query(["dog bark", "Howl", "rain"])
    first, second = with_rivals([bark, howl])
    assert [part.sound for part in first.unwanted] == ["wolf"]
    assert [part.sound for part in second.unwanted] == ["rain", "dog bark"]


def test_stems_of_a_complete_set_are_made_together(mixture):
    first = separate(mixture, ["low", "high"], complete=True)
    Path(first[0]["path"]).unlink()
    again = separate(mixture, ["low", "high"], complete=True)
    assert [stem["is_new"] for stem in again] == [True, False]
    with pytest.raises(AudioError, match="must be a stem of the same input, query and separator"):
        separate(mixture, ["low", "high"])


# Resuming.


def test_stems_that_are_there_are_left_and_others_made(mixture, monkeypatch):
    (first,) = separate(mixture, "low")
    before = Path(first["path"]).stat().st_mtime_ns
    calls: list = []

    def counted(self, mix_BT, queries, *, lengths=None):
        if mix_BT.numel():  # not the check of the queries
            calls.append(queries)
        return mix_BT

    monkeypatch.setattr(BandPass, "separate", counted)
    (again,) = separate(mixture, "low")
    assert not again["is_new"] and again["scores"] is None and not any(calls)
    again, new = separate(mixture, ["low", "high"])
    assert (again["is_new"], new["is_new"]) == (False, True)
    assert {query for one in calls for query in one} == {"high"}
    assert Path(first["path"]).stat().st_mtime_ns == before
    (replaced,) = separate(mixture, "low", overwrite=True)
    assert replaced["is_new"]


def test_a_stem_of_another_input_is_not_taken_for_this_one(mixture, tmp_path):
    separate(mixture, "low")
    (tmp_path / "other").mkdir()
    sf.write(tmp_path / "other" / "street.flac", SIGNAL_T, RATE_HZ)
    with pytest.raises(ValueError, match="must be a stem of the same input, query and separator, got another file"):
        separate(tmp_path / "other" / "street.flac", "low", out=tmp_path / "out")


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("broken")])
def test_an_interruption_leaves_no_half_file(mixture, monkeypatch, error):
    def interrupted(blocks, *args, **more):
        for number, block in enumerate(blocks):
            if number:
                raise error
            yield block

    original = separate_module.separated_blocks
    monkeypatch.setattr(separate_module, "separated_blocks", lambda *args, **more: interrupted(original(*args, **more)))
    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else RuntimeError):
        separate(mixture, ["low", "high"])
    assert list((mixture.parent / "out").iterdir()) == []


def test_one_bad_file_is_a_failure_with_its_reason_and_the_others_are_done(mixture, tmp_path):
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "text.mp3").write_text("this is no sound at all, but a text\n")
    summary = summary_of([tmp_path / "empty.wav", tmp_path / "text.mp3", mixture], tmp_path / "out")
    assert [Path(stem["path"]).name for stem in summary["stems"]] == ["street.low.wav"]
    assert [Path(one["source"]).name for one in summary["failures"]] == ["empty.wav", "text.mp3"]
    empty, text = (one["message"] for one in summary["failures"])
    assert "empty file" in empty and "begins like a text" in text


# The best of several.


def test_the_estimator_chooses_the_wording_and_the_separator(mixture):
    loud = estimator("stem_level_db", 1.0)
    low, high = separate(mixture, [["nothing", "low"], "high"], estimator=loud)
    assert (low["query"], high["query"]) == ("low", "high")
    quiet = estimator("stem_level_db", -1.0)
    (stem,) = separate(mixture, [["all", "low"]], estimator=quiet, overwrite=True)
    assert stem["query"] == "low"

    class Quiet(BandPass):
        def separate(self, mix_BT, queries, *, lengths=None):
            return 0.01 * super().separate(mix_BT, queries)

    (stem,) = separate(mixture, "all", separator=[Quiet(), BandPass()], estimator=loud, overwrite=True)
    assert stem["scores"]["stem_level_db"] == pytest.approx(0, abs=0.2)


def test_a_choice_needs_an_estimator(mixture):
    with pytest.raises(ValueError, match="must be chosen by an estimator, got none"):
        separate(mixture, [["all", "low"]])


# What cannot be done.


@pytest.mark.parametrize(
    ("queries", "more", "message"),
    [
        ([], {}, "queries must name at least one sound"),
        (" ", {}, "a query must have words"),
        (["low", "Low"], {}, "queries must be different, got 'Low' twice"),
        ([[]], {}, "must have a query"),
        ("low", {"unwanted": "low"}, "must not want and exclude the same sound"),
        ("low", {"unwanted": "high"}, "cannot exclude 'high'"),
        ("lov", {}, "there is no label 'lov'"),
        ("low", {"file_format": "mp3"}, "must be wav or flac, got 'mp3'"),
        ("low", {"complete": True}, "a complete set of queries must be two or more without a residual, got one"),
        (["low", "high"], {"complete": True, "residual": True}, "without a residual, got a residual"),
        ("low", {"device": "cuda"}, "got cuda where PyTorch finds no GPU"),
        ("low", {"separator": "no-such-folder"}, "no-such-folder"),
    ],
)
def test_what_cannot_work_is_refused_before_a_file_is_opened(tmp_path, monkeypatch, queries, more, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        separate(tmp_path / "never-opened.wav", queries, **more)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.wav", "there is no file or folder"),
        ("*.wav", "there is no file that .* matches"),
        ("folder", "there is no recording in folder"),
    ],
)
def test_inputs_that_are_not_there_are_named(tmp_path, name, message):
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=message):
        find_inputs([str(tmp_path / name)])


def test_text_for_a_closed_vocabulary_names_the_nearest_label(mixture, write_checkpoint):
    folder = write_checkpoint(["bell", "dog"])
    with pytest.raises(ValueError, match="did you mean 'dog'"):
        separate(mixture, "dogs", separator=folder)
    with pytest.raises(ValueError, match="closed vocabulary"):
        separate(mixture, cs.Query(["bell", "a bell that rings"]), separator=folder)
    example = cs.AudioExample(samples_T=SIGNAL_T, sample_rate_hz=RATE_HZ)
    with pytest.raises(ValueError, match="closed vocabulary"):
        separate(mixture, cs.Query(example), separator=folder)


def test_a_video_without_sound_is_a_clear_error(tmp_path):
    import av

    with av.open(str(tmp_path / "silent.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width = stream.height = 16
        stream.pix_fmt = "yuv420p"
        for _ in range(3):
            frame = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), "u1"), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(ValueError, match="must have an audio track, got none"):
        separate(tmp_path / "silent.mp4", "low")


def test_an_output_folder_that_cannot_be_written_is_refused(mixture, tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(ValueError, match="cannot write into folder"):
        summary_of([mixture], tmp_path / "taken")
