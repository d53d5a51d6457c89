"""The command line as a user sees it: help, nothing but JSON on standard output, one line per error, exit codes."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import typer

import clearsep
from engine.cli.console import exit_codes, show_progress
from engine.schema import SCORES
from engine.selection.tracks import read_tracks
from tests.support import ROOT
from tests.support.command import Cli, spawn

RATE_HZ = 8000
LABELS = ("bell", "dog", "rain")
PROMISES = {
    "demo": "Synthesise a corpus, train a seed on little of it, run two iterations and report the gain",
    "run": "Take a corpus through all iterations: separate, score, filter, distil, evaluate",
    "label": "Label recordings without labels",
    "tune": "Search for the schedule of thresholds that gives the best separator",
    "separate": "Separate any audio files: one file for each input and query",
    "separate-corpus": "Run one engine pass: separate and score every clip",
    "plan": "Predict hours, bytes and failures of a pass from a sample",
    "filter": "Select tracks again from stored scores, with other thresholds",
    "calibrate": "Calibrate the estimate of a stem's SI-SDR on mixtures",
    "distil": "Train a separator on tracks and single-source clips",
    "evaluate": "Measure a separator on seeded mixtures of single-source clips",
    "score": "Score the stems of a mixture and apply thresholds to them",
    "convert": "Convert a checkpoint of AudioSep, CLAPSep or CLAP into a folder of this project",
    "export": "Write tracks or a separator in a format that other programs load",
    "failures": "List failures: first the reasons with their counts",
    "report": "Write the report of a run, a pass or a search: one HTML page",
    "watch": "Show what a run, a pass or a search is at, until it is done",
    "inspect": "Show the contents of a run, a pass",
    "settings": "List settings with type, range, default and meaning",
    "preflight": "Check every node of a cluster before a long job",
}
GOOD = {
    "re_sdr_db": 20.0,
    "re_si_sdr_db": 20.0,
    "remix_snr_db": 20.0,
    "stem_level_db": -3.0,
    "coherence_fraction": 0.1,
}
Write = Callable[..., Path]


def tone(hz: float, *, gain: float = 0.3, duration_s: float = 0.5) -> np.ndarray:
    return (gain * np.sin(2 * np.pi * hz * np.arange(round(duration_s * RATE_HZ)) / RATE_HZ)).astype(np.float32)


@pytest.fixture
def clips(write_sources: Write) -> Path:
    rows = [
        (f"{label}-{fold}-{i}", label, fold, tone(300 + 500 * k + 50 * i + 20 * fold))
        for k, label in enumerate(LABELS)
        for fold in (1, 2)
        for i in range(2)
    ]
    return write_sources(rows)


@pytest.fixture
def finished_pass(write_pass: Write) -> Path:
    return write_pass(
        [
            ("clip0", "bell", tone(300), GOOD),
            ("clip0", "dog", tone(800), GOOD | {"stem_level_db": -45.0}),
            ("clip1", "dog", tone(900), GOOD | {"re_sdr_db": 12.0}),
        ]
    )


@pytest.fixture
def mixed(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Files of a mixture and of its two true stems."""
    dog_T, rain_T = tone(400), tone(1300, gain=0.1)
    files = tmp_path / "mixture.wav", tmp_path / "dog.wav", tmp_path / "rain.wav"
    for path, samples_T in zip(files, (dog_T + rain_T, dog_T, rain_T), strict=True):
        soundfile.write(path, samples_T, RATE_HZ, subtype="FLOAT")
    return files


# Help.


def test_help_describes_the_tool_and_lists_every_command(cli: Cli) -> None:
    outcome = cli("--help")
    assert outcome.code == 0
    assert "Turn natural recordings into clean separated tracks and a better separator" in outcome.out
    assert "Exit codes: 0 done, 1 failed (finished work is kept)" in outcome.out
    for name, promise in PROMISES.items():
        assert f" {name} " in outcome.out
        assert promise in outcome.out


def test_every_command_is_tested_here() -> None:
    commands = clearsep.command_line().registered_commands
    assert {command.name or str(command.callback.__name__) for command in commands} == {*PROMISES, "submit"}


