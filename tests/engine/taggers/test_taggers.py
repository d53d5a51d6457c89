"""Taggers: margins by hand, the built-in tagger with any weights, its files, and adapters on tiny models."""

import importlib.util
import json
import sys

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
from engine.taggers.adapters import ClapTagger, HuggingFaceTagger
from engine.taggers.network import mel_filters
from tests.support.signals import RATE_HZ, two_bands

TINY = TagNetworkConfig(sample_rate_hz=RATE_HZ, num_fft=256, num_bands=16, channels=16)
needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers (extra 'taggers') is not installed"
)


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


def test_without_transformers_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    for make in (lambda: HuggingFaceTagger(tmp_path), lambda: ClapTagger(tmp_path, ["a", "b"])):
        with pytest.raises(ValueError, match=r"pip install 'clearsep-engine\[taggers\]'"):
            make()


@pytest.fixture
def classifier(tmp_path):
    """A folder with a tiny audio spectrogram transformer of random weights."""
    import transformers

    config = transformers.ASTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, max_length=64
    )
    config.id2label = {0: "Dog", 1: "Bark", 2: "Rain"}
    config.label2id = {name: i for i, name in config.id2label.items()}
    model = transformers.ASTForAudioClassification(config)
    with torch.no_grad():
        model.classifier.dense.weight.mul_(200.0)
    model.save_pretrained(tmp_path / "ast")
    transformers.ASTFeatureExtractor(max_length=64).save_pretrained(tmp_path / "ast")
    return tmp_path / "ast"


@pytest.fixture
def clap(tmp_path):
    """A folder with a tiny CLAP of random weights, with a vocabulary of single letters."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    letters = ["<s>", "<pad>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyzT"]
    tokenizer = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    words = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    config = transformers.ClapConfig(
        text_config={"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                     "intermediate_size": 16, "projection_dim": 16},
        audio_config={"patch_embeds_hidden_size": 8, "hidden_size": 64, "depths": [1, 1, 1, 1],
                      "num_attention_heads": [2, 2, 2, 2], "projection_dim": 16},
        projection_dim=16,
    )  # fmt: skip
    transformers.ClapModel(config).save_pretrained(tmp_path / "clap")
    extractor = transformers.ClapFeatureExtractor(truncation="rand_trunc", padding="repeatpad")
    transformers.ClapProcessor(extractor, words).save_pretrained(tmp_path / "clap")
    return tmp_path / "clap"


def check_promises(tagger):
    """The promises of the protocol, on rows of 2 and 21 s; the second is more than one window."""
    assert isinstance(tagger, Tagger)
    rate, num_labels = tagger.sample_rate_hz, len(tagger.labels)
    audio_BT = noise(2, 21 * rate)
    audio_BT[0, 2 * rate :] = 0.0
    tags_BL = tagger.tag(audio_BT, lengths=[2 * rate, 21 * rate])
    assert tags_BL.shape == (2, num_labels) and tags_BL.isfinite().all()
    torch.testing.assert_close((10 ** (tags_BL / 10)).sum(1), torch.ones(2), rtol=0, atol=1e-4)
    torch.testing.assert_close(tags_BL[:1], tagger.tag(audio_BT[:1, : 2 * rate]), rtol=0, atol=1e-3)
    torch.testing.assert_close(tags_BL[:1], tagger.tag(1e-4 * audio_BT[:1, : 2 * rate]), rtol=0, atol=1e-2)
    silent = tagger.tag(torch.zeros(1, rate))
    assert margin_db(silent, [0], [[1]]).item() == 0.0
    assert tagger.tag(noise(1, 10)).isfinite().all()
    with pytest.raises(ValueError, match="NaN or infinite samples"):
        tagger.tag(torch.full((1, 100), float("nan")))


@needs_transformers
def test_an_audio_classifier_keeps_the_promises(classifier):
    tagger = HuggingFaceTagger(classifier)
    assert tagger.labels == ("Dog", "Bark", "Rain") and tagger.sample_rate_hz == 16000
    check_promises(tagger)


@needs_transformers
def test_a_label_maps_to_classes(classifier):
    audio_BT = noise(1, 16000)
    shares = 10 ** (HuggingFaceTagger(classifier).tag(audio_BT)[0] / 10)
    mapped = HuggingFaceTagger(classifier, {"dog": ["Dog", "Bark"], "rain": "Rain"})
    assert mapped.labels == ("dog", "rain")
    expected = torch.stack([shares[0] + shares[1], shares[2]])
    torch.testing.assert_close(10 ** (mapped.tag(audio_BT)[0] / 10), expected, rtol=1e-4, atol=1e-7)
    assert mapped.fingerprint != HuggingFaceTagger(classifier).fingerprint
    with pytest.raises(ValueError, match=r"got \['Dgo'\]; did you mean 'Dog'\?"):
        HuggingFaceTagger(classifier, {"dog": "Dgo", "rain": "Rain"})


@needs_transformers
def test_only_complete_models_in_safetensors_are_opened(classifier, tmp_path):
    with pytest.raises(ValueError, match=r"got one without config\.json"):
        HuggingFaceTagger(tmp_path)
    weights = classifier / "model.safetensors"
    from safetensors.torch import load_file

    tensors = load_file(weights)
    save_file({name: value for name, value in tensors.items() if "classifier" not in name}, weights, {"format": "pt"})
    with pytest.raises(ValueError, match=r"must have all weights of a .*, got none for"):
        HuggingFaceTagger(classifier)
    weights.unlink()
    torch.save(tensors, classifier / "pytorch_model.bin")
    with pytest.raises(ValueError, match="with safetensors weights"):
        HuggingFaceTagger(classifier)


@needs_transformers
def test_clap_keeps_the_promises(clap):
    tagger = ClapTagger(clap, ["dog_bark", "rain", "siren"])
    assert tagger.sample_rate_hz == 48000
    check_promises(tagger)
    assert tagger.fingerprint != ClapTagger(clap, ["rain", "dog_bark", "siren"]).fingerprint
    assert tagger.tag(noise(1, 48000)).std() > 1e-4
    with pytest.raises(ValueError, match="two or more different labels"):
        ClapTagger(clap, ["rain", "Rain"])
