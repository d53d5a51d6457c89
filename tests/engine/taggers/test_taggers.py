"""Taggers: margins by hand, the built-in tagger with any weights, and its files."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from engine.storage.files import sha256_file
from engine.taggers import (
    ShareTagger,
    Tagger,
    TagNetworkConfig,
    find_label,
    load_tagger,
    margin_db,
    read_tagger,
    rivals_of,
    save_tagger,
)
from engine.taggers.network import mel_filters
from tests.support.signals import RATE_HZ, two_bands

TINY = TagNetworkConfig(sample_rate_hz=RATE_HZ, num_fft=256, num_bands=16, channels=16)


@pytest.fixture
def tagger():
    """Untrained, with statistics of batches as a trained one has them."""
    made = ShareTagger(TINY, ["low", "high", "dog_bark"])
    with torch.no_grad():
        for _ in range(5):
            made.network(made.network.powers(torch.randn(8, 4000)))
        made.network.outward.weight.mul_(5.0)
    return made.eval()


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def test_a_margin_is_over_the_strongest_rival():
    tags_BL = torch.tensor([[-1.0, -4.0, -9.0], [-1.0, -4.0, -9.0], [-3.0, -2.0, -20.0]])
    margins = margin_db(tags_BL, [0, 2, 1], [[1, 2], [0, 1], [2]])
    assert margins.tolist() == [3.0, -8.0, 18.0]
    assert margin_db(tags_BL, torch.tensor([0, 0, 0]), [[2], [1], [1]]).tolist() == [8.0, 3.0, -1.0]
    assert margin_db(torch.zeros(0, 3), [], []).shape == (0,)


def test_a_margin_is_bounded():
    tags_BL = torch.tensor([[0.0, -250.0]])
    assert margin_db(tags_BL, [0], [[1]]).item() == 100.0
    assert margin_db(tags_BL, [1], [[0]]).item() == -100.0


@pytest.mark.parametrize(
    ("own", "rivals", "message"),
    [
        ([0], [[]], r"got \[\] for label 0 in row 0"),
        ([0], [[0, 1]], "give at least one other"),
        ([2], [[0]], "rivals must be one or more other labels of 2"),
        ([0], [[-1]], "rivals must be one or more other labels"),
        ([0, 1], [[1]], "one of each per row"),
    ],
)
def test_margins_that_make_no_sense_raise(own, rivals, message):
    with pytest.raises(ValueError, match=message):
        margin_db(torch.zeros(1, 2), own, rivals)


def test_margins_of_tags_that_are_not_finite_raise():
    with pytest.raises(ValueError, match="tags must be finite, got NaN or infinity"):
        margin_db(torch.tensor([[0.0, float("nan")]]), [0], [[1]])


def test_rivals_are_the_other_labels_of_the_clip_or_all():
    known = ("cat", "dog_bark", "rain")
    assert rivals_of("cat", ["cat", "The sound of Dog bark"], known) == [1]
    assert rivals_of("cat", ["cat"], known) == [1, 2]
    assert rivals_of("cat", ["cat", "violin"], known) == [1, 2], "a label that the tagger does not know is no rival"
    assert find_label("dog bark", known) == 1 and find_label("violin", known) is None


def test_the_protocol_distinguishes_taggers_from_other_objects(tagger):
    assert isinstance(tagger, Tagger)
    assert not isinstance(torch.nn.Linear(2, 2), Tagger)


def test_tags_are_shares_that_add_up_to_one(tagger):
    tags_BL = tagger.tag(noise(4, 6000))
    assert tags_BL.shape == (4, 3) and tags_BL.dtype == torch.float32
    torch.testing.assert_close((10 ** (tags_BL / 10)).sum(1), torch.ones(4), rtol=0, atol=1e-5)
    assert tags_BL.std() > 0.1, "the tags say nothing, so the tests below show nothing"


@pytest.mark.parametrize("length", [1, 100, 127, 128, 129, 511, 512, 513, 1000, 2345, 4000])
def test_padding_changes_nothing(tagger, length):
    alone_1T = noise(1, length)
    padded_BT = torch.cat([torch.nn.functional.pad(alone_1T, (0, 7000 - length)), noise(1, 7000)])
    tags_BL = tagger.tag(padded_BT, lengths=[length, 7000])
    torch.testing.assert_close(tags_BL[:1], tagger.tag(alone_1T), rtol=0, atol=1e-3)
    torch.testing.assert_close(tags_BL[1:], tagger.tag(noise(1, 7000)), rtol=0, atol=1e-3)


def test_samples_after_a_length_change_nothing(tagger):
    audio_BT = noise(1, 4000)
    tags_BL = tagger.tag(audio_BT, lengths=[2000])
    audio_BT[:, 2000:] = float("nan")
    assert torch.equal(tagger.tag(audio_BT, lengths=[2000]), tags_BL)


@pytest.mark.parametrize("gain", [1e-20, 1e-6, 0.25, 1e3, 1e15])
def test_a_gain_changes_nothing(tagger, gain):
    torch.testing.assert_close(tagger.tag(gain * noise(2, 4000)), tagger.tag(noise(2, 4000)), rtol=0, atol=1e-3)


@pytest.mark.parametrize("num_samples", [0, 1, 5000])
def test_silence_has_equal_tags(tagger, num_samples):
    tags_BL = tagger.tag(torch.zeros(2, num_samples))
    torch.testing.assert_close(tags_BL, torch.full((2, 3), 10 * np.log10(1 / 3)), rtol=0, atol=1e-4)
    assert margin_db(tags_BL, [0, 1], [[1, 2], [0]]).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_audio_that_is_not_finite_raises(tagger, value):
    audio_BT = noise(2, 100)
    audio_BT[1, 7] = value
    with pytest.raises(ValueError, match="NaN or infinite samples"):
        tagger.tag(audio_BT)


@pytest.mark.parametrize(
    ("shape", "lengths", "message"),
    [((10,), None, "must have shape"), ((2, 10), [10], "lengths must be one per row"), ((1, 10), [11], "0 to 10")],
)
def test_audio_of_another_shape_raises(tagger, shape, lengths, message):
    with pytest.raises(ValueError, match=message):
        tagger.tag(torch.zeros(shape), lengths=lengths)


def test_mel_powers_add_up_to_the_energy_of_a_frame(tagger):
    low_T, high_T = two_bands(8000)
    audio_BT = torch.from_numpy(np.stack([low_T, 0.9 * high_T]))
    power_BNF = torch.stft(audio_BT, 256, 128, window=torch.hann_window(256), pad_mode="constant", return_complex=True)
    ratio_B = tagger.network.powers(audio_BT).sum((1, 2)) / power_BNF.abs().square().sum((1, 2))
    assert (ratio_B - 1).abs().max() < 0.05
    assert mel_filters(TagNetworkConfig()).sum(1)[5:480].sub(1.0).abs().max() < 1e-5


@pytest.mark.parametrize("labels", [["one"], ["dog bark", "Dog_bark"]])
def test_labels_that_are_too_few_or_equal_raise(labels):
    with pytest.raises(ValueError, match="two or more different labels"):
        ShareTagger(TINY, labels)


@pytest.mark.parametrize("settings", [{"num_bands": 20}, {"channels": 0}, {"num_fft": 256.5}, {"sample_rate_hz": 0}])
def test_settings_that_cannot_work_raise(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))} must be .*; choose one such as"):
        TagNetworkConfig(**settings)


def test_a_saved_tagger_loads_bit_identical(tagger, tmp_path):
    save_tagger(tagger, tmp_path / "t", history=[{"steps": 3}])
    loaded = load_tagger(tmp_path / "t")
    assert loaded.labels == tagger.labels and loaded.config == TINY and not loaded.training
    assert loaded.fingerprint == tagger.fingerprint == read_tagger(tmp_path / "t")["fingerprint"]
    assert torch.equal(loaded.tag(noise(2, 3000)), tagger.tag(noise(2, 3000)))
    assert read_tagger(tmp_path / "t")["history"] == [{"steps": 3}]


def test_another_tagger_has_another_fingerprint(tagger):
    before = tagger.fingerprint
    tagger.network.outward.bias.data[0] += 1e-6
    assert tagger.fingerprint != before


def edit(folder, **changes):
    description = json.loads((folder / "tagger.json").read_text()) | changes
    (folder / "tagger.json").write_text(json.dumps(description))


def test_damaged_or_missing_weights_raise(tagger, tmp_path):
    save_tagger(tagger, tmp_path)
    weights = tmp_path / "weights.safetensors"
    data = weights.read_bytes()
    for content in (data[:-1] + bytes([data[-1] ^ 1]), data[:100], b""):
        weights.write_bytes(content)
        with pytest.raises(ValueError, match="must be the file that"):
            load_tagger(tmp_path)
    weights.unlink()
    with pytest.raises(ValueError, match="must be the file that"):
        load_tagger(tmp_path)


def test_weights_that_do_not_fit_raise_even_with_their_checksum(tagger, tmp_path):
    save_tagger(tagger, tmp_path)
    weights = tmp_path / "weights.safetensors"
    save_file({"network.extra": torch.zeros(1)}, weights)
    edit(tmp_path, weights_sha256=sha256_file(weights))
    with pytest.raises(ValueError, match=r"cannot load .*weights\.safetensors into a network"):
        load_tagger(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "x"}, "must have architecture .*, got 'x'"),
        ({"format": 2}, "tagger.json must have format 1, got 2"),
        ({"network": {"chanels": 16}}, r"there is no setting chanels; did you mean 'channels'\?"),
    ],
)
def test_a_description_of_something_else_raises(tagger, tmp_path, changes, message):
    save_tagger(tagger, tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        load_tagger(tmp_path)


def test_a_folder_without_a_tagger_raises(tmp_path):
    with pytest.raises(ValueError, match=r"there is no tagger in .* \(no tagger\.json\)"):
        load_tagger(tmp_path)
