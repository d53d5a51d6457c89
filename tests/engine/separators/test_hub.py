"""Separators as folders for a model hub: they open, their card is right, and no folder of this machine is in them."""

import shutil

import pytest
import torch
import yaml

import clearsep as cs
from engine.separators import QuerySeparator, find_separator, read_description, require_fingerprint, save
from engine.separators.audiosep import AudioSep, AudioSepConfig
from engine.separators.clap import open_clap
from engine.separators.exports.hub import save_pretrained, without_places
from tests.conftest import RATE_HZ, TINY
from tests.support.models.clap import write_tiny_clap

pytest_plugins = ["tests.support.s3_server"]
LABELS = ["bell | ring", '"dog"', "日本"]


def history(folder):
    curve = [{"step": 10.0 * step, "loss_db": -1.0, "sdri_db": 4.0 + step} for step in range(40)]
    return [
        {
            "identity": "one",
            "start": None,
            "steps": 390,
            "config": {"seed": 7, "clean": f"{folder}/my clips/list.csv"},
            "data": {"clean": f"{folder}/clips", "num_clean": 12, "tracks": "https://me:secret@host/tracks?key=secret"},
            "curve": curve,
            "wall_s": 1.0,
        },
        {
            "identity": "two",
            "start": "0123456789abcdef",
            "steps": 1,
            "config": {},
            "data": {"teacher_terms": ["CLAPSep: none stated"]},
            "curve": [],
        },
    ]


@pytest.fixture
def folder(tmp_path):
    about = {"licence": "CC BY-NC 4.0", "source": "a | project"}
    save(QuerySeparator(TINY, LABELS), tmp_path / "separator", history=history(tmp_path), about=about)
    return tmp_path / "separator"


def test_the_folder_opens_with_the_same_stems(folder, tmp_path):
    save_pretrained(folder, tmp_path / "out")
    mix_BT = torch.randn(1, 3000)
    stems = [cs.from_pretrained(one).separate(mix_BT, [LABELS[0]]) for one in (folder, tmp_path / "out")]
    torch.testing.assert_close(*stems, rtol=0, atol=0)
    assert read_description(folder)["fingerprint"] == read_description(tmp_path / "out")["fingerprint"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "separator.json",
        "weights.safetensors",
    ]


def test_the_card_says_what_the_separator_is(folder, tmp_path):
    save_pretrained(folder, tmp_path / "out")
    _, head, body = (tmp_path / "out" / "README.md").read_text().split("---\n", 2)
    front = yaml.safe_load(head)
    assert front["license"] == "cc-by-nc-4.0" and front["pipeline_tag"] == "audio-to-audio"
    assert {"clearsep", "sound-separation", "band_split_tcn"} <= set(front["tags"])
    for text in ("8000 Hz", r"bell \| ring", "日本", "390 steps, from scratch", r"a \| project", '"seed": 7'):
        assert text in body
    assert "from the separator `0123456789abcdef`" in body and "num_clean: 12" in body
    assert "| learned from | CLAPSep: none stated |" in body and "teacher_terms" not in body
    assert find_separator(folder).terms == ("a | project: CC BY-NC 4.0", "CLAPSep: none stated")
    curve = [line for line in body.splitlines() if line.endswith("|  |")]
    assert len(curve) <= 12 and curve[-1] == "| 390 | -1.00 | 43.00 |  |"


def test_no_folder_and_no_secret_of_this_machine_is_in_it(folder, tmp_path):
    save_pretrained(folder, tmp_path / "out")
    for name in ("README.md", "separator.json"):
        text = (tmp_path / "out" / name).read_text()
        assert str(tmp_path) not in text and "me:secret" not in text and "key=" not in text and "list.csv" in text
    assert without_places({"a": ["/home/me/x y/z", "from ~/b/c.csv, 1/2", "C:\\me\\d", "s3://bucket/key/e/", 3]}) == {
        "a": ["z", "from c.csv, 1/2", "d", "e", 3]
    }


