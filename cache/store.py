"""`ActivationStore`: activations of a Whisper on disk. `docs/store.md` is the normative description of the bytes.

A store is a Zarr v3 group with one array per site and one object per (site, shard). A (site, shard) exists when its commit
record does: objects are written aside and renamed, records after them, so a reader never sees half a shard.
"""

import base64
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from cache.chunk_reader import ChunkReader, Layout
from cache.deviation import DeviationSums
from cache.errors import StoreError
from cache.header import COPY, FILE, Header, crc32c, header_bytes, read_header, refuse_difference
from cache.location import Location, RemotePath, arrow_input, in_order, location, names_in, put
from cache.plan import Axis, Plan
from cache.sites import Site

READERS_KEPT = 4096
"""Of shards that were read from: the index of each is a few hundred bytes."""
OBJECTS_AT_ONCE = 4
"""Whole objects that `verify` holds in memory, of an object store; of a disk one."""

TIMINGS = "alignment.json"
"""The record of the times of words and phones: a store has them when this is there. Written by `cache.timings`."""
TIMING_TABLES = ("words.parquet", "phones.parquet", "unaligned.parquet")


class Span(NamedTuple):
    """The stored rows of one clip on one axis."""

    clip: int
    start: int
    """First row, counted over the whole array."""
    stop: int


class Skip(NamedTuple):
    """A clip that has no rows, and why."""

    clip: int
    reason: str


class SiteStats(NamedTuple):
    """Statistics of a site's rows over a set of shards, from their commit records."""

    rows: int
    mean: np.ndarray
    """float64 [d]"""
    mean_sq_dist: float
    """Mean of ||x - mean||^2 over rows."""


class SiteTotals(NamedTuple):
    """What the committed shards of a site come to."""

    shards: int
    rows: int
    object_bytes: int
    skipped: dict[int, str]
    """Clip -> why it has no rows."""
    deviation: DeviationSums
    """Of trimmed windows from whole ones, of the clips that were compared."""


class Damage(NamedTuple):
    """One thing that `verify` found wrong."""

    site: str
    """Or a file of the whole store: `clips.parquet`, `zarr.json`, ..."""
    shard: int
    """-1 where it is such a file."""
    reason: str

    def __str__(self) -> str:
        return f"{self.site}: {self.reason}" if self.shard < 0 else f"{self.site} shard {self.shard}: {self.reason}"


@dataclass(frozen=True)
class CommitRecord:
    """What is true of one committed (site, shard). Written after its object; its presence is the commit."""

    site: str
    shard: int
    rows: int
    """Valid rows: those of the shard's clips that were not skipped."""
    object_bytes: int
    object_xxh3: str
    """XXH3 (64 bits) of the whole object, 16 hex digits. Not CRC32C: of data that ends in its own CRC32C, as every chunk does, that is a constant."""
    sum: np.ndarray
    """float64 [d], over the valid rows as stored."""
    sum_sq_norm: float
    skipped: tuple[Skip, ...]
    seconds: dict[str, float]
    host: str
    software: dict[str, str]
    deviation: DeviationSums | None = None
    """Of trimmed windows from whole ones, where clips of this shard were compared."""

    def to_json(self) -> bytes:
        data = asdict(self) | {
            "sum": base64.b64encode(self.sum.astype("<f8").tobytes()).decode(),
            "skipped": [skip._asdict() for skip in self.skipped],
        }
        compared = {"deviation": self.deviation._asdict()} if self.deviation else {}
        del data["deviation"]
        return _with_crc32c(data | compared)

    @classmethod
    def from_json(cls, text: bytes) -> "CommitRecord":
        """Raises ValueError, TypeError or KeyError if a byte is another than was written."""
        data = json.loads(text)
        if data.pop("crc32c", None) is not None and _with_crc32c(data) != text:
            raise ValueError("its CRC32C is not its own")
        total = np.frombuffer(base64.b64decode(data["sum"]), dtype="<f8")
        deviation = DeviationSums(**data["deviation"]) if "deviation" in data else None
        return cls(**data | {"sum": total, "skipped": tuple(Skip(**skip) for skip in data["skipped"]), "deviation": deviation})


def _with_crc32c(record: dict[str, Any]) -> bytes:
    return json.dumps(record | {"crc32c": crc32c(json.dumps(record).encode())}).encode()


