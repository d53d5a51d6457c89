"""Step 2 of a pass: separate decoded clips into stems, where every label of every clip is one query, and score them."""

from __future__ import annotations

import functools
import os
import re
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from engine.errors import as_exception
from engine.passes.config import PassConfig
from engine.passes.transport import DecodedShard, SeparatedShard, WorkerUse, pack, unpack
from engine.schema import DecodedClip, FailureRow, SeparatedClip, failure, labels_present, plain_label
from engine.scoring.model_scores import Scorer
from engine.scoring.stored import ScoredBatch, ScoredClip, batches_of, score_together
from engine.separators import Separator
from engine.separators.batching import FIRST_S, BatchedSeparator, SeparationRequest
from engine.separators.queries import Query, query_for
from engine.storage.in_hand import InHand
from engine.storage.retry import is_transient
from engine.taggers import Tagger

_LOST_GPU = re.compile(
    "AcceleratorError|(CUDA|HIP|cuDNN|cuFFT) error|device-side assert|illegal memory access|(CUDNN|CUBLAS)_STATUS"
)


def uploaded(clips: Sequence[DecodedClip], device: str) -> list[Tensor]:
    """The samples of clips on a device; a GPU gets them in one copy, which is not waited for."""
    if device == "cpu":
        return [torch.tensor(clip.samples_T) for clip in clips]
    lengths = [len(clip.samples_T) for clip in clips]
    pinned = torch.empty(sum(lengths), pin_memory=True)
    for space_T, clip in zip(torch.split(pinned, lengths), clips, strict=True):
        space_T.numpy()[:] = clip.samples_T
    return list(torch.split(pinned.to(device, non_blocking=True), lengths))


def separate_clips(
    clips: Sequence[DecodedClip], batched: BatchedSeparator, mixtures: Sequence[Tensor] | None = None
) -> tuple[list[SeparatedClip], list[FailureRow]]:
    """Separate every label of every clip; labels and clips that fail are failure rows.

    ``mixtures`` are the clips' samples on the separator's device (:func:`uploaded`) if they are there already.

    A batch holds queries of different clips. If a query fails for a reason that may pass by itself, such as memory, its
    clip fails as a whole, so that a retry can process it as a whole.
    """
    unknown = unknown_labels((label for clip in clips for label in clip.row["labels"]), batched.separator)
    present = [[label for label in labels_present(clip.row) if label not in unknown] for clip in clips]
    queries = [(number, label) for number, clip in enumerate(clips) for label in clip.row["labels"]]
    known = [(number, label) for number, label in queries if label not in unknown]
    mixtures = uploaded(clips, batched.device) if mixtures is None else mixtures
    answers = batched.separate(
        [
            SeparationRequest(
                samples_T=mixtures[number],
                query=query_for(label, present[number], batched.separator),
            )
            for number, label in known
        ]
    )
    errors = {query: answer for query, answer in zip(known, answers, strict=True) if isinstance(answer, Exception)}
    failed_clips = {number: error for (number, _), error in errors.items() if is_transient(error)}
    failures = [_failure(clips[number], error) for number, error in failed_clips.items()]
    problems = {query: unknown[query[1]] for query in queries if query[1] in unknown} | errors
    failures = [
        _failure(clips[number], error, label)
        for (number, label), error in problems.items()
        if number not in failed_clips
    ] + failures
    stems: dict[int, dict[str, Tensor]] = {}
    for (number, label), answer in zip(known, answers, strict=True):
        if number not in failed_clips and not isinstance(answer, Exception):
            stems.setdefault(number, {})[label] = answer
    separated = [
        SeparatedClip(
            clip=clips[number],
            labels=list(by_label),
            mixture_T=mixtures[number],
            stems_ST=torch.stack(list(by_label.values())),
        )
        for number, by_label in sorted(stems.items())
    ]
    return separated, failures


def _failure(clip: DecodedClip, error: Exception, label: str | None = None) -> FailureRow:
    return failure(clip.row, step="separate", error=error, label=label)


