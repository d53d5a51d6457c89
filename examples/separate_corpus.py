"""Separate a corpus of recordings and look at the scores of every stem.

python -m examples.separate_corpus [FOLDER]
"""

from pathlib import Path

import pyarrow.parquet as pq

import clearsep as cs
from examples.synthetic import run_example, train_seed, write_data


def main(folder: Path) -> None:
    """Train a seed, run one pass, print the scores."""
    natural, clips = write_data(folder)
    corpus = cs.read_corpus(natural)
    print(f"{corpus.num_clips} clips, {corpus.num_failures} rows that are no clips")
    with cs.connect():
        seed = train_seed(folder, clips)
        summary = cs.run_pass(corpus, folder / "pass", separator=seed)
    print(f"{summary['num_stems']} stems of {summary['num_queries']} queries, {summary['num_failed']} failed")

    shards = sorted((folder / "pass" / "stems").glob("*.parquet"))
    stems = pq.read_table(shards, columns=["path", "label", "re_sdr_db", "mask_snr_db"])
    for stem in stems.slice(0, 6).to_pylist():
        name = f"{Path(stem['path']).name} {stem['label']}"
        print(f"{name:40} Re-SDR {stem['re_sdr_db']:6.1f} dB, mask SNR {stem['mask_snr_db']:6.1f} dB")


if __name__ == "__main__":
    run_example(main)
