"""Data of the examples: synthesised single-source clips, a natural-looking corpus, and a small seed separator."""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import clearsep as cs
from engine.corpus.sources import read_sources
from tune.demo.corpus import write_natural
from tune.demo.sounds import write_corpus

NETWORK = {"channels": 32, "num_blocks": 2, "num_bands": 48}
TRAINING = {"steps": 30, "num_workers": 0, "mix": {"batch_size": 4, "segment_s": 1.0}}


def write_data(folder: Path) -> tuple[Path, Path]:
    """Write clips of eight sounds, and mixtures of two as natural clips; returns both lists: ``(natural, clips)``."""
    clips = folder / "data" / "clips.csv"
    if not clips.is_file():
        write_corpus(folder / "data", num_per_label={1: 2, 2: 4}, seed=0, duration_s=2.0)
    natural = write_natural(
        read_sources(clips, folds=[2]), folder / "data", num_clips=[(2, 12)], sample_rate_hz=16000, seed=1
    )
    return natural, clips


def train_seed(folder: Path, clips: Path) -> Path:
    """Train a small separator on the clips, once; returns its folder."""
    cs.distil(folder / "seed", clean=clips, network=NETWORK, config=TRAINING)
    return folder / "seed"


def run_example(main: Callable[[Path], None]) -> None:
    """Run an example in the folder that the command line names, or in a temporary one."""
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]).resolve())
        return
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
