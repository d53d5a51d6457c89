"""Search for a schedule of thresholds: two drawn schedules of one iteration, and the baselines.

python -m examples.search [FOLDER]

A real search takes hours: see docs/guides/search.md. The same on the command line: `clearsep tune space.yaml -o search`
"""

from pathlib import Path

import clearsep as cs
from examples.synthetic import NETWORK, TRAINING, run_example, write_data


def main(folder: Path) -> None:
    """Search, and print the report's verdict."""
    natural, clips = write_data(folder)
    space = {
        "run": "laptop",
        "set": {
            "corpus": str(natural),
            "clean": str(clips),
            "network": NETWORK,
            "seed_training": TRAINING,
            "distil": TRAINING,
            "schedule": [{"min_stem_level_db": -30.0}],
            "validation": {"clips": str(clips), "num_mixtures": 8},
        },
        "iterations": 1,
        "schedule": {"min_stem_level_db": {"between": [-40, -20]}},
        "trials": 2,
        "finalists": 1,
        "repeats": 1,
    }
    with cs.connect():
        report = cs.search(space, folder / "search")
    print(report["verdict_text"])
    print(f"the report is in {folder / 'search' / 'report.md'}")


if __name__ == "__main__":
    run_example(main)
