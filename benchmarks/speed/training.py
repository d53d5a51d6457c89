"""Steps a minute of a training, with loading and making its batches, against an earlier version of this project.

    python -m benchmarks.speed.training [--esc10 DIR] [--against 7b741c8] [--repeats 3] [--large]

Both versions train the same student on the same clips with ``cs.distil``, each in a process of its own, in turns. The
time of few steps is subtracted from that of more, so start-up and loading do not count. Without ESC-10 the sounds are
synthesised. Writes ``training.md`` and a table of docs/results.md.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import pages
from tune.demo import sounds

_PAGE = Path(__file__).with_name("training.md")
_FEW, _MORE = 5, 45
_SIZES = {
    "laptop (256 channels, 10 blocks)": {},
    "large (768 channels, 20 blocks)": {"channels": 768, "num_blocks": 20},
}
_TRAIN = """
import json, resource, sys
import clearsep as cs
clips, out, network, steps = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), [int(one) for one in sys.argv[4:]]
wall_s = [
    cs.distil(f"{out}/{number}", clean=clips, config={"steps": number, "num_workers": 0}, network=network)["wall_s"]
    for number in steps
]
rate = 60.0 * (steps[1] - steps[0]) / (wall_s[1] - wall_s[0])
print(json.dumps([rate, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6]))
"""


def steps_a_minute(version: Path, clips: Path, network: dict[str, int]) -> tuple[float, float]:
    """Steps a minute of the code in a folder, and the peak memory of its process in GB."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-c", _TRAIN, str(clips), out, json.dumps(network), str(_FEW), str(_MORE)]
        environment = os.environ | {"PYTHONPATH": str(version)}
        done = subprocess.run(command, cwd=version, env=environment, capture_output=True, text=True, check=True)
    rate, memory_gb = json.loads(done.stdout.splitlines()[-1])
    return rate, memory_gb


def compare(name: str, clips: Path, earlier: Path, *, repeats: int) -> list[str]:
    """The row of a network."""
    pairs = [
        [steps_a_minute(version, clips, _SIZES[name]) for version in (earlier, pages.ROOT)] for _ in range(repeats)
    ]
    ratios = [now[0] / before[0] for before, now in pairs]
    rates = [f"{statistics.median(pair[side][0] for pair in pairs):.0f}" for side in (0, 1)]
    memories = [f"{max(pair[side][1] for pair in pairs):.2f}" for side in (0, 1)]
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    row = [name, *rates, f"{statistics.median(ratios):.2f}", spread, *memories]
    pages.log(" | ".join(row))
    return row


def main() -> None:
    """Command line."""
    parser = pages.parser(__doc__)
    parser.add_argument("--esc10", type=Path, help="folder with clips.csv and audio/; without it, synthesised sounds")
    parser.add_argument("--against", default="7b741c8", help="commit of the earlier version (default 7b741c8)")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each version")
    parser.add_argument("--large", action="store_true", help="also with the large network, which takes long")
    arguments = parser.parse_args()
    columns = ["network", "steps a minute before", "now", "ratio", "range", "GB before", "GB now"]
    with tempfile.TemporaryDirectory() as folder, pages.version_of(arguments.against) as earlier:
        clips = arguments.esc10 and arguments.esc10.resolve() / "clips.csv"
        if clips is None:
            clips = sounds.write_corpus(Path(folder), num_per_label={1: 8}, seed=0)
        names = [*_SIZES] if arguments.large else [*_SIZES][:1]
        rows = [compare(name, clips, earlier, repeats=arguments.repeats) for name in names]
    about = (
        f"Batches of 16 mixtures of 2 s, {arguments.repeats} repeats, before: commit {arguments.against}. "
        f"{pages.stamp()}"
    )
    table = pages.markdown(columns, rows)
    print(table, about, sep="\n\n")
    pages.write_page(_PAGE, "Training", table, about)
    pages.fill(pages.RESULTS, "training", f"{table}\n\n{about}")


if __name__ == "__main__":
    main()
