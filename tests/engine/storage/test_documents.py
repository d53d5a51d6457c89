"""Files of others: what is wrong is said in words that name the file and the field, and little memory is taken."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.cli.console import print_result
from engine.passes.shards import read_summary, stem_shards
from engine.schema import SCORES
from engine.scoring.estimator import SiSdrEstimator, load_estimator, save_estimator
from engine.selection.thresholds import Thresholds
from engine.selection.tracks import read_tracks, select_tracks
from engine.separators import NetworkConfig, QuerySeparator, find_separator, load, save
from engine.settings import override, plain, read_yaml
from engine.storage.documents import MAX_DEPTH, MAX_DESCRIPTION_BYTES, bounded, parse_json, parse_yaml
from engine.storage.files import read_json, sha256_file, write_json
from engine.taggers import ShareTagger, TagNetworkConfig, load_tagger, save_tagger
from engine.taggers.tagger_source import find_tagger
from tests.support.command import Cli
from tune.recipes import run_config
from tune.run import run, summarise
from tune.search.config import read_search
from tune.tables import inspect, run_tables

Write = Callable[..., Path]
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)
MERGE_BOMB = "a0: &a0 {k: v}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 12)
)
LONG_BOMB = f"a: &a {'x' * 100_000}\nb: [{', '.join(['*a'] * 10_000)}]\n"
TAGGER = TagNetworkConfig(sample_rate_hz=8000, num_fft=256, num_bands=16, channels=16)


# YAML.


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (BOMB, "its aliases must stand for at most 1,048,576 characters, got more"),
        (MERGE_BOMB, "its aliases must stand for at most 1,048,576 characters, got more"),
        (LONG_BOMB, "its aliases must stand for at most 1,048,576 characters, got more"),
        ("a: &a [*a]", "an alias must not stand for what it is part of"),
        ("a: &a {b: *a}", "an alias must not stand for what it is part of"),
        ("[" * 2000 + "]" * 2000, "it must be nested at most 50 deep"),
        ("[" * 60 + "]" * 60, "it must be nested at most 50 deep"),
        ("{a: " * 60 + "1" + "}" * 60, "it must be nested at most 50 deep"),
        ("a: 2001-01-01", "values must be text, numbers, true, false, null, lists or mappings, got a date"),
        ("a: 2001-99-01", "month must be in 1..12"),
        ("a: !!set {b}", "got a set"),
        ("a: !!binary aGk=", "got a bytes"),
        ("a: !!python/object/apply:os.system [x]", "could not determine a constructor for the tag"),
        (f"a: {'9' * 5000}", "Exceeds the limit"),
        (f"a: 0x{'f' * 50_000}", "a number must be of 64 bits"),
        ("a: [1", "but got '<stream end>' in line 1"),
        ("a: b\0", "unacceptable character"),
        (b"\xff\xfe\xfa", "unacceptable character"),
        ("? [a]\n: b", "unhashable key"),
        ("a: 1\n--- \nb: 2", "but found another document"),
    ],
)
def test_yaml_that_cannot_be_settings_is_an_error_in_words(
    text: str | bytes, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = text.encode() if isinstance(text, str) else text
    (tmp_path / "run.yaml").write_bytes(data)
    with pytest.raises(ValueError, match=r"cannot read .*run\.yaml as YAML \(") as caught:
        read_yaml(tmp_path / "run.yaml", "a: b")
    if data != LONG_BOMB.encode():
        assert reason in str(caught.value)
    assert str(caught.value).endswith("; correct it")
    with pytest.raises(ValueError, match=r"cannot read .*run\.yaml as YAML"):
        read_search(tmp_path / "run.yaml")


def test_settings_with_aliases_are_read() -> None:
    text = "a: &a {x: 1, y: [1.5, null, true]}\nb: *a\nc: {<<: *a, x: 2}\n"
    inner = {"x": 1, "y": [1.5, None, True]}
    assert parse_yaml(text) == {"a": inner, "b": inner, "c": {**inner, "x": 2}}
    assert parse_yaml("") is None


def test_a_value_of_set_is_bounded_too() -> None:
    for text in (f"a={'[' * 5000}", f"a={'[' * 60}{']' * 60}", "a={b: &a [*a]}", f"a=0x{'f' * 1000}"):
        with pytest.raises(ValueError, match="--set must have a YAML value"):
            override({}, [text])
    with pytest.raises(ValueError, match="--set must have a key of at most 50 parts, got 20000"):
        override({}, [".".join("a" * 20_000) + "=1"])
    deep = override({}, [".".join("a" * MAX_DEPTH) + "=1"])
    assert plain(deep) == deep


def test_a_large_file_of_settings_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "run.yaml").open("wb") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(ValueError, match="at most 262,144 bytes, got more"):
        read_yaml(tmp_path / "run.yaml", "a: b")
    with pytest.raises(ValueError, match="at most 262,144 bytes"):
        read_yaml("/dev/zero", "a: b")


# JSON.


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000 + "]" * 100_000, "it must be nested at most 50 deep"),
        ("[" * 60 + "]" * 60, "it must be nested at most 50 deep"),
        ('{"a":' * 60 + "1" + "}" * 60, "it must be nested at most 50 deep"),
        ('{"a": NaN}', "a number must be finite, got NaN"),
        ("[-Infinity]", "a number must be finite, got -Infinity"),
        ("[1e999]", "a number must be of 64 bits"),
        ("9" * 5000, "Exceeds the limit"),
        ("9" * 30, "a number must be of 64 bits"),
        ("{", "Expecting property name"),
        ("", "Expecting value"),
    ],
)
def test_json_that_is_none_is_an_error_in_words(text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"cannot read .*a\.json as JSON \(.*; delete it") as caught:
        read_json(tmp_path / "a.json")
    assert reason in str(caught.value)


def test_json_and_files_have_a_size() -> None:
    assert parse_json('{"a": [1, 2.5, null, true, "\\u00fc"]}') == {"a": [1, 2.5, None, True, "ü"]}
    with pytest.raises(ValueError, match="it must have at most 3 characters, got 4"):
        parse_json("1234", most=3)
    with Path("/dev/zero").open("rb") as file, pytest.raises(ValueError, match="at most 10 bytes"):
        bounded(file, 10)


# Networks.


@pytest.fixture
def separator(tmp_path: Path) -> Path:
    """A folder with a small separator."""
    config = NetworkConfig(
        sample_rate_hz=8000, num_fft=256, hop_samples=128, num_bands=8, channels=8, num_blocks=1, query_features=4
    )
    save(QuerySeparator(config, ["bell", "dog"]), tmp_path / "separator")
    return tmp_path / "separator"


@pytest.fixture
def tagger(tmp_path: Path) -> Path:
    """A folder with a small tagger."""
    save_tagger(ShareTagger(TAGGER, ["bell", "dog"]), tmp_path / "tagger")
    return tmp_path / "tagger"


WRONG = {
    "not JSON": (lambda one: "{'a': 1}", "cannot read .*KIND.json as JSON"),
    "not an object": (lambda one: "[1]", "KIND.json must have format 1, got None"),
    "empty": (lambda one: "", "cannot read .*KIND.json as JSON"),
    "nested": (lambda one: {**one, "history": nested(60)}, "cannot read .*KIND.json as JSON .*nested at most 50"),
    "NaN": (lambda one: json.dumps({**one, "history": [{"a": float("nan")}]}), "KIND.json as JSON .*finite, got NaN"),
    "missing": (lambda one: {k: v for k, v in one.items() if k != "history"}, "KIND.json must have history, got a"),
    "no network": (lambda one: {k: v for k, v in one.items() if k != "network"}, "KIND.json must have network, got"),
    "surplus": (lambda one: {**one, "code": "x"}, "KIND.json must have no code, got it"),
    "labels of no text": (lambda one: {**one, "labels": ["bell", 5]}, "labels.1 of .*KIND.json must be text, got 5"),
    "labels of null": (lambda one: {**one, "labels": None}, "labels of .*KIND.json must be a list, got None"),
    "labels are text": (lambda one: {**one, "labels": "bell"}, "labels of .*KIND.json must be a list, got 'bell'"),
    "no labels": (lambda one: {**one, "labels": []}, r"cannot load the KIND .*KIND\.json: a KIND must have"),
    "an empty label": (lambda one: {**one, "labels": ["bell", ""]}, "labels.1 of .*KIND.json must be text of at least"),
    "a long label": (lambda one: {**one, "labels": ["bell", "x" * 5000]}, "labels.1 of .*must be text of at most 4096"),
    "half a letter": (lambda one: {**one, "labels": ["bell", "\ud800"]}, "labels.1 of .*must be text in UTF-8"),
    "the same labels": (lambda one: {**one, "labels": ["bell", "bell"]}, "KIND.json: labels must differ, got"),
    "labels of one spelling": (lambda one: {**one, "labels": ["a b", "A_b"]}, r"KIND\.json.*labels"),
    "another number of labels": (lambda one: {**one, "labels": ["a", "b", "c"]}, "into a network of KIND.json"),
    "a fraction": (lambda one: net(one, channels=8.5), "network.channels of .*KIND.json must be a whole number"),
    "text": (lambda one: net(one, channels="8"), "network.channels of .*KIND.json must be a whole number, got '8'"),
    "true": (lambda one: net(one, channels=True), "network.channels of .*KIND.json must be a whole number, got True"),
    "null": (lambda one: net(one, channels=None), "network.channels of .*KIND.json must be a whole number"),
    "negative": (lambda one: net(one, channels=-8), "KIND.json: channels must be at least 1, got -8"),
    "zero": (lambda one: net(one, num_fft=0), "KIND.json: num_fft must be at least 1, got 0"),
    "huge": (lambda one: net(one, channels=10**9), "KIND.json: channels must be at most 16384, got 1000000000"),
    "huge bands": (lambda one: net(one, num_bands=8 * 10**8), "KIND.json: num_bands must be at most 4096"),
    "huge window": (lambda one: net(one, num_fft=2**30), "KIND.json: num_fft must be at most 65536"),
    "huge rate": (lambda one: net(one, sample_rate_hz=10**9), "(sample_rate_hz of|KIND.json: sample_rate_hz must be)"),
    "larger": (lambda one: net(one, channels=16384), "cannot load .*weights.safetensors into a network of KIND.json"),
    "large filters": (lambda one: net(one, num_bands=4096, num_fft=65536), "network of KIND.json has filters of"),
    "an unknown setting": (lambda one: net(one, chanels=8), "KIND.json: there is no setting chanels"),
    "a missing setting": (lambda one: net(one, channels=...), "KIND.json: channels must be set, got nothing"),
    "network is a list": (lambda one: {**one, "network": [1]}, "network of .*KIND.json must be a mapping, got .1."),
    "checksum": (lambda one: {**one, "weights_sha256": 5}, "weights_sha256 of .*KIND.json must be text, got 5"),
    "history": (lambda one: {**one, "history": ["x"]}, "history.0 of .*KIND.json must be a mapping, got 'x'"),
    "fingerprint": (lambda one: {**one, "fingerprint": "x\n"}, "fingerprint of .*KIND.json must"),
}  # fmt: skip


def net(description: dict[str, Any], **changes: Any) -> dict[str, Any]:
    network = {key: value for key, value in (description["network"] | changes).items() if value is not ...}
    return {**description, "network": network}


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("kind", ["separator", "tagger"])
def test_a_description_that_is_wrong_is_an_error_in_words(
    kind: str, name: str, request: pytest.FixtureRequest, cli: Cli
) -> None:
    folder = request.getfixturevalue(kind)
    path, (change, message) = folder / f"{kind}.json", WRONG[name]
    changed = change(json.loads(path.read_text()))
    path.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    message = message.replace("KIND", kind)
    with pytest.raises(ValueError, match=message) as caught:
        load(folder) if kind == "separator" else load_tagger(folder)
    assert str(folder) in str(caught.value) and "; " in str(caught.value)
    with pytest.raises(ValueError, match=message):
        find_separator(folder) if kind == "separator" else find_tagger(folder)
    if kind == "separator":
        assert f"{kind}.json" in cli("inspect", folder).error()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "its header must be in the file"),
        (b"\xff" * 8, "its header must be in the file and at most 4,194,304 bytes"),
        ((2**40).to_bytes(8, "little") + b"{}", "its header must be in the file"),
        ((2).to_bytes(8, "little") + b"[]", "must be a mapping, got"),
        ((2).to_bytes(8, "little") + b"{}", "must be F32 of shape .*, got none"),
        ((11).to_bytes(8, "little") + b'{"a": null}', "must be a mapping, got None"),
        ((3).to_bytes(8, "little") + b"{a}", "Expecting property name"),
    ],
)
def test_weights_that_are_none_are_an_error_in_words(separator: Path, content: bytes, message: str) -> None:
    weights, path = separator / "weights.safetensors", separator / "separator.json"
    weights.write_bytes(content)
    write_json(path, json.loads(path.read_text()) | {"weights_sha256": sha256_file(weights)})
    for open_ in (load, find_separator):
        with pytest.raises(ValueError, match=rf"cannot load .*weights\.safetensors into a network .*{message}"):
            open_(separator)


def test_comparing_draws_no_random_numbers(separator: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    find_separator(separator)
    assert torch.equal(torch.rand(1), expected)


MEASURED = """
import json, pathlib, resource, sys
import numpy, torch, yaml
import engine.scoring.estimator, engine.separators, engine.taggers, tune.tables, tune.search.config, tune.recipes
from engine.corpus.read import read_corpus
from train.evaluation.list_formats import read_list
opened = {"separator": engine.separators.load, "tagger": engine.taggers.load_tagger, "inspect": tune.tables.inspect,
          "corpus": read_corpus, "list": lambda path: read_list(pathlib.Path(path)),
          "space": tune.search.config.read_search,
          "run": tune.recipes.run_config, "estimator": engine.scoring.estimator.load_estimator}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for kind, path in zip(sys.argv[1::2], sys.argv[2::2]):
    try:
        opened[kind](path)
    except ValueError as error:
        print(str(error)[-300:], file=sys.stderr)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def grown_mib(*words: object) -> tuple[float, list[str]]:
    """Growth of a process's memory as it opens several things, given as kind and path, and its errors."""
    command = [sys.executable, "-c", MEASURED, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    return int(done.stdout) / 1024, done.stderr.splitlines()


@pytest.mark.slow
def test_networks_that_are_only_stated_take_no_memory(separator: Path, tagger: Path, tmp_path: Path) -> None:
    words: list[object] = []
    for number, changes in enumerate(({"channels": 10**9}, {"channels": 16384}, {"num_bands": 4096})):
        for folder, kinds in ((separator, ("separator", "inspect")), (tagger, ("tagger",))):
            copy = tmp_path / f"{folder.name}-{number}"
            shutil.copytree(folder, copy)
            path = copy / f"{folder.name}.json"
            write_json(path, net(json.loads(path.read_text()), **changes))
            words += [word for kind in kinds for word in (kind, copy)]
    mib, errors = grown_mib(*words)
    assert len(errors) == 9 and all(".json" in error for error in errors)
    assert mib < 100


SMALL = {
    150: [
        ("run", "run.yaml", BOMB),
        ("space", "space.yaml", MERGE_BOMB),
        ("run", "large.yaml", "[" + "[]," * (1 << 24) + "]"),
        ("corpus", "a.jsonl", '{"path": "a", "labels": ' + "[" * (1 << 23) + "\n"),
        ("corpus", "b.jsonl", '{"path": "a", "labels": [' + "[]," * (1 << 23) + "[]]}\n"),
        ("list", "c.csv", "idx,caption,src_wav,noise_wav\n" + "," * (1 << 25)),
    ],
    500: [
        ("space", "full.yaml", "a: [" + "[]," * 80_000 + "]"),
        ("corpus", "d.csv", "path,labels\na," + '"[' + "[]," * (1 << 23) + '[]]"\n'),
        ("corpus", "e.jsonl", '{"path": "a", "labels": [' + "[]," * (1 << 20) + "[]]}\n"),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("most_mib", SMALL)
def test_small_files_take_little_memory(tmp_path: Path, most_mib: int) -> None:
    for _, name, text in SMALL[most_mib]:
        (tmp_path / name).write_text(text)
    mib, _ = grown_mib(*(word for kind, name, _ in SMALL[most_mib] for word in (kind, tmp_path / name)))
    assert mib < most_mib


def test_a_description_has_a_size(separator: Path) -> None:
    with (separator / "separator.json").open("ab") as file:
        file.truncate(MAX_DESCRIPTION_BYTES + 1)
    with pytest.raises(ValueError, match="at most 4,194,304 bytes, got more"):
        find_separator(separator)


# Estimators.


ESTIMATOR = SiSdrEstimator(
    names=("mask_snr_db", "re_sdr_db"), lowest=(0.0, 0.0), highest=(1.0, 1.0), mean=(0.5, 0.5), deviation=(1.0, 1.0),
    weight=(1.0, 1.0), bias=1.0, error_at_db=(0.0, 1.0), error_db=(1.0, 1.0), about={"rmse_db": 1.0},
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"names": ["mask_snr_db", 5]}, "names.1 of .*estimator.json must be text, got 5"),
        ({"names": "mask_snr_db"}, "names of .*estimator.json must be a list"),
        ({"bias": "1"}, "bias of .*estimator.json must be a number, got '1'"),
        ({"bias": None}, "bias of .*estimator.json must be a number, got None"),
        ({"bias": True}, "bias of .*estimator.json must be a number, got True"),
        ({"mean": [0.5]}, "mean of .*estimator.json must have a number for each of its 2 names, got 1"),
        ({"error_db": []}, "error_db of .*estimator.json must have a number for each of its 2 error_at_db, got 0"),
        ({"deviation": [1.0, 0.0]}, "deviation of .*estimator.json must be above 0, got 0.0"),
        ({"about": []}, "about of .*estimator.json must be a mapping"),
        ({"code": 1}, "estimator.json must have no code, got it"),
    ],
)
def test_a_wrong_estimator_is_an_error_in_words(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    save_estimator(ESTIMATOR, tmp_path)
    assert load_estimator(tmp_path) == ESTIMATOR
    path = tmp_path / "estimator.json"
    write_json(path, json.loads(path.read_text()) | changes)
    with pytest.raises(ValueError, match=message):
        load_estimator(tmp_path)


def test_an_estimator_is_stored_with_all_of_its_fields(tmp_path: Path) -> None:
    other = replace(ESTIMATOR, bias=2)
    save_estimator(other, tmp_path)
    assert asdict(load_estimator(tmp_path)) == asdict(other), "a whole number is a number"


# Records of passes, selections and runs.


@pytest.mark.parametrize(
    "content", ["{", "[]", "null", "3", '{"shards": NaN}', '{"shards": []}', '{"shards": {"a": 5}}']
)
def test_a_wrong_manifest_of_a_pass_is_an_error_in_words(
    cli: Cli, write_pass: Write, tmp_path: Path, content: str
) -> None:
    out = write_pass([("clip", "bell", np.zeros(100, np.float32), dict.fromkeys(SCORES.names))])
    manifest = out / "stems" / "manifest.json"
    good = json.loads(manifest.read_text())
    manifest.write_text(content)
    for words in (["inspect", out], ["filter", out, "-o", tmp_path / "tracks"]):
        outcome = cli(*words)
        assert (outcome.code, outcome.out) == (1, ""), "it is damaged"
        assert "manifest.json" in outcome.err and "Traceback" not in outcome.err
    for name in good:
        write_json(manifest, {key: value for key, value in good.items() if key != name})
        with pytest.raises(ValueError, match=rf"manifest\.json must have {name}, got a file without it"):
            read_summary(out / "stems") if name != "shards" else stem_shards(out / "stems")


def test_a_wrong_manifest_of_a_selection_is_an_error_in_words(cli: Cli, write_pass: Write, tmp_path: Path) -> None:
    out = write_pass([("clip", "bell", np.zeros(100, np.float32), dict.fromkeys(SCORES.names))])
    select_tracks(out, tmp_path / "tracks", Thresholds())
    manifest = tmp_path / "tracks" / "manifest.json"
    good = json.loads(manifest.read_text())
    for changes in (
        "[]",
        "{",
        {"sha256": 5},
        {"sha256": {}},
        {"stems": None},
        {"num_kept": "many"},
        {"thresholds": []},
    ):
        manifest.write_text(changes if isinstance(changes, str) else json.dumps(good | changes))
        outcome = cli("inspect", tmp_path / "tracks")
        assert outcome.code in (1, 2) and str(tmp_path / "tracks") in outcome.err and not outcome.out
        with pytest.raises(ValueError, match="tracks"):
            read_tracks(tmp_path / "tracks")
    for name in good:
        write_json(manifest, {key: value for key, value in good.items() if key != name})
        outcome = cli("inspect", tmp_path / "tracks")
        assert outcome.code in (1, 2) and "manifest.json" in outcome.err and not outcome.out


def test_a_wrong_record_of_a_run_is_an_error_in_words(cli: Cli, tmp_path: Path) -> None:
    record = {
        **dict.fromkeys(("num_clips", "num_set_aside", "num_queries", "num_stems", "num_kept", "num_failed"), 1),
        **{"iteration": 1, "num_rejected": {}, "kept_h": 0.1, "thresholds": {}, "validation": None, "wall_s": 1.0},
    }
    iteration, summary = tmp_path / "iterations" / "1" / "iteration.json", tmp_path / "summary.json"
    write_json(iteration, record)
    assert summarise(tmp_path)["iterations"] == [record]
    assert cli("inspect", tmp_path).code == 0
    for changes in ({"num_clips": "3"}, {"num_rejected": {"a": None}}, {"kept_h": None}, {"validation": [1]}):
        write_json(iteration, record | changes)
        with pytest.raises(ValueError, match=rf"{next(iter(changes))}.* of .*iteration\.json must be .*, got "):
            summarise(tmp_path)
        write_json(summary, {"iterations": [record | changes]})
        assert f"iterations.0.{next(iter(changes))}" in cli("inspect", tmp_path).error()
    for name in record:
        write_json(summary, {"iterations": [{key: value for key, value in record.items() if key != name}]})
        assert f"must have iterations.0.{name}, got" in cli("inspect", tmp_path).error()
        with pytest.raises(ValueError, match="summary"):
            print_result(lambda: run_tables(json.loads(summary.read_text())), {}, False)
    for content in ("[]", "{", '{"iterations": {}}', "{}"):
        summary.write_text(content)
        assert "summary.json" in cli("inspect", tmp_path).error()


@pytest.mark.parametrize(
    "content", ["[]", "3", "a: [", "schedule: 5", "schedule: {a: 1}", "schedule: [3]", BOMB, "a: 1"]
)
def test_a_wrong_config_of_a_run_is_an_error_in_words(tmp_path: Path, content: str) -> None:
    for name in ("natural.csv", "clips.csv"):
        (tmp_path / name).write_text("path,labels,label\na.wav,dog;rain,dog\nb.wav,rain;dog,rain\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(content)
    config = run_config("laptop", [f"corpus={tmp_path / 'natural.csv'}", f"clean={tmp_path / 'clips.csv'}"])
    with pytest.raises(ValueError, match=r"run.* (as YAML|must (be a mapping|hold a run)).*another folder"):
        run(config, tmp_path / "run")


def test_inspect_takes_what_is_right(separator: Path) -> None:
    assert inspect(separator)[1]["labels"] == ["bell", "dog"]


def test_a_network_is_compared_without_loading_the_compiler_of_torch(tmp_path: Path) -> None:
    """Its import takes seconds in every process, and fails for a user without a name."""
    tiny = NetworkConfig(channels=16, num_blocks=1, num_bands=8, num_fft=256, hop_samples=128, sample_rate_hz=8000)
    save(QuerySeparator(tiny, ["bell", "dog"]), tmp_path / "separator")
    save_tagger(ShareTagger(TagNetworkConfig(sample_rate_hz=8000, channels=16), ["bell", "dog"]), tmp_path / "tagger")
    code = (
        "import sys; from engine.separators import load; from engine.taggers import load_tagger;"
        f"load({str(tmp_path / 'separator')!r}); load_tagger({str(tmp_path / 'tagger')!r});"
        "print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
