"""Separators by name: checkpoint folders and factories of the user's own, in this process and in others."""

import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from engine.separators import Separator, SeparatorSource, find_separator, load, load_separator, read_description
from tests.engine.separators import own_separators
from tests.support.signals import RATE_HZ, mixture, tiny_checkpoint

OWN = "tests.engine.separators.own_separators"


def test_a_checkpoint_folder_is_described_without_opening_it(tmp_path, monkeypatch):
    tiny_checkpoint(tmp_path / "s", ["dog", "cat"])
    monkeypatch.chdir(tmp_path)
    source = find_separator("s")
    assert source.name == str(tmp_path / "s") and source.is_trainable
    assert source.labels == ("dog", "cat") and source.sample_rate_hz == RATE_HZ
    assert source.fingerprint == read_description(tmp_path / "s")["fingerprint"]
    (tmp_path / "s" / "weights.safetensors").unlink()
    assert find_separator("s") == source


def test_a_checkpoint_opens_where_it_is_unpickled(tmp_path, monkeypatch):
    tiny_checkpoint(tmp_path / "s")
    monkeypatch.chdir(tmp_path)
    source = pickle.loads(pickle.dumps(find_separator("s")))
    monkeypatch.chdir("/")
    mix_BT = torch.from_numpy(mixture(1000))[None]
    assert torch.equal(source.open("cpu").separate(mix_BT, ["low"]), load(tmp_path / "s").separate(mix_BT, ["low"]))


@pytest.mark.parametrize("name", ["open_bands", "Fingerprinted", "open_on"])
def test_a_factory_by_its_dotted_name(name):
    source = find_separator(f"{OWN}:{name}")
    assert source.name == f"{OWN}:{name}" and not source.is_trainable
    assert source.labels == ("low", "high") and source.sample_rate_hz == RATE_HZ
    mix_BT = torch.from_numpy(mixture(1000))[None]
    for opened in (source.open(), pickle.loads(pickle.dumps(source)).open("cpu"), load_separator(source.name)):
        assert isinstance(opened, Separator)
        assert torch.equal(opened.separate(mix_BT, ["low"]), own_separators.open_bands("cpu").separate(mix_BT, ["low"]))


def test_the_factory_gets_the_device():
    assert find_separator(f"{OWN}:open_on").open("cuda:1").device == "cuda:1"
    assert load_separator(f"{OWN}:open_on", "cuda").device == "cuda"


def test_a_fingerprint_of_its_own_or_of_its_name_and_file(tmp_path, monkeypatch):
    assert find_separator(f"{OWN}:Fingerprinted").fingerprint == Fingerprint
    assert find_separator(f"{OWN}:open_on").fingerprint == Fingerprint
    monkeypatch.chdir(tmp_path)
    text = "from tests.support.signals import BandSeparator\ndef a(device): return BandSeparator()\nb = a\n"
    prints = []
    for number, source in enumerate((text, text, text + "# a changed line\n")):
        Path(f"own{number}.py").write_text(source)
        Path("own.py").write_text(source)
        sys.modules.pop("own", None)
        prints.append(find_separator("own:a").fingerprint)
    assert prints[0] == prints[1] != prints[2]
    assert find_separator("own:b").fingerprint != find_separator("own:a").fingerprint
    sys.modules.pop("own", None)


Fingerprint = own_separators.Fingerprinted.fingerprint


def test_a_module_of_the_current_folder_opens_in_a_process_elsewhere(tmp_path, monkeypatch):
    """As on a worker, which starts in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("own_elsewhere.py").write_text(
        "from tests.support.signals import BandSeparator as Own\nopens = lambda _: Own()\n"
    )
    Path("source.pickle").write_bytes(pickle.dumps(find_separator("own_elsewhere:opens")))
    root = Path(__file__).parents[3]
    code = f"import pickle; print(pickle.load(open({str(tmp_path / 'source.pickle')!r}, 'rb')).open('cpu').labels)"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "('low', 'high')"


def test_a_folder_of_that_name_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_checkpoint(tmp_path / "own:folder")
    assert find_separator("own:folder").is_trainable


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.at_all:opens", r"cannot import nowhere.at_all of nowhere.at_all:opens \(No module named 'nowhere'\)"),
        (f"{OWN}:open_band", "there is no 'open_band' in .*own_separators; did you mean 'open_bands'"),
        (f"{OWN}:not_callable", "not_callable must be callable, got 5; give a function"),
        (f"{OWN}:takes_no_device", "must take one argument, the device, got a function with too many"),
        (f"{OWN}:NoLabels", "must return a Separator, got NoLabels without labels; add labels"),
        (f"{OWN}:NoSeparate", "must return a Separator, got NoSeparate without separate; add separate"),
        (f"{OWN}:float_rate", r"sample_rate_hz of .* must be a whole number above 0, got 8000\.0"),
        (f"{OWN}:true_rate", "sample_rate_hz of .* must be a whole number above 0, got True"),
        (f"{OWN}:no_rate", "sample_rate_hz of .* must be a whole number above 0, got 0"),
        (f"{OWN}:text_labels", "labels of .* must be a tuple of text, got 'low'"),
        ("a folder that is none", "a folder that is none"),
    ],
)
def test_a_name_that_means_no_separator(name, message):
    with pytest.raises(ValueError, match=message):
        find_separator(name)


def test_a_callable_of_python():
    source = SeparatorSource.from_factory(own_separators.open_bands)
    assert source.name == f"{OWN}:open_bands"
    assert source == SeparatorSource.from_factory(own_separators.open_bands)
    assert source.fingerprint == find_separator(source.name).fingerprint
    assert find_separator(own_separators.open_bands) == source and find_separator(source) is source
    other = SeparatorSource.from_factory(own_separators.open_bands, name="bands")
    assert other.name == "bands" and other.fingerprint != source.fingerprint
    assert pickle.loads(pickle.dumps(source)).open().labels == ("low", "high")
    assert SeparatorSource.from_factory(partial(own_separators.open_bands)).fingerprint == source.fingerprint


def test_a_callable_without_file_or_fingerprint():
    factory = eval("lambda device: kind()", {"kind": own_separators.BandSeparator, "__name__": "nowhere"})
    with pytest.raises(ValueError, match="must have a fingerprint or be defined in a file, got neither; give it"):
        SeparatorSource.from_factory(factory)
