"""Separate audio files into stems with the rate, the channels and the length of the file."""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import BinaryIO, TypedDict

from engine.audio.decoder import shared_decoder
from engine.audio.writer import AudioWriter, FileFormat, WavWriter, open_writer
from engine.errors import AudioError
from engine.files.averages import ScoreAverages
from engine.files.best import choose_best
from engine.files.names import HEAD_BYTES, RESIDUAL, STEM_MARK, AudioInput, find_inputs
from engine.files.plan import AnySeparator, SeparationPlan, plan_separation
from engine.files.stream import separated_blocks
from engine.files.targets import OneQuery, Queries, StemQuery, make_targets, with_rivals
from engine.scoring.estimator import SiSdrEstimator
from engine.scoring.scores import Scores
from engine.separators import Separator
from engine.separators.queries import Sounds, as_query
from engine.storage.files import atomic_path, open_binary
from engine.storage.fingerprints import fingerprint
from engine.storage.paths import Location, Name, location

_LOGGER = logging.getLogger(__name__)
Progress = Callable[[float], None]
"""Takes the seconds of the recording that are done."""
OpenWriters = Callable[[int, int], list[AudioWriter]]
"""Takes a recording's rate and number of channels; one writer for each stem, then perhaps one for the residual."""


class FileStem(TypedDict):
    """One stem of one file."""

    source: str
    query: str
    """The query that was used, in words; ``residual`` for the mixture without all stems."""
    path: str
    """The file with the stem."""
    is_new: bool
    """False for a file that was there before, from the same input, query and separator: the rest is then None."""
    duration_s: float | None
    sample_rate_hz: int | None
    num_channels: int | None
    num_clipped: int | None
    """Samples beyond full scale, which FLAC cannot store."""
    scores: Scores | None
    """Columns of ``schema.SCORES``, and with an estimator of ``schema.ESTIMATES``: of the mono stem, means over windows
    of 10 s, but ``stem_level_db`` and ``remix_snr_db`` of the complete file. None for the residual."""


class FileFailure(TypedDict):
    """A file that could not be separated."""

    source: str
    message: str


class FilesSummary(TypedDict):
    """The outcome for all files."""

    stems: list[FileStem]
    failures: list[FileFailure]


def separate_file(
    path: str | os.PathLike[str],
    queries: Queries,
    *,
    separator: AnySeparator | Sequence[AnySeparator],
    out: Name,
    unwanted: Sounds = (),
    file_format: FileFormat = "wav",
    residual: bool = False,
    complete: bool = False,
    estimator: SiSdrEstimator | Name | None = None,
    overwrite: bool = False,
    device: str = "auto",
) -> list[FileStem]:
    """Separate a file of any format, length, rate and number of channels; one file for each query into folder ``out``.

    Stems have the file's rate, channels and number of samples; a stereo image is kept. ``wav`` is float32, ``flac`` has
    24 bits. ``unwanted`` sounds are excluded from every stem, by separators that can. ``residual`` writes the file
    without all stems too. ``complete`` states that the queries are all sounds in the file: each excludes the others, by
    separators that can, and the file is divided among its stems. A stem that is there already is left, if it is of the
    same input, query and separator. Several separators, or a list of queries in place of one, are alternatives: the
    ``estimator`` chooses. Raises ``ValueError`` for a file that cannot be decoded and a query that the separator cannot
    answer.

    >>> (stem,) = cs.separate_file("mixture.wav", "bell", separator="separator", out="stems")
    >>> stem["query"], stem["duration_s"], stem["num_channels"]
    ('bell', 1.0, 1)
    """
    plan = plan_separation(
        make_targets(queries, unwanted=unwanted),
        separator=separator,
        file_format=file_format,
        residual=residual,
        complete=complete,
        estimator=estimator,
        overwrite=overwrite,
        device=device,
    )
    inputs = find_inputs([os.fspath(path)])
    if len(inputs) != 1:
        raise ValueError(f"path must be one file, got {len(inputs)} in {str(path)!r}; call this for each of them")
    return separate_into(inputs[0], plan, location(out))


