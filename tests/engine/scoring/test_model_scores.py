"""All scores of separated clips: those that are switched on, and margins of a tagger that measures bands."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from engine.schema import SCORES, SeparatedClip
from engine.scoring.model_scores import Scorer, tagger_margins
from engine.scoring.reseparate import reseparate
from engine.scoring.scores import score_clip
from engine.separators.batching import BatchedSeparator, SeparationRequest
from engine.taggers import Tagger
from tests.support.signals import RATE_HZ, BandSeparator, BandTagger, decoded, snr_db, tone, two_bands

BY_MODEL = ("cycle_si_sdr_db", "rival_leak_db", "tagger_margin_db")


def separated(stems_ST, labels=("low", "high"), *, labels_present=None, clip_id="clip"):
    stems_ST = torch.from_numpy(np.float32(stems_ST))
    clip = decoded(stems_ST.sum(0), labels_present or labels, clip_id=clip_id)
    return SeparatedClip(clip=clip, labels=list(labels), mixture_T=stems_ST.sum(0), stems_ST=stems_ST)


def margins(*clips, tagger=None, batch_s=100.0):
    rows = tagger_margins(list(clips), tagger or BandTagger(), sample_rate_hz=RATE_HZ, batch_s=batch_s)
    assert all(list(row) == ["tagger_margin_db"] for clip in rows for row in clip)
    return [[row["tagger_margin_db"] for row in clip] for clip in rows]


def scorer(**settings):
    return Scorer(batched=BatchedSeparator(separator=BandSeparator(), batch_s=10.0), **settings)


def test_the_stand_in_is_a_tagger():
    assert isinstance(BandTagger(), Tagger)


@pytest.mark.parametrize("leak_db", [-20.0, -6.0, 3.0])
def test_the_margin_is_that_of_the_label_over_its_rival(leak_db):
    low_T, high_T = tone(500, 1.0), tone(2000, 1.0)
    ((low, high),) = margins(separated([low_T + 10 ** (leak_db / 20) * high_T, high_T]))
    assert low == pytest.approx(-leak_db, abs=0.05)
    assert high > 60


def test_rivals_are_the_known_labels_of_the_clip_or_all_others():
    low_T = tone(500, 1.0)
    labels_present = tone(500, 1.0) + 0.1 * tone(2000, 1.0)
    (with_click,) = margins(separated([labels_present, 0 * low_T], ("low", "click")))
    assert with_click[0] > 60, "the clip does not name the other sound"
    ((alone,),) = margins(separated([labels_present], ("low",)))
    assert alone == pytest.approx(20.0, abs=0.05)


def test_unknown_labels_have_no_margin_and_are_not_rivals():
    item = separated([tone(500, 1.0), tone(700, 1.0)], ("low", "whale"), labels_present=["low", "whale", "high"])
    ((low, whale),) = margins(item)
    assert whale is None and low > 60
    assert margins(separated([tone(500, 1.0)], ("whale",))) == [[None]]


def test_labels_are_found_in_any_spelling():
    assert margins(separated([tone(500, 1.0), tone(2000, 1.0)], ("The sound of LOW", "High")))[0][0] > 60


def test_a_silent_stem_has_no_margin_either_way():
    silence_T = np.zeros(RATE_HZ)
    assert margins(separated([silence_T, silence_T])) == [[0, 0]]


@pytest.mark.parametrize("batch_s", [1e-9, 2.0, 1000.0])
def test_batches_change_no_margin_and_hold_at_most_batch_s(batch_s):
    sizes = (RATE_HZ, RATE_HZ // 2, 3000)
    clips = [separated(two_bands(size, seed=seed), clip_id=str(size)) for seed, size in enumerate(sizes)]
    tagger = BandTagger()
    assert margins(*clips, tagger=tagger, batch_s=batch_s) == margins(*clips)
    assert all(rows == 1 or rows * length <= batch_s * RATE_HZ for (rows, length), _ in tagger.calls)
    assert sorted(length for _, lengths in tagger.calls for length in lengths) == sorted(2 * sizes)


@pytest.mark.parametrize("rate_hz", [4000, 16000, 44100])
def test_the_tagger_gets_stems_at_its_rate(rate_hz):
    tagger = BandTagger(rate_hz)
    ((low, high),) = margins(separated([tone(500, 1.0), tone(1500, 1.0)]), tagger=tagger)
    assert low > 30 and high > 30
    assert [lengths for _, lengths in tagger.calls] == [[rate_hz, rate_hz]]


def test_only_scores_that_are_switched_on_are_computed():
    clips = [separated(two_bands(RATE_HZ))]
    names = {
        (False, False): set(),
        (True, False): {"cycle_si_sdr_db", "rival_leak_db"},
        (False, True): {"tagger_margin_db"},
        (True, True): set(BY_MODEL),
    }
    for (again, tagged), expected in names.items():
        some = scorer(reseparate=again, tagger=BandTagger() if tagged else None)
        ((first, second),) = some.model_scores(clips)
        assert set(first) == set(second) == expected
        assert bool(some.batched.separator.shapes) == again


def test_model_scores_are_those_of_their_parts():
    clips = [separated(two_bands(RATE_HZ, seed=1), clip_id="a"), separated(two_bands(4000, seed=2), clip_id="b")]
    some = scorer(tagger=BandTagger(), seed=3)
    again = reseparate(clips, some.batched, seed=3)
    for rows, leaks, tags in zip(some.model_scores(clips), again, margins(*clips), strict=True):
        for row, leak, margin in zip(rows, leaks, tags, strict=True):
            assert row == leak | {"tagger_margin_db": margin}


def test_scores_are_those_of_the_clip_and_of_the_models():
    item = separated(two_bands(RATE_HZ, seed=1))
    ((low, high),) = scorer(tagger=BandTagger()).scores([item])
    expected = score_clip(mixture_T=item.mixture_T, stems_ST=item.stems_ST, sample_rate_hz=RATE_HZ)
    for row, alone in zip((low, high), expected, strict=True):
        assert {name: row[name] for name in SCORES.names if name not in BY_MODEL} == {
            name: alone[name] for name in SCORES.names if name not in BY_MODEL
        }
        assert row["tagger_margin_db"] > 30 and row["rival_leak_db"] < -80
    assert pa.Table.from_pylist([low, high], schema=SCORES).num_rows == 2


def test_a_stem_that_is_not_finite_has_no_margin_and_does_not_affect_others():
    broken, good = separated(two_bands(RATE_HZ)), separated(two_bands(RATE_HZ))
    broken.stems_ST[0, 7] = np.inf
    assert margins(broken, good) == [[None, margins(good)[0][1]], *margins(good)]


def test_stems_that_are_not_finite_are_named():
    stems_ST = np.stack(two_bands(800))
    item = separated(stems_ST)
    item.stems_ST[1, 7] = np.nan
    with pytest.raises(ValueError, match="got NaN or infinity in stem 1 of clip 0"):
        scorer(reseparate=False).scores([item])


def test_no_clips():
    assert scorer(tagger=BandTagger()).scores([]) == []


def test_stems_are_returned_in_the_order_of_the_queries():
    signals = {size: two_bands(size, seed=size) for size in (100, 8000, 900, 4000)}
    queries = [
        SeparationRequest(samples_T=torch.from_numpy(np.float32(low_T + high_T)), query=label)
        for low_T, high_T in signals.values()
        for label in ("high", "low")
    ]
    answers = BatchedSeparator(separator=BandSeparator(), batch_s=1.0).separate(queries)
    expected = [stem_T for low_T, high_T in signals.values() for stem_T in (high_T, low_T)]
    for answer_T, stem_T in zip(answers, expected, strict=True):
        assert len(answer_T) == len(stem_T)
        assert snr_db(estimate=answer_T, reference=stem_T) > 80
