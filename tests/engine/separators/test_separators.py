"""The built-in separator: level, length and padding, spellings of labels, and checkpoints."""

import json
import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from engine.errors import nearest
from engine.separators import (
    NetworkConfig,
    QuerySeparator,
    Separator,
    find_encoder,
    load,
    overlap_add,
    read_description,
    save,
)
from engine.separators.network import band_edges
from engine.separators.queries import AudioExample, Query
from engine.storage.files import sha256_file
from tests.support.signals import (
    RATE_HZ,
    TINY,
    BandSeparator,
    band_noise,
    mixture,
    snr_db,
    tiny_checkpoint,
    tiny_separator,
)

CHUNK_SAMPLES = 12 * RATE_HZ


@pytest.fixture(scope="module")
def separator():
    return tiny_separator(["dog_bark", "cat", "rain"])


def noise(*shape, seed=0):
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def failing_label(separator, query):
    with pytest.raises(ValueError) as caught:
        separator.separate(torch.zeros(1, 0), [query])
    return str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        NetworkConfig(),
        TINY,
        NetworkConfig(num_bands=1),
        NetworkConfig(num_bands=200),
        NetworkConfig(num_fft=64, hop_samples=32, num_bands=60),
        NetworkConfig(sample_rate_hz=48000, num_fft=2048, hop_samples=512),
    ],
)
def test_bands_cover_every_bin_in_order(config):
    num_bins = config.num_fft // 2 + 1
    edges = band_edges(config)
    assert len(edges) == config.num_bands
    assert all(0 <= first < end <= num_bins for first, end in edges)
    assert set().union(*(range(*edge) for edge in edges)) == set(range(num_bins))
    assert edges == sorted(edges)


