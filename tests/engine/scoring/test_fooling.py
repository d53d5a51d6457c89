"""Thresholds against wrong stems: adversaries on clips of two bands, scored by an exact separator and tagger."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from benchmarks.quality.adversaries import ADVERSARIES, Case
from engine.schema import SCORES, SeparatedClip
from engine.scoring.model_scores import Scorer
from engine.selection.filter import judge
from engine.selection.thresholds import Thresholds
from engine.separators.batching import BatchedSeparator
from tests.support.signals import RATE_HZ, BandSeparator, BandTagger, decoded, snr_db, two_bands

RULES = {
    "min_remix_snr_db": 10.0,
    "min_re_sdr_db": 10.0,
    "min_stem_level_db": -25.0,
    "max_rival_leak_db": -6.0,
    "min_tagger_margin_db": 0.0,
    "min_mask_snr_db": 3.0,
}
REMIX = {"min_remix_snr_db", "min_re_sdr_db"}
ORACLES = {"oracle (true sources)", "oracle with noise at -20 dB"}
CAUGHT_BY = {  # each of these rules rejects some of the wrong stems, and together they reject all of them
    "mixture and silence": {"max_rival_leak_db", "min_stem_level_db"},
    "mixture divided evenly": {"max_rival_leak_db", "min_mask_snr_db"},
    "labels swapped": {"max_rival_leak_db", "min_tagger_margin_db"},
    "random masks": {"max_rival_leak_db", "min_mask_snr_db"},
    "artefact of 0 dB in both": {"max_rival_leak_db", "min_mask_snr_db"},
    "all at 0.3": {"min_remix_snr_db", "min_mask_snr_db"},
    "leak at -6 dB": {"min_mask_snr_db"},
    "delayed by 2 ms": {"min_remix_snr_db"},
    "one source absent": {"min_stem_level_db", "min_mask_snr_db", *REMIX},
    "another recording of the label": REMIX,
    "low-passed at 1 kHz": {"min_stem_level_db", "max_rival_leak_db", "min_tagger_margin_db", *REMIX},
    "one polarity flipped": REMIX,
    "loudest half-second only": REMIX,
    "gated noise": {"min_mask_snr_db", *REMIX},
    "musical noise": {"max_rival_leak_db", "min_mask_snr_db"},
    "binary masks, a third wrong": {"min_mask_snr_db"},
}
NOT_WRONG = {"leak at -12 dB"}  # an SI-SDR of 12 dB: it may pass
GOOD_DB = 8.0  # plain SNR, as in benchmarks/fooling.py


def case(seed):
    truth, others = (torch.from_numpy(np.stack(two_bands(2 * RATE_HZ, seed=of))) for of in (seed, seed + 50))
    return Case(truth_ST=truth, others_ST=others, sample_rate_hz=RATE_HZ, rng=np.random.default_rng(seed))


def scored(name):
    """Scores of an adversary's stems of three clips, and which of them are wrong."""
    clips, wrong = [], []
    for seed in range(3):
        made = case(seed)
        stems_ST = ADVERSARIES[name](made).float()
        item = decoded(made.mix_T.numpy(), clip_id=f"clip-{seed}")
        clips.append(SeparatedClip(clip=item, labels=["low", "high"], mixture_T=made.mix_T, stems_ST=stems_ST))
        pairs = zip(stems_ST, made.truth_ST, strict=True)
        wrong += [snr_db(estimate=stem_T, reference=source_T) < GOOD_DB for stem_T, source_T in pairs]
    scorer = Scorer(batched=BatchedSeparator(separator=BandSeparator(), batch_s=10.0), tagger=BandTagger())
    rows = [row for clip in scorer.scores(clips) for row in clip]
    return pa.Table.from_pylist(rows, schema=SCORES), np.array(wrong)


def kept(scores, rules):
    thresholds = Thresholds(**{name: RULES[name] for name in rules})
    return np.array(judge(scores, thresholds)["kept"].to_pylist())


def test_every_adversary_is_classified_here():
    assert set(ADVERSARIES) == {*ORACLES, *NOT_WRONG, *CAUGHT_BY}


@pytest.mark.parametrize("name", sorted(ORACLES))
def test_the_thresholds_keep_every_true_source(name):
    scores, wrong = scored(name)
    assert not wrong.any()
    assert kept(scores, RULES).all()


@pytest.mark.parametrize("name", CAUGHT_BY)
def test_the_thresholds_catch_every_wrong_stem_by_the_rules_for_it(name):
    scores, wrong = scored(name)
    assert wrong.sum() >= 3, "no adversary"
    assert not kept(scores, CAUGHT_BY[name])[wrong].any()
    assert not kept(scores, RULES)[wrong].any()
    for rule in CAUGHT_BY[name]:
        assert not kept(scores, [rule])[wrong].all(), f"{rule} catches none"


@pytest.mark.parametrize("name", [name for name, rules in CAUGHT_BY.items() if not rules & REMIX])
def test_remix_scores_alone_are_fooled(name):
    """ClearSep's own rules keep all of these stems."""
    scores, _ = scored(name)
    assert kept(scores, REMIX).all()
