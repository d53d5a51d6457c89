"""The report of a run and of a pass: what is in it adds up, is where it is said to be, and is text."""

from __future__ import annotations

import base64
import json
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from engine.passes.records import write_record
from engine.passes.shards import write_shard
from engine.schema import failure
from engine.selection.thresholds import Thresholds
from engine.selection.tracks import select_tracks
from engine.storage.files import write_json
from tests.support.command import Cli
from tests.tune.report.conftest import DURATION_S, FILE, LABELS, LIMITS, MARKUP, NUM_CLIPS, stems
from tune.report.collect import collect_pass, collect_run
from tune.report.compare import compare
from tune.report.listen import BANDS, COLUMNS, failed_clips, played_clips
from tune.report.page import is_number, only_warned
from tune.report.parts import (
    distributions,
    duration_text,
    flow,
    glance,
    labels_table,
    learning,
    number_limits,
    percent,
    rule_text,
    score_text,
    sentence,
    times,
    without_secrets,
)
from tune.report.sample import draw, strata
from tune.report.stems import Numbered
from tune.report.truth import Truth
from tune.report.write import write_run_report

NUM_STEMS = 2 * NUM_CLIPS
Write = Callable[..., Path]


def test_rules_are_in_the_order_in_which_they_apply(run_folder: Path) -> None:
    """Labels first, then limits that are numbers, then quantiles of what these left, then the cap of a label."""
    one = collect_run(run_folder).passes[0]
    assert one.selection is not None
    order = ["no_label", "min_stem_level_db", "min_tagger_margin_db", "min_remix_snr_db", "label_cap_ratio"]
    limits = {"min_stem_level_db": -20.0, "min_tagger_margin_db": 0.0, "label_cap_ratio": 2.0}
    quantile = {"min_remix_snr_db": {"quantile": 0.2, "by_label": False}}
    changed = {**one.selection, "num_rejected": dict.fromkeys(sorted(order), 1), "thresholds": {**limits, **quantile}}
    rows = flow(replace(one, selection=changed))  # type: ignore[arg-type]
    assert [row.name for row in rows if row.kind == "rejected"] == order
    assert [row.note for row in rows if row.name == "no_label"] == ["labels that were only tried, or dropped"]


def test_the_flow_adds_up_to_what_came_in(run_folder: Path) -> None:
    for one in collect_run(run_folder).passes:
        total, *outcomes = flow(one)
        assert total.count == NUM_STEMS + 2 == sum(row.count for row in outcomes)
        assert [row.kind for row in outcomes] == ["failed", "rejected", "rejected", "kept"]
        assert sum(row.width for row in outcomes) == pytest.approx(100.0, abs=0.01)
        edges = [100.0, *(row.left for row in outcomes)]
        assert [before - row.width for before, row in zip(edges, outcomes, strict=False)] == pytest.approx(
            [row.left for row in outcomes], abs=0.01
        ), "each outcome begins where the one before it ends"
        assert outcomes[-1].left == pytest.approx(0.0, abs=0.01)
    assert [row.limit for row in outcomes] == ["", "≥ 8", "≥ -15", ""]


def test_counts_are_those_of_the_stored_selection(run_folder: Path) -> None:
    one = collect_run(run_folder).passes[1]
    kept = pq.read_table(run_folder / "iterations" / "2" / "tracks" / "kept.parquet")
    assert flow(one)[-1].count == len(kept)
    counts = one.stems.by_label()
    assert set(counts) == set(LABELS)
    assert sum(some for some, _ in counts.values()) == len(kept)
    assert sum(map(sum, counts.values())) == NUM_STEMS
    values = np.concatenate(one.stems.values("stem_level_db"))
    assert len(values) == NUM_STEMS and np.isfinite(values).all()