@pytest.mark.parametrize("lengths", [[3000, 2000], [3000, 3000], [CHUNK_SAMPLES + 9000, CHUNK_SAMPLES - 7]])
def test_queries_of_one_mixture_have_the_stems_that_they_have_alone(lengths):
    separator, mix_MT = tiny_separator(), noise(2, lengths[0])
    mix_MT[1, lengths[1] :] = 0.0
    stems_BT = separator.separate(mix_MT, ["low", "high", "low"], lengths=lengths, rows=[1, 0, 0])
    for stem_T, row, query in zip(stems_BT, [1, 0, 0], ["low", "high", "low"], strict=True):
        alone_BT = separator.separate(mix_MT[row, : lengths[row]][None], [query])
        torch.testing.assert_close(stem_T[: alone_BT.shape[1]], alone_BT[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("rows", [[0], [0, 2], [0, -1]])
def test_rows_that_name_no_mixture_are_refused(rows):
    with pytest.raises(ValueError, match=r"rows must have for each of 2 queries the number of one of 2 mixtures, got"):
        tiny_separator().separate(noise(2, 100), ["low", "high"], rows=rows)


@pytest.mark.parametrize("lengths", [[4000, 1, 3999, 0, 2000, 65], [63, 64, 65]])
def test_a_padded_mixture_has_the_stem_that_it_has_alone(lengths):
    separator = tiny_separator()
    rows = [noise(num, seed=seed) for seed, num in enumerate(lengths)]
    queries = ["low" if i % 2 else "high" for i in range(len(rows))]
    padded_BT = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    stems_BT = separator.separate(padded_BT, queries, lengths=lengths)
    for stem_T, row_T, query in zip(stems_BT, rows, queries, strict=True):
        (alone_T,) = separator.separate(row_T[None], [query])
        torch.testing.assert_close(stem_T[: len(row_T)], alone_T, rtol=0, atol=1e-5)
        assert not stem_T[len(row_T) :].any()


@pytest.mark.parametrize("beyond_s", [-3.0, -0.5, 0.0, 0.5, 3.0])
def test_a_padded_mixture_about_as_long_as_a_chunk_has_the_stem_that_it_has_alone(beyond_s):
    """Chunks are 12 s and overlap by 1 s; the mixture ends at different points in them."""
    separator = tiny_separator()
    num_samples = CHUNK_SAMPLES + round(beyond_s * RATE_HZ)
    mix_BT = noise(1, num_samples)
    padded_BT = torch.nn.functional.pad(mix_BT, (0, 20 * RATE_HZ - num_samples))
    alone_BT = separator.separate(mix_BT, ["low"])
    stems_BT = separator.separate(padded_BT, ["low"], lengths=[num_samples])
    torch.testing.assert_close(stems_BT[:, :num_samples], alone_BT, rtol=0, atol=1e-5)


@pytest.mark.parametrize("gain", [1e-5, 0.25, -1.0, 3.0, 1000.0])
def test_a_louder_mixture_gives_the_same_stem_louder(gain):
    separator = tiny_separator()
    mix_BT = noise(1, 4000)
    expected_BT = gain * separator.separate(mix_BT, ["low"])
    assert snr_db(estimate=separator.separate(gain * mix_BT, ["low"]), reference=expected_BT) > 90


@pytest.mark.parametrize("num_samples", [0, 1, 2, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1000])
def test_any_short_length(num_samples):
    stems_BT = tiny_separator().separate(noise(2, num_samples), ["low", "high"])
    assert stems_BT.shape == (2, num_samples) and stems_BT.dtype == torch.float32
    assert torch.isfinite(stems_BT).all()


@pytest.mark.parametrize("num_samples", [CHUNK_SAMPLES, CHUNK_SAMPLES + 1, 40 * RATE_HZ])
def test_a_recording_longer_than_a_chunk(num_samples):
    """Noise has the same statistics in every chunk, so chunks change its stem little."""
    separator = tiny_separator()
    mix_BT = noise(1, num_samples)
    stem_BT = separator.separate(mix_BT, ["low"])
    with torch.inference_mode():
        whole_BT = separator(mix_BT, torch.tensor([0]), torch.zeros(1, 2))
    assert stem_BT.shape == whole_BT.shape
    assert snr_db(estimate=stem_BT, reference=whole_BT) > 25


def test_no_rows():
    assert tiny_separator().separate(torch.zeros(0, 100), []).shape == (0, 100)


def test_silence_gives_silence(separator):
    assert not separator.separate(torch.zeros(1, 3000), ["cat"]).any()


def test_a_stem_has_no_more_energy_than_its_mixture_in_any_bin():
    separator = tiny_separator()
    mix_BT = torch.from_numpy(mixture(4000))[None]
    with torch.no_grad():  # outweighs the small initial weights, so that the mask reaches its bounds
        for parameter in separator.parameters():
            parameter.mul_(3.0)
        power_BNF = torch.stft(mix_BT, 256, 64, window=torch.hann_window(256), return_complex=True).abs().square().mT
        mask_BNF = separator.network.mask(power_BNF, separator.encode(["low"]))
    assert mask_BNF.shape == power_BNF.shape
    assert not mask_BNF.is_complex() and mask_BNF.min() >= 0
    assert mask_BNF.max() <= 1 + 1e-6
    assert mask_BNF.max() > 0.9, "the bound was not tried"
    stem_BT = separator.separate(mix_BT, ["low"])
    assert stem_BT.square().sum() <= mix_BT.square().sum()


def test_the_query_decides_the_stem(separator):
    first_T, second_T = separator.separate(noise(1, 2000).expand(2, -1), ["cat", "rain"])
    assert not torch.allclose(first_T, second_T, atol=1e-4)


@pytest.mark.parametrize(
    "query", ["dog_bark", "dog bark", "The sound of dog bark", "the sound of dog_bark", "Dog Bark", " dog bark "]
)
def test_spellings_of_one_query(separator, query):
    mix_BT = noise(1, 1000)
    assert torch.equal(separator.separate(mix_BT, [query]), separator.separate(mix_BT, ["dog_bark"]))


@pytest.mark.parametrize("query", ["dog brk", "dogbark", "The sound of dog brk", "DOG BRK"])
def test_an_unknown_label_names_the_nearest(separator, query):
    message = failing_label(separator, query)
    assert f"there is no label {query!r} in the separator; did you mean 'dog_bark'?" in message


def test_an_unknown_label_without_a_near_one_lists_the_known_labels(separator):
    assert failing_label(separator, "xylophone").endswith("known: cat, dog_bark, rain")
    assert nearest("zzz", [f"label {i:02d}" for i in range(33)]).endswith("label 29 and 3 more")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_mixture_that_is_not_finite_raises(separator, value):
    mix_BT = noise(2, 100)
    mix_BT[1, 7] = value
    with pytest.raises(ValueError, match="NaN or infinite samples"):
        separator.separate(mix_BT, ["cat", "rain"])


@pytest.mark.parametrize(("shape", "queries"), [((2, 10), ["cat"]), ((10,), ["cat"]), ((1, 1, 10), ["cat"])])
def test_mixtures_and_queries_that_do_not_agree_raise(separator, shape, queries):
    with pytest.raises(ValueError, match="must have shape \\[B, T\\] for B queries"):
        separator.separate(torch.zeros(shape), queries)


def test_growing_leaves_old_stems_bit_identical():
    separator, mix_BT = tiny_separator(["dog", "cat"]), noise(2, 3000)
    before_BT = separator.separate(mix_BT, ["dog", "cat"])
    separator.queries.grow(["bird", "cat", "bird", "rain"])
    assert separator.labels == ("dog", "cat", "bird", "rain")
    assert torch.equal(separator.separate(mix_BT, ["dog", "cat"]), before_BT)
    assert separator.separate(mix_BT, ["rain", "The sound of bird"]).shape == mix_BT.shape
    separator.queries.grow(["cat", "dog"])
    assert separator.labels == ("dog", "cat", "bird", "rain")


def knowing_rivals(labels=("low", "high", "hum")):
    separator = tiny_separator(list(labels))
    torch.manual_seed(1)
    separator.queries.rivals_LQ.data.normal_()
    return separator


def test_rivals_change_the_stem_of_a_separator_that_learned_with_them():
    mix_BT, query = noise(1, 3000), Query("low", unwanted=["HIGH", "The sound of hum"])
    new, trained = tiny_separator(["low", "high", "hum"]), knowing_rivals()
    assert not new.uses_unwanted and torch.equal(new.separate(mix_BT, [query]), new.separate(mix_BT, ["low"]))
    assert trained.uses_unwanted
    stems = [trained.separate(mix_BT, [one])[0] for one in ("low", Query("low", unwanted="high"), query)]
    pairs = zip(stems, [*stems[1:], stems[0]], strict=True)
    assert all(snr_db(estimate=one[None], reference=other[None]) < 40 for one, other in pairs)
    together = trained.separate(mix_BT, ["high", query], rows=[0, 0], lengths=[3000])
    torch.testing.assert_close(together[1], stems[2])


def test_a_rival_must_be_a_label_too():
    with pytest.raises(ValueError, match="there is no label 'rain'"):
        knowing_rivals().separate(noise(1, 100), [Query("low", unwanted="rain")])
    example = AudioExample(samples_T=np.zeros(9), sample_rate_hz=8000)
    with pytest.raises(ValueError, match="must be one label, got 'an audio example'"):
        knowing_rivals().separate(noise(1, 100), [Query("low", unwanted=example)])


def test_rivals_of_new_labels_change_nothing_before_they_are_learned():
    separator, mix_BT = knowing_rivals(), noise(1, 3000)
    before_BT = separator.separate(mix_BT, [Query("low", unwanted="high")])
    separator.queries.grow(["rain"])
    assert torch.equal(separator.separate(mix_BT, [Query("low", unwanted=["high", "rain"])]), before_BT)


def test_a_folder_from_before_rivals_loads_and_separates_the_same(tmp_path):
    separator, mix_BT = tiny_separator(), noise(1, 3000)
    before_BT = separator.separate(mix_BT, ["low"])
    del separator.queries.rivals_LQ
    save(separator, tmp_path)
    old = load(tmp_path)
    assert not old.uses_unwanted and torch.equal(old.separate(mix_BT, ["low"]), before_BT)
    save(old, tmp_path / "new")
    assert load(tmp_path / "new").queries.rivals_LQ.shape == old.queries.vectors_LQ.shape


def test_growing_by_another_spelling_raises_and_changes_nothing():
    separator = tiny_separator(["dog_bark", "cat"])
    with pytest.raises(ValueError, match="must differ in more than case and underscores"):
        separator.queries.grow(["rain", "Dog bark"])
    assert separator.labels == ("dog_bark", "cat")
    assert "known: cat, dog_bark" in failing_label(separator, "rain")


def test_a_separator_without_labels_raises():
    with pytest.raises(ValueError, match="at least one label, got none"):
        tiny_separator([])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"mask": "complex"}, "there is no setting mask"),
        ({"channels": 20}, "channels must be a multiple of 8, got 20; choose one such as 256"),
        ({"num_blocks": 0}, "num_blocks must be at least 1, got 0"),
        ({"num_blocks": True}, "num_blocks must be a number, got true"),
        ({"num_bands": 2.5}, "num_bands must be a whole number, got 2.5"),
        ({"hop_samples": 100}, "hop_samples must divide num_fft 1024 at least twice, got 100; choose one such as 256"),
        ({"hop_samples": 1024}, "at least twice, got 1024"),
    ],
)
def test_settings_that_cannot_work_raise(setting, message):
    with pytest.raises(ValueError, match=message):
        NetworkConfig(**setting)


