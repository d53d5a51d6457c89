"""AudioSep: equal to its formula, from the original layout, for any length and batch."""

import numpy as np
import pytest
import torch

from engine.separators import Query, open_checkpoint, read_description, save
from engine.separators.audiosep import AudioSep, AudioSepConfig, from_original, recognises
from engine.separators.audiosep import network as network_module
from engine.separators.queries import Embeddings, QueryEmbedder
from tests.support.models.layouts import AUDIOSEP_FEATURES, audiosep_tensors
from tests.support.signals import snr_db

SIZE, HOP = 128, 20
LABELS = ("dog bark", "rain")


def formula(
    tensors, mix_T, query_Q, *, wave="reflect", late=True, pool="mean", slope=0.01, turn=True, last_bin=0.0, last=1.0
):
    """The stem of a mixture in float64, written down from the published description; the options are mistakes."""
    named = {name: tensor.double().numpy() for name, tensor in tensors.items()}
    query_Q = np.asarray(query_Q, np.float64)

    def norm(name):
        weight, bias, mean, variance = (
            named[f"base.{name}.{key}"] for key in ("weight", "bias", "running_mean", "running_var")
        )
        return lambda x: (x - mean) / np.sqrt(variance + 1e-5) * weight + bias

    def active(name, x_CNF):
        film = "film." + name.replace(".", "->").replace("bn", "beta")
        shift_C = named[f"{film}.weight"] @ query_Q + named[f"{film}.bias"]
        shift_C = shift_C * (last if film.endswith("decoder_block6->conv_block2->beta2") else 1.0)
        x_NFC = norm(name)(np.moveaxis(x_CNF, 0, -1)) + shift_C
        return np.moveaxis(np.where(x_NFC > 0, x_NFC, slope * x_NFC), -1, 0)

    def conv(name, x_CNF):
        kernel, (_, frames, bins) = named[f"base.{name}.weight"], x_CNF.shape
        edge = kernel.shape[2] // 2
        padded = np.pad(x_CNF, ((0, 0), (edge, edge), (edge, edge)))
        out = sum(
            np.einsum("oc,cnf->onf", kernel[:, :, i, j], padded[:, i : i + frames, j : j + bins])
            for i in range(kernel.shape[2])
            for j in range(kernel.shape[3])
        )
        return out + named.get(f"base.{name}.bias", np.zeros(len(kernel)))[:, None, None]

    def block(name, x_CNF):
        y_CNF = conv(f"{name}.conv1", active(f"{name}.bn1", x_CNF))
        y_CNF = conv(f"{name}.conv2", active(f"{name}.bn2", y_CNF))
        return y_CNF + (conv(f"{name}.shortcut", x_CNF) if f"base.{name}.shortcut.weight" in named else x_CNF)

    def halved(x_CNF, frames):
        channels, num_frames, bins = x_CNF.shape
        parts = x_CNF.reshape(channels, num_frames // frames, frames, bins // 2, 2)
        return parts.mean((2, 4)) if pool == "mean" else parts.max((2, 4))

    def doubled(name, x_CNF):
        kernel = named[f"base.{name}.weight"]
        cells = np.einsum("cnf,coij->onifj", x_CNF, kernel)
        return cells.reshape(kernel.shape[1], x_CNF.shape[1] * kernel.shape[2], -1)

    window_T = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(SIZE) / SIZE)
    padded_T = np.pad(np.asarray(mix_T, np.float64), SIZE // 2, mode=wave)
    num_frames = len(mix_T) // HOP + 1
    spectrum_NF = np.stack([np.fft.rfft(window_T * padded_T[n * HOP :][:SIZE]) for n in range(num_frames)])
    magnitude_NF = np.sqrt(np.maximum(np.abs(spectrum_NF) ** 2, 1e-10))
    more = ((0, -num_frames % 32), (0, 0))
    x_NF = np.pad(norm("bn0")(magnitude_NF), more) if late else norm("bn0")(np.pad(magnitude_NF, more))
    x_CNF = conv("pre_conv", x_NF[None, :, : SIZE // 2])
    skips = []
    for k in range(1, 7):
        skips.append(block(f"encoder_block{k}.conv_block1", x_CNF))
        x_CNF = halved(skips[-1], 2 if k < 6 else 1)
    x_CNF = block("conv_block7a.conv_block1", x_CNF)
    for k in range(1, 7):
        x_CNF = doubled(f"decoder_block{k}.conv1", active(f"decoder_block{k}.bn1", x_CNF))
        x_CNF = block(f"decoder_block{k}.conv_block2", np.concatenate([x_CNF, skips.pop()]))
    m_NF, r_NF, i_NF = conv("after_conv", x_CNF)[:, :num_frames]
    phase_NF = np.arctan2(np.tanh(i_NF), np.tanh(r_NF)) if turn else 0.0
    mask_NF = np.pad(np.exp(1j * phase_NF) / (1 + np.exp(-m_NF)), ((0, 0), (0, 1)), constant_values=last_bin)
    out_T, weight_T = np.zeros(len(padded_T)), np.zeros(len(padded_T))
    for n, frame_T in enumerate(np.fft.irfft(spectrum_NF * mask_NF, SIZE)):
        out_T[n * HOP :][:SIZE] += window_T * frame_T
        weight_T[n * HOP :][:SIZE] += window_T**2
    return (out_T / np.maximum(weight_T, 1e-11))[SIZE // 2 :][: len(mix_T)]


@pytest.fixture(scope="module")
def tensors():
    return audiosep_tensors(prefix="")


@pytest.fixture(scope="module")
def separator(tensors):
    separator = from_original(tensors)
    separator.embedder = embedder()
    return separator


def embedder(features=AUDIOSEP_FEATURES, labels=LABELS):
    vectors_LE = torch.randn(len(labels), features, generator=torch.Generator().manual_seed(1))
    vectors_LE = torch.nn.functional.normalize(vectors_LE)
    embeddings = Embeddings(labels=labels, vectors_LE=vectors_LE, encoder="e")
    return QueryEmbedder(template="{label}", encoder="e", open_encoder=no_encoder, embeddings=embeddings)


def no_encoder():
    raise ValueError("there is no encoder; give labels of the table")


def noise(num_samples, seed=0):
    return 0.1 * torch.randn(num_samples, generator=torch.Generator().manual_seed(seed))


def query_of(separator, label="dog bark"):
    return separator.embedder.wanted(label).numpy()


def with_mask(*logits):
    """A separator whose mask is the same for every bin."""
    separator = AudioSep(AudioSepConfig(num_fft=SIZE, hop_samples=HOP, query_features=AUDIOSEP_FEATURES, **narrow()))
    separator.embedder = embedder()
    with torch.no_grad():
        separator.network.outward.weight.zero_()
        separator.network.outward.bias.copy_(torch.tensor(logits))
    return separator.eval()


def narrow():
    return {f"width_{level}": 2 for level in range(7)} | {"sample_rate_hz": 2000}


@pytest.mark.parametrize("num_samples", [32 * HOP - 1, 32 * HOP, 1999, 4001])
def test_a_stem_is_that_of_the_formula(separator, tensors, num_samples):
    """Frames that need padding and frames that need none, in one strip and in several."""
    mix_T = noise(num_samples)
    (stem_T,) = separator.separate(mix_T[None], ["dog bark"])
    assert snr_db(estimate=stem_T, reference=formula(tensors, mix_T, query_of(separator))) > 100


@pytest.mark.parametrize(
    "mistake",
    [
        {"wave": "constant"},
        {"late": False},
        {"pool": "max"},
        {"slope": 0.02},
        {"turn": False},
        {"last_bin": 0.5},
        {"last": 0.0},
    ],
    ids=lambda mistake: next(iter(mistake)),
)
def test_the_formula_would_show_a_mistake(separator, tensors, mistake):
    mix_T = noise(1999)
    (stem_T,) = separator.separate(mix_T[None], ["dog bark"])
    assert snr_db(estimate=stem_T, reference=formula(tensors, mix_T, query_of(separator), **mistake)) < 30


@pytest.mark.parametrize(
    ("logits", "gain"), [((30.0, 30.0, 0.0), 1.0), ((0.0, 30.0, 0.0), 0.5), ((30.0, -0.1, 0.0), -1.0)]
)
def test_a_constant_mask_is_a_gain_and_the_last_bin_is_silent(logits, gain):
    separator, time_T = with_mask(*logits), torch.arange(3000)
    inside_T, nyquist_T = torch.sin(0.3 * time_T), (-1.0) ** time_T
    stems_BT = separator.separate(torch.stack([inside_T, nyquist_T]), LABELS)
    assert snr_db(estimate=stems_BT[0, 200:-200], reference=gain * inside_T[200:-200]) > 100
    analysed_F = torch.fft.rfft(torch.hann_window(SIZE) * stems_BT[1, 1000 : 1000 + SIZE]).abs()
    assert analysed_F[-1] < 0.4 * torch.hann_window(SIZE).sum(), "a third is in the bin next to it"


def test_strips_give_the_stem_of_all_frames_at_once(separator, monkeypatch):
    mix_BT = noise(9000)[None]
    in_strips = separator.separate(mix_BT, ["rain"])
    monkeypatch.setattr(network_module, "_STRIP", 1 << 20)
    assert snr_db(estimate=in_strips, reference=separator.separate(mix_BT, ["rain"])) > 110  # 32 bits


def test_chunks_begin_where_the_network_halves_time():
    config = AudioSepConfig()
    step_s = AudioSep.chunk_s - AudioSep.overlap_s
    assert round(step_s * config.sample_rate_hz) % (32 * config.hop_samples) == 0


@pytest.mark.parametrize("kind", ["tones", "noise"])
def test_joins_show_no_step(kind):
    """A mask that passes everything returns the sound, in level and phase, across three chunks."""
    separator, time_T = with_mask(30.0, 30.0, 0.0), torch.arange(50_000)
    mix_T = torch.sin(0.1 * time_T) + torch.sin(0.73 * time_T)
    if kind == "noise":
        spectrum_F = torch.fft.rfft(noise(50_000))
        spectrum_F[22_000:] = 0  # nothing near the last bin
        mix_T = torch.fft.irfft(spectrum_F, 50_000)
    (stem_T,) = separator.separate(mix_T[None], ["rain"])
    assert separator.chunk_s * separator.sample_rate_hz < 25_000
    assert snr_db(estimate=stem_T[200:-200], reference=mix_T[200:-200]) > 80


def test_a_long_stem_is_nearly_that_of_one_piece(tensors):
    """Chunks begin on the network's own grid, every 32 frames; chunks one frame off it give other stems."""
    separator, mix_BT = from_original(tensors), noise(9000)[None]
    separator.embedder = embedder()
    whole_BT = separator.separate(mix_BT, ["rain"])
    step_s = 4 * 32 * HOP / separator.sample_rate_hz
    separator.chunk_s, separator.overlap_s = 2 * step_s, step_s
    stems_BT = separator.separate(mix_BT, ["rain"])
    assert snr_db(estimate=stems_BT, reference=whole_BT) > 25
    separator.overlap_s += HOP / separator.sample_rate_hz
    assert snr_db(estimate=separator.separate(mix_BT, ["rain"]), reference=whole_BT) < 10, "the grid does not matter"


@pytest.mark.parametrize("num_samples", [1, 2, 63, 64, 65, 127, 128, 129, 1000])
def test_short_mixtures_have_stems(separator, num_samples):
    stems_BT = separator.separate(torch.stack([noise(num_samples), noise(num_samples, 1)]), LABELS)
    assert stems_BT.shape == (2, num_samples) and stems_BT.dtype == torch.float32
    assert torch.isfinite(stems_BT).all() and stems_BT.abs().max() > 0


def test_rows_of_different_lengths_have_the_stems_that_they_have_alone(separator):
    lengths = [4000, 0, 2500, 4000, 1, 2500]
    rows = [noise(length, seed) for seed, length in enumerate(lengths)]
    queries = [LABELS[row % 2] for row in range(6)]
    padded_BT = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    stems_BT = separator.separate(padded_BT, queries, lengths=lengths)
    for stem_T, row_T, query in zip(stems_BT, rows, queries, strict=True):
        (alone_T,) = separator.separate(row_T[None], [query])
        torch.testing.assert_close(stem_T[: len(row_T)], alone_T, rtol=0, atol=1e-6)
        assert not stem_T[len(row_T) :].any()
    assert separator.separate(torch.zeros(0, 100), []).shape == (0, 100)


def test_silence_stays_silent_and_a_loud_mixture_is_finite(separator):
    assert not separator.separate(torch.zeros(1, 3000), ["rain"]).any()
    assert torch.isfinite(separator.separate(1e30 * noise(3000)[None], ["rain"])).all()


def test_16_bit_arithmetic_changes_the_stem_little(separator):
    mix_BT = noise(3000)[None]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stem_BT = separator.separate(mix_BT, ["rain"])
    assert stem_BT.dtype == torch.float32
    assert 15 < snr_db(estimate=stem_BT, reference=separator.separate(mix_BT, ["rain"])) < 70


def test_queries_are_embedded_and_excluded_sounds_are_ignored(separator):
    query_BQ = separator.encode(["Dog_bark", Query("dog bark", unwanted="rain"), Query(["dog bark", "rain"])])
    torch.testing.assert_close(query_BQ[0], query_BQ[1])
    both_Q = torch.nn.functional.normalize(query_BQ[0] + separator.encode(["rain"])[0], dim=0)
    torch.testing.assert_close(query_BQ[2], both_Q)
    assert separator.labels == LABELS


def test_a_separator_without_its_encoder_cannot_read_queries(tensors):
    separator = from_original(tensors)
    with pytest.raises(ValueError, match="must have a text encoder, got none; convert its checkpoint"):
        separator.separate(torch.zeros(1, 100), ["rain"])
    separator.embedder = embedder(features=8)
    with pytest.raises(ValueError, match=f"must have {AUDIOSEP_FEATURES} features, got 8"):
        separator.separate(torch.zeros(1, 100), ["rain"])


def test_the_default_network_has_the_parameters_of_the_published_one():
    """26,447,941 are published; 824,000 of them serve nothing, and 8,256 are summed with others here."""
    with torch.device("meta"):
        separator = AudioSep(AudioSepConfig())
    assert separator.sample_rate_hz == 32000
    assert sum(value.numel() for value in separator.parameters()) == 26_447_941 - 824_000 - 8_256


def test_lightning_and_flat_files_give_one_separator(separator):
    lightning = audiosep_tensors() | {"query_encoder.model.text_branch.pooler.dense.bias": torch.zeros(3)}
    flat = {name: value for name, value in audiosep_tensors(prefix="").items() if "stft" not in name}
    flat = {name: value for name, value in flat.items() if "num_batches" not in name}
    for tensors in (lightning, flat):
        assert recognises(tensors)
        other = from_original(tensors)
        assert other.config == separator.config
        for name, value in separator.state_dict().items():
            assert torch.equal(other.state_dict()[name], value), name
    assert not recognises(["query_encoder.model.text_branch.pooler.dense.bias"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"ss_model.base.encoder_block2.conv_block1.bn1.bias": None},
            "1 missing .*encoder_block2.conv_block1.bn1.bias",
        ),
        ({"ss_model.base.decoder_block3.bn2.weight": None}, "1 missing .*decoder_block3.bn2.weight"),
        ({"ss_model.film.decoder_block6->beta2.bias": None}, "1 missing .*decoder_block6->beta2.bias"),
        ({"ss_model.base.extra": torch.zeros(1)}, "1 surplus .*ss_model.base.extra"),
        ({"optimizer.state": torch.zeros(1)}, "1 surplus .*optimizer.state"),
        (
            {"ss_model.base.after_conv.weight": torch.zeros(3, 3)},
            "1 of another shape .*after_conv.weight 3x3, not 3x3x1x1",
        ),
        ({"ss_model.base.pre_conv.weight": torch.tensor(0.0)}, "of another shape"),
        ({"ss_model.base.bn0.weight": torch.zeros(50)}, "num_fft must be a multiple of 128, got 98"),
    ],
)
def test_a_file_that_does_not_fit_is_an_error_that_lists_its_tensors(change, message):
    tensors = {name: value for name, value in (audiosep_tensors() | change).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        from_original(tensors)


def test_a_step_longer_than_half_a_window_raises():
    with pytest.raises(
        ValueError, match="hop_samples must be at most half of num_fft 128, got 320; choose one such as 20"
    ):
        AudioSepConfig(num_fft=128)


def test_a_folder_gives_the_separator_back(tmp_path, separator):
    about = {"licence": "MIT", "source": "AudioSep", "source_sha256": "0" * 64}
    save(separator, tmp_path, about=about)
    description = read_description(tmp_path)
    assert (description["architecture"], description["sample_rate_hz"], description["labels"]) == (
        "audiosep",
        32000,
        [],
    )
    assert description["licence"] == "MIT"
    opened = open_checkpoint(tmp_path)
    opened.embedder = embedder()
    mix_BT = noise(3000)[None]
    assert torch.equal(opened.separate(mix_BT, ["rain"]), separator.separate(mix_BT, ["rain"]))
