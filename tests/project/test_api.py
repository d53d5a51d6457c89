"""The public Python API: its names and signatures, what its import loads, its doctests, and a student in ten lines."""

from __future__ import annotations

import ast
import doctest
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import clearsep as cs
from engine.separators import QuerySeparator, save
from engine.taggers import ShareTagger, TagNetworkConfig, save_tagger
from tests.conftest import RATE_HZ, TINY
from tests.support import ROOT
from tests.support.wav import write_wav

SIGNATURES = {
    "connect": "(address: 'str | None' = None, *, num_cpus: 'int | None' = None, num_gpus: 'int | None' = None)"
    " -> 'Iterator[None]'",
    "distil": "(out: 'Name', *, clean: 'SourceClips | Name | None' = None, tracks: 'Name | None' = None,"
    " start: 'Name | None' = None, config: 'DistilConfig | Mapping[str, Any] | None' = None,"
    " network: 'NetworkConfig | Mapping[str, Any] | None' = None,"
    " validation: 'ValidationConfig | Mapping[str, Any] | None' = None, text_encoder: 'Name | None' = None)"
    " -> 'TrainingRecord'",
    "evaluate": "(separator: 'Separator | Name', clips: 'SourceClips | Name', *, num_mixtures: 'int' = 300,"
    " num_sources: 'int' = 2, seed: 'int' = 0, config: 'Mapping[str, Any] | None' = None) -> 'Evaluation'",
    "export_tracks": "(tracks: 'Name', out: 'Name', *, format: 'str', shard_mb: 'float' = 500.0) -> 'ExportManifest'",
    "from_pretrained": "(name: 'SeparatorFactory | Name', device: 'str' = 'cpu') -> 'Separator'",
    "label_corpus": "(corpus: 'Corpus | Name', out: 'Name', *, tagger: 'TaggerSource | Name',"
    " known: 'SourceClips | Name | None' = None, presence: 'Presence | Name | None' = None, precision: 'float' = 0.8,"
    " ontology: 'Name | None' = None, config: 'PassConfig | Mapping[str, Any] | None' = None,"
    " retry_failed: 'bool' = False) -> 'LabelSummary'",
    "load_separator": "(name: 'SeparatorFactory | Name', device: 'str' = 'cpu') -> 'Separator'",
    "read_corpus": "(source: 'Name', *, class_map: 'Name | None' = None, audio_root: 'Name | None' = None,"
    " columns: 'Mapping[str, str] | str | None' = None, allow_outside: 'bool' = False,"
    " needs_labels: 'bool' = True) -> 'Corpus'",
    "read_sources": "(path: 'Name', *, folds: 'Collection[int] | None' = None, audio_root: 'Name | None' = None,"
    " columns: 'Mapping[str, str] | str | None' = None, allow_outside: 'bool' = False) -> 'SourceClips'",
    "run": "(config: 'RunConfig | Mapping[str, Any] | Name', out: 'Name', *, retry_failed: 'bool' = False,"
    " slice: 'SliceName | None' = None) -> 'RunSummary'",
    "run_pass": "(corpus: 'Corpus', out: 'Name', *, separator: 'SeparatorSource | SeparatorFactory | Name',"
    " tagger: 'TaggerSource | Name | None' = None, config: 'PassConfig | Mapping[str, Any] | None' = None,"
    " retry_failed: 'bool' = False, slice: 'SliceName | None' = None) -> 'PassSummary'",
    "save_pretrained": "(name: 'Name', out: 'Name') -> 'None'",
    "score_files": "(mixture: 'str | Path', stems: 'Mapping[str, str | Path]',"
    " thresholds: 'Thresholds | None' = None, *,"
    " separator: 'Separator | None' = None, tagger: 'Tagger | str | os.PathLike[str] | None' = None,"
    " estimator: 'SiSdrEstimator | str | os.PathLike[str] | None' = None) -> 'list[StemVerdict]'",
    "search": "(config: 'SearchConfig | Mapping[str, Any] | Name', out: 'Name', *, max_hours: 'float | None' = None)"
    " -> 'SearchSummary'",
    "separate_file": "(path: 'str | os.PathLike[str]', queries: 'Queries', *,"
    " separator: 'AnySeparator | Sequence[AnySeparator]', out: 'Name', unwanted: 'Sounds' = (),"
    " file_format: 'FileFormat' = 'wav', residual: 'bool' = False,"
    " complete: 'bool' = False, estimator: 'SiSdrEstimator | Name | None' = None, overwrite: 'bool' = False,"
    " device: 'str' = 'auto') -> 'list[FileStem]'",
    "select_tracks": "(stems: 'Name', out: 'Name', thresholds: 'Thresholds', *,"
    " estimator: 'Estimator | str | os.PathLike[str] | None' = None, accepted: 'AcceptedLabels | None' = None,"
    " events: 'Iterable[EventRow] | None' = None) -> 'Selection'",
}
OTHERS = {"AudioExample", "Query", "QueryPart", "Separator", "Thresholds", "metrics"}
WITH_RAY = (
    "connect",
    "label_corpus",
    "run_pass",
    "select_tracks",
    "export_tracks",
    "distil",
    "run",
    "search",
)  # in this order: they build on one another


