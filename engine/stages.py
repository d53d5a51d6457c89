"""The three stages of a pass, as callables over Arrow batches that know no Ray: decode, separate, score and write.

A batch has one row, a *part*: some minutes of clips that travel together and end as one stem shard. A part is written
whole or not at all and then recorded as done, so a pass that is started again does only the parts that are missing.
"""

from __future__ import annotations

import functools
import itertools
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from engine.account import STEPS, clips_in, done_records, part_name, part_place, retry_rows, write_done
from engine.assess import Assessor
from engine.audio import MAX_DURATION_S, AudioError
from engine.batched import Asker
from engine.clip_table import Tasks
from engine.decode import cut_rows, decode_rows, parts
from engine.decoder import Decoder
from engine.flac24 import encode_flac24, round_flac24
from engine.retry import retried
from engine.schema import CLIPS, FAILURES, SCORES, DecodedClip, SeparatedClip, failure
from engine.score import score_clip
from engine.separate import separate_clips
from engine.separators import Separator
from engine.shards import write_part
from engine.storage import location
from engine.taggers import Tagger


@dataclass(frozen=True, kw_only=True)
class PassConfig:
    """How a corpus is cut, packed and placed; the first six settings decide what comes out, the rest how fast."""

    clip_s: float = 10.0
    """Longer recordings are cut into clips of this length."""
    min_clip_s: float = 1.0
    """A remainder shorter than this is dropped when a recording is cut."""
    min_labels: int = 2
    """Clips with fewer labels are set aside (and counted): there is nothing to separate them from."""
    reseparate: bool = False
    """Score re-separation too (``engine/reseparate.py``): two forward passes more for each stem."""
    rows_per_task: int = 64
    """Rows of the manifest that one decoding task owns."""
    part_s: float = 320.0
    """Audio of a stem shard, in seconds of mixture: what travels together and is redone together."""
    batch_s: float = 80.0
    """Audio in one call of the separator, in seconds, padding included; one that is too much for its GPU lowers it."""
    min_actors: int | None = None
    """Separator actors to start with; null: all that there is room for."""
    max_actors: int | None = None
    """Separator actors at the most, which Ray adds as work piles up and there is room; null: as many as the GPUs, or
    without any the CPUs, hold that are there when a pass begins. Give a number where nodes are still to come, added
    by hand or by an autoscaler, and ``num_gpus_per_actor`` too where GPUs are: the pass then waits for them."""
    num_gpus_per_actor: float | None = None
    """GPU share of an actor; null: a whole one where the cluster has GPUs when a pass begins."""
    num_cpus_per_actor: float = 0.5
    """CPU share of an actor; below 1 leaves CPUs for reading and writing on small machines."""
    autocast: bool = True
    """Separate in 16 bits on a GPU."""
    decode_limit_s: float = 60.0
    """Decoding of a clip that takes longer is given up: the file is damaged or made to do harm."""
    max_failed_fraction: float = 0.5
    """A pass in which more of the queries fail stops early, with a summary of the reasons; 1 lets all fail."""

    def __post_init__(self) -> None:
        if self.clip_s > MAX_DURATION_S:
            raise ValueError(f"clip_s is {self.clip_s}; clips are held in memory, give {MAX_DURATION_S:g} s at most")
        for name in ("clip_s", "part_s", "batch_s", "rows_per_task", "min_actors", "num_cpus_per_actor"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value}; give a number above 0")
        if not self.decode_limit_s > 0:
            raise ValueError(f"decode_limit_s is {self.decode_limit_s}; give seconds above 0")
        if not 0 <= self.max_failed_fraction <= 1:
            raise ValueError(f"max_failed_fraction is {self.max_failed_fraction}; it is a fraction, 0 to 1")
        if self.max_actors is not None and self.max_actors < (self.min_actors or 1):
            raise ValueError(f"max_actors {self.max_actors} is below min_actors {self.min_actors}; raise it")

    def identity(self) -> dict[str, Any]:
        """The settings that decide what comes out."""
        names = ("clip_s", "min_clip_s", "min_labels", "reseparate", "rows_per_task", "part_s")
        return {name: getattr(self, name) for name in names}


Row = dict[str, Any]

_CLIP = pa.struct([*CLIPS, pa.field("samples", pa.large_binary())])
_EXTRA = pa.struct([SCORES.field(name) for name in ("cycle_si_sdr_db", "rival_leak_db", "tagger_margin_db")])
_SEPARATED = pa.struct(
    [
        *_CLIP,
        pa.field("stem_labels", pa.list_(pa.string())),
        pa.field("stems", pa.large_binary()),
        pa.field("extra", pa.list_(_EXTRA)),
    ]
)


