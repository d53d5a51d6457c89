"""Step 1 of a pass: cut the recordings of a task into clips and decode them, one shard at a time.

Lengths alone decide how a recording is cut, so memory stays bounded by one shard of samples.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence

import pyarrow as pa

from engine.audio.decoder import Decoder, shared_decoder
from engine.audio.levels import SILENCE_DBFS, is_silent
from engine.audio.sndfile import Samples
from engine.corpus.audioset import located
from engine.corpus.clips import cut
from engine.corpus.roots import Root, resolve
from engine.errors import AudioError, DecodeError, SilentError, WorkerDiedError
from engine.passes.config import PassConfig
from engine.passes.records import clips_in, done_names, parse_shard_name, shard_name, shard_records
from engine.passes.tasks import TaskRow, Tasks
from engine.passes.transport import Counts, DecodedShard, pack
from engine.schema import ClipRow, DecodedClip, FailureRow, clip_columns, failure
from engine.storage.in_hand import InHand
from engine.storage.paths import location
from engine.storage.retry import retried

_ROUNDING_S = 1e-6


def cut_rows(
    rows: Sequence[Mapping[str, object]], *, root: str, clip_s: float, min_clip_s: float, decoder: Decoder
) -> tuple[list[ClipRow], list[FailureRow]]:
    """Cut rows into clips no longer than ``clip_s``, by the lengths of their files; unreadable files are failures.

    A row whose ``is_cut`` is true is a clip of an earlier cut: it stays as it is, and fails if its file has become
    shorter.
    """
    clips: list[ClipRow] = []
    failures: list[FailureRow] = []
    for row in rows:
        is_cut = bool(row.get("is_cut"))
        try:
            path = retried(functools.partial(resolve, root, str(row["path"])))
            duration_s = decoder.probe(path).duration_s
            clip = clip_columns(row)
            if is_cut:
                _require_same_length(clip, duration_s)
                clips.append(clip)
            else:
                if isinstance(root, Root) and root.is_audioset:
                    clip = located(clip, duration_s=duration_s)
                clips += cut(clip, duration_s=duration_s, clip_s=clip_s, min_clip_s=min_clip_s)
        except Exception as error:  # noqa: BLE001 - whatever goes wrong with a file costs this file
            failures.append(failure(row, step="decode", error=error, is_cut=is_cut))
    return clips, failures


def _require_same_length(clip: ClipRow, duration_s: float) -> None:
    if clip["end_s"] is not None and clip["end_s"] > duration_s + _ROUNDING_S:
        raise AudioError(
            f"cannot find the clip from {clip['start_s'] or 0.0:g} s to {clip['end_s']:g} s in {clip['path']!r} (the "
            f"file is of another length by now, {duration_s:g} s); restore the file, or start a new pass"
        )


def decode_rows(
    rows: Sequence[ClipRow], *, root: str, sample_rate_hz: int, clip_s: float, decoder: Decoder
) -> tuple[list[DecodedClip], list[FailureRow]]:
    """Decode clips to mono; a clip that cannot be decoded or is silent is a failure.

    A file that takes too long is tried once: its other clips among ``rows`` fail with the same error.
    """
    clips: list[DecodedClip] = []
    failures: list[FailureRow] = []
    slow: dict[str, AudioError] = {}
    for row in rows:
        start_s = row["start_s"] or 0.0
        duration_s = clip_s if row["end_s"] is None else min(row["end_s"] - start_s, clip_s)
        try:
            path = retried(functools.partial(resolve, root, row["path"]))
            if path in slow:
                raise slow[path]
            samples_T = decoder.decode(path, sample_rate_hz=sample_rate_hz, start_s=start_s, duration_s=duration_s)
            _require_sound(row, samples_T, sample_rate_hz)
            clips.append(DecodedClip(row=row, samples_T=samples_T))
        except Exception as error:  # noqa: BLE001 - whatever goes wrong with a file costs this file
            failures.append(failure(row, step="decode", error=error))
            if isinstance(error, DecodeError) and error.error_class == "DecoderTimeout":
                slow[path] = error
    return clips, failures


def _require_sound(clip: ClipRow, samples_T: Samples, sample_rate_hz: int) -> None:
    """Raise SilentError for a clip without sound: whatever a separator returned, its scores would say nothing."""
    if is_silent(samples_T, sample_rate_hz=sample_rate_hz):
        end_s = (clip["start_s"] or 0.0) + len(samples_T) / sample_rate_hz
        raise SilentError(
            f"a clip must have sound above {SILENCE_DBFS:g} dBFS, got silence from {clip['start_s'] or 0.0:g} to "
            f"{end_s:g} s of {clip['path']!r}; remove it, or name a part with sound"
        )


class Decode:
    """Ray Data task: tasks of the pass (:class:`engine.passes.records.PendingTask`) to decoded shards.

    Clips that have stems or a failure in a shard that is done are not processed again, even if their files have changed
    since.
    """

    def __init__(
        self, config: PassConfig, *, root: str, out: str, sample_rate_hz: int, hand: InHand | None = None
    ) -> None:
        self.config, self.root, self.out, self.sample_rate_hz = config, root, out, sample_rate_hz
        self.hand = hand or InHand()

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        for task in batch.to_pylist():
            for shard in self.decode(**task):
                yield pack(shard)

    def decode(self, task: int, done: Sequence[str] = ()) -> Iterator[DecodedShard]:
        """The missing shards of a task; ``done`` are the names of the others."""
        config, decoder = self.config, shared_decoder(self.config.decode_limit_s)
        started, worked_s = time.perf_counter(), decoder.cpu_s()
        self.hand.begin(f"decode-{task:06d}")
        rows, failures = self._missing_clips(task, done, decoder)
        size = config.clips_per_shard
        groups = [rows[i : i + size] for i in range(0, len(rows), size)] or [[]]
        # If files became shorter or were lost, there are fewer clips, but the recorded number of shards must come.
        num_shards = max((record["num_shards"] for _, record in shard_records(location(self.out), done)), default=0)
        groups += [[]] * (num_shards - len(done) - len(groups))
        taken = {parse_shard_name(name)[1] for name in done}
        numbers = (number for number in itertools.count() if number not in taken)
        for number, group in zip(numbers, groups, strict=False):
            clips, failed = self._decode_group(group, decoder)
            num_queries = [*(len(row["labels"]) for row in group), *(row["num_queries"] for row in failures)]
            counts: Counts = {
                "num_shards": len(done) + len(groups),
                "num_clips": len(num_queries),
                "num_queries": sum(num_queries),
                "audio_s": sum(len(clip.samples_T) for clip in clips) / self.sample_rate_hz,
                "decode_s": (decode_s := time.perf_counter() - started),
                "read_wait_s": max(0.0, decode_s - (decoder.cpu_s() - worked_s)),
            }
            yield DecodedShard(name=shard_name(task, number), clips=clips, failures=failed + failures, counts=counts)
            failures = []  # the first shard has those of cutting
            started, worked_s = time.perf_counter(), decoder.cpu_s()

    def _decode_group(self, group: Sequence[ClipRow], decoder: Decoder) -> tuple[list[DecodedClip], list[FailureRow]]:
        clips: list[DecodedClip] = []
        failures: list[FailureRow] = []
        for part in self.hand.parts("decode", [(row["clip_id"], row["path"]) for row in group]):
            rows = [group[position] for position in part.positions]
            if part.error is not None:
                failures += [failure(row, step="decode", error=part.error) for row in rows]
                continue
            decoded, failed = decode_rows(
                rows,
                root=self.root,
                sample_rate_hz=self.sample_rate_hz,
                clip_s=self.config.clip_s,
                decoder=decoder,
            )
            clips, failures = clips + decoded, failures + failed
        return clips, failures

    def _missing_clips(
        self, task: int, done: Sequence[str], decoder: Decoder
    ) -> tuple[list[ClipRow], list[FailureRow]]:
        """Clips of a task that no shard has yet, and failures of files that cannot be cut."""
        out, config = location(self.out), self.config
        held = clips_in(out, done)
        clips: list[ClipRow] = []
        failures: list[FailureRow] = []
        missing = (row for row in Tasks(out / "corpus").rows(task) if row["clip_id"] not in held)
        # In the order of a file's samples, each of them is decoded once.
        in_order = sorted(missing, key=lambda row: (row["path"], row["start_s"] or 0.0))
        for row, error in self._openable(in_order):
            if error is not None:
                failures.append(failure(row, step="decode", error=error, is_cut=row["is_cut"]))
                continue
            pieces, failed = cut_rows(
                [row], root=self.root, clip_s=config.clip_s, min_clip_s=config.min_clip_s, decoder=decoder
            )
            before = held
            if row["tried_in"] and any(piece["clip_id"] != row["clip_id"] for piece in pieces):
                # A first attempt that was interrupted may have made some of the recording's clips.
                before = held.union(*(clips_in(out, done_names(out, earlier)) for earlier in row["tried_in"]))
            clips += [piece for piece in pieces if piece["clip_id"] not in before]
            failures += failed
        return clips, failures

    def _openable(self, rows: Sequence[TaskRow]) -> Iterator[tuple[TaskRow, WorkerDiedError | None]]:
        """Rows to cut, each with the error if opening its file has ended too many workers."""
        for part in self.hand.parts("open", [(row["clip_id"], row["path"]) for row in rows]):
            yield from ((rows[position], part.error) for position in part.positions)