def test_the_protocol_distinguishes_separators_from_other_objects(separator):
    assert isinstance(separator, Separator)
    assert isinstance(BandSeparator(), Separator)
    assert not isinstance(torch.nn.Linear(2, 2), Separator)


@pytest.mark.parametrize(("chunk", "overlap"), [(10, 1), (10, 3), (10, 5), (100, 10)])
@pytest.mark.parametrize("num_samples", [1, 6, 9, 10, 11, 17, 18, 95, 100, 101, 250])
def test_overlap_add_of_an_identity_is_the_mixture(num_samples, chunk, overlap):
    mix_BT = noise(2, num_samples)
    stems_BT = overlap_add(
        lambda chunk_BT, _: chunk_BT.clone(),
        mix_BT,
        [num_samples, num_samples],
        range(2),
        chunk_samples=chunk,
        overlap_samples=overlap,
    )
    torch.testing.assert_close(stems_BT, mix_BT, rtol=0, atol=1e-6)


def test_overlap_add_without_overlap_joins_the_chunks():
    mix_BT = noise(1, 25)
    stems_BT = overlap_add(
        lambda chunk_BT, _: 2.0 * chunk_BT, mix_BT, [25], range(1), chunk_samples=10, overlap_samples=0
    )
    assert torch.equal(stems_BT, 2.0 * mix_BT)


