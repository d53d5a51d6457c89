"""Training of the built-in tagger on two bands of noise, whose energies are known."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.corpus.sources import read_sources
from engine.taggers import load_tagger, margin_db
from tests.support.signals import RATE_HZ, two_bands
from tests.support.wav import write_wav
from train.judges.power_mixtures import FINER, PowerMixer
from train.judges.tagger import TaggerConfig, energy_loss, train_tagger

FAST = TaggerConfig(
    steps=80, batch_size=16, segment_s=1.0, num_bands=32, channels=32, pitch_fraction=0.03, colour_db=2.0
)
LOW, HIGH = 1, 0  # labels are in alphabetic order


def bands_csv(write_sources, *, num_clips=3, folder="sources"):
    """Bursts with silence around them, so that mixtures have frames of one source alone."""
    clips = []
    for seed in range(num_clips):
        for label, samples_T in zip(("low", "high"), two_bands(2 * RATE_HZ, seed=seed), strict=True):
            burst_T = samples_T * (np.arange(len(samples_T)) < 1.5 * RATE_HZ)
            clips.append((f"{label}{seed}", label, seed % 2, burst_T))
    return read_sources(write_sources(clips, folder=folder))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a tagger of low and high noise, and the report of its training."""
    folder = tmp_path_factory.mktemp("bands")
    lines = ["path,label,fold"]
    for seed in range(3):
        for label, samples_T in zip(("low", "high"), two_bands(2 * RATE_HZ, seed=seed), strict=True):
            write_wav(folder / f"{label}{seed}.wav", samples_T, sample_rate_hz=RATE_HZ)
            lines.append(f"{label}{seed}.wav,{label},1")
    (folder / "clips.csv").write_text("\n".join(lines))
    torch.set_num_threads(1)
    report = train_tagger(folder / "t", clean=read_sources(folder / "clips.csv"), config=FAST, sample_rate_hz=RATE_HZ)
    return folder / "t", report


def unseen(ratio_db):
    """New low and high noise, and their sum with low ``ratio_db`` over high, ``[3, T]``."""
    low_T, high_T = two_bands(2 * RATE_HZ, seed=77)
    return torch.from_numpy(np.stack([low_T, high_T, 10 ** (ratio_db / 20) * low_T + high_T]))


def test_the_record_counts_clips_and_has_the_loss(trained):
    _, report = trained
    assert report["num_clips"] == 6 and report["num_unusable"] == 0
    assert 0.0 < report["loss"] < 2.0 and report["wall_s"] > 0.0


def test_margins_are_positive_for_the_right_and_negative_for_the_wrong(trained):
    tagger = load_tagger(trained[0])
    assert tagger.labels == ("high", "low") and tagger.sample_rate_hz == RATE_HZ
    tags_BL = tagger.tag(unseen(0.0)[:2])
    assert (margin_db(tags_BL, [LOW, HIGH], [[HIGH], [LOW]]) > 6.0).all()
    assert (margin_db(tags_BL, [HIGH, LOW], [[LOW], [HIGH]]) < -6.0).all()


@pytest.mark.parametrize("ratio_db", [-10.0, -5.0, 0.0, 5.0, 10.0])
def test_the_margin_of_a_mixture_is_the_ratio_of_its_energies(trained, ratio_db):
    tags_BL = load_tagger(trained[0]).tag(unseen(ratio_db)[2:])
    assert margin_db(tags_BL, [LOW], [[HIGH]]).item() == pytest.approx(ratio_db, abs=6.0)


def test_a_purer_stem_has_a_higher_margin(trained):
    tagger = load_tagger(trained[0])
    stems_BT = torch.cat([unseen(ratio_db)[2:] for ratio_db in (-20.0, -10.0, 0.0, 10.0, 20.0)])
    assert (margin_db(tagger.tag(stems_BT), [LOW] * 5, [[HIGH]] * 5).diff() > 1.0).all()


def test_silence_around_a_sound_changes_little(trained):
    tagger, mix_BT = load_tagger(trained[0]), unseen(5.0)[2:]
    alone = margin_db(tagger.tag(mix_BT), [LOW], [[HIGH]])
    amid = margin_db(tagger.tag(torch.nn.functional.pad(mix_BT, (20480, 40000))), [LOW], [[HIGH]])
    assert abs(alone - amid).item() < 1.5


