"""Faults of a server or network are retried; errors that stay are reported with what to do."""

import itertools
import os
import random
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import engine.storage.s3_client
from engine.storage.files import remove_tree, write_bytes
from engine.storage.retry import is_transient, retried
from engine.storage.s3 import S3Path
from engine.storage.s3_client import ATTEMPTS, client

pytest_plugins = ["tests.support.s3_server"]

MB = 1 << 20


@pytest.fixture
def bucket(s3):
    return S3Path(s3.root)


@pytest.fixture
def no_waits(monkeypatch):
    """Waits before another try take no time."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


@pytest.fixture
def short_waits(monkeypatch):
    """No wait before another try is longer than a second: eight of them are enough for three seconds."""
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 1.0)))


def noise_bytes(num_bytes, *, seed):
    return random.Random(seed).randbytes(num_bytes)


def exercise(bucket, number):
    """Read, write, list and delete once; the results must be the same as without faults."""
    data = noise_bytes(600_000, seed=number)
    folder = bucket / f"w{number}"
    write_bytes(folder / "a", data)
    with (folder / "a").open() as file:
        file.seek(1000)
        assert file.read(300_000) == data[1000:301_000]
    assert (folder / "a").read_bytes() == data
    assert list(folder.files()) == ["a"] and [(child.name, child.is_file) for child in folder.children()] == [
        ("a", True)
    ]
    (folder / "a").unlink()
    assert not folder.exists()


def test_a_server_that_throttles_for_seconds_is_waited_for(s3, bucket, short_waits):
    s3.put("r", b"read")
    s3.put("l/1")
    client()
    s3.unavailable_for(3)
    started_s = time.monotonic()
    calls = [
        *((bucket / "r").read_bytes, lambda: write_bytes(bucket / "w", b"written")),
        *(lambda: list((bucket / "l").files()), lambda: (bucket / "r").open().read(), (bucket / "new").exists),
    ]
    with ThreadPoolExecutor(len(calls)) as pool:
        answers = [future.result() for future in [pool.submit(call) for call in calls]]
    assert answers == [b"read", None, ["1"], b"read", False] and s3.get("w") == b"written"
    assert time.monotonic() - started_s >= 3
    assert any(request.status == 503 for request in s3.proxy.requests)


def test_requests_that_are_throttled_now_and_then_are_repeated(s3, bucket, short_waits):
    s3.proxy.faults.unavailable_every = 4
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: exercise(bucket, number), range(4)))
    assert sum(request.status == 503 for request in s3.proxy.requests) >= 5


def test_requests_on_connections_that_are_cut_are_repeated(s3, bucket):
    s3.proxy.faults.cut_every = 3
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: exercise(bucket, number), range(4)))
    assert s3.proxy.faults.counts["get"] >= 12


def test_a_server_that_starts_again_in_the_middle_is_waited_for(s3, bucket):
    exercise(bucket, 0)
    done, failed, alone = itertools.count(), [], len(s3.proxy.requests)

    def work(number):
        try:
            exercise(bucket, number)
        except Exception as error:  # noqa: BLE001 - checked below
            failed.append(error)
        next(done)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    while len(s3.proxy.requests) < 2 * alone:  # of five times as many in all
        time.sleep(0.001)
    s3.proxy.stop()
    time.sleep(1.5)
    before = len(s3.proxy.requests)
    s3.proxy.start()
    for thread in threads:
        thread.join()
    assert failed == [] and next(done) == 4
    assert len(s3.proxy.requests) > before, "there was work left when it came back"


# ---- errors say what to do


def message_of(call, kind):
    """The message of an error, which must have no secret in it and be one of Python's own."""
    with pytest.raises(kind) as raised:
        call()
    assert isinstance(raised.value, OSError | ValueError)
    assert "test-secret" not in str(raised.value)
    return str(raised.value)


def operations(path):
    return {
        "open": path.open,
        "read": path.read_bytes,
        "head": path.is_file,
        "list": lambda: list(path.files()),
        "write": lambda: path.write_bytes(b"x"),
        "upload": lambda: write_bytes(path, b"x"),
        "upload in parts": lambda: write_bytes(path, bytes(17 * MB)),
        "create": lambda: path.create(b"x"),
        "version": path.read_version,
        "delete": path.unlink,
    }


