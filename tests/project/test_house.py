"""Sizes, names and docstrings: what a newcomer sees first."""

import ast
import collections
import re
import tokenize

import pytest

from tests.project.sources import BESIDES, PACKAGES, SOURCES, TESTS, name_of, parsed
from tests.support import ROOT

MAX_LINES, MAX_FUNCTION_LINES, MAX_ENTRIES = 400, 50, 12
MAX_CODE_LINES = 22_050  # lines of the source that are neither blank, comments, docstrings nor imports; may only fall
MAX_UNTYPED_RECORDS = 55  # `dict[str, Any]` in the source; may only fall
CALLED_BY_LIBRARIES = {  # methods of their base classes: rich, io and Ray Tune; IPython's displays
    *("render_message", "tell", "readinto", "on_trial_start", "on_trial_result", "on_trial_complete"),
    *("on_trial_error", "on_experiment_end", "_repr_html_"),
}
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef


def per_file(paths):
    return pytest.mark.parametrize("path", paths, ids=name_of)


@per_file([*SOURCES, *BESIDES])
def test_files_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def code_lines(path):
    """Numbers of the lines of a file that hold code: no blank lines, comments, docstrings or imports."""
    silent = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    with tokenize.open(path) as file:
        tokens = [token for token in tokenize.generate_tokens(file.readline) if token.type not in silent]
    lines = {line for token in tokens for line in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(parsed(path)):
        is_text = (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        )
        if is_text or isinstance(node, ast.Import | ast.ImportFrom):
            lines -= set(range(node.lineno, node.end_lineno + 1))
    return lines


def test_the_source_as_a_whole_does_not_grow():
    assert sum(len(code_lines(path)) for path in SOURCES) <= MAX_CODE_LINES


@per_file(SOURCES)
def test_functions_are_short(path):
    functions = [node for node in ast.walk(parsed(path)) if isinstance(node, FUNCTIONS)]
    assert [node.name for node in functions if _body_lines(node) > MAX_FUNCTION_LINES] == []


def _body_lines(node):
    first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
    return node.end_lineno - first.lineno + 1


FOLDERS = sorted(
    {path.parent for path in [*SOURCES, *TESTS, *BESIDES] if path.parent != ROOT}
    | {path for path in (ROOT / "docs").rglob("*") if path.is_dir()}
)


@per_file(FOLDERS)
def test_a_folder_shows_at_most_a_dozen_entries(path):
    entries = [entry for entry in path.iterdir() if entry.name not in ("__init__.py", "__pycache__")]
    assert len(entries) <= MAX_ENTRIES + (path == ROOT / "engine")  # its rooms are those of the architecture's table


@per_file(SOURCES)
def test_everything_public_has_a_docstring(path):
    tree = parsed(path)
    public = [node for node in tree.body if isinstance(node, FUNCTIONS | ast.ClassDef) and node.name[0] != "_"]
    assert ast.get_docstring(tree), "the module has none"
    assert [node.name for node in public if not ast.get_docstring(node)] == []


@per_file(SOURCES)
def test_docstrings_are_sentences(path):
    """A docstring that begins with a question word ("What a pass did") is not a sentence and describes nothing."""
    texts = [
        (getattr(node, "name", "module"), ast.get_docstring(node) or "")
        for node in ast.walk(parsed(path))
        if isinstance(node, FUNCTIONS | ast.ClassDef | ast.Module)
    ]
    assert [name for name, text in texts if re.match(r"(What|Whether|Where|How|Who|Why|When)\b", text)] == []
    assert [name for name, text in texts if text.startswith("TODO")] == []


def config_classes():
    """Every config class, as (file, class)."""
    return [
        (path, node)
        for path in SOURCES
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.ClassDef) and any(_names(node, "config"))
    ]


def _names(node, name):
    return (isinstance(one, ast.Name) and one.id == name for one in node.decorator_list)


@pytest.mark.parametrize(("path", "node"), [pytest.param(*one, id=one[1].name) for one in config_classes()])
def test_every_setting_is_documented(path, node):
    undocumented = [
        field.target.id
        for field, after in zip(node.body, [*node.body[1:], None], strict=True)
        if isinstance(field, ast.AnnAssign)
        and not (isinstance(after, ast.Expr) and isinstance(getattr(after.value, "value", None), str))
    ]
    assert undocumented == [], name_of(path)
    assert ast.get_docstring(node)


def test_every_class_that_is_called_a_config_is_one():
    names = {node.name for _, node in config_classes()}
    assert {"Thresholds", "PassConfig", "NetworkConfig", "DistilConfig", "MixConfig", "RunConfig"} <= names
    others = {
        node.name
        for path in SOURCES
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.ClassDef) and node.name.endswith("Config") and node.name not in names
    }
    assert others <= {"JobConfig", "PreflightConfig"}  # of cluster/, which imports nothing of the engine


def test_no_two_classes_have_one_name():
    counts = collections.Counter(
        node.name for path in SOURCES for node in ast.walk(parsed(path)) if isinstance(node, ast.ClassDef)
    )
    assert [name for name, count in counts.items() if count > 1] == []


def test_records_are_typed():
    """``dict[str, Any]`` says nothing of a record's fields: their number may only fall."""
    count = sum(path.read_text(encoding="utf-8").count("dict[str, Any]") for path in SOURCES)
    assert count <= MAX_UNTYPED_RECORDS


def names_in(path):
    """Every name that a file uses: not those that it defines."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.ImportFrom | ast.Import):
            yield from (part for alias in node.names for part in alias.name.split("."))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from re.findall(r"\w+", node.value) if len(node.value) < 200 else ()


def test_nothing_in_the_source_serves_tests_alone():
    used = {name for path in [*SOURCES, *BESIDES] for name in names_in(path)}
    used |= set(re.findall(r"\w+", " ".join(path.read_text() for path in (ROOT / "docs").rglob("*.md"))))
    unused = [
        (name_of(path), node.name)
        for path in SOURCES
        for node in ast.walk(parsed(path))
        if isinstance(node, FUNCTIONS | ast.ClassDef) and node.name not in used and not node.name.startswith("__")
    ]
    assert [one for one in unused if one[1] not in CALLED_BY_LIBRARIES] == []


def test_the_packages_are_there():
    assert {path.relative_to(ROOT).parts[0] for path in SOURCES} == {*PACKAGES, "clearsep.py"}