def separate_files(
    inputs: Iterable[AudioInput],
    plan: SeparationPlan,
    out: Location,
    *,
    on_progress: Callable[[AudioInput, float], None] = lambda source, done_s: None,
) -> FilesSummary:
    """Separate files one after another; one that fails is recorded with its reason, and the others are separated.

    ``on_progress`` takes a file and the seconds of it that are done. Raises ``ValueError`` for an output folder that
    cannot be written.
    """
    inputs = list(inputs)
    _require_writable(out)
    _require_apart(inputs, plan, out)
    stems: list[FileStem] = []
    failures: list[FileFailure] = []
    for one in inputs:
        try:
            stems += separate_into(one, plan, out, on_progress=lambda done_s, one=one: on_progress(one, done_s))  # type: ignore[misc]
        except Exception as error:  # noqa: BLE001 - whatever a decoder, a separator or the disk raises costs this file
            message = (str(error) or type(error).__name__).replace(one.source, one.shown)
            names = (repr(one.shown), repr(str(location(one.shown))))
            _LOGGER.error("%s", message if any(name in message for name in names) else f"{one.shown!r}: {message}")
            failures.append({"source": one.shown, "message": message})
    return {"stems": stems, "failures": failures}


def _require_writable(out: Location) -> None:
    if isinstance(out, Path):
        try:
            out.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=out):
                pass
        except OSError as error:
            raise ValueError(f"cannot write into folder {str(out)!r} ({error}); choose another (-o)") from error


def _require_apart(inputs: Sequence[AudioInput], plan: SeparationPlan, out: Location) -> None:
    """Raise ``ValueError`` if a stem of one input would be written over another input."""
    sources = {str(location(one.source)) for one in inputs}
    targets = [*(target.name for target in plan.targets), *([RESIDUAL] if plan.residual else [])]
    for one in inputs:
        for path in (_path(one, name, plan, out) for name in targets):
            if str(path) in sources:
                raise ValueError(f"a stem must not replace an input, got {str(path)!r}; choose another folder (-o)")


def _path(source: AudioInput, name: str, plan: SeparationPlan, out: Location) -> Location:
    return out / f"{source.name}.{name}.{plan.file_format}"


def separate_into(
    source: AudioInput, plan: SeparationPlan, out: Location, *, on_progress: Progress = lambda done_s: None
) -> list[FileStem]:
    """Separate one file into a folder; stems that are there already, from the same input, are left."""
    outputs = _outputs(source, plan, out)
    missing = [one for one in outputs if plan.overwrite or not one.is_there()]
    needs_others = plan.has_choice or plan.complete
    if missing and not needs_others and all(one.target for one in missing):
        plan = replace(plan, targets=tuple(one.target for one in missing if one.target), residual=False)
        made = missing
    else:
        made = outputs if missing else []
    with ExitStack() as stack:

        def open_writers(sample_rate_hz: int, num_channels: int) -> list[AudioWriter]:
            writers = []
            for one in made:
                is_kept = one in missing
                path = stack.enter_context(atomic_path(one.path)) if is_kept else Path(os.devnull)
                kind = plan.file_format if is_kept else "wav"
                rates = {"sample_rate_hz": sample_rate_hz, "num_channels": num_channels}
                writers.append(open_writer(path, kind, comment=one.mark, **rates))
                stack.enter_context(closing(writers[-1]))
            return writers

        records = separate_stream(source, plan, open_writers, on_progress=on_progress) if made else []
    new = {id(one): record for one, record in zip(made, records, strict=True) if one in missing}
    return [(new.get(id(one)) or _left(source, one)) | {"path": str(one.path)} for one in outputs]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Output:
    """One file that is made of an input."""

    target: StemQuery | None
    """None: the residual."""
    path: Location
    mark: str
    """Comment in the file with what it is made of: a file with the same comment need not be made again."""

    def is_there(self) -> bool:
        """True for a complete stem with the mark. Raises AudioError for another file, which is not to be lost."""
        if not self.path.is_file():
            return False
        with open_binary(self.path) as file:
            head = file.read(HEAD_BYTES)
        if self.mark.encode() not in head:
            raise AudioError(
                f"{str(self.path)!r} must be a stem of the same input, query and separator, got another file of this "
                "name; choose another folder (-o) or replace it (--overwrite)"
            )
        return True