def unknown_labels(labels: Iterable[str], separator: Separator) -> dict[str, ValueError]:
    """Labels that the separator does not know, with its error. Those that it does not list are tried without audio."""
    known, silence = {plain_label(label) for label in separator.labels}, torch.zeros(1, 0)
    errors: dict[str, ValueError] = {}
    for label in dict.fromkeys(labels):
        if plain_label(label) not in known:
            try:
                separator.separate(silence, [label])
            except ValueError as error:
                errors[label] = error
            except BaseException as error:  # noqa: BLE001 - it may only refuse to separate nothing: the clip will tell
                as_exception(error)
    return errors


class _Guarded:
    """A separator or a tagger whose calls end this process if they hang or have lost the GPU."""

    def __init__(self, model: Any, hand: InHand, config: PassConfig) -> None:  # noqa: ANN401 - one or the other
        self.sample_rate_hz: int = model.sample_rate_hz
        self.labels: tuple[str, ...] = model.labels
        self.fingerprint: str = getattr(model, "fingerprint", "")
        self.uses_unwanted: bool = getattr(model, "uses_unwanted", False)
        self.shares_mixtures: bool = getattr(model, "shares_mixtures", False)
        self._model, self._hand, self._config = model, hand, config

    def separate(
        self,
        mix_BT: Tensor,
        queries: Sequence[str | Query],
        *,
        lengths: Sequence[int] | None = None,
        rows: Sequence[int] | None = None,
    ) -> Tensor:
        """See the protocol; ``rows`` as :meth:`~engine.separators.base.NetworkSeparator.separate` has them."""
        shared = {} if rows is None else {"rows": rows}
        call = functools.partial(self._model.separate, mix_BT, queries, lengths=lengths, **shared)
        return self._call(call, "separator", num_samples=len(queries) * mix_BT.shape[1])

    def tag(self, audio_BT: Tensor, *, lengths: Sequence[int] | None = None) -> Tensor:
        """See the protocol."""
        call = functools.partial(self._model.tag, audio_BT, lengths=lengths)
        return self._call(call, "tagger", num_samples=audio_BT.numel())

    def _call(self, call: Callable[[], Tensor], what: str, *, num_samples: int) -> Tensor:
        limited_s = self._config.batch_s or FIRST_S
        limit_s = self._config.separate_limit_s * max(1.0, num_samples / self.sample_rate_hz / limited_s)
        with _guarded(self._hand, limit_s, f"the {what}"):
            result = call()
            if isinstance(result, Tensor) and result.is_cuda:
                torch.cuda.current_stream().synchronize()  # where CUDA's late errors are raised
            return result


@contextmanager
def _guarded(hand: InHand, limit_s: float, what: str) -> Iterator[None]:
    """End this process if the block hangs, or if it has lost the GPU: every later call would fail."""
    with hand.limit(limit_s, what):
        try:
            yield
        except Exception as error:
            _die_without_gpu(hand, error)
            raise


def _die_without_gpu(hand: InHand, error: BaseException) -> None:
    text = f"{type(error).__name__}: {error}"
    if _LOST_GPU.search(text) and not is_transient(error) and "out of memory" not in text:
        hand.die("WorkerDied", text.splitlines()[0])


def _piece(clip: DecodedClip) -> tuple[str, str]:
    return clip.row["clip_id"], clip.row["path"]


def _clips(batches: Iterable[ScoredBatch], failures: list[FailureRow]) -> Iterator[ScoredClip]:
    """The clips of batches that their device has finished."""
    for batch in batches:
        for item, scored in zip(batch.items, batch.clips(), strict=True):
            if isinstance(scored, Exception):
                failures.append(_score_failure(item, scored))
            else:
                yield scored


def _score_failure(item: SeparatedClip, error: Exception) -> FailureRow:
    return failure(item.clip.row, step="score", error=error, num_queries=len(item.labels))


