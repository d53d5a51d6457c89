"""Decoding in a process of its own: a decoder that crashes, hangs or asks for too much memory costs one file.

``python -m engine.decoder`` is that process. It reads requests from its standard input and answers on its standard
output: a message is four bytes of length, that much JSON, and for decoded audio the raw float32 samples after it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import threading
import time
import weakref
from typing import Any, BinaryIO

import numpy as np

from engine.audio.decode import decode, probe
from engine.audio.readers import AudioInfo, Samples, Source
from engine.errors import AudioError
from engine.storage.retry import is_transient

MEMORY_BYTES = 4 << 30
"""What one request may take: ten minutes, the longest segment, at 192 kHz take a third of it, a normal clip 0.01 %.

It is of address space, most of which a header that lies never touches: less would refuse what is harmless.
"""
_START_LIMIT_S = 120.0  # the imports take a second, more on a machine that is busy with other starts
_GRACE_S = 5.0  # after which a child that hangs ends itself, should its parent not have ended it
_WATCH_S = 1.0
_MAX_PATH_BYTES = 4096  # PATH_MAX; a request fits into a pipe, so that sending it never waits
_ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
_Child = subprocess.Popen[bytes]


class DecodeError(AudioError):
    """A file that the child process could not decode."""

    def __init__(self, message: str, error_class: str = "DecodeError", transient: bool = False) -> None:
        super().__init__(message)
        self.error_class = error_class
        """Name of the exception's class in the child, or DecoderCrash, DecoderTimeout or DecoderStart."""
        self.transient = transient
        """Whether it may pass by itself, so that another try is worth its time."""


class Decoder:
    """``engine.audio``'s ``probe`` and ``decode`` in one child process, which is replaced where it fails.

    The child starts at the first request and ends with this object, or within seconds of this process.
    """

    def __init__(self, *, time_limit_s: float = 60.0, memory_bytes: int = MEMORY_BYTES) -> None:
        if not 0 < time_limit_s < math.inf:
            raise ValueError(f"time_limit_s is above 0 and finite, not {time_limit_s}: choose seconds such as 60")
        if memory_bytes <= 0:
            raise ValueError(f"memory_bytes is above 0, not {memory_bytes}: choose a number such as {MEMORY_BYTES}")
        self.time_limit_s, self.memory_bytes = time_limit_s, memory_bytes
        self._lock = threading.Lock()
        self._child: _Child | None = None
        self._owner = os.getpid()

    @property
    def pid(self) -> int | None:
        """Process id of the child, None while there is none."""
        return None if self._child is None else self._child.pid

    def probe(self, source: str) -> AudioInfo:
        """As :func:`engine.audio.probe`, of a path or an ``s3://`` address; raises DecodeError."""
        answer, _ = self._request(source, "probe", {})
        return AudioInfo(**answer["info"])

    def decode(
        self, source: str, *, sample_rate_hz: int, start_s: float = 0.0, duration_s: float | None = None
    ) -> Samples:
        """As :func:`engine.audio.decode`, of a path or an ``s3://`` address; raises DecodeError."""
        segment = {"sample_rate_hz": sample_rate_hz, "start_s": start_s, "duration_s": duration_s}
        _, data = self._request(source, "decode", segment)
        return np.frombuffer(data, np.float32)

    def close(self) -> None:
        """End the child; another request starts a new one."""
        with self._lock:
            self._drop()

    def _request(self, source: str, call: str, arguments: dict[str, Any]) -> tuple[dict[str, Any], bytearray]:
        num_bytes = len(source.encode("utf-8", "surrogatepass"))
        if num_bytes > _MAX_PATH_BYTES:
            message = f"a path has at most {_MAX_PATH_BYTES} bytes, {source[:80]!r}... has {num_bytes}: correct it"
            raise DecodeError(message, AudioError.__name__)
        with self._lock:
            child = self._running(source)
            try:
                answer, data = self._asked(child, {"call": call, "source": source, "arguments": arguments})
            except (EOFError, BrokenPipeError):
                message = f"{source!r}: its decoder crashed ({_end_of(child)}): replace or remove it"
                raise DecodeError(message, "DecoderCrash") from None
            except TimeoutError:
                message = f"{source!r}: decoding it takes longer than {self.time_limit_s:g} s: replace or remove it"
                # What takes long of an object store may be the network, which comes back.
                raise DecodeError(message, "DecoderTimeout", transient=source.startswith("s3://")) from None
            if answer.get("error_class") == MemoryError.__name__:  # what is left of its memory may be in pieces
                self._drop()
        if "error_class" in answer:
            raise DecodeError(answer["message"], answer["error_class"], answer["transient"])
        return answer, data

    def _asked(self, child: _Child, request: dict[str, Any]) -> tuple[dict[str, Any], bytearray]:
        deadline_s = time.monotonic() + self.time_limit_s
        words = json.dumps(request).encode()
        assert child.stdin is not None
        try:
            child.stdin.write(struct.pack(">I", len(words)) + words)
            answer = _answer(child, deadline_s)
            return answer, _received(child, answer.get("num_bytes", 0), deadline_s)
        except BaseException:  # also an interrupt, after which an answer would be under way
            self._drop()
            raise

    def _running(self, source: str) -> _Child:
        """The child, a new one where there is none, it has ended or it belongs to the process that forked this one."""
        if self._child is not None and self._owner == os.getpid() and self._child.poll() is None:
            return self._child
        self._drop()
        self._owner = os.getpid()
        arguments = [self._owner, self.memory_bytes, self.time_limit_s + _GRACE_S]
        try:
            child = subprocess.Popen(
                [sys.executable, "-P", "-m", "engine.decoder", *map(str, arguments)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                env=os.environ
                | _ONE_THREAD
                | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
            )
            self._child, self._finish = child, weakref.finalize(self, _end, child, self._owner)
            _answer(child, time.monotonic() + _START_LIMIT_S)
        except (OSError, EOFError) as error:
            self._drop()
            reason = f"{type(error).__name__} {error}".strip()
            raise DecodeError(
                f"{source!r}: no decoder process starts ({reason}): see its words on the standard error output",
                "DecoderStart",
                transient=True,
            ) from None
        return child

    def _drop(self) -> None:
        if self._child is not None:
            self._child = None
            self._finish()


def _end(child: _Child, owner: int) -> None:
    """Kill and reap a child of this process; one that the kernel cannot kill yet (a dead disk) is left behind."""
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            pipe.close()
    if owner == os.getpid():
        child.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout=2.0)


