"""The check of every node before a long job, and the problems that it reports."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.preflight import PreflightConfig, preflight, report
from cluster.session import connect
from engine.cli.selfcheck import probe
from engine.separators.convert.convert import convert
from tests.support.command import COMMAND
from tests.support.models.originals import write_audiosep, write_tokenizer

NODE = {"NodeID": "abc", "NodeName": "n1", "NodeManagerHostname": "host", "Resources": {"CPU": 8.0}}
FIT = {
    "versions": {"python": "3.11.7", "ray": "2.60.0", "torch": "2.11.0", "clearsep": "1234"},
    "gpus_seen": [],
    "disk_gib": 50.0,
    "shm_gib": 8.0,
    "shm_total_gib": 8.0,
    "errors": {},
}


def reported(*, resources: dict[str, float] | None = None, offset_s: float = 0.0, **changed: Any) -> dict[str, Any]:
    node = NODE | {"Resources": NODE["Resources"] | (resources or {})}
    return report(node, FIT | changed, FIT, offset_s, PreflightConfig(out="s3://b/run", separator="/s"))


def test_a_fit_node_has_no_problems() -> None:
    row = reported(resources={"object_store_memory": 4.0 * 2**30})
    assert (row["problems"], row["notes"]) == ([], [])
    assert (row["cpus"], row["gpus"], row["host"]) == (8.0, 0.0, "host")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"versions": FIT["versions"] | {"ray": "2.59.0"}},
            "ray must be 2.60.0 as here, got 2.59.0; install the same version",
        ),
        ({"versions": FIT["versions"] | {"torch": None}}, "torch must be 2.11.0 as here, got none"),
        ({"versions": FIT["versions"] | {"clearsep": "other"}}, "clearsep must be 1234 as here, got other"),
        (
            {"resources": {"GPU": 2.0}, "gpus_seen": [{"name": "L4", "memory_gib": 22.0}]},
            "torch must see the 2 GPUs that Ray counts, got 1",
        ),
        ({"disk_gib": 1.5}, "free space for temporary files must be at least 5 GiB, got 1.5; make room"),
        ({"offset_s": -40.0}, "the clock must agree within 5 s, got -40 s; set it by NTP"),
        ({"errors": {"out_ms": "PermissionError: no"}}, "s3://b/run: PermissionError: no"),
        ({"errors": {"separator_rtf": "ValueError: no such folder"}}, "/s: ValueError: no such folder"),
    ],
)
def test_a_problem_says_what_to_change(changed: dict[str, Any], message: str) -> None:
    (problem,) = reported(**changed)["problems"]
    assert message in problem


def test_a_small_shared_memory_is_a_note_and_no_problem() -> None:
    row = reported(resources={"object_store_memory": 9.0 * 2**30}, shm_total_gib=0.1)
    assert row["problems"] == []
    assert "/dev/shm has 0.1 GiB, Ray's object store may need 9.0 GiB" in row["notes"][0]


def test_a_machine_checks_itself(tmp_path: Path, write_checkpoint: Callable[..., Path]) -> None:
    found = probe(out=str(tmp_path / "runs" / "one"), separator=str(write_checkpoint(["dog", "rain"])))
    assert found["errors"] == {}
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["out_ms"] > 0 and found["separator_rtf"] > 0 and found["disk_gib"] > 0
    assert list((tmp_path / "runs" / "one").iterdir()) == [], "it leaves nothing behind"


def test_a_separator_that_reads_text_is_tried_with_its_encoder(tmp_path: Path) -> None:
    convert(write_audiosep(tmp_path / "a.ckpt"), tmp_path / "audiosep", tokenizer=write_tokenizer(tmp_path / "tokens"))
    assert probe(separator=str(tmp_path / "audiosep"))["separator_rtf"] > 0
    shutil.rmtree(tmp_path / "audiosep" / "encoder")
    assert "there is no encoder in" in probe(separator=str(tmp_path / "audiosep"))["errors"]["separator_rtf"]


def test_a_failed_check_is_an_error_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = probe(out=str(tmp_path / "file" / "run"), separator=str(tmp_path / "nothing"))
    assert found["errors"].keys() == {"out_ms", "separator_rtf"}
    assert str(tmp_path / "nothing") in found["errors"]["separator_rtf"]
    assert "out_ms" not in found and "separator_rtf" not in found


def test_a_folder_that_machines_do_not_share_is_an_error(tmp_path: Path) -> None:
    error = probe(out=str(tmp_path), marker="written-elsewhere")["errors"]["out_ms"]
    assert "give a folder that all nodes share, or s3://" in error
    (tmp_path / "written-elsewhere").write_text("")
    assert probe(out=str(tmp_path), marker="written-elsewhere")["errors"] == {}


@pytest.fixture(scope="module")
def ray_session() -> Iterator[None]:
    with connect(num_cpus=1):
        yield


@pytest.mark.slow
def test_every_node_answers(
    ray_session: None, tmp_path: Path, write_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_checkpoint(["dog"])
    monkeypatch.chdir(folder.parent)
    (row,) = preflight(PreflightConfig(out="run", separator=folder.name))  # nodes run in folders of their own
    assert row["problems"] == []
    assert row["separator_rtf"] > 0 and abs(row["clock_offset_s"]) < 1.0
    assert list((folder.parent / "run").iterdir()) == [], "the check leaves nothing there"
    (row,) = preflight(PreflightConfig(min_disk_gib=1e6))
    assert "make room" in row["problems"][0]


@pytest.mark.slow
def test_the_command_reports_problems_and_exits_with_1(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = subprocess.run(
        [str(COMMAND), "preflight", "--out", str(tmp_path / "file" / "run"), "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    (row,) = json.loads(done.stdout)
    assert str(tmp_path / "file" / "run") in row["problems"][0]
    assert "error: the cluster is not ready" in done.stderr