def test_limits_are_drawn_at_their_value(run_folder: Path) -> None:
    one = collect_run(run_folder).passes[0]
    assert number_limits(one) == {
        "re_sdr_db": ("min_re_sdr_db", LIMITS[0]["min_re_sdr_db"]),
        "stem_level_db": ("min_stem_level_db", LIMITS[0]["min_stem_level_db"]),
    }
    ruled, others = distributions(one)
    assert [plot.title for plot in ruled] == ["Re-SDR (dB)", "stem level (dB)"]
    assert [plot.title for plot in others] == ["remix SNR (dB)"]
    for plot, limit in zip(ruled, LIMITS[0].values(), strict=True):
        assert f"the limit is ≥ {limit:g}" in plot.description
        (line,) = [shape for shape in plot.shapes if shape.kind == "limit"]
        place, ticks = float(line.path[1:].split()[0]), [(float(tick.text), tick.x) for tick in plot.x_ticks]
        (low, low_x), (high, high_x) = ticks[0], ticks[-1]
        assert place == pytest.approx(low_x + (limit - low) * (high_x - low_x) / (high - low), abs=0.05)
        assert plot.marks[0].x == place


def test_a_quantile_is_drawn_where_the_filter_found_it(write_pass: Write) -> None:
    from engine.selection.thresholds import Quantile, Thresholds
    from engine.selection.tracks import select_tracks

    tone_T = np.zeros(100, np.float32)
    out = write_pass([(f"c{n}", "a", tone_T, {"re_sdr_db": float(n)}) for n in range(11)])
    select_tracks(out, out / "tracks", Thresholds(min_re_sdr_db=Quantile(quantile=0.4), rank_by="re_sdr_db"))
    one = collect_pass(out).passes[0]
    assert number_limits(one) == {"re_sdr_db": ("min_re_sdr_db", pytest.approx(4.0))}
    assert flow(one)[1].limit == "≥ quantile 0.4"


def test_the_sample_has_both_ends_and_both_sides_of_every_limit(run_folder: Path) -> None:
    one = collect_run(run_folder).passes[1]
    layers = {stratum.reason: stratum.places for stratum in strata(one)}
    assert set(layers) == {
        "best kept by remix SNR",
        "worst kept by remix SNR",
        "just rejected by min_re_sdr_db",
        "just rejected by min_stem_level_db",
        "just kept by min_re_sdr_db",
        "just kept by min_stem_level_db",
    }
    kept, _ = one.stems.values("remix_snr_db")
    (best,), (worst,) = (one.stems.rows(layers[f"{end} kept by remix SNR"][:1]) for end in ("best", "worst"))
    assert best["scores"]["remix_snr_db"] == kept.max() and worst["scores"]["remix_snr_db"] == kept.min()
    (near,) = one.stems.rows(layers["just rejected by min_re_sdr_db"][:1])
    rules, value_N, limit_N = one.stems.rejections()
    distance_N = np.abs(value_N - limit_N)[rules == "min_re_sdr_db"]
    assert near["rejected_by"] == "min_re_sdr_db"
    assert abs(near["rejected_value"] - near["rejected_limit"]) == pytest.approx(distance_N.min())
    assert len(draw(one, most=3)) == 3
    assert len({clip.clip_id for clip in draw(one, most=60)}) == len(draw(one, most=60))


def test_a_clip_has_its_stems_in_both_passes_and_its_mixture(run_folder: Path) -> None:
    clips = played_clips(collect_run(run_folder), max_mb=25)
    assert 5 <= len(clips) <= NUM_CLIPS
    for clip in clips:
        assert clip.duration_s == DURATION_S and not clip.is_cut
        assert [version.letter for version in clip.versions] == ["A", "B"]
        first, last = ([stem.label for stem in version.stems] for version in clip.versions)
        assert first == last
        assert base64.b64decode(clip.mixture.opus)[:4] == b"\x1a\x45\xdf\xa3", "WebM"
        picture = np.frombuffer(base64.b64decode(clip.mixture.picture), np.uint8)
        assert len(picture) == BANDS * COLUMNS and picture.max() == 255
    reasons = [stem.reason for clip in clips for stem in clip.versions[1].stems if stem.reason]
    assert any("best kept" in reason for reason in reasons)
    assert any(not score.passes for clip in clips for stem in clip.versions[1].stems for score in stem.scores)
    assert all(
        stem.is_kept == all(score.passes for score in stem.scores)
        for clip in clips
        for version in clip.versions
        for stem in version.stems
    )


def test_audio_stays_within_its_budget(run_folder: Path, tmp_path: Path) -> None:
    sizes = {}
    for max_mb in (0.0, 1.0, 25.0):
        page = write_run_report(run_folder, tmp_path / "page.html", max_mb=max_mb).read_text()
        found = re.search(r'id="sounds">(.*?)</script>', page)
        sizes[max_mb] = len(found[1]) if found else 0
    assert sizes[0.0] == 0 < sizes[1.0] <= 1.01e6 < sizes[25.0]


