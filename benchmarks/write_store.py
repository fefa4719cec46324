"""Writing shards to a disk, beside a plain file and zarr-python.

    python benchmarks/write_store.py [--out DIR] [--rows 65536] [--widths 384 1536] [--rounds 7]

MB/s of float16 rows, contenders in turn, medians; every one ends with the data synchronised:

- `plain file`: the shard's bytes in one write, fsync, rename.
- `hearsae`: the rows of 300-frame clips, one after the other, through `ShardWriter` to the commit record: chunks, checksums (CRC32C of each chunk,
  XXH3 of the whole), sums for the statistics, fsync, rename, record. `seconds of the caller` is what is left of it for a thread that has other
  work meanwhile.
- `without CRC32C`: hearsae with a checksum that is always zero.
- `zarr-python`: the same array, codecs and chunks, one assignment of the shard, then fsync of its object.
- `zarr-python by clips`: the same, assigned clip by clip: each is a read and a write of the whole shard, so it is run on an eighth of the rows.

Then the parts of hearsae's work, alone, as shares of its time.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import patch

import numpy as np
import xxhash
import zarr
from google_crc32c import value as crc32c_of
from zarr.codecs import Crc32cCodec

from cache import shard_writer
from cache.header import Header
from cache.plan import SourceItem, make_plan
from cache.shard_writer import ShardWriter, add_up
from cache.sites import Site
from cache.store import ActivationStore

CHUNK_ROWS, CLIP_FRAMES = 4096, 300


def synchronise(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


class Case:
    def __init__(self, out: Path, rows: int, width: int) -> None:
        self.out, self.width = out, width
        items = [SourceItem(f"{i}.wav", 0, CLIP_FRAMES * 320) for i in range(rows // CLIP_FRAMES)]
        self.plan = make_plan(items, shard_rows=rows, chunk_rows=CHUNK_ROWS, shuffle=False)
        self.rows = np.zeros((rows, width), np.float16)
        self.rows[: len(items) * CLIP_FRAMES] = np.random.default_rng(0).standard_normal((len(items) * CLIP_FRAMES, width), np.float32)
        self.runs = 0

    def fresh(self) -> Path:
        self.runs += 1
        return self.out / f"{self.width}-{self.runs}"

    def plain(self) -> float:
        path, data = self.fresh(), memoryview(self.rows).cast("B")
        start = time.perf_counter()
        with open(path.with_suffix(".tmp"), "wb", buffering=0) as file:
            file.write(data)
            os.fsync(file.fileno())
        path.with_suffix(".tmp").rename(path)
        return time.perf_counter() - start

    def hearsae(self) -> tuple[float, float]:
        """Seconds, and those in which the caller could not do other work."""
        site = Site("encoder.blocks.0", "frame", self.width, 0)
        model = {"name": "none", "sha256": "0", "dims": {}, "has_decoder": False}
        store = ActivationStore.create(self.fresh(), Header(model, {}, self.plan.axes, self.plan.summary()), self.plan, [site])
        busy = 0.0
        start = time.perf_counter()
        with ThreadPoolExecutor(1) as thread, ShardWriter(store, site.name, 0, thread) as writer:
            for clip in range(self.plan.clips.num_rows):
                writer.add(clip, self.rows[clip * CLIP_FRAMES : (clip + 1) * CLIP_FRAMES])
            before = time.perf_counter()
            writer.commit([], {})
            busy = time.perf_counter() - before
        return time.perf_counter() - start, busy

    def hearsae_unchecked(self) -> float:
        with patch.object(shard_writer, "extend_crc32c", lambda checksum, data: 0):
            return self.hearsae()[0]

    def zarr_array(self, path: Path, rows: int) -> zarr.Array:
        layout = {"shape": (rows, self.width), "chunks": (CHUNK_ROWS, self.width), "shards": (rows, self.width)}
        return zarr.create_array(path, dtype="float16", compressors=[Crc32cCodec()], fill_value=0, **layout)

    def by_zarr(self) -> float:
        path = self.fresh()
        array = self.zarr_array(path, len(self.rows))
        start = time.perf_counter()
        array[:] = self.rows
        synchronise(path / "c" / "0" / "0")
        return time.perf_counter() - start

    def by_zarr_in_clips(self) -> float:
        path, rows = self.fresh(), max(CHUNK_ROWS, len(self.rows) // 8 // CHUNK_ROWS * CHUNK_ROWS)
        array = self.zarr_array(path, rows)
        start = time.perf_counter()
        for first in range(0, rows, CLIP_FRAMES):
            array[first : first + CLIP_FRAMES] = self.rows[first : min(rows, first + CLIP_FRAMES)]
        synchronise(path / "c" / "0" / "0")
        return (time.perf_counter() - start) * len(self.rows) / rows


def parts(chunk: np.ndarray) -> dict[str, float]:
    """Seconds a GB of what is done to a chunk."""
    data = chunk.reshape(-1).view(np.uint8)
    data.flags.writeable = False
    total, total_sq = np.zeros(chunk.shape[1]), np.zeros(1)
    target = np.empty_like(chunk)
    work: dict[str, Callable[[], object]] = {
        "copy of a clip's rows": lambda: target.__setitem__(slice(None), chunk),
        "CRC32C": lambda: crc32c_of(data),
        "XXH3": lambda: xxhash.xxh3_64(data),
        "sums": lambda: add_up(chunk.view("u2"), total, total_sq),
    }
    found = {}
    for name, run in work.items():
        run()
        times = []
        for _ in range(9):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        found[name] = statistics.median(times) / chunk.nbytes * 1e9
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="on the disk to be measured; default: a temporary folder")
    parser.add_argument("--rows", type=int, default=65536)
    parser.add_argument("--widths", type=int, nargs="+", default=[384, 1536])
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    for width in arguments.widths:
        seconds: dict[str, list[float]] = {}
        busy = []
        for turn in range(arguments.rounds + 1):
            with tempfile.TemporaryDirectory(dir=arguments.out) as folder:
                case = Case(Path(folder), arguments.rows, width)
                ours, waited = case.hearsae()
                found = {"plain file": case.plain(), "hearsae": ours, "without CRC32C": case.hearsae_unchecked(), "zarr-python": case.by_zarr()}
                found["zarr-python by clips"] = case.by_zarr_in_clips()
                if turn:
                    busy.append(waited)
                    for name, took in found.items():
                        seconds.setdefault(name, []).append(took)
        size = case.rows.nbytes
        print(f"{arguments.rows} rows of {width} float16, {size / 1e6:.0f} MB")
        plain = statistics.median(seconds["plain file"])
        for name, times in seconds.items():
            median = statistics.median(times)
            print(f"  {name:22s} {size / median / 1e6:6.0f} MB/s   {plain / median:5.2f} of a plain file's")
        print(f"  hearsae's caller waits at the end {statistics.median(busy) * 1e3:.0f} ms of {statistics.median(seconds['hearsae']) * 1e3:.0f}")
        for name, took in parts(case.rows[:CHUNK_ROWS]).items():
            print(f"    {name:22s} {1 / took:6.1f} GB/s   {took * size / 1e9 / statistics.median(seconds['hearsae']):5.1%} of hearsae's time")


if __name__ == "__main__":
    main()
