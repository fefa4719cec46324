"""`ShardWriter`: a shard's object, written chunk by chunk while its rows are still being made.

The bytes are those of zarr-python's sharding codec, without its array in between: chunks one after the other, each followed by its CRC32C, and
last the index: offset and length of every chunk as uint64, then the CRC32C of these. A chunk whose bits are all zero is left out.
"""

import socket
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash
from google_crc32c import extend as extend_crc32c
from numba import njit
from numcodecs import Blosc

from cache.chunk_reader import ABSENT
from cache.halves import from_bits
from cache.header import software
from cache.location import FileAside, Location, put

if TYPE_CHECKING:
    from cache.deviation import DeviationSums
    from cache.store import ActivationStore, CommitRecord, Skip

HASHED_BYTES = 256 << 10
"""At once, by both checksums: the second finds them in the cache."""
CHUNKS_IN_FLIGHT = 2
"""Of a site, given to the thread and not yet written: more would be memory that grows where the disk is slower than the model."""


class ShardWriter:
    """Writes and commits one (site, shard). Give it to `with`: what was not committed leaves nothing behind.

    Encoding, checksums and the disk are a thread's work; one may serve several writers. An object store gets the object when it is whole.
    """

    def __init__(self, store: "ActivationStore", site: str, shard: int, thread: ThreadPoolExecutor) -> None:
        self.store, self.site, self.shard = store, site, shard
        self._axis, self._axis_name, self._thread = store.axis(site), store.sites[site]["axis"], thread
        self._first, width = shard * self._axis.shard_rows, store.sites[site]["width"]
        self._object = _Object(store.object_path(site, shard), store.header.codec, self._axis.shard_rows // self._axis.chunk_rows)
        self._number, self._rows = 0, 0
        self._sum, self._sum_sq = np.zeros(width), np.zeros(1)
        # Buffers go round: fresh memory for each chunk would cost as much as copying it.
        self._free = [np.empty((self._axis.chunk_rows, width), store.header.dtype) for _ in range(CHUNKS_IN_FLIGHT + 1)]
        self._chunk, self._filled = self._free.pop(), 0
        self._pending: list[tuple[Future[None], np.ndarray]] = []

    def add(self, clip: int, rows: np.ndarray) -> None:
        """The rows of a clip, [n, d] in the store's dtype: all that are planned for it. Clips come in order; one left out leaves zeros.

        Raises StoreError if the place is full or read-only.
        """
        span = self.store.planned_span(self._axis_name, clip)
        if len(rows) != span.stop - span.start:
            raise ValueError(f"clip {clip} has {span.stop - span.start} rows of {self.site}, not {len(rows)}")
        self._rows += len(rows)
        start = span.start - self._first
        while len(rows):
            number, offset = divmod(start, self._axis.chunk_rows)
            self._advance(number)
            here = min(len(rows), self._axis.chunk_rows - offset)
            self._chunk[self._filled : offset] = 0
            self._chunk[offset : offset + here] = rows[:here]
            self._filled = offset + here
            rows, start = rows[here:], start + here

    def commit(self, skipped: Sequence["Skip"], seconds: dict[str, float], deviation: "DeviationSums | None" = None) -> "CommitRecord":
        """The object, then its record: the shard exists. Raises StoreError if the place is full or read-only; then it does not."""
        from cache.store import CommitRecord

        self._advance(self._number + 1)
        self._wait(0)
        size, digest = self._object.finish()
        record = CommitRecord(
            site=self.site,
            shard=self.shard,
            rows=self._rows,
            object_bytes=size,
            object_xxh3=digest,
            sum=self._sum,
            sum_sq_norm=float(self._sum_sq[0]),
            skipped=tuple(skipped),
            seconds=seconds,
            host=socket.gethostname(),
            software=software(),
            deviation=deviation,
        )
        put(self.store.record_path(self.site, self.shard), record.to_json())
        return record

    def _advance(self, number: int) -> None:
        """Gives away the chunk that is being filled, if it is not this one."""
        if number != self._number:
            self._chunk[self._filled :] = 0
            self._pending.append((self._thread.submit(self._write, self._number, self._chunk), self._chunk))
            self._wait(CHUNKS_IN_FLIGHT)
            self._chunk, self._number, self._filled = self._free.pop(), number, 0

    def _wait(self, at_most: int) -> None:
        while len(self._pending) > at_most or (self._pending and self._pending[0][0].done()):
            future, chunk = self._pending.pop(0)
            future.result()
            self._free.append(chunk)

    def _write(self, number: int, chunk: np.ndarray) -> None:
        if add_up(chunk.view(f"u{chunk.itemsize}"), self._sum, self._sum_sq):
            self._object.write(number, chunk)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for future, _ in self._pending:
            future.cancel()
        for future, _ in self._pending:
            if not future.cancelled():
                future.exception()
        self._object.abandon()


class _Object:
    """The bytes of one shard, as they come: into a file aside, or kept for an object store."""

    def __init__(self, path: Location, codec: str, chunks: int) -> None:
        self._path = path
        self._blosc = None if codec == "none" else Blosc(cname=codec, clevel=3, shuffle=Blosc.BITSHUFFLE)
        self._index = np.full((chunks, 2), ABSENT, "<u8")
        self._size, self._digest = 0, xxhash.xxh3_64()
        self._file = FileAside(path) if isinstance(path, Path) else None
        self._kept: list[bytes | np.ndarray] = []

    def write(self, number: int, chunk: np.ndarray) -> None:
        """The next chunk that has a number; they ascend."""
        data = chunk.reshape(-1).view(np.uint8) if self._blosc is None else np.frombuffer(self._blosc.encode(chunk), np.uint8)
        data.flags.writeable = False  # google_crc32c takes no other without a copy
        self._index[number] = self._size, len(data) + 4
        self._append(data)

    def finish(self) -> tuple[int, str]:
        """Puts the object in its place. Returns its length and XXH3; where every chunk was zero there is none."""
        if self._size:
            index = self._index.tobytes()
            self._append(np.frombuffer(index, np.uint8))
            if self._file is not None:
                self._file.into_place()
            else:
                put(self._path, b"".join(bytes(part) for part in self._kept))
        return self._size, self._digest.hexdigest()

    def abandon(self) -> None:
        """Removes what is not in its place."""
        if self._file is not None:
            self._file.abandon()
        self._kept = []

    def _append(self, data: np.ndarray) -> None:
        """Bytes and their CRC32C."""
        checksum = 0
        for first in range(0, len(data), HASHED_BYTES):
            some = data[first : first + HASHED_BYTES]
            self._digest.update(some)  # type: ignore[arg-type] # an array is a buffer too
            checksum = extend_crc32c(checksum, some)
        end = checksum.to_bytes(4, "little")
        self._digest.update(end)
        self._size += len(data) + len(end)
        if self._file is not None:
            self._file.write(data, end, start=True)
        else:
            self._kept += (data.copy(), end)


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})
def add_up(rows: Any, total: Any, total_sq: Any) -> bool:
    """Adds to total [d] (float64) the sum of rows [n, d], and to total_sq [1] that of their squares. Returns whether any bit of rows is set.

    rows: the bits of float16 as uint16, or of float32 as uint32.
    """
    squares, together = 0.0, rows.dtype.type(0)
    for i in range(rows.shape[0]):
        for j in range(rows.shape[1]):
            bits = rows[i, j]
            value = np.float64(from_bits(bits))
            total[j] += value
            squares += value * value
            together |= bits
    total_sq[0] += squares
    return together != 0