@pytest.mark.parametrize("command", PROMISES)
def test_help_of_a_command_describes_it_and_its_options(cli: Cli, command: str) -> None:
    outcome = cli(command, "--help")
    assert outcome.code == 0
    assert PROMISES[command] in outcome.out
    assert "--json" in outcome.out
    assert "Print the result as JSON and nothing else" in outcome.out


def test_no_command_shows_the_help(cli: Cli) -> None:
    outcome = cli()
    assert "Turn natural recordings" in outcome.out + outcome.err


def test_help_in_a_process_of_its_own() -> None:
    outcome = spawn("--help")
    assert (outcome.code, outcome.err) == (0, "")
    assert "separate-corpus" in outcome.out


def test_help_loads_neither_torch_nor_ray() -> None:
    """Both take seconds, and a user asks for help often."""
    code = """if True:
        import sys, clearsep
        sys.argv = ["clearsep", "run", "--help"]
        try:
            clearsep.main()
        except SystemExit:
            print([name for name in ("torch", "ray", "pyarrow") if name in sys.modules])
        """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


# Wrong command lines.


def test_an_unknown_command_exits_2() -> None:
    outcome = spawn("seperate")
    assert (outcome.code, outcome.out) == (2, "")
    assert "No such command 'seperate'" in outcome.err
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize(
    ("words", "missing"),
    [
        (["evaluate", "--clips", "clips.csv"], "SEPARATOR"),
        (["evaluate", "separator"], "--clips"),
        (["filter", "pass"], "--out"),
        (["run", "laptop"], "--out"),
        (["distil", "-o", "out"], "--from"),
        (["score", "mixture.wav"], "STEMS"),
        (["inspect", "--jsno"], "--jsno"),
        (["evaluate", "separator", "--clips", "c.csv", "--num-mixtures", "many"], "--num-mixtures"),
    ],
)
def test_a_wrong_command_line_exits_2_and_names_what_is_wrong(cli: Cli, words: list[str], missing: str) -> None:
    outcome = cli(*words)
    assert (outcome.code, outcome.out) == (2, "")
    assert missing.lower() in outcome.err.lower()


# evaluate.


def test_evaluate_prints_one_json_document(cli: Cli, clips: Path, write_checkpoint: Write) -> None:
    words = ["evaluate", write_checkpoint(LABELS), "--clips", clips, "--num-mixtures", 4, "--json"]
    report = cli(*words, "--folds", 1, "--seed", 5).document()
    assert (report["num_mixtures"], report["num_stems"]) == (4, 8)
    assert set(report) >= {"sdr_db", "sdri_db", "si_sdr_db", "si_sdri_db", "sdri_standard_error_db", "by_label"}
    assert set(report["by_label"]) <= set(LABELS)
    assert cli(*words, "--folds", 1, "--seed", 5).document() == report
    assert cli(*words, "--folds", 1, "--seed", 6).document() != report
    assert cli(*words, "--folds", 1, "--num-sources", 3).document()["num_stems"] == 12


