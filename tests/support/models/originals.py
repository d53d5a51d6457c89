"""Small checkpoint files of random weights as AudioSep, CLAPSep and CLAP release theirs; they separate in no time."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.support.models.clap import tiny_clap, tiny_tokenizer
from tests.support.models.clapsep import CHANNELS, tiny_clapsep
from tests.support.models.layouts import AUDIOSEP_FEATURES, audiosep_tensors

EMBEDDING = AUDIOSEP_FEATURES
"""Features of an embedding of every encoder here, so that a student can learn from any of them."""


def clap_tensors(*, audio: bool = True) -> dict[str, Tensor]:
    """A CLAP under LAION's names, without ``module.``."""
    tensors = tiny_clap(embedding_width=EMBEDDING).state_dict()
    if not audio:
        return tensors
    generator = torch.Generator().manual_seed(4)
    for number, width in ((0, 8 * CHANNELS), (2, EMBEDDING)):
        tensors[f"audio_projection.{number}.weight"] = torch.randn(EMBEDDING, width, generator=generator)
        tensors[f"audio_projection.{number}.bias"] = torch.randn(EMBEDDING, generator=generator)
    scales = {"logit_scale_a": torch.tensor(3.0), "logit_scale_t": torch.tensor(3.0)}
    branch = {name.removeprefix("module."): value for name, value in tiny_clapsep()[1].items()}
    return tensors | scales | branch


def write_clap(path: Path, *, audio: bool = True) -> Path:
    """A file as LAION's: the prefix of parallel training, protocol 4, numpy's scalars."""
    tensors = {f"module.{name}": value for name, value in clap_tensors(audio=audio).items()}
    content = {"epoch": np.int64(15), "name": "tiny", "loss": np.float64(0.5), "state_dict": tensors}
    torch.save(content, path, pickle_protocol=4)
    return path


def write_audiosep(path: Path, *, text: bool = True, dtype: torch.dtype = torch.float32) -> Path:
    """A file as AudioSep's: Lightning's entries, the separator and its CLAP."""
    tensors = audiosep_tensors()
    if text:
        tensors |= {f"query_encoder.model.{name}": value for name, value in clap_tensors().items()}
        tensors["query_encoder.model.text_branch.embeddings.position_ids"] = torch.arange(66)[None]
    tensors = {name: value.to(dtype) if value.is_floating_point() else value for name, value in tensors.items()}
    torch.save({"epoch": 0, "pytorch-lightning_version": "2.0.0", "state_dict": tensors, "optimizer_states": []}, path)
    return path


def write_clapsep(path: Path, clap_path: Path) -> Path:
    """A slim file as CLAPSep's, which is a flat mapping, and the file of its CLAP."""
    torch.save(tiny_clapsep(query_features=2 * EMBEDDING)[0], path)
    write_clap(clap_path)
    return path


def write_full_clapsep(path: Path) -> Path:
    """A file with all tensors of CLAPSep's training class: the CLAP of the queries, and the encoder that separates."""
    slim, _ = tiny_clapsep(query_features=2 * EMBEDDING)
    clap = clap_tensors()
    copies = {f"clap_model.model.{name}": value for name, value in clap.items()}
    branch = {name: value for name, value in clap.items() if name.startswith("audio_branch.")}
    torch.save({"state_dict": copies | branch | slim | {"stft.conv_real.weight": torch.zeros(513, 1, 1024)}}, path)
    return path


def write_hugging_face_clap(folder: Path, *, tokenizer: bool = True) -> Path:
    """A folder of Hugging Face with a ``ClapModel``."""
    from transformers import ClapConfig, ClapModel

    torch.manual_seed(5)
    tower = {"projection_dim": EMBEDDING, "hidden_size": 32, "num_attention_heads": 2}
    text = tower | {"vocab_size": 261, "num_hidden_layers": 2, "intermediate_size": 64, "max_position_embeddings": 66}
    audio = tower | {"hidden_size": 64, "patch_embeds_hidden_size": 8, "depths": [1, 1, 1, 1]}
    audio |= {"num_attention_heads": [2, 4, 8, 16], "num_hidden_layers": 4, "enable_fusion": False}
    config = ClapConfig(text_config=text, audio_config=audio, projection_dim=EMBEDDING)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict(), default=str))
    save_file(
        {name: value.contiguous() for name, value in ClapModel(config).state_dict().items()},
        folder / "model.safetensors",
    )
    if tokenizer:
        write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> Path:
    """A folder with the ``tokenizer.json`` of these encoders."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tiny_tokenizer())
    return folder