def test_overlap_add_does_not_change_the_mixture():
    """A separator may return its input, for example for a clip with one label."""
    mix_BT = noise(1, 100)
    before_BT = mix_BT.clone()
    stems_BT = overlap_add(lambda chunk_BT, _: chunk_BT, mix_BT, [100], range(1), chunk_samples=30, overlap_samples=10)
    assert torch.equal(mix_BT, before_BT)
    torch.testing.assert_close(stems_BT, before_BT, rtol=0, atol=1e-6)


def test_overlap_add_gives_the_length_of_each_row_inside_a_chunk():
    seen = []

    def record(chunk_BT, inside):
        seen.append((chunk_BT.shape[1], inside))
        return torch.zeros_like(chunk_BT)

    overlap_add(record, torch.zeros(3, 25), [25, 12, 3], range(3), chunk_samples=10, overlap_samples=2)
    assert seen == [(10, [10, 10, 3]), (10, [10, 4, 0]), (9, [9, 0, 0])]


def test_overlap_add_fades_linearly_from_chunk_to_chunk():
    gains = iter([1.0, 2.0, 3.0])
    stems_BT = overlap_add(
        lambda chunk_BT, _: chunk_BT * next(gains),
        torch.ones(1, 28),
        [28],
        range(1),
        chunk_samples=12,
        overlap_samples=4,
    )
    first, second = [1.2, 1.4, 1.6, 1.8], [2.2, 2.4, 2.6, 2.8]
    assert stems_BT[0].tolist() == pytest.approx([1.0] * 8 + first + [2.0] * 4 + second + [3.0] * 8, abs=1e-6)


