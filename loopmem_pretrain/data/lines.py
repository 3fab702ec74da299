"""Lines of plain, gzip and zstandard files, from any byte on; damaged and binary files are refused, not cut short."""

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from loopmem_pretrain.errors import DataError

_CHUNK = 1 << 20
_STORED = 1 << 16
"""Bytes of a zstandard file that are decompressed at once: repetitive text may become ten thousand times as long."""
_WINDOW = 1 << 31
"""Of zstandard frames that are read: the largest there is, as of `zstd --long=31`."""


class Lines:
    """Iterates over lines with their line ends; `stored` is how many bytes of the file on disk were taken in."""

    def __init__(self, stream: Any, raw: BinaryIO) -> None:
        self._stream = stream
        self._raw = raw

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._stream)

    @property
    def stored(self) -> int:
        """Bytes of the stored (possibly compressed) file read so far."""
        return self._raw.tell()


@contextmanager
def read_lines(path: Path, offset: int) -> Iterator[Lines]:
    """Open a text file so that iterating gives its lines, beginning `offset` bytes into the uncompressed text.

    Raises:
        DataError: binary content (a NUL byte near the beginning), compressed data that is damaged or cut off.
        OSError: the file cannot be read.
    """
    with path.open("rb", buffering=_CHUNK) as raw:
        stream: Any = raw
        if path.suffix.lower() == ".gz":
            stream = gzip.GzipFile(fileobj=raw, mode="rb")
        elif path.suffix.lower() == ".zst":
            stream = io.BufferedReader(_Zstandard(raw, path), _CHUNK)
        try:
            if b"\0" in stream.peek(4096):
                raise DataError(
                    f"{path}: binary, or UTF-16, not UTF-8 text: there is a NUL byte near its beginning",
                    "leave it out, or convert it to UTF-8",
                )
            if stream is raw:
                raw.seek(offset)
            else:
                _skip(stream, offset)
            yield Lines(stream, raw)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(
                f"{path}: compressed data is damaged or cut off: {error}", "copy or download the file again"
            ) from error


def _skip(stream: Any, count: int) -> None:
    while count > 0:
        piece = stream.read(min(count, _CHUNK))
        if not piece:
            raise EOFError("it ends before the place where an earlier run stopped")
        count -= len(piece)


class _Zstandard(io.RawIOBase):
    """Decompresses frame after frame. The library's own reader takes a file cut off in a frame for its end."""

    def __init__(self, raw: BinaryIO, path: Path) -> None:
        import zstandard

        self._raw = raw
        self._path = path
        self._library = zstandard
        self._frame: Any = None
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            self._input = self._input or self._raw.read(_STORED)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("the last frame has no end")
                return 0
            self._frame = self._frame or self._library.ZstdDecompressor(max_window_size=_WINDOW).decompressobj()
            try:
                self._output = memoryview(self._frame.decompress(self._input))
            except self._library.ZstdError as error:
                raise EOFError(str(error)) from error
            self._input = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._output))
        buffer[:count], self._output = self._output[:count], self._output[count:]
        return count
