"""Taggers whose weights are on disk: any audio classifier of Hugging Face's transformers, and CLAP.

transformers is an optional dependency (extra ``taggers``) and is imported when an adapter is made. Nothing is
downloaded, no code of a model's folder is run and no pickle is read.

Shape legend: B rows, T samples, C classes of a model, L labels.
"""

from __future__ import annotations

import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor

from engine.errors import nearest
from engine.storage.files import sha256_file
from engine.storage.fingerprints import fingerprint
from engine.taggers.base import checked, find_label

_WINDOW_S = 10.0  # what these models were trained on; longer inputs they cut off, some at random
_LEVEL = 0.1  # RMS that a window is brought to: their features are not free of gain
_LEAST_ENERGY = 1e-9  # of the whole, below which a window is not worth asking about
_LEAST_SHARE = 1e-12


class _WindowTagger(ABC):
    """Tags windows of at most ten seconds and weighs them by their energy."""

    labels: tuple[str, ...]
    sample_rate_hz: int
    fingerprint: str

    @abstractmethod
    def _share(self, window_T: NDArray[np.float32]) -> Tensor:
        """What each label has of one window, ``[L]``."""

    @torch.inference_mode()
    def tag(self, audio_BT: Tensor, *, lengths: Sequence[int] | None = None) -> Tensor:
        """See the protocol; a row is cut into equal windows of 10 s at most, which count by their energy."""
        audio_BT = checked(audio_BT, lengths).cpu()
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
        share_L = torch.zeros(len(self.labels), dtype=torch.float64)
        for window, energy in zip(windows, energies, strict=True):
            if energy > _LEAST_ENERGY * total:
                levelled_T = np.float32(window * (_LEVEL * math.sqrt(len(window) / energy)))
                short = max(0, self.sample_rate_hz - len(window))  # some features need a second's part
                share_L += energy / total * self._share(np.pad(levelled_T, (0, short))).double().cpu()
        return (10.0 * torch.log10(share_L + _LEAST_SHARE)).float()


class HuggingFaceTagger(_WindowTagger):
    """An audio classifier on disk (AST, Wav2Vec2, …) as a :class:`~engine.taggers.base.Tagger`.

    ``label_map`` says which classes of the model a label stands for, ``{"dog": ["Dog", "Bark"]}``; without it the
    labels are the classes. A tag is the share of a label among all classes by softmax, in dB, so a margin is a
    difference of logits. Raises ``ValueError`` for a folder without such a model and classes that it does not have.
    """

    def __init__(
        self,
        folder: str | Path,
        label_map: Mapping[str, str | Sequence[str]] | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        self._model = _model("AutoModelForAudioClassification", folder).to(device)
        self._extract = _opened("AutoFeatureExtractor", folder)
        self.sample_rate_hz = int(self._extract.sampling_rate)
        classes = [self._model.config.id2label[i] for i in range(self._model.config.num_labels)]
        given = label_map if label_map is not None else {name: name for name in classes}
        wanted = {label: [names] if isinstance(names, str) else list(names) for label, names in given.items()}
        self.labels = _labels(wanted)
        self._member_CL = torch.zeros(len(classes), len(wanted), device=device)
        for column, names in enumerate(wanted.values()):
            self._member_CL[_places(names, classes), column] = 1.0
        self.fingerprint = _fingerprint(folder, "audio_classifier", wanted)

    def _share(self, window_T: NDArray[np.float32]) -> Tensor:
        inputs = self._extract(window_T, sampling_rate=self.sample_rate_hz, return_tensors="pt")
        logits_1C: Tensor = self._model(**inputs.to(self._model.device)).logits
        return logits_1C[0].float().softmax(0) @ self._member_CL


class ClapTagger(_WindowTagger):
    """A CLAP model on disk (Wu et al. 2023, arXiv 2211.06687) that compares audio with "The sound of X" of any labels.

    A tag is a label's share of the softmax over ``labels`` of the scaled similarities, in dB. Raises ``ValueError`` for
    a folder without such a model and fewer than two labels.
    """

    def __init__(self, folder: str | Path, labels: Sequence[str], device: str | torch.device = "cpu") -> None:
        self._model = _model("ClapModel", folder).to(device)
        self._process = _opened("ClapProcessor", folder)
        self.sample_rate_hz = int(self._process.feature_extractor.sampling_rate)
        self.labels = _labels(labels)
        prompts = [f"The sound of {label.replace('_', ' ')}" for label in labels]
        self._prompts = self._process.tokenizer(prompts, padding=True, return_tensors="pt").to(device)
        self.fingerprint = _fingerprint(folder, "clap", list(labels))

    def _share(self, window_T: NDArray[np.float32]) -> Tensor:
        inputs = self._process.feature_extractor(window_T, sampling_rate=self.sample_rate_hz, return_tensors="pt")
        result = self._model(**inputs.to(self._model.device), **self._prompts)
        logits_1L: Tensor = result.logits_per_audio
        return logits_1L[0].float().softmax(0)


def _model(kind: str, folder: str | Path) -> Any:  # noqa: ANN401 - a class of an optional library
    """A model with all its weights; what a folder lacks would else be drawn at random."""
    made, report = _opened(kind, folder, use_safetensors=True, output_loading_info=True)
    if report["missing_keys"] or report["mismatched_keys"]:
        lacking = sorted([*report["missing_keys"], *report["mismatched_keys"]], key=str)
        raise ValueError(
            f"{folder} lacks weights of a {kind}, {lacking[0]} for one; give a folder with the whole model"
        )
    return made.eval()


def _opened(kind: str, folder: str | Path, **options: bool) -> Any:  # noqa: ANN401 - a class of an optional library
    """A model or its preparation from files alone."""
    try:
        transformers = importlib.import_module("transformers")
    except ImportError:
        raise ValueError(
            "this tagger needs transformers, which is not installed; pip install 'clearsep-engine[taggers]'"
        ) from None
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"{folder} is not a model's folder: it has no config.json; give a local folder")
    open_from = getattr(transformers, kind).from_pretrained
    try:
        return open_from(str(folder), local_files_only=True, trust_remote_code=False, **options)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(f"{folder} holds no whole {kind} with safetensors weights: {error}") from None


def _labels(labels: Mapping[str, object] | Sequence[str]) -> tuple[str, ...]:
    names = tuple(labels)
    repeated = [name for i, name in enumerate(names) if find_label(name, names) != i]
    if len(names) < 2 or repeated:
        raise ValueError(f"a tagger tells two or more different labels apart, not {names}; give it others")
    return names


def _places(names: Sequence[str], classes: Sequence[str]) -> list[int]:
    unknown = [name for name in names if name not in classes]
    if unknown or not names:
        hint = nearest(unknown[0], classes) if unknown else "name at least one"
        raise ValueError(f"a label stands for classes of the model, not {list(names)}; {hint}")
    return [classes.index(name) for name in names]


def _fingerprint(folder: str | Path, kind: str, choice: object) -> str:
    """Of all weights and settings in the folder and what is asked of them."""
    files = sorted(path for path in Path(folder).iterdir() if path.suffix in (".safetensors", ".json", ".txt"))
    return fingerprint([kind, choice, [(path.name, sha256_file(path)) for path in files]])