def test_evaluate_reads_a_published_list(cli: Cli, clips: Path, tmp_path: Path, write_checkpoint: Write) -> None:
    """Three of the clips as CLAPSep's list would have them; one row's audio is missing and one's class unknown."""
    rows = [
        "source_file,positive_caption,noise_file,negative_caption",
        "bell-1-0.wav,the sound of bell,dog-1-0.wav,the sound of dog",
        "dog-1-1.wav,the sound of dog,rain-1-0.wav,the sound of rain",
        "gone.wav,the sound of dog,rain-1-0.wav,the sound of rain",
        "dog-1-1.wav,the sound of whale,rain-1-0.wav,the sound of rain",
    ]
    (tmp_path / "esc_eval.csv").write_text("\n".join(rows))
    words = ["evaluate", write_checkpoint(LABELS), "--list", tmp_path / "esc_eval.csv", "--audio", clips.parent]
    report = cli(*words, "--json").document()
    assert (report["num_rows"], report["num_mixtures"], report["num_failed"]) == (4, 2, 2)
    assert report["num_failed_by_reason"] == {"missing audio": 1, "refused by the separator": 1}
    assert set(report["paper"]) == {"rule", "bss_sdri_db", "si_sdri_db", "confidence_95"}
    assert report["num_absent_queries"] == 2
    table = cli(*words).out
    assert "2 mixtures of esc_eval.csv (CLAPSep), 2 failed" in table
    assert "paper: mean" in table


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--clips", "c.csv", "--list", "l.csv", "--audio", "."], "must have either --clips, or --list with --audio"),
        (["--list", "l.csv"], "must have either --clips, or --list with --audio"),
        (["--clips", "c.csv", "--audio", "."], "must have either --clips, or --list with --audio"),
        (
            ["--list", "l.csv", "--audio", ".", "--num-mixtures", 3],
            "leave out --folds, --num-mixtures and --num-sources",
        ),
        (["--list", "l.csv", "--audio", ".", "--columns", "path=p"], "--columns and --audio-root"),
        (["--list", "l.csv", "--audio", ".", "--set", "same_label_fraction=1"], "and --set"),
        (["--list", "nowhere.csv", "--audio", "."], "nowhere.csv"),
    ],
)
def test_evaluate_takes_clips_or_a_list(cli: Cli, words: list[object], reason: str) -> None:
    assert reason in cli("evaluate", "separator", *words).error()


def test_evaluate_reads_a_list_with_other_columns(
    cli: Cli, clips: Path, tmp_path: Path, write_checkpoint: Write
) -> None:
    text = clips.read_text().replace("path,label,fold", "filename,category,fold", 1)
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "esc50.csv").write_text(text)
    words = ["--num-mixtures", 2, "--json"]
    named = ["--columns", "path=filename,label=category", "--audio-root", clips.parent]
    separator = write_checkpoint(LABELS)
    report = cli("evaluate", separator, "--clips", tmp_path / "meta" / "esc50.csv", *named, *words).document()
    assert report == cli("evaluate", separator, "--clips", clips, *words).document()
    (tmp_path / "meta" / "absolute.csv").write_text(f"path,label\n{clips.parent}/bell-1-0.wav,bell\n")
    refused = ["evaluate", separator, "--clips", tmp_path / "meta" / "absolute.csv"]
    assert "--allow-outside" in cli(*refused).error()
    assert "mixtures of 2 sources" in cli(*refused, "--allow-outside").error(), "it is read, and has one label"


@pytest.mark.parametrize("name", ["separate-corpus", "plan", "inspect", "calibrate", "distil", "evaluate"])
def test_every_command_that_takes_a_list_takes_its_columns_and_its_root(cli: Cli, name: str) -> None:
    text = cli(name, "--help").out
    assert all(option in text for option in ("--columns", "--audio-root", "--allow-outside"))


