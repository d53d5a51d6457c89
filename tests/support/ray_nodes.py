"""A Ray cluster as its user starts it: ``ray start`` for a head and workers, process trees that can be killed."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from prometheus_client.parser import text_string_to_metric_families

from tests.support import ROOT

BIN = Path(sys.executable).parent
_START_S = 90.0
_AGENT_PORT = 52365


def free_port() -> int:
    """A port that nobody listens on, nor will the agent of Ray's dashboard."""
    port = _AGENT_PORT
    while port == _AGENT_PORT:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
    return port


class StartedCluster:
    """Nodes started by ``ray start --block`` on loopback, with a token unless told otherwise."""

    def __init__(self, folder: Path, *, num_cpus: float = 1, token: str | None = None) -> None:
        self.folder, self.token = folder, token if token is not None else secrets.token_hex(32)
        self.port, self.dashboard_port, self.metrics_port = free_port(), free_port(), free_port()
        self.nodes: list[subprocess.Popen[bytes]] = []
        self.places: list[str] = []
        head = [
            "--head",
            f"--port={self.port}",
            f"--dashboard-port={self.dashboard_port}",
            "--dashboard-host=127.0.0.1",
        ]
        self.head = self._start(
            [*head, f"--metrics-export-port={self.metrics_port}", f"--ray-client-server-port={free_port()}"], num_cpus
        )
        self._until_it_answers()

    @property
    def address(self) -> str:
        """Of the job server."""
        return f"http://127.0.0.1:{self.dashboard_port}"

    @property
    def gcs_address(self) -> str:
        """What ``ray.init`` and ``--address`` of our commands take."""
        return f"127.0.0.1:{self.port}"

    @property
    def env(self) -> dict[str, str]:
        """Environment of nodes and of commands that speak to them."""
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        quiet = {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": path, "NO_COLOR": "1", "COLUMNS": "1000"}
        quiet["RAY_idle_worker_killing_time_threshold_ms"] = "600000"  # as the README says for nodes of few CPUs
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token} if self.token else {}
        return {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | quiet | token

    def add(self, num_cpus: float = 1) -> subprocess.Popen[bytes]:
        """Start another node; it joins some seconds later."""
        node = self._start([f"--address={self.gcs_address}"], num_cpus)
        self.nodes.append(node)
        return node

    def kill(self, node: subprocess.Popen[bytes]) -> None:
        """Kill -9 of all processes of a node at once, as when its machine is taken away."""
        tree = _tree(node.pid)
        for process in tree:
            with _gone():
                process.send_signal(signal.SIGSTOP)  # none of them may tell of another's end
        for process in [*tree, *_tree(node.pid)]:
            with _gone():
                process.kill()
        node.wait()
        if node in self.nodes:
            self.nodes.remove(node)

    def metrics_until(self, done: Callable[[], bool]) -> dict[str, float]:
        """Every series that the head's Prometheus endpoint shows until something is done, its last values added up."""
        found: dict[str, float] = {}
        while True:
            is_last = done()
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=10) as answer,
            ):
                families = list(text_string_to_metric_families(answer.read().decode()))
                sums: collections.Counter[str] = collections.Counter()
                for sample in (sample for family in families for sample in family.samples):
                    sums[sample.name] += sample.value
                found |= sums
            if is_last:
                return found
            time.sleep(0.5)

    def preempt(self, node: subprocess.Popen[bytes], notice_s: int) -> None:
        """Take away the only node beside the head as a cloud does: with some seconds' notice, of which Ray is told."""
        (other,) = [one for one in self._nodes() if one["state"] == "ALIVE" and not one["is_head_node"]]
        words = ["--address", self.gcs_address, "--node-id", other["node_id"]]
        words += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        words += ["--deadline-remaining-seconds", str(notice_s)]
        subprocess.run([str(BIN / "ray"), "drain-node", *words], env=self.env, check=True, capture_output=True)
        time.sleep(notice_s)
        self.kill(node)

    def close(self) -> None:
        """End all nodes."""
        for node in [*self.nodes, self.head]:
            self.kill(node)
        for place in self.places:
            shutil.rmtree(place, ignore_errors=True)

    def _start(self, words: list[str], num_cpus: float) -> subprocess.Popen[bytes]:
        # A folder of its own, as on a machine of its own: nodes that share one delete each other's code.
        place = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short, for the names of sockets have an end
        self.places.append(place)
        store = f"--object-store-memory={200 << 20}"
        node = ["--node-ip-address=127.0.0.1", f"--num-cpus={num_cpus:g}", store, "--disable-usage-stats", "--block"]
        node.append(f"--temp-dir={place}")
        with (self.folder / "ray.log").open("ab") as log:
            return subprocess.Popen(
                [str(BIN / "ray"), "start", *words, *node], stdout=log, stderr=log, env=self.env, start_new_session=True
            )

    def until_nodes(self, number: int) -> None:
        """Wait until so many nodes have joined."""
        until = time.monotonic() + _START_S
        while len(alive := [one for one in self._nodes() if one["state"] == "ALIVE"]) < number:
            assert time.monotonic() < until, f"{len(alive)} nodes of {number} have joined"
            time.sleep(0.5)

    def _nodes(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self._get("/api/v0/nodes"))["data"]["result"]["result"]
        return found

    def _get(self, path: str) -> bytes:
        asked = urllib.request.Request(f"{self.address}{path}", headers={"Authorization": f"Bearer {self.token}"})
        with urllib.request.urlopen(asked, timeout=5) as answer:
            data: bytes = answer.read()
        return data

    def _until_it_answers(self) -> None:
        until = time.monotonic() + _START_S
        while True:
            try:
                self._get("/api/version")
                return
            except (urllib.error.URLError, OSError):
                if time.monotonic() > until or self.head.poll() is not None:
                    self.close()
                    raise AssertionError(
                        f"the head did not start: {(self.folder / 'ray.log').read_text()[-3000:]}"
                    ) from None
                time.sleep(0.5)


def _gone() -> contextlib.suppress:
    """A block in which a process may be gone already."""
    return contextlib.suppress(psutil.NoSuchProcess)


def _tree(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