def test_numbers_at_a_glance(run_folder: Path) -> None:
    facts = collect_run(run_folder)
    found = {figure.name: figure for figure in glance(facts)}
    assert (found["SDRi"].value, found["SDRi"].note) == ("6.00", "seed 4.00 dB")
    assert found["Gain over the seed"].value == "+2.00"
    assert (found["Failures"].value, found["Failures"].note) == ("4", f"of {2 * (NUM_STEMS + 2)} queries")
    assert (found["Wall time"].value, found["Wall time"].unit) == ("3", "min")
    assert sentence(facts).startswith("2 iterations took the separator from 4.0 dB to 6.0 dB SDRi, 2.0 dB better than")
    assert sentence(facts).endswith("2 failed.")
    curve, *_ = learning(facts)
    assert "mean: 4.00 at 0, 5.00 at 1, 6.00 at 2" in curve.description
    table = labels_table(facts)
    assert table is not None
    line = next(row for row in table.rows if row[0] == LABELS[1])
    assert line[4:] == ["5.00", "6.00", "7.00", "+2.00"]
    wall = next(times(facts)).wall
    assert [(one.name, one.text) for one in wall] == [("pass", "2 s, 3.3%"), ("selection and evaluation", "58 s, 97%")]


def test_a_pass_without_selection_has_a_report(write_pass: Write, cli: Cli) -> None:
    tone_T = np.sin(np.arange(4000) / 5).astype(np.float32)
    out = write_pass([(f"c{n}", "a", tone_T, {"remix_snr_db": float(n)}) for n in range(6)])
    facts = collect_pass(out)
    assert [(row.kind, row.count) for row in flow(facts.passes[0])] == [("all", 6), ("kept", 6)]
    assert [stratum.reason.split()[0] for stratum in strata(facts.passes[0])] == ["best", "worst", "median"]
    assert sentence(facts) == "6 of 6 queries have a stem; none failed."
    value = cli("report", out, "--json").document()
    assert value == {"report": str(out / "report.html")}
    assert "report of a pass" in (out / "report.html").read_text()


def test_names_of_others_are_text(run_folder: Path) -> None:
    page = write_run_report(run_folder).read_text()
    assert page.count("<script>") == 1, "the page's own"
    assert MARKUP not in page and FILE not in page
    assert "\u202e" not in page and "\\u202e" in page
    assert "x" * 400 not in page.replace(json.dumps(LABELS[3])[1:-1], ""), "the exact label is in the data alone"
    assert "secret" not in page and "https://host/list.csv" in page
    assert "http" not in page.replace("http-equiv", "").replace("https://host/list.csv", ""), "no other address"


def test_a_report_is_the_same_again(run_folder: Path, tmp_path: Path) -> None:
    pages = [write_run_report(run_folder, tmp_path / f"{number}.html").read_bytes() for number in range(2)]
    assert pages[0] == pages[1]


def test_what_is_no_run_and_what_is_not_finished(cli: Cli, tmp_path: Path, run_folder: Path) -> None:
    assert "must be a run, a pass or a search" in cli("report", tmp_path).error()
    (run_folder / "summary.json").unlink()
    assert "none of its iterations is finished" in cli("report", run_folder).error()
    (run_folder / "iterations" / "1" / "stems" / "manifest.json").unlink()
    assert "the pass is not finished" in cli("report", run_folder / "iterations" / "1").error()


