"""Packing and separating: the same stems however clips are batched, and every query a stem or a failure."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from engine.passes.separate import separate_clips
from engine.schema import FAILURES
from engine.separators.batching import BatchedSeparator, SeparationRequest, SizeSearch, pack
from engine.separators.queries import Query
from tests.support.signals import (
    RATE_HZ,
    BandSeparator,
    CountedMemorySeparator,
    MarkedSeparator,
    SmallMemorySeparator,
    decoded,
    marked,
    mixture,
    snr_db,
    tiny_separator,
    two_bands,
)

LENGTHS = [4000, 800, 8000, 1, 3999, 800, 2400]
LABELS = [("low", "high"), ("high",), ("high", "low"), ("low",), ("low", "high"), ("low", "high"), ("high",)]


def corpus():
    return [
        decoded(mixture(max(num, 80), seed=seed)[:num], labels, clip_id=f"clip-{seed}")
        for seed, (num, labels) in enumerate(zip(LENGTHS, LABELS, strict=True))
    ]


def stems_of(separated):
    return {
        (item.clip.row["clip_id"], label): stem_T
        for item in separated
        for label, stem_T in zip(item.labels, item.stems_ST, strict=True)
    }


def check_conservation(clips, separated, failures):
    """Queries in = stems + what the failures say is missing; failures fit their schema."""
    num_queries = sum(len(clip.row["labels"]) for clip in clips)
    assert num_queries == len(stems_of(separated)) + sum(row["num_queries"] for row in failures)
    table = pa.Table.from_pylist(failures, schema=FAILURES)
    assert set(table["step"].to_pylist()) <= {"separate"}
    for item in separated:
        assert item.stems_ST.shape == (len(item.labels), len(item.clip.samples_T))
        assert item.stems_ST.dtype == item.mixture_T.dtype == torch.float32
        np.testing.assert_array_equal(item.mixture_T, item.clip.samples_T)


@pytest.mark.parametrize("batch_samples", [1, 100, 1000, 5000, 10**9])
def test_pack_holds_every_position_once_within_the_budget(batch_samples):
    sizes = np.random.default_rng(0).integers(0, 1200, 200).tolist()
    batches = list(pack(iter(sizes), batch_samples=batch_samples))
    assert sorted(i for batch in batches for i in batch) == list(range(200))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(sizes[i] for i in batch) <= batch_samples


def test_pack_goes_from_long_to_short_and_keeps_the_order_of_equals():
    assert list(pack([3, 5, 3, 5, 1, 3], batch_samples=10)) == [[1, 3], [0, 2, 5], [4]]
    assert list(pack([2, 2, 2, 2, 2], batch_samples=4)) == [[0, 1], [2, 3], [4]]


def test_pack_gives_what_exceeds_the_budget_a_batch_of_its_own():
    assert list(pack([7, 100, 7], batch_samples=14)) == [[1], [0, 2]]


def test_pack_of_nothing():
    assert list(pack([], batch_samples=10)) == []


@pytest.mark.parametrize("batch_s", [1e-9, 0.6, 2.0, 1000.0])
def test_clips_together_give_what_each_gives_alone(batch_s):
    clips = corpus()
    separated, failures = separate_clips(clips, BatchedSeparator(separator=BandSeparator(), batch_s=batch_s))
    assert failures == []
    check_conservation(clips, separated, failures)
    assert [item.clip.row["clip_id"] for item in separated] == [f"clip-{i}" for i in range(len(clips))]
    assert [tuple(item.labels) for item in separated] == LABELS
    for clip, item in zip(clips, separated, strict=True):
        (alone,), _ = separate_clips([clip], BatchedSeparator(separator=BandSeparator(), batch_s=batch_s))
        np.testing.assert_array_equal(item.stems_ST, alone.stems_ST)
        np.testing.assert_array_equal(item.clip.samples_T, clip.samples_T)


@pytest.mark.parametrize("batch_s", [0.6, 1000.0])
def test_the_built_in_separator_gives_a_clip_the_same_in_company(batch_s):
    clips, separator = corpus(), tiny_separator()
    separated, failures = separate_clips(clips, BatchedSeparator(separator=separator, batch_s=batch_s))
    assert failures == []
    for clip, item in zip(clips, separated, strict=True):
        (alone,), _ = separate_clips([clip], BatchedSeparator(separator=separator, batch_s=batch_s))
        np.testing.assert_allclose(item.stems_ST, alone.stems_ST, rtol=0, atol=1e-5)


def test_stems_are_the_sources():
    low_T, high_T = two_bands(8000, seed=4)
    (item,), _ = separate_clips([decoded(low_T + high_T)], BatchedSeparator(separator=BandSeparator(), batch_s=10.0))
    assert snr_db(estimate=item.stems_ST[0], reference=low_T) > 100
    assert snr_db(estimate=item.stems_ST[1], reference=high_T) > 100


def test_a_batch_holds_at_most_batch_s_of_audio():
    separator = BandSeparator()
    separate_clips(corpus(), BatchedSeparator(separator=separator, batch_s=2.0))
    assert all(rows * length <= 2 * RATE_HZ or rows == 1 for rows, length in separator.shapes)
    assert len(separator.shapes) < 11, "nothing was batched"


def test_the_fill_of_batches_is_the_share_of_audio_in_them():
    batched = BatchedSeparator(separator=BandSeparator(), batch_s=800 / RATE_HZ)
    assert batched.fill_fraction([400, 400, 300]) == 1100 / 1600
    assert batched.fill_fraction([1600]) == 1.0, "a clip longer than a batch is one"
    assert batched.fill_fraction([]) == 0.0


def test_what_does_not_fit_in_memory_is_not_tried_again_at_every_turn():
    separator = SmallMemorySeparator(max_samples=4 * 400 + 399)
    batched = BatchedSeparator(separator=separator, batch_s=1000.0)
    queries = [SeparationRequest(samples_T=torch.from_numpy(mixture(400)), query="low") for _ in range(16)]
    too_large = []
    for _ in range(6):
        separator.shapes.clear()
        assert not any(isinstance(answer, Exception) for answer in batched.separate(queries))
        too_large.append([rows for rows, length in separator.shapes if rows * length > separator.max_samples])
    assert too_large[0] == [16, 8, 8]
    assert too_large[1:3] == [[], []]
    assert {rows for turn in too_large[3:] for rows in turn} == {5}, (
        "a little more is tried after a while, no more than a little"
    )


def test_an_unknown_label_fails_alone():
    clips = [decoded(mixture(800), ("low", "whale", "high"), clip_id="a"), decoded(mixture(400), ("whale",))]
    separated, failures = separate_clips(clips, BatchedSeparator(separator=BandSeparator(), batch_s=10.0))
    check_conservation(clips, separated, failures)
    assert [item.labels for item in separated] == [["low", "high"]]
    assert [(row["clip_id"], row["label"], row["num_queries"]) for row in failures] == [
        ("a", "whale", 1),
        ("clip-400", "whale", 1),
    ]
    assert {row["error_class"] for row in failures} == {"ValueError"}
    assert all("does not know 'whale'" in row["message"] for row in failures)


def test_a_query_names_the_other_labels_of_its_clip_that_the_separator_knows():
    clips = [decoded(mixture(800), ("low", "whale", "high"), clip_id="a"), decoded(mixture(400), ("low",))]
    knowing = tiny_separator()
    torch.nn.init.normal_(knowing.queries.rivals_LQ)
    separated, failures = separate_clips(clips, BatchedSeparator(separator=knowing, batch_s=10.0))
    check_conservation(clips, separated, failures)
    assert [row["label"] for row in failures] == ["whale"]
    mix_BT = torch.from_numpy(mixture(800))[None]
    for label, other in (("low", "high"), ("high", "low")):
        stem_BT = knowing.separate(mix_BT, [Query(label, unwanted=other)])
        torch.testing.assert_close(stems_of(separated)["a", label][None], stem_BT)
    alone_BT = knowing.separate(torch.from_numpy(mixture(400))[None], ["low"])
    torch.testing.assert_close(stems_of(separated)["clip-400", "low"][None], alone_BT)


def test_a_batch_that_does_not_fit_is_halved_and_gives_the_same_stems():
    clips = corpus()
    expected, _ = separate_clips(clips, BatchedSeparator(separator=BandSeparator(), batch_s=1000.0))
    separator = SmallMemorySeparator(max_samples=2 * 8000)
    separated, failures = separate_clips(clips, BatchedSeparator(separator=separator, batch_s=1000.0))
    assert failures == []
    assert separator.shapes[0] == (11, 8000), "the first batch was to be too large"
    want, got = stems_of(expected), stems_of(separated)
    assert got.keys() == want.keys()
    for key, stem_T in want.items():
        np.testing.assert_array_equal(got[key], stem_T)


def test_a_batch_that_did_not_fit_is_let_go_before_its_halves_are_tried():
    """A caught error keeps the frames it came through, and their tensors, alive while it is handled."""
    clips = [decoded(mixture(800, seed=seed), clip_id=f"clip-{seed}") for seed in range(4)]
    separator = CountedMemorySeparator(max_samples=5 * 800)
    separated, failures = separate_clips(clips, BatchedSeparator(separator=separator, batch_s=1000.0))
    assert [row["message"] for row in failures] == []
    assert len(stems_of(separated)) == 8
    assert separator.alive == 0


def test_a_clip_that_never_fits_fails_with_its_reason_and_the_others_do_not():
    clips = corpus()
    separated, failures = separate_clips(
        clips, BatchedSeparator(separator=SmallMemorySeparator(max_samples=7999), batch_s=1000.0)
    )
    check_conservation(clips, separated, failures)
    (row,) = failures  # of the clip as a whole, which memory may have room for another time
    assert (row["clip_id"], row["label"], row["num_queries"]) == ("clip-2", None, 2)
    assert (row["error_class"], row["attempts"] > 1) == ("OutOfMemoryError", True)
    assert "clip-2" not in {item.clip.row["clip_id"] for item in separated}


@pytest.mark.parametrize("batch_s", [0.6, 1000.0])
def test_a_failing_clip_fails_alone(batch_s):
    clips = corpus()
    clips[4] = decoded(marked(clips[4].samples_T), clip_id="clip-4")
    separated, failures = separate_clips(clips, BatchedSeparator(separator=MarkedSeparator(), batch_s=batch_s))
    check_conservation(clips, separated, failures)
    expected, _ = separate_clips(clips, BatchedSeparator(separator=BandSeparator(), batch_s=batch_s))
    want, got = stems_of(expected), stems_of(separated)
    assert want.keys() - got.keys() == {("clip-4", "low"), ("clip-4", "high")}
    for key, stem_T in got.items():
        np.testing.assert_array_equal(stem_T, want[key])
    assert sorted((row["clip_id"], row["label"]) for row in failures) == [("clip-4", "high"), ("clip-4", "low")]
    assert {(row["error_class"], row["message"]) for row in failures} == {
        ("RuntimeError", "the marked clip cannot be separated")
    }


def test_a_clip_with_nan_fails_alone_with_the_built_in_separator():
    broken_T = mixture(800)
    broken_T[100] = np.nan
    clips = [decoded(mixture(900)), decoded(broken_T), decoded(mixture(700))]
    separated, failures = separate_clips(clips, BatchedSeparator(separator=tiny_separator(), batch_s=10.0))
    check_conservation(clips, separated, failures)
    assert {row["clip_id"] for row in failures} == {"clip-800"}
    assert {item.clip.row["clip_id"] for item in separated} == {"clip-900", "clip-700"}


@pytest.mark.parametrize(
    ("rates", "found_s"), [([1, 2, 4, 4.2, 9], 320), ([1, 1.05], 80), ([1, 3, 9, 27, 81, 99], 640)]
)
def test_the_size_of_batches_doubles_while_that_makes_them_faster(rates, found_s):
    search, waiting_s = SizeSearch(), 1000.0
    for rate in rates:
        for slow_start in (0.1, 0.5, 0.9, 1.0):
            search.add(slow_start * rate, waiting_s=waiting_s)
    assert search.size_s == found_s, "a batch of 1,280 s is never full"
    assert BatchedSeparator(separator=BandSeparator(), batch_s=7.0).size_s == 7.0


def test_no_clips():
    assert separate_clips([], BatchedSeparator(separator=BandSeparator(), batch_s=10.0)) == ([], [])


def test_a_clip_without_samples_gives_stems_without_samples():
    clips = [decoded(np.zeros(0)), decoded(mixture(80))]
    separated, failures = separate_clips(clips, BatchedSeparator(separator=tiny_separator(), batch_s=10.0))
    check_conservation(clips, separated, failures)
    assert [item.stems_ST.shape for item in separated] == [(2, 0), (2, 80)]


class Sharing(BandSeparator):
    """Takes ``rows``; ``mixtures`` collects the number of mixtures and the rows of every call."""

    shares_mixtures = True

    def __init__(self):
        super().__init__()
        self.mixtures = []

    def separate(self, mix_BT, queries, *, lengths=None, rows=None):
        if rows is None:
            return super().separate(mix_BT, queries, lengths=lengths)
        self.mixtures.append((len(mix_BT), list(rows)))
        return super().separate(mix_BT[list(rows)], queries, lengths=[lengths[row] for row in rows])


def test_queries_of_a_clip_share_its_mixture():
    separator = Sharing()
    separated, failures = separate_clips(corpus(), BatchedSeparator(separator=separator))
    assert separator.mixtures == [(7, [0, 0, 1, 1, 2, 2, 3, 4, 5, 5, 6])] and failures == []
    expected, _ = separate_clips(corpus(), BatchedSeparator(separator=BandSeparator()))
    for item, other in zip(separated, expected, strict=True):
        np.testing.assert_array_equal(item.stems_ST, other.stems_ST)