class ShardWorker(ABC):
    """Ray Data actor: holds models on its device and makes of decoded shards what a pass writes.

    It may be called in several threads: one has the device, while others unpack, upload, fetch and pack their shards.
    """

    def __init__(self, config: PassConfig, on_gpu: bool, hand: InHand | None) -> None:
        torch.set_num_threads(max(1, int(config.num_cpus_per_actor)))
        self.config, self.hand, self.opened_on = config, hand or InHand(), "cuda" if on_gpu else "cpu"
        self.device = self.opened_on if torch.cuda.is_available() else "cpu"  # a test may give Ray a GPU that is none
        self._turns = threading.Lock()

    def __call__(self, batch: pa.Table) -> pa.Table:
        shard = unpack(batch)
        with self.hand.work(f"separate-{shard.name}", len(shard.clips)):
            separated, started = self.separate(shard), time.perf_counter()
            clips = list(separated.clips)
            score_s = separated.counts["score_s"] + time.perf_counter() - started
            return pack(replace(separated, clips=clips, counts=separated.counts | {"score_s": score_s}))

    @abstractmethod
    def separate(self, shard: DecodedShard) -> SeparatedShard:
        """Make of a shard what is written of it."""

    @abstractmethod
    def fill_fraction(self, clips: Sequence[DecodedClip]) -> float:
        """Fraction of the batches for clips that is audio, not padding or unused room."""

    def use(self, clips: Sequence[DecodedClip]) -> WorkerUse:
        """Use of this worker for clips."""
        device, vram_bytes = "cpu", 0
        if self.device == "cuda":
            device, vram_bytes = f"gpu{os.environ.get('CUDA_VISIBLE_DEVICES', '')}", torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        return WorkerUse(f"{socket.gethostname()}/{device}", self.fill_fraction(clips), vram_bytes)

    def _guarded_model(self, open_model: Callable[[str], Any]) -> _Guarded:
        return _Guarded(open_model(self.opened_on), self.hand, self.config)

    def _guarded(self, what: str) -> AbstractContextManager[None]:
        return _guarded(self.hand, self.config.separate_limit_s, what)