def test_overlap_add_of_a_filter_is_near_the_filtered_whole():
    """A filter of 33 taps misses its past at a chunk's border, where the fade has hardly begun."""
    mix_BT = torch.from_numpy(band_noise(20 * 1000, low_hz=50.0, high_hz=3500.0, seed=3))[None]
    taps = torch.hann_window(33)[None, None] / 16.0

    def smooth(chunk_BT, _):
        return torch.nn.functional.conv1d(chunk_BT[:, None], taps, padding=16)[:, 0]

    whole_BT = smooth(mix_BT, None)
    stems_BT = overlap_add(smooth, mix_BT, [20000], range(1), chunk_samples=3000, overlap_samples=500)
    assert snr_db(estimate=stems_BT, reference=whole_BT) > 40
    assert stems_BT.diff().abs().max() < 1.1 * whole_BT.diff().abs().max()


def edit(folder, **changes):
    description = json.loads((folder / "separator.json").read_text()) | changes
    (folder / "separator.json").write_text(json.dumps(description))


def test_a_saved_separator_loads_bit_identical(tmp_path):
    separator, mix_BT = tiny_separator(["dog_bark", "cat"]), noise(2, 2000)
    separator.queries.grow(["rain"])
    save(separator, tmp_path / "s")
    loaded = load(tmp_path / "s")
    assert loaded.labels == ("dog_bark", "cat", "rain") and loaded.config == TINY
    assert loaded.sample_rate_hz == RATE_HZ and not loaded.training
    queries = ["rain", "dog bark"]
    assert torch.equal(loaded.separate(mix_BT, queries), separator.separate(mix_BT, queries))


def test_equal_separators_have_equal_fingerprints_and_others_do_not(tmp_path):
    tiny_checkpoint(tmp_path / "a"), tiny_checkpoint(tmp_path / "b"), tiny_checkpoint(tmp_path / "c", ["low", "mid"])
    separator = tiny_separator()
    separator.network.outward.bias.data[0] += 1e-6
    save(separator, tmp_path / "d")
    prints = [read_description(tmp_path / name)["fingerprint"] for name in "abcd"]
    assert prints[0] == prints[1] and len(set(prints)) == 3


def test_history_survives_and_does_not_change_the_fingerprint(tmp_path):
    history = [{"steps": 100, "curve": [{"sdri_db": 1.5}]}, {"steps": 200}]
    tiny_checkpoint(tmp_path / "plain")
    save(load(tmp_path / "plain"), tmp_path / "s", history=history)
    description = read_description(tmp_path / "s")
    assert description["history"] == history
    assert description["fingerprint"] == read_description(tmp_path / "plain")["fingerprint"]


def test_saving_again_replaces_the_separator(tmp_path):
    tiny_checkpoint(tmp_path, ["low", "high"])
    tiny_checkpoint(tmp_path, ["dog"])
    assert load(tmp_path).labels == ("dog",)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["separator.json", "weights.safetensors"]


def test_the_weights_are_plain_safetensors(tmp_path):
    separator = tiny_separator()
    save(separator, tmp_path)
    with safe_open(tmp_path / "weights.safetensors", framework="numpy") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}
    expected = {name: value.numpy() for name, value in separator.state_dict().items()}
    assert stored.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(stored[name], value)


