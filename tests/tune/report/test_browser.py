"""The reports in a real browser: everything that can be clicked is, without an error, a request or a barrier."""

from __future__ import annotations

import csv
import importlib.resources
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from engine.schema import failure
from tests.tune.report.conftest import FILE, LABELS, MARKUP
from tests.tune.search.test_report import BASE, candidate, drawn, settings
from tune.report.write import write_run_report
from tune.search.report import write_report

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make setup installs it")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium"),
]
PHONE = {"width": 390, "height": 844}
Write = Callable[..., Path]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@contextmanager
def opened(browser: Browser, path: Path, **context: Any) -> Iterator[Page]:
    """A page from disk; afterwards there was no error on its console and no request but for the page itself."""
    with browser.new_context(**context) as own:
        page = own.new_page()
        problems: list[str] = []
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: problems.append(request.url) if outside(request.url, path) else None)
        page.goto(path.as_uri())
        yield page
        assert problems == []


def outside(url: str, path: Path) -> bool:
    return not url.startswith((path.as_uri(), "data:", "blob:"))


def barriers(page: Page) -> list[str]:
    """What axe-core finds."""
    source = importlib.resources.files("axe_playwright_python") / "axe.min.js"
    page.evaluate(source.read_text())
    found = page.evaluate("axe.run()")["violations"]
    return [f"{one['id']}: {[node['html'][:200] for node in one['nodes'][:3]]}" for one in found]


def require_good(browser: Browser, path: Path) -> None:
    """No barrier in light, dark and on a phone; a phone's page is no wider than the phone."""
    for context in ({"color_scheme": "light"}, {"color_scheme": "dark"}, {"viewport": PHONE}):
        with opened(browser, path, **context) as page:
            page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
            assert barriers(page) == [], context
            assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
            assert page.evaluate("window.hacked") is None


@pytest.fixture
def run_page(run_folder: Path) -> Path:
    path = write_run_report(run_folder, run_folder / "alone.html")
    assert isinstance(path, Path)
    return path


@pytest.fixture
def compared_page(run_folder: Path) -> Path:
    path = write_run_report(run_folder, against=run_folder)
    assert isinstance(path, Path)
    return path


def test_a_run_has_no_barrier_and_shows_hostile_names_as_text(browser: Browser, compared_page: Path) -> None:
    require_good(browser, compared_page)
    with opened(browser, compared_page) as page:
        text = page.locator("body").inner_text()
        assert MARKUP in text and LABELS[1] in text and FILE in text
        assert "right\\u202eto left" in text and "more …" in text
        assert page.locator("h1").inner_text().endswith("run")
        assert page.locator("#compared table").count() == 3


def is_drawn(canvas: Locator) -> bool:
    script = "one => new Set(one.getContext('2d').getImageData(0, 0, one.width, one.height).data).size"
    return canvas.evaluate(script) > 10


def playing(page: Page) -> list[str]:
    return page.locator(".player.playing").evaluate_all("all => all.map((one) => one.dataset.key)")


def until(page: Page, script: str) -> None:
    """Wait for a condition; the page's policy forbids the code by which Playwright itself would wait."""
    deadline = time.monotonic() + 20.0
    while not page.evaluate(script):
        assert time.monotonic() < deadline, script
        page.wait_for_timeout(20)


def position(clip: Locator) -> float:
    return float(clip.locator("input[type=range]").input_value())


def test_players_play_one_at_a_time_and_share_a_position(browser: Browser, run_page: Path) -> None:
    with opened(browser, run_page) as page:
        assert all(is_drawn(canvas) for canvas in page.locator(".clip canvas").all()[:6])
        clips = page.locator("article.clip")
        first, second = clips.nth(0), clips.nth(1)
        first.locator(".play").first.click()
        until(page, "document.querySelector('.clip input').value > 0.15")
        assert playing(page) == ["c0m"]
        first.locator(".version:not([hidden]) .play").first.click()
        assert playing(page) == ["c0B0"]
        assert position(first) > 0.1, "the stem goes on where the mixture was"
        before = position(first)
        first.get_by_role("button", name="A iteration 1").click()
        assert playing(page) == ["c0A0"] and position(first) >= before - 0.11
        page.keyboard.press("b")
        assert playing(page) == ["c0B0"]
        second.locator(".play").first.click()
        assert playing(page) == ["c1m"]
        until(page, "!document.querySelector('.player.playing')")
        assert position(second) == 0.0, "it starts again after its end"


def test_the_stems_of_two_runs_are_switched_while_they_play(browser: Browser, compared_page: Path) -> None:
    with opened(browser, compared_page) as page:
        first = page.locator("article.clip").first
        names = first.locator(".switch button").all_inner_texts()
        assert names == ["A the other, iteration 2", "B this run, iteration 2"]
        first.locator(".version:not([hidden]) .play").nth(1).click()
        until(page, "document.querySelector('.clip input').value > 0.15")
        page.keyboard.press("a")
        assert playing(page) == ["c0A1"] and position(first) > 0.1


