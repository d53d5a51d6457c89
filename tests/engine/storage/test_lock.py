"""One process at a time holds the lock of a folder, also after kills, suspensions and network errors."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine.errors import InUseError, LockLostError
from engine.storage import lock as lock_module
from engine.storage.files import remove_tree
from engine.storage.lock import holder_of, lock
from engine.storage.paths import location

pytest_plugins = ["tests.support.s3_server"]

HOLDER = """
import sys, time
from engine.storage import lock as lock_module
from engine.storage.paths import location
lock_module.RENEW_S, lock_module.STALE_S, lock_module.STOP_S = (float(word) for word in sys.argv[2].split(","))
lock_module.WATCH_S = lock_module.RENEW_S
with lock_module.lock(location(sys.argv[1]), "run"):
    print("locked", flush=True)
    if sys.argv[3] == "wait":
        sys.stdin.read()
    while sys.argv[3] == "ignore":
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            pass
print("ended", flush=True)
"""


@pytest.fixture(params=["local", "s3"])
def out(request, tmp_path):
    """A folder of either kind."""
    return location(f"{request.getfixturevalue('s3').root}/out" if request.param == "s3" else tmp_path / "out")


@pytest.fixture
def start():
    """Start a process that holds a folder's lock until its standard input ends; return it when it has the lock."""
    processes = []

    def started(out, *, times="0.2,60,30", how="wait"):
        command = [sys.executable, "-c", HOLDER, str(out), times, how]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(command, **pipes)
        processes.append(process)
        assert process.stdout.readline() == "locked\n", process.communicate()
        return process

    yield started
    for process in processes:
        process.kill()
        process.communicate()


def refused(out):
    with pytest.raises(InUseError) as raised, lock(out, "run"):
        pass
    return str(raised.value)


def wait_until(condition, *, seconds=30.0):
    deadline_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def record(s3):
    return json.loads(s3.get("out/.run.lock"))


def write_record(s3, **holder):
    s3.put("out/.run.lock", json.dumps(holder).encode())


def test_the_second_process_learns_who_uses_the_folder(out, start):
    first = start(out)
    words = refused(out)
    assert f"{out} is in use by process {first.pid} on {socket.gethostname()} since 20" in words
    assert "wait until it ends, or give another folder" in words
    with lock(out, "stems"), lock(out / "deeper", "run"):  # other locks
        pass
    assert first.communicate("", timeout=30) == ("ended\n", "")
    with lock(out, "run"):
        assert "is in use by process" in refused(out)
    with lock(out, "run"):
        pass


def test_the_holder_can_be_seen_without_taking_the_lock(out, start):
    assert holder_of(out, "run") is None
    with lock(out, "run"):
        assert holder_of(out, "run").startswith(f"process {os.getpid()} on ")
    assert holder_of(out, "run") is None, "this process lives, but released it"
    process = start(out)
    assert holder_of(out, "run").startswith(f"process {process.pid} on ")
    process.kill()
    process.wait()
    assert holder_of(out, "run") is None


def test_the_lock_of_a_killed_process_is_free(out, start):
    first = start(out)
    first.kill()
    first.wait()
    with lock(out, "run"):
        pass


def test_an_error_releases_the_lock(out):
    with pytest.raises(RuntimeError, match="of the work"), lock(out, "run"):
        raise RuntimeError("an error of the work")
    with lock(out, "run"):
        pass


def test_a_local_lock_counts_while_it_is_being_written(tmp_path, start):
    start(tmp_path)
    (tmp_path / ".run.lock").write_text("")
    assert f"{tmp_path} is in use by another run" in refused(tmp_path)


@pytest.mark.parametrize("how", ["deleted", "replaced"])
def test_a_second_process_stays_out_whatever_becomes_of_the_lock_file(tmp_path, start, how):
    """At once, and after the holder has put the file back."""
    first, path = start(tmp_path, times="1,60,30"), tmp_path / ".run.lock"
    before = path.stat()
    path.unlink()
    if how == "replaced":
        path.write_text("a copy from elsewhere")
    assert f"{tmp_path} is in use by" in refused(tmp_path)
    wait_until(lambda: path.is_file() and path.read_text().startswith("{"))
    assert not os.path.samestat(before, path.stat())
    assert f"{tmp_path} is in use by process {first.pid}" in refused(tmp_path)
    assert first.communicate("", timeout=30)[0] == "ended\n"
    with lock(tmp_path, "run"):
        pass