def _outputs(source: AudioInput, plan: SeparationPlan, out: Location) -> list[_Output]:
    everything = [target.identity for target in plan.targets]
    chosen_by = plan.estimator.fingerprint if plan.has_choice and plan.estimator is not None else None
    others: object = [everything, chosen_by] if chosen_by else None  # the choice depends on all targets
    if plan.complete:
        others = [everything, chosen_by, "complete"]
    found = []
    for target in [*plan.targets, *([None] if plan.residual else [])]:
        made_of = [target.identity if target else [everything, RESIDUAL], others]
        name = target.name if target else RESIDUAL
        path = _path(source, name, plan, out)
        mark = f"{STEM_MARK}{fingerprint([source.identity, plan.identity, made_of])}"
        found.append(_Output(target=target, path=path, mark=mark))
    return found


def separate_to_pipe(source: AudioInput, plan: SeparationPlan, pipe: BinaryIO) -> FileStem:
    """Separate one file into one stem, which is written to a pipe as WAV while it is made."""
    (record,) = separate_stream(
        source,
        plan,
        lambda rate_hz, num_channels: [WavWriter(pipe, sample_rate_hz=rate_hz, num_channels=num_channels)],
    )
    return record


def separate_stream(
    source: AudioInput, plan: SeparationPlan, open_writers: OpenWriters, *, on_progress: Progress = lambda done_s: None
) -> list[FileStem]:
    """Separate one recording into open files, block by block; one record for each."""
    separator, queries = _chosen(source, plan)
    blocks = shared_decoder().channels(source.source)
    first = next(blocks)
    rate_hz, num_channels = first.sample_rate_hz, first.samples_TC.shape[1]
    writers = open_writers(rate_hz, num_channels)
    averages = ScoreAverages(len(queries), sample_rate_hz=separator.sample_rate_hz, estimator=plan.estimator)
    num_samples, started_s = 0, time.perf_counter()
    separated = separated_blocks(
        chain([first], blocks),
        separator,
        with_rivals(queries) if plan.complete and getattr(separator, "uses_unwanted", False) else queries,
        divides=plan.complete,
        device=plan.device,
        on_stems=averages.push,
    )
    with closing(separated):
        for channels_CT, stems_QCT in separated:
            for writer, stem_CT in zip(writers, stems_QCT, strict=False):
                writer.write(stem_CT.T)
            if len(writers) > len(queries):
                writers[-1].write((channels_CT - stems_QCT.sum(0)).T)
            num_samples += channels_CT.shape[1]
            on_progress(num_samples / rate_hz)
    duration_s = num_samples / rate_hz
    _LOGGER.info("%s: %.1f s of audio in %.1f s", source.shown, duration_s, time.perf_counter() - started_s)
    texts = [as_query(query).text for query in queries] + [RESIDUAL]
    return [
        {
            "source": source.shown,
            "query": text,
            "path": "-",
            "is_new": True,
            "duration_s": duration_s,
            "sample_rate_hz": rate_hz,
            "num_channels": num_channels,
            "num_clipped": _clipped(writer, source),
            "scores": scores,
        }
        for text, writer, scores in zip(texts, writers, [*averages.scores(), None], strict=False)
    ]


def _chosen(source: AudioInput, plan: SeparationPlan) -> tuple[Separator, list[OneQuery]]:
    if not plan.has_choice:
        return plan.separators[0], [target.alternatives[0] for target in plan.targets]
    assert plan.estimator is not None
    return choose_best(
        source.source, plan.separators, plan.targets, plan.estimator, complete=plan.complete, device=plan.device
    )


def _clipped(writer: AudioWriter, source: AudioInput) -> int:
    if writer.num_clipped:
        _LOGGER.warning(
            "%s: %d samples beyond full scale are clipped in FLAC; --format wav keeps them",
            source.shown,
            writer.num_clipped,
        )
    return writer.num_clipped


def _left(source: AudioInput, output: _Output) -> FileStem:
    return {
        "source": source.shown,
        "query": output.target.text if output.target else RESIDUAL,
        "path": "",
        "is_new": False,
        "duration_s": None,
        "sample_rate_hz": None,
        "num_channels": None,
        "num_clipped": None,
        "scores": None,
    }
