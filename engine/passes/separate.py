"""Step 2 of a pass: separate decoded clips into stems, where every label of every clip is one query."""

from __future__ import annotations

import functools
import os
import re
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from engine.errors import as_exception
from engine.passes.config import PassConfig
from engine.passes.transport import DecodedShard, SeparatedShard, WorkerUse, pack, unpack
from engine.schema import DecodedClip, FailureRow, SeparatedClip, failure, plain_label
from engine.scoring.model_scores import Scorer
from engine.scoring.scores import Scores
from engine.separators import Separator
from engine.separators.batching import BatchedSeparator, SeparationRequest
from engine.separators.queries import Query
from engine.storage.in_hand import InHand
from engine.storage.retry import is_transient
from engine.taggers import Tagger

_LOST_GPU = re.compile(
    "AcceleratorError|(CUDA|HIP|cuDNN|cuFFT) error|device-side assert|illegal memory access|(CUDNN|CUBLAS)_STATUS"
)


def separate_clips(clips: list[DecodedClip], batched: BatchedSeparator) -> tuple[list[SeparatedClip], list[FailureRow]]:
    """Separate every label of every clip; labels and clips that fail are failure rows.

    A batch holds queries of different clips. If a query fails for a reason that may pass by itself, such as memory, its
    clip fails as a whole, so that a retry can process it as a whole.
    """
    unknown = unknown_labels((label for clip in clips for label in clip.row["labels"]), batched.separator)
    queries = [(number, label) for number, clip in enumerate(clips) for label in clip.row["labels"]]
    known = [(number, label) for number, label in queries if label not in unknown]
    mixtures = [torch.from_numpy(clip.samples_T).to(batched.device) for clip in clips]
    answers = batched.separate(
        [
            SeparationRequest(
                samples_T=mixtures[number],
                query=query_for(label, clips[number].row["labels"], batched.separator),
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


def query_for(label: str, labels_present: Sequence[str], separator: Separator) -> str | Query:
    """The query for a label of a clip: the clip's other labels are unwanted, if the separator uses that."""
    others = [other for other in labels_present if plain_label(other) != plain_label(label)]
    return Query(label, unwanted=others) if others and getattr(separator, "uses_unwanted", False) else label


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
        limit_s = self._config.separate_limit_s * max(1.0, num_samples / self.sample_rate_hz / self._config.batch_s)
        with self._hand.limit(limit_s, f"the {what}"):
            try:
                result = call()
                if isinstance(result, Tensor) and result.is_cuda:
                    torch.cuda.current_stream().synchronize()  # where CUDA's late errors are raised
                return result
            except Exception as error:
                text = f"{type(error).__name__}: {error}"
                if _LOST_GPU.search(text) and not is_transient(error) and "out of memory" not in text:
                    self._hand.die("WorkerDied", text.splitlines()[0])  # every later call in this process would fail
                raise


def _piece(clip: DecodedClip) -> tuple[str, str]:
    return clip.row["clip_id"], clip.row["path"]


class Separate:
    """Ray Data actor: holds one separator, and a tagger if the pass has one, and separates decoded shards."""

    def __init__(
        self,
        open_separator: Callable[[str], Separator],
        open_tagger: Callable[[str], Tagger] | None,
        config: PassConfig,
        on_gpu: bool = False,
        hand: InHand | None = None,
    ) -> None:
        torch.set_num_threads(max(1, int(config.num_cpus_per_actor)))
        self.device, self.hand = "cuda" if on_gpu else "cpu", hand or InHand()
        batched = BatchedSeparator(
            separator=_Guarded(open_separator(self.device), self.hand, config),
            batch_s=config.batch_s,
            device=self.device if torch.cuda.is_available() else "cpu",  # a test may give Ray a GPU that does not exist
            autocast=config.autocast and on_gpu,
        )
        tagger = _Guarded(open_tagger(self.device), self.hand, config) if open_tagger is not None else None
        self.scorer = Scorer(batched=batched, tagger=tagger, reseparate=config.reseparate)

    def __call__(self, batch: pa.Table) -> pa.Table:
        shard = unpack(batch)
        self.hand.begin(f"separate-{shard.name}", len(shard.clips))
        return pack(self.separate(shard))

    def separate(self, shard: DecodedShard) -> SeparatedShard:
        """The stems of a shard, and the scores that need a separator or a tagger."""
        started = time.perf_counter()
        separated: list[SeparatedClip] = []
        failures = list(shard.failures)
        for part in self.hand.parts("separate", [_piece(clip) for clip in shard.clips]):
            clips = [shard.clips[position] for position in part.positions]
            if part.error is None:
                done, failed = separate_clips(clips, self.scorer.batched)
                separated, failures = separated + done, failures + failed
            else:
                failures += [_failure(clip, part.error) for clip in clips]
        separate_s = time.perf_counter() - started
        started = time.perf_counter()
        assessed, failed = self._assess(separated)
        assess_s = time.perf_counter() - started
        return SeparatedShard(
            name=shard.name,
            clips=assessed,
            failures=failures + failed,
            counts=shard.counts | {"separate_s": separate_s, "assess_s": assess_s},
            use=self._use(shard.clips),
        )

    def _assess(self, items: list[SeparatedClip]) -> tuple[list[SeparatedClip], list[FailureRow]]:
        """The clips with the scores that need a separator or a tagger, and those where that fails."""
        assessed: list[SeparatedClip] = []
        failures: list[FailureRow] = []
        for part in self.hand.parts("assess", [_piece(item.clip) for item in items]):
            scores = self._model_scores(items, part.positions) if part.error is None else [part.error]
            for position, rows in zip(part.positions, scores, strict=True):
                item = items[position]
                if isinstance(rows, Exception):
                    failures.append(failure(item.clip.row, step="score", error=rows, num_queries=len(item.labels)))
                else:
                    mixture_T, stems_ST = item.mixture_T.cpu(), item.stems_ST.cpu()
                    assessed.append(replace(item, extra=rows, mixture_T=mixture_T, stems_ST=stems_ST))
        return assessed, failures

    def _model_scores(self, items: list[SeparatedClip], positions: Sequence[int]) -> list[list[Scores] | Exception]:
        """The scores of the clips at some positions; if that fails, of each alone, or the exception."""
        try:
            return [*self.scorer.model_scores(items, positions)]
        except BaseException as error:  # noqa: BLE001 - whatever a tagger raises costs this clip
            if len(positions) == 1:
                return [as_exception(error)]
            as_exception(error)
        return [self._model_scores(items, [position])[0] for position in positions]

    def _use(self, clips: list[DecodedClip]) -> WorkerUse:
        device, vram_bytes = "cpu", 0
        if self.device == "cuda" and torch.cuda.is_available():
            device, vram_bytes = f"gpu{os.environ.get('CUDA_VISIBLE_DEVICES', '')}", torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        fill_fraction = self.scorer.batched.fill_fraction([len(c.samples_T) for c in clips for _ in c.row["labels"]])
        return WorkerUse(f"{socket.gethostname()}/{device}", fill_fraction, vram_bytes)
