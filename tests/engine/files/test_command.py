"""The command ``clearsep separate``: outputs, pipes, failures, and what it refuses."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from engine.audio.decoder import shared_decoder
from tests.support import ROOT
from tests.support.answers import snr_db
from tests.support.command import COMMAND, Cli

RATE_HZ = 8000
SIGNAL_T = 0.1 * np.random.default_rng(0).standard_normal(3 * RATE_HZ).astype(np.float32)
SEPARATOR = ("--separator", "tests.support.answers:open_band_pass")


@pytest.fixture
def street(tmp_path: Path) -> Path:
    sf.write(tmp_path / "street.wav", np.stack([SIGNAL_T, -SIGNAL_T], axis=1), RATE_HZ, subtype="FLOAT")
    return tmp_path / "street.wav"


def test_stems_of_a_folder_are_written_and_shown(cli: Cli, street: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("separate", street, "--query", "low", "--query", "high", *SEPARATOR, "-o", out, "--residual")
    document = cli(*words, "--format", "flac", "--json").document()
    assert [Path(stem["path"]).name for stem in document["stems"]] == [
        "street.low.flac",
        "street.high.flac",
        "street.residual.flac",
    ]
    assert document["failures"] == []
    done = cli(*words)
    assert done.code == 0 and "street.low.wav" in done.out and "level dB" in done.out
    assert "3.0 s of audio" in done.err
    assert "there already" in cli(*words).out


def test_one_bad_file_is_a_line_and_the_exit_code(cli: Cli, street: Path, tmp_path: Path) -> None:
    (tmp_path / "bad\x1b.wav").write_bytes(b"RIFFnothing")
    done = cli("separate", tmp_path, "--query", "low", *SEPARATOR, "-o", tmp_path / "out", "--json")
    assert done.code == 1
    document = json.loads(done.out)
    assert len(document["stems"]) == len(document["failures"]) == 1
    (line,) = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert "cannot" in line and "\x1b" not in done.err


def test_an_audio_example_is_a_query(cli: Cli, street: Path, tmp_path: Path, write_checkpoint) -> None:
    folder = write_checkpoint(["bell"])
    words = ("separate", street, "--query-audio", street, "--separator", folder, "-o", tmp_path / "out")
    assert "closed vocabulary" in cli(*words).error()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "there is no query"),
        (("--query", "low", "--not", "low"), "must not want and exclude the same sound"),
        (("--query", "low", *SEPARATOR), "add --best-of"),
        (("--query", "low|all", "--best-of"), "must be chosen by an estimator"),
        (("--query", "low|all"), "there is no label 'low|all'"),
        (("--query", "low", "-o", "-", "--residual"), "standard output must get one stem"),
    ],
)
def test_a_wrong_command_is_one_line(cli: Cli, street: Path, tmp_path: Path, words: tuple, message: str) -> None:
    assert message in cli("separate", street, *SEPARATOR, "-o", tmp_path / "out", *words).error()
    assert not (tmp_path / "out").exists()


def test_pipes_carry_audio_in_and_out(street: Path, tmp_path: Path) -> None:
    words = [COMMAND, "separate", "-", "--query", "all", *SEPARATOR, "-o", "-"]
    sf.write(tmp_path / "a.flac", sf.read(street)[0], RATE_HZ)
    done = subprocess.run(words, input=(tmp_path / "a.flac").read_bytes(), capture_output=True, cwd=ROOT, check=True)
    samples_TC, rate_hz = sf.read(io.BytesIO(done.stdout), dtype="float32")
    assert rate_hz == RATE_HZ and snr_db(samples_TC, sf.read(street)[0]) > 60
    (line,) = done.stderr.decode().splitlines()
    assert "3.0 s of audio" in line
    (tmp_path / "piped.wav").write_bytes(done.stdout)
    assert shared_decoder().probe(str(tmp_path / "piped.wav")).duration_s == 3.0


def test_ctrl_c_leaves_no_half_file(tmp_path: Path) -> None:
    sf.write(tmp_path / "long.wav", np.zeros((1800 * RATE_HZ, 2), np.int16), RATE_HZ)
    words = [sys.executable, COMMAND, "separate", tmp_path / "long.wav", "--query", "low", *SEPARATOR]
    process = subprocess.Popen(
        [*words, "-o", tmp_path / "out"], cwd=ROOT, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    deadline_s = time.monotonic() + 60
    while not list((tmp_path / "out").glob(".long*")) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors.decode().splitlines() == ["interrupted; start the same command again to resume"]
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.slow
def test_three_hours_of_stereo_need_little_memory(tmp_path: Path) -> None:
    """Measured for 44.1 kHz too, which takes four times as long: 0.8 GB."""
    rate_hz, minute = 11_025, 0.1 * np.random.default_rng(0).standard_normal((60 * 11_025, 2))
    with sf.SoundFile(tmp_path / "long.wav", "w", rate_hz, 2) as file:
        for _ in range(180):
            file.write(minute)
    words = [COMMAND, "separate", tmp_path / "long.wav", "--query", "all", *SEPARATOR, "-o", tmp_path / "out"]
    process = subprocess.Popen(words, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    peak_bytes = 0
    while process.poll() is None:
        peak_bytes = max(peak_bytes, resident_bytes(process.pid))
        time.sleep(0.2)
    assert process.returncode == 0
    assert sf.info(tmp_path / "out" / "long.all.wav").frames == 180 * 60 * rate_hz
    assert 0 < peak_bytes < 1.2e9


def resident_bytes(pid: int) -> int:
    """Memory of a process and its children."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        children = [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE") + sum(map(resident_bytes, children))
