"""The same pass on one node with all CPUs and on nodes of one CPU each; writes the README's table.

    python benchmarks/nodes.py [--repeats 3] [--out runs/nodes]

Each cluster is started by ``ray start``, as the README says, and given the same work, in turns; what is compared is
the audio that a CPU gets done in a second while the pass is at work. All nodes are on this machine: what a network
between them would cost is not in it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from setting import say, stamp

_ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(_ROOT / "tests"))

from ray_nodes import StartedCluster  # noqa: E402

from engine.cli.tables import fill  # noqa: E402
from engine.corpus.sources import read_sources  # noqa: E402
from engine.separators import NetworkConfig, QuerySeparator, save  # noqa: E402
from engine.storage.files import write_bytes  # noqa: E402
from tune.demo import sounds as synth  # noqa: E402
from tune.demo.corpus import write_natural  # noqa: E402

_SETTINGS = ("rows_per_task=8", "part_s=80", "num_gpus_per_actor=0", "num_cpus_per_actor=0.5")


def inputs(out: Path, num_clips: int) -> tuple[Path, Path]:
    """A corpus of clips of 10 s and a separator of the laptop's size that has learned nothing."""
    clips = synth.write_corpus(out / "corpus", num_per_label={1: 1, 2: 8}, seed=0, duration_s=10.0)
    sources = read_sources(clips, folds=[2])
    natural = write_natural(sources, out / "corpus", num_clips=[(2, num_clips)], sample_rate_hz=16000, seed=0)
    network = NetworkConfig(channels=256, num_blocks=10)
    save(QuerySeparator(network, sorted(set(sources["label"].to_pylist()))), out / "separator")
    return natural, out / "separator"


def measure(num_nodes: int, out: Path, natural: Path, separator: Path) -> dict[str, Any]:
    """A pass on so many nodes, which share this machine's CPUs; returns its summary."""
    folder = out / f"nodes-{num_nodes}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    num_cpus = os.cpu_count() or 1
    cluster = StartedCluster(folder, num_cpus=num_cpus // num_nodes)
    try:
        for _ in range(num_nodes - 1):
            cluster.add(num_cpus // num_nodes)
        words = ["separate-corpus", natural, "--separator", separator, "-o", folder / "pass", "--json"]
        words += ["--address", cluster.gcs_address, *(word for one in _SETTINGS for word in ("--set", one))]
        command = [sys.executable, "-m", "clearsep", *map(str, words)]
        cluster.until_nodes(num_nodes)
        done = subprocess.run(command, capture_output=True, text=True, env=cluster.env, cwd=_ROOT, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr)
        summary: dict[str, Any] = json.loads(done.stdout)
        return summary
    finally:
        cluster.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/nodes"), help="working folder")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--clips", type=int, default=1200, help="clips of 10 s in the pass")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    natural, separator = inputs(out, arguments.clips)
    num_cpus = os.cpu_count() or 1
    speeds: dict[int, list[float]] = {1: [], num_cpus: []}
    for repeat in range(arguments.repeats):
        for number in speeds if repeat % 2 == 0 else reversed(speeds):
            summary = measure(number, out, natural, separator)
            speeds[number].append(summary["audio_s_per_s"] / num_cpus)
            say(f"{number} nodes: {speeds[number][-1]:.2f} s of audio per second and CPU")
    ratios = [many / one for one, many in zip(speeds[1], speeds[num_cpus], strict=True)]
    lines = ["| nodes | CPUs of each | audio seconds per second and CPU | range |", "| --- | --- | --- | --- |"]
    for number, found in speeds.items():
        cells = [str(number), str(num_cpus // number), f"{statistics.median(found):.2f}"]
        lines.append("| " + " | ".join([*cells, f"{min(found):.2f} to {max(found):.2f}"]) + " |")
    about = (
        f"The same pass over {arguments.clips} clips of 10 s, {arguments.repeats} times on each in turns; {num_cpus} "
        f"nodes have {statistics.median(ratios):.2f} of one node's throughput per CPU ({min(ratios):.2f} to "
        f"{max(ratios):.2f}). {stamp()}"
    )
    text = "\n".join(lines) + f"\n\n{about}"
    print(text)
    write_bytes(Path(__file__).parent / "nodes.md", f"# One node and several\n\n{text}\n".encode())
    fill(_ROOT / "README.md", "nodes", text)


if __name__ == "__main__":
    main()