def tone(hz: float, duration_s: float = 1.0) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * hz * np.arange(round(duration_s * RATE_HZ)) / RATE_HZ)).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Inputs of the examples, in the current folder: clips, natural recordings, a separator and a run's settings."""
    out = tmp_path_factory.mktemp("api")
    sounds = {"bell": [tone(400), tone(500)], "dog": [tone(900), tone(1100)]}
    lines = ["path,label"]
    for label, signals in sounds.items():
        for number, samples_T in enumerate(signals):
            write_wav(out / f"{label}{number}.wav", samples_T, sample_rate_hz=RATE_HZ)
            lines.append(f"{label}{number}.wav,{label}")
    (out / "clips.csv").write_text("\n".join(lines) + "\n")
    for number in range(2):
        mixture_T = sounds["bell"][number] + sounds["dog"][number]
        write_wav(out / f"natural{number}.wav", mixture_T, sample_rate_hz=RATE_HZ)
    (out / "natural.csv").write_text("path,labels\nnatural0.wav,bell;dog\nnatural1.wav,bell;dog\n")
    for name, samples_T in (("bell", sounds["bell"][0]), ("dog", sounds["dog"][0])):
        write_wav(out / f"{name}.wav", samples_T, sample_rate_hz=RATE_HZ)
    write_wav(out / "mixture.wav", sounds["bell"][0] + sounds["dog"][0], sample_rate_hz=RATE_HZ)
    torch.manual_seed(0)
    save(QuerySeparator(TINY, ["bell", "dog"]), out / "separator")
    network = TagNetworkConfig(sample_rate_hz=RATE_HZ, num_fft=256, channels=16, num_bands=16)
    save_tagger(ShareTagger(network, ["bell", "dog"]), out / "tagger")
    (out / "mixed").mkdir()
    (out / "mixed" / "0.wav").write_bytes((out / "mixture.wav").read_bytes())
    (out / "run.yaml").write_text(
        "corpus: natural.csv\nclean: clips.csv\nseparator: separator\n"
        "validation: {clips: clips.csv, num_mixtures: 2}\n"
        "distil: {steps: 2, num_workers: 0, mix: {batch_size: 2, segment_s: 0.5}}\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(out)
        yield out


@pytest.fixture(scope="module")
def ray_session() -> Iterator[None]:
    with cs.connect(num_cpus=2):
        yield


def test_the_public_names_are_pinned() -> None:
    public = set(dir(cs)) - {"command_line", "main"}
    assert public == {*SIGNATURES, *OTHERS}
    assert {name: str(inspect.signature(getattr(cs, name))) for name in SIGNATURES} == SIGNATURES
    assert all(inspect.isclass(getattr(cs, name)) for name in OTHERS - {"metrics"}) and inspect.ismodule(cs.metrics)
    assert str(inspect.signature(cs.Query)) == "(wanted: 'Sounds', unwanted: 'Sounds' = ()) -> 'None'"
    assert str(inspect.signature(cs.AudioExample)) == "(*, samples_T: 'np.ndarray', sample_rate_hz: 'int') -> None"


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse((ROOT / "clearsep.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imported = {
        alias.asname: f"{node.module}:{alias.name}"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imported.pop("metrics") == "engine.scoring:metrics"
    assert imported == {name: target for name, target in cs._PUBLIC.items() if name != "metrics"}


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'clearsep' has no attribute 'run_passes'"):
        cs.run_passes  # noqa: B018


def test_the_import_loads_neither_torch_nor_ray() -> None:
    code = (
        "import sys, clearsep; dir(clearsep); print(*(set(sys.modules) & {'torch', 'ray', 'numpy', 'typer', 'rich'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == []


def run_examples(name: str) -> None:
    """Run the doctests of a public name in the current folder."""
    text = inspect.getdoc(getattr(cs, name)) or ""
    test = doctest.DocTestParser().get_doctest(text, {"cs": cs, "torch": torch}, name, None, 0)
    assert test.examples, f"{name} has no example"
    report: list[str] = []
    results = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test, out=report.append)
    assert results.failed == 0, "".join(report)


@pytest.mark.parametrize("name", sorted({*SIGNATURES, *OTHERS} - {*WITH_RAY}))
def test_examples(name: str, folder: Path) -> None:
    run_examples(name)


@pytest.mark.slow
def test_examples_that_need_ray(folder: Path, ray_session: None) -> None:
    for name in WITH_RAY:
        if name != "search":  # examples/search.py, which is run, has the same call, and takes a minute
            run_examples(name)


@pytest.mark.slow
def test_ten_lines_take_a_folder_of_recordings_to_a_student(folder: Path, ray_session: None) -> None:
    small = {"steps": 4, "num_workers": 0, "mix": {"batch_size": 2, "segment_s": 0.5}}

    corpus = cs.read_corpus("natural.csv")
    with cs.connect():
        cs.distil("seed", clean="clips.csv", config=small, network=TINY)
        cs.run_pass(corpus, "seed-pass", separator="seed")
        cs.select_tracks("seed-pass", "seed-tracks", cs.Thresholds(min_re_sdr_db=-100))
        cs.distil("pupil", clean="clips.csv", tracks="seed-tracks", start="seed", config=small)
    report = cs.evaluate("pupil", "clips.csv", num_mixtures=2)

    assert report["num_stems"] == 4
    assert cs.load_separator("pupil").labels == ("bell", "dog")
