"""The cost of a search compared with as many separate runs, measured together.

    python -m benchmarks.scale.sharing [--out runs/sharing] [--runs 6]

The demo's sounds; two iterations in a schedule; 16 schedules drawn on a grid of 16 and the three baselines, once with
early stopping and once without. A separate run starts from the same seed and shares nothing; their mean is taken over
some of the drawn schedules. Writes ``sharing.md`` and a table of docs/results.md. Run it again to resume it; a
measurement that was interrupted starts from its beginning.
"""

from __future__ import annotations

import functools
import json
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import pages
from cluster.session import connect
from engine.settings import build, merged, plain
from engine.storage.files import read_json, write_json
from tune.config import RunConfig
from tune.demo.corpus import write_demo_space
from tune.inputs import resolve
from tune.recipes import recipe_settings
from tune.run import begin, run
from tune.schedule import resolve_schedule
from tune.search.config import SearchConfig, read_search
from tune.search.run import search
from tune.search.verdict import last_rows

_PAGE = Path(__file__).with_name("sharing.md")
_SCHEDULE = {
    "min_stem_level_db": -20.0,
    "label_floor_fraction": 0.3,
    "min_remix_snr_db": {"between": [0, 9], "step": 3, "shapes": ["free"]},
}
_SEARCHES = {"search": "default: early stopping", "search-complete": "without early stopping"}


def timed(out: Path, name: str, work: Callable[[Path], Any]) -> dict[str, Any]:
    """The result of ``work`` in a folder of its own, with its wall time, kept on disk."""
    path = out / f"{name}.json"
    if not path.is_file():
        pages.log(name)
        shutil.rmtree(out / name, ignore_errors=True)
        started = time.perf_counter()
        values = work(out / name)
        write_json(path, {"values": values, "wall_s": time.perf_counter() - started})
    return read_json(path)  # type: ignore[no-any-return]


def searched(config: SearchConfig, out: Path) -> dict[str, Any]:
    """The schedules of a search, and how many of them ran all iterations."""
    rows = search(config, out)["rows"]
    last = [row for row in last_rows(rows) if row["kind"] != "repeat"]
    return {
        "schedules": [row["schedule"] for row in last],
        "num_complete": sum(row["iteration"] == config.iterations for row in last),
    }


def run_alone(own: RunConfig, schedule: str, out: Path) -> None:
    """A run of one schedule that shares nothing."""
    run(replace(own, schedule=resolve_schedule(json.loads(schedule))), out)


def main() -> None:
    """Command line."""
    parser = pages.parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/sharing"), help="working folder")
    parser.add_argument("--runs", type=int, default=6, help="number of separate runs to time")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    config = read_search(write_demo_space(out))
    own = build(RunConfig, merged(recipe_settings(config.run), config.set))
    with connect():
        pages.log("seed")
        begin(own, resolve(own), out / "seed")
        own = replace(own, separator=str(out / "seed" / "iterations" / "0" / "separator"))
        config = replace(config, set=plain(own), schedule=_SCHEDULE, trials=16, finalists=1, repeats=1)
        searches = {}
        runs: list[float] = []
        for part, name in enumerate(_SEARCHES):
            one = config if name == "search" else replace(config, reduction_factor=1.0)
            searches[name] = timed(out, name, functools.partial(searched, one))
            different = sorted(set(searches["search"]["values"]["schedules"]))
            for number in range(part, arguments.runs, 2):  # half of them after each search: the machine's load drifts
                schedule = different[number * len(different) // arguments.runs]
                alone = timed(out, f"run-{number}", functools.partial(run_alone, own, schedule))
                runs.append(alone["wall_s"])
    report(searches, runs)


def report(searches: dict[str, dict[str, Any]], runs: list[float]) -> None:
    """Write the table."""
    mean, spread = statistics.fmean(runs), statistics.stdev(runs)
    rows = []
    for name, about in _SEARCHES.items():
        values, wall_s = searches[name]["values"], searches[name]["wall_s"]
        number, different = len(values["schedules"]), len(set(values["schedules"]))
        cells = [about, str(number), str(different), str(values["num_complete"])]
        rows.append([*cells, f"{wall_s:.0f}", f"{number * mean:.0f}", f"{wall_s / (number * mean):.2f}"])
    columns = [
        "search",
        "schedules",
        "different",
        "all iterations run",
        "wall s",
        "as many separate runs s",
        "ratio",
    ]
    table = pages.markdown(columns, rows)
    about = (
        f"Schedules of two iterations on the demo's sounds; the whole search is counted (the start of its trials, the "
        f"finalists), with the baselines; one separate run takes {mean:.0f} ± {spread:.0f} s ({len(runs)} runs). "
        f"{pages.stamp()}"
    )
    print(table, about, sep="\n\n")
    pages.write_page(_PAGE, "What trials share", table, about)
    pages.fill(pages.RESULTS, "sharing", f"{table}\n\n{about}")


if __name__ == "__main__":
    main()