def test_the_same_training_gives_the_same_tagger_and_others_do_not(write_sources, tmp_path):
    clean, config = bands_csv(write_sources), TaggerConfig(steps=3, batch_size=4, segment_s=1.0, channels=16)
    prints = []
    for name, chosen in (("a", config), ("b", config), ("c", TaggerConfig(**(vars(config) | {"seed": 1})))):
        torch.manual_seed(len(prints))
        train_tagger(tmp_path / name, clean=clean, config=chosen, sample_rate_hz=RATE_HZ)
        prints.append(load_tagger(tmp_path / name).fingerprint)
    assert prints[0] == prints[1] != prints[2]


def test_a_finished_training_returns_at_once(write_sources, tmp_path):
    config = TaggerConfig(steps=2, batch_size=4, segment_s=1.0, channels=16)
    report = train_tagger(tmp_path / "t", clean=bands_csv(write_sources), config=config, sample_rate_hz=RATE_HZ)
    written = (tmp_path / "t" / "tagger.json").stat().st_mtime_ns
    moved = bands_csv(write_sources, folder="elsewhere")
    assert train_tagger(tmp_path / "t", clean=moved, config=config, sample_rate_hz=RATE_HZ) == report
    assert (tmp_path / "t" / "tagger.json").stat().st_mtime_ns == written
    with pytest.raises(ValueError, match="got a tagger of another training"):
        train_tagger(tmp_path / "t", clean=moved, config=replace(config, steps=3), sample_rate_hz=RATE_HZ)
    with pytest.raises(ValueError, match="replaced, added or removed since"):
        train_tagger(tmp_path / "t", clean=moved.part(0, 3), config=config, sample_rate_hz=RATE_HZ)
    path = Path(moved.table["path"][0].as_py())
    write_wav(path, np.ones(2 * RATE_HZ, np.float32), sample_rate_hz=RATE_HZ)
    other = read_sources(path.parent / "clips.csv")
    with pytest.raises(ValueError, match=f"got 1 of .* files that were .* since: '{path.name}'"):
        train_tagger(tmp_path / "t", clean=other, config=config, sample_rate_hz=RATE_HZ)


def test_clips_that_cannot_be_read_or_are_silent_are_counted(write_sources, tmp_path):
    clips = [(name, name, 0, samples_T) for name, samples_T in zip(("low", "high"), two_bands(8000), strict=True)]
    clean = write_sources([*clips, ("silent", "low", 0, np.zeros(8000))])
    (clean.parent / "torn.wav").write_bytes(b"RIFF")
    clean.write_text(clean.read_text() + "torn.wav,high,0\nabsent.wav,high,0\n")
    config = TaggerConfig(steps=1, batch_size=2, segment_s=1.0, channels=16)
    report = train_tagger(tmp_path / "t", clean=read_sources(clean), config=config, sample_rate_hz=RATE_HZ)
    assert report["num_clips"] == 2 and report["num_unusable"] == 3


def test_labels_take_turns_if_not_all_clips_fit_in_memory(write_sources, tmp_path):
    config = TaggerConfig(steps=1, batch_size=2, segment_s=1.0, channels=16, pool_s=3.0)
    clean = bands_csv(write_sources, num_clips=5)
    report = train_tagger(tmp_path / "t", clean=clean, config=config, sample_rate_hz=RATE_HZ)
    assert report["num_clips"] == 2, "two clips of 2 s, one of each label"


def test_labels_without_a_sound_or_a_rival_raise(write_sources, tmp_path):
    low_T, _ = two_bands(8000)
    with pytest.raises(ValueError, match="two or more different labels"):
        train_tagger(
            tmp_path / "t", clean=read_sources(write_sources([("a", "low", 0, low_T)])), sample_rate_hz=RATE_HZ
        )
    clean = read_sources(write_sources([("a", "low", 0, low_T), ("b", "mute", 0, 0 * low_T)]))
    with pytest.raises(ValueError, match="must have a readable clip with sound, got none of 'mute'"):
        train_tagger(tmp_path / "t", clean=clean, sample_rate_hz=RATE_HZ)


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 0},
        {"gain_db": -1.0},
        {"weight_decay": -1.0},
        {"mask_rate": 1.5},
        {"pitch_fraction": -0.1},
        {"segment_s": 0.0},
    ],
)
def test_settings_that_cannot_work_raise(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))} must be "):
        TaggerConfig(**settings)