def test_inspect_of_a_corpus_takes_its_columns_and_says_what_is_outside(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text('fname,tags\n1,"Male speech, man speaking;Rain"\n/etc/passwd,Rain\n')
    words = ["inspect", tmp_path / "m.csv", "--columns", "path=fname,labels=tags", "--json"]
    report = cli(*words).document()
    assert report["labels"] == {"Male speech, man speaking": 1, "Rain": 1} and report["num_failed"] == 1
    assert cli(*words, "--allow-outside").document()["num_failed"] == 0


def test_evaluate_shows_a_table(cli: Cli, clips: Path, write_checkpoint: Write) -> None:
    outcome = cli("evaluate", write_checkpoint(LABELS), "--clips", clips, "--num-mixtures", 2)
    assert (outcome.code, outcome.err) == (0, "")
    assert "2 mixtures" in outcome.out
    assert all(
        column in outcome.out for column in ("BSS SDRi dB", "SI-SDRi dB", "absent dB", "all, median", "all, 95 %")
    )


def test_evaluate_takes_settings_of_its_mixtures(cli: Cli, clips: Path, write_checkpoint: Write) -> None:
    words = ["evaluate", write_checkpoint(LABELS), "--clips", clips, "--num-mixtures", 2, "--set"]
    report = cli(*words, "same_label_fraction=1", "--json").document()
    assert (report["num_same_label"], len(report["confidence_95"]["capi_sdri_db"])) == (2, 2)
    assert "CAPI-SDRi dB" in cli(*words, "same_label_fraction=1").out
    assert "must say how its clips are mixed, got ['clips']" in cli(*words, "clips=c.csv").error()
    assert (
        "there is no setting same_labels; did you mean 'same_label_fraction'?" in cli(*words, "same_labels=1").error()
    )


def test_evaluate_names_a_label_that_the_separator_does_not_know(
    cli: Cli, clips: Path, write_checkpoint: Write
) -> None:
    outcome = cli("evaluate", write_checkpoint(("bell", "dog", "rainfall")), "--clips", clips, "--json")
    assert "there is no label 'rain' in the separator; did you mean 'rainfall'?" in outcome.error()


def test_evaluate_of_a_folder_that_is_no_checkpoint(cli: Cli, clips: Path, tmp_path: Path) -> None:
    assert "there is no separator in" in cli("evaluate", tmp_path, "--clips", clips).error()


def test_evaluate_of_damaged_weights(cli: Cli, clips: Path, write_checkpoint: Write) -> None:
    folder = write_checkpoint(LABELS)
    weights = folder / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    assert "weights.safetensors" in cli("evaluate", folder, "--clips", clips).error()


def test_evaluate_of_clips_that_are_not_there(cli: Cli, tmp_path: Path, write_checkpoint: Write) -> None:
    outcome = cli("evaluate", write_checkpoint(LABELS), "--clips", tmp_path / "nowhere.csv")
    assert "nowhere.csv" in outcome.error()


def test_evaluate_of_a_fold_that_is_not_there(cli: Cli, clips: Path, write_checkpoint: Write) -> None:
    outcome = cli("evaluate", write_checkpoint(LABELS), "--clips", clips, "--folds", 7)
    assert "folds must include one of [1, 2], got [7]" in outcome.error()


def test_evaluate_of_a_clip_that_is_missing(cli: Cli, clips: Path, write_checkpoint: Write) -> None:
    for file in clips.parent.glob("dog-*.wav"):
        file.unlink()
    assert "dog-" in cli("evaluate", write_checkpoint(LABELS), "--clips", clips).error()


@pytest.mark.parametrize(("option", "name"), [("--num-mixtures", "num_mixtures"), ("--num-sources", "num_sources")])
def test_evaluate_of_nothing(cli: Cli, clips: Path, write_checkpoint: Write, option: str, name: str) -> None:
    assert name in cli("evaluate", write_checkpoint(LABELS), "--clips", clips, option, 0).error()


# filter.


def test_filter_prints_one_json_document_and_writes_the_tracks(cli: Cli, finished_pass: Path, tmp_path: Path) -> None:
    words = ["--set", "min_re_sdr_db=15", "--set", "min_stem_level_db=-20", "--json"]
    manifest = cli("filter", finished_pass, "-o", tmp_path / "strict", *words).document()
    assert (manifest["num_stems"], manifest["num_kept"]) == (3, 1)
    assert manifest["num_rejected"] == {"min_re_sdr_db": 1, "min_stem_level_db": 1}
    assert manifest["thresholds"]["min_re_sdr_db"] == 15.0
    assert json.loads((tmp_path / "strict" / "manifest.json").read_text()) == manifest
    index, _ = read_tracks(tmp_path / "strict")
    assert index.select(["clip_id", "label"]).to_pylist() == [{"clip_id": "clip0", "label": "bell"}]


def test_filter_again_with_other_thresholds_replaces_the_selection(
    cli: Cli, finished_pass: Path, tmp_path: Path
) -> None:
    out = ["-o", tmp_path / "tracks", "--json"]
    assert cli("filter", finished_pass, *out).document()["num_kept"] == 3
    manifest = cli("filter", finished_pass / "stems", *out, "--set", "min_re_sdr_db=30").document()
    assert (manifest["num_kept"], manifest["num_rejected"]) == (0, {"min_re_sdr_db": 3})
    assert len(read_tracks(tmp_path / "tracks")[0]) == 0


def test_filter_shows_a_table(cli: Cli, finished_pass: Path, tmp_path: Path) -> None:
    outcome = cli("filter", finished_pass, "-o", tmp_path / "tracks", "--set", "min_re_sdr_db=15")
    assert (outcome.code, outcome.err) == (0, "")
    assert "3 stems" in outcome.out
    assert "rejected by min_re_sdr_db" in outcome.out


def test_filter_names_the_nearest_threshold(cli: Cli, finished_pass: Path, tmp_path: Path) -> None:
    outcome = cli("filter", finished_pass, "-o", tmp_path / "tracks", "--set", "min_re_sdr=15", "--json")
    assert "there is no setting min_re_sdr; did you mean 'min_re_sdr_db'?" in outcome.error()
    assert not (tmp_path / "tracks").exists()


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("min_re_sdr_db=high", "min_re_sdr_db must be "),
        ("min_re_sdr_db", "--set must be key=value, got 'min_re_sdr_db'"),
        ("min_re_sdr_db=.nan", "must be "),
        ("min_re_sdr_db=[1", "--set must have a YAML value, got 'min_re_sdr_db=[1'"),
    ],
)
def test_filter_by_what_is_no_threshold(
    cli: Cli, finished_pass: Path, tmp_path: Path, setting: str, reason: str
) -> None:
    assert reason in cli("filter", finished_pass, "-o", tmp_path / "tracks", "--set", setting).error()


