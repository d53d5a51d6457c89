"""What the faults of a server and of a network do to objects of S3, and what is said where nothing helps."""

import itertools
import os
import random
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import engine.storage.s3
from engine.storage.files import remove_tree, write_bytes
from engine.storage.retry import is_transient, retried
from engine.storage.s3 import S3Path
from engine.storage.s3_client import ATTEMPTS, client

pytest_plugins = ["s3_server"]

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
    """No wait before another try is longer than a second: eight of them are enough for five seconds."""
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 1.0)))


def noise_bytes(num_bytes, *, seed):
    return random.Random(seed).randbytes(num_bytes)


def exercise(bucket, number):
    """Read, write and list once; everything has to be as if nothing had happened."""
    data = noise_bytes(600_000, seed=number)
    place = bucket / f"w{number}"
    write_bytes(place / "a", data)
    with (place / "a").open() as file:
        file.seek(1000)
        assert file.read(300_000) == data[1000:301_000]
    assert (place / "a").read_bytes() == data
    assert list(place.files()) == ["a"] and [child.num_bytes for child in place.children()] == [len(data)]
    (place / "a").unlink()
    assert not place.exists()


def test_a_server_that_throttles_for_seconds_is_waited_for(s3, bucket, short_waits):
    s3.put("r", b"read")
    s3.put("l/1")
    client()
    s3.unavailable_for(5)
    started_s = time.monotonic()
    calls = [
        *((bucket / "r").read_bytes, lambda: write_bytes(bucket / "w", b"written")),
        *(lambda: list((bucket / "l").files()), lambda: (bucket / "r").open().read(), (bucket / "new").exists),
    ]
    with ThreadPoolExecutor(len(calls)) as pool:
        answers = [future.result() for future in [pool.submit(call) for call in calls]]
    assert answers == [b"read", None, ["1"], b"read", False] and s3.get("w") == b"written"
    assert time.monotonic() - started_s >= 5
    assert any(request.status == 503 for request in s3.proxy.requests)


def test_requests_that_are_throttled_now_and_then_are_sent_again(s3, bucket, short_waits):
    s3.proxy.faults.unavailable_every = 4
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: exercise(bucket, number), range(4)))
    assert sum(request.status == 503 for request in s3.proxy.requests) >= 5


def test_connections_that_are_cut_in_the_middle_are_made_again(s3, bucket):
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
        except Exception as error:  # noqa: BLE001 - told below
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


# ---- what cannot be done is said in words


def told(call, kind):
    """The message of an error, which holds no secret and does not come as what boto3 raises."""
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
        "tag": path.tagged,
        "delete": path.unlink,
    }


@pytest.mark.parametrize("call", ["open", "read", "num_bytes"])
def test_a_missing_object_is_a_missing_file_of_that_address(s3, bucket, call):
    path = bucket / "no/such.wav"
    words = told({"open": path.open, "read": path.read_bytes, "num_bytes": path.num_bytes}[call], FileNotFoundError)
    assert f"{s3.root}/no/such.wav does not exist" in words and "check bucket and key" in words


@pytest.mark.parametrize("name", ["list", "write", "upload", "upload in parts", "create", "tag", "read"])
def test_a_missing_bucket_is_named(s3, name):
    words = told(operations(S3Path("s3://no-such-bucket/x"))[name], FileNotFoundError)
    assert "there is no bucket no-such-bucket" in words


@pytest.mark.parametrize("name", list(operations(S3Path("s3://b/k"))))
def test_what_the_server_refuses_is_a_question_of_rights(s3, bucket, name):
    s3.proxy.faults.denied = "AccessDenied"
    words = told(operations(bucket / "x")[name], PermissionError)
    assert f"{s3.root}/x" in words and "check the credentials and the bucket's policy" in words


def test_without_credentials_the_remedy_is_told(s3, bucket, monkeypatch):
    monkeypatch.setattr(engine.s3, "_clients", {})
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    for name, call in operations(bucket / "x").items():
        words = told(call, PermissionError)
        assert f"{s3.root}/x needs credentials" in words and "set AWS_ACCESS_KEY_ID" in words, name


def test_half_the_credentials_are_not_printed(s3, bucket, monkeypatch):
    monkeypatch.setattr(engine.s3, "_clients", {})
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert "Partial credentials" in told((bucket / "x").read_bytes, PermissionError)


def test_a_profile_that_is_not_there_is_told(s3, bucket, monkeypatch):
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    assert "nobody" in told((bucket / "x").read_bytes, ValueError)


@pytest.mark.parametrize("name", list(operations(S3Path("s3://b/k"))))
def test_a_name_that_no_bucket_can_have_is_a_wrong_value(s3, name):
    words = told(operations(S3Path("s3://My Bucket!/x"))[name], ValueError)
    assert "s3://My Bucket!/x is not an address of the form s3://bucket/key" in words


@pytest.mark.parametrize("name", list(operations(S3Path("s3://b/k"))))
def test_a_server_that_is_not_there_is_an_error_that_may_pass(s3, bucket, no_waits, name):
    s3.proxy.stop()
    words = told(operations(bucket / "x")[name], ConnectionError)
    assert "cannot be reached" in words and "check the network and AWS_ENDPOINT_URL" in words


def test_a_login_in_the_endpoint_is_not_printed(s3, bucket, monkeypatch, no_waits):
    s3.proxy.stop()
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.proxy.url.replace("//", "//someone:test-secret@"))
    assert s3.proxy.url in told((bucket / "x").is_file, ConnectionError)


def test_a_folder_that_may_not_be_deleted_is_left(s3, bucket):
    s3.put("x/a")
    s3.proxy.faults.denied = "AccessDenied"
    remove_tree(bucket / "x")
    told((bucket / "x").remove_all, PermissionError)
    assert s3.get("x/a") == b""


def test_a_server_that_throttles_for_ever_is_an_error_that_may_pass(s3, bucket, no_waits):
    s3.unavailable_for(600)
    for name, call in operations(bucket / "x").items():
        with pytest.raises(OSError, match=r"SlowDown|503") as raised:
            call()
        assert is_transient(raised.value), name
        assert raised.value.attempts == ATTEMPTS


def test_a_server_without_the_encryption_that_is_asked_for_is_told(s3, bucket, monkeypatch, no_waits):
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.proxy.url.replace("http:", "https:"))
    with pytest.raises(OSError, match="AWS_ENDPOINT_URL") as raised:
        retried((bucket / "x").is_file)
    assert not is_transient(raised.value)


def test_the_command_line_says_it_in_one_line(s3):
    environ = {**os.environ, "AWS_ENDPOINT_URL": s3.proxy.url}
    command = [sys.executable, "-m", "clearsep", "failures", "s3://no-such-bucket/x"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode in (1, 2) and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: s3://no-such-bucket") and done.stderr.count("\n") == 1
