"""Zarr's view of one array in an object store: reading by ranges, with the bucket's patience and its errors for people."""

import asyncio
from collections.abc import AsyncIterator, Iterable

from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype

from cache.location import RemotePath


class RemoteArray(Store):
    """One array, read-only. The index at the end of each shard is fetched once: zarr asks for it before every chunk.

    That is a few hundred bytes for each shard that was read from.
    """

    def __init__(self, path: RemotePath) -> None:
        super().__init__(read_only=True)
        self.path = path
        self._ends: dict[tuple[str, int], bytes] = {}

    def forget(self) -> None:
        """Fetches indices anew: a shard may have been written again."""
        self._ends.clear()

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        try:
            return prototype.buffer.from_bytes(await asyncio.to_thread(self._fetch, key, byte_range))
        except FileNotFoundError:
            return None

    def _fetch(self, name: str, byte_range: ByteRequest | None) -> bytes:
        bucket, key = self.path.store, (self.path / name).key
        match byte_range:
            case None:
                return bucket.get(key)
            case RangeByteRequest(start, end):
                return bucket.get_range(key, start, end)
            case SuffixByteRequest(suffix):
                if (key, suffix) not in self._ends:
                    self._ends[key, suffix] = bucket.get_end(key, suffix)
                return self._ends[key, suffix]
            case OffsetByteRequest(offset):
                return bucket.get(key)[offset:]

    async def get_partial_values(self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]) -> list[Buffer | None]:
        return [await self.get(key, prototype, byte_range) for key, byte_range in key_ranges]

    async def exists(self, key: str) -> bool:
        return await asyncio.to_thread((self.path / key).is_file)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemoteArray) and other.path == self.path

    # What reading an array needs nothing of

    supports_writes = supports_deletes = supports_listing = False

    async def set(self, key: str, value: Buffer) -> None:
        raise NotImplementedError

    async def delete(self, key: str) -> None:
        raise NotImplementedError

    def list(self) -> AsyncIterator[str]:
        raise NotImplementedError

    def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        raise NotImplementedError

    def list_dir(self, prefix: str) -> AsyncIterator[str]:
        raise NotImplementedError
