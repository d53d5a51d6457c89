"""A separator as an ONNX file, waveform in and waveform out, compared with torch before it is kept.

Shape legend: B batch (1), T samples, Q query features, L labels.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import TypedDict

from engine.separators.base import NetworkSeparator
from engine.separators.checkpoint import open_checkpoint, read_description
from engine.separators.exports.hub import require_folder
from engine.separators.exports.transforms import real_transforms
from engine.storage.files import read_json, sha256_file, write_bytes, write_json
from engine.storage.paths import Location, Name, location

MIN_SNR_DB = 60.0
"""Signal-to-noise ratio of the file's stems, with torch's as reference, that a file must have to be kept."""
_OPSET, _MAX_SAMPLES = 18, 1 << 24


class OnnxRecord(TypedDict):
    """The content of the JSON file next to an ONNX file: all that a program needs to use it without torch."""

    separator: str
    """Fingerprint of the separator."""
    sample_rate_hz: int
    num_samples: int
    """Length of the input ``mixture``, ``[1, num_samples]``, and of the output ``stem``."""
    query_features: int
    """Length of the input ``query``, ``[1, query_features]``."""
    queries: dict[str, list[float]]
    """Vectors of labels and texts."""
    snr_db: float
    """Lowest signal-to-noise ratio of the file's stems of noise and tones, with torch's as reference."""
    onnx_sha256: str


class _Graph(nn.Module):
    def __init__(self, separator: NetworkSeparator) -> None:
        super().__init__()
        self.separator = separator

    def forward(self, mixture: Tensor, query: Tensor) -> Tensor:
        return self.separator.separate_unpadded(mixture, query)


def export_onnx(
    name: Name, out: Name, *, chunk_s: float | None = None, queries: Sequence[str] | None = None
) -> OnnxRecord:
    """Write a separator as the ONNX file ``out``, with a JSON file next to it; returns the content of the latter.

    The file separates mixtures of ``chunk_s`` seconds, by default the chunks in which the separator cuts long ones.
    The JSON file has the vectors of ``queries``, by default of the labels that the separator knows. The file is kept
    only if onnxruntime separates noise and tones as torch does (:data:`MIN_SNR_DB`). Raises ``ValueError`` if not, or
    if the packages of the extra ``export`` are missing.
    """
    onnx, runtime = (_require_package(package) for package in ("onnx", "onnxruntime"))
    _require_package("onnxscript")
    folder, out = require_folder(name), location(out)
    fingerprint = read_description(folder)["fingerprint"]
    record = _require_file(out, fingerprint)
    separator = open_checkpoint(folder)
    chunk_s = separator.chunk_s if chunk_s is None else chunk_s
    if not 1.0 <= chunk_s * separator.sample_rate_hz <= _MAX_SAMPLES:
        raise ValueError(
            f"chunk_s must have from 1 to {_MAX_SAMPLES:,} samples at {separator.sample_rate_hz} Hz, got {chunk_s}; "
            "give a length such as 10"
        )
    num_samples = round(chunk_s * separator.sample_rate_hz)
    names = list(separator.labels if queries is None else queries)
    with torch.inference_mode():
        vectors_LQ = separator.encode(names) if names else torch.zeros(0, separator.config.query_features)
    query_BQ = vectors_LQ[:1].clone() if names else nn.functional.normalize(torch.ones(1, vectors_LQ.shape[1]), dim=1)
    data = _convert(separator, torch.zeros(1, num_samples), query_BQ, onnx, folder)
    snr_db = _compare(separator, data, num_samples, query_BQ, runtime)
    if not snr_db >= MIN_SNR_DB:
        raise ValueError(
            f"the ONNX file of {folder} must separate like torch (SNR of {MIN_SNR_DB:g} dB or more), got "
            f"{snr_db:.1f} dB; use the separator's folder (--format hub)"
        )
    write_bytes(out, data)
    write_json(
        record,
        made := OnnxRecord(
            separator=fingerprint,
            sample_rate_hz=separator.sample_rate_hz,
            num_samples=num_samples,
            query_features=query_BQ.shape[1],
            queries=dict(zip(names, vectors_LQ.tolist(), strict=True)),
            snr_db=snr_db,
            onnx_sha256=sha256_file(out),
        ),
    )
    return made


def _require_package(name: str) -> Any:  # noqa: ANN401 - a module
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"cannot export to ONNX without the package {name} ({error}); install it with `pip install "
            "'clearsep-engine[export]'`"
        ) from None


def _require_file(out: Location, fingerprint: str) -> Location:
    """The JSON file next to an ONNX file; ``ValueError`` if another separator's is there."""
    if out.suffix != ".onnx" or out.is_dir():
        raise ValueError(f"the output of --format onnx must be a file that ends in .onnx, got {out}; rename it")
    record = out.parent / f"{out.stem}.json"
    found = read_json(record, remedy="give another file") if record.is_file() else None
    if record.is_file() or out.is_file():
        if not isinstance(found, dict) or found.get("separator") != fingerprint:
            raise ValueError(f"{out} must be a new file or one of the same separator, got another; give another name")
    return record


def _convert(separator: NetworkSeparator, mix_BT: Tensor, query_BQ: Tensor, onnx: Any, folder: Location) -> bytes:  # noqa: ANN401 - a module
    """The bytes of the ONNX file, without the names of this machine's folders that torch leaves in it."""
    try:
        with real_transforms(), _quiet(), torch.no_grad():
            exported = torch.export.export(_Graph(separator).eval(), (mix_BT, query_BQ))
            program = torch.onnx.export(
                exported,
                dynamo=True,
                verbose=False,
                opset_version=_OPSET,
                input_names=["mixture", "query"],
                output_names=["stem"],
            )
        assert program is not None
        model = program.model_proto
        for part in (model.graph, *model.functions):
            for node in part.node:
                node.ClearField("metadata_props")
                node.ClearField("doc_string")
            part.ClearField("metadata_props")
        onnx.checker.check_model(model)
        return bytes(model.SerializeToString())
    except Exception as error:  # torch raises errors of many classes
        cause = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ValueError(
            f"cannot convert the separator in {folder} to ONNX ({cause}); use the separator's folder (--format hub)"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's notes on its progress, and on packages that are not needed, from the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _compare(separator: NetworkSeparator, data: bytes, num_samples: int, query_BQ: Tensor, runtime: Any) -> float:  # noqa: ANN401 - a module
    """Lowest SNR in dB of the file's stems of noise and of tones, with torch's stems as reference."""
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    session = runtime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    times_T = np.arange(num_samples) / separator.sample_rate_hz
    noise_T = 0.1 * np.random.default_rng(0).standard_normal(num_samples)
    tones_T = sum(0.1 * np.sin(2 * np.pi * hz * times_T) for hz in (110.0, 440.0, 1870.0))
    lowest_db = math.inf
    for mix_T in (noise_T, tones_T):
        mix_BT = torch.from_numpy(np.asarray(mix_T, np.float32)[None])
        with torch.inference_mode():
            wanted_BT = separator.separate_unpadded(mix_BT, query_BQ).double().numpy()
        (stem_BT,) = session.run(None, {"mixture": mix_BT.numpy(), "query": query_BQ.numpy()})
        noise = float(np.square(stem_BT - wanted_BT).sum())
        lowest_db = min(lowest_db, 10.0 * math.log10((float(np.square(wanted_BT).sum()) + 1e-30) / (noise + 1e-30)))
    return lowest_db
