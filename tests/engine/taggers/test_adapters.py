"""Taggers from others' models, on tiny ones of random weights: audio classifiers, CLAP, and label maps of both."""

import json
import logging
import math
import pickle

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file

import engine.taggers.tagger_source as tagger_source
from engine.files.score import score_files
from engine.schema import DecodedClip, SeparatedClip
from engine.scoring.model_scores import tagger_margins
from engine.separators.clap import open_clap
from engine.taggers import Tagger, find_tagger, margin_db
from engine.taggers.adapters import HuggingFaceTagger
from tests.engine.taggers.test_tagger_source import OWN
from tests.support.models.clap import write_tiny_clap

RATE_HZ = 48000


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def classifier(tmp_path):
    """A folder with a tiny audio spectrogram transformer of random weights."""
    import transformers

    torch.manual_seed(1)
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


def test_an_audio_classifier_keeps_the_promises(classifier):
    tagger = HuggingFaceTagger(classifier)
    assert tagger.labels == ("Dog", "Bark", "Rain") and tagger.sample_rate_hz == 16000
    check_promises(tagger)


def test_only_complete_models_in_safetensors_are_opened(classifier, tmp_path):
    with pytest.raises(ValueError, match=r"got one without config\.json"):
        HuggingFaceTagger(tmp_path)
    weights = classifier / "model.safetensors"
    tensors = load_file(weights)
    save_file({name: value for name, value in tensors.items() if "classifier" not in name}, weights, {"format": "pt"})
    with pytest.raises(ValueError, match=r"must have all weights of a .*, got none for"):
        HuggingFaceTagger(classifier)
    weights.unlink()
    torch.save(tensors, classifier / "pytorch_model.bin")
    with pytest.raises(ValueError, match="with safetensors weights"):
        HuggingFaceTagger(classifier)


