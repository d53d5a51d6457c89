"""The decoder process: it decodes the files that :class:`engine.audio.decoder.Decoder` names, one request at a time.

It is our own because multiprocessing and concurrent.futures set no memory limit, wait for ever for a decoder that hangs
in C code, and break the pool after a crash. Here that costs one file.

``python -m engine.audio.worker`` reads requests from standard input and writes answers to standard output. A message is
its length in four bytes, that much JSON, and for decoded audio the float32 samples.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import struct
import sys
import threading
import time
from typing import Any, BinaryIO, Literal, TypedDict

from engine.audio.decode import MAX_DURATION_S, decode, decode_channels, probe
from engine.audio.recordings import Recordings
from engine.errors import AudioError
from engine.storage.retry import is_transient

_WATCH_S = 1.0  # between two checks that the parent process is alive
_MAX_KEPT = 1 << 25  # decoded samples between requests, 128 MiB: the files of one shard, so that each is decoded once


class Segment(TypedDict, total=False):
    """The arguments of :func:`engine.audio.decode.decode` or ``decode_channels``; none for a probe."""

    sample_rate_hz: int
    start_s: float
    duration_s: float | None
    max_duration_s: float
    first: int
    most_values: int


class Request(TypedDict):
    """A call of ``probe``, ``decode`` or ``decode_channels``."""

    call: Literal["probe", "decode", "channels"]
    source: str
    arguments: Segment


class Answer(TypedDict, total=False):
    """The answer to a request: ``info`` after a probe, ``num_bytes`` of samples after a decode, both, or an error.

    Before it, ``is_busy`` comes after every ten minutes of audio that are decoded on the way.
    """

    is_busy: bool
    info: dict[str, Any]
    """Fields of :class:`engine.audio.decode.AudioInfo`, or of ``ChannelBlock`` but its samples."""
    num_bytes: int
    error_class: str
    message: str
    transient: bool
    """The error may pass by itself."""


def pack(message: Request | Answer) -> bytes:
    """A message with its length, as it is sent."""
    text = json.dumps(message).encode()
    return struct.pack(">I", len(text)) + text


def _run(recordings: Recordings, call: str, source: str, arguments: Any) -> tuple[Answer, bytes | memoryview]:  # noqa: ANN401 - as in Segment
    if call == "probe":
        return {"info": vars(probe(source, recordings=recordings))}, b""
    if call == "channels":
        block = decode_channels(source, recordings=recordings, **arguments)
        info = {"sample_rate_hz": block.sample_rate_hz, "mono_channels": block.mono_channels}
        info["num_channels"] = block.samples_TC.shape[1]
        return {"info": info, "num_bytes": block.samples_TC.nbytes}, block.samples_TC.tobytes()
    samples_T = decode(source, recordings=recordings, **arguments)
    return {"num_bytes": samples_T.nbytes}, samples_T.data


def _describe(error: Exception, source: str) -> Answer:
    if _is_memory_error(error):  # not transient: the next attempt would need as much
        cause = "it takes more memory than a decoder may use"
        message = f"{source!r}: cannot decode it ({cause}); cut it into shorter files or remove it"
        return {"error_class": MemoryError.__name__, "message": message, "transient": False}
    name = type(error).__name__
    is_audio = isinstance(error, AudioError)
    message = str(error) if is_audio else f"cannot decode {source!r} ({name}: {error}); check the file"
    return {"error_class": name, "message": message[:4000], "transient": is_transient(error)}


def _is_memory_error(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or (error.__cause__ is not None and _is_memory_error(error.__cause__))


def _watch(parent: int) -> None:
    """End this process when its parent has ended, even if it is inside a decoder."""
    while os.getppid() == parent:
        time.sleep(_WATCH_S)
    os._exit(1)


def _limit_memory(memory_bytes: int) -> None:
    """Allow no core files, and ``memory_bytes`` more address space than now; less if the machine has a lower limit."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        with open("/proc/self/statm") as sizes:
            total_bytes = int(sizes.read().split()[0]) * resource.getpagesize() + memory_bytes
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        soft = total_bytes if hard == resource.RLIM_INFINITY else min(total_bytes, hard)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


class _Progress:
    """Says that the decoder is at work, so that the time limit is one for ten minutes of audio, not for a file."""

    def __init__(self, answers: BinaryIO, alarm_s: float) -> None:
        self._answers, self._alarm_s, self._decoded_s = answers, alarm_s, 0.0

    def __call__(self, duration_s: float) -> None:
        self._decoded_s += duration_s
        if self._decoded_s >= MAX_DURATION_S:
            self._decoded_s = 0.0
            signal.setitimer(signal.ITIMER_REAL, self._alarm_s)
            _write(self._answers, {"is_busy": True})


def _serve(parent: int, memory_bytes: int, alarm_s: float) -> None:
    """Answer requests until standard input is closed; end after ``alarm_s`` without an answer."""
    with os.fdopen(os.dup(0), "rb") as requests, os.fdopen(os.dup(1), "wb") as answers:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # after Ctrl-C in a terminal the parent decides
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process even if a decoder holds the interpreter's lock
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()
        _limit_memory(memory_bytes)
        _write(answers, {})
        with open(os.devnull, "r+b", buffering=0) as nothing:  # decoders print warnings to the standard streams
            for stream in (0, 1, 2):
                os.dup2(nothing.fileno(), stream)
        recordings = Recordings(max_kept=_MAX_KEPT, on_decoded=_Progress(answers, alarm_s))
        while head := requests.read(4):
            request = json.loads(requests.read(*struct.unpack(">I", head)))
            data: bytes | memoryview = b""
            signal.setitimer(signal.ITIMER_REAL, alarm_s)
            try:
                answer, data = _run(recordings, **request)
            except Exception as error:  # noqa: BLE001 - any error is reported and costs this file only
                answer = _describe(error, request["source"])
            signal.setitimer(signal.ITIMER_REAL, 0)
            _write(answers, answer, data)


def _write(answers: BinaryIO, answer: Answer, data: bytes | memoryview = b"") -> None:
    answers.write(pack(answer))
    answers.write(data)
    answers.flush()


if __name__ == "__main__":
    _serve(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
