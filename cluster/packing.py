"""Filling a job's working directory: this project's code, the user's modules, and settings for another machine."""

from __future__ import annotations

import importlib.machinery
import os
import re
import shutil
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
_CODE = ("clearsep.py", "engine", "train", "tune", "cluster")
_FACTORY = re.compile(r"""(?:^|[\s='"])([A-Za-z_]\w*)(?:\.\w+)*:[A-Za-z_]\w*['"]?\s*$""", re.MULTILINE)
_IGNORED = shutil.ignore_patterns("__pycache__", ".git", ".venv")


def is_factory(name: str) -> bool:
    """True for the form ``package.module:factory``, in which a separator of the user's own is given."""
    return _FACTORY.fullmatch(name) is not None


def pack(folder: Path, arguments: Sequence[str], *, here: bool) -> list[str]:
    """Fill a job's working directory and return the job's arguments.

    It receives this project's code, the module or package of every ``package.module:factory`` in the arguments or in
    YAML files among them (unless it is installed), and, if the cluster is not ``here``, those YAML files.
    """
    for name in _CODE:
        _copy(_ROOT / name, folder)
    files = {word: Path(word) for word in arguments if Path(word).suffix in (".yaml", ".yml") and Path(word).is_file()}
    for source in _own_modules([*arguments, *(path.read_text(errors="replace") for path in files.values())]):
        _copy(source, folder)
    if here:
        return list(arguments)
    sent: list[str] = []
    for word in arguments:
        if word in files:
            name = f"settings-{len(sent)}-{files[word].name}"
            shutil.copy(word, folder / name)
            sent.append(name)
        else:
            sent.append(word)
    return sent


def _own_modules(texts: Sequence[str]) -> Iterator[Path]:
    """Files and package folders of the factories in some texts that are neither installed nor this project's."""
    names = dict.fromkeys(name for text in texts for name in _FACTORY.findall(text))
    installed = [Path(sysconfig.get_path(kind)).resolve() for kind in ("purelib", "platlib", "stdlib")]
    for name in names:
        spec = importlib.machinery.PathFinder.find_spec(name, [*sys.path, os.getcwd()])
        if spec is None or name in {Path(code).stem for code in _CODE}:
            continue
        if spec.submodule_search_locations:
            sources = [Path(path) for path in spec.submodule_search_locations]
        else:
            sources = [Path(spec.origin)] if spec.has_location and spec.origin else []
        yield from (path for path in sources if not any(path.resolve().is_relative_to(root) for root in installed))


def _copy(source: Path, folder: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, folder / source.name, ignore=_IGNORED, dirs_exist_ok=True)
    else:
        shutil.copy(source, folder / source.name)