@pytest.fixture(scope="module")
def clap(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clap")
    write_tiny_clap(folder, audio=True, embedding_width=32)
    return folder


def test_clap_keeps_the_promises(clap):
    source = find_tagger(clap).with_labels(["dog_bark", "rain", "siren", "Rain"])
    tagger = pickle.loads(pickle.dumps(source)).open()
    assert tagger.labels == source.labels == ("dog_bark", "rain", "siren") and tagger.sample_rate_hz == RATE_HZ
    check_promises(tagger)


def test_a_margin_of_clap_is_the_scaled_difference_of_similarities(clap):
    encoder, audio_BT = open_clap(clap), noise(1, RATE_HZ)
    audio_BT *= 0.1 / audio_BT.square().mean().sqrt()  # the level that windows are scaled to
    texts_NE = encoder.embed_text(["The sound of dog bark", "The sound of rain"])
    audio_E = encoder.embed_audio(audio_BT[0].numpy(), sample_rate_hz=RATE_HZ)
    expected_db = 10 * math.log10(math.e) * math.exp(3.0) * (texts_NE @ audio_E).diff().neg().item()
    assert abs(expected_db) > 0.1, "the labels have equal tags, so nothing is shown"
    source = find_tagger(clap)
    for labels in (["dog_bark", "rain"], ["rain", "x", "dog bark"]):
        made = source.with_labels(labels)
        names = [label.lower().replace(" ", "_") for label in made.labels]
        own, rival = names.index("dog_bark"), names.index("rain")
        assert margin_db(made.open().tag(audio_BT), [own], [[rival]]).item() == pytest.approx(expected_db, abs=1e-3)
        assert made.fingerprint == source.fingerprint, "the labels are those of the corpus, which has a fingerprint"
    assert made.open().fingerprint != source.with_labels(["rain", "dog_bark"]).open().fingerprint


def test_labels_are_embedded_once_and_workers_hold_no_text_encoder(clap, tmp_path, monkeypatch):
    first = find_tagger(clap).with_labels(["dog", "rain"], tmp_path / "labels")
    tagger = first.open()
    assert not any("text" in name for name, _ in tagger._clap.named_parameters())
    with monkeypatch.context() as patch:
        patch.setattr(tagger_source, "open_clap", lambda *_, **__: pytest.fail("the encoder was opened again"))
        again = find_tagger(clap).with_labels(["dog", "rain"], tmp_path / "labels")
    assert torch.equal(again.open().tag(noise(1, 9000)), tagger.tag(noise(1, 9000)))
    assert find_tagger(clap).with_labels(["dog", "siren"], tmp_path / "labels").labels == ("dog", "siren")


def test_claps_that_cannot_tag(clap, tmp_path):
    with pytest.raises(ValueError, match=r"must have labels to tag, got none; open it with_labels of the clips"):
        find_tagger(clap).open()
    with pytest.raises(ValueError, match=r"two or more different labels, got \('rain',\)"):
        find_tagger(clap).with_labels(["rain", "Rain"]).open()
    write_tiny_clap(tmp_path / "text", embedding_width=32)
    with pytest.raises(ValueError, match=r"must have an encoder of audio, got .*text, which has one of text alone"):
        find_tagger(tmp_path / "text")
    (tmp_path / "config.json").write_text('{"model_type": "clap"}')
    with pytest.raises(ValueError, match=r"a CLAP of Hugging Face must be converted .*clearsep convert"):
        find_tagger(tmp_path)


def write(path, content):
    path.write_text(json.dumps(content))
    return path


def test_labels_map_to_classes_of_a_classifier(classifier, tmp_path):
    audio_BT = noise(2, 16000) * torch.tensor([[1.0], [0.0]])
    shares = 10 ** (HuggingFaceTagger(classifier).tag(audio_BT)[0] / 10)
    path = tmp_path / "tagger.yaml"
    path.write_text("model: ast\nlabels:\n  dog_bark: [Dog, bark]\n")
    source = find_tagger(path)
    assert source.name == str(path) and source.labels == ("dog_bark",)
    mapped = pickle.loads(pickle.dumps(source.with_labels(["Dog bark", "rain"]))).open()
    tags_BL = mapped.tag(audio_BT)
    assert mapped.labels == ("Dog bark", "rain") and mapped.sample_rate_hz == 16000
    expected = torch.stack([shares[0] + shares[1], shares[2]])
    torch.testing.assert_close(10 ** (tags_BL[0] / 10), expected, rtol=1e-4, atol=1e-7)
    assert tags_BL[1, 0] == tags_BL[1, 1], "silence has equal tags"
    turned = write(tmp_path / "t.json", {"model": str(classifier), "labels": {"dog bark": ["Bark", "dog"]}})
    assert find_tagger(turned).fingerprint == source.fingerprint != find_tagger(classifier).fingerprint


def test_labels_map_to_texts_of_a_clap_and_to_labels_of_an_own_tagger(clap, tmp_path):
    path = write(tmp_path / "clap.json", {"model": str(clap), "labels": {"dog": ["dog bark", "dog howl"]}})
    tagger = find_tagger(path).with_labels(["dog", "rain"]).open()
    plain = find_tagger(clap).with_labels(["dog bark", "dog howl", "rain"]).open()
    shares = 10 ** (plain.tag(noise(1, 9000))[0] / 10)
    expected = torch.stack([shares[0] + shares[1], shares[2]])
    torch.testing.assert_close(10 ** (tagger.tag(noise(1, 9000))[0] / 10), expected, rtol=1e-4, atol=1e-7)
    own = write(tmp_path / "own.json", {"model": f"{OWN}:open_bands", "labels": {"hum": "low"}})
    assert find_tagger(own).with_labels(["hum", "high"]).open().labels == ("hum", "high")


def test_labels_that_a_tagger_does_not_know_are_named_and_get_no_score(classifier, caplog):
    source = find_tagger(classifier)
    with pytest.raises(ValueError, match=r"got .*ast, which knows none of 'bark_2' \(nearest: 'Bark'\), 'xyz'; map"):
        source.with_labels(["bark_2", "xyz"])
    with caplog.at_level(logging.WARNING):
        tagger = source.with_labels(["dog", "rain", "dogs"]).open()
    assert "does not know 1 of 3 labels, which get no tags and whose stems pass" in caplog.text
    assert "tagger_margin_db: 'dogs' (nearest: 'Dog'); map them" in caplog.text
    row = {"clip_id": "a", "path": "a", "labels": ["dog", "dogs", "rain"], "start_s": None, "end_s": None}
    stems_ST = noise(3, 16000)
    clip = DecodedClip(row=row, samples_T=stems_ST.sum(0).numpy())
    item = SeparatedClip(clip=clip, labels=row["labels"], mixture_T=stems_ST.sum(0), stems_ST=stems_ST)
    margins = [one["tagger_margin_db"] for one in tagger_margins([item], tagger, sample_rate_hz=16000, batch_s=9.0)[0]]
    assert margins[1] is None and None not in (margins[0], margins[2])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": "ast", "labels": {"dog": "Dgo"}}, r"got 'Dgo' \(nearest: 'Dog'\); correct the map"),
        ({"model": "ast", "labels": {"dog": []}}, "got no class for 'dog'; write it like"),
        ({"model": "ast", "labels": {"dog": ["Dog", " "]}}, "got no class for 'dog'; write it like"),
        (
            {"model": "tagger.yaml", "labels": {"dog": "Dog"}},
            r"must be a tagger, got the file .*tagger\.yaml; give the",
        ),
        ({"model": "ast", "labels": {"dog": "Dog", "Dog": "Bark"}}, "got it twice for 'dog'"),
        ({"model": "ast"}, "must have labels, got a file without it; write it like"),
        ({"model": "ast", "labels": {}, "map": 1}, r"must have no map, got it"),
        ({"model": "nowhere", "labels": {}}, r"there is no tagger in .*nowhere"),
        (["ast"], "must be a mapping of settings, got list"),
    ],
)
def test_tagger_files_that_are_wrong(classifier, tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        find_tagger(write(tmp_path / "tagger.json", content))


def test_files_are_scored_with_a_clap(clap, tmp_path):
    audio = {name: (0.1 * noise(16000) * math.exp(i)).numpy() for i, name in enumerate(("dog", "rain"))}
    for name, samples in (audio | {"mixture": audio["dog"] + audio["rain"]}).items():
        soundfile.write(tmp_path / f"{name}.wav", samples, 16000)
    stems = {name: tmp_path / f"{name}.wav" for name in audio}
    verdicts = score_files(tmp_path / "mixture.wav", stems, tagger=clap)
    assert all(np.isfinite(one["scores"]["tagger_margin_db"]) for one in verdicts)
