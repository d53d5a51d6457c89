"""Each option of the mixer against known answers: what is drawn how often, what the target is, what it counts."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from tests.support.remixes import (
    CLIPS,
    CLIPS_PER_LABEL,
    LABELS,
    RATE_HZ,
    Natural,
    config,
    contents,
    mixer,
    mixtures,
    pitch_hz,
    raw,
    tone,
)
from train.data.items import Item, absent_items, pair_items
from train.data.mixer import Batch


def item(label: str, number: int, *, labels_present: tuple[str, ...] = (), estimate_db: float | None = None) -> Item:
    """A tone as a track of a clip of its own, which names ``heard`` too."""
    return Item(
        labels=(label,),
        labels_present=frozenset((label, *labels_present)),
        clip=f"{label}-{number}",
        duration_s=1.0,
        load=lambda: tone(pitch_hz(label, number)),
        estimated_si_sdr_db=estimate_db,
    )


RECORDED = [  # of the mixer before it had options: queries, and mixtures and targets against a ramp
    (
        {"augment": True, "batch_size": 6},
        [3, 1, 5, 1, 2, 1],
        [-0.3937, -0.2173, 0.5095, 0.1139, -0.1986, 0.1487],
        [-0.0621, 0.0103, 0.1917, 0.1299, -0.0479, 0.0168],
    ),
    (
        {"natural_fraction": 0.5},
        [3, 0, 4, 2],
        [-0.5061, 0.0099, -0.9767, 0.0721],
        [-0.1433, -0.4306, -0.2616, 0.1769],
    ),
    (
        {"silence_rate": 0.5, "three_source_fraction": 1.0, "clean_fraction": 0.2},
        [3, 5, 3, 1],
        [-0.7866, -0.1557, 0.0751, 0.1372],
        [-0.133, 0.0026, 0.0, 0.2408],
    ),
]


@pytest.mark.parametrize(("settings", "index_B", "mix_B", "target_G"), RECORDED)
def test_without_options_batches_are_what_they_were(
    clean: list[Item],
    recordings: dict[str, list[Item]],
    settings: dict[str, float],
    index_B: list[int],
    mix_B: list[float],
    target_G: list[float],
) -> None:
    """Numbers of commit f9875bf, before the options; bytes would differ with the processor."""
    batch = mixer(clean, config(**settings), **recordings, seed=3, rank=1).batch(5)
    ramp_T = torch.linspace(-1.0, 1.0, 2000, dtype=torch.float64)
    assert batch.index_B.tolist() == index_B
    assert (batch.mix_BT.double() @ ramp_T).tolist() == pytest.approx(mix_B, abs=1e-4)
    assert (batch.target_GT.double() @ ramp_T).tolist() == pytest.approx(target_G, abs=1e-4)
    assert batch.weight_G.tolist() == [1.0] * len(target_G)
    assert batch.mixture_G.tolist() == list(range(len(target_G)))


def test_options_that_are_off_draw_nothing(clean: list[Item], recordings: dict[str, list[Item]]) -> None:
    """To the bit, though there are sounds for them and estimates."""
    estimated = [item("dog", 8, estimate_db=-3.0), *recordings["tracks"]]
    pairs, absent = [_pair("dog", 1.0)], [item("bell", 9)]
    with_sounds = mixer(clean, config(silence_rate=0.3), tracks=estimated, pairs=pairs, absent=absent)
    without = mixer(clean, config(silence_rate=0.3), tracks=estimated)
    assert [raw(with_sounds.batch(step)) for step in range(4)] == [raw(without.batch(step)) for step in range(4)]


@pytest.mark.parametrize("pool_s", [7200.0, 3.0], ids=["all-in-memory", "rotating"])
def test_a_resumed_training_sees_the_same_with_every_option(
    clean: list[Item], recordings: dict[str, list[Item]], natural: Natural, pool_s: float
) -> None:
    mix = config(
        **{"pool_s": pool_s, "refresh_steps": 3, "augment": True, "batch_size": 8, "silence_rate": 0.3},
        **{"absent_fraction": 0.5, "clip_fraction": 0.3, "mixit_fraction": 0.3, "natural_fraction": 0.3},
        **{"label_balance": 0.3, "quality_weight": "draw", "consistency_weight": 0.5},
    )
    sounds = recordings | {
        "pairs": pair_items(natural.tracks, sample_rate_hz=RATE_HZ),
        "absent": absent_items(natural.tracks, sample_rate_hz=RATE_HZ),
    }
    undisturbed, resumed = (mixer(clean, mix, **sounds) for _ in range(2))
    seen = [raw(undisturbed.batch(step)) for step in range(10)]
    assert [raw(resumed.batch(step)) for step in range(6, 10)] == seen[6:]


@pytest.mark.parametrize("label_balance", [1.0, 0.5, 0.0])
def test_labels_are_drawn_evenly_or_by_how_many_sounds_they_have(label_balance: float) -> None:
    counts = {"bell": 1, "dog": 4, "rain": 16}
    items = [item(label, number) for label, number in counts.items() for number in range(number)]
    made = mixer(items, config(batch_size=200, label_balance=label_balance))
    asked = Counter(query for *_, query in mixtures(made, 6))
    weights = {label: number ** (1 - label_balance) for label, number in counts.items()}
    for label, weight in weights.items():
        assert asked[label] / 1200 == pytest.approx(weight / sum(weights.values()), abs=0.04)


def test_balance_counts_what_a_rotating_pool_does_not_hold() -> None:
    items = [item(label, number) for label, count in (("bell", 2), ("dog", 8)) for number in range(count)]
    made = mixer(items, config(batch_size=200, label_balance=0.0, pool_s=4.0))
    asked = Counter(query for *_, query in mixtures(made, 4))
    assert asked["dog"] / 800 == pytest.approx(0.8, abs=0.04)


@pytest.mark.parametrize(("how", "share"), [("none", 1 / 2), ("loss", 1 / 2), ("draw", 2 / 3)])
def test_tracks_of_a_label_are_drawn_by_their_quality(how: str, share: float) -> None:
    """One of unknown quality beside one that is half right."""
    tracks = [item("dog", 0), item("dog", 1, estimate_db=0.0)]
    made = mixer([item("bell", 0)], config(batch_size=200, quality_weight=how), tracks=tracks)
    drawn = Counter(number for mix_T, *_ in mixtures(made, 4) for label, number in contents(mix_T) if label == "dog")
    assert drawn[0] / drawn.total() == pytest.approx(share, abs=0.05)


@pytest.mark.parametrize(("how", "ratio"), [("none", 1.0), ("draw", 1.0), ("loss", 1 / 5)])
def test_a_target_counts_as_much_as_it_is_right(how: str, ratio: float) -> None:
    """A share of a fifth is right: -6 dB. Silence for what is not there is certain, and so is a clean clip."""
    tracks = [item("dog", 1, estimate_db=-10 * np.log10(4))]
    made = mixer([item("bell", 0)], config(batch_size=32, quality_weight=how), tracks=tracks)
    batch = made.batch(0)
    assert float(batch.weight_G.mean()) == pytest.approx(1.0)
    by_label = {made.labels[int(i)]: float(w) for i, w in zip(batch.index_B, batch.weight_G, strict=True)}
    assert by_label["dog"] / by_label["bell"] == pytest.approx(ratio)
    silent = mixer([item("bell", 0), item("rain", 0)], config(silence_rate=1.0, quality_weight=how), tracks=tracks)
    assert silent.batch(0).weight_G.tolist() == [1.0] * 4


def test_the_centre_is_where_a_track_weighs_half() -> None:
    tracks = [item("dog", 1, estimate_db=5.0)]
    mix = config(batch_size=32, quality_weight="loss", quality_centre_db=5.0)
    batch = mixer([item("bell", 0)], mix, tracks=tracks).batch(0)
    low, high = sorted(set(batch.weight_G.tolist()))
    assert low / high == pytest.approx(1 / 2)


def _at(whole_T: np.ndarray, crop_T: torch.Tensor, first: int) -> float:
    """Gain of a crop, if it is what stands there."""
    part_T, crop_T = whole_T[first : first + len(crop_T)].astype(np.float64), crop_T.double().numpy()
    gain = float(crop_T @ part_T / (part_T @ part_T))
    np.testing.assert_allclose(crop_T, gain * part_T, atol=1e-6)
    return gain


@pytest.mark.parametrize("share", [False, True])
def test_a_clip_is_the_mixture_and_its_track_at_the_same_place_the_target(natural: Natural, share: bool) -> None:
    pairs = pair_items(natural.tracks, sample_rate_hz=RATE_HZ, share=share)
    made = mixer([], config(clip_fraction=1.0, batch_size=16), pairs=pairs)
    clips = {clip: samples_T.astype(np.float64) for clip, samples_T in natural.mixtures.items()}
    seen = set()
    for mix_T, target_T, query in mixtures(made, 3):
        fits = {clip: np.correlate(whole_T, mix_T.double().numpy(), "valid") for clip, whole_T in clips.items()}
        clip = max(fits, key=lambda name: float(fits[name].max()))
        first = int(fits[clip].argmax())
        divided = share and clip in ("pair", "half", "trio")
        track_T = natural.shares(clip)[query] if divided else natural.stems[clip, query]
        assert _at(natural.mixtures[clip], mix_T, first) == pytest.approx(_at(track_T, target_T, first), rel=1e-4)
        seen.add((clip, query))
    assert seen == {(pair.clip, *pair.labels) for pair in pairs}


def _pair(label: str, gain: float, *, labels_present: tuple[str, ...] = (), at: slice = slice(None)) -> Item:
    """A clip of noise and, as its track, a part of it."""

    def load() -> np.ndarray:
        clip_T = np.random.default_rng(0).normal(0.0, 0.1, 16000).astype(np.float32)
        track_T = np.zeros_like(clip_T)
        track_T[at] = gain * clip_T[at]
        return np.stack([track_T, clip_T])

    names = frozenset((label, *labels_present))
    return Item(labels=(label,), labels_present=names, clip=f"pair-{label}", duration_s=4.0, load=load)


def test_speed_and_colour_are_the_same_for_clip_and_track() -> None:
    made = mixer([], config(clip_fraction=1.0, batch_size=32, augment=True), pairs=[_pair("dog", 0.25)])
    for mix_T, target_T, _ in mixtures(made, 2):
        torch.testing.assert_close(target_T, 0.25 * mix_T, atol=1e-6, rtol=1e-4)


def test_a_clip_has_the_level_of_any_source_and_its_target_is_active() -> None:
    """The track sounds for a tenth of the clip's time; it is always in the crop, wholly where the crop is longer."""
    pairs = [_pair("dog", 0.5, at=slice(8000, 8800))]
    made = mixer([], config(clip_fraction=1.0, batch_size=64, gain_db=0.0), pairs=pairs)
    for mix_T, target_T, _ in mixtures(made, 2):
        assert float(mix_T.square().mean().sqrt()) == pytest.approx(0.1, rel=0.05)
        assert int((target_T != 0.0).sum()) >= 790
        torch.testing.assert_close(target_T[target_T != 0.0], 0.5 * mix_T[target_T != 0.0])


