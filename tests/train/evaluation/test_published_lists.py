"""The published evaluation lists: each format read as it is, its mixtures, and the papers' figures by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.scoring.metrics import level_db
from tests.support.wav import write_wav
from train.evaluation.figures import Scored
from train.evaluation.list_audio import SAMPLE_RATE_HZ, load_mixture, locate, mix_at_0_db
from train.evaluation.list_formats import ListRow, read_list
from train.evaluation.mixtures import EvaluationMixture
from train.evaluation.published_lists import evaluate_list, paper_figures

RATE_HZ = SAMPLE_RATE_HZ
ESC50 = """idx,caption,src_wav,noise_wav
0,dog,1-100032-A-0.wav,1-100038-A-14.wav
1,chirping birds,1-100038-A-14.wav,1-100032-A-0.wav
"""
AUDIOSET = """idx,caption,src_wav,noise_wav
0,"Male speech, man speaking","evaluation/data/audioset/class_id=0/class_id=0,index=000,source.wav",\
"evaluation/data/audioset/class_id=0/class_id=0,index=000,mixture.wav"
"""
AUDIOCAPS = """idx,caption,labels,src_wav,noise_wav
0,Constant rattling and sharp vibrations,"Speech Sewing machine Inside, public space",Ya.wav,Yb.wav
"""
CLOTHO = """idx,caption,src_wav,noise_wav1,noise_wav1
0,A machine whines and squeals.,Santa Motor.wav,"09-07-14_2338_Foz, fisherman.wav",radiater.wav
"""
VGGSOUND = """file_id,mix_wav,s0_wav,s0_text,s1_wav,s1_text
a+++b,data/mix_wav/a+++b.wav,data/s0_wav/a+++b.wav,playing accordion,data/s1_wav/a+++b.wav,sea lion barking
"""
CLAPSEP = """source_file,positive_caption,noise_file,negative_caption
4-218199-F-35.wav,the sound of washing machine,5-223103-A-31.wav,the sound of mouse click
"""
CAPTIONS = """source_file,positive_caption,noise_file,negative_caption
YlC.wav,"The sounds of Sheep, Bleat and Speech",Yjj.wav,The sound of Typewriter
"""


class Scaled:
    """A separator that returns the mixture times a gain and knows some labels."""

    def __init__(self, gain: float = 1.0, *, labels: tuple[str, ...], sample_rate_hz: int = RATE_HZ) -> None:
        self.gain, self.labels, self.sample_rate_hz = gain, labels, sample_rate_hz

    def separate(
        self, mix_BT: torch.Tensor, queries: Sequence[str], *, lengths: Sequence[int] | None = None
    ) -> torch.Tensor:
        for query in queries:
            if query.lower().removeprefix("the sound of ") not in self.labels:
                raise ValueError(f"the separator does not know {query!r}")
        return self.gain * mix_BT


def tone(hz: float, *, gain: float = 0.2, duration_s: float = 0.5, rate_hz: int = RATE_HZ) -> np.ndarray:
    return (gain * np.sin(2 * np.pi * hz * np.arange(round(duration_s * rate_hz)) / rate_hz)).astype(np.float32)


def load(row: ListRow, folder: Path) -> EvaluationMixture:
    return load_mixture(row, locate(row, folder))


def truth(mixture: EvaluationMixture) -> torch.Tensor:
    return torch.from_numpy(mixture.sources_ST[:1])


def put(folder: Path, name: str, samples_T: np.ndarray, *, rate_hz: int = RATE_HZ) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    write_wav(folder / name, samples_T.astype(np.float32), sample_rate_hz=rate_hz)


def written(tmp_path: Path, text: str, name: str = "list.csv") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def esc50(tmp_path: Path) -> tuple[Path, Path]:
    """The list and its published audio: orthogonal tones at equal level."""
    folder = tmp_path / "esc50"
    dog_T, birds_T = tone(400), tone(1000)
    for number, source_T in enumerate((dog_T, birds_T)):
        put(folder, f"segment-{number}.wav", source_T)
        put(folder, f"mixture-{number}.wav", dog_T + birds_T)
    return written(tmp_path, ESC50, "esc50_eval.csv"), folder


# Formats.


@pytest.mark.parametrize(
    ("text", "kind", "rule", "query", "published", "others"),
    [
        (ESC50, "AudioSep", "mean", "dog", ("segment-0.wav", "mixture-0.wav"), ("chirping birds",)),
        (AUDIOSET, "AudioSep AudioSet", "mean of class medians", "Male speech, man speaking", None, None),
        (AUDIOCAPS, "AudioSep", "mean", "Constant rattling and sharp vibrations", None, None),
        (CLOTHO, "AudioSep", "mean", "A machine whines and squeals.", ("segment-0.wav", "mixture-0.wav"), None),
        (
            VGGSOUND,
            "AudioSep VGGSound",
            "mean",
            "playing accordion",
            ("data/s0_wav/a+++b.wav", "data/mix_wav/a+++b.wav"),
            ("sea lion barking",),
        ),
        (CLAPSEP, "CLAPSep", "mean", "the sound of washing machine", None, ("the sound of mouse click",)),
        (CAPTIONS, "CLAPSep", "mean", "The sounds of Sheep, Bleat and Speech", None, None),
    ],
    ids=["esc50", "audioset", "audiocaps", "clotho", "vggsound", "clapsep", "clapsep captions"],
)
def test_a_published_list_is_read_as_it_is(
    tmp_path: Path,
    text: str,
    kind: str,
    rule: str,
    query: str,
    published: tuple[str, str] | None,
    others: tuple[str, ...] | None,
) -> None:
    mixtures = read_list(written(tmp_path, text))
    row = mixtures.rows[0]
    assert (mixtures.format, mixtures.rule) == (kind, rule)
    assert (row.query, row.other_labels, row.error) == (query, others, None)
    assert published is None or row.published == published
    figures = ("bss_sdri_db", "si_sdri_db") if kind == "CLAPSep" else ("sdri_db", "si_sdr_db")
    assert mixtures.metrics == figures


def test_instruments_alone_are_the_list_of_music(tmp_path: Path) -> None:
    """Its paper averages the ten classes, which have 117 to 1260 rows each."""
    rows = "0,accordion,Ya_0.wav,Yb_0.wav\n1,tuba,Yb_0.wav,Ya_0.wav\n"
    assert read_list(written(tmp_path, "idx,caption,src_wav,noise_wav\n" + rows)).rule == "mean of class means"


def test_a_byte_order_mark_and_a_blank_after_the_comma_do_no_harm(tmp_path: Path) -> None:
    text = '\ufeffSource_File, positive_caption, noise_file, negative_caption\na.wav, "rain, wind", b.wav, a dog\n'
    (row,) = read_list(written(tmp_path, text)).rows
    assert (row.query, row.clips) == ("rain, wind", ("a.wav", "b.wav"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("class,file\ninsects,\"['1-17585-A-7.wav']\"\n", r"AudioSep: idx, caption.*CLAPSep: .*\['class', 'file'\]"),
        ("idx,caption,src_wav\n0,dog,a.wav\n", "must have the columns of a known format"),
        ("idx,caption,src_wav,noise_wav\n", "must have at least one row, got none"),
        ("", "must have the columns of a known format"),
    ],
)
def test_another_table_is_refused_with_its_columns_and_the_known_ones(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_list(written(tmp_path, text))


def test_a_missing_list_and_one_that_is_not_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be a CSV file that exists"):
        read_list(tmp_path / "nowhere.csv")
    (tmp_path / "bytes.csv").write_bytes(b"idx,caption\xff\xfe\n")
    with pytest.raises(ValueError, match="as CSV in UTF-8"):
        read_list(tmp_path / "bytes.csv")


# Mixtures.


def test_a_published_mixture_is_used_as_it_is(tmp_path: Path, esc50: tuple[Path, Path]) -> None:
    list_path, folder = esc50
    mixture = load(read_list(list_path).rows[0], folder)
    assert mixture.labels == ("dog",)
    assert np.allclose(mixture.sources_ST[0], tone(400), atol=1e-6)
    assert np.allclose(mixture.mix_T, tone(400) + tone(1000), atol=1e-6)


@pytest.mark.parametrize("prefix", ["", "evaluation/data/audioset/"])
def test_audio_of_audioset_is_found_from_the_repository_and_from_its_own_folder(tmp_path: Path, prefix: str) -> None:
    for name, samples_T in (("source", tone(400)), ("mixture", tone(400) + tone(900))):
        put(tmp_path / "data", f"{prefix}class_id=0/class_id=0,index=000,{name}.wav", samples_T)
    mixture = load(read_list(written(tmp_path, AUDIOSET)).rows[0], tmp_path / "data")
    assert np.allclose(mixture.sources_ST, [tone(400), tone(900)], atol=1e-6)


def test_clapsep_mixes_ten_seconds_at_0_db_over_all_of_them(tmp_path: Path) -> None:
    """The target is half a second at 44.1 kHz, the noise twelve seconds and much louder."""
    put(tmp_path, "4-218199-F-35.wav", tone(500, rate_hz=44100), rate_hz=44100)
    put(tmp_path, "5-223103-A-31.wav", tone(1000, gain=0.9, duration_s=12.0))
    mixture = load(read_list(written(tmp_path, CLAPSEP)).rows[0], tmp_path)
    assert mixture.sources_ST.shape == (2, 10 * RATE_HZ)
    target_T, noise_T = torch.from_numpy(mixture.sources_ST)
    assert float(level_db(signal=noise_T, reference=target_T)) == pytest.approx(0.0, abs=1e-4)
    assert np.allclose(mixture.sources_ST[0, 400:15600], tone(500)[400:15600], atol=1e-3)
    assert not mixture.sources_ST[0, RATE_HZ:].any()
    assert np.abs(noise_T).max() == pytest.approx(0.2 * 20**-0.5, rel=1e-3)


def test_a_sum_that_peaks_above_1_is_brought_to_0_9_and_its_source_with_it() -> None:
    target_T, noise_T = np.array([0.8, 0.0]), np.array([0.1, 0.0])
    assert np.allclose(mix_at_0_db(target_T, noise_T), [[0.45, 0.0], [0.45, 0.0]])
    target_T, noise_T = np.array([0.5, 0.0]), np.array([0.0, 0.1])
    assert np.allclose(mix_at_0_db(target_T, noise_T), [[0.5, 0.0], [0.0, 0.5]])
    with pytest.raises(ValueError, match="must contain sound, got energies"):
        mix_at_0_db(target_T, np.zeros(2))


@pytest.mark.parametrize(
    "path", ["../a.wav", "x/../../a.wav", "/etc/passwd", "s3://bucket/a.wav", "..\\a.wav", "C:\\a"]
)
def test_a_path_may_not_leave_the_folder(tmp_path: Path, path: str) -> None:
    put(tmp_path, "a.wav", tone(400))
    put(tmp_path, "audio/b.wav", tone(900))
    text = f"source_file,positive_caption,noise_file,negative_caption\n{path},dog,b.wav,rain\n"
    with pytest.raises(ValueError, match="must stay in the audio folder"):
        load(read_list(written(tmp_path, text)).rows[0], tmp_path / "audio")


# Evaluation.


def test_the_mixture_itself_gains_nothing_and_the_truth_all(esc50: tuple[Path, Path]) -> None:
    list_path, folder = esc50
    mixtures = read_list(list_path)
    report = evaluate_list(Scaled(labels=("dog", "chirping birds", "rain")), mixtures, folder)
    assert (report["num_rows"], report["num_mixtures"], report["num_failed"], report["failures"]) == (2, 2, 0, [])
    for name in ("sdri_db", "bss_sdri_db", "si_sdri_db", "sdr_db", "si_sdr_db", "false_extraction_db"):
        assert report[name] == pytest.approx(0.0, abs=1e-3)
    assert report["num_absent_queries"] == 2, "rain, in both"
    assert report["paper"]["sdri_db"] == pytest.approx(0.0, abs=1e-6)
    assert set(report["by_label"]) == {"dog", "chirping birds"}
    oracle = evaluate_list(truth, mixtures, folder)
    assert oracle["sdri_db"] > 90
    assert oracle["false_extraction_db"] is None


def test_a_separator_of_16_khz_is_measured_at_32(esc50: tuple[Path, Path]) -> None:
    list_path, folder = esc50
    half = Scaled(0.5, labels=("dog", "chirping birds"), sample_rate_hz=16000)
    report = evaluate_list(half, read_list(list_path), folder)
    assert report["sample_rate_hz"] == 32000
    assert report["sdri_db"] == pytest.approx(3.0103, abs=0.05)


def test_without_the_published_files_clips_are_mixed_and_counted(tmp_path: Path, esc50: tuple[Path, Path]) -> None:
    list_path, folder = esc50
    for file in folder.glob("*-0.wav"):
        file.unlink()
    put(folder, "1-100032-A-0.wav", tone(400, duration_s=5.0))
    put(folder, "1-100038-A-14.wav", tone(900, gain=0.01, duration_s=5.0))
    report = evaluate_list(truth, read_list(list_path), folder)
    assert (report["num_mixtures"], report["num_mixed_here"], report["num_failed"]) == (2, 1, 0)


def test_rows_that_cannot_be_evaluated_are_counted_by_reason(tmp_path: Path) -> None:
    clips = {"a": tone(400), "b": tone(900), "hush": np.zeros(8000)}
    for name, samples_T in clips.items():
        put(tmp_path, f"{name}.wav", samples_T)
    (tmp_path / "torn.wav").write_bytes(b"RIFF")
    rows = [
        "a.wav,the sound of dog,b.wav,the sound of rain",
        "gone.wav,the sound of dog,b.wav,the sound of rain",
        "a.wav,the sound of dog,torn.wav,the sound of rain",
        "hush.wav,the sound of dog,b.wav,the sound of rain",
        "a.wav,the sound of whale,b.wav,the sound of rain",
        "../a.wav,the sound of dog,b.wav,the sound of rain",
        "a.wav,the sound of dog, rain,b.wav,the sound of rain",
        "b.wav,the sound of rain,a.wav,the sound of dog",
    ]
    header = "source_file,positive_caption,noise_file,negative_caption"
    mixtures = read_list(written(tmp_path, "\n".join([header, *rows])))
    report = evaluate_list(Scaled(labels=("dog", "rain", "siren")), mixtures, tmp_path)
    assert (report["num_rows"], report["num_mixtures"], report["num_failed"]) == (8, 2, 6)
    assert report["num_failed_by_reason"] == {
        "missing audio": 1,
        "unusable audio": 2,
        "refused by the separator": 1,
        "unusable row": 2,
    }
    assert [failure["row"] for failure in report["failures"]] == [2, 3, 4, 5, 6, 7]
    assert "gone.wav" in report["failures"][0]["message"]
    assert "does not know 'the sound of whale'" in report["failures"][3]["message"]
    assert "must have 4 cells, got 5" in report["failures"][5]["message"]
    assert report["false_extraction_db"] == pytest.approx(0.0, abs=1e-6)


def test_a_source_of_another_length_than_its_mixture_is_a_failure(esc50: tuple[Path, Path]) -> None:
    list_path, folder = esc50
    put(folder, "segment-0.wav", tone(400, duration_s=0.4))
    report = evaluate_list(truth, read_list(list_path), folder)
    assert "got 12800 samples" in report["failures"][0]["message"]
    assert report["num_failed_by_reason"] == {"unusable audio": 1}


def test_all_rows_missing_is_an_error_that_names_the_first(tmp_path: Path, esc50: tuple[Path, Path]) -> None:
    list_path, _ = esc50
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"all 2 rows failed.*segment-0\.wav and mixture-0\.wav"):
        evaluate_list(truth, read_list(list_path), tmp_path / "empty")
    with pytest.raises(ValueError, match="must be in a folder that exists"):
        evaluate_list(truth, read_list(list_path), tmp_path / "nowhere")


# The papers' figures, by hand.


def of_class(label: str, *sdris_db: float) -> list[Scored]:
    return [
        Scored(labels=(label,), stems=({"sdri_db": value, "si_sdr_db": 2 * value},), absent=None) for value in sdris_db
    ]


@pytest.mark.parametrize(
    ("text", "figure_db"),
    [
        (AUDIOSET, (2.0 + 10.0) / 2),
        ("idx,caption,src_wav,noise_wav\n0,tuba,a.wav,b.wav\n", (4.0 + 10.0) / 2),
        (ESC50, (0.0 + 2.0 + 10.0 + 10.0) / 4),
    ],
    ids=["audioset: mean of medians", "music: mean of means", "esc50: mean"],
)
def test_the_figure_of_the_paper(tmp_path: Path, text: str, figure_db: float) -> None:
    """A class of 0, 2 and 10 dB has median 2 and mean 4; the other is 10."""
    figures = paper_figures(read_list(written(tmp_path, text)), [*of_class("a", 0.0, 2.0, 10.0), *of_class("b", 10.0)])
    assert figures["sdri_db"] == pytest.approx(figure_db)
    assert figures["si_sdr_db"] == pytest.approx(2 * figures["sdri_db"])
    low, high = figures["confidence_95"]["sdri_db"]
    assert low < figures["sdri_db"] < high


def test_the_interval_of_class_medians_varies_within_classes_alone(tmp_path: Path) -> None:
    mixtures = read_list(written(tmp_path, AUDIOSET))
    still = paper_figures(mixtures, [*of_class("a", 3.0, 3.0, 3.0), *of_class("b", 9.0, 9.0)])
    assert (still["sdri_db"], still["confidence_95"]["sdri_db"]) == (6.0, [6.0, 6.0])
    alone = paper_figures(mixtures, [*of_class("a", 3.0), *of_class("b", 9.0)])
    assert (alone["sdri_db"], alone["confidence_95"]["sdri_db"]) == (6.0, None)
