"""`RowStream`: the rows of one or more sites of one or more stores, shuffled, for ever, from any position.

The stream is a sequence that exists before anything is read. Every epoch puts all chunks in an order drawn from (seed, epoch) and
cuts it into blocks that fit in memory; the valid rows of a block come in an order drawn from (seed, epoch, block). So a position
is one number, the rows consumed, and resuming is: make again the block in which it lies.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cache.errors import HearsaeError
from cache.store import ActivationStore, SiteStats, Span

BUFFER_BYTES = 256 << 20


class Batch(NamedTuple):
    """The same rows of every site."""

    rows: dict[str, Tensor]
    """Site -> float32 [batch, d], as stored."""
    position: int
    """Rows consumed once this batch is; where to start a stream that goes on after it."""


class Chunk(NamedTuple):
    """One unit of reading that has valid rows."""

    store: int
    shard: int
    start: int
    """First row, counted over the whole array."""
    stop: int
    rows: int
    """Valid ones."""


class Block(NamedTuple):
    """The valid rows of some chunks, in memory."""

    rows: dict[str, Tensor]
    """Site -> [rows, d], in the stored dtype, as read."""
    order: Tensor
    """int64 [rows]: the order in which they are given out."""


class RowStream:
    """Endless shuffled batches of rows. Iterate once; `close` it, or use it as a context manager.

    Only shards that are committed for all sites when the stream is made take part; rows of skipped clips and the unused ends of
    shards never do. Reads whole chunks. At most two blocks of `buffer_bytes` are in memory: the one in use and the next, read by a
    background thread. What that thread raises, `next` raises.
    """

    def __init__(
        self,
        stores: Sequence[ActivationStore],
        sites: Sequence[str],
        batch: int,
        seed: int = 0,
        position: int = 0,
        buffer_bytes: int = BUFFER_BYTES,
    ) -> None:
        """
        stores: of the same Whisper; each has all `sites`, which share an axis.
        batch: rows per batch, exactly.
        position: rows already consumed, from `Batch.position`.
        buffer_bytes: of one block, all sites counted, in the stored dtype; at least one chunk.

        Raises HearsaeError if the stores can't be read together or have fewer rows than a batch.
        """
        self.stores, self.sites = list(stores), list(dict.fromkeys(sites))
        self.batch, self.seed, self.position, self.buffer_bytes = batch, seed, position, buffer_bytes
        self.wait_seconds = 0.0
        """Time that `next` spent waiting for blocks."""
        self._check_stores()
        self.shards = [store.committed(*self.sites) for store in self.stores]
        """Per store, the shards that take part."""
        self.chunks = [
            chunk
            for number, (store, shards) in enumerate(zip(self.stores, self.shards, strict=True))
            for shard in shards
            for chunk in valid_chunks(store, self.sites, shard, number)
        ]
        self.rows = sum(chunk.rows for chunk in self.chunks)
        """Valid rows: the length of an epoch."""
        if not self.rows or self.rows < batch:
            where = ", ".join(str(store.path) for store in self.stores)
            raise HearsaeError(
                f"{where}: {self.rows} committed rows of {', '.join(self.sites)}, fewer than one batch of {batch}: cache more, or use a smaller batch"
            )
        largest = max(self._row_bytes(store) * store.axis(self.sites[0]).chunk_rows for store in self.stores)
        n_blocks = -(-len(self.chunks) // max(1, buffer_bytes // largest))
        self._bounds = np.linspace(0, len(self.chunks), n_blocks + 1).round().astype(int)
        self._reader = ThreadPoolExecutor(1, "row-stream")
        self._batches = self._generate()

    def fingerprint(self) -> str:
        """SHA-256 of what fixes the sequence: a position means something only in a stream of the same fingerprint."""
        stores = [[store.header.plan["hash"], store.header.model["sha256"], shards] for store, shards in zip(self.stores, self.shards, strict=True)]
        identity = {"stores": stores, "sites": self.sites, "seed": self.seed, "buffer_bytes": self.buffer_bytes}
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def stats(self, site: str) -> SiteStats:
        """Row count, mean and spread of a site over the shards that take part."""
        parts = [store.stats(site, shards) for store, shards in zip(self.stores, self.shards, strict=True) if shards]
        rows = sum(part.rows for part in parts)
        mean = np.sum([part.mean * part.rows for part in parts], axis=0) / rows
        spread = sum(part.rows * (part.mean_sq_dist + float(np.square(part.mean - mean).sum())) for part in parts) / rows
        return SiteStats(rows, mean, spread)

    def seek(self, position: int) -> None:
        """Goes on after `position` rows, from `Batch.position`."""
        self.position = position
        self._batches = self._generate()

    def __iter__(self) -> "RowStream":
        return self

    def __next__(self) -> Batch:
        return next(self._batches)

    def __enter__(self) -> "RowStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops the background thread."""
        self._reader.shutdown(wait=True, cancel_futures=True)

    # The sequence

    def _generate(self) -> Iterator[Batch]:
        epoch, first = divmod(self.position, self.rows)
        number = self._block_of(epoch, first)
        coming = self._reader.submit(self._load, epoch, number)
        offset = first - self._block_start(epoch, number)
        block: Block | None = None
        while True:
            rows = {site: torch.empty(self.batch, self.stores[0].sites[site]["width"]) for site in self.sites}
            filled = 0
            while filled < self.batch:
                if block is None or offset == len(block.order):
                    offset = offset if block is None else 0
                    block = None  # before the next is read on: two blocks at most
                    block = self._wait(coming)
                    epoch, number = (epoch, number + 1) if number + 2 < len(self._bounds) else (epoch + 1, 0)
                    coming = self._reader.submit(self._load, epoch, number)
                take = block.order[offset : offset + self.batch - filled]
                for site, out in rows.items():
                    out[filled : filled + len(take)] = block.rows[site].index_select(0, take)
                filled += len(take)
                offset += len(take)
            self.position += self.batch
            yield Batch(rows, self.position)

    def _wait(self, coming: "Future[Block]") -> Block:
        started = time.perf_counter()
        block = coming.result()
        self.wait_seconds += time.perf_counter() - started
        return block

    def _chunk_order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch, 0]).permutation(len(self.chunks))

    def _block_ends(self, epoch: int) -> np.ndarray:
        """int64 [blocks]: the rows of an epoch up to the end of each block."""
        rows = np.array([chunk.rows for chunk in self.chunks])[self._chunk_order(epoch)]
        return np.cumsum(rows)[self._bounds[1:] - 1]

    def _block_of(self, epoch: int, row: int) -> int:
        return int(np.searchsorted(self._block_ends(epoch), row, side="right"))

    def _block_start(self, epoch: int, number: int) -> int:
        return int(self._block_ends(epoch)[number - 1]) if number else 0

    # Reading

    def _load(self, epoch: int, number: int) -> Block:
        chunks = [self.chunks[i] for i in self._chunk_order(epoch)[self._bounds[number] : self._bounds[number + 1]]]
        total = sum(chunk.rows for chunk in chunks)
        rows = {}
        for site in self.sites:
            rows[site] = np.empty((total, self.stores[0].sites[site]["width"]), self.stores[0].header.dtype)
            filled = 0
            for chunk in chunks:
                store = self.stores[chunk.store]
                rows[site][filled : filled + chunk.rows] = read_valid(store, site, chunk, store.spans(chunk.shard, *self.sites))
                filled += chunk.rows
        order = np.random.default_rng([self.seed, epoch, 1 + number]).permutation(total)
        return Block({site: torch.from_numpy(array) for site, array in rows.items()}, torch.from_numpy(order))

    # Which chunks

    def _check_stores(self) -> None:
        first = self.stores[0]
        for store in self.stores:
            for site in self.sites:
                store.axis(site)  # raises for a site that it does not have
            axes = {store.sites[site]["axis"] for site in self.sites}
            if len(axes) > 1:
                raise HearsaeError(f"{', '.join(self.sites)} lie on different axes ({', '.join(sorted(axes))}): train on them apart")
            for what, theirs, ours in (
                ("model", store.header.model["sha256"], first.header.model["sha256"]),
                ("dtype", store.header.dtype, first.header.dtype),
                *((f"width of {site}", store.sites[site]["width"], first.sites[site]["width"]) for site in self.sites),
            ):
                if theirs != ours:
                    raise HearsaeError(f"{store.path} and {first.path} can't be read together: {what} is {theirs} and {ours}")
            if not store.committed(*self.sites):
                raise HearsaeError(f"{store.path} has no committed shard of {', '.join(self.sites)} yet: run 'hearsae cache' first")

    def _row_bytes(self, store: ActivationStore) -> int:
        return sum(store.sites[site]["width"] for site in self.sites) * np.dtype(store.header.dtype).itemsize