def _end_of(child: _Child) -> str:
    try:
        status = child.wait(timeout=2.0)
    except subprocess.TimeoutExpired:
        return "it closed its pipe"
    return signal.Signals(-status).name if status < 0 else f"exit status {status}"


def _answer(child: _Child, deadline_s: float) -> dict[str, Any]:
    (num_bytes,) = struct.unpack(">I", _received(child, 4, deadline_s))
    answer: dict[str, Any] = json.loads(_received(child, num_bytes, deadline_s))
    return answer


def _received(child: _Child, num_bytes: int, deadline_s: float) -> bytearray:
    """So many bytes of the child's; raises TimeoutError after the deadline and EOFError where the child has ended."""
    assert child.stdout is not None
    data, have = bytearray(num_bytes), 0
    waiting = select.poll()
    waiting.register(child.stdout, select.POLLIN)
    while have < num_bytes:
        if not waiting.poll(max(0.0, 1000 * (deadline_s - time.monotonic()))):
            raise TimeoutError
        count = os.readv(child.stdout.fileno(), [memoryview(data)[have:]])
        if not count:
            raise EOFError
        have += count
    return data


def _called(call: str, source: Source, arguments: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    if call == "probe":
        return {"info": vars(probe(source))}, b""
    data = decode(source, **arguments).tobytes()
    return {"num_bytes": len(data)}, data


def _described(error: Exception, source: str) -> dict[str, Any]:
    """An error as an answer; what is over the memory limit is over it at the next try too."""
    if _is_of_memory(error):
        message = f"{source!r}: decoding it takes more memory than it may: cut it into shorter files or remove it"
        return {"error_class": MemoryError.__name__, "message": message, "transient": False}
    name = type(error).__name__
    message = str(error) if isinstance(error, AudioError) else f"{source!r} cannot be decoded ({name}: {error})"
    return {"error_class": name, "message": message[:4000], "transient": is_transient(error)}


def _is_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or (error.__cause__ is not None and _is_of_memory(error.__cause__))


def _watch(parent: int) -> None:
    """End this process, which may be inside a decoder, when its parent has ended."""
    while os.getppid() == parent:
        time.sleep(_WATCH_S)
    os._exit(1)


def _limit(memory_bytes: int) -> None:
    """No core files, and so much address space more than now (less where the machine's own limit is lower)."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        with open("/proc/self/statm") as sizes:
            total_bytes = int(sizes.read().split()[0]) * resource.getpagesize() + memory_bytes
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        soft = total_bytes if hard == resource.RLIM_INFINITY else min(total_bytes, hard)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _serve(parent: int, memory_bytes: int, alarm_s: float) -> None:
    """Answer requests until the standard input closes."""
    with os.fdopen(os.dup(0), "rb") as requests, os.fdopen(os.dup(1), "wb") as answers:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the parent decides
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, whatever holds the interpreter's lock
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()
        _limit(memory_bytes)
        _write(answers, {})
        with open(os.devnull, "r+b", buffering=0) as nothing:  # decoders print there what they stumble over
            for stream in (0, 1, 2):
                os.dup2(nothing.fileno(), stream)
        while head := requests.read(4):
            request, data = json.loads(requests.read(*struct.unpack(">I", head))), b""
            signal.setitimer(signal.ITIMER_REAL, alarm_s)
            try:
                answer, data = _called(**request)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is told and costs this file alone
                answer = _described(error, request["source"])
            signal.setitimer(signal.ITIMER_REAL, 0)
            _write(answers, answer, data)


def _write(answers: BinaryIO, answer: dict[str, Any], data: bytes = b"") -> None:
    words = json.dumps(answer).encode()
    answers.write(struct.pack(">I", len(words)) + words)
    answers.write(data)
    answers.flush()


if __name__ == "__main__":
    _serve(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