def test_a_card_without_licence_and_training(write_checkpoint, tmp_path):
    save_pretrained(write_checkpoint(["a"]), tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "license" not in text and "No training is recorded" in text


def test_the_encoder_is_copied_into_the_folder(folder, tmp_path):
    encoder = tmp_path / "somewhere" / "clap"
    encoder.mkdir(parents=True)
    for name in ("weights.safetensors", "tokenizer.json", ".env", "notes.txt"):
        (encoder / name).write_text(name)
    (encoder / "clap.json").write_text('{"licence": "CC0-1.0", "source": "CLAP"}')
    queries = {"template": "{label}", "encoder": str(encoder), "encoder_fingerprint": "0" * 16}
    save(QuerySeparator(TINY, LABELS), folder, about={"queries": queries})
    save_pretrained(folder, tmp_path / "out")
    assert read_description(tmp_path / "out")["queries"]["encoder"] == "encoder"
    require_fingerprint(tmp_path / "out")
    assert "| encoder of queries | CLAP: CC0-1.0 |" in (tmp_path / "out" / "README.md").read_text()
    assert {path.name for path in (tmp_path / "out" / "encoder").iterdir()} == {
        "clap.json",
        "weights.safetensors",
        "tokenizer.json",
    }
    (encoder / "clap.json").rename(encoder / "clap.txt")
    for path in [*encoder.glob("*.json"), *encoder.glob("*.safetensors")]:
        path.unlink()
    with pytest.raises(ValueError, match="there is no encoder of the separator's queries"):
        save_pretrained(folder, tmp_path / "again")


def test_a_separator_that_reads_text_opens_with_its_own_encoder(tmp_path):
    encoder = write_tiny_clap(tmp_path / "clap")
    features = open_clap(tmp_path / "clap").embed_text(["rain"]).shape[1]
    widths = dict.fromkeys((f"width_{number}" for number in range(7)), 8)
    config = AudioSepConfig(sample_rate_hz=RATE_HZ, num_fft=256, hop_samples=80, query_features=features, **widths)
    queries = {"template": "{label}", "encoder": "../clap", "encoder_fingerprint": encoder}
    save(AudioSep(config).eval(), tmp_path / "separator", about={"queries": queries})
    save_pretrained(tmp_path / "separator", tmp_path / "out")
    mix_BT = torch.randn(1, 2000)
    wanted_BT = cs.load_separator(tmp_path / "separator").separate(mix_BT, ["rain"])
    shutil.rmtree(tmp_path / "clap")
    torch.testing.assert_close(cs.from_pretrained(tmp_path / "out").separate(mix_BT, ["rain"]), wanted_BT)
    assert "encoder in `encoder/`" in (tmp_path / "out" / "README.md").read_text()


def test_an_edited_card_stays_and_another_separator_does_not_replace_it(folder, tmp_path, write_checkpoint, cli):
    out = tmp_path / "out"
    assert cli("export", folder, "--format", "hub", "-o", out).code == 0
    (out / "README.md").write_text("mine")
    assert cli("export", folder, "--format", "hub", "-o", out, "--json").document() == {"out": str(out)}
    assert (out / "README.md").read_text() == "mine"
    other = write_checkpoint(["a"], folder="other")
    assert "must hold the same separator, got another one" in cli("export", other, "--format", "hub", "-o", out).error()
    assert "must be another than the separator's" in cli("export", other, "--format", "hub", "-o", other).error()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    assert "must be a new folder" in cli("export", other, "--format", "hub", "-o", tmp_path / "full").error()
    factory = "tests.engine.separators.own_separators:half"
    assert (
        "must be a checkpoint folder, got the factory" in cli("export", factory, "--format", "hub", "-o", out).error()
    )
    assert "there is no separator in" in cli("export", tmp_path, "--format", "hub", "-o", out).error()
    weights = other / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    assert cli("export", other, "--format", "hub", "-o", tmp_path / "new").code == 1
    assert not (tmp_path / "new").exists()


def test_the_folder_goes_to_s3(folder, s3):
    save_pretrained(folder, f"{s3.root}/model")
    assert cs.from_pretrained(f"{s3.root}/model").labels == tuple(LABELS)