def test_a_run_is_compared_with_another(run_folder: Path, cli: Cli) -> None:
    facts = collect_run(run_folder)
    same = compare(facts, collect_run(run_folder))
    counts = {row[0]: int(row[1]) for row in same.tables[-1].rows}
    kept = flow(facts.passes[-1])[-1].count
    assert counts == {
        **{"kept by both": kept, "kept by this run only": 0, "kept by the other only": 0},
        "rejected by both": NUM_STEMS - kept,
    }
    young = replace(facts, records=facts.records[:2], passes=facts.passes[:1])
    other = compare(facts, young)
    counts = {row[0]: int(row[1]) for row in other.tables[-1].rows}
    assert sum(counts.values()) == NUM_STEMS
    assert counts["kept by both"] + counts["kept by the other only"] == flow(young.passes[0])[-1].count
    assert [row[3] for row in other.tables[1].rows] == ["+1.00"] * len(LABELS)
    assert other.plot is not None and "the other: 4.00 at 0, 5.00 at 1" in other.plot.description
    assert cli("report", run_folder, "--against", run_folder).code == 0
    assert 'id="compared"' in (run_folder / "report.html").read_text()
    assert "--against must be a run" in cli("report", run_folder, "--against", run_folder / "iterations").error()
    search = run_folder.parent / "search"
    search.mkdir()
    (search / "trials.parquet").touch()
    assert "--against must be a run" in cli("report", search, "--against", run_folder).error()


def test_clips_of_two_runs_are_played_one_after_the_other(run_folder: Path, write_pass: Write) -> None:
    """The other run lacks a clip, separated another worse, and has another file of the same name as a third."""
    facts, recorded = collect_run(run_folder), stems(2)
    loud = [(clip, label, 0.5 * tone_T, own) for clip, label, tone_T, own in recorded[2:]]
    mixtures = {recorded[index][0]: recorded[index][2] + recorded[index + 1][2] for index in range(2, 18, 2)}
    other = write_pass(loud, folder="other/iterations/1", mixtures=mixtures)
    alone = replace(collect_pass(other), records=facts.records)
    clips = {clip.clip_id: clip for clip in played_clips(facts, max_mb=25, other=alone)}
    letters = {clip_id: [version.letter for version in clip.versions] for clip_id, clip in clips.items()}
    assert len(clips) > 3
    assert letters == {
        clip_id: ["B"] if clip_id in (recorded[0][0], recorded[-1][0]) else ["A", "B"] for clip_id in clips
    }
    both = next(clip for clip in clips.values() if len(clip.versions) == 2)
    assert [version.name for version in both.versions] == ["the other, the pass", "this run, iteration 2"]
    theirs, ours = ([stem.label for stem in version.stems] for version in both.versions)
    assert theirs == ours
    assert both.versions[0].stems[0].sound.opus != both.versions[1].stems[0].sound.opus


def test_a_run_with_the_seed_alone_has_a_report(tmp_path: Path, run_folder: Path) -> None:
    records = json.loads((run_folder / "summary.json").read_text())["iterations"]
    write_json(tmp_path / "young" / "summary.json", {"iterations": records[:1]})
    (tmp_path / "young" / "iterations" / "0").mkdir(parents=True)
    page = write_run_report(tmp_path / "young").read_text()
    assert "The seed is ready." in page and 'id="listen"' not in page


def test_a_report_that_fails_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), only_warned("runs/first"):
        raise KeyError("colour")
    assert "cannot write the report of runs/first (KeyError: 'colour'); `clearsep report runs/first`" in caplog.text


def test_stems_come_in_the_order_in_which_they_are_asked_for(run_folder: Path) -> None:
    stems = collect_run(run_folder).passes[0].stems
    places = [Numbered(False, 3), Numbered(True, 0), Numbered(False, 0)]
    single = [stems.rows([place])[0] for place in places]
    assert stems.rows(places) == single
    clip = single[0]["clip_id"]
    assert [row["row"] for row in stems.of_clips([clip, "unknown"])[clip]] == sorted(
        row["row"] for row in stems.of_clips([clip])[clip]
    )
    assert len(stems.of_clips([clip])[clip]) == single[0]["num_stems"] == 2


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("remix_snr_db", ("remix SNR", " dB")),
        ("re_si_sdr_db", ("Re-SI-SDR", " dB")),
        ("share_si_sdr_db", ("share SI-SDR", " dB")),
        ("active_fraction", ("active", "")),
    ],
)
def test_scores_have_names_in_words(name: str, text: tuple[str, str]) -> None:
    assert score_text(name) == text


def test_small_texts() -> None:
    assert rule_text("max_mixture_coherence_fraction") == "mixture coherence" and rule_text("no_label") == "no label"
    assert [percent(1, 3), percent(1, 200), percent(0, 0)] == ["33%", "0.5%", "0%"]
    assert [duration_text(5.2), duration_text(150.0), duration_text(9000.0)] == ["5 s", "2 min", "2.5 h"]
    assert without_secrets("a: s3://key:word@bucket/x?token=1 b") == "a: s3://bucket/x b"
    assert all(map(is_number, ("-0.5", "1,234", "33%", "5.60 ± 0.20", "+1"))) and not is_number("2.11.0")


