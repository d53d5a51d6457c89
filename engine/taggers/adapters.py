"""Taggers from models on disk: any audio classifier of Hugging Face's transformers, and CLAP.

Nothing is downloaded, no code in a model's folder is run and no pickle is read.

Shape legend: B rows, T samples, L labels, E features of an embedding.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor

from engine.separators.clap import Clap
from engine.separators.clap.htsat import SAMPLE_RATE_HZ
from engine.separators.queries import Embeddings
from engine.storage.files import sha256_file
from engine.storage.fingerprints import fingerprint
from engine.taggers.base import find_label, normalized

_WINDOW_S = 10.0  # the models were trained on 10 s; they cut off longer inputs, some of them at random
_LEVEL = 0.1  # RMS that windows are scaled to, because the models' features depend on the gain
_MIN_ENERGY = 1e-9  # a window with a smaller fraction of the energy is skipped
_MIN_FRACTION = 1e-12  # -120 dB


class _WindowTagger(ABC):
    """Tags windows of at most ten seconds and weights them by their energy."""

    labels: tuple[str, ...]
    sample_rate_hz: int
    fingerprint: str

    @abstractmethod
    def _fractions(self, window_T: NDArray[np.float32]) -> Tensor:
        """Fraction of one window that each label has, ``[L]``."""

    @torch.inference_mode()
    def tag(self, audio_BT: Tensor, *, lengths: Sequence[int] | None = None) -> Tensor:
        """See the protocol; a row is cut into equal windows of at most 10 s, which are weighted by their energy."""
        audio_BT = normalized(audio_BT, lengths).cpu()
        lengths = [audio_BT.shape[1]] * len(audio_BT) if lengths is None else lengths
        rows = [self._tag_row(row_T[:length].numpy()) for row_T, length in zip(audio_BT, lengths, strict=True)]
        return torch.stack(rows) if rows else torch.zeros(0, len(self.labels))

    def _tag_row(self, row_T: NDArray[np.float32]) -> Tensor:
        num_windows = max(1, math.ceil(len(row_T) / (_WINDOW_S * self.sample_rate_hz)))
        windows = np.array_split(row_T, num_windows)
        energies = [float(np.square(window, dtype=np.float64).sum()) for window in windows]
        total = sum(energies)
        if not total:
            return torch.full((len(self.labels),), -10.0 * math.log10(len(self.labels)))
        fraction_L = torch.zeros(len(self.labels), dtype=torch.float64)
        for window, energy in zip(windows, energies, strict=True):
            if energy > _MIN_ENERGY * total:
                scaled_T = np.float32(window * (_LEVEL * math.sqrt(len(window) / energy)))
                short = max(0, self.sample_rate_hz - len(window))  # some features need a second of audio
                fraction_L += energy / total * self._fractions(np.pad(scaled_T, (0, short))).double().cpu()
        return (10.0 * torch.log10(fraction_L + _MIN_FRACTION)).float()


class HuggingFaceTagger(_WindowTagger):
    """An audio classifier on disk (AST, Wav2Vec2, …) as a :class:`~engine.taggers.base.Tagger`; its labels are classes.

    A tag is the softmax of a class among all classes, in dB, so a margin is a difference of logits. Raises
    ``ValueError`` for a folder without such a model.
    """

    def __init__(self, folder: str | Path, device: str | torch.device = "cpu") -> None:
        self._model = _model("AutoModelForAudioClassification", folder).to(device)
        self._extract = _opened("AutoFeatureExtractor", folder)
        self.sample_rate_hz = int(self._extract.sampling_rate)
        self.labels = _labels([self._model.config.id2label[i] for i in range(self._model.config.num_labels)])
        files = sorted(path for path in Path(folder).iterdir() if path.suffix in (".safetensors", ".json", ".txt"))
        self.fingerprint = fingerprint(["audio_classifier", [(path.name, sha256_file(path)) for path in files]])

    def _fractions(self, window_T: NDArray[np.float32]) -> Tensor:
        inputs = self._extract(window_T, sampling_rate=self.sample_rate_hz, return_tensors="pt")
        logits_1L: Tensor = self._model(**inputs.to(self._model.device)).logits
        return logits_1L[0].float().softmax(0)


class ClapTagger(_WindowTagger):
    """A CLAP (Wu et al. 2023, arXiv 2211.06687) that compares audio with the embeddings of labels.

    A tag is the softmax over the labels of the scaled similarities, in dB, so a margin does not depend on other labels.
    Raises ``ValueError`` for fewer than two labels.
    """

    sample_rate_hz = SAMPLE_RATE_HZ

    def __init__(self, clap: Clap, embeddings: Embeddings) -> None:
        """Of ``clap`` the audio encoder is used; ``embeddings`` are those of the labels, by its text encoder."""
        self._clap, self.labels = clap, _labels(embeddings.labels)
        self._scaled_LE = embeddings.vectors_LE * clap.logit_scale_a.detach().exp().cpu()
        self.fingerprint = fingerprint(["clap", embeddings.encoder, self.labels])

    def _fractions(self, window_T: NDArray[np.float32]) -> Tensor:
        embedding_E = self._clap.embed_audio(window_T, sample_rate_hz=self.sample_rate_hz)
        return (self._scaled_LE @ embedding_E).softmax(0)


def _model(kind: str, folder: str | Path) -> Any:  # noqa: ANN401 - any class of the library
    """A model with all its weights; transformers draws missing ones at random, so they are an error here."""
    model, report = _opened(kind, folder, use_safetensors=True, output_loading_info=True)
    missing = sorted([*report["missing_keys"], *report["mismatched_keys"]], key=str)
    if missing:
        raise ValueError(
            f"{folder} must have all weights of a {kind}, got none for {missing[0]}; give a folder with all of them"
        )
    return model.eval()


def _opened(kind: str, folder: str | Path, **options: bool) -> Any:  # noqa: ANN401 - any class of the library
    """A model or its preprocessing, from the files of a folder alone."""
    import transformers  # takes seconds

    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"{folder} must be the folder of a model, got one without config.json; give a local folder")
    open_from = getattr(transformers, kind).from_pretrained
    try:
        return open_from(str(folder), local_files_only=True, trust_remote_code=False, **options)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(
            f"cannot open {folder} as a {kind} ({error}); give a complete folder with safetensors weights"
        ) from None


def _labels(names: Sequence[str]) -> tuple[str, ...]:
    repeated = [name for i, name in enumerate(names) if find_label(name, names) != i]
    if len(names) < 2 or repeated:
        raise ValueError(f"a tagger must have two or more different labels, got {tuple(names)}; give it others")
    return tuple(names)
