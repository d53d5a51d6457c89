"""Scores of stems as they are stored: the same alone and together, on a CPU and on a card, for the integers written."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from engine.audio.flac import decode_flac24, encode_flac24, encode_steps
from engine.schema import DecodedClip, SeparatedClip
from engine.scoring import energies, scores, spectra
from engine.scoring.scores import score_batch, score_clip
from engine.scoring.stored import batches_of, score_together

RATE_HZ = 8000
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def clip_of(stems_ST, mixture_T=None, device="cpu"):
    stems_ST = torch.as_tensor(np.asarray(stems_ST, np.float32))
    mixture_T = stems_ST.sum(0) if mixture_T is None else torch.as_tensor(mixture_T)
    row = {"clip_id": "a", "path": "a.wav", "labels": ["x"] * len(stems_ST), "start_s": None, "end_s": None}
    clip = DecodedClip(row=row, samples_T=mixture_T.numpy())
    labels = row["labels"]
    return SeparatedClip(clip=clip, labels=labels, mixture_T=mixture_T.to(device), stems_ST=stems_ST.to(device))


def awkward_clips(device="cpu"):
    """Noise, silence, a tone, a band-limited clip, faint and loud ones, a perfect and a poor sum; two stems each."""
    rng, num_samples = np.random.default_rng(0), 2 * RATE_HZ
    noise = rng.standard_normal((2, num_samples))
    tone = np.sin(2 * np.pi * 40 / RATE_HZ * np.arange(num_samples))
    smooth = np.apply_along_axis(np.convolve, 1, noise, np.hanning(64), "same")
    kinds = [noise, 0 * noise, [0 * tone, noise[0]], [tone, 0.5 * tone], smooth, 1e-30 * noise, 1e9 * noise]
    clips = [clip_of(kind, device=device) for kind in kinds]
    poor = [clip_of(kind, np.float32(kind[0] + 0.1 * noise[1]), device) for kind in (noise, smooth)]
    return [*clips, *poor]


def stored(batch):
    return [one.scores for one in batch.clips()]


@pytest.mark.parametrize("level", [0.7, 1e-4, 30.0])
def test_what_is_stored_decodes_to_what_was_scored(level):
    item = clip_of(level * np.random.default_rng(1).standard_normal((2, 4000)))
    (clip,) = score_together([item], sample_rate_hz=RATE_HZ, as_integers=True).clips()
    decoded = [
        decode_flac24(encode_steps(one_T, exponent, sample_rate_hz=RATE_HZ), exponent)
        for one_T, exponent in zip(clip.signals_ST, clip.exponents, strict=True)
    ]
    for signal_T, one_T in zip([item.mixture_T, *item.stems_ST], decoded, strict=True):
        assert np.array_equal(one_T, decode_flac24(*encode_flac24(signal_T.numpy(), sample_rate_hz=RATE_HZ)))
    expected = score_clip(
        mixture_T=item.mixture_T, stems_ST=torch.from_numpy(np.stack(decoded[1:])), sample_rate_hz=RATE_HZ
    )
    assert clip.scores == expected


def test_samples_that_are_written_at_another_rate_are_not_rounded():
    item = clip_of(np.random.default_rng(1).standard_normal((2, 4000)))
    (clip,) = score_together([item], sample_rate_hz=RATE_HZ, as_integers=False).clips()
    assert clip.exponents is None
    assert np.array_equal(clip.signals_ST, torch.cat([item.mixture_T[None], item.stems_ST]))


def test_clips_together_have_the_scores_of_each_alone():
    clips = awkward_clips()
    clips = [tried(clip, number % 3) for number, clip in enumerate(clips)]
    together = stored(score_together(clips, sample_rate_hz=RATE_HZ, as_integers=True))
    alone = [stored(score_together([item], sample_rate_hz=RATE_HZ, as_integers=True))[0] for item in clips]
    assert_same_scores(together, alone)


def tried(item, num_tentative):
    """The clip with labels of its own for its stems, of which the last are only tried."""
    labels = [f"label {number}" for number in range(len(item.labels))]
    row = {**item.clip.row, "labels": labels, "num_tentative": num_tentative}
    return replace(item, labels=labels, clip=replace(item.clip, row=row))


def test_a_stem_that_is_only_tried_leaves_the_scores_of_the_others_alone():
    """Two sources and two stems that leak: the sources score as without them, each of the others as joined to both."""
    rng = np.random.default_rng(0)
    sources_ST = rng.standard_normal((2, 2 * RATE_HZ))
    leaks_ST = 0.4 * sources_ST[::-1] + 0.1 * rng.standard_normal((2, 2 * RATE_HZ))
    mixture_T = np.float32(sources_ST.sum(0))

    def scores_of(*stems, num_tentative=None):
        item = tried(clip_of(np.stack(stems), mixture_T), num_tentative)
        return stored(score_together([item], sample_rate_hz=RATE_HZ, as_integers=True))[0]

    got = scores_of(*sources_ST, *leaks_ST, num_tentative=2)
    joined = [scores_of(*sources_ST, leak_T)[2] for leak_T in leaks_ST]
    assert_same_scores([got], [[*scores_of(*sources_ST), *joined]])
    assert got[0]["remix_snr_db"] > 60.0 > 20.0 > got[2]["remix_snr_db"]
    assert scores_of(*sources_ST, leaks_ST[0])[0]["remix_snr_db"] < 20.0, "as a label it spoils all"


def test_in_a_clip_without_labels_each_stem_scores_alone():
    item = tried(awkward_clips()[0], 2)
    alone = [
        stored(score_together([clip_of(one[None], item.mixture_T)], sample_rate_hz=RATE_HZ, as_integers=True))[0][0]
        for one in item.stems_ST.numpy()
    ]
    assert_same_scores(stored(score_together([item], sample_rate_hz=RATE_HZ, as_integers=True)), [alone])


def test_a_batch_has_clips_of_one_shape(monkeypatch):
    clips = [clip_of(np.ones((stems, num))) for stems, num in [(2, 80), (2, 90), (2, 80), (3, 80), (2, 80)]]
    assert [len(batch) for batch in batches_of(clips)] == [1] * 5, "on a CPU each alone"
    monkeypatch.setattr("engine.scoring.stored.is_on_cpu", lambda _: False)
    monkeypatch.setattr("engine.scoring.stored.SAMPLES_AT_ONCE_ON_GPU", 320)
    numbers = {id(item): number for number, item in enumerate(clips)}
    batches = [[numbers[id(item)] for item in batch] for batch in batches_of(clips)]
    assert batches == [[0, 2], [4], [1], [3]]


def assert_same_scores(some, others):
    for rows, other_rows in zip(some, others, strict=True):
        for row, other in zip(rows, other_rows, strict=True):
            assert row == {name: pytest.approx(value, abs=2e-3) for name, value in other.items()}


def test_a_card_computes_the_same_without_conditions(monkeypatch):
    """What a GPU computes, on a CPU: no scaling that depends on values, and Cholesky instead of Levinson."""
    clips = awkward_clips()
    expected = stored(score_together(clips, sample_rate_hz=RATE_HZ, as_integers=True))
    with monkeypatch.context() as patched:
        for module in (energies, scores, spectra):
            patched.setattr(module, "is_on_cpu", lambda _: False)
        got = stored(score_together(clips, sample_rate_hz=RATE_HZ, as_integers=True))
    assert_same_scores(got, expected)


@needs_gpu
def test_a_gpu_stores_the_same_integers_and_scores():
    on_cpu, on_gpu = (
        score_together(awkward_clips(device), sample_rate_hz=RATE_HZ, as_integers=True) for device in ("cpu", "cuda")
    )
    torch.cuda.synchronize()
    assert torch.equal(on_gpu.signals_BST, on_cpu.signals_BST) and on_gpu.signals_BST.is_pinned()
    assert torch.equal(on_gpu.exponents_BS, on_cpu.exponents_BS)
    assert_same_scores(stored(on_gpu), stored(on_cpu))


def test_a_clip_with_a_sample_that_is_not_finite_fails_alone():
    good, bad = clip_of(np.ones((2, 800))), clip_of(np.ones((2, 800)))
    bad.stems_ST[1, 7] = torch.nan
    first, second = score_together([good, bad], sample_rate_hz=RATE_HZ, as_integers=True).clips()
    assert len(first.scores) == 2 and "must be finite, got NaN" in str(second)
    with pytest.raises(ValueError, match="NaN or infinity in stem 1 of clip 1"):
        score_batch(
            mixtures_BT=torch.stack([good.mixture_T, bad.mixture_T]),
            stems_BST=torch.stack([good.stems_ST, bad.stems_ST]),
            sample_rate_hz=RATE_HZ,
        )
