"""Benchmarks: each explains itself, and every marker that one fills is on its page."""

import importlib
import re
import sys

import pytest

from benchmarks import pages
from tests.project.sources import files_of, name_of

MODULES = [path for path in files_of("benchmarks") if "def main()" in path.read_text()]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_help(path, monkeypatch, capsys):
    module = importlib.import_module(name_of(path).removesuffix(".py").replace("/", "."))
    monkeypatch.setattr(sys, "argv", [module.__name__, "--help"])
    with pytest.raises(SystemExit) as stopped:
        module.main()
    assert stopped.value.code == 0
    assert f"python -m {module.__name__}" in capsys.readouterr().out


def test_markers_are_on_their_pages():
    filled = {
        (page, marker)
        for path in MODULES
        for page, marker in re.findall(r'pages\.fill\(pages\.(\w+), "(\w+)"', path.read_text())
    }
    assert len(filled) >= 10
    for page, marker in filled:
        text = getattr(pages, page).read_text()
        assert f"<!-- {marker} -->" in text and f"<!-- /{marker} -->" in text, (page, marker)


def test_fill_replaces_what_is_between_the_markers(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- x -->\nold\n<!-- /x -->\nb\n")
    pages.fill(page, "x", "new")
    assert page.read_text() == "a\n<!-- x -->\nnew\n<!-- /x -->\nb\n"
    with pytest.raises(ValueError, match="must have <!-- y -->"):
        pages.fill(page, "y", "new")
