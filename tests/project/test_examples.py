"""Every example runs as it is: on synthesised sounds, in an empty folder, all on one Ray."""

import importlib

import pytest

import clearsep as cs
from tests.project.sources import files_of
from tests.support import ROOT

SCRIPTS = [path for path in files_of("examples") if "run_example(main)" in path.read_text()]


@pytest.fixture(scope="module")
def ray():
    with cs.connect(num_cpus=2):
        yield


def test_there_are_five_and_the_page_lists_them():
    page = (ROOT / "examples" / "README.md").read_text()
    assert [path.stem for path in SCRIPTS] == ["distil", "own_separator", "refilter", "search", "separate_corpus"]
    assert all(f"({path.name})" in page for path in files_of("examples") if path.name != "__init__.py")


@pytest.mark.parametrize("path", files_of("examples"), ids=lambda path: path.name)
def test_examples_are_short(path):
    assert len(path.read_text().splitlines()) < 60


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "printed"),
    [
        ("separate_corpus", "24 stems of 24 queries, 0 failed"),
        ("own_separator", "24 stems, "),
        ("refilter", "every stem: kept 24 of 24 stems"),
        ("distil", "student: SDRi "),
        ("search", "dB SDRi"),
    ],
)
def test_example_runs(name, printed, ray, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    importlib.import_module(f"examples.{name}").main(tmp_path)
    assert printed in capsys.readouterr().out
