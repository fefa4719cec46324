"""`ChunkReader`: rows out of a shard's object, chunk by chunk, each checked against its CRC32C and read straight to where it is wanted.

What `cache.shard_writer` writes and zarr-python reads too; its way through arrays, codecs and an event loop is several times slower.
"""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from google_crc32c import value as crc32c_of
from numcodecs import Blosc

from cache.location import Location

ABSENT = 2**64 - 1
"""Offset and length of a chunk whose every bit is zero: it is left out."""


class Layout(NamedTuple):
    """Of the shards of a site."""

    chunks: int
    chunk_rows: int
    width: int
    dtype: str
    codec: str


class ChunkReader:
    """Reads one object. Its index is read once, and again where a chunk does not fit it: the shard may have been written again meanwhile."""

    def __init__(self, path: Location, layout: Layout) -> None:
        self._path, self._layout = path, layout
        self._index: np.ndarray | None = None
        self._of: object = None
        """Which file the index is of."""

    def read(self, start: int, out: np.ndarray) -> None:
        """Rows from `start` on, counted within the shard, into out [n, d], which has no gaps.

        Raises ValueError or OSError if the object is damaged or missing, RemoteError where an object store refuses.
        """
        is_fresh = self._index is None
        try:
            self._read(start, out)
        except ValueError:
            if is_fresh:
                raise
            self._index = None
            self._read(start, out)

    def _read(self, start: int, out: np.ndarray) -> None:
        with _Object(self._path) as data:
            if self._index is None or data.identity != self._of:
                self._index, self._of = self._read_index(data), data.identity
            filled, rows = 0, self._layout.chunk_rows
            while filled < len(out):
                number, skipped = divmod(start + filled, rows)
                here = out[filled : filled + rows - skipped]
                self._read_chunk(data, number, skipped, here)
                filled += len(here)

    def _read_index(self, data: "_Object") -> np.ndarray:
        size = 16 * self._layout.chunks
        end = data.last(size + 4)
        if len(end) != size + 4 or crc32c_of(end[:size]) != int.from_bytes(end[size:], "little"):
            raise ValueError("its index is not what its CRC32C says")
        return np.frombuffer(end[:size], "<u8").reshape(-1, 2)

    def _read_chunk(self, data: "_Object", number: int, skipped: int, out: np.ndarray) -> None:
        """Rows of a chunk, from `skipped` on."""
        assert self._index is not None
        offset, length = map(int, self._index[number])
        if offset == ABSENT:
            out[:] = 0
            return
        is_whole = self._layout.codec == "none" and len(out) == self._layout.chunk_rows
        room = out.reshape(-1).view(np.uint8) if is_whole else np.empty(max(0, length - 4), np.uint8)
        if length != room.nbytes + 4:
            raise ValueError(f"chunk {number} has {length} bytes, not {room.nbytes + 4}")
        checksum = bytearray(4)
        data.into(offset, room, checksum)
        view = room[:]
        view.flags.writeable = False  # google_crc32c takes no other without a copy
        if crc32c_of(view) != int.from_bytes(checksum, "little"):
            raise ValueError(f"chunk {number} is not what its CRC32C says")
        if not is_whole:
            rows = np.frombuffer(room if self._layout.codec == "none" else Blosc().decode(room), self._layout.dtype)
            if rows.size != self._layout.chunk_rows * self._layout.width:
                raise ValueError(f"chunk {number} has {rows.size} values")
            out[:] = rows.reshape(-1, self._layout.width)[skipped : skipped + len(out)]


class _Object:
    """Bytes of a file or of an object in a bucket."""

    def __init__(self, path: Location) -> None:
        self._path = path
        self._file = -1
        self.identity: object = None
        """Of a file: another one when it was replaced. Of an object that would be a request of its own."""

    def __enter__(self) -> "_Object":
        if isinstance(self._path, Path):
            self._file = os.open(self._path, os.O_RDONLY)
            facts = os.fstat(self._file)
            self.identity = facts.st_ino, facts.st_mtime_ns, facts.st_size
        return self

    def __exit__(self, *_: object) -> None:
        if self._file >= 0:
            os.close(self._file)

    def last(self, length: int) -> bytes:
        """The last bytes; all where there are fewer."""
        if isinstance(self._path, Path):
            return os.pread(self._file, length, max(0, os.fstat(self._file).st_size - length))
        return self._path.store.get_end(self._path.key, length)

    def into(self, offset: int, *rooms: np.ndarray | bytearray) -> None:
        """Fills rooms with what comes from `offset` on. Raises ValueError if it ends before."""
        views = [memoryview(room) for room in rooms]  # type: ignore[arg-type] # an array is a buffer too
        if not isinstance(self._path, Path):
            data = self._path.store.get_range(self._path.key, offset, offset + sum(view.nbytes for view in views))
            for view in views:
                if len(data) < view.nbytes:
                    raise ValueError("it is cut short")
                view[:] = data[: view.nbytes]
                data = data[view.nbytes :]
            return
        while views:
            got = os.preadv(self._file, views, offset)
            if not got:
                raise ValueError("it is cut short")
            offset += got
            while views and got >= views[0].nbytes:
                got -= views.pop(0).nbytes
            if got:
                views[0] = views[0][got:]