@pytest.mark.parametrize(("clip_fraction", "tolerance"), [(0.0, 0.0), (0.3, 0.06), (1.0, 0.0)])
def test_share_of_clips(clean: list[Item], clip_fraction: float, tolerance: float) -> None:
    mix = config(batch_size=64, clip_fraction=clip_fraction, silence_rate=0.2)
    rows = mixtures(mixer(clean, mix, pairs=[_pair("dog", 0.5), _pair("bell", 0.5, labels_present=("rain",))]), 6)
    noise = [(target_T, query) for mix_T, target_T, query in rows if (torch.fft.rfft(mix_T).abs() > 0.1).sum() > 500]
    assert len(noise) / len(rows) == pytest.approx(clip_fraction, abs=tolerance + 1e-9)
    assert {query for target_T, query in noise if target_T.any()} <= {"dog", "bell"}
    if noise:  # some are asked for what is not there
        assert np.mean([bool(target_T.any()) for target_T, _ in noise]) == pytest.approx(0.8, abs=0.09)


def test_a_clip_counts_by_the_quality_of_its_track() -> None:
    half_right = Item(**(vars(_pair("dog", 0.5)) | {"estimated_si_sdr_db": 0.0}))
    made = mixer([], config(clip_fraction=1.0, batch_size=32, quality_weight="loss"),
                 pairs=[half_right, _pair("bell", 0.5)])  # fmt: skip
    batch = made.batch(0)
    by_label = {made.labels[int(i)]: float(w) for i, w in zip(batch.index_B, batch.weight_G, strict=True)}
    assert by_label["dog"] / by_label["bell"] == pytest.approx(1 / 2)