class Separate(ShardWorker):
    """Holds one separator, and a tagger if the pass has one; separates and scores decoded shards."""

    def __init__(
        self,
        open_separator: Callable[[str], Separator],
        open_tagger: Callable[[str], Tagger] | None,
        config: PassConfig,
        on_gpu: bool = False,
        hand: InHand | None = None,
    ) -> None:
        super().__init__(config, on_gpu, hand)
        batched = BatchedSeparator(
            separator=self._guarded_model(open_separator),
            batch_s=config.batch_s,
            device=self.device,
            autocast=config.autocast and on_gpu,
        )
        tagger = self._guarded_model(open_tagger) if open_tagger is not None else None
        self.scorer = Scorer(batched=batched, tagger=tagger, reseparate=config.reseparate)

    def separate(self, shard: DecodedShard) -> SeparatedShard:
        """The stems of a shard with their scores."""
        failures, counts = list(shard.failures), dict(shard.counts)
        with self._guarded("uploading"):
            mixtures = uploaded(shard.clips, self.device)
        with self._turns:
            begun = time.perf_counter()
            separated = self._separate(shard.clips, mixtures, failures)
            parted = time.perf_counter()
            assessed = self._assess(separated, failures)
            counts |= {"separate_s": parted - begun, "assess_s": time.perf_counter() - parted, "score_s": 0.0}
            batches: Iterable[ScoredBatch] = self._score(assessed, failures)
            if self.device != "cpu":
                with self._guarded("scoring"):
                    batches, scored = list(batches), torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
                    scored.record()
                counts["gpu_s"] = time.perf_counter() - begun
            use = self.use(shard.clips)
        clips: Iterable[ScoredClip] = _clips(batches, failures)
        if self.device != "cpu":
            with self._guarded("scoring"):
                scored.synchronize()
            places = {item.clip.row["clip_id"]: place for place, item in enumerate(assessed)}
            clips = sorted(clips, key=lambda clip: places[clip.row["clip_id"]])
            counts["score_s"] = time.perf_counter() - begun - counts["separate_s"] - counts["assess_s"]
        return SeparatedShard(name=shard.name, clips=clips, failures=failures, counts=counts, use=use)

    def _separate(
        self, clips: list[DecodedClip], mixtures: list[Tensor], failures: list[FailureRow]
    ) -> list[SeparatedClip]:
        """The stems of clips; those that fail are added to the failures."""
        separated: list[SeparatedClip] = []
        for part in self.hand.parts("separate", [_piece(clip) for clip in clips]):
            some = [clips[position] for position in part.positions]
            samples = [mixtures[position] for position in part.positions]
            if part.error is None:
                done, failed = separate_clips(some, self.scorer.batched, samples)
                separated += done
                failures += failed
            else:
                failures += [_failure(clip, part.error) for clip in some]
        return separated

    def _assess(self, items: list[SeparatedClip], failures: list[FailureRow]) -> list[SeparatedClip]:
        """The clips with the scores and tags that need a model; those where that fails are failures."""
        if not self.scorer.needs_models:
            return items
        assessed: list[SeparatedClip] = []
        for part in self.hand.parts("assess", [_piece(item.clip) for item in items]):
            results = self._assessed(items, part.positions) if part.error is None else [part.error]
            for position, result in zip(part.positions, results, strict=True):
                if isinstance(result, Exception):
                    failures.append(_score_failure(items[position], result))
                else:
                    assessed.append(result)
        return assessed

    def _score(self, items: list[SeparatedClip], failures: list[FailureRow]) -> Iterator[ScoredBatch]:
        """The clips with all scores, batch by batch when they are taken; those where that fails are failures."""
        rate_hz, written_hz = self.scorer.sample_rate_hz, self.config.stem_rate_hz
        score = functools.partial(
            score_together, sample_rate_hz=rate_hz, as_integers=written_hz is None or written_hz == rate_hz
        )
        for part in self.hand.parts("score", [_piece(item.clip) for item in items]):
            if part.error is not None:
                failures += [_score_failure(items[position], part.error) for position in part.positions]
                continue
            for batch in batches_of([items[position] for position in part.positions]):
                for scored in self._scored(score, batch):
                    if isinstance(scored, ScoredBatch):
                        yield scored
                    else:
                        failures.append(scored)
            if len(part.positions) == 1 and self.device != "cpu":
                torch.cuda.synchronize()  # while the clip is marked as in hand

    def _scored(
        self, score: Callable[[list[SeparatedClip]], ScoredBatch], batch: list[SeparatedClip]
    ) -> Iterator[ScoredBatch | FailureRow]:
        """The scores of clips together; if that fails, of each alone, or its failure."""
        try:
            scored = score(batch)
        except BaseException as error:  # noqa: BLE001 - whatever goes wrong with a clip costs this clip
            _die_without_gpu(self.hand, error)
            cause = as_exception(error)
        else:
            yield scored
            return
        if len(batch) == 1:
            yield _score_failure(batch[0], cause)
        else:
            for item in batch:
                yield from self._scored(score, [item])

    def _assessed(self, items: list[SeparatedClip], positions: Sequence[int]) -> list[SeparatedClip | Exception]:
        """The clips at some positions with these scores; if that fails, each alone, or the exception."""
        try:
            return [*self.scorer.assess(items, positions)]
        except BaseException as error:  # noqa: BLE001 - whatever a tagger raises costs this clip
            if len(positions) == 1:
                return [as_exception(error)]
            as_exception(error)
        return [self._assessed(items, [position])[0] for position in positions]

    def fill_fraction(self, clips: Sequence[DecodedClip]) -> float:
        """See :class:`ShardWorker`."""
        return self.scorer.batched.fill_fraction([len(clip.samples_T) for clip in clips for _ in clip.row["labels"]])
