"""Every example runs as it is: on synthesised sounds, in an empty folder, all on one Ray."""

import importlib
import json
import os
import subprocess
import sys

import pytest

import clearsep as cs
from tests.project.sources import files_of
from tests.support import ROOT

SCRIPTS = [path for path in files_of("examples") if "run_example(main)" in path.read_text()]

TOUR = ROOT / "examples" / "tour.ipynb"
RUNNER = """
import ast, json, sys, types

sys.modules["ipykernel"] = types.ModuleType("ipykernel")  # by which the project knows a notebook
names, shown = {"__name__": "__main__"}, []
for source in json.load(sys.stdin):
    *rest, last = ast.parse(source).body
    is_value = isinstance(last, ast.Expr)
    exec(compile(ast.Module(rest if is_value else [*rest, last], []), "cell", "exec"), names)
    value = eval(compile(ast.Expression(last.value), "cell", "eval"), names) if is_value else None
    html = getattr(value, "_repr_html_", lambda: None)()
    shown.append(html or (repr(value) if value is not None else ""))
json.dump(shown, open(sys.argv[1], "w"))
"""


@pytest.fixture(scope="module")
def ray():
    with cs.connect(num_cpus=2):
        yield


def test_there_are_five_and_the_page_lists_them():
    page = (ROOT / "examples" / "README.md").read_text()
    assert [path.stem for path in SCRIPTS] == ["distil", "own_separator", "refilter", "search", "separate_corpus"]
    others = [path for path in files_of("examples") if path.name != "__init__.py"]
    assert all(f"({path.name})" in page for path in (*others, TOUR))


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


def code_cells():
    return [cell for cell in json.loads(TOUR.read_text())["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_is_short_and_stored_without_outputs():
    assert [cell["outputs"] for cell in code_cells()] == [[]] * len(code_cells())
    assert {cell["execution_count"] for cell in code_cells()} == {None}
    assert TOUR.stat().st_size < 15_000


@pytest.mark.slow
def test_the_notebook_runs_and_shows_its_results(tmp_path):
    """Cells run in order in one process, the value of the last line is shown by ``_repr_html_``, as Jupyter does it."""
    cells = ["".join(cell["source"]) for cell in code_cells()]
    command = [sys.executable, "-c", RUNNER, str(tmp_path / "shown.json")]
    done = subprocess.run(
        command, input=json.dumps(cells), cwd=TOUR.parent, env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert "  step 30, loss_db" in done.stderr and "iteration 1: kept 24 of 24 stems" in done.stderr
    assert set(done.stderr) & {"\x1b", "\r", "\b"} == set(), "progress in a cell is lines"
    shown = dict(zip(cells, json.loads((tmp_path / "shown.json").read_text()), strict=True))

    def of(text):
        (found,) = (html for source, html in shown.items() if text in source)
        return found

    assert "Learning curve, 30 steps" in of("cs.distil(")
    assert (of("cs.separate_file(").count("<audio"), of("cs.separate_file(").count("<img")) == (3, 3)
    assert "<caption>Engine pass</caption>" in of("cs.run_pass(") and ">24</td>" in of("cs.run_pass(")
    assert all("<table" in html for source, html in shown.items() if "to_pandas" in source)
    assert all("<caption>24 stems</caption>" in html for source, html in shown.items() if "select_tracks" in source)
    assert "<caption>Iterations</caption>" in of("cs.run(")
    assert "8 mixtures" in of("cs.evaluate(")
    (report,) = tmp_path.rglob("report.html")
    assert str(report) in of("write_run_report(")