def test_a_label_that_the_filter_found_absent_has_a_silent_target_in_its_own_clip(natural: Natural) -> None:
    absent = absent_items(natural.tracks, sample_rate_hz=RATE_HZ)
    made = mixer([], config(silence_rate=1.0, absent_fraction=1.0, batch_size=16), absent=absent)
    seen = set()
    for mix_T, target_T, query in mixtures(made, 3):
        assert not target_T.any()
        fits = {name: np.correlate(whole_T, mix_T.numpy(), "valid") for name, whole_T in natural.mixtures.items()}
        clip = max(fits, key=lambda name: float(fits[name].max()))
        assert _at(natural.mixtures[clip], mix_T, int(fits[clip].argmax())) > 0.0
        seen.add((clip, query))
    assert seen == {("half", "dog"), ("trio", "bell"), ("none", "bell"), ("none", "dog")}


@pytest.mark.parametrize(("silence_rate", "absent_fraction"), [(0.4, 0.0), (0.4, 0.5), (0.4, 1.0), (0.0, 1.0)])
def test_shares_of_silence_from_absent_labels_and_in_all(
    clean: list[Item], silence_rate: float, absent_fraction: float
) -> None:
    absent = [Item(**(vars(item("dog", 9, labels_present=("bell",))) | {"load": lambda: tone(pitch_hz("bell", 9))}))]
    mix = config(batch_size=64, silence_rate=silence_rate, absent_fraction=absent_fraction)
    rows = mixtures(mixer(clean, mix, absent=absent), 9)
    silent = [mix_T for mix_T, target_T, _ in rows if not target_T.any()]
    of_a_clip = sum(contents(mix_T).keys() == {("bell", 9)} for mix_T in silent)
    assert len(silent) / len(rows) == pytest.approx(silence_rate, abs=0.06 if silence_rate else 0.0)
    assert of_a_clip / len(rows) == pytest.approx(silence_rate * absent_fraction, abs=0.05)
    assert of_a_clip == len(silent) if absent_fraction == 1.0 else True


