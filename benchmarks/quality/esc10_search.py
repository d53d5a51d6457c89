"""A search for a schedule on real sound (ESC-10), against ClearSep's thresholds and the recipe's.

    python -m benchmarks.quality.esc10_search --esc10 DIR [--out runs/search] [--quick]

Fold 1 trains the seed, the tagger and the estimator. The network is smaller and the corpus of folds 2 and 3 half as
large as in the other benchmarks, because many students are trained. The choice is made on mixtures of fold 4 and
confirmed on another draw of them. Writes ``search.md`` and a table of docs/results.md. Run it again to resume it.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from benchmarks import pages
from benchmarks.setting import Setting
from cluster.session import connect
from engine.cli.console import show_progress
from engine.corpus.read import read_corpus
from engine.separators import NetworkConfig
from engine.settings import build, plain
from train.data.config import MixConfig
from train.judges.calibrate import CalibrationConfig
from train.judges.tagger import TaggerConfig
from tune.config import RunConfig
from tune.recipes import RECIPES, THRESHOLDS
from tune.search.config import SearchConfig
from tune.search.report import search_tables
from tune.search.run import search

_PAGE = Path(__file__).with_name("search.md")


def search_config(work: Setting, *, trials: int) -> SearchConfig:
    """The search for the schedule of a small network."""
    size = work.size
    run = build(RunConfig, RECIPES["laptop"]() | {"corpus": str(work.natural()), "clean": work.clips})
    training = dataclasses.replace(
        run.distil,
        steps=size.student_steps,
        validate_every_steps=size.student_steps,
        num_workers=0,
        mix=dataclasses.replace(run.distil.mix, batch_size=8),
    )
    choice = dataclasses.replace(work.validation, num_mixtures=size.num_mixtures // 2)
    own = dataclasses.replace(
        run,
        clean_folds=(1,),
        network=size.network,
        seed_training=dataclasses.replace(training, steps=size.seed_steps, mix=MixConfig()),
        tagger_training=TaggerConfig(steps=size.tagger_steps),
        calibration=CalibrationConfig(steps=size.half_steps),
        schedule=size.schedule,
        distil=training,
        validation=choice,
    )
    fixed = {name: THRESHOLDS[name] for name in ("min_stem_level_db", "max_mixture_coherence_fraction")}
    drawn: dict[str, Any] = {
        "min_estimated_si_sdr_db": {"between": [-3, 9], "step": 3, "shapes": ["constant", "linear"], "or": None},
        "min_remix_snr_db": {"between": [0, 9], "step": 3, "shapes": ["constant", "linear"]},
        "label_floor_fraction": {"choose": [None, 0.5]},
    }
    return SearchConfig(
        set=plain(own),
        iterations=2,
        schedule=fixed | drawn,
        trials=trials,
        reduction_factor=2.0,
        finalists=2,
        repeats=3,
        confirmation=dataclasses.replace(choice, num_mixtures=size.num_mixtures, seed=1),
    )


def main() -> None:
    """Command line."""
    parser = pages.parser(__doc__)
    Setting.add_arguments(parser)
    arguments = parser.parse_args()
    show_progress()
    torch.set_num_threads(1)
    arguments.out = arguments.out or Path("runs/search-quick" if arguments.quick else "runs/search")
    work = Setting.from_arguments(arguments)
    if not arguments.quick:
        network = NetworkConfig(channels=96, num_blocks=6)
        work = dataclasses.replace(
            work, size=dataclasses.replace(work.size, network=network, num_two=200, num_three=40)
        )
    config = search_config(work, trials=3 if arguments.quick else 12)
    with connect():
        result = search(config, work.out / "search")
    tables = {table.title: table.markdown() for table in search_tables(result)}
    parts = [result["verdict_text"], tables["Confirmation"]]
    parts += [f"### {name}\n\n{tables[name]}" for name in ("Trials", "Sharing", "Pareto front")]
    parts.append(_provenance(work, config))
    print(*parts, sep="\n\n")
    if not arguments.quick:
        pages.write_page(_PAGE, "Search for a schedule", *parts)
        pages.fill(pages.RESULTS, "search", "\n\n".join([*parts[:2], parts[-1]]))


def _provenance(work: Setting, config: SearchConfig) -> str:
    own, size = config.set, work.size
    return (
        f"{config.trials} schedules drawn (TPE, ASHA), two iterations each, in addition to the baselines; iterations "
        f"of {own['distil']['steps']} steps with batches of 8 from a seed of {size.seed_steps}, network of "
        f"{size.network.channels} channels and {size.network.num_blocks} blocks, "
        f"{read_corpus(own['corpus']).num_clips} natural clips of folds 2 and 3; chosen on "
        f"{own['validation']['num_mixtures']} mixtures of fold 4, confirmed on {size.num_mixtures} of another draw; ± "
        f"is the standard deviation over {config.repeats} training seeds. {pages.stamp()}"
    )


if __name__ == "__main__":
    main()