def test_filter_of_what_is_no_pass(cli: Cli, tmp_path: Path) -> None:
    assert "(there is no pass)" in cli("filter", tmp_path / "nowhere", "-o", tmp_path / "tracks").error()
    (tmp_path / "begun" / "stems").mkdir(parents=True)
    (tmp_path / "begun" / "stems" / "pass.json").write_text("{}")
    assert "(the pass is not finished)" in cli("filter", tmp_path / "begun", "-o", tmp_path / "tracks").error()
    assert not (tmp_path / "tracks").exists()


# score.


def test_score_of_the_true_stems(cli: Cli, mixed: tuple[Path, ...]) -> None:
    outcome = cli("score", *mixed, "--json")
    assert "the default thresholds apply, without min_tagger_margin_db, min_estimated_si_sdr_db" in outcome.err
    stems = outcome.document()["stems"]
    assert [stem["label"] for stem in stems] == ["dog", "rain"]
    for stem, level_db in zip(stems, (-0.458, -10.0), strict=True):
        assert set(stem) >= {"label", "kept", "rejected_by", "scores"}
        assert (stem["kept"], stem["rejected_by"]) == (True, None)
        assert list(stem["scores"]) == SCORES.names
        assert stem["scores"]["remix_snr_db"] > 80
        assert stem["scores"]["re_sdr_db"] > 80
        assert stem["scores"]["stem_level_db"] == pytest.approx(level_db, abs=0.05)
        assert stem["scores"]["coherence_fraction"] < 0.2


def test_score_rejects_by_thresholds_and_takes_labels(cli: Cli, mixed: tuple[Path, ...]) -> None:
    words = ["--labels", "dog bark, heavy rain", "--set", "min_remix_snr_db=60", "--set", "min_stem_level_db=-5"]
    stems = cli("score", *mixed, *words, "--json").document()["stems"]
    assert [(stem["label"], stem["kept"], stem["rejected_by"]) for stem in stems] == [
        ("dog bark", True, None),
        ("heavy rain", False, "min_stem_level_db"),
    ]