def groups_of(batch: Batch, mixture: int, labels: tuple[str, ...]) -> list[tuple[int, tuple[str, ...]]]:
    return [
        (group, tuple(labels[int(i)] for i in batch.index_B[batch.group_B == group]))
        for group in torch.nonzero(batch.mixture_G == mixture).flatten().tolist()
    ]


def test_two_natural_clips_are_each_the_target_of_all_their_labels(
    clean: list[Item], recordings: dict[str, list[Item]]
) -> None:
    """The trio is left out: it names something of every other clip."""
    natural = [one for one in recordings["natural"] if one.clip != "trio"]
    made = mixer(clean, config(mixit_fraction=1.0, batch_size=16), natural=natural)
    seen = set()
    for batch in (made.batch(step) for step in range(4)):
        assert batch.mixture_G.tolist() == [number for number in range(16) for _ in (0, 1)]
        assert batch.whole_G.all()
        _, mix_GT = batch.regroup(torch.zeros_like(batch.mix_BT))
        for mixture in range(16):
            groups = groups_of(batch, mixture, made.labels)
            assert not set(groups[0][1]) & set(groups[1][1])
            for group, queries in groups:
                (clip,) = [
                    name for name, sounds in CLIPS.items() if set(sounds) == contents(batch.target_GT[group]).keys()
                ]
                assert queries == tuple(label for label, _ in CLIPS[clip])
                seen.add(clip)
            first, second = (group for group, _ in groups)
            assert torch.equal(mix_GT[first], mix_GT[second])
            torch.testing.assert_close(batch.target_GT[first] + batch.target_GT[second], mix_GT[first])
    assert seen == CLIPS.keys() - {"trio"}


