"""Ray clusters on this machine whose nodes can be killed: by ``ray start`` as a user does, or in this process."""

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
    """A free port that is not the one of Ray's dashboard agent."""
    port = _AGENT_PORT
    while port == _AGENT_PORT:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
    return port


class StartedCluster:
    """Nodes started by ``ray start --block`` on loopback, with a random token."""

    def __init__(self, folder: Path, *, num_cpus: float = 1, agent_port: int = 0) -> None:
        self.folder, self.token = folder, secrets.token_hex(32)
        self.port, self.dashboard_port, self.metrics_port = free_port(), free_port(), free_port()
        self.agent_port = agent_port  # of every node; 0: a free one for each
        self.nodes: list[subprocess.Popen[bytes]] = []
        self.temp_folders: list[str] = []
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
        """Address of the job server."""
        return f"http://127.0.0.1:{self.dashboard_port}"

    @property
    def gcs_address(self) -> str:
        """Address for ``ray.init`` and for ``--address`` of the commands."""
        return f"127.0.0.1:{self.port}"

    @property
    def env(self) -> dict[str, str]:
        """Environment of nodes and of commands that connect to them."""
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        quiet = {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": path, "NO_COLOR": "1", "COLUMNS": "1000"}
        quiet["RAY_idle_worker_killing_time_threshold_ms"] = (
            "600000"  # as the documentation recommends for nodes of few CPUs
        )
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}
        return {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | quiet | token

    def add(self, num_cpus: float = 1) -> subprocess.Popen[bytes]:
        """Start another node, which joins some seconds later."""
        node = self._start([f"--address={self.gcs_address}"], num_cpus)
        self.nodes.append(node)
        return node

    def kill(self, node: subprocess.Popen[bytes]) -> None:
        """Kill all processes of a node at once, as when its machine is lost."""
        tree = _tree(node.pid)
        for process in tree:
            with _gone():
                process.send_signal(signal.SIGSTOP)  # so that none of them can report the end of another
        for process in [*tree, *_tree(node.pid)]:
            with _gone():
                process.kill()
        node.wait()
        if node in self.nodes:
            self.nodes.remove(node)

    def metrics_until(self, done: Callable[[], bool]) -> dict[str, float]:
        """Poll the head's Prometheus endpoint until ``done``; returns the last sum of every series that it showed."""
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
        """Remove the only node besides the head as a cloud does: Ray gets some seconds' notice."""
        (other,) = [one for one in self._nodes() if one["state"] == "ALIVE" and not one["is_head_node"]]
        words = ["--address", self.gcs_address, "--node-id", other["node_id"]]
        words += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        words += ["--deadline-remaining-seconds", str(notice_s)]
        subprocess.run([str(BIN / "ray"), "drain-node", *words], env=self.env, check=True, capture_output=True)
        time.sleep(notice_s)
        self.kill(node)

    def close(self) -> None:
        """Kill all nodes."""
        for node in [*self.nodes, self.head]:
            self.kill(node)
        for folder in self.temp_folders:
            shutil.rmtree(folder, ignore_errors=True)

    def _start(self, words: list[str], num_cpus: float) -> subprocess.Popen[bytes]:
        # Every node needs a folder of its own: nodes that share one delete each other's code.
        folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short, for names of sockets have a maximum length
        self.temp_folders.append(folder)
        store = f"--object-store-memory={200 << 20}"
        node = ["--node-ip-address=127.0.0.1", f"--num-cpus={num_cpus:g}", store, "--disable-usage-stats", "--block"]
        agent_port = self.agent_port or free_port()  # the default may be that of another Ray on this machine
        node += [f"--temp-dir={folder}", f"--dashboard-agent-listen-port={agent_port}"]
        with (self.folder / "ray.log").open("ab") as log:
            return subprocess.Popen(
                [str(BIN / "ray"), "start", *words, *node], stdout=log, stderr=log, env=self.env, start_new_session=True
            )

    def until_nodes(self, number: int) -> None:
        """Wait until ``number`` nodes have joined."""
        until = time.monotonic() + _START_S
        while len(alive := [one for one in self._nodes() if one["state"] == "ALIVE"]) < number:
            assert time.monotonic() < until, f"{len(alive)} nodes of {number} have joined"
            time.sleep(0.5)

    def _nodes(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self._get("/api/v0/nodes"))["data"]["result"]["result"]
        return found

    def _get(self, path: str) -> bytes:
        request = urllib.request.Request(f"{self.address}{path}", headers={"Authorization": f"Bearer {self.token}"})
        with urllib.request.urlopen(request, timeout=5) as answer:
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


class TwoNodes:
    """A Ray cluster of two nodes on this machine, each with its own raylet; the second can be killed and replaced."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 200 << 20})
        self.second: Any = None
        self.renew()

    @property
    def address(self) -> str:
        """Address of the cluster."""
        return str(self.cluster.address)

    def renew(self) -> None:
        """Start the second node if it does not exist."""
        if self.second is None:
            self.second = self.cluster.add_node(num_cpus=1, object_store_memory=200 << 20, wait=True)

    def raylets(self) -> list[int]:
        """Process ids of the nodes' raylets."""
        nodes = [self.cluster.head_node, *([self.second] if self.second is not None else [])]
        return [node.all_processes["raylet"][0].process.pid for node in nodes]

    def kill_raylet(self) -> None:
        """Kill the raylet of the second node; its workers end with it."""
        if self.second is not None:
            self.second.all_processes["raylet"][0].process.kill()
            with contextlib.suppress(Exception):  # the node is partly gone
                self.cluster.remove_node(self.second, allow_graceful=False)
            self.second = None

    def close(self) -> None:
        """Stop all nodes."""
        self.cluster.shutdown()


def _gone() -> contextlib.suppress:
    """A block in which a process may have ended already."""
    return contextlib.suppress(psutil.NoSuchProcess)


def _tree(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
