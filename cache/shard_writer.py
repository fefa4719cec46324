"""`ShardWriter`: a shard's object, written chunk by chunk while its rows are still being made.

The bytes are those of zarr-python's sharding codec, without its array in between: chunks one after the other, each followed by its CRC32C, and
last the index: offset and length of every chunk as uint64, then the CRC32C of these. A chunk whose bits are all zero is left out.
"""

import os
import socket
import uuid
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch
import xxhash
from google_crc32c import value as crc32c_of
from numba import njit
from numcodecs import Blosc

from cache.errors import StoreError
from cache.header import software
from cache.location import Location, put

if TYPE_CHECKING:
    from cache.store import ActivationStore, CommitRecord, Skip

ABSENT = 2**64 - 1
"""Offset and length of a chunk that is left out."""
CHUNKS_IN_FLIGHT = 2
"""Of a site, given to the thread and not yet written: more would be memory that grows where the disk is slower than the model."""
SYNC_BYTES = 32 << 20
"""So much, at most, is left to be synchronised at the end, when somebody waits for it."""


class ShardWriter:
    """Writes and commits one (site, shard). Give it to `with`: what was not committed leaves nothing behind.

    Encoding, checksums and the disk are a thread's work; one may serve several writers. An object store gets the object when it is whole.
    """

    def __init__(self, store: "ActivationStore", site: str, shard: int, thread: ThreadPoolExecutor) -> None:
        self.store, self.site, self.shard = store, site, shard
        self._axis, self._axis_name, self._thread = store.axis(site), store.sites[site]["axis"], thread
        self._first, width = shard * self._axis.shard_rows, store.sites[site]["width"]
        self._object = _Object(store.object_path(site, shard), store.header.codec, self._axis.shard_rows // self._axis.chunk_rows)
        self._shape, self._dtype = (self._axis.chunk_rows, width), np.dtype(store.header.dtype)
        self._chunk, self._number = np.zeros(self._shape, self._dtype), 0
        self._rows = 0
        self._sum, self._sum_sq = np.zeros(width), np.zeros(1)
        self._pending: list[Future[None]] = []

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
            self._chunk[offset : offset + here] = rows[:here]
            rows, start = rows[here:], start + here

    def commit(self, skipped: Sequence["Skip"], seconds: dict[str, float]) -> "CommitRecord":
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
        )
        put(self.store.record_path(self.site, self.shard), record.to_json())
        return record

    def _advance(self, number: int) -> None:
        """Gives away the chunk that is being filled, if it is not this one."""
        if number != self._number:
            self._wait(CHUNKS_IN_FLIGHT - 1)
            self._pending.append(self._thread.submit(self._write, self._number, self._chunk))
            self._chunk, self._number = np.zeros(self._shape, self._dtype), number

    def _wait(self, at_most: int) -> None:
        while len(self._pending) > at_most:
            self._pending.pop(0).result()

    def _write(self, number: int, chunk: np.ndarray) -> None:
        add_up(torch.from_numpy(chunk).float().numpy(), self._sum, self._sum_sq)
        self._object.write(number, chunk)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for future in self._pending:
            future.cancel()
        for future in self._pending:
            if not future.cancelled():
                future.exception()
        self._object.abandon()


class _Object:
    """The bytes of one shard, as they come: into a file aside, or kept for an object store."""

    def __init__(self, path: Location, codec: str, chunks: int) -> None:
        self._path = path
        self._blosc = None if codec == "none" else Blosc(cname=codec, clevel=3, shuffle=Blosc.BITSHUFFLE)
        self._index = np.full((chunks, 2), ABSENT, "<u8")
        self._size, self._synced, self._digest = 0, 0, xxhash.xxh3_64()
        self._aside: Path | None = None
        self._file: IO[bytes] | None = None
        self._kept: list[bytes | np.ndarray] = []

    def write(self, number: int, chunk: np.ndarray) -> None:
        """The next chunk that has a number; they ascend."""
        data = chunk.reshape(-1).view(np.uint8)
        if not _any_bit(data):
            return
        if self._blosc is not None:
            data = np.frombuffer(self._blosc.encode(chunk), np.uint8)
        data.flags.writeable = False  # google_crc32c takes no other without a copy
        self._index[number] = self._size, len(data) + 4
        self._append(data, crc32c_of(data).to_bytes(4, "little"))
        if self._file is not None and self._size - self._synced >= SYNC_BYTES:
            self._on_disk(lambda file: os.fdatasync(file.fileno()))
            self._synced = self._size

    def finish(self) -> tuple[int, str]:
        """Puts the object in its place. Returns its length and XXH3; where every chunk was zero there is none."""
        if self._size:
            index = self._index.tobytes()
            self._append(index, crc32c_of(index).to_bytes(4, "little"))
            if isinstance(self._path, Path):
                self._on_disk(self._into_place)
            else:
                put(self._path, b"".join(bytes(part) for part in self._kept))
        return self._size, self._digest.hexdigest()

    def abandon(self) -> None:
        """Removes what is not in its place."""
        if self._file is not None:
            self._file.close()
        if self._aside is not None:
            self._aside.unlink(missing_ok=True)
        self._kept = []

    def _append(self, *parts: bytes | np.ndarray) -> None:
        for part in parts:
            self._digest.update(part)  # type: ignore[arg-type] # an array is a buffer too
            self._size += len(part)
        if isinstance(self._path, Path):
            self._on_disk(lambda file: file.writelines(parts))
        else:
            self._kept += parts

    def _into_place(self, file: IO[bytes]) -> None:
        os.fsync(file.fileno())
        file.close()
        assert self._aside is not None and isinstance(self._path, Path)
        os.replace(self._aside, self._path)
        self._aside = None

    def _on_disk(self, act: Any) -> None:
        assert isinstance(self._path, Path)
        try:
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._aside = self._path.with_name(f".{self._path.name}.{uuid.uuid4().hex}.tmp")
                self._file = open(self._aside, "wb", buffering=0)  # noqa: SIM115 - closed by `abandon`
            act(self._file)
        except OSError as error:
            raise StoreError(f"can't write {self._path}: {error.strerror or error}") from error


def _any_bit(data: np.ndarray) -> bool:
    words = len(data) // 8 * 8
    return bool(data[:words].view(np.uint64).any() or data[words:].any())


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})
def add_up(rows: Any, total: Any, total_sq: Any) -> None:
    """Adds to total [d] (float64) the sum of rows [n, d] (float32) and to total_sq [1] that of their squares."""
    squares = 0.0
    for i in range(rows.shape[0]):
        for j in range(rows.shape[1]):
            value = np.float64(rows[i, j])
            total[j] += value
            squares += value * value
    total_sq[0] += squares
