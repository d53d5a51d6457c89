"""The same pass on one node with all CPUs and on nodes of one CPU each.

    python -m benchmarks.scale.nodes [--repeats 3] [--out runs/nodes]

Each cluster is started by ``ray start``, as docs/guides/cluster.md describes, and given the same work in turns. The
figure is the audio that a CPU processes in a second while the pass is working. All nodes are on this machine, so the
cost of a network between them is not included. Writes ``nodes.md`` and a table of docs/results.md.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import pages
from engine.corpus.sources import read_sources
from engine.separators import NetworkConfig, QuerySeparator, save
from tests.support.ray_nodes import StartedCluster
from tune.demo import sounds
from tune.demo.corpus import write_natural

_PAGE = Path(__file__).with_name("nodes.md")
_SETTINGS = ("rows_per_task=8", "shard_s=80", "num_gpus_per_actor=0", "num_cpus_per_actor=0.5")


def write_inputs(out: Path, num_clips: int) -> tuple[Path, Path]:
    """A corpus of clips of 10 s and an untrained separator of the laptop's size."""
    clips = sounds.write_corpus(out / "corpus", num_per_label={1: 1, 2: 8}, seed=0, duration_s=10.0)
    sources = read_sources(clips, folds=[2])
    natural = write_natural(sources, out / "corpus", num_clips=[(2, num_clips)], sample_rate_hz=16000, seed=0)
    network = NetworkConfig(channels=256, num_blocks=10)
    save(QuerySeparator(network, sorted(set(sources.labels))), out / "separator")
    return natural, out / "separator"


def measure(num_nodes: int, out: Path, natural: Path, separator: Path) -> dict[str, Any]:
    """Summary of a pass on some nodes, which share this machine's CPUs."""
    folder = out / f"nodes-{num_nodes}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    num_cpus = os.cpu_count() or 1
    cluster = StartedCluster(folder, num_cpus=num_cpus // num_nodes)
    try:
        for _ in range(num_nodes - 1):
            cluster.add(num_cpus // num_nodes)
        arguments = ["separate-corpus", natural, "--separator", separator, "-o", folder / "pass", "--json"]
        arguments += ["--address", cluster.gcs_address, *(word for one in _SETTINGS for word in ("--set", one))]
        command = [sys.executable, "-m", "clearsep", *map(str, arguments)]
        cluster.until_nodes(num_nodes)
        done = subprocess.run(command, capture_output=True, text=True, env=cluster.env, cwd=pages.ROOT, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr)
        summary: dict[str, Any] = json.loads(done.stdout)
        return summary
    finally:
        cluster.close()


def main() -> None:
    """Command line."""
    parser = pages.parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/nodes"), help="working folder")
    parser.add_argument("--repeats", type=int, default=3, help="passes on each cluster")
    parser.add_argument("--clips", type=int, default=1200, help="clips of 10 s in the pass")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    natural, separator = write_inputs(out, arguments.clips)
    num_cpus = os.cpu_count() or 1
    speeds: dict[int, list[float]] = {1: [], num_cpus: []}
    for repeat in range(arguments.repeats):
        for number in speeds if repeat % 2 == 0 else reversed(speeds):
            summary = measure(number, out, natural, separator)
            speeds[number].append(summary["audio_s_per_s"] / num_cpus)
            pages.log(f"{number} nodes: {speeds[number][-1]:.2f} s of audio per second and CPU")
    ratios = [many / one for one, many in zip(speeds[1], speeds[num_cpus], strict=True)]
    rows = [
        [str(number), str(num_cpus // number), f"{statistics.median(one):.2f}", f"{min(one):.2f} to {max(one):.2f}"]
        for number, one in speeds.items()
    ]
    table = pages.markdown(["nodes", "CPUs of each", "audio seconds per second and CPU", "range"], rows)
    about = (
        f"The same pass over {arguments.clips} clips of 10 s, {arguments.repeats} times on each in turns; {num_cpus} "
        f"nodes have {statistics.median(ratios):.2f} of one node's throughput per CPU ({min(ratios):.2f} to "
        f"{max(ratios):.2f}). {pages.stamp()}"
    )
    print(table, about, sep="\n\n")
    pages.write_page(_PAGE, "One node and several", table, about)
    pages.fill(pages.RESULTS, "nodes", f"{table}\n\n{about}")


if __name__ == "__main__":
    main()
