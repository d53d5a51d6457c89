"""A tiny CLAP of random weights, as a folder."""

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from engine.separators.clap import Clap, ClapConfig, read_clap, save_clap

TINY_TEXT = {"text_layers": 2, "text_width": 32, "text_heads": 2, "text_hidden": 64, "vocabulary": 261, "positions": 66}
TINY_AUDIO = {"audio_channels": 8, "audio_heads": 2, **{f"audio_depth_{i}": 1 + (i == 1) for i in (1, 2, 3, 4)}}


def tiny_tokenizer():
    """The content of a tokenizer.json like RoBERTa's, whose tokens are bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *letters, "<mask>"]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, []))
    tokenizer.add_special_tokens([*tokens[:4], AddedToken("<mask>", lstrip=True, special=True)])
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer.to_str()


def tiny_clap(*, audio=False, embedding_width=512, seed=7):
    """Random weights, large enough that texts differ."""
    shape = TINY_TEXT | (TINY_AUDIO if audio else {"audio_channels": 0})
    clap = Clap(ClapConfig(embedding_width=embedding_width, **shape)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in clap.named_parameters():
            spread = 0.1 if parameter.ndim < 2 else parameter.shape[-1] ** -0.5
            mean = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
            parameter.copy_(mean + spread * torch.randn(parameter.shape, generator=generator))
        if audio:
            clap.audio_branch.bn0.running_mean.fill_(-40.0)  # of decibels
            clap.audio_branch.bn0.running_var.fill_(400.0)
            clap.logit_scale_a.fill_(3.0)
    return clap


def write_tiny_clap(folder, *, audio=False, embedding_width=512, seed=7, tokenizer=True):
    """Save :func:`tiny_clap` into a folder, with its tokenizer; returns its fingerprint."""
    clap = tiny_clap(audio=audio, embedding_width=embedding_width, seed=seed)
    save_clap(clap, folder, tokenizer=tiny_tokenizer() if tokenizer else None)
    return read_clap(folder)["fingerprint"]
