"""Decoding in a child process, so that a decoder that crashes, hangs or takes too much memory costs one file.

Every reader of a user's audio uses it. What may pass by itself is tried again in a fresh child: a network error, a
child that something else has killed (the kernel, when memory runs out), and the first crash at a file. A crash at the
same file again is the file's fault.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import select
import signal
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import psutil

from engine.audio.decode import MAX_DURATION_S, AudioInfo, ChannelBlock
from engine.audio.sndfile import Samples
from engine.audio.worker import Answer, Request, Segment, pack
from engine.errors import AudioError, DecodeError
from engine.storage.retry import retried

MEMORY_BYTES = 4 << 30
"""Address space for one request. The longest segment, ten minutes, takes a third of it at 192 kHz.

Most of it is never touched; a lower limit would refuse harmless files whose headers promise too much.
"""
_BLOCK_VALUES = 1 << 20  # of all channels together, in one answer
_START_LIMIT_S = 120.0  # the imports take a second, longer on a machine that starts many processes
_GRACE_S = 5.0  # after the time limit, the child ends itself if its parent has not killed it
_MAX_PATH_BYTES = 4096  # PATH_MAX; the request fits into a pipe, so that sending it never blocks
_ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
_CRASHES = frozenset({signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT, signal.SIGTRAP})
"""Signals by which a faulty decoder ends itself; any other that ends it comes from outside."""
_OF_THREAD = threading.local()
_Child = subprocess.Popen[bytes]
_ROOT = str(Path(__file__).resolve().parents[2])


class Decoder:
    """``probe`` and ``decode`` of :mod:`engine.audio.decode` in a child process, which is replaced if it fails.

    The child starts at the first request. It ends with this object, or within seconds after this process.
    """

    def __init__(self, *, time_limit_s: float = 60.0) -> None:
        if not 0 < time_limit_s < math.inf:
            raise ValueError(f"time_limit_s must be above 0 and finite, got {time_limit_s}; choose one such as 60")
        self.time_limit_s = time_limit_s
        self._lock = threading.Lock()
        self._child: _Child | None = None
        self._owner = _owner()
        self._crashed_at: str | None = None
        """The file of the last request, if the child crashed."""

    @property
    def pid(self) -> int | None:
        """Process id of the child; None if there is none."""
        return None if self._child is None else self._child.pid

    def cpu_s(self) -> float:
        """CPU time of this process and its child so far."""
        own_s = time.process_time()
        try:
            return own_s + (sum(psutil.Process(self.pid).cpu_times()[:2]) if self.pid is not None else 0.0)
        except psutil.Error:  # it has ended
            return own_s

    def probe(self, source: str) -> AudioInfo:
        """Return :func:`engine.audio.decode.probe` of a path or an ``s3://`` address; raises DecodeError."""
        answer, _ = self._request({"call": "probe", "source": source, "arguments": {}})
        return AudioInfo(**answer["info"])

    def decode(
        self,
        source: str,
        *,
        sample_rate_hz: int,
        start_s: float = 0.0,
        duration_s: float | None = None,
        max_duration_s: float = MAX_DURATION_S,
    ) -> Samples:
        """Return :func:`engine.audio.decode.decode` of a path or an ``s3://`` address; raises DecodeError."""
        segment: Segment = {
            "sample_rate_hz": sample_rate_hz,
            "start_s": start_s,
            "duration_s": duration_s,
            "max_duration_s": max_duration_s,
        }
        _, data = self._request({"call": "decode", "source": source, "arguments": segment})
        return np.frombuffer(data, np.float32)

    def channels(self, source: str) -> Iterator[ChannelBlock]:
        """Yield :func:`engine.audio.decode.decode_channels` of a complete recording in blocks; raises DecodeError."""
        first, size = 0, 1
        while size:
            segment: Segment = {"first": first, "most_values": _BLOCK_VALUES}
            answer, data = self._request({"call": "channels", "source": source, "arguments": segment})
            info = answer["info"]
            samples_TC = np.frombuffer(data, np.float32).reshape(-1, info["num_channels"])
            if size := len(samples_TC):
                yield ChannelBlock(
                    samples_TC=samples_TC,
                    sample_rate_hz=info["sample_rate_hz"],
                    mono_channels=tuple(info["mono_channels"]),
                )
            first += size

    def close(self) -> None:
        """End the child; another request starts a new one."""
        with self._lock:
            self._drop()

    def _request(self, request: Request) -> tuple[Answer, bytearray]:
        source = request["source"]
        if not source.startswith("s3://"):  # the current folder may have changed since the child was started
            source = os.path.join(os.getcwd(), source)
            request = {**request, "source": source}
        num_bytes = len(source.encode("utf-8", "surrogatepass"))
        if num_bytes > _MAX_PATH_BYTES:
            message = f"a path must have at most {_MAX_PATH_BYTES} bytes, got {num_bytes}; correct {source[:80]!r}..."
            raise DecodeError(message, AudioError.__name__)
        return retried(functools.partial(self._answered, request))

    def _answered(self, request: Request) -> tuple[Answer, bytearray]:
        """One attempt; a DecodeError says whether another is worth its time."""
        source = request["source"]
        with self._lock:
            child = self._running_child(source)
            try:
                answer, data = self._send(child, request)
            except (EOFError, BrokenPipeError):
                raise self._died(source, _exit_status(child)) from None
            except TimeoutError:
                raise self._too_slow(source) from None
            self._crashed_at = None
            if answer.get("error_class") == MemoryError.__name__:  # the rest of its memory may be fragmented
                self._drop()
        if "error_class" in answer:
            raise DecodeError(answer["message"], answer["error_class"], answer["transient"])
        return answer, data

    def _died(self, source: str, status: int | None) -> DecodeError:
        """The error of a child that ended before its answer."""
        if status == -signal.SIGALRM:  # its own time limit: this process was stopped for longer than that
            return self._too_slow(source)
        name = _description(status)
        if status is not None and status < 0 and -status not in _CRASHES:
            cause = f"its decoder was killed from outside by {name}, as when memory runs out"
            message = f"{source!r}: cannot decode it now ({cause}); free memory and try again, the file may be good"
            return DecodeError(message, "DecoderKilled", transient=True)
        is_first, self._crashed_at = self._crashed_at != source, source
        return _refused(source, f"its decoder crashed: {name}", "DecoderCrash", transient=is_first)

    def _too_slow(self, source: str) -> DecodeError:
        # In an object store the network may be the reason, which can pass.
        cause, transient = f"it takes longer than {self.time_limit_s:g} s", source.startswith("s3://")
        return _refused(source, cause, "DecoderTimeout", transient=transient)

    def _send(self, child: _Child, request: Request) -> tuple[Answer, bytearray]:
        assert child.stdin is not None
        try:
            child.stdin.write(pack(request))
            while (answer := _read_answer(child, time.monotonic() + self.time_limit_s)).get("is_busy"):
                pass
            return answer, _read(child, answer.get("num_bytes", 0), time.monotonic() + self.time_limit_s)
        except BaseException:  # after an interrupt too: the answer would be taken for that to the next request
            self._drop()
            raise

    def _running_child(self, source: str) -> _Child:
        """Return the child; start one if there is none, it has ended or its owner is another by now."""
        owner = _owner()
        if self._child is not None and self._owner == owner and self._child.poll() is None:
            return self._child
        self._drop()
        self._owner = owner
        arguments = [os.getpid(), MEMORY_BYTES, self.time_limit_s + _GRACE_S]
        path = os.pathsep.join([_ROOT, *(folder or os.getcwd() for folder in sys.path)])  # before a user's engine.py
        try:
            child = subprocess.Popen(
                [sys.executable, "-P", "-m", "engine.audio.worker", *map(str, arguments)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                env=os.environ | _ONE_THREAD | {"PYTHONPATH": path},
            )
            self._child, self._finish = child, weakref.finalize(self, _kill, child, os.getpid())
            _read_answer(child, time.monotonic() + _START_LIMIT_S)
        except (OSError, EOFError) as error:
            self._drop()
            cause = f"{type(error).__name__} {error}".strip()
            message = f"{source!r}: cannot start a decoder process ({cause}); see its messages on standard error"
            raise DecodeError(message, "DecoderStart", transient=True) from None
        return child

    def _drop(self) -> None:
        if self._child is not None:
            self._child = None
            self._finish()


def _owner() -> tuple[int, Mapping[str, str]]:
    """The process that starts a child, and its settings and credentials of S3, which the child keeps."""
    return os.getpid(), {name: value for name, value in os.environ.items() if name.startswith("AWS_")}


def _refused(source: str, cause: str, error_class: str, *, transient: bool = False) -> DecodeError:
    message = f"{source!r}: cannot decode it ({cause}); replace or remove it"
    return DecodeError(message, error_class, transient=transient)


def _kill(child: _Child, owner: int) -> None:
    """Kill and reap a child of this process; one that waits for a dead disk cannot be killed and is left."""
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            pipe.close()
    if owner == os.getpid():
        child.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout=2.0)


