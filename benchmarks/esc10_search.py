"""A search for a schedule on real sound (ESC-10) against ClearSep's thresholds and ours; writes the README's table.

    python benchmarks/esc10_search.py --esc10 DIR [--out runs/quality] [--quick]

Starts from the seed, tagger and estimator of `benchmarks/truth.py` (fold 1), over a natural corpus of folds 2 and 3
that is half as large, in shorter rounds, for many are needed. The choice is made on mixtures of fold 4 and confirmed on
another draw of them. The script can be stopped and started again; it does what is missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from setting import Setting, prepare, say, stamp

from cluster.session import connected
from engine.corpus import read_corpus
from engine.storage import write_bytes
from tune.findings import search_tables
from tune.recipes import GATE, build
from tune.report import fill
from tune.search import SearchConfig, search

_HERE = Path(__file__).parent


def config_of(work: Setting, *, trials: int) -> SearchConfig:
    """The search; its clips and steps are a part of those of ``work``."""
    size = work.size
    small = dataclasses.replace(
        work,
        out=work.out / "search-corpus",
        size=dataclasses.replace(size, num_two=size.num_two // 2, num_three=size.num_three // 2),
    )
    run = work.config(2)
    training = dataclasses.replace(run.distil, steps=max(4, size.round_steps * 2 // 5))
    training = dataclasses.replace(
        training,
        mix=dataclasses.replace(training.mix, batch_size=8),
        validate_every_steps=training.steps,
        num_workers=0,
    )
    choice = dataclasses.replace(work.validation, num_mixtures=size.num_mixtures // 2)
    own = dataclasses.replace(run, corpus=str(small.natural()), distil=training, validation=choice)
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
    work = Setting.of(arguments)
    prepare(work)
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
        f"steps with batches of 8 from a seed of {size.seed_steps}, on {num_clips} natural clips of folds 2 and 3; "
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
