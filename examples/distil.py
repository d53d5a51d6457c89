"""Distil a student from tracks and clean clips, and measure it against its teacher.

python -m examples.distil [FOLDER]
"""

from pathlib import Path

import clearsep as cs
from examples.synthetic import TRAINING, run_example, train_seed, write_data


def main(folder: Path) -> None:
    """One iteration by hand: separate, filter, distil, evaluate."""
    natural, clips = write_data(folder)
    with cs.connect():
        teacher = train_seed(folder, clips)
        cs.run_pass(cs.read_corpus(natural), folder / "pass", separator=teacher)
        thresholds = cs.Thresholds(min_stem_level_db=-20.0)
        selection = cs.select_tracks(folder / "pass" / "stems", folder / "tracks", thresholds)
        print(f"{selection['num_kept']} tracks")
        student = folder / "student"
        cs.distil(student, clean=clips, tracks=folder / "tracks", start=teacher, config=TRAINING)

    for name, separator in (("teacher", teacher), ("student", student)):
        figures = cs.evaluate(separator, clips, num_mixtures=8)
        print(f"{name}: SDRi {figures['sdri_db']:.2f} dB, SI-SDRi {figures['si_sdri_db']:.2f} dB")


if __name__ == "__main__":
    run_example(main)
