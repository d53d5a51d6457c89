"""Checkpoint files of others: what torch and LAION write is read; code, bombs and damage are errors in words."""

import collections
import io
import json
import pickle
import struct
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from engine.separators.convert.pickles import read_tensors

GENERATOR = torch.Generator().manual_seed(1)
WEIGHTS = {
    "a.weight": torch.randn(3, 4, generator=GENERATOR),
    "a.scalar": torch.tensor(2.5),
    "half": torch.randn(5, generator=GENERATOR).half(),
    "brain": torch.randn(5, generator=GENERATOR).bfloat16(),
    "index": torch.arange(6).reshape(2, 3),
    "flag": torch.tensor([True, False]),
    "empty": torch.zeros(0, 7),
    "turned": torch.randn(3, 4, generator=GENERATOR).t(),
}
TRAINING = {
    "epoch": 15,
    "name": "clap",
    "lr": 1e-4,
    "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"betas": (0.9, 0.999), "lr": None}]},
}


def require_weights(found):
    assert list(found.tensors) == list(WEIGHTS)
    for name, tensor in WEIGHTS.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert torch.equal(found.tensors[name], tensor), name


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("is_zip", [True, False])
def test_files_of_torch_are_read_in_both_layouts(tmp_path, protocol, is_zip):
    path = tmp_path / "original.ckpt"
    content = {**TRAINING, "state_dict": collections.OrderedDict(WEIGHTS)}
    torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=is_zip)
    found = read_tensors(path)
    require_weights(found)
    assert found.ignored == ("epoch", "name", "lr", "optimizer")
    assert found.format == ("torch" if is_zip else "torch before 1.6")
    assert len(found.sha256) == 64


@pytest.mark.parametrize("protocol", [2, 4])
def test_numpy_scalars_are_read_as_in_the_released_claps(tmp_path, protocol):
    """``torch.load(weights_only=True)`` refuses these files."""
    path, weights = tmp_path / "clap.pt", {f"module.{name}": one for name, one in WEIGHTS.items()}
    scores = {"map": np.float64(0.5), "step": np.int64(7), "lr": np.float32(0.1), "is_best": np.bool_(True)}
    torch.save({"metrics": scores, "state_dict": weights}, path, pickle_protocol=protocol)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    require_weights(read_tensors(path))


def test_numpy_scalars_under_their_older_name(tmp_path):
    path = tmp_path / "clap.pt"
    torch.save({"loss": np.float64(0.5), "model": WEIGHTS}, path, pickle_protocol=4)
    rewrite(path, lambda data: data.replace(b"\x8c\x16numpy._core.multiarray", b"\x8c\x15numpy.core.multiarray"))
    require_weights(read_tensors(path))


