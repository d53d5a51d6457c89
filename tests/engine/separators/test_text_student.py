"""The built-in network with queries in text: labels of its training by heart, other words by its encoder."""

import json
import shutil
import weakref

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from engine.files.plan import plan_separation
from engine.files.targets import make_targets
from engine.separators import (
    AudioExample,
    NetworkConfig,
    Query,
    QuerySeparator,
    find_encoder,
    find_separator,
    load,
    load_separator,
    make_embedder,
    open_checkpoint,
    read_description,
    require_fingerprint,
    save,
)
from engine.separators.clap import open_clap
from engine.separators.queries import QueryPart
from engine.storage.files import read_json, write_json
from tests.support.models.clap import write_tiny_clap

WIDTH = 24
TINY = NetworkConfig(
    channels=16, num_blocks=2, num_bands=12, num_fft=256, hop_samples=128, sample_rate_hz=8000, text_features=WIDTH
)
CLOSED = NetworkConfig(channels=16, num_blocks=2, num_bands=12, num_fft=256, hop_samples=128, sample_rate_hz=8000)


@pytest.fixture(scope="module")
def clap(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder") / "clap"
    write_tiny_clap(folder, embedding_width=WIDTH)
    return folder


@pytest.fixture(scope="module")
def student(clap, tmp_path_factory):
    """A separator that was trained with the labels dog and rain."""
    torch.manual_seed(0)
    folder, described = tmp_path_factory.mktemp("student") / "separator", find_encoder(clap)
    separator = QuerySeparator(TINY, [])
    separator.embedder = make_embedder(described)
    separator.grow(["dog", "rain"])
    save(separator, folder, about={"queries": described})
    return folder


@pytest.fixture()
def moved(student, clap, tmp_path):
    """The same separator; its encoder is not where it was."""
    shutil.copytree(student, tmp_path / "separator")
    description = read_json(student / "separator.json")
    description["queries"]["encoder"] = "../elsewhere"
    write_json(tmp_path / "separator" / "separator.json", description)
    return tmp_path / "separator"


def test_a_closed_vocabulary_is_described_as_before(tmp_path):
    save(QuerySeparator(CLOSED, ["dog"]), tmp_path)
    assert "text_features" not in json.loads((tmp_path / "separator.json").read_text())["network"]
    assert load(tmp_path).config == CLOSED
    assert "queries" not in read_description(tmp_path) and find_encoder(tmp_path) is None


def test_a_query_is_a_projection_of_its_embedding(student, clap):
    separator, encoder = load(student), open_clap(clap)
    assert separator.labels == ("dog", "rain") == tuple(read_description(student)["labels"])
    texts = ["The sound of dog", "The sound of church bells"]
    wanted_BE = encoder.embed_text(texts)
    projected_BQ = separator.queries.project(wanted_BE * WIDTH**0.5)
    for queries in (["dog", "church bells"], ["The sound of dog", Query("church_bells")]):
        torch.testing.assert_close(separator.encode(queries), projected_BQ)
    both = Query([QueryPart("dog", 3.0), "church bells"])
    mean_BE = normalize(3.0 * wanted_BE[:1] + wanted_BE[1:])
    torch.testing.assert_close(separator.encode([both]), separator.queries.project(mean_BE * WIDTH**0.5))


def test_new_words_change_the_stem_and_not_what_is_known(student):
    separator, mix_BT = load_separator(student), 0.1 * torch.randn(2, 2000)
    stems_BT = separator.separate(mix_BT, ["dog", "church bells"])
    assert not torch.allclose(separator.separate(mix_BT, ["dog", "glass"])[1], stems_BT[1], atol=1e-6)
    torch.testing.assert_close(separator.separate(mix_BT, ["Dog", "church bells"]), stems_BT)
    assert separator.labels == ("dog", "rain")


def test_an_embedding_does_not_depend_on_what_was_embedded_before(clap):
    fresh, used = (make_embedder(find_encoder(clap)) for _ in range(2))
    other_E = used.wanted("Glass_Breaking")
    torch.testing.assert_close(used.wanted("glass  breaking"), fresh.wanted("glass breaking"))
    assert not torch.allclose(used.wanted("glass breaking"), other_E, atol=1e-4)


TONE = np.sin(np.arange(800, dtype=np.float32))


@pytest.mark.parametrize(
    ("wanted", "unwanted"),
    [
        ("dog bark", ["rain", "The sound of  DOG_bark "]),
        (
            ["rain", AudioExample(samples_T=TONE, sample_rate_hz=8000)],
            AudioExample(samples_T=TONE, sample_rate_hz=8000),
        ),
    ],
)
def test_the_negation_of_a_query_is_seen_in_any_spelling(wanted, unwanted):
    with pytest.raises(
        ValueError, match=r"must not want and exclude the same sound, got \['(dog bark|an audio exampl)"
    ):
        Query(wanted, unwanted)
    assert Query(wanted, "siren").unwanted


def test_weights_count_relative_to_each_other(clap):
    embedder = make_embedder(find_encoder(clap))
    for weight in (1e-300, 1e300):
        pair = Query([QueryPart("dog", 2 * weight), QueryPart("glass", weight)])
        torch.testing.assert_close(embedder.wanted(pair), embedder.wanted(Query([QueryPart("dog", 2.0), "glass"])))


def test_what_is_no_list_of_queries_is_refused(student):
    separator, mix_BT = load_separator(student), torch.zeros(3, 100)
    with pytest.raises(ValueError, match="queries must be a list with one for each mixture, got 'dog'; give a list"):
        separator.separate(mix_BT, "dog")
    for lengths in ([1, 2], [0, 5, 101], [-1, 5, 5]):
        with pytest.raises(ValueError, match="lengths must have for each mixture a number from 0 to 100"):
            separator.separate(mix_BT, ["dog"] * 3, lengths=lengths)
    assert separator.separate(mix_BT[:0], []).shape == (0, 100)


def test_what_is_no_sound_is_refused():
    with pytest.raises(ValueError, match="a sound must be text or an AudioExample, got int; give one"):
        Query(["dog", 3])
    with pytest.raises(ValueError, match="a query must be text in Unicode"):
        Query("caf\udce9")
    with pytest.raises(ValueError, match=r"must be a whole number above 0, got 0\.5; give the rate"):
        AudioExample(samples_T=TONE, sample_rate_hz=0.5)


@pytest.mark.parametrize("text", ["", " _\n", "The sound of", "the_sound_of_ "])
def test_a_query_needs_words(text):
    with pytest.raises(ValueError, match="a query must have words, got"):
        Query(text)


def test_known_labels_need_no_encoder_and_new_words_name_what_is_missing(moved, clap):
    separator, mix_BT = load_separator(moved), 0.1 * torch.randn(1, 2000)
    known_BT = separator.separate(mix_BT, ["rain"])
    assert separator.separate(mix_BT, [Query(["dog", "rain"])]).shape == (1, 2000)
    with pytest.raises(ValueError, match=r"there is no encoder in .*/elsewhere, which new words need; copy the enc"):
        separator.separate(mix_BT, ["glass"])
    shutil.copytree(clap, moved.parent / "elsewhere")
    assert separator.separate(mix_BT, ["glass"]).shape == (1, 2000)
    torch.testing.assert_close(separator.separate(mix_BT, ["rain"]), known_BT)
    require_fingerprint(moved)  # the place of the encoder is not part of it


def test_another_encoder_is_refused(moved):
    write_tiny_clap(moved.parent / "elsewhere", embedding_width=WIDTH, seed=8)
    with pytest.raises(ValueError, match="must have the fingerprint"):
        load_separator(moved).separate(torch.zeros(1, 2000), ["glass"])


def test_an_audio_example_needs_an_encoder_of_audio(student):
    from engine.separators import AudioExample

    example = AudioExample(samples_T=torch.randn(48000).numpy(), sample_rate_hz=48000)
    with pytest.raises(ValueError, match="audio"):
        load_separator(student).separate(torch.zeros(1, 2000), [Query(example)])


def test_labels_are_embedded_once_for_the_workers(student, moved, tmp_path):
    source = find_separator(student)
    assert source.reads_text and source.is_trainable and source.with_labels(["rain"], tmp_path / "queries") is source
    ready = source.with_labels(["glass", "dog"], tmp_path / "queries")
    assert set(ready.labels) == {"dog", "rain", "glass"}
    stems_BT = ready.open().separate(torch.ones(1, 500), ["glass"])
    torch.testing.assert_close(stems_BT, source.open().separate(torch.ones(1, 500), ["glass"]))
    again = find_separator(moved).with_labels(["glass"], tmp_path / "queries")  # there is no encoder, and no need of it
    torch.testing.assert_close(again.open().separate(torch.ones(1, 500), ["glass"]), stems_BT)
    with pytest.raises(ValueError, match="there is no encoder in"):
        find_separator(moved).with_labels(["glass", "wind"], tmp_path / "queries")


def test_a_grown_vocabulary_keeps_what_it_has(student):
    separator = load(student)
    before_LE = separator.queries.vectors_LE.clone()
    separator.grow(["dog", "glass"])
    assert separator.queries.labels == ("dog", "rain", "glass")
    assert torch.equal(separator.queries.vectors_LE[:2], before_LE)
    with pytest.raises(ValueError, match="labels must differ in more than case"):
        separator.grow(["Glass"])


def test_a_separator_without_its_encoder_says_so(student, tmp_path):
    save(load(student), tmp_path)
    with pytest.raises(ValueError, match="a separator that reads text must have an encoder, got none"):
        open_checkpoint(tmp_path).encode(["dog"])


def test_the_encoder_is_freed_once_the_queries_of_a_file_are_known(student):
    separator = open_checkpoint(student)
    wanted = separator.encode(["whistle"])
    encoder = weakref.ref(separator.embedder._open())
    plan_separation(make_targets(["whistle", "dog"]), separator=separator)
    assert encoder() is None
    assert torch.equal(separator.encode(["whistle"]), wanted) and separator.embedder._opened is None
    assert separator.encode(["another sound"]).shape == wanted.shape
