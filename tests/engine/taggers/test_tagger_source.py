"""Taggers by name: folders and factories of the user's own."""

import pickle

import pytest
import torch

from engine.taggers import ShareTagger, TagNetworkConfig, find_tagger, read_tagger, save_tagger
from tests.support.signals import RATE_HZ, BandTagger, two_bands

OWN = "tests.engine.taggers.test_tagger_source"


def open_bands(device):
    return BandTagger()


class NoTag:
    sample_rate_hz, labels, fingerprint = 8000, ("low", "high"), "x"

    def __init__(self, device):
        pass


class NoFingerprint:
    sample_rate_hz, labels = 8000, ("low", "high")

    def __init__(self, device):
        pass

    def tag(self, audio_BT, *, lengths=None):
        return torch.zeros(len(audio_BT), 2)


def test_the_built_in_tagger_in_a_folder(tmp_path, monkeypatch):
    torch.manual_seed(3)
    tagger = ShareTagger(
        TagNetworkConfig(sample_rate_hz=RATE_HZ, num_fft=256, num_bands=16, channels=16), ["low", "high"]
    ).eval()
    save_tagger(tagger, tmp_path / "t")
    monkeypatch.chdir(tmp_path)
    source = pickle.loads(pickle.dumps(find_tagger("t")))
    monkeypatch.chdir("/")
    assert source.name == str(tmp_path / "t")
    assert source.fingerprint == tagger.fingerprint == read_tagger(tmp_path / "t")["fingerprint"]
    audio_BT = torch.from_numpy(two_bands(2000)[0])[None]
    assert torch.equal(source.open("cpu").tag(audio_BT), tagger.tag(audio_BT))


def test_a_factory_by_its_dotted_name():
    source = pickle.loads(pickle.dumps(find_tagger(f"{OWN}:open_bands")))
    assert source.name == f"{OWN}:open_bands" and source.fingerprint == BandTagger.fingerprint
    assert source.open().labels == BandTagger.labels
    assert find_tagger(source) is source
    assert len(find_tagger(f"{OWN}:NoFingerprint").fingerprint) == 16


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere:opens", r"cannot import nowhere of nowhere:opens \(No module named 'nowhere'\); install it"),
        (f"{OWN}:open_band", "there is no 'open_band' in .*; did you mean 'open_bands'"),
        (f"{OWN}:NoTag", "must return a Tagger, got NoTag without tag; add tag to NoTag"),
        (f"{OWN}:RATE_HZ", "must be callable, got 8000; give a function of the device"),
        ("no folder", r"no folder .*no tagger"),
    ],
)
def test_a_name_that_means_no_tagger(name, message):
    with pytest.raises(ValueError, match=message):
        find_tagger(name)