def _parquet(table: pa.Table) -> memoryview:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return memoryview(sink.getvalue())


class _Facts(NamedTuple):
    """What readers need of a commit record, small enough to keep of a hundred thousand."""

    object_bytes: int
    skipped: tuple[Skip, ...]


class ActivationStore:
    """An activation store: `create` to write, `open` to read."""

    def __init__(self, path: str | Location, header: Header) -> None:
        """Use `open` or `create`."""
        self.path = location(path)
        self.header = header
        self._readers: dict[tuple[str, int], ChunkReader] = {}
        self._facts: dict[tuple[str, int], _Facts] = {}
        self._present: set[tuple[str, int]] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.header)  # another process opens it anew: caches and open arrays stay here

    # Opening and creating

    @classmethod
    def open(cls, path: str | Location, patience: float = 0.0) -> "ActivationStore":
        """Opens an existing store. patience: seconds to wait for one that is still to be made: for its header, and its sites.

        Raises StoreError if there is none at `path`.
        """
        until = time.monotonic() + patience
        while time.monotonic() < until and not ((location(path) / FILE).exists() and read_header(location(path)).sites):
            time.sleep(min(0.5, patience))
        return cls(path, read_header(location(path)))

    @classmethod
    def open_damaged(cls, path: str | Location) -> "ActivationStore":
        """Opens a store to verify or repair it: by the copy of its header where the header itself can't be read."""
        path = location(path)
        try:
            return cls.open(path)
        except StoreError:
            if not (path / COPY).exists():
                raise
            return cls(path, read_header(path, COPY))

    @classmethod
    def create(cls, path: str | Location, header: Header, plan: Plan, sites: Sequence[Site]) -> "ActivationStore":
        """Creates the store, or continues it if its header agrees; adds the arrays of `sites` that are new.

        Raises StoreError naming the first difference if a store made otherwise is there, or if something else is.
        """
        path = location(path)
        if (path / FILE).exists() or (path / COPY).exists():
            store = cls.open(path)
            refuse_difference(path, store.header, header)
            store._add_tables(plan, missing_only=True)
        else:
            try:
                occupied = path.exists() and any(
                    entry.name not in ("clips.parquet", "skipped.parquet", "zarr.json") and not entry.name.startswith(".") for entry in path.iterdir()
                )
            except OSError as error:
                raise StoreError(f"can't use {path} as a store: {error.strerror}") from error
            if occupied:
                raise StoreError(f"{path} holds other things and is no hearsae store: choose an empty or new folder")
            store = cls(path, header)
            store._add_tables(plan)
            store._write_header()  # before the folders of sites: a run that ends between them, or another that starts, finds a store
        store._add_sites(sites)
        return store

    def _add_sites(self, sites: Sequence[Site]) -> None:
        now = read_header(self.path)  # another run may have added sites since
        self.header = replace(now, files=now.files | self.header.files)
        new = [site for site in sites if site.name not in self.header.sites]
        merged = self.header.sites | {site.name: {"axis": site.axis, "width": site.width} for site in new}
        self.header = Header.from_json(self.header.to_json() | {"sites": merged})
        for site in new:
            self._add_file(f"{site.name}/zarr.json", self._array_metadata(site.name))
        self._write_header()

    def _array_metadata(self, site: str) -> memoryview:
        axis = self.axis(site)
        return array_metadata(self.header, self.sites[site]["axis"], (axis.shards * axis.shard_rows, self.sites[site]["width"]))

    def _add_tables(self, plan: Plan, missing_only: bool = False) -> None:
        for name, table in (("clips.parquet", plan.clips), ("skipped.parquet", plan.skipped)):
            if not (missing_only and (self.path / name).exists()):
                self._add_file(name, _parquet(table))

    def _add_file(self, name: str, data: memoryview) -> None:
        put(self.path / name, data)
        self.header = replace(self.header, files=self.header.files | {name: crc32c(data)})

    def _write_header(self) -> None:
        """The header, then its copy, where they are not as they should be."""
        data = header_bytes(self.header)
        for name in (FILE, COPY):
            if not (self.path / name).exists() or (self.path / name).read_bytes() != data:
                put(self.path / name, data)

    # What is there

    @cached_property
    def clips(self) -> pa.Table:
        """One row per clip, sorted by `clip` and by address; columns as in `docs/store.md`."""
        return self._table("clips.parquet")

    @cached_property
    def skipped_sources(self) -> pa.Table:
        """Sources whose header could not be read when the run was planned: `source`, `source_row`, `reason`."""
        return self._table("skipped.parquet")

    def _table(self, name: str) -> pa.Table:
        try:
            with pq.ParquetFile(arrow_input(self.path / name)) as file:  # pq.read_table imports pandas, a third of a second
                return file.read()
        except (OSError, pa.ArrowException) as error:
            advice = f"run 'hearsae repair {self.path}', then 'hearsae cache' again"
            raise StoreError(f"{self.path / name} can't be read ({error}): {advice}") from error

    @cached_property
    def _columns(self) -> dict[str, np.ndarray]:
        names = ("shard", "row_start", "n_frames", "token_start", "n_tokens")
        return {name: self.clips[name].to_numpy() for name in names}

    @property
    def sites(self) -> dict[str, dict[str, Any]]:
        """Site name -> `axis` and `width`."""
        return self.header.sites

    def axis(self, site: str) -> Axis:
        """The layout of the site's axis. Raises StoreError for a site that the store does not have."""
        if site not in self.sites:
            raise StoreError(f"{self.path} has no site '{site}'; it has: {', '.join(sorted(self.sites))}")
        return self.header.axes[self.sites[site]["axis"]]

    def committed(self, *sites: str) -> list[int]:
        """The shards that every one of `sites` has, ascending. Looks at the disk each time: the store may be growing."""
        common: set[int] | None = None
        for site in sites:
            self.axis(site)
            folder = self.path / "commits" / site
            shards = {int(name[:-5]) for name in names_in(folder) if _is_record(name)}
            common = shards if common is None else common & shards
        return sorted(common or ())

    def is_committed(self, site: str, shard: int) -> bool:
        """Whether a site has a shard. Looks at the disk each time, at one file."""
        self.axis(site)
        return self.record_path(site, shard).is_file()

    def arriving(self, *sites: str, patience: float, every: float = 1.0) -> Iterator[int]:
        """All shards of the plan, each once all of `sites` have it. Looks every so many seconds.

        Raises StoreError after `patience` seconds without a new one.
        """
        seen: set[int] = set()
        latest = time.monotonic()
        while len(seen) < self.axis(sites[0]).shards:
            new = [shard for shard in self.committed(*sites) if shard not in seen]
            yield from new
            seen.update(new)
            if new:
                latest = time.monotonic()
            elif time.monotonic() - latest > patience:
                missing = next(shard for shard in range(self.axis(sites[0]).shards) if shard not in seen)
                raise StoreError(
                    f"{self.path}: no new shard of {', '.join(sites)} for {patience:g} s ({len(seen)} of {self.axis(sites[0]).shards} are there, "
                    f"shard {missing} is not): is 'hearsae cache' still running?"
                )
            else:
                time.sleep(min(every, patience))

    def pending(self, sites: Iterable[str]) -> dict[int, list[str]]:
        """Shard -> those of `sites` that it lacks; only shards that lack any."""
        missing: dict[int, list[str]] = {}
        for site in sites:
            done = set(self.committed(site))
            for shard in range(self.axis(site).shards):
                if shard not in done:
                    missing.setdefault(shard, []).append(site)
        return dict(sorted(missing.items()))

    def record(self, site: str, shard: int) -> CommitRecord:
        """The commit record, read anew. Raises StoreError if it is missing or damaged."""
        path = self.record_path(site, shard)
        try:
            record = CommitRecord.from_json(path.read_bytes())
        except FileNotFoundError:
            raise StoreError(f"{self.path}: shard {shard} of {site} is not committed") from None
        except (ValueError, TypeError, KeyError, OSError) as error:
            raise StoreError(f"{path} is damaged ({error}): run 'hearsae repair {self.path}', then 'hearsae cache' again") from error
        self._facts[site, shard] = _Facts(record.object_bytes, record.skipped)
        return record

    def records(self, site: str, shards: Sequence[int] | None = None) -> Iterator[CommitRecord]:
        """The commit records of `shards` (default: all committed ones), in order. From an object store many at once; never all in memory."""
        return in_order(lambda shard: self.record(site, shard), self.committed(site) if shards is None else shards, self.path)

    def totals(self, site: str) -> SiteTotals:
        """Counts over the committed shards. Raises StoreError if a record is damaged."""
        shards, rows, object_bytes, skipped, deviation = 0, 0, 0, dict[int, str](), DeviationSums()
        for record in self.records(site):
            shards, rows, object_bytes = shards + 1, rows + record.rows, object_bytes + record.object_bytes
            skipped.update((skip.clip, skip.reason) for skip in record.skipped)
            deviation = deviation.plus(record.deviation or DeviationSums())
        return SiteTotals(shards, rows, object_bytes, skipped, deviation)

    def remember(self, shards: Sequence[int], *sites: str) -> None:
        """Reads what `spans` needs of shards, many at once, where it would read one by one. Raises StoreError if one is not committed."""
        for site in sites:
            for _ in self.records(site, [shard for shard in shards if (site, shard) not in self._facts]):
                pass

    def _known(self, site: str, shard: int) -> "_Facts":
        if (site, shard) not in self._facts:
            self.record(site, shard)
        return self._facts[site, shard]

    def stats(self, site: str, shards: Sequence[int] | None = None) -> SiteStats:
        """Row count, mean and spread of a site over `shards` (default: all committed ones). Raises StoreError if there are no rows."""
        rows, total, sum_sq_norm = 0, np.zeros(self.sites[site]["width"]) if site in self.sites else 0.0, 0.0
        for record in self.records(site, shards):
            rows, total, sum_sq_norm = rows + record.rows, total + record.sum, sum_sq_norm + record.sum_sq_norm
        if not rows:
            raise StoreError(f"{self.path} has no rows of {site} yet")
        mean = np.asarray(total) / rows
        return SiteStats(rows, mean, max(0.0, sum_sq_norm / rows - float(mean @ mean)))

    def skipped(self, *sites: str) -> dict[int, str]:
        """Clip -> reason, for the clips that committed shards of any of `sites` lack."""
        return {skip.clip: skip.reason for site in sites for record in self.records(site) for skip in record.skipped}

    def shard_clips(self, shard: int) -> range:
        """The clips planned into a shard; clips are numbered in the order of their addresses."""
        first, last = np.searchsorted(self._columns["shard"], [shard, shard + 1])
        return range(int(first), int(last))

    def planned_span(self, axis: str, clip: int) -> Span:
        """Where a clip's rows go on `frame` or `token`; empty on an axis where it has none."""
        start_name, length_name = ("row_start", "n_frames") if axis == "frame" else ("token_start", "n_tokens")
        length = self._columns[length_name][clip]
        if np.isnan(length) or length == 0:
            return Span(clip, 0, 0)
        start = int(self._columns[start_name][clip])
        return Span(clip, start, start + int(length))

    def spans(self, shard: int, *sites: str) -> list[Span]:
        """The stored clips of a committed shard, in address order, without those that any of `sites` skipped.

        The sites must share an axis.
        """
        axes = {self.sites[site]["axis"] for site in sites}
        if len(axes) != 1:
            raise StoreError(f"{', '.join(sites)} lie on different axes ({', '.join(sorted(axes))}): read them apart")
        skipped = {skip.clip for site in sites for skip in self._known(site, shard).skipped}
        axis = axes.pop()
        planned = (self.planned_span(axis, clip) for clip in self.shard_clips(shard) if clip not in skipped)
        return [span for span in planned if span.stop > span.start]

    # Rows

    def read(self, site: str, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of a site's array as stored, [rows, d]; they must lie in one committed shard.

        Rows outside `spans` are zeros that mean nothing. Whole chunks are cheap, single rows are not.
        """
        self.axis(site)
        rows = np.empty((max(0, stop - start), self.sites[site]["width"]), self.header.dtype)
        self.read_into(site, start, rows)
        return rows

    def read_into(self, site: str, start: int, out: np.ndarray) -> None:
        """The same into out [rows, d] of the store's dtype, without gaps."""
        axis = self.axis(site)
        shard, first = divmod(start, axis.shard_rows)
        if not 0 <= start < start + len(out) <= (shard + 1) * axis.shard_rows:
            raise StoreError(f"rows {start}:{start + len(out)} of {site} cross a shard of {axis.shard_rows} rows")
        reader = self._reader(site, shard)
        if reader is None:
            out[:] = 0
            return
        try:
            reader.read(first, out)
        except (ValueError, OSError, RuntimeError) as error:
            raise StoreError(
                f"{self.object_path(site, shard)} is damaged ({error}): run 'hearsae repair {self.path}', then 'hearsae cache' again"
            ) from error

    def read_clip(self, site: str, clip: int) -> np.ndarray:
        """All rows of one clip, [n_frames or n_tokens, d]. Raises StoreError for a clip that is unknown, not committed, or skipped."""
        if not 0 <= clip < self.clips.num_rows:
            raise StoreError(f"there is no clip {clip} in {self.path}: it has clips 0 to {self.clips.num_rows - 1}")
        shard = int(self._columns["shard"][clip])
        for skip in self._known(site, shard).skipped:
            if skip.clip == clip:
                raise StoreError(f"clip {clip} was skipped: {skip.reason}")
        self.axis(site)
        span = self.planned_span(self.sites[site]["axis"], clip)
        if span.stop == span.start:
            raise StoreError(f"clip {clip} has no rows of {site}")
        return self.read(site, span.start, span.stop)

    def _reader(self, site: str, shard: int) -> ChunkReader | None:
        """None for a shard whose every row is zero: it has no object."""
        # A committed object that is gone would read as zeros: look once, before its first use.
        if (site, shard) not in self._present:
            expected, path = self._known(site, shard).object_bytes, self.object_path(site, shard)
            if expected and _size(path) != expected:
                raise StoreError(f"{path} is missing or cut short: run 'hearsae repair {self.path}', then 'hearsae cache' again")
            self._present.add((site, shard))
        if not self._known(site, shard).object_bytes:
            return None
        if (site, shard) not in self._readers:
            axis = self.axis(site)
            layout = Layout(axis.shard_rows // axis.chunk_rows, axis.chunk_rows, self.sites[site]["width"], self.header.dtype, self.header.codec)
            if len(self._readers) >= READERS_KEPT:
                self._readers.clear()
            self._readers[site, shard] = ChunkReader(self.object_path(site, shard), layout)
        return self._readers[site, shard]

    # Writing

    def write_shard(
        self,
        site: str,
        shard: int,
        rows: np.ndarray,
        skipped: Sequence[Skip],
        seconds: dict[str, float],
        deviation: DeviationSums | None = None,
    ) -> CommitRecord:
        """Writes and commits one (site, shard).

        rows: [shard_rows, d] in the store's dtype, zero outside the spans of the clips that were not skipped. deviation: goes into the record.
        Raises StoreError if the place is full or read-only; then nothing was committed.
        """
        from cache.shard_writer import ShardWriter  # brings PyTorch and numba, which who only reads can do without

        gone, first = {skip.clip for skip in skipped}, shard * self.axis(site).shard_rows
        with ThreadPoolExecutor(1) as thread, ShardWriter(self, site, shard, thread) as writer:
            for clip in self.shard_clips(shard):
                if clip not in gone:
                    span = self.planned_span(self.sites[site]["axis"], clip)
                    writer.add(clip, rows[span.start - first : span.stop - first] if span.stop > span.start else rows[:0])
            return writer.commit(skipped, seconds, deviation)

    def object_path(self, site: str, shard: int) -> Location:
        """Where a shard's rows lie."""
        return self.path / site / "c" / str(shard) / "0"

    def record_path(self, site: str, shard: int) -> Location:
        """Where its commit record lies."""
        return self.path / "commits" / site / f"{shard:06d}.json"

    # Trust

    def verify(self) -> tuple[int, list[Damage]]:
        """Reads every committed object and record. Returns how many (site, shard) pairs were read and what is wrong with them."""
        damages = list(self._damaged_files())
        objects = 0
        for site in self.sites:
            shards = self.committed(site)
            for shard, reason in zip(shards, in_order(partial(self._damage, site), shards, self.path, OBJECTS_AT_ONCE), strict=True):
                objects += 1
                if reason:
                    damages.append(Damage(site, shard, reason))
        return objects, damages

    def _damaged_files(self) -> Iterator[Damage]:
        """Of the files that are of the whole store, or of a whole site."""
        for name in (FILE, COPY) if self.header.files else ():
            try:
                read_header(self.path, name)
            except StoreError:
                yield Damage(name, -1, "is damaged" if (self.path / name).exists() else "is missing")
        for name, expected in self.header.files.items():
            try:
                if crc32c((self.path / name).read_bytes()) != expected:
                    yield Damage(name, -1, "its CRC32C is not that of the header")
            except OSError as error:
                yield Damage(name, -1, f"can't be read: {error.strerror}")
        yield from self._damaged_timings()

    def _damaged_timings(self) -> Iterator[Damage]:
        """Of what `cache.timings` writes; its record has the checksums."""
        path = self.path / TIMINGS
        if not path.exists():
            return
        try:
            files = json.loads(path.read_bytes())["files"]
            expected = {name: str(files[name]) for name in TIMING_TABLES}
        except (OSError, ValueError, TypeError, KeyError):
            yield Damage(TIMINGS, -1, "is damaged")
            return
        for name, checksum in expected.items():
            try:
                if str(crc32c((self.path / name).read_bytes())) != checksum:
                    yield Damage(name, -1, f"its CRC32C is not that of {TIMINGS}")
            except OSError as error:
                yield Damage(name, -1, f"can't be read: {error.strerror}")

    def _damage(self, site: str, shard: int) -> str | None:
        try:
            record = self.record(site, shard)
        except StoreError:
            return "commit record is damaged"
        if record.site != site or record.shard != shard or not 0 <= shard < self.axis(site).shards:
            return "commit record is of another shard"
        path = self.object_path(site, shard)
        if not record.object_bytes:
            return None
        try:
            data = path.read_bytes()
        except OSError as error:
            return f"object can't be read: {error.strerror}"
        if len(data) != record.object_bytes:
            return f"object has {len(data)} bytes, its record says {record.object_bytes}"
        if xxhash.xxh3_64_hexdigest(data) != record.object_xxh3:
            return "object's XXH3 is not that of its record"
        return None

    def repair(self) -> list[Damage]:
        """Drops what `verify` finds bad, and what interrupted writers left, so that capture makes it again. Returns what was bad.

        Of a bad object, its record goes. The header is made again from its copy, an array's metadata from the header.
        """
        _, damages = self.verify()
        try:
            for damage in damages:
                if damage.shard >= 0:
                    self.record_path(damage.site, damage.shard).unlink()
                    self._facts.pop((damage.site, damage.shard), None)
                elif damage.site.endswith("/zarr.json"):
                    self._add_file(damage.site, self._array_metadata(damage.site.removesuffix("/zarr.json")))
                elif damage.site not in (FILE, COPY):
                    (self.path / damage.site).unlink(missing_ok=True)
                    if damage.site in TIMING_TABLES:
                        (self.path / TIMINGS).unlink(missing_ok=True)  # the others are of no use without it: 'hearsae align' makes all again
            if self.header.files:
                self._write_header()
            for stale in () if isinstance(self.path, RemotePath) else self.path.rglob(".*.tmp"):  # an object has no half-written state
                stale.unlink()
        except OSError as error:
            raise StoreError(f"can't repair {self.path}: {error.strerror}") from error
        return damages


def _size(path: Location) -> int | None:
    """In bytes; None where there is nothing."""
    try:
        return path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return None


def _is_record(name: str) -> bool:
    return name.endswith(".json") and name[:-5].isdigit()


def array_metadata(header: Header, axis: str, shape: tuple[int, int]) -> memoryview:
    """A site's `zarr.json`, as zarr-python writes it."""
    import zarr  # which readers can do without
    from zarr.codecs import BloscCodec, Crc32cCodec
    from zarr.storage import MemoryStore

    layout, store = header.axes[axis], MemoryStore()
    blosc = [] if header.codec == "none" else [BloscCodec(cname=header.codec, clevel=3, shuffle="bitshuffle")]
    zarr.create_array(
        store,
        shape=shape,
        dtype=header.dtype,
        chunks=(layout.chunk_rows, shape[1]),
        shards=(layout.shard_rows, shape[1]),
        compressors=[*blosc, Crc32cCodec()],
        fill_value=0,
        dimension_names=(axis, f"width_{shape[1]}"),
    )
    return memoryview(store._store_dict["zarr.json"].as_numpy_array())  # type: ignore[arg-type]
