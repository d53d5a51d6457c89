"""Find the samples of an uncompressed recording, whatever the length in its header.

Recorders write a length modulo 2**32 or the greatest possible one into files over 4 GiB, and programs that write into a
pipe, or that crash, leave 0 or the greatest number. libsndfile and FFmpeg believe most of these.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass, replace
from typing import BinaryIO, NamedTuple

from engine.errors import AudioError

_UNKNOWN_BYTES = 0x7FFFF000  # programs that do not know the length write this one or a greater one
_WRAP_BYTES = 1 << 32
_MAX_JUNK_FRACTION, _MAX_JUNK_BYTES = 0.05, 1 << 16  # tags that other programs append without a chunk
_MAX_CHUNKS = 1000


@dataclass(frozen=True)
class SampleBytes:
    """The bytes of a file that are samples."""

    begin: int
    num_bytes: int
    stated_bytes: int
    """Length according to the header, if it can be true; greater in a file that was cut off."""
    is_big_endian: bool
    is_corrected: bool = False
    """The header states no length, or a smaller one."""


class _Layout(NamedTuple):
    """The chunks of a container as it writes them."""

    begin: int
    header: struct.Struct
    """Name and number of bytes."""
    own_bytes: int = 0
    """The header's bytes that the number includes."""
    align: int = 2


_RIFF = _Layout(12, struct.Struct("<4sI"))
_IFF = _Layout(12, struct.Struct(">4sI"))
_W64 = _Layout(40, struct.Struct("<16sQ"), own_bytes=24, align=8)
_CAF = _Layout(8, struct.Struct(">4sq"), align=1)
_KINDS = {(name, b"WAVE"): _RIFF for name in (b"RIFF", b"RF64", b"BW64")}
_KINDS |= {(b"RIFX", b"WAVE"): _IFF, (b"FORM", b"AIFF"): _IFF, (b"FORM", b"AIFC"): _IFF}


def find_samples(file: BinaryIO) -> SampleBytes | None:
    """Return the samples of a WAV, RF64, W64, AIFF, AU or CAF; None for other files and those without samples.

    Raises AudioError if most of the file would be left out, and if there are several parts with samples.
    """
    end, head = file.seek(0, os.SEEK_END), _read(file, 0, 40)
    if head[:4] == b".snd" and len(head) >= 12:
        begin, stated = struct.unpack_from(">4xII", head)
        return _checked(file, None, SampleBytes(begin, max(0, end - begin), stated, is_big_endian=True))
    is_w64, is_caf = head[:4] == b"riff" and head[24:28] == b"wave", head[:4] == b"caff"
    layout = _W64 if is_w64 else _CAF if is_caf else _KINDS.get((head[:4], head[8:12]))
    if layout is None:
        return None
    position, stated_64 = layout.begin, None
    for _ in range(_MAX_CHUNKS):
        if (chunk := _chunk(file, layout, position)) is None:
            return None
        name, begin, stated = chunk
        if name == b"ds64" and len(fields := _read(file, begin, 16)) == 16:
            (stated_64,) = struct.unpack("<8xQ", fields)
        if name in (b"data", b"SSND"):
            skipped = _skipped_bytes(file, name, begin, is_caf=is_caf)
            stated = max(0, (stated if stated_64 is None else stated_64) - skipped)
            begin += skipped
            is_big_endian = layout.header.format.startswith(">")
            return _checked(file, layout, SampleBytes(begin, max(0, end - begin), stated, is_big_endian=is_big_endian))
        position = begin + stated + -stated % layout.align
    return None


def _skipped_bytes(file: BinaryIO, name: bytes, begin: int, *, is_caf: bool) -> int:
    """The bytes of a chunk before its samples."""
    if name == b"SSND" and len(fields := _read(file, begin, 4)) == 4:
        return 8 + int.from_bytes(fields, "big")
    return 4 if is_caf else 0


def _checked(file: BinaryIO, layout: _Layout | None, found: SampleBytes) -> SampleBytes:
    """The samples with the length that they have; ``found`` reaches to the end of the file."""
    to_end, stated = replace(found, stated_bytes=found.num_bytes, is_corrected=True), found.stated_bytes
    if stated > found.num_bytes:
        return found if stated < _UNKNOWN_BYTES else to_end
    is_wrapped = found.num_bytes - stated >= _WRAP_BYTES and layout in (None, _RIFF, _IFF)
    if is_wrapped:
        stated += (found.num_bytes - stated) // _WRAP_BYTES * _WRAP_BYTES
    rest = found.num_bytes - stated
    if rest and not _are_chunks(file, layout, found.begin + stated):
        if not found.stated_bytes or found.stated_bytes >= _UNKNOWN_BYTES:
            return to_end
        if rest > max(_MAX_JUNK_BYTES, _MAX_JUNK_FRACTION * stated):
            cause = (
                f"its header states {found.stated_bytes} bytes of samples, and {rest} bytes of something else follow"
            )
            raise AudioError(f"cannot tell where its samples end ({cause}); repair its header")
    return replace(found, num_bytes=stated, stated_bytes=stated, is_corrected=is_wrapped)


def _are_chunks(file: BinaryIO, layout: _Layout | None, position: int) -> bool:
    """True if nothing but chunks without samples follow, up to the end of the file."""
    end = file.seek(0, os.SEEK_END)
    position += -position % layout.align if layout is not None else 0
    while layout is not None and end - position > layout.align:
        if (chunk := _chunk(file, layout, position)) is None or not all(32 <= byte < 127 for byte in chunk[0]):
            return False
        name, begin, num_bytes = chunk
        if not 0 <= num_bytes <= end - begin:
            return False
        if name == b"data":
            raise AudioError("it must have its samples in one chunk, got several; encode it again")
        position = begin + num_bytes + -num_bytes % layout.align
    return layout is not None


def _chunk(file: BinaryIO, layout: _Layout, position: int) -> tuple[bytes, int, int] | None:
    """The name, first byte and number of bytes of the chunk at a position."""
    fields = _read(file, position, layout.header.size)
    if len(fields) < layout.header.size:
        return None
    name, num_bytes = layout.header.unpack(fields)
    return name[:4], position + len(fields), num_bytes - layout.own_bytes


def _read(file: BinaryIO, position: int, num_bytes: int) -> bytes:
    file.seek(position)
    return file.read(num_bytes)