def mixer(**settings):
    rng = np.random.default_rng(0)
    powers = [[torch.from_numpy(rng.gamma(1.0, 1.0, (200, 16))).float() for _ in range(2)] for _ in range(4)]
    return PowerMixer(powers, TaggerConfig(batch_size=40, **settings), num_frames=16)


def test_batches_are_a_function_of_seed_and_step():
    first, again, other = mixer().batch(5), mixer().batch(5), mixer(seed=1).batch(5)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], mixer().batch(6)[0]) and not torch.equal(first[0], other[0])


def test_the_energies_of_labels_are_those_of_their_sources():
    """Whatever was done to them; only the noise of nobody may come on top."""
    mixes_BNK, energy_BML = mixer().batch(0)
    assert mixes_BNK.shape == (40, 16, 16) and energy_BML.shape == (40, 4, 4)
    frames_BM = mixes_BNK.view(40, 4, -1).sum(2)
    excess_BM = frames_BM / energy_BML.sum(2) - 1
    assert excess_BM.min() > -1e-4
    assert ((excess_BM.abs() < 1e-4).all(1)).float().mean() > 0.5
    num_sources_B = (energy_BML.sum(1) > 0).sum(1)
    assert set(num_sources_B.tolist()) == {1, 2, 3}


def bands_alone(num_frames, **settings):
    """Mixtures of two labels with one mel band each, of nothing but a crop and a change of pitch."""
    powers = [[torch.zeros(num_frames, 16)], [torch.zeros(num_frames, 16)]]
    powers[0][0][:, 4], powers[1][0][:, 11] = 3.0, 0.5
    plain = {"colour_db": 0.0, "gain_db": 0.0, "mask_rate": 0.0} | settings
    return PowerMixer(powers, TaggerConfig(batch_size=100, **plain), num_frames=8).batch(0)


def test_every_source_has_the_same_power_and_moves_by_some_bands():
    mixes_BNK, energy_BML = bands_alone(100, pitch_fraction=0.125)
    energies = energy_BML.sum(1)[energy_BML.sum(1) > 0]
    torch.testing.assert_close(energies, torch.full_like(energies, 8 * 16))
    is_quiet_B = ((mixes_BNK.sum((1, 2)) / energy_BML.sum((1, 2)) - 1).abs() < 1e-5) & (energy_BML[:, :, 1] == 0).all(1)
    alone_BK = mixes_BNK[is_quiet_B].mean(1)
    assert (alone_BK[:, 2:7].sum(1) - 16.0).abs().max() < 1e-3, "the band 4, moved by at most two bands"
    centre_B = (alone_BK * torch.arange(16)).sum(1) / alone_BK.sum(1)
    assert 2.0 <= centre_B.min() < 3.0 and 5.0 < centre_B.max() <= 6.0
    torch.testing.assert_close((alone_BK > 1e-4).sum(1) <= 2, torch.ones(len(alone_BK), dtype=torch.bool))


def test_a_clip_that_is_shorter_than_a_mixture_is_followed_by_silence():
    _, energy_BML = bands_alone(FINER * 2)
    assert (energy_BML[:, 0].sum(1) > 0).all() and (energy_BML[:, 1:] == 0).all()


def test_a_gain_is_within_its_limits():
    _, energy_BML = bands_alone(100, gain_db=15.0)
    gains_db = 10 * torch.log10(energy_BML.sum(1)[energy_BML.sum(1) > 0] / (8 * 16))
    assert -15.01 < gains_db.min() < -13 and 13 < gains_db.max() < 15.01


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_makes_the_same_batches(trained):
    here, there = mixer(), mixer()
    there.power_NK = there.power_NK.cuda()
    for on_cpu, on_gpu in zip(here.batch(3), there.batch(3), strict=True):
        torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-3, atol=1e-6)


def test_the_loss_is_least_for_the_true_fractions():
    energy_BML = torch.rand(2, 5, 3, generator=torch.Generator().manual_seed(0))
    fraction_BML = energy_BML / energy_BML.sum(2, keepdim=True)
    least = energy_loss(fraction_BML.log(), energy_BML)
    assert energy_loss((0.9 * fraction_BML + 0.1 / 3).log(), energy_BML) > least
    pure_BML = torch.eye(3).expand(1, 3, 3)
    assert energy_loss((pure_BML + 1e-9).log(), pure_BML).item() == pytest.approx(np.log(3), abs=1e-4)