class _Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("dump", [pickle.dumps, None], ids=["pickle", "torch.save"])
def test_loading_never_unpickles(tmp_path, dump):
    """A pickle that runs code when it is read, with the checksum that goes with it."""
    folder, weights = tiny_checkpoint(tmp_path / "s"), tmp_path / "s" / "weights.safetensors"
    payload = {"network.inward.bias": _Payload(str(tmp_path / "executed"))}
    if dump is None:
        torch.save(payload, weights)
    else:
        weights.write_bytes(dump(payload))
    edit(folder, weights_sha256=sha256_file(weights))
    with pytest.raises(ValueError, match=r"cannot load .*weights\.safetensors into a network"):
        load(folder)
    assert not (tmp_path / "executed").exists()
    pickle.loads(pickle.dumps(payload))
    assert (tmp_path / "executed").exists(), "the payload is harmless, so this test would have shown nothing"


def test_a_missing_folder_raises(tmp_path):
    with pytest.raises(ValueError, match=r"no separator in .*nowhere \(no separator\.json\)"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "resunet"}, "must have architecture 'band_split_tcn', got 'resunet'"),
        ({"format": 2}, "separator.json must have format 1, got 2"),
        ({"network": {"chanels": 16}}, "there is no setting chanels; did you mean 'channels'?"),
        ({"network": {"channels": 20}}, "channels must be a multiple of 8, got 20"),
    ],
)
def test_a_description_of_something_else_raises(tmp_path, changes, message):
    folder = tiny_checkpoint(tmp_path)
    edit(folder, **changes)
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        load(folder)


@pytest.mark.parametrize("content", ["[]", "{}", "null", '{"format": 1'])
def test_a_file_that_is_no_description_raises(tmp_path, content):
    folder = tiny_checkpoint(tmp_path)
    (folder / "separator.json").write_text(content)
    with pytest.raises(ValueError, match=r"separator\.json"):
        load(folder)


def test_missing_truncated_or_exchanged_weights_raise(tmp_path):
    folder, other = tiny_checkpoint(tmp_path / "s"), tiny_checkpoint(tmp_path / "o", ["dog", "cat", "rain"])
    weights = folder / "weights.safetensors"
    data = weights.read_bytes()
    flipped = data[:-1] + bytes([data[-1] ^ 1])
    for content in (data[: len(data) // 2], b"", flipped, (other / "weights.safetensors").read_bytes()):
        weights.write_bytes(content)
        with pytest.raises(ValueError, match=r"must be the file that separator\.json describes"):
            load(folder)
    weights.unlink()
    with pytest.raises(ValueError, match=r"must be the file that separator\.json describes"):
        load(folder)
    weights.write_bytes(data)
    assert load(folder).labels == ("low", "high")


@pytest.mark.parametrize("kind", ["truncated", "another size", "a missing weight", "a weight too many"])
def test_weights_that_do_not_fit_raise_even_with_their_checksum(tmp_path, kind):
    folder, weights = tiny_checkpoint(tmp_path), tmp_path / "weights.safetensors"
    tensors = {name: value.contiguous() for name, value in tiny_separator().state_dict().items()}
    if kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    else:
        if kind == "another size":
            tensors = QuerySeparator(replace(TINY, channels=24), ["low", "high"]).state_dict()
        elif kind == "a missing weight":
            tensors.pop("network.inward.bias")
        else:
            tensors["network.extra"] = torch.zeros(1)
        save_file(tensors, weights)
    edit(folder, weights_sha256=sha256_file(weights))
    with pytest.raises(ValueError, match=r"cannot load .*weights\.safetensors into a network"):
        load(folder)


def test_a_file_and_a_folder_without_an_encoder_are_named(tmp_path):
    (tmp_path / "released.ckpt").write_bytes(b"weights")
    with pytest.raises(ValueError, match=r"released.ckpt as a separator \(it is a file\).*`clearsep convert`"):
        load(tmp_path / "released.ckpt")
    with pytest.raises(ValueError, match=r"there is no encoder in .*neither clap.json nor separator.json"):
        find_encoder(tmp_path)
