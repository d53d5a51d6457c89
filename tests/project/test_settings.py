"""``clearsep settings`` and the reference page that it generates."""

from __future__ import annotations

import pytest

from tests.support import ROOT
from tests.support.command import Cli

PAGE = ROOT / "docs" / "settings.md"


def test_the_page_is_up_to_date(cli: Cli) -> None:
    assert cli("settings", "--markdown").out == PAGE.read_text(), "clearsep settings --markdown > docs/settings.md"


def test_every_setting_has_type_default_and_meaning(cli: Cli) -> None:
    rows = cli("settings", "--json").document()
    assert len(rows) > 100
    assert {row["section"] for row in rows} == {"Runs", "Thresholds", "Searches"}
    assert [row["name"] for row in rows if not (row["type"] and row["default"] and row["meaning"])] == []
    by_name = {row["name"]: row for row in rows if row["section"] == "Runs"}
    assert by_name["seed_training.steps"]["default"] == "1600"  # of the run, not of the class
    assert by_name["distil.steps"]["default"] == "800"
    assert by_name["validation"]["default"] == "null"
    assert by_name["engine.batch_s"]["is_runtime"] and not by_name["engine.clip_s"]["is_runtime"]


def test_a_key_shows_the_settings_that_begin_with_it(cli: Cli) -> None:
    def names(key: str) -> list[str]:
        return [row["name"] for row in cli("settings", key, "--json").document()]

    assert names("engine.clip_s") == ["engine.clip_s"]
    assert names("clip_s") == ["engine.clip_s"]
    assert set(names("engine")) == {name for name in names("engine.") if name.startswith("engine.")}
    assert {"distil.steps", "seed_training.steps", "calibration.steps"} <= set(names("steps"))
    assert names("min_re_sdr") == ["min_re_sdr_db"]


def test_a_setting_is_shown_as_a_table(cli: Cli) -> None:
    outcome = cli("settings", "engine.clip_s")
    assert (outcome.code, outcome.err) == (0, "")
    assert all(text in outcome.out for text in ("engine.clip_s", "number", "above 0", "10.0", "Longer recordings"))
    assert "`" not in outcome.out


@pytest.mark.parametrize(("key", "nearest"), [("setps", "steps"), ("engin.clip_s", "engine.clip_s")])
def test_an_unknown_key_names_the_nearest(cli: Cli, key: str, nearest: str) -> None:
    assert cli("settings", key).error() == f"error: there is no setting {key}; did you mean {nearest!r}?"
