"""Connecting to Ray: what a user reads when it cannot be, who can reach our own Ray, and what is left of it."""

import contextlib
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from concurrent import futures
from pathlib import Path

import grpc
import pytest
import ray
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

from cluster import ray_start, scratch
from cluster.session import connect
from engine.errors import ClearsepError, ClusterError, RayStartError
from tests.support.command import COMMAND
from tests.support.ray_nodes import free_port


@contextlib.contextmanager
def silent_server():
    """The address of a server that accepts connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield f"127.0.0.1:{server.getsockname()[1]}"


@contextlib.contextmanager
def state_service(answer):
    """The address of a service that answers as the state service of a cluster does."""

    class Service(gcs_service_pb2_grpc.NodeInfoGcsServiceServicer):
        def CheckAlive(self, request, context):
            return answer(context)

    server = grpc.server(futures.ThreadPoolExecutor(1))
    gcs_service_pb2_grpc.add_NodeInfoGcsServiceServicer_to_server(Service(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None)


def refused_by(address, error=ClusterError):
    """The message with which a connection to ``address`` is refused."""
    with pytest.raises(error) as caught, connect(address):
        pass
    message = str(caught.value)
    assert "\n" not in message and "; " in message, "one line with its remedy"
    assert not ray.is_initialized()
    return message


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(ray_start, "_ANSWER_S", 0.5)
    monkeypatch.setattr(ray_start, "_TRIES_S", 0.5)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_where_nothing_is_is_an_error(impatient, scheme, monkeypatch):
    address = f"{scheme}127.0.0.1:{free_port()}"
    message = refused_by(address)
    assert message.startswith(f"cannot reach a Ray cluster at {address} (Connection refused)")
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert refused_by(None) == message
    assert issubclass(ClusterError, ClearsepError) and issubclass(ClusterError, ConnectionError)


def test_a_name_that_does_not_resolve_is_an_error(impatient):
    assert "cannot reach a Ray cluster at no-such-host.invalid:6379 (" in refused_by("no-such-host.invalid:6379")


def test_a_server_that_never_answers_is_an_error(impatient):
    with silent_server() as address:
        assert f"cannot reach a Ray cluster at {address}" in refused_by(address)


def test_a_cluster_of_another_version_is_an_error(impatient):
    with state_service(lambda _: gcs_service_pb2.CheckAliveReply(ray_version="2.9.3")) as address:
        message = refused_by(address)
    assert f"must have Ray {ray.__version__} as here, got 2.9.3; install the same version" in message


def test_a_refused_token_is_an_error(impatient):
    with state_service(lambda context: context.abort(grpc.StatusCode.UNAUTHENTICATED, "no")) as address:
        assert "(it refused the token); set RAY_AUTH_MODE=token" in refused_by(address)


@pytest.mark.parametrize("address", ["head", "http://head:8265", "head:port", "head:99999", ":6379", "ray://head/x:1"])
def test_an_address_of_another_form_is_an_error(address):
    message = refused_by(address, ValueError)
    assert f"must be HOST:PORT, ray://HOST:PORT, auto or local, got {address}; correct" in message


@pytest.mark.parametrize("words", [["preflight"], ["jobs", "list"]], ids=lambda words: words[0])
def test_ctrl_c_ends_a_command_that_waits_for_a_cluster(words):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        env = os.environ | {"RAY_ADDRESS": address, "RAY_API_SERVER_ADDRESS": f"http://{address}"}
        command = subprocess.Popen([COMMAND, *words], env=env, stderr=subprocess.PIPE, text=True)
        server.settimeout(60.0)
        connection, _ = server.accept()  # it waits for an answer now
        time.sleep(0.2)
        started = time.monotonic()
        command.send_signal(signal.SIGINT)
        _, written = command.communicate(timeout=30)
        connection.close()
    assert command.returncode == 130, written
    assert "Traceback" not in written
    assert time.monotonic() - started < 10.0


def test_a_long_temporary_path_is_replaced_by_a_short_one(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    long = tmp_path / ("job_1234567_scratch_of_a_user_" * 3)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    with scratch.scratch_folder() as folder:
        assert folder.parent == Path("/tmp")
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        socket_path = f"{folder}{scratch._LONGEST_SOCKET}.1"
        with socket.socket(socket.AF_UNIX) as one:
            Path(socket_path).parent.mkdir(parents=True)
            one.bind(socket_path)
    assert not folder.exists()
    monkeypatch.setenv("RAY_TMPDIR", str(long))
    with pytest.raises(RayStartError, match=r"RAY_TMPDIR must have at most \d+ bytes .* set it to a shorter folder"):
        scratch.scratch_folder().__enter__()


@pytest.mark.parametrize("base", ["/proc", "/no/such/folder", "/dev/null"])
def test_a_folder_without_room_or_right_is_an_error(base, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", base)
    with pytest.raises(
        RayStartError, match=rf"cannot start Ray on this machine \({base}: .*; make it writable and free"
    ):
        scratch.scratch_folder().__enter__()


def test_folders_of_killed_processes_are_removed_and_those_of_others_stay(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    base = Path("/tmp") / f"csray-test-{os.getpid()}"[:20]
    base.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(base))
    (base / "csray-killed").mkdir()
    (base / "csray-new").mkdir()
    (base / "other").mkdir()
    try:
        with scratch.scratch_folder() as running:
            for folder in (base / "csray-killed", base / "other", running):
                os.utime(folder, (0, 0))
            with scratch.scratch_folder():
                assert {path.name for path in base.iterdir()} >= {"csray-new", "other", running.name}
                assert not (base / "csray-killed").exists()
    finally:
        subprocess.run(["rm", "-rf", base], check=True)


START = """
import os, stat, sys
from pathlib import Path
import psutil
import ray
import cluster.ray_start as ray_start
from cluster.session import connect