def test_a_click_and_the_keyboard_seek(browser: Browser, run_page: Path) -> None:
    with opened(browser, run_page) as page:
        clip = page.locator("article.clip").first
        slider = clip.locator("input[type=range]")
        slider.focus()
        for _ in range(3):
            page.keyboard.press("ArrowRight")
        assert position(clip) == pytest.approx(0.3)
        page.keyboard.press(" ")
        until(page, "document.querySelector('.clip input').value > 0.35")
        page.keyboard.press(" ")
        assert playing(page) == []
        spectrogram = clip.locator(".spectrogram").first
        box = spectrogram.bounding_box()
        assert box is not None
        spectrogram.click(position={"x": 0.5 * box["width"], "y": 30.0})
        assert playing(page) == ["c0m"] and 1.9 < position(clip) < 3.5


def test_verdicts_are_kept_and_downloaded(browser: Browser, run_page: Path, tmp_path: Path) -> None:
    with opened(browser, run_page) as page:
        groups = page.locator(".clip .version:not([hidden]) .judge")
        for number, name in enumerate(("good", "bad", "wrong label")):
            groups.nth(number).get_by_role("button", name=name).click()
        groups.nth(1).get_by_role("button", name="bad").click()
        assert page.locator("#judged-count").inner_text().startswith("2 of ")
        page.reload()
        assert page.locator("#judged-count").inner_text().startswith("2 of ")
        assert groups.nth(0).locator("[aria-pressed=true]").inner_text() == "good"
        with page.expect_download() as download:
            page.get_by_role("button", name="Download verdicts").click()
        download.value.save_as(tmp_path / "verdicts.csv")
        page.get_by_role("button", name="Forget verdicts").click()
        assert page.locator("#judged-count").inner_text() == "No verdict yet."
    with open(tmp_path / "verdicts.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["verdict"] for row in rows] == ["good", "wrong label"]
    assert all(row["label"] in LABELS and row["path"].startswith(FILE) and row["iteration"] == "2" for row in rows)
    assert {row["pass"] for row in rows} == {"hand-made"}


def test_a_table_is_sorted_by_a_click_on_a_name(browser: Browser, run_page: Path) -> None:
    with opened(browser, run_page) as page:
        table = page.locator("#labels table")
        head = table.get_by_role("columnheader", name="SDRi, seed")
        numbers = []
        for order in ("descending", "ascending"):
            head.get_by_role("button").click()
            assert head.get_attribute("aria-sort") == order
            numbers.append([float(cell) for cell in table.locator("tbody td:nth-child(5)").all_inner_texts()])
        assert numbers[0] == [7.0, 6.0, 5.0, 4.0] == numbers[1][::-1]


def test_a_pass_and_a_search(browser: Browser, write_pass: Write, tmp_path: Path) -> None:
    noise_T = np.random.default_rng(0).normal(0, 0.1, 4000).astype(np.float32)
    clip = {"clip_id": "c1", "path": "c1.wav", "labels": [MARKUP, "rain"], "start_s": None, "end_s": None}
    failures = [failure(clip, step="separate", error=ValueError(f"NaN in {MARKUP}"), label="rain")]
    failures += [failure({**clip, "clip_id": "lost"}, step="decode", error=OSError("cannot read " + "x" * 400))]
    stems = [(f"c{n}", MARKUP, noise_T, {"remix_snr_db": float(n)}) for n in range(4)]
    out = write_pass(stems, failures=failures)
    (out / "tracks").mkdir()
    (out / "tracks" / "manifest.json").write_text("{")
    path = write_run_report(out)
    assert isinstance(path, Path)
    require_good(browser, path)
    with opened(browser, path) as page:
        page.locator(".play").first.click()
        until(page, "document.querySelector('.clip input').value > 0.1")
        assert f"NaN in {MARKUP}" in page.locator(".failure").inner_text()
        assert "tracks of the pass cannot be read" in page.locator("#listen .lacks").inner_text()
    params = [{"min_re_sdr_db.value": 3.0, "a": "x"}, {"min_re_sdr_db.value": 5.0, "a": "y"}]
    rows = drawn(*params, description=MARKUP)
    candidates = [BASE, candidate("1", [5.6, 5.6], [5.3, 5.5])]
    write_report(tmp_path / "search", rows, candidates, settings=settings(), title=MARKUP)  # type: ignore[arg-type]
    require_good(browser, tmp_path / "search" / "report.html")
    with opened(browser, tmp_path / "search" / "report.html") as page:
        assert page.locator("h1").inner_text() == MARKUP
        assert page.locator("figure svg path.line").count() >= 3
