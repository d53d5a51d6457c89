"""The layout of AudioSep's released files: Lightning's, and flat copies of it.

Names of tensors and their use are facts of github.com/Audio-AGI/AudioSep at commit 944583f. A file has more than
separation needs: kernels of the short-time Fourier transform, one normalisation and one shift by the query in each
decoder that nothing uses, and the text encoder (``query_encoder.*``), which :mod:`engine.separators.clap` reads.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from engine.separators.audiosep.network import AudioSepConfig, Pointwise, ResUNet, ShiftedNorm
from engine.separators.audiosep.separator import AudioSep
from engine.separators.convert.keys import require_tensors

_PREFIX = "ss_model."  # of Lightning's names
_IGNORED = re.compile(r"query_encoder\.|(ss_model\.)?base\.(i?stft\.|([\w.]+\.)?bn[012]\.num_batches_tracked$)")
_EPSILON = 1e-5  # of the batch normalisation
_ORIGINAL = (  # how a module's name begins here and there, where blocks are counted from 1
    (r"encoders\.(\d)\.", "encoder_block{}.conv_block1."),
    (r"bottom\.()", "conv_block7a.conv_block1."),
    (r"decoders\.(\d)\.block\.", "decoder_block{}.conv_block2."),
    (r"decoders\.(\d)\.up", "decoder_block{}.conv1"),
    (r"decoders\.(\d)\.norm", "decoder_block{}.bn1"),
    (r"inward()", "pre_conv"),
    (r"outward()", "after_conv"),
)


def recognises(names: Collection[str]) -> bool:
    """True for the names of an AudioSep checkpoint's tensors, with Lightning's prefix or without."""
    marks = ("base.pre_conv.weight", "film.conv_block7a->conv_block1->beta1.weight")
    return any({prefix + mark for mark in marks} <= {*names} for prefix in (_PREFIX, ""))


def from_original(tensors: Mapping[str, Tensor]) -> AudioSep:
    """The separator of an original checkpoint of any widths; ``ValueError`` that lists the tensors that do not fit."""
    prefix = _PREFIX if any(name.startswith(_PREFIX) for name in tensors) else ""
    with torch.device("meta"):  # takes no memory
        separator = AudioSep(_config(tensors, prefix))
    wanted = {prefix + name: shape for name, shape in _shapes(separator.network)}
    found = require_tensors(
        tensors, wanted, ignored=lambda name: bool(_IGNORED.match(name)), what="an AudioSep checkpoint"
    )
    exact = {name.removeprefix(prefix): tensor.double() for name, tensor in found.items()}
    values = {name: value.float() for name, value in _values(separator.network, exact)}
    separator.network.load_state_dict(values, assign=True)
    return separator.eval()


def _config(tensors: Mapping[str, Tensor], prefix: str) -> AudioSepConfig:
    """The config that the shapes of tensors imply; the step between frames, which is in no file, is to scale."""
    usual = AudioSepConfig()

    def size(name: str, axis: int, otherwise: int) -> int:
        shape = tensors[prefix + name].shape if prefix + name in tensors else ()
        return shape[axis] if len(shape) > axis else otherwise

    num_fft = 2 * (size("base.bn0.weight", 0, usual.num_fft // 2 + 1) - 1)
    names = ("base.pre_conv.weight", *(f"base.encoder_block{k}.conv_block1.conv1.weight" for k in range(1, 7)))
    widths = [size(name, 0, width) for name, width in zip(names, usual.widths, strict=True)]
    return AudioSepConfig(
        num_fft=num_fft,
        hop_samples=max(1, num_fft * usual.hop_samples // usual.num_fft),
        query_features=size("film.conv_block7a->conv_block1->beta1.weight", 1, usual.query_features),
        **{f"width_{level}": width for level, width in enumerate(widths)},
    )


def _modules(network: ResUNet) -> Iterator[tuple[str, str, nn.Module]]:
    """Name here, name there and module of everything with weights."""
    for name, module in network.named_modules():
        if isinstance(module, ShiftedNorm | Pointwise | nn.Conv2d | nn.ConvTranspose2d):
            yield name, _original(name), module


def _original(name: str) -> str:
    for pattern, there in _ORIGINAL:
        if found := re.match(pattern, name):
            return there.format(int(found[1]) + 1 if found[1] else "") + name[found.end() :].replace("norm", "bn")
    raise AssertionError(name)


def _shapes(network: ResUNet) -> Iterator[tuple[str, Sequence[int]]]:
    """Original name and shape of every tensor that a file must have, used or not."""
    yield from _norm_shapes("base.bn0", len(network.scale_F))
    for _, original, module in _modules(network):
        if isinstance(module, ShiftedNorm):
            unused = (
                [original.replace("bn1", "bn2")] if original.startswith("decoder") and "conv" not in original else []
            )
            for norm in (original, *unused):
                yield from _norm_shapes(f"base.{norm}", len(module.scale_C))
                yield f"{_film(norm)}.weight", module.shift.weight.shape
                yield f"{_film(norm)}.bias", module.shift.bias.shape
        else:
            kernel = (1, 1) if isinstance(module, Pointwise) else ()
            for key, one in module.named_parameters():
                yield f"base.{original}.{key}", (*one.shape, *(kernel if key == "weight" else ()))


def _norm_shapes(norm: str, channels: int) -> Iterator[tuple[str, Sequence[int]]]:
    for key in ("weight", "bias", "running_mean", "running_var"):
        yield f"{norm}.{key}", (channels,)


def _values(network: ResUNet, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The network's state, of original tensors without prefix."""
    scale_F, shift_F = _scale_and_shift(tensors, "base.bn0")
    yield from (("scale_F", scale_F), ("shift_F", shift_F))
    for name, original, module in _modules(network):
        if isinstance(module, ShiftedNorm):
            scale_C, shift_C = _scale_and_shift(tensors, f"base.{original}")
            yield f"{name}.scale_C", scale_C
            yield f"{name}.shift.weight", tensors[f"{_film(original)}.weight"]
            yield f"{name}.shift.bias", tensors[f"{_film(original)}.bias"] + shift_C
        else:
            for key, one in module.named_parameters():
                yield f"{name}.{key}", tensors[f"base.{original}.{key}"].reshape(one.shape)


def _scale_and_shift(tensors: Mapping[str, Tensor], norm: str) -> tuple[Tensor, Tensor]:
    """Batch normalisation in evaluation, as a factor and a summand of each channel."""
    scale_C = tensors[f"{norm}.weight"] / (tensors[f"{norm}.running_var"] + _EPSILON).sqrt()
    return scale_C, tensors[f"{norm}.bias"] - tensors[f"{norm}.running_mean"] * scale_C


def _film(norm: str) -> str:
    """Original name of the shift by the query that follows a normalisation."""
    return "film." + norm.replace(".", "->").replace("bn", "beta")
