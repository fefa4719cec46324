"""`RowStream`: the rows of one or more sites of one or more stores, shuffled, for ever, from any position.

The stream is a sequence that exists before anything is read. Every epoch puts all chunks in an order drawn from (seed, epoch) and
deals them to the lanes in turn. A lane cuts its chunks into blocks that fit in memory; the valid rows of a block come in an order
drawn from (seed, epoch, block, lane). A batch is so many rows of every lane, lane after lane. So a position is one number, the rows
consumed, and resuming is: make again the block of each lane in which it lies. Whoever reads some lanes reads nothing of the others.

Following a store that is still being written, the first epoch goes through the shards in the order of their numbers, which is a fair
one: the plan has shuffled the clips. What comes out never depends on when a shard was committed.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from functools import cached_property
from itertools import count, pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cache.errors import HearsaeError
from cache.header import name_of_context
from cache.location import in_order
from cache.store import ActivationStore, SiteStats
from sae.arrivals import Arrivals
from sae.chunks import Chunk, not_finite, planned_chunks, read_rows, read_rows_into, refuse_not_finite, rows_within, valid_chunks
from sae.kernels import gather

BUFFER_BYTES = 256 << 20
ADVICE = "cache that shard again, or leave such rows out (train --not-finite skip)"
FOLLOWED_STATS_ROWS = 65_536
"""Rows from which mean and spread are taken where a store is still being written."""


Room = dict[str, np.ndarray]
"""Site -> [rows, d], in the stored dtype: memory for a block."""


class Batch(NamedTuple):
    """The same rows of every site."""

    rows: dict[str, Tensor]
    """Site -> float32 [batch, d], as stored."""
    position: int
    """Rows consumed once this batch is; where to start a stream that goes on after it."""


class Block(NamedTuple):
    """The valid rows of some chunks, in memory."""

    rows: dict[str, Tensor]
    """Site -> [rows, d], in the stored dtype, as read."""
    order: Tensor
    """int64 [rows]: the order in which they are given out."""


class RowStream:
    """Endless shuffled batches of rows. Iterate once; `close` it, or use it as a context manager.

    Only shards that are committed for all sites when the stream is made take part (all planned ones with `follow`); rows of skipped
    clips and the unused ends of shards never do. Reads whole chunks. At most two blocks a lane, `buffer_bytes / lanes` each, are in
    memory: the one in use and the next, read by a background thread. What that thread raises, `next` raises.
    """

    def __init__(
        self,
        stores: Sequence[ActivationStore],
        sites: Sequence[str],
        batch: int,
        seed: int = 0,
        position: int = 0,
        buffer_bytes: int = BUFFER_BYTES,
        lanes: int = 1,
        only: Sequence[int] | None = None,
        follow_timeout_s: float | None = None,
        skip_not_finite: bool = False,
    ) -> None:
        """
        stores: of the same Whisper; each has all `sites`, which share an axis.
        batch: rows per batch of all lanes together, exactly.
        position: rows already consumed, from `Batch.position`.
        buffer_bytes: of one block of all lanes, all sites counted, in the stored dtype; at least one chunk a lane.
        only: the lanes to read, ascending: `next` gives their part of each batch. Default: all.
        follow_timeout_s: the stores are still being written: wait for shards as they are needed, so long for any to be committed.
        skip_not_finite: rows with NaN or infinite values leave their place to other rows of their block; else they are an error.

        Raises HearsaeError if the stores can't be read together or have fewer rows than a batch, or fewer chunks than lanes.
        """
        self.stores, self.sites = list(stores), list(dict.fromkeys(sites))
        self.batch, self.seed, self.position, self.buffer_bytes, self.lanes = batch, seed, position, buffer_bytes, lanes
        self.wait_seconds = 0.0
        """Time that `next` and `stats` spent waiting for blocks and shards."""
        self.skipped_rows = 0
        """Rows read whose place was given to others."""
        self._skip_not_finite = skip_not_finite
        self._only = list(range(lanes) if only is None else only)
        self._share = np.diff(np.arange(lanes + 1) * batch // lanes)
        self._arrivals = None if follow_timeout_s is None else Arrivals(self.stores, self.sites, follow_timeout_s)
        self._reading: list[_Lane] | None = None
        if not 1 <= lanes <= batch:
            raise HearsaeError(f"a batch of {batch} rows can't be put together from {lanes} lanes")
        self._check_stores()
        self.shards = [range(store.axis(self.sites[0]).shards) if self._arrivals else store.committed(*self.sites) for store in self.stores]
        """Per store, the shards that take part."""
        if self._arrivals:
            self._check_enough(self._planned, "planned")
        else:
            self._check_enough(self.chunks, "committed")
        largest = max(self._row_bytes(store) * store.axis(self.sites[0]).chunk_rows for store in self.stores)
        self._block_chunks = max(1, buffer_bytes // lanes // largest)

    @cached_property
    def chunks(self) -> list[Chunk]:
        """All that have valid rows. Following, waits for the last shard."""
        for number, shards in enumerate(self.shards):
            for shard in shards if self._arrivals else ():
                self._arrivals.wait(number, shard)  # type: ignore[union-attr]
        for store, shards in zip(self.stores, self.shards, strict=True):
            store.remember(shards, *self.sites)
        found = [
            chunk
            for number, (store, shards) in enumerate(zip(self.stores, self.shards, strict=True))
            for shard in shards
            for chunk in valid_chunks(store, self.sites, shard, number)
        ]
        if self._arrivals:
            self._check_enough(found, "committed")
        return found

    @property
    def rows(self) -> int:
        """Valid rows: the length of an epoch. Following, waits for the last shard."""
        return sum(chunk.rows for chunk in self.chunks)

    def fingerprint(self) -> str:
        """SHA-256 of what fixes the sequence: a position means something only in a stream of the same fingerprint."""
        stores = [
            [store.header.plan["hash"], store.header.model["sha256"], "all" if self._arrivals else shards]
            for store, shards in zip(self.stores, self.shards, strict=True)
        ]
        identity = {"stores": stores, "sites": self.sites, "seed": self.seed, "buffer_bytes": self.buffer_bytes, "lanes": self.lanes}
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def stats(self, site: str) -> SiteStats:
        """Row count, mean and spread of a site over the shards that take part; following, over the first of them, at least one a store."""
        shards = [list(some) for some in self.shards] if self._arrivals is None else self._first_shards(site)
        parts = [self._stats(number, site, some) for number, some in enumerate(shards) if self._has_rows(self.stores[number], site, some)]
        if not parts:
            raise HearsaeError(f"{', '.join(str(store.path) for store in self.stores)}: every clip was skipped, there are no rows of {site}")
        rows = sum(part.rows for part in parts)
        mean = np.sum([part.mean * part.rows for part in parts], axis=0) / rows
        spread = sum(part.rows * (part.mean_sq_dist + float(np.square(part.mean - mean).sum())) for part in parts) / rows
        return SiteStats(rows, mean, spread)

    def _stats(self, number: int, site: str, shards: Sequence[int]) -> SiteStats:
        """From the commit records, of shards with values that are not finite from the rows that are."""
        store = self.stores[number]
        stats = store.stats(site, shards)
        if np.isfinite(stats.mean).all() and np.isfinite(stats.mean_sq_dist):
            return stats
        rows, total, squares = 0, np.zeros(len(stats.mean)), 0.0
        for shard in shards:
            record = store.record(site, shard)
            if np.isfinite(record.sum).all() and np.isfinite(record.sum_sq_norm):
                rows, total, squares = rows + record.rows, total + record.sum, squares + record.sum_sq_norm
                continue
            for chunk in valid_chunks(store, self.sites, shard, number):
                spans = store.spans(shard, *self.sites)
                some = read_rows(store, site, chunk, spans)
                if not self._skip_not_finite:
                    refuse_not_finite(some, store, site, chunk, spans, ADVICE)
                some = some[~not_finite(some)].astype(np.float64)
                rows, total, squares = rows + len(some), total + some.sum(0), squares + float(np.square(some).sum())
        mean = total / max(1, rows)
        return SiteStats(rows, mean, max(0.0, squares / max(1, rows) - float(mean @ mean)))

    def start(self) -> None:
        """Begins to read in the background; else the first `next` does, and waits."""
        if self._reading is None:
            self._reading = [_Lane(self, number, self._lane_position(number)) for number in self._only]

    def seek(self, position: int) -> None:
        """Goes on after `position` rows, from `Batch.position`."""
        if position == self.position:
            return  # what is being read already is what comes next
        self._stop_reading()
        self.position = position

    def __iter__(self) -> "RowStream":
        return self

    def __next__(self) -> Batch:
        """The next rows of the lanes that are read here, lane after lane."""
        self.start()
        assert self._reading is not None
        n = int(self._share[self._only].sum())
        rows = {site: torch.empty(n, self.stores[0].sites[site]["width"]) for site in self.sites}
        first = 0
        for number, lane in zip(self._only, self._reading, strict=True):
            part = {site: out[first : first + self._share[number]] for site, out in rows.items()}
            self.wait_seconds += lane.fill(part, int(self._share[number]))
            first += int(self._share[number])
        self.position += self.batch
        return Batch(rows, self.position)

    def __enter__(self) -> "RowStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops the background threads and every wait."""
        if self._arrivals:
            self._arrivals.close()
        self._stop_reading()

    def _stop_reading(self) -> None:
        for lane in self._reading or ():
            lane.close()
        self._reading = None

    # The sequence

    def walk(self, lane: int, position: int) -> Iterator[tuple[int, int, list[Chunk], int]]:
        """The blocks of a lane, from that in which `position` lies: epoch, number in it, chunks, rows of it already consumed."""
        for epoch in count():
            for number, chunks in enumerate(self._blocks(epoch, lane)):
                if position:
                    rows = sum(chunk.rows for chunk in map(self._arrived, chunks))
                    if position >= rows:
                        position -= rows
                        continue
                yield epoch, number, chunks, position
                position = 0

    def _blocks(self, epoch: int, lane: int) -> list[list[Chunk]]:
        if self._arrivals and epoch == 0:
            mine = self._planned[lane :: self.lanes]
        else:
            order = np.random.default_rng([self.seed, epoch, 0]).permutation(len(self.chunks))
            mine = [self.chunks[i] for i in order[lane :: self.lanes]]
        n_blocks = -(-len(mine) // self._block_chunks)
        bounds = np.linspace(0, len(mine), n_blocks + 1).round().astype(int)
        return [mine[first:last] for first, last in pairwise(bounds)]

    @cached_property
    def _planned(self) -> list[Chunk]:
        """Every chunk of every shard of the plans, the shards in order; those of several stores are mixed in proportion."""
        order = sorted((shard / len(shards), number, shard) for number, shards in enumerate(self.shards) for shard in shards)
        return [chunk for _, number, shard in order for chunk in planned_chunks(self.stores[number], self.sites, shard, number)]

    def _lane_position(self, lane: int) -> int:
        batches, rest = divmod(self.position, self.batch)
        if rest and self.lanes > 1:
            raise ValueError(f"position {self.position} lies within a batch of {self.batch} rows")
        return batches * int(self._share[lane]) + rest

    def _arrived(self, chunk: Chunk) -> Chunk:
        """The chunk with its valid rows; waits for its shard."""
        if self._arrivals is None:
            return chunk
        self._arrivals.wait(chunk.store, chunk.shard)
        return chunk._replace(rows=rows_within(chunk, self.stores[chunk.store].spans(chunk.shard, *self.sites)))

    def room(self) -> Room:
        """Memory for a block. Not touched, not taken."""
        store = self.stores[0]
        rows = self._block_chunks * max(one.axis(self.sites[0]).chunk_rows for one in self.stores)
        return {site: np.empty((rows, store.sites[site]["width"]), store.header.dtype) for site in self.sites}

    def load(self, epoch: int, number: int, lane: int, chunks: Sequence[Chunk], room: Room, stop: Callable[[], bool] = lambda: False) -> Block:
        """Reads a block into `room`. stop: asked before each chunk whether nobody wants it any more; then raises CancelledError."""
        chunks = [self._arrived(chunk) for chunk in chunks]
        ends = np.cumsum([chunk.rows for chunk in chunks])
        total = int(ends[-1])
        bad = {site: np.zeros(total, dtype=bool) for site in self.sites} if self._skip_not_finite else {}
        shards = {(chunk.store, chunk.shard) for chunk in chunks}
        spans_of = {(number, shard): self.stores[number].spans(shard, *self.sites) for number, shard in shards}

        def read(site: str, chunk: Chunk, end: int) -> None:
            if stop():
                raise CancelledError
            store, spans, part = self.stores[chunk.store], spans_of[chunk.store, chunk.shard], slice(end - chunk.rows, end)
            read_rows_into(room[site][part], store, site, chunk, spans)
            if self._skip_not_finite:
                bad[site][part] = not_finite(room[site][part])
            else:
                refuse_not_finite(room[site][part], store, site, chunk, spans, ADVICE)

        wanted = ((site, chunk, end) for site in self.sites for chunk, end in zip(chunks, ends.tolist(), strict=True))
        for _ in in_order(lambda one: read(*one), wanted, self.stores[0].path):  # an object store is asked for many at once
            pass
        order = np.random.default_rng([self.seed, epoch, 1 + number * self.lanes + lane]).permutation(total)
        any_bad = np.any(list(bad.values()), axis=0) if bad else np.zeros(0, bool)
        if any_bad.any():
            order = self._without(order, any_bad, chunks[0])
        return Block({site: torch.from_numpy(room[site][:total]) for site in self.sites}, torch.from_numpy(order))

    def _without(self, order: np.ndarray, bad: np.ndarray, first: Chunk) -> np.ndarray:
        """As long as before, so that positions stay what they are: the rows that are good, and from the first on again."""
        good = order[~bad[order]]
        if not len(good):
            raise HearsaeError(
                f"{self.stores[first.store].path}: no row is finite from row {first.start} of shard {first.shard} on, a whole block of them"
            )
        self.skipped_rows += int(bad.sum())
        return np.resize(good, len(order))

    # Which stores and shards

    def _first_shards(self, site: str) -> list[list[int]]:
        """Per store, the first shards: enough for `FOLLOWED_STATS_ROWS` rows in all, at least one that has rows. Waits for them."""
        assert self._arrivals
        started = time.perf_counter()
        wanted = -(-FOLLOWED_STATS_ROWS // len(self.stores))
        first: list[list[int]] = []
        for number, (store, shards) in enumerate(zip(self.stores, self.shards, strict=True)):
            first.append([])
            rows = 0
            for shard in shards:
                if rows >= wanted:
                    break
                self._arrivals.wait(number, shard)
                first[-1].append(shard)
                rows += store.record(site, shard).rows
        self.wait_seconds += time.perf_counter() - started
        return first

    @staticmethod
    def _has_rows(store: ActivationStore, site: str, shards: Sequence[int]) -> bool:
        return any(store.record(site, shard).rows for shard in shards)

    def _check_enough(self, chunks: Sequence[Chunk], what: str) -> None:
        rows, where = sum(chunk.rows for chunk in chunks), ", ".join(str(store.path) for store in self.stores)
        if not rows or rows < self.batch:
            raise HearsaeError(
                f"{where}: {rows} {what} rows of {', '.join(self.sites)}, fewer than one batch of {self.batch}: cache more, or use a smaller batch"
            )
        if len(chunks) < self.lanes:
            raise HearsaeError(f"{where}: {len(chunks)} chunks have rows, fewer than {self.lanes} lanes: use fewer --lanes or --workers")

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
                ("context", name_of_context(store.header.context), name_of_context(first.header.context)),
                *((f"width of {site}", store.sites[site]["width"], first.sites[site]["width"]) for site in self.sites),
            ):
                if theirs != ours:
                    raise HearsaeError(f"{store.path} and {first.path} can't be read together: {what} is {theirs} and {ours}")
            if self._arrivals is None and not store.committed(*self.sites):
                raise HearsaeError(f"{store.path} has no committed shard of {', '.join(self.sites)} yet: run 'hearsae cache' first")

    def _row_bytes(self, store: ActivationStore) -> int:
        return sum(store.sites[site]["width"] for site in self.sites) * np.dtype(store.header.dtype).itemsize


class _Lane:
    """The rows of one lane, one after the other, and the thread that reads its next block."""

    def __init__(self, stream: RowStream, number: int, position: int) -> None:
        self._stream, self._number = stream, number
        self._walk = stream.walk(number, position)
        self._block: Block | None = None
        self._next = 0
        self._closed = False
        self._rooms = [stream.room(), stream.room()]  # go round: fresh memory for each block would cost as much as reading it
        self._reader = ThreadPoolExecutor(1, f"lane-{number}")
        self._coming = self._reader.submit(self._read)

    def fill(self, rows: dict[str, Tensor], n: int) -> float:
        """The next n rows into `rows` [n, d] of each site. Returns the seconds spent waiting for blocks."""
        filled, waited = 0, 0.0
        while filled < n:
            if self._block is None or self._next == len(self._block.order):
                started = time.perf_counter()
                self._block, self._next = self._coming.result()
                waited += time.perf_counter() - started
                self._coming = self._reader.submit(self._read)
            take = self._block.order[self._next : self._next + n - filled]
            for site, out in rows.items():
                stored = self._block.rows[site].numpy()
                gather(stored.view(f"u{stored.itemsize}"), take.numpy(), out[filled : filled + len(take)].numpy())
            filled += len(take)
            self._next += len(take)
        return waited

    def _read(self) -> tuple[Block, int]:
        """The next block, and how much of it was consumed before."""
        epoch, number, chunks, consumed = next(self._walk)
        self._rooms.reverse()
        return self._stream.load(epoch, number, self._number, chunks, self._rooms[0], stop=lambda: self._closed), consumed

    def close(self) -> None:
        """Waits for the chunk that is being read, not for the block."""
        self._closed = True
        self._reader.shutdown(wait=True, cancel_futures=True)
        self._block, self._coming, self._rooms = None, Future(), []  # memory goes now, not when somebody looks for cycles