def _exit_status(child: _Child) -> int | None:
    """The exit status of a child that has closed its pipe, minus the number of a signal; None if it is still there."""
    try:
        return child.wait(timeout=2.0)
    except subprocess.TimeoutExpired:
        return None


def _description(status: int | None) -> str:
    if status is None:
        return "it closed its pipe"
    if status >= 0:
        return f"exit status {status}"
    is_named = -status in set(signal.Signals)  # most real-time signals have no name
    return signal.Signals(-status).name if is_named else f"signal {-status}"


def _read_answer(child: _Child, deadline_s: float) -> Answer:
    (num_bytes,) = struct.unpack(">I", _read(child, 4, deadline_s))
    answer: Answer = json.loads(_read(child, num_bytes, deadline_s))
    return answer


def _read(child: _Child, num_bytes: int, deadline_s: float) -> bytearray:
    """Read bytes from the child; raises TimeoutError after the deadline and EOFError if the child has ended."""
    assert child.stdout is not None
    data, position = bytearray(num_bytes), 0
    ready = select.poll()
    ready.register(child.stdout, select.POLLIN)
    while position < num_bytes:
        if not ready.poll(max(0.0, 1000 * (deadline_s - time.monotonic()))):
            raise TimeoutError
        count = os.readv(child.stdout.fileno(), [memoryview(data)[position:]])
        if not count:
            raise EOFError
        position += count
    return data


def shared_decoder(time_limit_s: float = 60.0) -> Decoder:
    """The decoder of this process, so that it keeps one child; in a thread that uses another, that one."""
    of_thread: Decoder | None = getattr(_OF_THREAD, "decoder", None)
    return of_thread or _of_process(time_limit_s)


def use_decoder(decoder: Decoder) -> None:
    """Let this thread use a decoder of its own, for children work at the same time and one child does not."""
    _OF_THREAD.decoder = decoder


@functools.lru_cache(maxsize=1)
def _of_process(time_limit_s: float) -> Decoder:
    return Decoder(time_limit_s=time_limit_s)
