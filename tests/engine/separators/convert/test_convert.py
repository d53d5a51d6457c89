"""Conversion: what others released becomes a folder that separates as the original does; all else is an error."""

import os

import numpy as np
import pytest
import torch

from engine.separators import AudioExample, Query, audiosep, load_separator, open_checkpoint, read_description
from engine.separators.clap import open_clap, read_clap
from engine.separators.clapsep import layout as clapsep
from engine.separators.convert.convert import convert
from engine.separators.convert.identify import identify
from engine.separators.convert.pickles import read_tensors
from engine.storage.files import sha256_file
from tests.support.models.originals import (
    EMBEDDING,
    clap_tensors,
    write_audiosep,
    write_clapsep,
    write_full_clapsep,
    write_hugging_face_clap,
    write_tokenizer,
)

pytest_plugins = ["tests.support.s3_server"]
MIX_BT = torch.randn(2, 8000, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One file of each kind, and a tokenizer."""
    folder = tmp_path_factory.mktemp("originals")
    write_audiosep(folder / "audiosep.ckpt")
    write_clapsep(folder / "slim.ckpt", folder / "clap.pt")
    write_full_clapsep(folder / "full.ckpt")
    write_hugging_face_clap(folder / "hf")
    write_tokenizer(folder / "tokenizer")
    return folder


def same_state(found, wanted):
    found, wanted = found.state_dict(), wanted.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in found)


def test_audiosep_with_its_own_text_encoder(files, tmp_path):
    converted = convert(files / "audiosep.ckpt", tmp_path / "out", tokenizer=files / "tokenizer")
    assert (converted["kind"], converted["queries"], converted["notes"]) == ("audiosep", ["text", "audio"], [])
    same_state(open_checkpoint(tmp_path / "out"), audiosep.from_original(read_tensors(files / "audiosep.ckpt").tensors))
    description = read_description(tmp_path / "out")
    assert description["licence"] == "MIT"
    assert description["source_sha256"] == sha256_file(files / "audiosep.ckpt")
    assert description["queries"] == {
        "template": "{label}",
        "encoder": "encoder",
        "encoder_fingerprint": read_clap(tmp_path / "out" / "encoder")["fingerprint"],
    }
    separator = load_separator(tmp_path / "out")
    dog, _ = separator.separate(MIX_BT, ["dog bark", "rain"])
    assert torch.isfinite(dog).all() and dog.abs().max() > 0
    again = separator.separate(MIX_BT[:1], [Query(["dog bark", "rain"])])[0]
    assert not torch.equal(again, dog)


@pytest.mark.parametrize("name", ["slim.ckpt", "full.ckpt"])
@pytest.mark.parametrize("has_clap", [True, False])
def test_clapsep_slim_and_full(files, tmp_path, name, has_clap):
    clap = files / "clap.pt" if has_clap else None
    if name == "slim.ckpt" and not has_clap:
        with pytest.raises(ValueError, match="must come with its CLAP, got one without an audio encoder; add --clap"):
            convert(files / name, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    converted = convert(files / name, tmp_path / "out", clap=clap, tokenizer=files / "tokenizer")
    assert (converted["queries"], converted["template"]) == (["text", "audio"], "The sound of {label}")
    assert "do not redistribute" in converted["licence"]
    tensors = read_tensors(files / "slim.ckpt").tensors
    same_state(open_checkpoint(tmp_path / "out"), clapsep.from_original(tensors, clap=clap_tensors()))
    same_state(open_clap(tmp_path / "out" / "encoder"), open_clap_of(files, tmp_path))
    example = AudioExample(samples_T=np.sin(np.arange(4800, dtype=np.float32)), sample_rate_hz=48_000)
    stems_BT = load_separator(tmp_path / "out").separate(MIX_BT, [Query("dog", unwanted=["rain"]), Query(example)])
    assert torch.isfinite(stems_BT).all() and stems_BT.abs().amax(1).min() > 0


def open_clap_of(files, tmp_path):
    convert(files / "clap.pt", tmp_path / "clap")
    return open_clap(tmp_path / "clap")


def test_the_clap_of_a_clapsep_may_be_a_folder_of_ours_or_of_hugging_face(files, tmp_path):
    convert(files / "clap.pt", tmp_path / "clap", tokenizer=files / "tokenizer")
    converted = convert(files / "slim.ckpt", tmp_path / "ours", clap=tmp_path / "clap")
    assert converted["notes"] == [], "the tokenizer is that of the CLAP's folder"
    same_state(open_clap(tmp_path / "ours" / "encoder"), open_clap(tmp_path / "clap"))
    with pytest.raises(ValueError, match=r"a CLAPSep checkpoint must have .* of another shape|missing"):
        convert(files / "slim.ckpt", tmp_path / "other", clap=files / "hf")  # one of another depth


def test_clap_of_hugging_face_finds_the_tokenizer_in_its_folder(files, tmp_path):
    converted = convert(files / "hf", tmp_path / "out")
    assert (converted["kind"], converted["template"], converted["notes"]) == ("clap", None, [])
    vectors = open_clap(tmp_path / "out").embed_text(["dog", "rain"])
    assert vectors.shape == (2, EMBEDDING)
    assert torch.allclose(vectors.norm(dim=1), torch.ones(2))


def test_a_separator_of_ours_is_written_again_with_another_template(files, tmp_path):
    convert(files / "audiosep.ckpt", tmp_path / "first", tokenizer=files / "tokenizer")
    converted = convert(tmp_path / "first", tmp_path / "second", template="a recording of {label}")
    assert converted["template"] == "a recording of {label}"
    assert converted["source_sha256"] == sha256_file(files / "audiosep.ckpt")
    same_state(open_checkpoint(tmp_path / "second"), open_checkpoint(tmp_path / "first"))
    assert load_separator(tmp_path / "second").separate(MIX_BT[:1], ["dog"]).shape == (1, 8000)


def test_the_built_in_network_and_a_clap_of_ours_are_written_again(files, tmp_path, write_checkpoint):
    folder = write_checkpoint(("dog", "bell"), history=[{"steps": 3}])
    converted = convert(folder, tmp_path / "out")
    assert converted["queries"] == ["labels"]
    assert read_description(tmp_path / "out") == read_description(folder)
    convert(files / "clap.pt", tmp_path / "clap", tokenizer=files / "tokenizer")
    convert(tmp_path / "clap", tmp_path / "clap2")
    assert read_clap(tmp_path / "clap2") == read_clap(tmp_path / "clap")


def test_a_conversion_that_is_there_is_returned_at_once(files, tmp_path):
    first = convert(files / "audiosep.ckpt", tmp_path / "out")
    assert "copy tokenizer.json of FacebookAI/roberta-base into" in first["notes"][0]
    weights = tmp_path / "out" / "weights.safetensors"
    os.utime(weights, (1, 1))
    assert convert(files / "audiosep.ckpt", tmp_path / "out") == first
    added = convert(files / "audiosep.ckpt", tmp_path / "out", tokenizer=files / "tokenizer")
    assert added["notes"] == [], "the tokenizer came later"
    assert weights.stat().st_mtime == 1
    assert load_separator(tmp_path / "out").separate(MIX_BT[:1], ["dog"]).shape == (1, 8000)


def test_a_folder_with_another_conversion_is_an_error(files, tmp_path):
    convert(files / "clap.pt", tmp_path / "out")
    for arguments in ({}, {"template": "a {label}"}):
        with pytest.raises(
            ValueError, match="out must be a new folder or hold this conversion, got a clap of the file"
        ):
            convert(files / "audiosep.ckpt", tmp_path / "out", **arguments)
    convert(files / "audiosep.ckpt", tmp_path / "separator")
    with pytest.raises(ValueError, match=r"got a separator of the file .* with the template '\{label\}'; give another"):
        convert(files / "audiosep.ckpt", tmp_path / "separator", template="a {label}")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=r"file must be a new folder .*, got a file"):
        convert(files / "audiosep.ckpt", tmp_path / "file")


def test_without_a_tokenizer_text_fails_by_name_and_audio_works(files, tmp_path):
    convert(files / "audiosep.ckpt", tmp_path / "out")
    separator = load_separator(tmp_path / "out")
    with pytest.raises(ValueError, match=r"there is no tokenizer.json in .*encoder.*; copy tokenizer.json"):
        separator.separate(MIX_BT[:1], ["dog"])
    example = AudioExample(samples_T=np.sin(np.arange(4800, dtype=np.float32)), sample_rate_hz=48_000)
    assert separator.separate(MIX_BT[:1], [Query(example)]).abs().max() > 0


def test_a_file_without_a_text_encoder_takes_vectors_alone(tmp_path):
    converted = convert(write_audiosep(tmp_path / "a.ckpt", text=False), tmp_path / "out")
    assert converted["queries"] == []
    assert converted["notes"] == ["it has no text encoder: queries by text and audio fail, vectors in Python work"]
    separator = open_checkpoint(tmp_path / "out")
    with pytest.raises(ValueError, match="must have a text encoder, got none"):
        separator.separate(MIX_BT[:1], ["dog"])
    assert separator.separate_chunk(MIX_BT, torch.ones(2, EMBEDDING), [8000, 8000], [0, 1]).shape == (2, 8000)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(tmp_path, dtype):
    converted = convert(write_audiosep(tmp_path / "a.ckpt", text=False, dtype=dtype), tmp_path / "out")
    name = str(dtype).removeprefix("torch.")
    assert converted["notes"][0] == f"weights of {name} in a.ckpt were converted to float32"
    assert {value.dtype for value in open_checkpoint(tmp_path / "out").state_dict().values()} == {torch.float32}


def test_a_conversion_to_s3(s3, files):
    out = f"s3://{s3.bucket}/audiosep"
    convert(files / "audiosep.ckpt", out)
    assert convert(files / "audiosep.ckpt", out, tokenizer=files / "tokenizer")["notes"] == []
    assert load_separator(out).separate(MIX_BT[:1], ["dog"]).shape == (1, 8000)


# Bad input.


@pytest.fixture(scope="module")
def content(files):
    return torch.load(files / "audiosep.ckpt", weights_only=True)["state_dict"]


def refuse(tensors, tmp_path, message, **arguments):
    torch.save({"state_dict": tensors}, tmp_path / "bad.ckpt")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "bad.ckpt", tmp_path / "out", **arguments)
    assert not list((tmp_path / "out").glob("*")), "nothing is written"


FIRST = "ss_model.base.pre_conv.bias"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({FIRST: None}, f"1 missing \\({FIRST}\\)"),
        ({FIRST: torch.zeros(9)}, f"1 of another shape \\({FIRST} 9, not 3\\)"),
        ({"ss_model.extra": torch.zeros(1)}, r"1 surplus \(ss_model.extra\)"),
        ({"decoder_model.mask_net.0.weight": torch.zeros(2, 2)}, "1 surplus"),
        ({FIRST: torch.tensor([0.0, torch.nan, 0.0])}, f"weights of {FIRST} in .* must be finite, got NaN"),
        ({FIRST: torch.tensor([0.0, torch.inf, 0.0])}, "must be finite"),
        ({"query_encoder.model.text_branch.pooler.dense.bias": None}, "CLAP in an AudioSep .* 1 missing"),
        ({"query_encoder.model.text_branch.more": torch.zeros(1)}, "1 surplus"),
    ],
)
def test_tensors_that_do_not_fit(content, tmp_path, change, message):
    refuse({name: one for name, one in (content | change).items() if one is not None}, tmp_path, message)


def test_checkpoints_of_other_models(tmp_path):
    other = {f"{part}.{n}.weight": torch.zeros(1) for part in ("conv", "head") for n in range(3)}
    refuse(other, tmp_path, r"cannot convert .* \(unknown: 6 tensors \(3 conv.\*, 3 head.\*\), the first are conv.0")


def test_a_clap_in_the_wrong_place(files, tmp_path):
    with pytest.raises(ValueError, match="--clap must come with a file of CLAPSep, got AudioSep with its text"):
        convert(files / "audiosep.ckpt", tmp_path / "out", clap=files / "clap.pt")
    with pytest.raises(ValueError, match=r"--clap must be a CLAP, got .* with AudioSep with its text encoder"):
        convert(files / "slim.ckpt", tmp_path / "out", clap=files / "audiosep.ckpt")
    convert(files / "audiosep.ckpt", tmp_path / "own")
    with pytest.raises(ValueError, match=r"--clap must come with a file of CLAPSep, got .*own of this project"):
        convert(tmp_path / "own", tmp_path / "out", clap=files / "clap.pt")


def test_a_clap_of_another_width_and_one_without_text(files, tmp_path):
    slim = read_tensors(files / "slim.ckpt").tensors
    wide = {n: torch.zeros(len(v), 64) for n, v in slim.items() if "skip_conv" in n and v.ndim == 2}
    refuse(
        slim | wide, tmp_path, f"encoder of its queries must have 32 features, got {EMBEDDING}", clap=files / "clap.pt"
    )
    audio = {n: v for n, v in clap_tensors().items() if n.startswith("audio_branch.")}
    torch.save(audio, tmp_path / "audio.pt")
    with pytest.raises(ValueError, match="a CLAP must have a text encoder"):
        convert(tmp_path / "audio.pt", tmp_path / "out")
    assert convert(files / "slim.ckpt", tmp_path / "out", clap=tmp_path / "audio.pt")["queries"] == []


@pytest.mark.parametrize("template", ["", "dog", "{label} {label}", "{Label}", "{label} {", "{label!r}", "{0}{label}"])
def test_templates_have_the_label_once(files, tmp_path, template):
    with pytest.raises(ValueError, match=r"--template must have \{label\} exactly once, got"):
        convert(files / "audiosep.ckpt", tmp_path / "out", template=template)


def test_a_template_without_a_separator_that_reads_text(files, tmp_path, write_checkpoint):
    for source in (files / "clap.pt", write_checkpoint(("dog", "bell"))):
        with pytest.raises(ValueError, match="--template must come with a separator that reads text, got"):
            convert(source, tmp_path / "out", template="a {label}")


def test_tokenizers_that_do_not_fit(files, tmp_path):
    with pytest.raises(ValueError, match=r"there is no tokenizer.json"):
        convert(files / "audiosep.ckpt", tmp_path / "out", tokenizer=tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=rf"cannot read {tmp_path} as a tokenizer"):
        convert(files / "audiosep.ckpt", tmp_path / "out", tokenizer=tmp_path)


def test_a_tagger_needs_no_conversion(tmp_path):
    (tmp_path / "tagger").mkdir()
    (tmp_path / "tagger" / "tagger.json").write_text("{}")
    with pytest.raises(ValueError, match="it is a tagger of this project"):
        convert(tmp_path / "tagger", tmp_path / "out")


# What a file is.


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("audiosep.ckpt", "audiosep", "AudioSep with its text encoder"),
        ("slim.ckpt", "clapsep", "CLAPSep, slim"),
        ("full.ckpt", "clapsep", "CLAPSep, full"),
        ("clap.pt", "clap", "CLAP of LAION, with an HTSAT of 8 channels"),
        ("hf", "clap", "CLAP of Hugging Face, with an HTSAT of 8 channels"),
    ],
)
def test_a_file_is_identified_by_its_tensors(files, name, kind, words):
    identity = identify(read_tensors(files / name))
    assert identity.kind == kind
    assert identity.name.startswith(words)
    assert identity.next.startswith("clearsep convert FILE -o DIR")
    assert ("--clap CLAP" in identity.next) == (name == "slim.ckpt")


@pytest.mark.parametrize(("channels", "words"), [(128, "HTSAT-base"), (96, "HTSAT-tiny")])
def test_the_sizes_of_released_claps(tmp_path, channels, words):
    patches = {"module.audio_branch.patch_embed.proj.weight": torch.zeros(channels, 1, 4, 4)}
    torch.save({"state_dict": patches}, tmp_path / "clap.pt")
    assert identify(read_tensors(tmp_path / "clap.pt")).name == f"CLAP of LAION, with {words}"


def test_an_audio_classifier_is_a_tagger(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["ASTForAudioClassification"]}')
    torch.save({"a": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    identity = identify(read_tensors(tmp_path))
    assert (identity.kind, identity.next) == ("tagger", "give its folder as tagger=DIR; it needs no conversion")


# The commands.


def test_inspect_and_convert_as_commands(files, tmp_path, cli):
    report = cli("inspect", files / "audiosep.ckpt", "--json").document()
    assert report["model"] == "AudioSep with its text encoder"
    assert report["sha256"] == sha256_file(files / "audiosep.ckpt")
    assert report["num_bytes"] == (files / "audiosep.ckpt").stat().st_size
    assert report["other_entries"] == ["epoch", "pytorch-lightning_version", "optimizer_states"]
    assert report["next"] == f"clearsep convert {files / 'audiosep.ckpt'} -o DIR"
    out = tmp_path / "out"
    done = cli("convert", files / "audiosep.ckpt", "-o", out, "--template", "{label} sounds")
    assert (done.code, "--set separator=" in done.out) == (0, True)
    assert done.err.startswith("warning: there is no tokenizer: copy tokenizer.json")
    again = cli("convert", files / "audiosep.ckpt", "-o", out, "--tokenizer", files / "tokenizer", "--json").document()
    assert (again["template"], again["notes"]) == ("{label} sounds", [])
    assert cli("inspect", out, "--json").document()["licence"] == "MIT"
    assert cli("inspect", out / "encoder", "--json").document()["kind"] == "clap"


def test_errors_of_the_commands_are_one_line(files, tmp_path, cli):
    (tmp_path / "a.ckpt").write_text("hello")
    for command in (("convert", tmp_path / "a.ckpt", "-o", tmp_path / "out"), ("inspect", tmp_path / "a.ckpt")):
        assert "neither a safetensors file nor one that torch wrote" in cli(*command).error()
    (tmp_path / "empty").mkdir()
    assert "no model.safetensors" in cli("convert", tmp_path / "empty", "-o", tmp_path / "out").error()
