"""The rules of the design that a parser can check: who imports whom, who knows Ray, sizes, docstrings, settings."""

import ast

import pytest

from tests.support import ROOT

PACKAGES = {  # package: project packages that it may import
    "cluster": {"cluster"},
    "engine": {"engine"},
    "train": {"train", "engine"},
    "tune": {"tune", "train", "engine"},
}
PROJECT = {*PACKAGES, "clearsep", "tests", "benchmarks"}
VOCABULARY = {"schema", "audio", "flac24", "storage", "s3", "retry", "checkpoint", "metrics"}
STEPS = {"decode", "separate", "score", "filter"}
KNOWS_RAY = {
    "engine/gauges.py",
    "engine/iteration.py",
    "train/distil.py",
    "tune/loop.py",
    "tune/search.py",
    "tune/trial.py",
    "tune/progress.py",
}
MAX_LINES, MAX_FUNCTION_LINES = 500, 60


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def files_of(*folders):
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


SOURCES = [ROOT / "clearsep.py", *files_of(*PACKAGES)]
EVERYTHING = [*SOURCES, *files_of("tests", "benchmarks")]


def per_file(paths):
    return pytest.mark.parametrize("path", paths, ids=name_of)


def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(tree, package=""):
    """Dotted names of all that a module imports, anywhere in it; ``from a import b`` counts as a and a.b."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            module = ".".join([*above, *filter(None, [node.module])])
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


def imports_of(path):
    return imports(parsed(path), package=".".join(path.relative_to(ROOT).parent.parts))


def tops(names):
    return {name.split(".")[0] for name in names}


def within(names, prefix):
    return sorted(name for name in names if name == prefix or name.startswith(f"{prefix}."))


def test_imports_are_found_however_they_are_written():
    source = """
import a.b, c as d
from e import f
from . import g
from ..h import i
def late():
    import j
    from k.l import m
"""
    assert imports(ast.parse(source), package="x.y") == {
        *("a.b", "c", "e", "e.f", "x.y", "x.y.g", "x.h", "x.h.i", "j", "k.l", "k.l.m")
    }


def test_there_is_something_to_check():
    assert {path.relative_to(ROOT).parts[0] for path in SOURCES} == {*PACKAGES, "clearsep.py"}
    assert all((ROOT / "engine" / f"{name}.py").is_file() for name in VOCABULARY | STEPS)


@per_file(files_of(*PACKAGES))
def test_imports_flow_one_way(path):
    package = path.relative_to(ROOT).parts[0]
    assert tops(imports_of(path)) & PROJECT <= PACKAGES[package]


@per_file(files_of("train"))
def test_training_does_not_know_the_pass(path):
    assert within(imports_of(path), "engine.iteration") == []


@per_file(files_of("engine"))
def test_nothing_in_the_engine_knows_the_pass(path):
    assert within(imports_of(path), "engine.iteration") == []


@pytest.mark.parametrize("step", sorted(STEPS))
def test_steps_never_import_one_another(step):
    names = imports_of(ROOT / "engine" / f"{step}.py")
    assert [name for other in STEPS - {step} for name in within(names, f"engine.{other}")] == []
    assert within(names, "engine.stages") == []


@pytest.mark.parametrize("word", sorted(VOCABULARY))
def test_the_vocabulary_imports_only_itself(word):
    names = within(imports_of(ROOT / "engine" / f"{word}.py"), "engine")
    assert {name.split(".")[1] for name in names if "." in name} <= VOCABULARY


@per_file(files_of("engine/separators"))
def test_separators_import_only_the_vocabulary(path):
    names = within(imports_of(path), "engine")
    assert {name.split(".")[1] for name in names if "." in name} <= VOCABULARY | {"separators"}


@per_file(SOURCES)
def test_ray_stays_at_the_rim(path):
    if name_of(path) not in KNOWS_RAY and not name_of(path).startswith("cluster/"):
        assert "ray" not in tops(imports_of(path))


@per_file(EVERYTHING)
def test_ray_is_imported_as_a_whole(path):
    """``from ray import train`` would bind a name that a package of ours has."""
    found = [
        node.lineno for node in ast.walk(parsed(path)) if isinstance(node, ast.ImportFrom) and node.module == "ray"
    ]
    assert found == []


@per_file(EVERYTHING)
def test_files_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


@per_file(SOURCES)
def test_functions_are_short(path):
    functions = [node for node in ast.walk(parsed(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert [node.name for node in functions if node.end_lineno - node.body[0].lineno >= MAX_FUNCTION_LINES] == []


@per_file(SOURCES)
def test_what_is_public_has_a_docstring(path):
    tree = parsed(path)
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    public = [node for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]
    assert ast.get_docstring(tree), "the module has none"
    assert [node.name for node in public if not ast.get_docstring(node)] == []


def settings():
    """Every class of settings, as (file, class)."""
    return [
        (path, node)
        for path in files_of(*PACKAGES)
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.ClassDef) and (node.name.endswith("Config") or node.name == "Thresholds")
    ]


@pytest.mark.parametrize(("path", "node"), [pytest.param(*found, id=found[1].name) for found in settings()])
def test_every_setting_is_documented(path, node):
    """A string under each field, which is what ``--help`` and the reader have."""
    undocumented = [
        field.target.id
        for field, after in zip(node.body, [*node.body[1:], None], strict=True)
        if isinstance(field, ast.AnnAssign)
        and not (isinstance(after, ast.Expr) and isinstance(getattr(after.value, "value", None), str))
    ]
    assert undocumented == [], name_of(path)
    assert ast.get_docstring(node)


@pytest.mark.parametrize(("path", "node"), [pytest.param(*found, id=found[1].name) for found in settings()])
def test_settings_are_frozen_and_keyword_only(path, node):
    (decorator,) = [d for d in node.decorator_list if isinstance(d, ast.Call) and ast.unparse(d.func) == "dataclass"]
    options = {keyword.arg: keyword.value.value for keyword in decorator.keywords}
    assert options == {"frozen": True, "kw_only": True}, name_of(path)


def test_the_settings_are_found():
    assert {"Thresholds", "PassConfig", "NetworkConfig", "DistilConfig", "MixConfig", "RunConfig"} <= {
        node.name for _, node in settings()
    }
