"""Files of a tiny CLAPSep with random weights, under the names that its authors' files have."""

import numpy as np
import torch

from engine.separators import save
from engine.separators.clapsep import from_original
from tests.support.models.clap import write_tiny_clap

DEPTHS, HEADS, CHANNELS, WINDOW = (2, 2, 2, 2), 2, 8, 8
MASK_CHANNELS, MASK_DEPTH, MASK_HIDDEN = 16, 2, 24


def tiny_clapsep(*, query_features=1024, rank=2, seed=3):
    """Tensors of a slim CLAPSep file, and of the audio encoder in its CLAP's file."""
    slim = {f"decoder_model.{name}": shape for name, shape in _decoder(query_features).items()}
    for stage, depth in enumerate(DEPTHS):
        wide = CHANNELS << stage
        for block in range(depth):
            for part, num_out in (("qkv", 3 * wide), ("proj", wide)):
                name = f"audio_branch.layers.{stage}.blocks.{block}.attn.{part}"
                slim |= {f"{name}.lora_A": (rank, wide), f"{name}.lora_B": (num_out, rank), f"{name}.bias": (num_out,)}
    clap = {f"module.audio_branch.{name}": shape for name, shape in _encoder().items()}
    generator = np.random.default_rng(seed)
    return tuple({name: _value(name, shape, generator) for name, shape in part.items()} for part in (slim, clap))


def write_tiny_clapsep(folder):
    """Save a tiny CLAPSep with a tiny CLAP of text and audio as the encoder of its queries."""
    fingerprint = write_tiny_clap(folder / "encoder", audio=True)
    queries = {"template": "The sound of {label}", "encoder": "encoder", "encoder_fingerprint": fingerprint}
    save(from_original(*tiny_clapsep()), folder, about={"queries": queries})


def full_clapsep(slim, clap):
    """Tensors of a full file, which has a CLAP for queries and the encoder that separates, and transforms' kernels."""
    copies = {f"clap_model.model.{name.removeprefix('module.')}": value for name, value in clap.items()}
    kernels = {"stft.conv_real.weight": torch.zeros(513, 1, 1024), "istft.ola_window": torch.zeros(1024)}
    return copies | {name.removeprefix("module."): value for name, value in clap.items()} | slim | kernels


def _encoder():
    shapes = {"spectrogram_extractor.stft.conv_real.weight": (513, 1, 1024), "logmel_extractor.melW": (513, 64)}
    shapes |= (
        _batch_norm("bn0", 64) | _linear("patch_embed.proj", (CHANNELS, 1, 4, 4)) | _norm("patch_embed.norm", CHANNELS)
    )
    for stage, depth in enumerate(DEPTHS):
        wide = CHANNELS << stage
        for block in range(depth):
            name = f"layers.{stage}.blocks.{block}"
            shapes |= _block(name, wide, HEADS << stage)
            if block % 2 and stage < 3:
                shapes[f"{name}.attn_mask"] = ((8 >> stage) ** 2, 64, 64)
        if stage < 3:
            name = f"layers.{stage}.downsample"
            shapes |= {f"{name}.reduction.weight": (2 * wide, 4 * wide)} | _norm(f"{name}.norm", 4 * wide)
    return (
        shapes | _norm("norm", 8 * CHANNELS) | _linear("tscam_conv", (5, 8 * CHANNELS, 2, 3)) | _linear("head", (5, 5))
    )


def _decoder(query_features):
    shapes = {}
    for place, stage in enumerate((3, 2, 1, 0)):  # the deepest first
        wide = CHANNELS << stage
        shapes |= _block(f"layers.{place}.blocks.0", wide, HEADS << stage) | _skip(
            f"skip.{place}", wide, query_features
        )
        if place:
            name = f"layers.{place}.downsample"
            shapes |= {f"{name}.expand.weight": (4 * wide, 2 * wide)} | _norm(f"{name}.norm", wide)
    shapes |= _skip("film", 8 * CHANNELS, query_features) | _norm("inverse_patch_embed.norm", CHANNELS)
    shapes |= {"inverse_patch_embed.proj.weight": (CHANNELS, 1, 4, 4), "inverse_patch_embed.proj.bias": (1,)}
    shapes |= (
        _batch_norm("spec_norm", 513) | _linear("mask_net.0", (MASK_CHANNELS, 577)) | _norm("mask_net.1", MASK_CHANNELS)
    )
    for layer in range(MASK_DEPTH):
        name, wide = f"mask_net.2.layers.{layer}", MASK_CHANNELS
        shapes |= {f"{name}.self_attn.in_proj_weight": (3 * wide, wide), f"{name}.self_attn.in_proj_bias": (3 * wide,)}
        shapes |= _linear(f"{name}.self_attn.out_proj", (wide, wide)) | _linear(f"{name}.linear1", (MASK_HIDDEN, wide))
        shapes |= (
            _linear(f"{name}.linear2", (wide, MASK_HIDDEN))
            | _norm(f"{name}.norm1", wide)
            | _norm(f"{name}.norm2", wide)
        )
    return shapes | _linear("mask_net.3", (513, MASK_CHANNELS))


def _block(name, wide, heads):
    shapes = _norm(f"{name}.norm1", wide) | _norm(f"{name}.norm2", wide)
    shapes |= _linear(f"{name}.attn.qkv", (3 * wide, wide)) | _linear(f"{name}.attn.proj", (wide, wide))
    shapes |= {
        f"{name}.attn.relative_position_bias_table": (225, heads),
        f"{name}.attn.relative_position_index": (64, 64),
    }
    return shapes | _linear(f"{name}.mlp.fc1", (4 * wide, wide)) | _linear(f"{name}.mlp.fc2", (wide, 4 * wide))


def _skip(name, wide, query_features):
    shapes = _linear(f"{name}.skip_conv.beta", (wide, query_features)) | _norm(f"{name}.norm", wide)
    return (
        shapes
        | _linear(f"{name}.skip_conv.gamma", (wide, query_features))
        | _linear(f"{name}.feature_proj", (wide, wide))
    )


def _linear(name, shape):
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def _norm(name, wide):
    return {f"{name}.weight": (wide,), f"{name}.bias": (wide,)}


def _batch_norm(name, wide):
    return _norm(name, wide) | {
        f"{name}.running_mean": (wide,),
        f"{name}.running_var": (wide,),
        f"{name}.num_batches_tracked": (),
    }


def _value(name, shape, generator):
    if name.endswith(("num_batches_tracked", "relative_position_index")):
        return torch.zeros(shape, dtype=torch.int64)
    values = generator.uniform(-1.0, 1.0, shape)
    level, spread = (-25.0, 20.0) if ".bn0." in name else (2.0, 6.0)  # decibels of a band, magnitude of a bin
    if name.endswith("running_mean"):
        values = level + values
    elif name.endswith("running_var"):
        values = spread**2 * (1.0 + 0.5 * values)
    elif len(shape) < 2:
        values = 0.1 * values + (name.endswith("weight") or "gamma" in name)
    elif "beta" in name or "gamma" in name or "table" in name:
        values *= 1.5  # on a query of length 1
    else:
        values *= (3.0 / np.prod(shape[1:])) ** 0.5
    return torch.from_numpy(values).float()
