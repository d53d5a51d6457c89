"""RoBERTa's tokenizer: found in a folder or in the cache of Hugging Face, never downloaded, and checked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.cli.display import shown
from engine.storage.documents import bounded, parse_json
from engine.storage.files import open_binary
from engine.storage.paths import Location, Name, location

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER = "tokenizer.json"
"""Name of the tokenizer's file in the folder of a CLAP."""
_REPOSITORIES = ("FacebookAI/roberta-base", "roberta-base")
_VOCABULARY, _MERGES = "vocab.json", "merges.txt"
_MAX_BYTES = 1 << 26
_ENDS = [0, 2]  # tokens of RoBERTa around every text
_REMEDY = f"give {TOKENIZER} of {_REPOSITORIES[0]}"


def find_tokenizer(name: Name | None = None) -> str | None:
    """The content of a ``tokenizer.json``, or one made of ``vocab.json`` and ``merges.txt``.

    ``name`` is a file or a folder, and a ``ValueError`` is raised if it has no tokenizer. Without it the cache of
    Hugging Face on this machine is searched for RoBERTa-base; None if it is not there.
    """
    if name is None:
        return next((text for one in _REPOSITORIES if (text := _cached(one)) is not None), None)
    path = location(name)
    text = _read(path) if path.is_file() else _content(path / TOKENIZER, path / _VOCABULARY, path / _MERGES)
    if text is None:
        raise ValueError(f"there is no {TOKENIZER}, nor {_VOCABULARY} and {_MERGES}, in {path}; {_REMEDY}")
    return text


def parse_tokenizer(text: str, *, vocabulary: int, source: object) -> Tokenizer:
    """The tokenizer of a ``tokenizer.json``; ``ValueError`` if it is not RoBERTa's with ``vocabulary`` tokens."""
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # noqa: BLE001 - the library has no narrower one
        raise ValueError(f"cannot read {source} as a tokenizer ({shown(error)}); {_REMEDY}") from None
    size, ends = tokenizer.get_vocab_size(), tokenizer.encode("").ids
    if size != vocabulary or ends != _ENDS:
        raise ValueError(
            f"{source} must have the encoder's {vocabulary:,} tokens and put the tokens {_ENDS} around a text, got "
            f"{size:,} tokens and {ends[:4]}; {_REMEDY}"
        )
    tokenizer.no_padding()
    return tokenizer


def open_tokenizer(folder: Location, *, vocabulary: int, positions: int) -> Tokenizer:
    """The tokenizer of the CLAP in a folder: the folder's own, or that in the cache; ``ValueError`` without both."""
    own = folder / TOKENIZER
    text = _read(own) if own.is_file() else find_tokenizer()
    if text is None:
        raise ValueError(
            f"there is no {TOKENIZER} in {folder}, and {' or '.join(_REPOSITORIES)} is not in the cache of Hugging "
            f"Face; copy {TOKENIZER} of {_REPOSITORIES[0]} into this folder, or convert again with --tokenizer"
        )
    tokenizer = parse_tokenizer(text, vocabulary=vocabulary, source=own if own.is_file() else TOKENIZER)
    tokenizer.enable_truncation(positions - 2)
    return tokenizer


def _cached(repository: str) -> str | None:
    from huggingface_hub import try_to_load_from_cache

    found = [try_to_load_from_cache(repository, name) for name in (TOKENIZER, _VOCABULARY, _MERGES)]
    paths = [location(one) if isinstance(one, str) else None for one in found]
    return _content(*paths)


def _content(tokenizer: Location | None, vocabulary: Location | None, merges: Location | None) -> str | None:
    if tokenizer is not None and tokenizer.is_file():
        return _read(tokenizer)
    if vocabulary is not None and merges is not None and vocabulary.is_file() and merges.is_file():
        return _assembled(vocabulary, merges)
    return None


def _assembled(vocabulary: Location, merges: Location) -> str:
    """The ``tokenizer.json`` of RoBERTa with these tokens and merges."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    try:
        pairs = [line.split(" ") for line in _read(merges).splitlines() if line and not line.startswith("#version")]
        model = models.BPE(parse_json(_read(vocabulary).encode()), [(left, right) for left, right in pairs])
        tokenizer = Tokenizer(model)
        tokenizer.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>", AddedToken("<mask>", lstrip=True, special=True)])
        tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    except Exception as error:  # noqa: BLE001 - the library has no narrower one
        raise ValueError(f"cannot read {vocabulary} and {merges} as a tokenizer ({shown(error)}); {_REMEDY}") from None
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return str(tokenizer.to_str())


def _read(path: Location) -> str:
    try:
        with open_binary(path) as file:
            return bounded(file, _MAX_BYTES).decode()
    except ValueError as error:
        raise ValueError(f"cannot read {path} ({error}); {_REMEDY}") from None