def test_score_of_half_the_mixture_in_every_stem(cli: Cli, mixed: tuple[Path, ...], tmp_path: Path) -> None:
    """Remix scores are perfect; coherence detects it."""
    half_T, halves = 0.5 * soundfile.read(mixed[0], dtype="float32")[0], [tmp_path / "a.wav", tmp_path / "b.wav"]
    for path in halves:
        soundfile.write(path, half_T, RATE_HZ, subtype="FLOAT")
    stems = cli("score", mixed[0], *halves, "--set", "max_coherence_fraction=0.8", "--json").document()["stems"]
    assert all(stem["scores"]["remix_snr_db"] > 80 for stem in stems)
    assert [stem["rejected_by"] for stem in stems] == ["max_coherence_fraction"] * 2


def test_score_of_one_stem_has_no_coherence(cli: Cli, mixed: tuple[Path, ...]) -> None:
    (stem,) = cli("score", mixed[0], mixed[1], "--set", "max_coherence_fraction=0.1", "--json").document()["stems"]
    assert (stem["scores"]["coherence_fraction"], stem["kept"]) == (None, True)
    assert stem["scores"]["remix_snr_db"] == pytest.approx(10.0, abs=0.1)


def test_score_shows_a_table(cli: Cli, mixed: tuple[Path, ...]) -> None:
    outcome = cli("score", *mixed, "--set", "min_stem_level_db=-5")
    assert (outcome.code, outcome.err) == (0, "")
    assert "no: min_stem_level_db" in outcome.out
    assert "remix_snr_db" in outcome.out


@pytest.mark.parametrize("labels", ["dog", "dog,dog", "dog,rain,wind", "dog,rain,rain"])
def test_score_needs_as_many_different_labels_as_stems(cli: Cli, mixed: tuple[Path, ...], labels: str) -> None:
    assert "--labels" in cli("score", *mixed, "--labels", labels).error()


def test_score_takes_labels_with_commas(cli: Cli, mixed: tuple[Path, ...]) -> None:
    stems = cli("score", *mixed, "--labels", "Male speech, man speaking;Rain", "--json").document()["stems"]
    assert [stem["label"] for stem in stems] == ["Male speech, man speaking", "Rain"]


def test_score_of_a_file_that_is_missing_or_no_audio(cli: Cli, mixed: tuple[Path, ...], tmp_path: Path) -> None:
    assert "nowhere.wav" in cli("score", tmp_path / "nowhere.wav", *mixed[1:]).error()
    assert "nowhere.wav" in cli("score", *mixed, tmp_path / "nowhere.wav").error()
    (tmp_path / "notes.wav").write_text("these are notes")
    assert "notes.wav" in cli("score", *mixed, tmp_path / "notes.wav").error()


def test_score_names_the_nearest_threshold(cli: Cli, mixed: tuple[Path, ...]) -> None:
    outcome = cli("score", *mixed, "--set", "min_remix_sdr_db=5")
    assert "there is no setting min_remix_sdr_db; did you mean 'min_remix_snr_db'?" in outcome.error()


# inspect.


def test_inspect_prints_one_json_document(
    cli: Cli, finished_pass: Path, clips: Path, write_checkpoint: Write, tmp_path: Path
) -> None:
    cli("filter", finished_pass, "-o", tmp_path / "tracks")
    shard = finished_pass / "stems" / "shard-000000-0000.parquet"
    things = {
        "pass": finished_pass,
        "tracks": tmp_path / "tracks",
        "stems": shard,
        "checkpoint": write_checkpoint(LABELS),
        "corpus": clips,
    }
    for kind, path in things.items():
        assert cli("inspect", path, "--json").document()["kind"] == kind
        outcome = cli("inspect", path)
        assert (outcome.code, outcome.err) == (0, "")
        assert outcome.out.strip()


def test_inspect_of_nothing_in_a_process_of_its_own(tmp_path: Path) -> None:
    outcome = spawn("inspect", tmp_path / "nowhere", "--json")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("error: ")
    assert "Traceback" not in outcome.err


# run, separate-corpus and distil check their settings before anything is started.


def test_run_names_the_nearest_recipe_and_setting(cli: Cli, tmp_path: Path) -> None:
    out = ["-o", tmp_path / "run"]
    assert "did you mean 'laptop'?" in cli("run", "labtop", *out).error()
    words = ["--set", "corpus=a.csv", "--set", "clean=b.csv", "--set", "distil.step=4"]
    assert "there is no setting distil.step; did you mean 'steps'?" in cli("run", "laptop", *out, *words).error()
    assert "corpus must be set" in cli("run", "laptop", *out).error()
    assert not (tmp_path / "run").exists()


