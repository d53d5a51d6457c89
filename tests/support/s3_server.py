"""A real server of the S3 protocol behind a proxy that can throttle, cut connections and stop.

With ``pytest_plugins = ["tests.support.s3_server"]``, a test module has the fixture ``s3``: a new bucket,
on one server for all tests, and environment variables that point this process and its children to it.
"""

from __future__ import annotations

import http.client
import http.server
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import pytest

HOST = "127.0.0.1"
START_S = 60.0
SECRET = "test-secret"
_AUTHORIZATION = "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
_HOP_BY_HOP = frozenset({"connection", "keep-alive", "transfer-encoding", "content-length", "expect", "server", "date"})


class Request(NamedTuple):
    """A request to the proxy; ``num_bytes`` is the size of the answer's body."""

    method: str
    path: str
    query: str
    num_bytes: int
    status: int


@dataclass
class Faults:
    """Faults that the proxy makes; none by default."""

    unavailable_until_s: float = 0.0
    """``time.monotonic()`` until which every request is answered 503 SlowDown."""
    unavailable_every: int = 0
    """Every n-th request is answered 503 SlowDown; 0: none."""
    cut_every: int = 0
    """The answer to every n-th GET of an object is cut in the middle of the body; 0: none."""
    denied: str = ""
    """Error code with which every request is answered, with status 403."""
    part_wait_s: float = 0.0
    """Delay of every part of an upload."""
    lose_answers: int = 0
    """Number of PUTs that are carried out, but whose answers are lost."""
    counts: Counter[str] = field(default_factory=Counter)

    def due(self, kind: str, every: int) -> bool:
        """Count a request of a kind; true for every n-th."""
        self.counts[kind] += 1
        return every > 0 and self.counts[kind] % every == 0


class Proxy:
    """An HTTP server in threads of this process that passes requests on to another, with :class:`Faults`."""

    def __init__(self, port: int) -> None:
        self.behind_port, self.port = port, free_port()
        self.faults, self.requests, self.arrived = Faults(), list[Request](), list[str]()
        self._server: _Server | None = None

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def reset(self) -> None:
        """Stop making faults and forget the requests so far."""
        self.faults, self.requests, self.arrived = Faults(), [], []

    def start(self) -> None:
        """Listen on the port; a restart uses the same one."""
        if self._server is None:
            self._server = _Server(self)
            threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Stop like a killed server: nothing listens, and every connection is cut."""
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()
            server.cut()

    def num_bytes(self, method: str = "GET") -> int:
        """Total size of the bodies that were sent to clients."""
        return sum(request.num_bytes for request in self.requests if request.method == method)


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads, allow_reuse_address, request_queue_size = True, True, 128

    def __init__(self, proxy: Proxy) -> None:
        self.proxy, self._open = proxy, set[socket.socket]()
        super().__init__((HOST, proxy.port), _Handler)

    def process_request(self, request: socket.socket, client_address: object) -> None:  # type: ignore[override]
        self._open.add(request)
        super().process_request(request, client_address)  # type: ignore[arg-type]

    def shutdown_request(self, request: socket.socket) -> None:  # type: ignore[override]
        self._open.discard(request)
        super().shutdown_request(request)

    def cut(self) -> None:
        for connection in list(self._open):
            _cut(connection)

    def handle_error(self, request: object, client_address: object) -> None:
        """Print nothing: broken connections are expected."""


def _cut(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.behind = http.client.HTTPConnection(HOST, self.server.proxy.behind_port, timeout=60)

    def finish(self) -> None:
        self.behind.close()
        super().finish()

    def log_message(self, format: str, *arguments: object) -> None:
        """Print nothing."""

    def answer(self) -> None:
        """Pass a request on, or make a fault."""
        proxy, faults = self.server.proxy, self.server.proxy.faults
        split = urllib.parse.urlsplit(self.path)
        proxy.arrived.append(self.path)
        body = self.body()
        if faults.denied:
            self.reply(403, "Forbidden", {}, error(faults.denied))
        elif time.monotonic() < faults.unavailable_until_s or faults.due("all", faults.unavailable_every):
            self.reply(503, "Slow Down", {}, error("SlowDown"))
        else:
            if "partNumber=" in split.query:
                time.sleep(faults.part_wait_s)
            self.pass_on(body, cuts=self.command == "GET" and "/" in split.path.strip("/"))

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while num_bytes := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(num_bytes))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(chunks)

    def pass_on(self, body: bytes, *, cuts: bool) -> None:
        faults = self.server.proxy.faults
        headers = {key: value for key, value in self.headers.items() if key.lower() not in _HOP_BY_HOP}
        self.behind.request(self.command, self.path, body=body, headers=headers)
        found = self.behind.getresponse()
        data = found.read()
        if self.command == "PUT" and faults.lose_answers > 0:
            faults.lose_answers -= 1
            self.seen(found.status, 0)
            self.close_connection = True
            return
        cut = cuts and faults.due("get", faults.cut_every)
        kept = {key: value for key, value in found.getheaders() if key.lower() not in _HOP_BY_HOP - {"date"}}
        length = found.getheader("Content-Length") if self.command == "HEAD" else None
        self.reply(found.status, found.reason, kept, data, length=length, cut=cut)

    def reply(
        self, status: int, reason: str, headers: dict[str, str], data: bytes, *, length: str | None = None, cut=False
    ) -> None:
        sent = b"" if self.command == "HEAD" else data[: len(data) // 2] if cut else data
        self.seen(status, len(sent))
        self.send_response_only(status, reason)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", length or str(len(data)))
        self.end_headers()
        self.wfile.write(sent)
        if cut:
            _cut(self.connection)

    def seen(self, status: int, num_bytes: int) -> None:
        """Record a request before its answer is sent, so that the client's test sees the record."""
        split = urllib.parse.urlsplit(self.path)
        self.server.proxy.requests.append(Request(self.command, split.path, split.query, num_bytes, status))

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer


def error(code: str) -> bytes:
    """The body of an error's answer."""
    return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>a fault of the test</Message></Error>".encode()


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as found:
        found.bind((HOST, 0))
        port: int = found.getsockname()[1]
        return port


@dataclass
class S3:
    """The session's server and a test's bucket."""

    proxy: Proxy
    bucket: str
    environ: dict[str, str]
    """Environment variables for a process that uses the server."""

    @property
    def root(self) -> str:
        """The address of the bucket."""
        return f"s3://{self.bucket}"

    def put(self, key: str, data: bytes = b"") -> None:
        """Write an object directly to the server, without the proxy and the tested code."""
        _direct(self.proxy.behind_port, "PUT", f"/{self.bucket}/{urllib.parse.quote(key)}", data)

    def get(self, key: str) -> bytes | None:
        """Read an object directly from the server; None if there is none."""
        return _direct(self.proxy.behind_port, "GET", f"/{self.bucket}/{urllib.parse.quote(key)}")

    def unavailable_for(self, seconds: float) -> None:
        """Answer every request 503 SlowDown for some time from now on."""
        self.proxy.faults.unavailable_until_s = time.monotonic() + seconds


_connections = threading.local()


def _direct(port: int, method: str, path: str, data: bytes = b"") -> bytes | None:
    connection = getattr(_connections, "made", None)
    if connection is None:
        connection = _connections.made = http.client.HTTPConnection(HOST, port, timeout=60)
    connection.request(method, path, body=data, headers={"Authorization": _AUTHORIZATION})
    found = connection.getresponse()
    answer: bytes = found.read()
    assert found.status in (200, 404), f"{method} {path}: {found.status} {answer!r}"
    return answer if found.status == 200 else None


def _answers(port: int) -> bool:
    connection = http.client.HTTPConnection(HOST, port, timeout=5)
    try:
        connection.request("GET", "/moto-api/")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


@pytest.fixture(scope="session")
def s3_proxy() -> Iterator[Proxy]:
    """One server process for all tests, behind one proxy."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", HOST, "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    proxy = Proxy(port)
    try:
        deadline_s = time.monotonic() + START_S
        while not _answers(port):
            assert process.poll() is None, f"the server ended with code {process.returncode}"
            assert time.monotonic() < deadline_s, f"the server did not answer within {START_S:.0f} s"
            time.sleep(0.05)
        proxy.start()
        yield proxy
    finally:
        proxy.stop()
        process.kill()
        process.wait()


def environment(proxy: Proxy) -> dict[str, str]:
    """Environment variables for a process that uses the server."""
    return {
        "AWS_ENDPOINT_URL": proxy.url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }


@pytest.fixture
def s3(s3_proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    """A new bucket, and environment variables of this process that point to its server."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    environ = environment(s3_proxy)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    s3_proxy.reset()
    s3_proxy.start()
    made = S3(s3_proxy, f"test-{uuid.uuid4().hex[:12]}", environ)
    _direct(s3_proxy.behind_port, "PUT", f"/{made.bucket}")
    yield made
    s3_proxy.reset()
    s3_proxy.start()
