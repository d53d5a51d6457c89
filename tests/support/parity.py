"""Callables for the comparison with what the original networks answer to given weights.

Each takes the paths of checkpoint files and one input, and opens the checkpoint once.
"""

import functools

import torch


@functools.cache
def _clap_of_audiosep(path):
    from engine.separators.clap.layout import from_audiosep

    return from_audiosep(torch.load(path, weights_only=True, mmap=True)["state_dict"])


def text(files, ids):
    """The embedding of token ids by the text encoder in an AudioSep checkpoint."""
    return _clap_of_audiosep(files["checkpoint"]).embed_ids([ids.tolist()])[0].numpy()