@pytest.mark.parametrize("call", ["open", "read"])
def test_a_missing_object_is_a_missing_file_of_that_address(s3, bucket, call):
    path = bucket / "no/such.wav"
    message = message_of(operations(path)[call], FileNotFoundError)
    assert f"there is no object {s3.root}/no/such.wav" in message and "check bucket and key" in message


@pytest.mark.parametrize("name", ["list", "write", "upload", "upload in parts", "create", "version", "read"])
def test_a_missing_bucket_is_named(s3, name):
    message = message_of(operations(S3Path("s3://no-such-bucket/x"))[name], FileNotFoundError)
    assert "there is no bucket no-such-bucket" in message


@pytest.mark.parametrize("name", list(operations(S3Path("s3://b/k"))))
def test_a_refusal_of_the_server_is_a_permission_error(s3, bucket, name):
    s3.proxy.faults.denied = "AccessDenied"
    message = message_of(operations(bucket / "x")[name], PermissionError)
    assert f"{s3.root}/x" in message and "check the credentials and the bucket's policy" in message


def test_without_credentials_the_message_says_how_to_give_them(s3, bucket, monkeypatch):
    monkeypatch.setattr(engine.storage.s3_client, "_clients", {})
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    for name, call in operations(bucket / "x").items():
        message = message_of(call, PermissionError)
        assert f"cannot use {s3.root}/x without credentials" in message and "set AWS_ACCESS_KEY_ID" in message, name


def test_half_the_credentials_are_not_printed(s3, bucket, monkeypatch):
    monkeypatch.setattr(engine.storage.s3_client, "_clients", {})
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert "Partial credentials" in message_of((bucket / "x").read_bytes, PermissionError)


def test_a_missing_profile_is_named(s3, bucket, monkeypatch):
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    assert "nobody" in message_of((bucket / "x").read_bytes, ValueError)


@pytest.mark.parametrize("name", list(operations(S3Path("s3://b/k"))))
def test_an_impossible_bucket_name_is_a_wrong_value(s3, name):
    message = message_of(operations(S3Path("s3://My Bucket!/x"))[name], ValueError)
    assert "must be s3://bucket/key, got s3://My Bucket!/x" in message


@pytest.mark.parametrize("name", list(operations(S3Path("s3://b/k"))))
def test_a_missing_server_is_a_transient_error(s3, bucket, no_waits, name):
    s3.proxy.stop()
    message = message_of(operations(bucket / "x")[name], ConnectionError)
    assert f"cannot reach {s3.root}/x" in message and "check the network and AWS_ENDPOINT_URL" in message


def test_a_login_in_the_endpoint_is_not_printed(s3, bucket, monkeypatch, no_waits):
    s3.proxy.stop()
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.proxy.url.replace("//", "//someone:test-secret@"))
    assert s3.proxy.url in message_of((bucket / "x").is_file, ConnectionError)


def test_a_folder_that_cannot_be_deleted_stays(s3, bucket):
    s3.put("x/a")
    s3.proxy.faults.denied = "AccessDenied"
    remove_tree(bucket / "x")
    message_of((bucket / "x").remove_all, PermissionError)
    assert s3.get("x/a") == b""


def test_a_server_that_throttles_for_ever_is_a_transient_error(s3, bucket, no_waits):
    s3.unavailable_for(600)
    for name, call in operations(bucket / "x").items():
        with pytest.raises(OSError, match=r"SlowDown|503") as raised:
            call()
        assert is_transient(raised.value), name
        assert raised.value.attempts == ATTEMPTS


def test_a_server_without_tls_is_not_a_transient_error(s3, bucket, monkeypatch, no_waits):
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.proxy.url.replace("http:", "https:"))
    with pytest.raises(OSError, match="AWS_ENDPOINT_URL") as raised:
        retried((bucket / "x").is_file)
    assert not is_transient(raised.value)


def test_the_command_line_shows_an_error_in_one_line(s3):
    environ = {**os.environ, "AWS_ENDPOINT_URL": s3.proxy.url}
    command = [sys.executable, "-m", "clearsep", "failures", "s3://no-such-bucket/x"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode in (1, 2) and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: there is no bucket no-such-bucket") and done.stderr.count("\n") == 1
