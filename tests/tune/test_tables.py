"""Tables of hand-made summaries, and reports of everything that a run leaves on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.cli.tables import Table, pass_table, scores_table, tracks_table
from engine.schema import failure
from engine.selection.thresholds import Quantile, Thresholds
from engine.selection.tracks import select_tracks
from engine.storage.files import write_json
from train.tables import evaluation_table
from tune.tables import inspect, iterations_table, labels_table, rules_table

Write = Callable[..., Path]
GOOD = {
    "re_sdr_db": 21.5,
    "re_si_sdr_db": 20.5,
    "remix_snr_db": 19.5,
    "stem_level_db": -3.25,
    "coherence_fraction": 0.125,
}


def figures(sdri_db: float, si_sdri_db: float, num_stems: int = 4) -> dict[str, Any]:
    return {
        "sdr_db": sdri_db,
        "si_sdr_db": si_sdri_db,
        "sdri_db": sdri_db,
        "si_sdri_db": si_sdri_db,
        "num_stems": num_stems,
    }


SEED = {
    "iteration": 0,
    "num_clips": 0,
    "num_set_aside": 0,
    "num_queries": 0,
    "num_stems": 0,
    "num_kept": 0,
    "num_rejected": {},
    "num_failed": 0,
    "kept_h": 0.0,
    "thresholds": {},
    "validation": None,
    "wall_s": 12.4,
}
FIRST = {
    "iteration": 1,
    "num_clips": 10,
    "num_set_aside": 3,
    "num_queries": 22,
    "num_stems": 20,
    "num_kept": 15,
    "num_rejected": {"min_stem_level_db": 1, "min_re_sdr_db": 4},
    "num_failed": 2,
    "kept_h": 0.125,
    "thresholds": {"min_re_sdr_db": 10.0, "min_re_si_sdr_db": None, "min_stem_level_db": -20.0},
    "validation": {**figures(7.126, 6.5), "by_label": {"dog": figures(8.04, 7.0), "bell": figures(6.0, 5.96)}},
    "wall_s": 63.0,
}
SECOND = FIRST | {
    "iteration": 2,
    "validation": {**figures(8.0, 7.0), "by_label": {"dog": figures(9.0, 8.0), "siren": figures(-1.0, -2.0)}},
}


def row(table: Table, number: int) -> dict[str, str]:
    return dict(zip(table.columns, table.rows[number], strict=True))


def assert_well_formed(table: Table) -> None:
    """Every row has a text for every column, and so has every line of its Markdown."""
    assert all(len(cells) == len(table.columns) for cells in table.rows)
    assert all(isinstance(cell, str) for cells in table.rows for cell in cells)
    lines = table.markdown().splitlines()
    assert len(lines) == 2 + len(table.rows)
    assert {line.count("|") for line in lines} == {len(table.columns) + 1}
    assert set(lines[1]) == set("| -")


# Tables.


def test_markdown_has_a_header_a_rule_and_a_line_a_row() -> None:
    table = Table(title="Stems", columns=["label", "SDRi dB"], rows=[["dog", "7.10"], ["bell", ""]])
    assert table.markdown() == "| label | SDRi dB |\n| --- | --- |\n| dog | 7.10 |\n| bell |  |"


def test_the_row_of_an_iteration_has_its_counts_and_figures() -> None:
    table = iterations_table({"iterations": [SEED, FIRST]})
    assert_well_formed(table)
    assert row(table, 1) == {
        "": "1",
        "clips": "10",
        "set aside": "3",
        "queries": "22",
        "kept": "15",
        "rejected": "5",
        "failed": "2",
        "kept h": "0.12",
        "SDRi dB": "7.13",
        "SI-SDRi dB": "6.50",
        "wall s": "63",
    }


def test_a_seed_without_validation_has_empty_figures() -> None:
    seed = row(iterations_table({"iterations": [SEED]}), 0)
    assert (seed[""], seed["rejected"]) == ("0", "0")
    assert seed["SDRi dB"] == seed["SI-SDRi dB"] == ""
    assert seed["wall s"] == "12"


def test_every_rule_has_its_limit_and_its_number_of_rejected_stems() -> None:
    table = rules_table({"iterations": [SEED, FIRST]})
    assert_well_formed(table)
    assert [list(cells) for cells in table.rows] == [
        ["1", "min_re_sdr_db", "10", "4"],
        ["1", "min_stem_level_db", "-20", "1"],
    ]


def test_quantiles_are_written_out_and_the_floor_has_its_kept_stems() -> None:
    thresholds = asdict(Thresholds(min_re_sdr_db=Quantile(quantile=0.4), label_floor_fraction=0.2, label_cap_ratio=3.0))
    thresholds["max_rival_leak_db"] = {"quantile": 0.9, "by_label": True}
    counts = {"num_rejected": {"min_re_sdr_db": 4, "label_cap_ratio": 2}, "num_kept_by_floor": 7}
    table = rules_table({"iterations": [FIRST | counts | {"thresholds": thresholds}]})
    assert_well_formed(table)
    assert [list(cells)[1:] for cells in table.rows] == [
        ["min_re_sdr_db", "quantile 0.4", "4"],
        ["max_rival_leak_db", "quantile 0.9 by label", "0"],
        ["label_floor_fraction", "0.2", "kept 7"],
        ["label_cap_ratio", "3", "2"],
    ]
    manifest = {"num_stems": 20, "num_kept": 14, "kept_h": 0.1, "kept_by_label": {}, "thresholds": thresholds}
    shown = tracks_table(manifest | counts)
    assert_well_formed(shown)
    assert [list(cells) for cells in shown.rows] == [
        ["kept", "14", "0.100 h"],
        ["rejected by label_cap_ratio", "2", "limit 3"],
        ["rejected by min_re_sdr_db", "4", "limit quantile 0.4"],
        ["kept by label_floor_fraction", "7", "limit 0.2"],
    ]


def test_labels_have_a_column_for_every_validated_iteration() -> None:
    table = labels_table({"iterations": [SEED, FIRST, SECOND]})
    assert_well_formed(table)
    assert list(table.columns) == ["label", "iteration 1", "iteration 2"]
    assert [list(cells) for cells in table.rows] == [
        ["bell", "6.0 / 6.0", ""],
        ["dog", "8.0 / 7.0", "9.0 / 8.0"],
        ["siren", "", "-1.0 / -2.0"],
    ]


@pytest.mark.parametrize("iterations", [[], [SEED]])
def test_labels_without_any_validation_are_an_empty_table(iterations: list[dict[str, Any]]) -> None:
    table = labels_table({"iterations": iterations})
    assert (list(table.columns), list(table.rows)) == (["label"], [])
    assert_well_formed(iterations_table({"iterations": iterations}))


def test_an_evaluation_has_all_first_and_then_its_labels() -> None:
    report = {
        "num_mixtures": 5,
        **figures(7.126, 6.5, 10),
        "by_label": {"bell": figures(6.0, 5.0), "dog": figures(8, 7)},
    }
    table = evaluation_table(report)
    assert_well_formed(table)
    assert table.title == "5 mixtures"
    assert [cells[0] for cells in table.rows] == ["all", "bell", "dog"]
    assert row(table, 0) == {
        "label": "all",
        "stems": "10",
        "SDR dB": "7.13",
        "SDRi dB": "7.13",
        "SI-SDR dB": "6.50",
        "SI-SDRi dB": "6.50",
    }


def test_scores_show_what_is_undefined_as_empty_what_each_rule_says_and_the_verdict() -> None:
    rules = {"min_re_sdr_db": {"passes": True}, "max_coherence_fraction": {"passes": True}}
    names = [f"rule {name}" for name in rules]
    failed = rules | {"min_re_sdr_db": {"passes": False}}
    undefined = GOOD | {"coherence_fraction": None}
    stems = [
        {
            "label": "dog",
            "kept": True,
            "rejected_by": None,
            "scores": undefined,
            "rules": rules,
            "not_judged": ["min_tagger_margin_db"],
        },
        {
            "label": "bell",
            "kept": False,
            "rejected_by": "min_re_sdr_db",
            "scores": GOOD,
            "rules": failed,
            "not_judged": [],
        },
    ]
    table = scores_table(stems)
    assert_well_formed(table)
    assert list(table.columns) == ["", "dog", "bell"]
    assert [name for name, *_ in table.rows] == [*GOOD, *names, "rule min_tagger_margin_db", "kept"]
    dog, bell = ({name: cells[stem] for name, *cells in table.rows} for stem in (0, 1))
    assert dog["rule min_tagger_margin_db"] == "not judged"
    assert dog["coherence_fraction"] == ""
    assert (dog["rule min_re_sdr_db"], dog["rule max_coherence_fraction"], dog["kept"]) == ("passes", "passes", "yes")
    assert bell["stem_level_db"] == "-3.25"
    assert (bell["rule min_re_sdr_db"], bell["kept"]) == ("fails", "no: min_re_sdr_db")


# inspect.


@pytest.fixture
def finished_pass(write_pass: Write) -> Path:
    """Four stems of two clips, one of them quiet, and one failure."""
    samples_T = np.sin(np.arange(4000) / 3).astype(np.float32)
    stems = [
        ("clip0", "bell", samples_T, GOOD),
        ("clip0", "dog", samples_T, GOOD),
        ("clip1", "dog", samples_T, GOOD | {"stem_level_db": -40.0, "coherence_fraction": None}),
        ("clip1", "rain", samples_T, GOOD),
    ]
    clip = {"clip_id": "clip2", "path": "c.wav", "labels": ["bell", "dog"], "start_s": None, "end_s": None}
    lost = failure(clip, step="decode", error=ValueError("it is empty"))
    return write_pass(stems, failures=[lost])


def assert_json(value: dict[str, Any]) -> None:
    assert json.loads(json.dumps(value, allow_nan=False)) == value


def test_inspect_a_checkpoint(write_checkpoint: Write) -> None:
    folder = write_checkpoint(("dog", "bell"), history=[{"identity": "abc", "steps": 3}])
    (table,), value = inspect(folder)
    assert_well_formed(table)
    assert_json(value)
    assert value["kind"] == "checkpoint"
    assert value["labels"] == ["dog", "bell"]
    assert value["sample_rate_hz"] == 8000
    assert value["history"] == [{"identity": "abc", "steps": 3}]
    assert dict(table.rows)["labels"] == '["dog", "bell"]'


def test_inspect_tracks(finished_pass: Path, tmp_path: Path) -> None:
    select_tracks(finished_pass / "stems", tmp_path / "tracks", Thresholds(min_stem_level_db=-20.0))
    (table,), value = inspect(tmp_path / "tracks")
    assert_well_formed(table)
    assert_json(value)
    assert (value["kind"], value["num_stems"], value["num_kept"]) == ("tracks", 4, 3)
    assert value["num_rejected"] == {"min_stem_level_db": 1}
    assert value["kept_by_label"] == {"bell": 1, "dog": 1, "rain": 1}
    assert value["kept_h"] == pytest.approx(1.5 / 3600)
    assert [list(cells) for cells in table.rows] == [
        ["kept", "3", "0.000 h"],
        ["rejected by min_stem_level_db", "1", "limit -20"],
        ["kept of bell", "1", ""],
        ["kept of dog", "1", ""],
        ["kept of rain", "1", ""],
    ]
    assert table.rows == tracks_table(value).rows


@pytest.mark.parametrize("inside", ["", "stems"])
def test_inspect_a_pass_or_its_stems_folder(finished_pass: Path, inside: str) -> None:
    (counts, reasons, failures), value = inspect(finished_pass / inside)
    for table in (counts, reasons, failures):
        assert_well_formed(table)
    assert [list(cells) for cells in reasons.rows] == [["", "decode", "ValueError", "2", "c.wav: it is empty"]]
    assert_json(value)
    assert (value["kind"], value["num_clips"], value["num_stems"], value["num_failed"]) == ("pass", 2, 4, 2)
    assert value["damaged_shards"] == []
    assert value["failures"][0]["error_class"] == "ValueError"
    assert [list(cells) for cells in failures.rows] == [["decode", "c.wav", "", "ValueError", "1", "it is empty"]]
    shown = dict(counts.rows)
    assert (shown["stems"], shown["queries that failed"], shown["clips set aside (too few labels)"]) == ("4", "2", "0")
    assert shown["time in separate"] == "50% (1.0 s)"
    assert counts.rows == pass_table(value).rows


def test_inspect_finds_a_damaged_shard(finished_pass: Path) -> None:
    shard = finished_pass / "stems" / "shard-000000-0000.parquet"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    _, value = inspect(finished_pass)
    assert value["damaged_shards"] == [shard.name]


def test_inspect_an_unfinished_pass(finished_pass: Path) -> None:
    (finished_pass / "stems" / "manifest.json").unlink()
    write_json(finished_pass / "stems" / "shard-000000-0000.done.json", {"num_stems": 4})
    (table,), value = inspect(finished_pass)
    assert_well_formed(table)
    assert value == {"kind": "unfinished pass", "num_shards_done": 1}


def test_inspect_a_shard(finished_pass: Path) -> None:
    (table,), value = inspect(finished_pass / "stems" / "shard-000000-0000.parquet")
    assert_well_formed(table)
    assert_json(value)
    assert [stem["label"] for stem in value["stems"]] == ["bell", "dog", "dog", "rain"]
    assert value["stems"][0]["stem_level_db"] == -3.25
    assert row(table, 2)["stem_level_db"] == "-40"
    assert row(table, 2)["coherence_fraction"] == ""
    assert row(table, 0)["num_samples"] == "4000"


def test_inspect_a_corpus(write_sources: Write) -> None:
    manifest = write_sources([]).with_name("natural.csv")
    manifest.write_text("path,labels\na.wav,dog;bell\nb.wav,dog;rain\nc.wav,\n")
    (table,), value = inspect(manifest)
    assert_well_formed(table)
    assert value == {"kind": "corpus", "num_rows": 2, "num_failed": 1, "labels": {"bell": 1, "dog": 2, "rain": 1}}


def test_inspect_a_folder_by_label(tmp_path: Path) -> None:
    for path in ("dog/a.wav", "dog/b.flac", "bell/c.wav"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).touch()
    _, value = inspect(tmp_path)
    assert (value["kind"], value["labels"]) == ("corpus", {"bell": 1, "dog": 2})


def test_inspect_a_run(tmp_path: Path) -> None:
    (tmp_path / "iterations").mkdir()
    tables, value = inspect(tmp_path)
    assert value == {"kind": "run", "iterations": []}
    write_json(tmp_path / "summary.json", {"iterations": [SEED, FIRST]})
    tables, value = inspect(tmp_path)
    assert [len(table.rows) for table in tables] == [2, 2, 2]
    assert value == {"kind": "run", "iterations": [SEED, FIRST]}


def test_inspect_nothing_that_is_known(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere"):
        inspect(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("notes")
    with pytest.raises(ValueError, match=r"'\.txt'"):
        inspect(tmp_path / "notes.txt")
    with pytest.raises(ValueError, match="at least one row"):
        (tmp_path / "empty").mkdir()
        inspect(tmp_path / "empty")


def test_inspect_a_selection_that_was_not_finished(finished_pass: Path, tmp_path: Path) -> None:
    """``select_tracks`` removes the manifest first and writes it last: between the two the selection is not whole."""
    select_tracks(finished_pass / "stems", tmp_path / "tracks", Thresholds())
    (tmp_path / "tracks" / "manifest.json").unlink()
    with pytest.raises(ValueError, match="tracks"):
        inspect(tmp_path / "tracks")
