"""Results of the Python API as a notebook shows them: the figures, the sound, and nothing that a name brings along."""

from __future__ import annotations

import base64
import io
import json
import pickle
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch

import clearsep as cs
from engine.audio.decoder import shared_decoder
from tests.conftest import RATE_HZ
from tests.support.wav import write_wav
from tests.tune.search.test_report import row
from tune.search.report import write_report
from tune.show.notebook import MOST_ROWS, MOST_SOUNDS, with_display

Write = Callable[..., Path]
MARKUP = "<script>alert(1)</script><img src=x onerror=alert(2)>"
SCORED = {"re_sdr_db": 20.0, "re_si_sdr_db": 20.0, "remix_snr_db": 20.0, "stem_level_db": -3.0}
TAGS = {
    **dict.fromkeys(("table", "caption", "tr", "p"), frozenset[str]()),
    **dict.fromkeys(("th", "td"), frozenset({"style"})),
    "audio": {"controls", "src"},
    "img": {"alt", "width", "height", "src"},
}


class Page(HTMLParser):
    """The cells of a display and the data in it; every tag and attribute in it is one of ours."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.data: dict[str, list[bytes]] = {"audio": [], "img": []}
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert {name for name, _ in attrs} <= TAGS[tag]
        if tag in ("th", "td", "p", "caption"):
            self.cells.append("")
        if (source := dict(attrs).get("src")) is not None:
            kind, _, data = source.partition(";base64,")
            assert kind == {"audio": "data:audio/webm", "img": "data:image/png"}[tag]
            self.data[tag].append(base64.b64decode(data, validate=True))

    def handle_data(self, data: str) -> None:
        self.cells[-1] += data


def page(result: Any) -> Page:
    return Page(result._repr_html_())


class Quarters:
    """Gives every query a quarter of the mixture."""

    sample_rate_hz, labels = RATE_HZ, (MARKUP, *(f"label {number}" for number in range(20)))

    def separate(self, mix_BT: torch.Tensor, queries: Any, *, lengths: Any = None) -> torch.Tensor:
        return mix_BT / 4


def separated(folder: Path, queries: list[str], duration_s: float = 1.0) -> Any:
    rng = np.random.default_rng(0)
    path = folder / "<b>mixture.wav"
    write_wav(path, rng.uniform(-0.4, 0.4, round(duration_s * RATE_HZ)).astype(np.float32), sample_rate_hz=RATE_HZ)
    return cs.separate_file(path, queries, separator=Quarters(), out=folder / "stems")


def test_stems_play_and_have_spectrograms(tmp_path: Path) -> None:
    stems = separated(tmp_path, [MARKUP, "label 1"], duration_s=40.0)
    found = page(stems)
    assert [found.cells.count(name) for name in ("mixture", MARKUP, "label 1")] == [1, 2, 2]
    assert found.cells.count(str(tmp_path / "<b>mixture.wav")) == 2
    assert [len(some) for some in found.data.values()] == [3, 3], "the mixture and its stems"
    peaks = []
    for data in found.data["audio"]:
        (tmp_path / "sound.webm").write_bytes(data)
        samples_T = shared_decoder().decode(str(tmp_path / "sound.webm"), sample_rate_hz=48000)
        assert len(samples_T) / 48000 == pytest.approx(30.0, abs=0.1)
        peaks.append(float(np.sqrt(np.mean(samples_T**2))))
    assert peaks[1:] == pytest.approx([peaks[0] / 4] * 2, rel=0.1), "levels differ as those of the files do"
    mixture, stem, _ = (matplotlib.image.imread(io.BytesIO(data))[..., 3] for data in found.data["img"])
    assert mixture.shape == (64, 240)
    assert np.mean(mixture - stem) == pytest.approx(12.0 / 75.0, abs=0.02), (
        "a quarter of the signal is 12 of 75 dB less"
    )
    assert len(page(stems[1]).data["audio"]) == 2, "one of them alone"


def test_a_display_has_the_first_of_many_stems_and_works_without_their_files(tmp_path: Path) -> None:
    stems = separated(tmp_path, [f"label {number}" for number in range(20)])
    found = page(stems)
    assert len(found.data["audio"]) == MOST_SOUNDS
    assert f"Sounds (the first {MOST_SOUNDS} of 21 sounds, at most 30 s)" in found.cells
    Path(stems[0]["path"]).unlink()
    assert len(page(stems).data["audio"]) == MOST_SOUNDS - 1
    assert any("No such file" in cell for cell in page(stems).cells)


def test_a_selection_shows_its_outcomes_and_is_a_dictionary(write_pass: Write, tmp_path: Path) -> None:
    out = write_pass([("clip", label, np.zeros(100, np.float32), SCORED) for label in (MARKUP, "rain")])
    selection = cs.select_tracks(out, tmp_path / "tracks", cs.Thresholds(min_re_sdr_db=30.0))
    cells = page(selection).cells
    assert cells[0] == "2 stems"
    assert cells[cells.index("rejected by min_re_sdr_db") :][:3] == ["rejected by min_re_sdr_db", "2", "limit 30"]
    selection = cs.select_tracks(out, tmp_path / "tracks", cs.Thresholds())
    assert f"kept of {MARKUP}" in page(selection).cells
    assert selection == json.loads((tmp_path / "tracks" / "manifest.json").read_text())
    assert json.loads(json.dumps(selection)) == selection == pickle.loads(pickle.dumps(selection))
    assert pickle.loads(pickle.dumps(cs.select_tracks)) is cs.select_tracks


def test_scores_show_every_rule(tmp_path: Path) -> None:
    stems = separated(tmp_path, [MARKUP, "label 1"])
    paths = {MARKUP: stems[0]["path"], "rain": stems[1]["path"]}
    verdicts = cs.score_files(tmp_path / "<b>mixture.wav", paths, cs.Thresholds(min_stem_level_db=-6.0))
    cells = page(verdicts).cells
    assert cells[cells.index("rule min_stem_level_db") :][1:3] == ["fails", "fails"]
    assert MARKUP in cells and MARKUP in page(verdicts[0]).cells


def test_a_run_shows_its_iterations() -> None:
    figures = {"sdri_db": 1.25, "si_sdri_db": 1.0, "num_stems": 3}
    record = {
        **dict.fromkeys(("num_clips", "num_set_aside", "num_queries", "num_stems", "num_kept", "num_failed"), 1),
        **{"iteration": 1, "num_rejected": {}, "kept_h": 0.1, "thresholds": {"min_re_sdr_db": 3.0}, "wall_s": 1.0},
        "validation": figures | {"by_label": {MARKUP: figures}},
    }
    shown = with_display("run", lambda: {"iterations": [record]})()
    cells = page(shown).cells
    assert "Iterations" in cells and "1.25" in cells and MARKUP in cells
    del shown["iterations"]
    shown["mine"] = 1
    assert shown._repr_html_() is None, "a notebook shows the text of a record that was changed"


def test_a_search_shows_its_verdict_and_the_first_of_many_trials(tmp_path: Path) -> None:
    rows = [row(f"{number} {MARKUP}") for number in range(MOST_ROWS + 20)]
    summary = write_report(tmp_path, rows, [], settings={}, title="Search")
    cells = page(with_display("search", lambda: summary)()).cells
    assert cells[0] == summary["verdict_text"]
    assert f"Trials (the first {MOST_ROWS} of {MOST_ROWS + 20} rows)" in cells
    assert cells.count(f"3 {MARKUP}") >= 1 and f"{MOST_ROWS + 10} {MARKUP}" not in cells
