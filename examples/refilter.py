"""Select tracks from one pass with several thresholds: scores are stored, so no audio is opened.

python -m examples.refilter [FOLDER]

The same on the command line: `clearsep filter pass -o tracks --set min_re_sdr_db=10`
"""

from pathlib import Path

import clearsep as cs
from examples.synthetic import run_example, write_data


def main(folder: Path) -> None:
    """Run a pass once, then filter it three times."""
    natural, _ = write_data(folder)
    with cs.connect():
        cs.run_pass(cs.read_corpus(natural), folder / "pass", separator="examples.band_separator:open_separator")

    choices = {
        "every stem": cs.Thresholds(),
        "ClearSep": cs.Thresholds(min_re_sdr_db=10.0),
        "present and different": cs.Thresholds(min_stem_level_db=-20.0, max_coherence_fraction=0.5),
    }
    for name, thresholds in choices.items():
        selection = cs.select_tracks(folder / "pass" / "stems", folder / name.replace(" ", "-"), thresholds)
        rejected = ", ".join(f"{rule} rejected {count}" for rule, count in selection["num_rejected"].items())
        print(f"{name}: kept {selection['num_kept']} of {selection['num_stems']} stems ({rejected or 'none rejected'})")


if __name__ == "__main__":
    run_example(main)