@pytest.fixture
def elsewhere(monkeypatch):
    """This process is on another machine, whose names of folders are not those of this one."""

    class Elsewhere(socket.socket):
        def bind(self, address):
            super().bind(f"{address}/elsewhere")

    monkeypatch.setattr(lock_module.socket, "socket", Elsewhere)


@pytest.mark.parametrize("how", ["wait", "ignore"])
def test_the_holder_stops_if_another_machine_got_the_lock_after_its_file_was_deleted(tmp_path, start, elsewhere, how):
    first = start(tmp_path, times="0.2,60,0.3", how=how)
    assert f"{tmp_path} is in use by process {first.pid}" in refused(tmp_path), "the file is locked across machines"
    (tmp_path / ".run.lock").unlink()
    with lock(tmp_path, "run"):
        assert first.wait(timeout=30) == 1
        said = first.stderr.read()
    assert f"cannot continue ({tmp_path} was taken over by process {os.getpid()} on {socket.gethostname()}" in said
    assert "the lock file .run.lock was deleted or replaced); wait until the other process ends" in said
    assert "ended" not in first.stdout.read()


def test_a_folder_that_its_holder_deletes_stays_deleted(tmp_path, monkeypatch):
    monkeypatch.setattr(lock_module, "WATCH_S", 0.05)
    with lock(tmp_path / "work", "training"):
        remove_tree(tmp_path / "work")
        time.sleep(0.2)
    assert not (tmp_path / "work").exists()


def test_where_no_name_of_the_machine_is_allowed_the_lock_file_has_to_do(tmp_path, start, monkeypatch):
    def bind(self, address):
        raise PermissionError(1, "not permitted")

    monkeypatch.setattr(lock_module.socket, "socket", type("Refused", (socket.socket,), {"bind": bind}))
    first = start(tmp_path)
    assert f"in use by process {first.pid}" in refused(tmp_path)
    first.communicate("", timeout=30)
    with lock(tmp_path, "run"):
        pass


# ---- in S3


@pytest.fixture
def out_s3(s3):
    return location(f"{s3.root}/out")


@pytest.fixture
def quick(monkeypatch):
    """Short times, so that a test can wait for them."""
    monkeypatch.setattr(lock_module, "RENEW_S", 0.1)
    monkeypatch.setattr(lock_module, "STALE_S", 1.0)


def test_a_process_of_another_machine_counts_as_gone_only_after_it_stopped_renewing(s3, out_s3, quick):
    write_record(s3, host="elsewhere", pid=1, processes="other", since="2026-01-01 00:00:00 +0000", token="a")
    words = refused(out_s3)
    assert "is in use by process 1 on elsewhere since 2026-01-01" in words
    assert re.search(r"renewed its lock \d s ago and counts as gone after 1 s", words)
    time.sleep(2.1)
    with lock(out_s3, "run"):
        assert record(s3)["pid"] == os.getpid()


def test_the_clock_of_the_other_machine_does_not_matter(s3, out_s3):
    write_record(s3, host="elsewhere", pid=1, processes="other", since="1970", token="a", renewed=0.0)
    assert "is in use by process 1 on elsewhere" in refused(out_s3)


def test_process_ids_of_another_container_are_not_compared(s3, out_s3, start):
    first = start(out_s3)
    first.kill()
    first.wait()
    write_record(s3, **{**record(s3), "processes": "another container of the same name"})
    assert f"is in use by process {first.pid}" in refused(out_s3)


@pytest.mark.parametrize("data", [b"", b"[1]", b"\xff"])
def test_an_unreadable_lock_counts_until_it_is_stale(s3, out_s3, quick, data):
    s3.put("out/.run.lock", data)
    assert "is in use by another run" in refused(out_s3)


def test_a_missing_bucket_is_not_in_use(s3):
    with (
        pytest.raises(FileNotFoundError, match="there is no bucket no-such-bucket"),
        lock(location("s3://no-such-bucket/out"), "run"),
    ):
        pass


def test_a_lost_answer_does_not_lose_the_lock(s3, out_s3, quick):
    s3.proxy.faults.lose_answers = 1
    with lock(out_s3, "run"):
        assert "is in use by process" in refused(out_s3)
        s3.proxy.faults.lose_answers = 1
        wait_until(lambda: s3.proxy.faults.lose_answers == 0)
        before = record(s3)["renewed"]
        wait_until(lambda: record(s3)["renewed"] > before)
    with lock(out_s3, "run"):
        pass