_REPORT = pa.schema(
    [
        *(pa.field(name, pa.int64()) for name in ("num_clips", "num_queries", "num_failed", "num_failed_before")),
        *(pa.field(name, pa.float64()) for name in ("audio_s", *(f"{step}_s" for step in STEPS))),
        pa.field("worker", pa.string()),
        pa.field("batch_fill_fraction", pa.float64()),
        pa.field("vram_bytes", pa.int64()),
        pa.field("failed", pa.list_(pa.struct([FAILURES.field(n) for n in ("step", "error_class", "num_queries")]))),
    ]
)
"""What is told of a part when it is on disk."""


def _row(values: dict[str, Any], clip_type: pa.DataType) -> pa.Table:
    types = {"clips": pa.list_(clip_type), "failures": pa.list_(pa.struct(list(FAILURES)))}
    return pa.table({key: pa.array([value], types.get(key)) for key, value in values.items()})


def _samples(data: bytes) -> np.ndarray:
    return np.frombuffer(data, dtype=np.float32)


def _clip(entry: dict[str, Any]) -> DecodedClip:
    row = {name: entry[name] for name in CLIPS.names}
    return DecodedClip(row=row, samples_T=_samples(entry["samples"]))


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a pass finds its clips and puts what comes of them."""

    root: str
    """Folder or address that relative paths start from."""
    out: str
    """The pass's folder: its clips are in ``corpus/``."""
    sample_rate_hz: int


class Decode:
    """Task: rows of the manifest to parts of decoded clips, one at a time.

    A batch row names a task, a round (0: the first try), in a later round the task's place in its list, and the parts
    of the task that are done already: of this round, and in a later one of all. What they hold is not done again,
    whatever has become of the files since.
    """

    def __init__(self, source: Source, config: PassConfig) -> None:
        self.source, self.config = source, config

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        for entry in batch.to_pylist():
            yield from self._parts(**entry)

    def _parts(self, task: int, round: int, group: int, done: Sequence[str] = ()) -> Iterator[pa.Table]:
        started = time.perf_counter()
        source, config = self.source, self.config
        out = location(source.out)
        decoder = _decoder(config.decode_limit_s)
        mine = [name for name in done if part_place(name)[1] == round]
        others = [name for name in done if part_place(name)[1] != round]
        before = retry_rows(out, round, group) if round else []
        pieces, failures = self._missing(Tasks(out / "corpus").rows(task), before, mine, others, decoder)
        groups = parts(pieces, clip_s=config.clip_s, part_s=config.part_s)
        num_parts = max((record["num_parts"] for record in done_records(out, mine)), default=0)
        groups += [[]] * (num_parts - len(mine) - len(groups))  # files that are shorter by now, or gone
        taken = {part_place(name)[2] for name in mine}
        numbers = (number for number in itertools.count() if number not in taken)
        for number, group_rows in zip(numbers, groups, strict=False):
            clips, failed = decode_rows(
                group_rows,
                root=source.root,
                sample_rate_hz=source.sample_rate_hz,
                clip_s=config.clip_s,
                decoder=decoder,
            )
            less = before if number == 0 else []  # what this round stands in for
            num_queries_before = sum(row["num_queries"] for row in less)
            values = {
                "part": part_name(task, round, number),
                "task": task,
                "round": round,
                "num_parts": len(mine) + len(groups),
                "num_clips": len(group_rows) + len(failures) - len(less),
                "num_queries": sum(len(row["labels"]) for row in group_rows)
                + sum(row["num_queries"] for row in failures)
                - num_queries_before,
                "num_failed_before": num_queries_before,
                "audio_s": sum(len(clip.samples_T) for clip in clips) / source.sample_rate_hz,
                "clips": [{**clip.row, "samples": clip.samples_T.tobytes()} for clip in clips],
                "failures": failed + failures,
                "decode_s": time.perf_counter() - started,
            }
            yield _row(values, _CLIP)
            failures = []  # they are of the first part
            started = time.perf_counter()

    def _missing(
        self, rows: list[Row], before: list[Row], mine: Sequence[str], others: Sequence[str], decoder: Decoder
    ) -> tuple[list[Row], list[Row]]:
        """The clips of a task that no part holds yet, and those that fail as they are cut."""
        out = location(self.source.out)
        held = clips_in(out, mine)
        if not before:
            pieces, failures = self._cut([row for row in rows if row["clip_id"] not in held], decoder)
        else:
            tried = {row["clip_id"] for row in before}
            pieces, failures = self._cut_again(rows, [row for row in before if row["clip_id"] not in held], decoder)
            if any(
                piece["clip_id"] not in tried for piece in pieces
            ):  # a recording that broke off may be there in part
                held |= clips_in(out, others) - tried
        return [piece for piece in pieces if piece["clip_id"] not in held], failures

    def _cut(self, rows: list[Row], decoder: Decoder) -> tuple[list[Row], list[Row]]:
        config = self.config
        return cut_rows(
            rows, root=self.source.root, clip_s=config.clip_s, min_clip_s=config.min_clip_s, decoder=decoder
        )

    def _cut_again(self, rows: list[Row], before: list[Row], decoder: Decoder) -> tuple[list[Row], list[Row]]:
        """The clips of a task that failed before, and those of them that fail as they are cut."""
        wanted = {row["clip_id"]: row for row in before}
        paths = {row["path"] for row in before}
        pieces: list[Row] = []
        failures: list[Row] = []
        unreadable: dict[str, Row] = {}
        for row in (row for row in rows if row["path"] in paths):
            cut, failed = self._cut([row], decoder)
            unreadable |= {entry["path"]: entry for entry in failed}
            if wanted.pop(row["clip_id"], None):  # the file itself could not be read, or it is one clip
                pieces += cut
                failures += failed
            else:
                pieces += [piece for piece in cut if wanted.pop(piece["clip_id"], None)]
        for row in wanted.values():  # pieces that their files do not have any more
            same = {name: row[name] for name in ("clip_id", "path", "num_queries")}
            error = AudioError("its file is of another length by now and has no such clip: start a new pass")
            lost = failure(**same, step="decode", error=error)
            failures.append(unreadable.get(row["path"], lost) | same)
        return pieces, failures


