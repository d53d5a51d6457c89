"""Separators as ONNX files: onnxruntime alone separates as torch does, and what is not equal is not kept."""

import json
import sys

import numpy as np
import onnxruntime
import pytest
import torch

from engine.separators import QuerySeparator, load_separator, save
from engine.separators.audiosep import AudioSep, AudioSepConfig
from engine.separators.clapsep.layout import from_original
from engine.separators.exports import onnx
from engine.separators.exports.onnx import export_onnx
from engine.separators.exports.transforms import real_transforms
from engine.separators.network import transforms
from tests.conftest import RATE_HZ, TINY
from tests.support import ROOT
from tests.support.models.clapsep import tiny_clapsep
from tests.support.signals import snr_db


@pytest.mark.parametrize(("num_fft", "hop", "pad_mode"), [(256, 64, "constant"), (400, 100, "reflect")])
def test_the_transforms_are_torchs(num_fft, hop, pad_mode):
    mix_BT, window = torch.randn(2, 3001), torch.hann_window(num_fft)

    def both():
        mix_BFN = torch.stft(mix_BT, num_fft, hop, window=window, pad_mode=pad_mode, return_complex=True)
        return mix_BFN, transforms.istft(mix_BFN.mT * 0.5, window, hop, length=2900)

    wanted = both()
    with real_transforms():
        found = both()
    assert found[0].shape == wanted[0].shape and found[1].shape == wanted[1].shape == (2, 2900)
    assert snr_db(estimate=torch.view_as_real(found[0]).numpy(), reference=torch.view_as_real(wanted[0]).numpy()) > 100
    assert snr_db(estimate=found[1].numpy(), reference=0.5 * mix_BT[:, :2900].numpy()) > 100


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A tiny separator with its ONNX file of half a second, made once."""
    folder = tmp_path_factory.mktemp("onnx")
    torch.manual_seed(0)
    save(QuerySeparator(TINY, ["bell", "dog"]), folder / "separator")
    return folder, export_onnx(folder / "separator", folder / "separator.onnx", chunk_s=0.5)


def test_onnxruntime_separates_as_torch_does(exported):
    folder, record = exported
    assert json.loads((folder / "separator.json").read_text()) == record
    assert record["sample_rate_hz"] == RATE_HZ and record["num_samples"] == 4000 and record["snr_db"] > 90
    session = onnxruntime.InferenceSession(folder / "separator.onnx", providers=["CPUExecutionProvider"])
    mix_BT = np.random.default_rng(1).uniform(-0.5, 0.5, (1, 4000)).astype(np.float32)
    separator = load_separator(folder / "separator")
    for label, vector in record["queries"].items():
        (stem_BT,) = session.run(None, {"mixture": mix_BT, "query": np.array([vector], np.float32)})
        wanted_BT = separator.separate(torch.from_numpy(mix_BT), [label]).numpy()
        assert stem_BT.shape == (1, 4000) and snr_db(estimate=stem_BT, reference=wanted_BT) > 90
    assert list(record["queries"]) == ["bell", "dog"]


@pytest.mark.slow
def test_separators_of_others_are_exported(tmp_path):
    """Each is compared with torch by the export itself."""
    widths = dict.fromkeys((f"width_{number}" for number in range(7)), 8)
    config = AudioSepConfig(sample_rate_hz=RATE_HZ, num_fft=256, hop_samples=80, query_features=8, **widths)
    for name, separator in (
        ("audiosep", AudioSep(config)),
        ("clapsep", from_original(*tiny_clapsep(query_features=8))),
    ):
        save(separator, tmp_path / name)
        record = export_onnx(tmp_path / name, tmp_path / f"{name}.onnx", chunk_s=0.5)
        assert record["snr_db"] > 90 and record["queries"] == {} and record["query_features"] == 8


def test_the_file_names_no_folder_of_this_machine(exported):
    data = (exported[0] / "separator.onnx").read_bytes()
    assert not [one for one in (str(ROOT), "site-packages", str(exported[0])) if one.encode() in data]


def test_a_file_that_separates_otherwise_is_not_kept(exported, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx, "_convert", lambda *_: (exported[0] / "separator.onnx").read_bytes())
    monkeypatch.setattr(onnx, "MIN_SNR_DB", 500.0)
    with pytest.raises(ValueError, match=r"must separate like torch \(SNR of 500 dB or more\), got \d+\.\d dB"):
        export_onnx(exported[0] / "separator", tmp_path / "new.onnx", chunk_s=0.5)
    assert list(tmp_path.iterdir()) == []


def test_bad_input(exported, tmp_path, monkeypatch, cli, write_checkpoint):
    folder, _ = exported
    new = tmp_path / "new.onnx"

    def error(separator, out, *words):
        return cli("export", separator, "--format", "onnx", "-o", out, *words).error()

    assert "must be a file that ends in .onnx" in error(folder / "separator", tmp_path / "new")
    assert "chunk_s must have from 1 to 16,777,216 samples" in error(folder / "separator", new, "--chunk-s", "0")
    assert "there is no label 'cat'" in error(folder / "separator", new, "--query", "cat")
    other = write_checkpoint(["a"])
    assert "must be a new file or one of the same separator" in error(other, folder / "separator.onnx")
    assert "got the factory" in error("tests.engine.separators.own_separators:half", new)
    with monkeypatch.context() as patch:
        patch.setattr("torch.onnx.export", lambda *_, **__: 1 / 0)
        patch.setattr("torch.export.export", lambda *_: None)
        assert "cannot convert the separator" in error(other, new)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    message = error(other, new)
    assert "cannot export to ONNX without the package onnxruntime" in message and "pip install" in message
    assert list(tmp_path.glob("*.onnx")) == []
