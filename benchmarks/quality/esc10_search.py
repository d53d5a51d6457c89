"""A search for a schedule on real sound (ESC-10) against ClearSep's thresholds and ours; writes the README's table.

    python benchmarks/esc10_search.py --esc10 DIR [--out runs/search] [--quick]

Fold 1 trains the seed, the tagger and the estimator. The network is smaller and the corpus of folds 2 and 3 half as
large as those of the other tables, for many students are trained. The choice is made on mixtures of fold 4 and
confirmed on another draw of them. The script can be stopped and started again; it does what is missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from setting import Setting, say, stamp

from cluster.session import connected
from engine.cli.tables import fill
from engine.corpus.read import read_corpus
from engine.separators import NetworkConfig
from engine.settings import build
from engine.storage.files import write_bytes
from train.data.config import MixConfig
from train.judges.calibrate import CalibrationConfig
from train.judges.tagger import TaggerConfig
from tune.config import RunConfig
from tune.recipes import GATE, RECIPES
from tune.search.config import SearchConfig
from tune.search.report import search_tables
from tune.search.run import search

_HERE = Path(__file__).parent


def config_of(work: Setting, *, trials: int) -> SearchConfig:
    """The search of a small network's schedule."""
    size = work.size
    run = build(RunConfig, RECIPES["laptop"]() | {"corpus": str(work.natural()), "clean": work.clips})
    training = dataclasses.replace(
        run.distil,
        steps=size.round_steps,
        validate_every_steps=size.round_steps,
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
        distil=training,
        validation=choice,
    )
    fixed = {name: GATE[name] for name in ("min_stem_level_db", "max_mixture_coherence_fraction")}
    settings: dict[str, Any] = {
        "set": dataclasses.asdict(own),
        "iterations": 2,
        "schedule": fixed
        | {
            "min_estimated_si_sdr_db": {"between": [-3, 9], "step": 3, "shapes": ["constant", "linear"], "or": None},
            "min_remix_snr_db": {"between": [0, 9], "step": 3, "shapes": ["constant", "linear"]},
            "label_floor_fraction": {"choose": [None, 0.5]},
        },
        "trials": trials,
        "reduction_factor": 2.0,
        "finalists": 2,
        "repeats": 3,
        "confirmation": dataclasses.asdict(dataclasses.replace(choice, num_mixtures=size.num_mixtures, seed=1)),
    }
    return build(SearchConfig, json.loads(json.dumps(settings)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    Setting.arguments(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out = arguments.out or Path("runs/search-quick" if arguments.quick else "runs/search")
    work = Setting.of(arguments)
    if not arguments.quick:
        work = dataclasses.replace(
            work,
            size=dataclasses.replace(
                work.size, network=NetworkConfig(channels=96, num_blocks=6), num_two=200, num_three=40
            ),
        )
    config = config_of(work, trials=3 if arguments.quick else 12)
    with connected():
        found = search(config, work.out / "search", say=say)
    shown = {table.title: table for table in search_tables(found)}
    parts = [found["verdict"]["words"], shown["Confirmation"].markdown()]
    parts += [f"### {name}\n\n{shown[name].markdown()}" for name in ("Trials", "Sharing", "Pareto front")]
    own = config.set
    num_clips = read_corpus(own["corpus"]).num_clips
    size, steps, drawn = work.size, own["distil"]["steps"], own["validation"]["num_mixtures"]
    about = (
        f"{config.trials} schedules drawn (TPE, ASHA), two iterations each, beside the baselines; rounds of {steps} "
        f"steps with batches of 8 from a seed of {size.seed_steps}, network of {size.network.channels} channels and "
        f"{size.network.num_blocks} blocks, {num_clips} natural clips of folds 2 and 3; "
        f"chosen on {drawn} mixtures of fold 4, confirmed on {size.num_mixtures} of another draw; ± is the "
        f"standard deviation over {config.repeats} training seeds. {stamp()}"
    )
    page = "\n\n".join([*parts, about])
    print(page)
    if not arguments.quick:
        write_bytes(_HERE / "search.md", f"# Search for a schedule\n\n{page}\n".encode())
        fill(_HERE.parent / "README.md", "search", "\n\n".join([*parts[:2], about]))


if __name__ == "__main__":
    main()