def read_valid(store: ActivationStore, site: str, chunk: Chunk, spans: Sequence[Span]) -> np.ndarray:
    """The rows of a chunk that lie in one of the spans, [rows, d], as stored. Raises HearsaeError if a value is NaN or infinite."""
    rows = store.read(site, chunk.start, chunk.stop)
    number = np.arange(chunk.start, chunk.stop)
    if chunk.rows < len(rows):
        valid = np.zeros(len(rows), dtype=bool)
        for span in spans:
            valid[max(span.start - chunk.start, 0) : max(span.stop - chunk.start, 0)] = True
        rows, number = rows[valid], number[valid]
    # A sum is finite exactly where all its terms are, and is ten times as quick as looking at each.
    if not np.isfinite(float(torch.from_numpy(rows).sum(dtype=torch.float64))):
        bad = number[~np.isfinite(rows).all(axis=1)]
        raise HearsaeError(f"{store.path}: {site} has NaN or infinite values in shard {chunk.shard}, first in row {bad[0]}: cache that shard again")
    return rows


def valid_chunks(store: ActivationStore, sites: Sequence[str], shard: int, number: int = 0) -> Iterator[Chunk]:
    """The chunks of a committed shard that have valid rows, in address order. number: what they shall call the store."""
    axis = store.axis(sites[0])
    first = shard * axis.shard_rows
    valid = np.zeros(axis.shard_rows // axis.chunk_rows, dtype=np.int64)
    for span in store.spans(shard, *sites):
        for i in range((span.start - first) // axis.chunk_rows, (span.stop - 1 - first) // axis.chunk_rows + 1):
            start = first + i * axis.chunk_rows
            valid[i] += min(span.stop, start + axis.chunk_rows) - max(span.start, start)
    for i in np.flatnonzero(valid).tolist():
        start = first + i * axis.chunk_rows
        yield Chunk(number, shard, start, start + axis.chunk_rows, int(valid[i]))