def test_a_state_dict_of_a_module_has_versions_and_shared_tensors(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    module.tied = module[0]
    torch.save({"state_dict": module.state_dict(), "one": torch.nn.Parameter(torch.ones(2))}, tmp_path / "m.pt")
    found = read_tensors(tmp_path / "m.pt")
    assert set(found.tensors) == set(module.state_dict())
    assert torch.equal(found.tensors["tied.weight"], module[0].weight)


def test_a_flat_file_and_a_prefix_that_only_some_names_have(tmp_path):
    torch.save({"module.a": torch.ones(1), "b": torch.ones(1), "epoch": 3}, tmp_path / "flat.pt")
    found = read_tensors(tmp_path / "flat.pt")
    assert (list(found.tensors), found.ignored) == (["module.a", "b"], ("epoch",))


def test_safetensors_and_a_folder_of_hugging_face(tmp_path):
    save_file({name: one.contiguous() for name, one in WEIGHTS.items()}, tmp_path / "model.safetensors")
    assert torch.equal(read_tensors(tmp_path / "model.safetensors").tensors["turned"], WEIGHTS["turned"])
    (tmp_path / "config.json").write_text('{"model_type": "clap"}')
    found = read_tensors(tmp_path)
    assert (found.format, found.config) == ("safetensors", {"model_type": "clap"})
    (tmp_path / "model.safetensors").unlink()
    torch.save(WEIGHTS, tmp_path / "pytorch_model.bin")
    require_weights(read_tensors(tmp_path))


def test_numbers_are_mapped_and_the_file_stays_as_it_is(tmp_path):
    path = tmp_path / "a.pt"
    torch.save(WEIGHTS, path)
    before = path.read_bytes()
    read_tensors(path).tensors["a.weight"].zero_()
    assert path.read_bytes() == before


# Bad input.


def rewrite(path, change):
    """The same archive with another pickle."""
    with zipfile.ZipFile(path) as archive:
        entries = {one.filename: archive.read(one) for one in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, change(data) if name.endswith("data.pkl") else data)


def refuse(path, message):
    started = time.monotonic()
    with pytest.raises(ValueError, match=message) as raised:
        read_tensors(path)
    assert time.monotonic() - started < 5
    assert str(path) in str(raised.value) and "; " in str(raised.value)


class Runs:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("is_zip", [True, False])
def test_code_in_a_pickle_is_refused_by_name_and_not_run(tmp_path, protocol, is_zip):
    ran = tmp_path / "ran"
    content = {"state_dict": WEIGHTS, "epoch": Runs(Path.touch, Path(ran))}
    torch.save(content, tmp_path / "evil.pt", pickle_protocol=protocol, _use_new_zipfile_serialization=is_zip)
    refuse(tmp_path / "evil.pt", "operation|pathlib|getattr|neither")
    assert not ran.exists()


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (Runs(__import__("os").system, "true"), "posix.system"),
        (Runs(eval, "1"), "__builtin__.eval"),
        (Runs(torch.load, "a.pt"), "torch.serialization.load"),
        (np.zeros(3), "numpy._core.multiarray._reconstruct"),
        (torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
        (collections.Counter("a"), "collections.Counter"),
    ],
)
def test_all_but_tensors_and_plain_values_is_refused_by_name(tmp_path, content, name):
    torch.save({"state_dict": WEIGHTS, "more": content}, tmp_path / "a.pt")
    refuse(tmp_path / "a.pt", f"names {name}, which is no tensor, number or OrderedDict; nothing was run")


PROTO, STOP = b"\x80\x04", b"."
TORCH = b"\x8c\x0ctorch._utils\x8c\x12_rebuild_tensor_v2\x93"
STORAGE = b"(\x8c\x07storage\x8c\x05torch\x8c\x0cFloatStorage\x93\x8c\x010\x8c\x03cpuJ%btQ"
BOMBS = {
    "the hash of nested tuples": (b"})" + b"2\x86" * 60 + b"Ns", "operation DUP"),
    "nested tuples from the memo": (
        b"})" + b"".join(b"q%ch%c\x86" % (n, n) for n in range(100)) + b"Ns",
        "key is a tuple",
    ),
    "lists of lists from the memo": (
        b"]" + b"".join(b"q%c]h%ch%c\x86a" % (n, n, n) for n in range(100)),
        "from 1 to 20,000 tensors",
    ),
    "a list that holds itself": (b"]q\x00h\x00a", "from 1 to 20,000 tensors"),
    "a mapping that holds itself": (b"}q\x00\x8c\x05modelh\x00s", "from 1 to 20,000 tensors"),
    "a memo of billions": (b"Nr\xff\xff\xff\x7f", "from 1 to 20,000 tensors"),
    "a text longer than the file": (b"\x8d" + b"\xff" * 7 + b"\x00abc", "is damaged"),
    "a frame longer than the file": (b"\x95" + b"\xff" * 7 + b"\x00N", "from 1 to 20,000 tensors"),
    "nothing on the stack": (b"0" * 3, "operation POP"),
    "a call of text": (b"\x8c\x01a)R", "calls a str"),
    "a change of text": (b"\x8c\x01a)b", "changes a str"),
    "no value at all": (b"", "is damaged"),
    "an extension": (b"\x82\x01", "operation EXT1|is damaged"),
    "keys that are large numbers": (b"}\x8a\x10" + b"\x01" * 16 + b"Ns", "key is a int"),
    "a tensor of 4 TB": (
        TORCH + b"(" + STORAGE % struct.pack("<i", 4) + b"K\x00(J\xff\xff\xff\x7fJ\xff\x01\x00\x00tK\x00K\x00\x86tR",
        "larger than what is stored",
    ),
    "a tensor outside its storage": (
        TORCH + b"(" + STORAGE % struct.pack("<i", 4) + b"K\x02K\x03\x85K\x01\x85\x89NtR",
        "larger than what is stored",
    ),
    "a tensor before its storage": (
        TORCH + b"(" + STORAGE % struct.pack("<i", 4) + b"J\xff\xff\xff\xffK\x01\x85K\x01\x85\x89NtR",
        "with the size -1",
    ),
    "a storage that the archive does not have": (STORAGE % struct.pack("<i", 1 << 20), "storage 0 are missing"),
}