@functools.lru_cache(maxsize=1)
def _decoder(limit_s: float) -> Decoder:
    """This process's decoder."""
    return Decoder(time_limit_s=limit_s)


class Separate:
    """Actor: holds one separator, and a tagger where there is one, and turns parts of decoded clips into stems."""

    def __init__(
        self,
        open_separator: Callable[[str], Separator],
        config: PassConfig,
        on_gpu: bool,
        open_tagger: Callable[[str], Tagger] | None = None,
    ) -> None:
        torch.set_num_threads(max(1, int(config.num_cpus_per_actor)))
        self.device = "cuda" if on_gpu else "cpu"
        self.separator = open_separator(self.device)
        autocast = config.autocast and on_gpu
        asker = Asker(separator=self.separator, batch_s=config.batch_s, device=self.device, autocast=autocast)
        tagger = open_tagger(self.device) if open_tagger is not None else None
        self.assessor = Assessor(asker=asker, tagger=tagger, reseparate=config.reseparate)

    def __call__(self, batch: pa.Table) -> pa.Table:
        part = self.separate(batch.to_pylist()[0])
        part["clips"] = [
            {
                **item.clip.row,
                "samples": item.clip.samples_T.tobytes(),
                "stem_labels": item.labels,
                "stems": np.ascontiguousarray(item.stems_ST, dtype=np.float32).tobytes(),
                "extra": [dict(row) for row in item.extra],
            }
            for item in part["clips"]
        ]
        return _row(part, _SEPARATED)

    def separate(self, part: dict[str, Any]) -> dict[str, Any]:
        """The part with its clips as :class:`SeparatedClip`."""
        started = time.perf_counter()
        clips = [_clip(entry) for entry in part["clips"]]
        separated, failures = separate_clips(clips, self.assessor.asker)
        part["failures"] += failures
        part["separate_s"] = time.perf_counter() - started
        started = time.perf_counter()
        extra = self.assessor.extra(separated)
        part["clips"] = [replace(item, extra=rows) for item, rows in zip(separated, extra, strict=True)]
        part["assess_s"] = time.perf_counter() - started
        part |= self._about(clips)
        return part

    def _about(self, clips: list[DecodedClip]) -> dict[str, Any]:
        """Which worker this is, and how well its batches and its memory are used."""
        place, vram_bytes = "cpu", 0
        if self.device == "cuda" and torch.cuda.is_available():  # tests have GPUs that only Ray believes in
            place, vram_bytes = f"gpu{os.environ.get('CUDA_VISIBLE_DEVICES', '')}", torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        sizes = [len(clip.samples_T) for clip in clips for _ in clip.row["labels"]]
        return {
            "worker": f"{socket.gethostname()}/{place}",
            "batch_fill_fraction": self.assessor.asker.fill_fraction(sizes),
            "vram_bytes": vram_bytes,
        }


