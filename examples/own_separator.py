"""Let a separator of your own drive a pass, by the dotted name of its factory.

python -m examples.own_separator [FOLDER]

The same on the command line:
`clearsep separate-corpus natural.csv --separator examples.band_separator:open_separator -o pass`
"""

from pathlib import Path

import torch

import clearsep as cs
from examples.synthetic import run_example, write_data

NAME = "examples.band_separator:open_separator"


def main(folder: Path) -> None:
    """Use the separator directly, then in a pass."""
    separator = cs.load_separator(NAME)
    stems_BT = separator.separate(torch.randn(2, 16000), ["rain", "engine"])
    print(f"stems of shape {tuple(stems_BT.shape)} at {separator.sample_rate_hz} Hz")

    natural, _ = write_data(folder)
    with cs.connect():
        summary = cs.run_pass(cs.read_corpus(natural), folder / "pass", separator=NAME)
    print(f"{summary['num_stems']} stems, {summary['audio_s_per_s']:.0f} s of audio per second")


if __name__ == "__main__":
    run_example(main)