ray_init, tries = ray.init, []

def fail_once(*args, **kwargs):  # as on a machine with much to do: the processes run, but Ray has given up
    ray_init(*args, **kwargs)
    tries.append({child.pid for child in psutil.Process().children(recursive=True)})
    if len(tries) == 1:
        raise Exception("The current node timed out during startup.")

ray.init = fail_once
os.environ["RAY_AUTH_TOKEN"] = "of another cluster"
before = dict(os.environ)
with connect(num_cpus=1):
    assert ray.get(ray.remote(lambda: "train" in sys.modules).remote()), "workers have our packages"
    sockets, processes = [], [psutil.Process(), *psutil.Process().children(recursive=True)]
    for process in processes:
        try:
            sockets += [one for one in process.net_connections("inet") if one.status == psutil.CONN_LISTEN]
        except psutil.Error:
            pass
    assert len(sockets) > 5
    open_ones = [one for one in sockets if one.laddr.ip not in ("127.0.0.1", "::1", "::ffff:127.0.0.1")]
    assert open_ones == [], open_ones
    assert os.environ["RAY_AUTH_MODE"] == "token" and "RAY_AUTH_TOKEN" not in os.environ
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    assert stat.S_IMODE(token.stat().st_mode) == 0o600 and stat.S_IMODE(token.parent.stat().st_mode) == 0o700
    assert len(token.read_text()) == 64 and not Path.home().joinpath(".ray", "auth_token").exists()
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc
    import grpc
    gcs = ray.get_runtime_context().gcs_address
    assert gcs.startswith("127.0.0.1:")
    try:
        gcs_service_pb2_grpc.NodeInfoGcsServiceStub(grpc.insecure_channel(gcs)).CheckAlive(
            gcs_service_pb2.CheckAliveRequest(), timeout=10
        )
        raise AssertionError("a caller without the token is served")
    except grpc.RpcError as error:
        assert error.code() == grpc.StatusCode.UNAUTHENTICATED
assert len(tries) == 2
assert not [pid for pid in tries[0] | tries[1] if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]
assert not token.parent.exists()
for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
    assert os.environ.get(name) == before.get(name)
print("done")
"""


@pytest.mark.slow
def test_our_own_ray_is_closed_to_others_starts_at_the_second_try_and_leaves_nothing(tmp_path):
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {"HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", START], capture_output=True, text=True, env=env, timeout=300, check=False
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    assert "Ray did not start (The current node timed out during startup.); trying once more" in done.stderr


LEAVE = """
import threading, time
import ray
from ray.data._internal.execution.streaming_executor import StreamingExecutor
from cluster.session import connect

end = StreamingExecutor.shutdown

def end_slowly(self, *args, **kwargs):  # as on a machine with much to do
    if threading.current_thread() is not threading.main_thread():
        time.sleep(3.0)
    end(self, *args, **kwargs)

StreamingExecutor.shutdown = end_slowly
with connect(num_cpus=2):
    rows = iter(ray.data.range(64, override_num_blocks=64).map(lambda row: time.sleep(0.1) or row).iter_rows())
    next(rows)
    rows.close()
left = [thread.name for thread in threading.enumerate()]
assert not any(name.startswith(("iter_threaded", "StreamingExecutor")) for name in left), left
print("left in good order")
"""


@pytest.mark.slow
def test_threads_of_a_dataset_end_before_the_connection_does() -> None:
    done = subprocess.run([sys.executable, "-c", LEAVE], capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stdout) == (0, "left in good order\n"), done.stderr
    assert "after it is shutdown" not in done.stderr