def test_failures_are_among_the_clips_to_listen_to(write_pass: Write, cli: Cli) -> None:
    tone_T = np.sin(np.arange(4000) / 5).astype(np.float32)
    found = [(f"c{n}", "rain", tone_T, {"remix_snr_db": float(n)}) for n in range(30)]
    clip = {"clip_id": "c20", "path": "c20.wav", "labels": ["rain", MARKUP], "start_s": None, "end_s": None}
    lost = [{**clip, "clip_id": f"lost{n}", "path": f"lost{n}.wav"} for n in range(5)]
    failures = [dict(failure(one, step="decode", error=OSError(f"cannot read {MARKUP}"))) for one in lost]
    failures += [dict(failure(clip, step="separate", error=ValueError("NaN at 3 s"), label=MARKUP))]
    out = write_pass(found, failures=failures)
    facts = collect_pass(out)
    clips = {one.clip_id: one for one in played_clips(facts, max_mb=25)}
    (version,) = clips["c20"].versions
    assert [(one.label, one.error) for one in version.failed] == [(MARKUP, "separate: ValueError: NaN at 3 s")]
    assert [(stem.label, stem.reason) for stem in version.stems] == [("rain", "")]
    assert not any(version.failed for name, one in clips.items() if name != "c20" for version in one.versions)
    error = f"decode: OSError: cannot read {MARKUP}"
    assert failed_clips(facts.passes[0]).rows == [["lost0.wav", error], ["lost1.wav", error]], "examples of one error"
    for words in ((), ("--max-mb", 0)):
        assert cli("report", out, *words).code == 0
        page = (out / "report.html").read_text()
        assert ("NaN at 3 s</p>" in page) is not bool(words)
        assert "there is no audio of them" in page and "lost1.wav" in page and MARKUP not in page


def test_true_sources_give_a_true_si_sdr(write_pass: Write, cli: Cli, tmp_path: Path) -> None:
    """Each stem is its source with noise at right angles to it, so its SI-SDR is the ratio of their energies."""
    time_T = np.arange(4000) / 8000
    source_T, noise_T = (np.sin(2 * np.pi * hz * time_T) for hz in (200, 400))
    levels = {"c0": 10.0, "c1": 20.0, "c2": 30.0, "..": 40.0}
    found = [
        (clip, label, (source_T + 10 ** (-level / 20) * noise_T).astype(np.float32), {"remix_snr_db": level})
        for clip, level in levels.items()
        for label in ("rain", "../../outside")
    ]
    out = write_pass(found)
    for clip in ("c0", "c1"):
        (tmp_path / "truth" / clip).mkdir(parents=True, exist_ok=True)
        soundfile.write(tmp_path / "truth" / clip / "rain.flac", 0.5 * source_T, 8000, subtype="PCM_24")
    for outside in (tmp_path / "outside.flac", tmp_path / "rain.flac", out / "rain.flac"):
        soundfile.write(outside, 0.5 * source_T, 8000, subtype="PCM_24")
    select_tracks(out, out / "tracks", Thresholds(min_remix_snr_db=15.0, rank_by="remix_snr_db"))
    truth = Truth(folder=tmp_path / "truth")
    facts = collect_pass(out)
    stems = [
        (clip.clip_id, stem.label, [score.value for score in stem.scores if score.name == "true SI-SDR"])
        for clip in played_clips(facts, max_mb=25, truth=truth)
        for stem in clip.versions[0].stems
    ]
    wanted = {"c0": ["10.0 dB"], "c1": ["20.0 dB"]}
    assert len(stems) == 8
    assert all(value == (wanted.get(clip, []) if label == "rain" else []) for clip, label, value in stems)
    sentence = "True SI-SDR, mean: 20.0 dB over 1 kept stems, 10.0 dB over 1 rejected stems."
    assert cli("report", out, "--truth", tmp_path / "truth").code == 0
    assert sentence in (out / "report.html").read_text()
    assert "--truth must be a folder of true sources" in cli("report", out, "--truth", tmp_path / "none").error()