def _separated(entry: dict[str, Any]) -> SeparatedClip:
    labels = entry["stem_labels"]
    stems_ST = _samples(entry["stems"]).reshape(len(labels), -1)
    return SeparatedClip(clip=_clip(entry), labels=labels, stems_ST=stems_ST, extra=entry["extra"])


def _unscored(item: SeparatedClip, error: Exception) -> dict[str, Any]:
    row, num_queries = item.clip.row, len(item.labels)
    return failure(clip_id=row["clip_id"], path=row["path"], num_queries=num_queries, step="score", error=error)


def _by_reason(failures: list[dict[str, Any]]) -> list[dict[str, Any]]:
    numbers: Counter[tuple[str, str]] = Counter()
    for row in failures:
        numbers[row["step"], row["error_class"]] += row["num_queries"]
    return [
        {"step": step, "error_class": error_class, "num_queries": number}
        for (step, error_class), number in sorted(numbers.items())
    ]


class ScoreAndWrite:
    """Task: stores the stems of a part, scores what is stored, writes the shard and then the record that it is done."""

    def __init__(self, out: str, sample_rate_hz: int) -> None:
        self.out, self.sample_rate_hz = location(out), sample_rate_hz

    def __call__(self, batch: pa.Table) -> pa.Table:
        torch.set_num_threads(1)
        part = batch.to_pylist()[0]
        part["clips"] = [_separated(entry) for entry in part["clips"]]
        return self.write(part)

    def write(self, part: dict[str, Any]) -> pa.Table:
        """What became of a part, once it is on disk."""
        name, clips, failures = part.pop("part"), part.pop("clips"), part.pop("failures")
        about = {key: part.pop(key) for key in ("worker", "batch_fill_fraction", "vram_bytes")}
        started = time.perf_counter()
        stems: list[dict[str, Any]] = []  # those of a clip one after another
        part["score_s"] = 0.0
        for item in clips:
            try:
                audio = self._encode(item)
                encoded = time.perf_counter()
                stems.extend(self._score(item, audio))
                part["score_s"] += time.perf_counter() - encoded
            except (ValueError, RuntimeError) as error:
                failures.append(_unscored(item, error))
        written = retried(functools.partial(write_part, self.out, name, stems=stems, failures=failures))
        before = {"num_failed_before": part.pop("num_failed_before")}
        written["num_failed"] -= before["num_failed_before"]
        part["write_s"] = time.perf_counter() - started - part["score_s"]
        write_done(self.out, name, part | written)
        told = part | written | before | about | {"failed": _by_reason(failures)}
        return pa.table({field.name: pa.array([told[field.name]], field.type) for field in _REPORT})

    def _encode(self, item: SeparatedClip) -> list[dict[str, Any]]:
        signals = (item.clip.samples_T, *item.stems_ST)
        mixture, *coded = (encode_flac24(signal_T, sample_rate_hz=self.sample_rate_hz) for signal_T in signals)
        audio: list[dict[str, Any]] = [{"audio_flac": data, "audio_exponent": exponent} for data, exponent in coded]
        audio[0] |= {"mixture_flac": mixture[0], "mixture_exponent": mixture[1]}
        return audio

    def _score(self, item: SeparatedClip, audio: list[dict[str, Any]]) -> list[dict[str, Any]]:
        stored_ST = np.stack([round_flac24(stem_T) for stem_T in item.stems_ST])
        scores = score_clip(
            mixture_T=torch.from_numpy(item.clip.samples_T.copy()),
            stems_ST=torch.from_numpy(stored_ST),
            sample_rate_hz=self.sample_rate_hz,
        )
        common = {
            **item.clip.row,
            "sample_rate_hz": self.sample_rate_hz,
            "num_samples": len(item.clip.samples_T),
        }
        extra = item.extra or [{}] * len(item.labels)
        return [
            {**common, "label": label, **entry, **score, **more}
            for label, entry, score, more in zip(item.labels, audio, scores, extra, strict=True)
        ]


class SeparateScoreAndWrite:
    """Actor: both of these in one process, where separating is CPU work too, so that no stem travels."""

    def __init__(
        self,
        open_separator: Callable[[str], Separator],
        config: PassConfig,
        out: str,
        sample_rate_hz: int,
        open_tagger: Callable[[str], Tagger] | None = None,
    ) -> None:
        self.first = Separate(open_separator, config, False, open_tagger)
        self.then = ScoreAndWrite(out, sample_rate_hz)

    def __call__(self, batch: pa.Table) -> pa.Table:
        return self.then.write(self.first.separate(batch.to_pylist()[0]))
