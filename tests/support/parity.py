"""Our separators on checkpoint files in the layouts of the originals, for a comparison of what both give."""

import torch

from engine.separators.clapsep import layout as clapsep_layout


def clapsep(files, mixture, query):
    """The stem of a mixture for the decoder's query vector, by CLAPSep's file and its CLAP's."""
    checkpoint, clap = (torch.load(files[name], weights_only=True) for name in ("checkpoint", "clap"))
    separator = clapsep_layout.from_original(_tensors(checkpoint), clap=_tensors(clap))
    mix_BT, query_BQ = torch.from_numpy(mixture)[None], torch.from_numpy(query)[None]
    with torch.inference_mode():
        return separator.separate_chunk(mix_BT, query_BQ, torch.tensor([len(mixture)]))[0].numpy()


def _tensors(content):
    return content.get("state_dict", content)