def test_run_of_a_file_that_is_not_yaml(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("corpus: [1, 2\nclean: x")
    assert "run.yaml as YAML" in cli("run", tmp_path / "run.yaml", "-o", tmp_path / "run").error()


def test_separate_corpus_names_what_is_wrong(cli: Cli, tmp_path: Path, write_checkpoint: Write) -> None:
    out = ["--separator", write_checkpoint(LABELS), "-o", tmp_path / "pass"]
    assert "nowhere.csv" in cli("separate-corpus", tmp_path / "nowhere.csv", *out).error()
    outcome = cli("separate-corpus", tmp_path / "nowhere.csv", *out, "--set", "clip=5")
    assert "there is no setting clip; did you mean 'clip_s'?" in outcome.error()
    assert not (tmp_path / "pass").exists()


def test_distil_names_what_is_wrong(cli: Cli, tmp_path: Path) -> None:
    out = ["-o", tmp_path / "student", "--from", "scratch"]
    assert "training data must have clean clips or tracks, got neither" in cli("distil", *out).error()
    outcome = cli("distil", *out, "--clean", "clips.csv", "--set", "distil.lerning_rate=1")
    assert "there is no setting distil.lerning_rate; did you mean 'learning_rate'?" in outcome.error()


# Errors.


def test_an_error_is_one_line_on_a_narrow_terminal_too(cli: Cli, tmp_path: Path) -> None:
    """A script that reads the last line of standard error gets all of it, and a path can be copied."""
    path = tmp_path / "a folder with a long name" / "and another in it whose name is long as well" / "nowhere.csv"
    assert str(path) in cli("inspect", path, columns=80).error()


# Progress.


def test_progress_is_whole_lines_on_standard_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A log file gets each message as one line, without markup; the level from WARNING on."""
    monkeypatch.setenv("COLUMNS", "40")
    show_progress()
    long = "iteration 1: " + "separated [bold]3[/bold] of 4 clips, " * 5
    logging.getLogger("engine.passes.run").info(long)
    logging.getLogger("tune.run").warning("be careful")
    logging.getLogger("train.distil").debug("not shown")
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.splitlines() == [long, "warning: be careful"]


@pytest.mark.skipif(not shutil.which("unshare"), reason="needs unshare")
def test_a_user_without_a_name_and_a_home_gets_both() -> None:
    """As in a container that runs as a number; torch's optimisers and Ray Train ask for them."""
    code = "import clearsep, getpass, pathlib; clearsep._name_user(); print(getpass.getuser(), pathlib.Path.home())"
    env = {name: value for name, value in os.environ.items() if name not in ("HOME", "USER", "LOGNAME", "USERNAME")}
    command = ["unshare", "-U", "--map-user=12345", "--map-group=12345", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, check=False)
    if "unshare failed" in done.stderr:
        pytest.skip("user namespaces are not allowed here")
    assert done.stdout.split() == ["user-12345", tempfile.gettempdir()], done.stderr


def test_an_error_that_a_library_makes_of_the_interrupt_ends_as_terminated() -> None:
    with pytest.raises(SystemExit) as stopped, exit_codes():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        except KeyboardInterrupt:
            raise RuntimeError("cannot start Ray (interrupted); start again") from None
    assert stopped.value.code == 143


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_that_a_library_loses_comes_again(number: int, code: int) -> None:
    """As in a callback, whose exceptions Python does not raise; the clean-up of the next one is not interrupted."""
    cleaned: list[bool] = []
    app = typer.Typer()

    @app.command()
    def endless() -> None:
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), number)
            time.sleep(5)
        try:
            time.sleep(5)
        finally:
            time.sleep(0.5)
            cleaned.append(True)

    with pytest.raises(SystemExit) as stopped, exit_codes():
        app(args=[])
    assert stopped.value.code == code and cleaned
