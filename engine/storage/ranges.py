"""A base class for files that are read in ranges of bytes."""

from __future__ import annotations

import errno
import io
from abc import abstractmethod
from typing import Any


class RangeFile(io.RawIOBase):
    """A seekable binary file of known size; a subclass says how to read a range of it."""

    def __init__(self, name: str, num_bytes: int) -> None:
        super().__init__()
        self.name, self._num_bytes, self._position = name, num_bytes, 0

    @abstractmethod
    def read_range(self, start: int, num_bytes: int) -> bytes:
        """Read at most ``num_bytes`` (at least 1) from byte ``start`` on."""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._num_bytes}[whence]
        if position < 0:
            raise OSError(errno.EINVAL, f"cannot seek to byte {position}", self.name)
        self._position = position
        return position

    def readinto(self, buffer: Any) -> int:  # noqa: ANN401 - any writable buffer
        num_bytes = min(len(buffer), self._num_bytes - self._position)
        if num_bytes <= 0:
            return 0
        data = self.read_range(self._position, num_bytes)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