@pytest.mark.parametrize(("mixit_fraction", "natural_fraction"), [(0.25, 0.0), (0.4, 0.5)])
def test_shares_of_two_natural_clips_and_of_one_in_the_others(
    clean: list[Item], recordings: dict[str, list[Item]], mixit_fraction: float, natural_fraction: float
) -> None:
    mix = config(mixit_fraction=mixit_fraction, natural_fraction=natural_fraction, batch_size=64)
    made = mixer(clean, mix, natural=[one for one in recordings["natural"] if one.clip != "trio"])
    two, one = 0, 0
    for batch in (made.batch(step) for step in range(6)):
        in_group_G, is_of_two_G = batch.group_B.bincount(), batch.mixture_G.bincount()[batch.mixture_G] == 2
        two += int(is_of_two_G.sum()) // 2
        one += int((~is_of_two_G & (in_group_G > 1)).sum())
    assert two / 384 == pytest.approx(mixit_fraction, abs=0.06)
    assert one / 384 == pytest.approx(natural_fraction * (1 - mixit_fraction), abs=0.06)


def test_clips_that_all_name_the_same_are_not_mixed_with_each_other(
    clean: list[Item], recordings: dict[str, list[Item]]
) -> None:
    natural = [one for one in recordings["natural"] if "bell" in one.labels]
    assert len(natural) > 1
    batch = mixer(clean, config(mixit_fraction=1.0, batch_size=16), natural=natural).batch(0)
    assert batch.mixture_G.tolist() == list(range(16))
    assert not batch.whole_G.any()


def test_for_consistency_a_clip_is_asked_for_all_its_labels_and_only_its_track_counts(clean: list[Item]) -> None:
    pairs = [
        _pair("dog", 0.5, labels_present=("rain", "bell")),
        _pair("wind", 0.5, labels_present=("owl",)),
        _pair("train", 1.0),
    ]
    made = mixer(clean, config(clip_fraction=1.0, consistency_weight=1.0, batch_size=32), pairs=pairs)
    batch = made.batch(0)
    _, mix_GT = batch.regroup(torch.zeros_like(batch.mix_BT))
    seen = set()
    for mixture in range(32):
        groups = groups_of(batch, mixture, made.labels)
        first = groups[0][0]
        seen.add(tuple(queries for _, queries in groups))
        assert bool(batch.whole_G[first]) == (groups[0][1] != ("wind",))  # nobody knows an owl
        for group, _ in groups[1:]:
            assert float(batch.weight_G[group]) == 0.0
            torch.testing.assert_close(batch.target_GT[first] + batch.target_GT[group], mix_GT[first])
    assert seen == {(("dog",), ("bell", "rain")), (("wind",),), (("train",),)}
    assert len(set(batch.weight_G[batch.weight_G > 0].tolist())) == 1
    assert float(batch.weight_G.mean()) == pytest.approx(1.0)


def test_labels_of_clips_are_drawn_as_balance_says(clean: list[Item]) -> None:
    pairs = [_pair("dog", 0.5)] * 9 + [_pair("bell", 0.5)]
    for label_balance, share in ((1.0, 0.5), (0.0, 0.9)):
        mix = config(clip_fraction=1.0, label_balance=label_balance, batch_size=200)
        queries = [query for *_, query in mixtures(mixer(clean, mix, pairs=pairs), 2)]
        assert queries.count("dog") / 400 == pytest.approx(share, abs=0.06)
    assert CLIPS_PER_LABEL * len(LABELS) == len(clean)
