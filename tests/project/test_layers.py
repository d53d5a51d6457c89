"""Imports flow one way: every file belongs to one layer and imports only layers below it; Ray stays in few files."""

import ast

import pytest

from tests.project.sources import BESIDES, PACKAGES, SOURCES, TESTS, files_of, imports, name_of, parsed
from tests.support import ROOT

LAYERS = (  # from the bottom up; the rooms of one line do not import each other
    ("engine/cli/display.py",),
    ("engine/schema.py", "engine/errors.py", "engine/storage/documents.py"),
    ("cluster/scratch.py", "cluster/env_file.py"),
    ("cluster/ray_start.py",),
    ("cluster/session.py", "cluster/gpu.py"),
    ("engine/settings.py",),
    ("engine/storage",),
    ("engine/audio",),
    ("engine/corpus",),
    ("engine/separators",),
    ("engine/taggers",),
    ("engine/scoring",),
    ("engine/passes",),
    ("engine/selection",),
    ("engine/files",),
    ("train/data/batch.py",),
    ("train/losses.py",),
    ("train/capture.py",),
    ("train/data",),
    ("train/evaluation",),
    ("train/student.py",),
    ("train/progress.py",),
    ("train/task.py",),
    ("train/distil.py",),
    ("train/judges",),
    ("train/api.py",),
    ("tune/schedule.py",),
    ("tune/config.py",),
    ("tune/recipes.py",),
    ("tune/inputs.py",),
    ("tune/steps/artifacts.py", "tune/steps/__init__.py"),
    ("tune/steps/judges.py", "tune/steps/label_corpus.py"),
    ("tune/steps/work.py",),
    ("tune/steps/labels.py",),
    ("tune/steps/iteration.py",),
    ("tune/run.py",),
    ("tune/demo",),
    ("engine/cli",),
    ("train/tables.py",),
    ("train/cli.py",),
    ("tune/tables.py",),
    ("tune/report",),
    ("tune/search",),
    ("tune/show",),
    ("tune/cli.py",),
    ("cluster",),
    ("clearsep.py",),
)
MAY_NOT = {  # besides the order: what a package does not know of
    "engine": ("train", "tune"),
    "train": ("engine.passes.run", "tune"),
    "cluster": ("engine", "train", "tune", "clearsep"),
}
KNOWS_RAY = (
    "engine/passes/speed/ray_metrics.py",
    "engine/passes/run.py",
    "train/distil.py",
    "tune/search/",
    "cluster/",
)
PROJECT = (*PACKAGES, "clearsep")


def per_file(paths):
    return pytest.mark.parametrize("path", paths, ids=name_of)


def layer_of(name):
    """Number of a file's layer: that of its longest matching entry; and the entry. None for a file of no layer."""
    matches = [
        (len(entry), number, entry)
        for number, entries in enumerate(LAYERS)
        for entry in entries
        if name == entry or name.startswith(f"{entry}/")
    ]
    return max(matches)[1:] if matches else None


def file_of(module):
    """The project's file of a dotted name, or of the module that has the name; None for what is not the project's."""
    names = module.split(".")
    for parts in (names, names[:-1]):
        path = ROOT.joinpath(*parts)
        if parts and (path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()):
            return path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"
    return None


def imported_files(path):
    names = [name for name in imports(parsed(path)) if name.split(".")[0] in PROJECT]
    return {name_of(found) for name in names if (found := file_of(name)) is not None}


def test_imports_are_found_however_they_are_written():
    source = "import a.b, c as d\nfrom e import f\ndef late():\n    import j\n    from k.l import m\n"
    assert imports(ast.parse(source)) == {"a.b", "c", "e", "e.f", "j", "k.l", "k.l.m"}


def test_a_file_is_found_by_its_dotted_name():
    assert name_of(file_of("engine.schema.CLIPS")) == "engine/schema.py"
    assert name_of(file_of("engine.storage")) == "engine/storage/__init__.py"
    assert file_of("numpy") is None


@per_file([path for path in SOURCES if len(path.relative_to(ROOT).parts) != 2 or path.name != "__init__.py"])
def test_every_file_belongs_to_a_layer_and_imports_only_lower_ones(path):
    layer = layer_of(name_of(path))
    assert layer is not None, "add it to LAYERS"
    for other in imported_files(path):
        other_layer = layer_of(other)
        if other_layer is None:  # the __init__.py of a whole package, which is empty
            continue
        assert other_layer[0] < layer[0] or other_layer == layer, f"{other} is not below {name_of(path)}"


@per_file([path for path in files_of(*PACKAGES) if path.parent.parent == ROOT and path.name == "__init__.py"])
def test_packages_themselves_import_nothing(path):
    assert imports(parsed(path)) == set()


@per_file(files_of(*MAY_NOT))
def test_a_package_does_not_know_what_uses_it(path):
    barred = MAY_NOT[path.relative_to(ROOT).parts[0]]
    names = {name for name in imports(parsed(path)) if not f"{name}.".startswith("engine.errors.")}  # one tree for all
    assert [name for name in names if name.startswith(tuple(f"{one}." for one in barred)) or name in barred] == []


@per_file(SOURCES)
def test_only_the_outermost_files_know_ray(path):
    if not name_of(path).startswith(KNOWS_RAY):
        assert "ray" not in {name.split(".")[0] for name in imports(parsed(path))}


@per_file(SOURCES)
def test_private_parts_of_ray_stay_in_files_that_say_so(path):
    names = [name for name in imports(parsed(path)) if name.startswith(("ray._private", "ray.core.generated"))]
    assert not names or path.name.startswith("ray_")


@per_file([path for path in SOURCES if not name_of(path).startswith("engine/audio/")])
def test_a_users_audio_is_decoded_by_the_decoder_process_alone(path):
    """Another process has no limits of memory and time: one file could end it, or hold it up for ever."""
    found = set(imports(parsed(path)))
    assert found & {"av", "engine.audio.recordings", "engine.audio.worker", "torchaudio.io", "librosa"} == set()
    assert "soundfile" not in found or name_of(path).startswith("tune/demo/"), "the demonstration writes files"
    nodes = [one for one in ast.walk(parsed(path)) if isinstance(one, ast.ImportFrom)]
    names = {alias.name for node in nodes if node.module == "engine.audio.decode" for alias in node.names}
    assert names <= {"MAX_DURATION_S", "AudioInfo", "ChannelBlock"}


@per_file([*SOURCES, *BESIDES, *TESTS])
def test_ray_is_imported_as_a_whole(path):
    """``from ray import train`` would bind a name that a package of ours has."""
    nodes = [node for node in ast.walk(parsed(path)) if isinstance(node, ast.ImportFrom) and node.module == "ray"]
    assert nodes == []


@per_file(SOURCES)
def test_no_private_name_crosses_files(path):
    private = [
        f"{node.module}.{alias.name}"
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in PROJECT
        for alias in node.names
        if alias.name.startswith("_")
    ]
    assert private == []