@pytest.mark.parametrize(("body", "message"), BOMBS.values(), ids=list(BOMBS))
def test_pickles_that_mean_harm(tmp_path, body, message):
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w") as archive:
        archive.writestr("bomb/data.pkl", PROTO + body + STOP)
        archive.writestr("bomb/data/0", bytes(16))
    refuse(tmp_path / "bomb.pt", message)


def test_the_number_of_operations_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("engine.separators.convert.unpickler._MAX_OPERATIONS", 100)
    torch.save(WEIGHTS, tmp_path / "a.pt")
    refuse(tmp_path / "a.pt", "more than 100 operations")


def test_a_compressed_archive_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", PROTO + b"N.")
        archive.writestr("bomb/data/0", bytes(1 << 24))
    refuse(tmp_path / "bomb.pt", "bomb/data.pkl is compressed")


def test_an_archive_with_a_huge_list_of_entries_is_refused(tmp_path):
    torch.save(WEIGHTS, tmp_path / "a.pt")
    data = (tmp_path / "a.pt").read_bytes()
    end = data.rindex(b"PK\x05\x06")
    directory = bytes(1 << 25)
    tail = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 9, 9, len(directory), end, 0)
    (tmp_path / "a.pt").write_bytes(data[:end] + directory + tail)
    refuse(tmp_path / "a.pt", "index must have at most 16,777,216 bytes")


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("fraction", [0.02, 0.3, 0.6, 0.9, 0.999])
def test_truncated_files(tmp_path, is_zip, fraction):
    path = tmp_path / "cut.ckpt"
    torch.save({"state_dict": WEIGHTS | {"large": torch.zeros(999)}}, path, _use_new_zipfile_serialization=is_zip)
    data = path.read_bytes()
    path.write_bytes(data[: int(fraction * len(data))])
    refuse(path, "cannot read")


def test_a_truncated_safetensors_file(tmp_path):
    save_file({"a": torch.zeros(99)}, tmp_path / "a.safetensors")
    data = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(data[:-9])
    refuse(tmp_path / "a.safetensors", "cannot read")


def test_a_damaged_pickle_is_seen_by_its_checksum(tmp_path):
    torch.save({"state_dict": WEIGHTS}, tmp_path / "a.pt")
    data = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(data.replace(b"a.weight", b"a.weighs"))
    refuse(tmp_path / "a.pt", "CRC")


@pytest.mark.parametrize(
    "data",
    [b"", b"labels: dog\n", b"\x89PNG\r\n\x1a\n" + bytes(99), b"{}", bytes(1000), json.dumps({"a": 1}).encode() * 9],
    ids=["empty", "text", "png", "short", "zeros", "json"],
)
def test_files_that_are_no_checkpoints(tmp_path, data):
    (tmp_path / "a.ckpt").write_bytes(data)
    refuse(tmp_path / "a.ckpt", "neither a safetensors file nor one that torch wrote")


def test_other_pickles_and_archives(tmp_path):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"a": 1}))
    refuse(tmp_path / "a.pkl", "a pickle, but not one that torch wrote")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    refuse(tmp_path / "a.zip", "a zip archive, but not one that torch wrote")
    torch.save([torch.ones(1)], tmp_path / "list.pt")
    refuse(tmp_path / "list.pt", "from 1 to 20,000 tensors by name, got 0")


def test_names_without_a_checkpoint(tmp_path):
    refuse(tmp_path / "nowhere.pt", "there is no .*nowhere.pt; give a checkpoint file")
    refuse(tmp_path, "no model.safetensors or pytorch_model.bin")
    torch.save(WEIGHTS, tmp_path / "pytorch_model.bin")
    refuse(tmp_path, "no config.json")
    with pytest.raises(ValueError, match=r"must be a local file, got s3://bucket/a.pt; copy it"):
        read_tensors("s3://bucket/a.pt")


def test_torchs_own_streams_in_memory_are_the_same_format():
    """The layouts above are those of this version of torch: a new one is seen here."""
    stream = io.BytesIO()
    torch.save({"a": torch.ones(2)}, stream)
    assert {"archive/data.pkl", "archive/data/0"} <= set(zipfile.ZipFile(stream).namelist())