def test_renewals_continue_after_errors(s3, out_s3, quick, caplog):
    with lock(out_s3, "run"):
        s3.unavailable_for(0.5)
        time.sleep(0.6)
        before = record(s3)["renewed"]
        wait_until(lambda: record(s3)["renewed"] > before)
        s3.proxy.faults.denied = "AccessDenied"  # the request itself is not retried
        wait_until(lambda: "cannot renew the lock" in caplog.text)
        s3.proxy.faults.denied = ""
        before = record(s3)["renewed"]
        wait_until(lambda: record(s3)["renewed"] > before)
    assert "released" in record(s3)


def test_a_deleted_lock_is_put_back(s3, out_s3, quick):
    with lock(out_s3, "run"):
        (out_s3 / ".run.lock").unlink()
        wait_until(lambda: s3.get("out/.run.lock") is not None)
        assert record(s3)["pid"] == os.getpid()


def test_a_lock_that_was_deleted_with_its_folder_is_not_put_back_at_the_end(s3, out_s3):
    with lock(out_s3, "run"):
        out_s3.remove_all()
    assert list(out_s3.files()) == []


def test_finished_work_does_not_fail_if_the_lock_cannot_be_released(s3, out_s3, caplog):
    with lock(out_s3, "run"):
        s3.proxy.faults.denied = "AccessDenied"
    assert "cannot release the lock" in caplog.text


def test_a_suspended_process_stops_if_another_took_over_its_lock(s3, out_s3, start):
    first = start(out_s3, times="0.2,1,30")
    first.send_signal(signal.SIGSTOP)
    wait_until(lambda: (out_s3 / ".run.lock").read_version().age_s > 1)
    second = start(out_s3, times="0.2,1,30")
    first.send_signal(signal.SIGCONT)
    said, words = first.communicate(timeout=30)
    assert first.returncode == 1 and said == ""
    assert (
        f"LockLostError: cannot continue ({out_s3} was taken over by process {second.pid} on {socket.gethostname()}"
        in words
    )
    assert f"because this process ({first.pid} on " in words and "; wait until the other process ends" in words
    assert record(s3)["pid"] == second.pid, "the other's lock is still there"
    assert second.communicate("", timeout=30) == ("ended\n", "")


def test_a_process_that_lost_its_lock_and_ignores_the_interrupt_is_killed(s3, out_s3, start):
    first = start(out_s3, times="0.1,60,0.3", how="ignore")
    write_record(s3, host="elsewhere", pid=1, processes="other", since="today", token="b")
    assert first.wait(timeout=30) == 1
    assert first.stderr.read().startswith(
        f"error: cannot continue ({out_s3} was taken over by process 1 on elsewhere since today"
    )
    assert record(s3)["token"] == "b"


def test_after_the_loss_of_the_lock_the_block_raises_an_error_and_not_an_interrupt(s3, out_s3, quick):
    with pytest.raises(LockLostError, match="was taken over by process 1 on elsewhere"), lock(out_s3, "run"):
        write_record(s3, host="elsewhere", pid=1, processes="other", since="today", token="b")
        time.sleep(30)
    assert record(s3)["token"] == "b"


def test_an_interrupt_by_the_user_stays_an_interrupt(out):
    with pytest.raises(KeyboardInterrupt), lock(out, "run"):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(30)
    with lock(out, "run"):
        pass


def test_a_lock_taken_over_at_the_end_is_not_released(s3, out_s3):
    with pytest.raises(LockLostError, match="was taken over"), lock(out_s3, "run"):
        write_record(s3, host="elsewhere", pid=1, processes="other", since="today", token="b")
    assert record(s3)["token"] == "b"


def test_of_two_processes_that_find_a_stale_lock_one_gets_it(s3, out_s3, start, monkeypatch):
    write_record(s3, released=1.0)
    found = (out_s3 / ".run.lock").read_version()
    first = start(out_s3)
    answers, read_version = [found], type(out_s3).read_version  # as if both had read it before either wrote
    monkeypatch.setattr(type(out_s3), "read_version", lambda path: answers.pop() if answers else read_version(path))
    with pytest.raises(ValueError, match=f"is in use by process {first.pid}"), lock(out_s3, "run"):
        pass


def test_the_lock_creates_a_missing_folder(tmp_path):
    with lock(tmp_path / "new", "run"):
        assert Path(tmp_path / "new").is_dir()