def damage(path: Path, share: float = 0.5) -> None:
    """Change a byte of a file at a place between its begin (0) and its end (1)."""
    data = bytearray(path.read_bytes())
    data[int(share * (len(data) - 1))] ^= 0xFF
    path.write_bytes(bytes(data))


def split_shards(out: Path, names: Sequence[str]) -> None:
    """Give a pass further shards, with copies of the clips of its first one under other ids."""
    first = out / "stems" / "shard-000000-0000.parquet"
    manifest = json.loads((out / "stems" / "manifest.json").read_text())
    for name in names:
        table = pq.read_table(first)
        ids = pa.array([f"{one}-{name}" for one in table["clip_id"].to_pylist()])
        table = table.set_column(table.schema.get_field_index("clip_id"), table.schema.field("clip_id"), ids)
        record = write_shard(out, name, stems=table, failures=[])
        write_record(out, name, record)
        manifest["shards"][name] = record["sha256"]
        manifest.setdefault("footer_sha256", {})[name] = record["footer_sha256"]
        manifest["num_stems"] += record["num_stems"]
    write_json(out / "stems" / "manifest.json", manifest)


@pytest.mark.parametrize("share", [0.3, 1.0], ids=["a page", "the footer"])
def test_a_damaged_shard_is_left_out_and_named(write_pass: Write, cli: Cli, share: float) -> None:
    noise_T = np.random.default_rng(0).normal(0.0, 0.1, 4000).astype(np.float32)
    out = write_pass([(f"c{n}", "a", noise_T, {"remix_snr_db": float(n)}) for n in range(4)])
    split_shards(out, [second := "shard-000001-0000", missing := "shard-000002-0000"])
    damage(out / "stems" / f"{second}.parquet", share)
    (out / "stems" / f"{missing}.parquet").unlink()
    found = cli("report", out, "--tensorboard", out / "events")
    assert found.code == 0 and any((out / "events").rglob("events*"))
    page = (out / "report.html").read_text()
    sentence = f"2 shards of the pass are damaged or missing, so that clips are left out: {second}, {missing}"
    assert page.count(sentence) == 2, "at its scores and where one listens"
    assert sentence in " ".join(found.err.split())
    assert f"clearsep separate-corpus ... -o {out}" in page
    clips = played_clips(collect_pass(out), max_mb=25)
    assert {clip.clip_id for clip in clips} == {"c0", "c1", "c2", "c3"}


def test_what_cannot_be_read_does_not_end_the_report_of_a_run(run_folder: Path, cli: Cli) -> None:
    """The first pass has no audio, the second no verdicts, and the records come from the iterations' own files."""
    first, second = (run_folder / "iterations" / str(number) for number in (1, 2))
    for record in json.loads((run_folder / "summary.json").read_text())["iterations"]:
        out = run_folder / "iterations" / str(record["iteration"])
        out.mkdir(exist_ok=True)
        write_json(out / "iteration.json", record)
    shard = "shard-000000-0000"
    damage(first / "stems" / f"{shard}.parquet", 1.0)
    damage(second / "tracks" / "kept.parquet")
    damage(second / "failures" / f"{shard}.parquet")
    (run_folder / "summary.json").write_text("{")
    found = cli("report", run_folder)
    assert found.code == 0
    page, said = (run_folder / "report.html").read_text(), " ".join(found.err.split())
    for text in (
        f"1 shard of iteration 1 is damaged or missing, so that clips are left out: {shard}",
        "summary.json of",
    ):
        assert text in page and text in said
    assert "tracks of iteration 2 cannot be read and is left out: cannot use" in page
    assert f"1 shard of iteration 2 is damaged or missing, so that clips are left out: {shard}" in page
    facts = collect_run(run_folder)
    assert [record["iteration"] for record in facts.records] == [0, 1, 2]
    assert not facts.passes[1].stems.is_judged and facts.passes[0].stems.is_judged
    assert all([version.letter for version in clip.versions] == ["B"] for clip in played_clips(facts, max_mb=25))
    damage(first / "stems" / "manifest.json", 0.0)
    assert "iteration 1 of the run cannot be read and is left out: cannot read" in " ".join(
        cli("report", run_folder).err.split()
    )
