"""CLAPSep: the same as plain formulas on small weights in its authors' layout, any length, two-sided queries."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from engine.separators import AudioExample, Query, find_separator, open_checkpoint, read_description, save
from engine.separators.clap.htsat import Htsat, HtsatConfig, power_spectrum
from engine.separators.clapsep import ClapSep, from_original, recognises
from engine.separators.queries import QueryEmbedder
from tests.engine.separators import clapsep_formulas
from tests.support.models.clapsep import DEPTHS, HEADS, full_clapsep, tiny_clapsep, write_tiny_clapsep
from tests.support.signals import snr_db

RATE_HZ = 32000
SLIM, CLAP = tiny_clapsep(query_features=8)


class Encoder:
    """Words to vectors, counted from the letters."""

    def embed_text(self, texts):
        vectors = [torch.tensor([len(text) % 5 - 2.0, text.count("a"), text.count("o"), 1.0]) for text in texts]
        return torch.nn.functional.normalize(torch.stack(vectors), dim=-1)

    def embed_audio(self, samples_T, *, sample_rate_hz):
        return torch.tensor([0.0, 0.0, 0.6, 0.8])


def embedder(encoder=Encoder):
    return QueryEmbedder(template="The sound of {label}", encoder="letters", open_encoder=encoder)


@pytest.fixture(scope="module")
def separator():
    made = from_original(SLIM, CLAP)
    made.embedder = embedder()
    return made


def noise(num_samples, *, seed=0):
    return 0.1 * torch.randn(num_samples, generator=torch.Generator().manual_seed(seed))


def vector(*numbers):
    return torch.nn.functional.normalize(torch.tensor(numbers, dtype=torch.float32), dim=0)


BOTH, WANTED, UNWANTED = (
    vector(3, -1, 2, 1, -2, 1, 1, 2),
    vector(3, -1, 2, 1, 0, 0, 0, 0),
    vector(0, 0, 0, 0, 3, -1, 2, 1),
)


@torch.inference_mode()
def chunk(separator, mix_T, query_Q):
    return separator.separate_chunk(mix_T[None], query_Q[None], [len(mix_T)], [0])[0]


@pytest.mark.parametrize("query_Q", [BOTH, WANTED], ids=["both sides", "zeros for unwanted"])
def test_stems_are_those_of_plain_formulas(separator, query_Q):
    mix_T, full = noise(1501), full_clapsep(SLIM, CLAP)
    mix_T[400:600] = 0.0
    expected_T = clapsep_formulas.stem(
        full, mix_T.double().numpy(), query_Q.double().numpy(), depths=DEPTHS, heads=HEADS
    )
    assert snr_db(estimate=chunk(separator, mix_T, query_Q), reference=expected_T) > 110
    assert 0.05 < np.std(expected_T) / 0.1 < 0.95


def test_the_embedding_for_clap_is_the_mean_of_the_last_map():
    tensors = {name.removeprefix("module.audio_branch."): value for name, value in CLAP.items()}
    encoder = Htsat(HtsatConfig(channels=8, heads=2, depth_3=2)).eval()
    encoder.load_state_dict({name: tensors[name] for name in encoder.state_dict()})
    net = clapsep_formulas.Net(
        {f"audio_branch.{name}": value.double().numpy() for name, value in tensors.items()}, HEADS
    )
    wave_T = noise(480 * 1024 - 1)
    last_HWC = net.maps(net.picture(wave_T.double().numpy()), DEPTHS)[-1]
    expected_C = net.norm("audio_branch.norm", last_HWC).mean((0, 1))
    with torch.inference_mode():
        embedding_BC = encoder(power_spectrum(wave_T[None]))
    assert snr_db(estimate=embedding_BC[0], reference=expected_C) > 100


@torch.inference_mode()
def test_fewer_frames_are_stretched_and_more_are_refused():
    encoder = Htsat(HtsatConfig(channels=8, heads=2, depth_3=2)).eval()
    power_BNF = torch.rand(1, 1001, 513)
    (picture_HW,), (steady_HW,) = encoder.picture(power_BNF), encoder.picture(power_BNF[:, :1].expand(-1, 1001, -1))
    edges_NM = 10 * np.log10(clapsep_formulas.mel_bands(power_BNF[0, [0, -1]].double().numpy()))
    np.testing.assert_allclose(picture_HW[:64, 0], edges_NM[0], atol=1e-3)  # the first frame, and the last
    np.testing.assert_allclose(picture_HW[-64:, -1], edges_NM[1], atol=1e-3)
    torch.testing.assert_close(steady_HW, picture_HW[:64, :1].repeat(4, 256), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="at most 1024 frames, got 1025; cut it"):
        encoder.picture(torch.rand(1, 1025, 513))


def test_slim_and_full_files_are_the_same_separator(separator):
    full = from_original(full_clapsep(SLIM, CLAP))
    other_clap = {name: value + 1 for name, value in CLAP.items() if value.is_floating_point()}
    for made in (full, from_original(full_clapsep(SLIM, CLAP), other_clap)):
        assert made.config == separator.config
        for name, value in made.state_dict().items():
            assert torch.equal(value, separator.state_dict()[name]), name
    assert recognises(SLIM) and recognises(full_clapsep(SLIM, CLAP)) and not recognises(CLAP)


def test_biases_of_a_slim_file_replace_those_of_the_clap_and_narrow_matrices_are_added(separator):
    name = "layers.2.blocks.1.attn.qkv"
    slim, weight = (
        part[f"{prefix}audio_branch.{name}.{last}"]
        for part, prefix, last in ((SLIM, "", "bias"), (CLAP, "module.", "weight"))
    )
    stored = separator.audio_branch.state_dict()
    assert torch.equal(stored[f"{name}.bias"], slim)
    narrow_RC, wide_CR = (SLIM[f"audio_branch.{name}.lora_{letter}"] for letter in "AB")
    torch.testing.assert_close(stored[f"{name}.weight"], weight + wide_CR @ narrow_RC / 2)  # rank 2


def test_a_file_without_narrow_matrices_has_the_weights_of_its_encoder():
    full = {name: value for name, value in full_clapsep(SLIM, CLAP).items() if ".lora_" not in name}
    name = "layers.0.blocks.0.attn.proj.weight"
    assert torch.equal(from_original(full).audio_branch.state_dict()[name], CLAP[f"module.audio_branch.{name}"])


def without(tensors, name):
    assert name in tensors
    return {key: value for key, value in tensors.items() if key != name}


A_KEY, MASK_KEY = "audio_branch.layers.0.blocks.0.attn.qkv.lora_A", "decoder_model.mask_net.3.weight"
LAST = {
    f"decoder_model.mask_net.3.{name}": torch.zeros(3 * 513, *shape)
    for name, shape in (("weight", (16,)), ("bias", ()))
}


@pytest.mark.parametrize(
    ("slim", "clap", "message"),
    [
        (SLIM, None, r"must come with its CLAP, got one without an audio encoder; add --clap FILE"),
        (SLIM, {"module.text_branch.x": torch.zeros(1)}, "must come with its CLAP"),
        (
            SLIM,
            without(CLAP, "module.audio_branch.patch_embed.norm.weight"),
            r"1 missing \(audio_branch.patch_embed.norm",
        ),
        (
            SLIM,
            without(CLAP, "module.audio_branch.layers.0.blocks.0.attn.relative_position_bias_table"),
            "must be HTSAT",
        ),
        (without(SLIM, A_KEY), CLAP, rf"1 missing \({A_KEY}\)"),
        (without(SLIM, MASK_KEY), CLAP, rf"1 missing \({MASK_KEY}\)"),
        (SLIM | {"decoder_model.extra.weight": torch.zeros(2)}, CLAP, r"1 surplus \(decoder_model.extra.weight\)"),
        (SLIM | LAST, CLAP, r"2 of another shape \(decoder_model.mask_net.3.weight 1539x16, not 513x16"),
        (SLIM | {A_KEY: torch.zeros(())}, CLAP, "of another shape"),
    ],
    ids=[
        "no CLAP",
        "text alone",
        "CLAP's tensor",
        "another encoder",
        "one adapter",
        "mask",
        "surplus",
        "phase",
        "scalar",
    ],
)
def test_files_that_do_not_fit_are_explained(slim, clap, message):
    with pytest.raises(ValueError, match=message):
        from_original(slim, clap)


def test_a_query_is_what_is_wanted_and_what_is_not_normalised_together(separator):
    encoder = Encoder()
    dog_E, rain_E = encoder.embed_text(["The sound of dog", "The sound of rain"])
    alone_Q, both_Q, sound_Q = separator.encode(
        ["dog", Query("dog", unwanted="rain"), Query(AudioExample(samples_T=np.zeros(9), sample_rate_hz=8000))]
    )
    torch.testing.assert_close(alone_Q, torch.cat([dog_E, torch.zeros(4)]))
    torch.testing.assert_close(both_Q, torch.cat([dog_E, rain_E]) / 2**0.5)
    torch.testing.assert_close(sound_Q, torch.tensor([0, 0, 0.6, 0.8, 0, 0, 0, 0]))
    assert separator.uses_unwanted and separator.encode([]).shape == (0, 8)


def test_unwanted_sounds_change_the_stem(separator):
    mix_BT = noise(2000)[None]
    alone_BT = separator.separate(mix_BT, ["dog"])
    with_rain_BT = separator.separate(mix_BT, [Query("dog", unwanted=["rain", "siren"])])
    assert snr_db(estimate=with_rain_BT, reference=alone_BT) < 40
    assert snr_db(estimate=chunk(separator, mix_BT[0], UNWANTED), reference=chunk(separator, mix_BT[0], WANTED)) < 40


def test_a_query_needs_the_encoder_of_the_file():
    made = from_original(SLIM, CLAP)
    with pytest.raises(ValueError, match="must have an encoder, got a separator without one; convert"):
        made.separate(torch.zeros(1, 10), ["dog"])

    class Wide(Encoder):
        def embed_text(self, texts):
            return torch.ones(len(texts), 512)

    made.embedder = embedder(Wide)
    with pytest.raises(ValueError, match="must have 4 features, got 512; use the CLAP of its file"):
        made.separate(torch.zeros(1, 10), ["dog"])


@torch.inference_mode()
def test_a_padded_mixture_has_the_stem_that_it_has_alone(separator):
    lengths, query_BQ = [2500, 0, 1, 513, 2499, 512], torch.stack([BOTH, WANTED, UNWANTED] * 2)
    rows = [noise(num, seed=seed) for seed, num in enumerate(lengths)]
    padded_BT = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    stems_BT = separator.separate_chunk(padded_BT, query_BQ, lengths, range(len(lengths)))
    for stem_T, row_T, query_Q in zip(stems_BT, rows, query_BQ, strict=True):
        torch.testing.assert_close(stem_T[: len(row_T)], chunk(separator, row_T, query_Q), rtol=0, atol=1e-6)
        assert not stem_T[len(row_T) :].any()


def test_a_mixture_with_several_queries_has_the_stems_of_each_alone(separator):
    one_T, other_T = noise(700), noise(650, seed=1)
    mixtures, lengths = [one_T, one_T, other_T, other_T, one_T], [700, 700, 650, 650, 600]
    queries = ["dog", "cow", "dog", Query("dog", unwanted="rain"), "dog"]
    mix_BT = torch.nn.utils.rnn.pad_sequence(mixtures, batch_first=True)
    for stem_T, mix_T, query, length in zip(
        separator.separate(mix_BT, queries, lengths=lengths), mixtures, queries, lengths, strict=True
    ):
        (alone_T,) = separator.separate(mix_T[None, :length], [query])
        torch.testing.assert_close(stem_T[:length], alone_T, rtol=0, atol=1e-6)


def test_more_mixtures_than_one_call_takes(separator):
    mix_BT = torch.stack([noise(700, seed=i) for i in range(17)])
    stems_BT = separator.separate(mix_BT, ["dog"] * 17)
    torch.testing.assert_close(stems_BT[16:], separator.separate(mix_BT[16:], ["dog"]), rtol=0, atol=1e-6)


def test_a_mixture_longer_than_the_encoder_looks_is_joined_by_cross_fades(separator):
    """Windows are 10 s and overlap by 1 s; a tone in noise keeps its phase everywhere and never jumps."""
    num_samples = 21 * RATE_HZ
    time_T = torch.arange(num_samples) / RATE_HZ
    mix_T = 0.3 * torch.sin(2 * torch.pi * 500 * time_T) + 0.01 * noise(num_samples)
    stem_T = separator.separate(mix_T[None], ["dog"])[0]
    query_Q = separator.encode(["dog"])[0]
    first_T, second_T, third_T = (
        chunk(separator, mix_T[start * RATE_HZ : min(start + 10, 21) * RATE_HZ], query_Q) for start in (0, 9, 18)
    )
    rising_T = torch.arange(1, RATE_HZ + 1) / (RATE_HZ + 1)
    joined_T = torch.cat(
        [
            first_T[: 9 * RATE_HZ],
            first_T[9 * RATE_HZ :] * (1 - rising_T) + second_T[:RATE_HZ] * rising_T,
            second_T[RATE_HZ : 9 * RATE_HZ],
            second_T[9 * RATE_HZ :] * (1 - rising_T) + third_T[:RATE_HZ] * rising_T,
            third_T[RATE_HZ:],
        ]
    )
    torch.testing.assert_close(stem_T, joined_T, rtol=0, atol=1e-6)
    steps_T = stem_T.diff().abs()
    joins = [second * RATE_HZ + away for second in (9, 10, 18, 19) for away in range(-20, 20)]
    assert steps_T[joins].max() < 1.05 * steps_T[RATE_HZ : 8 * RATE_HZ].max()


@pytest.mark.parametrize("num_samples", [0, 1, 320, 512, 513, 10 * RATE_HZ + 1])
def test_any_length(separator, num_samples):
    stems_BT = separator.separate(noise(num_samples)[None], ["dog"])
    assert stems_BT.shape == (1, num_samples) and stems_BT.dtype == torch.float32
    assert torch.isfinite(stems_BT).all()


def test_silence_stays_silent(separator):
    assert not separator.separate(torch.zeros(1, 1000), ["dog"]).any()


def test_half_precision_keeps_the_spectra(separator):
    mix_BT = noise(8000)[None]
    expected_BT = separator.separate(mix_BT, ["dog"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stems_BT = separator.separate(mix_BT, ["dog"])
    assert stems_BT.dtype == torch.float32 and snr_db(estimate=stems_BT, reference=expected_BT) > 25


def test_a_folder_has_the_same_separator(separator, tmp_path):
    queries = {"template": "The sound of {label}", "encoder": "encoder", "encoder_fingerprint": "0" * 16}
    save(separator, tmp_path, about={"queries": queries, "licence": "none stated"})
    opened = open_checkpoint(tmp_path)
    assert isinstance(opened, ClapSep) and opened.config == separator.config and not opened.labels
    mix_T = noise(900)
    assert torch.equal(chunk(opened, mix_T, BOTH), chunk(separator, mix_T, BOTH))
    description = read_description(tmp_path)
    assert description["architecture"] == "clapsep" and description["sample_rate_hz"] == RATE_HZ
    tensors = {name: value for name, value in separator.state_dict().items() if not name.endswith("film.norm.bias")}
    save_file(tensors, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"film\.norm\.bias must be F32 of shape"):
        read_description(tmp_path)


def test_text_and_sounds_are_queries_of_a_folder_with_its_clap(tmp_path):
    """Labels are embedded once; a worker that has their embeddings opens no encoder."""
    write_tiny_clapsep(tmp_path / "separator")
    source = find_separator(tmp_path / "separator")
    assert source.reads_text and not source.is_trainable and source.labels == ()
    mix_BT = noise(1200)[None].repeat(3, 1)
    example = AudioExample(samples_T=noise(RATE_HZ, seed=5).numpy(), sample_rate_hz=RATE_HZ)
    stems_BT = source.open("cpu").separate(mix_BT, ["dog", Query("dog", unwanted="rain"), Query(example)])
    assert torch.isfinite(stems_BT).all() and not torch.equal(stems_BT[0], stems_BT[1])
    worker = source.with_labels(["dog", "rain"], tmp_path / "labels").open("cpu")
    shutil.rmtree(tmp_path / "separator" / "encoder")
    assert worker.labels == ("dog", "rain")
    again_BT = worker.separate(mix_BT[:2], ["dog", Query("dog", unwanted="rain")])
    torch.testing.assert_close(again_BT, stems_BT[:2], rtol=0, atol=1e-6)
