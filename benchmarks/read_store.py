"""Reading a store: chunks beside memmap and zarr-python, the shuffled stream of training, how well it mixes, and how it hides a slow place.

    python benchmarks/read_store.py [--out DIR] [--shards 24] [--rounds 5] [--consumer-ms 10]

A made-up store of 65,536-row shards of 384 float16 (24: 1.2 GB), whose rows say of which clip they are. GB are of stored bytes.

- Chunks in random order, warm, one process, contenders in turn: `hearsae` (checked against their CRC32C), `zarr-python` (the same array, checked
  too), `memmap` (copied out, unchecked), `memcpy` (from memory).
- The stream: batches of 4,096 rows as float32, two epochs after one that is not counted; the part of the time in which it waited for its reader.
- Mixing: distinct clips in a batch and the largest part of one clip, against rows drawn at random from the whole set, for several buffers.
- A cold disk (every object dropped from the page cache) and a store behind HTTP that answers each request 50 ms late: the part of the time that a
  consumer who needs --consumer-ms for a batch spends waiting; for HTTP also with one request at a time.
"""

import argparse
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from unittest.mock import patch
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
import torch
import zarr
from zarr.storage import LocalStore

from cache.header import Header
from cache.plan import SourceItem, make_plan
from cache.shard_writer import ShardWriter
from cache.sites import Site
from cache.store import ActivationStore
from sae import stream as stream_module
from sae.stream import RowStream

SITE, WIDTH, SHARD_ROWS, CHUNK_ROWS, BATCH = "encoder.blocks.0", 384, 65536, 4096, 4096
ROW_BYTES = WIDTH * 2
LATENCY_S = 0.05
BASE = 2048
"""Whole numbers that float16 holds: a row's first two values are its clip's number to this base."""
BUFFERS_MIB = (16, 64, 256)


def make_store(path: Path, shards: int) -> ActivationStore:
    generator = np.random.default_rng(0)
    items = [SourceItem(f"{i}.wav", 0, int(generator.integers(100, 560)) * 320) for i in range(shards * SHARD_ROWS // 331)]
    plan = make_plan(items, shard_rows=SHARD_ROWS, chunk_rows=CHUNK_ROWS)
    header = Header({"name": "none", "sha256": "0", "dims": {}, "has_decoder": False}, {}, plan.axes, plan.summary())
    store = ActivationStore.create(path, header, plan, [Site(SITE, "frame", WIDTH, 0)])
    noise = generator.standard_normal((600, WIDTH)).astype(np.float16)
    for shard in range(store.axis(SITE).shards):
        with ThreadPoolExecutor(1) as thread, ShardWriter(store, SITE, shard, thread) as writer:
            for clip in store.shard_clips(shard):
                span = store.planned_span("frame", clip)
                rows = noise[: span.stop - span.start].copy()
                rows[:, 0], rows[:, 1] = clip % BASE, clip // BASE
                writer.add(clip, rows)
            writer.commit([], {})
    return store


def warm_chunks(store: ActivationStore, rounds: int) -> None:
    chunks = np.random.default_rng(1).permutation(store.axis(SITE).shards * SHARD_ROWS // CHUNK_ROWS)[:128]
    array = zarr.open_array(LocalStore(store.path / SITE, read_only=True), mode="r")
    per_shard = SHARD_ROWS // CHUNK_ROWS
    files = [np.memmap(store.object_path(SITE, shard), np.uint8, "r") for shard in range(store.axis(SITE).shards)]
    memory = np.zeros((128, CHUNK_ROWS * ROW_BYTES), np.uint8)
    out = np.empty((CHUNK_ROWS, WIDTH), np.float16)
    flat = out.reshape(-1).view(np.uint8)

    def from_map(chunk: int) -> None:
        start = (chunk % per_shard) * (CHUNK_ROWS * ROW_BYTES + 4)
        flat[:] = files[chunk // per_shard][start : start + len(flat)]

    contenders: dict[str, Callable[[int], object]] = {
        "hearsae": lambda chunk: store.read_into(SITE, chunk * CHUNK_ROWS, out),
        "zarr-python": lambda chunk: array[chunk * CHUNK_ROWS : (chunk + 1) * CHUNK_ROWS],
        "memmap, unchecked": from_map,
        "memcpy": lambda chunk: flat.__setitem__(slice(None), memory[chunk % 128]),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, read in contenders.items():
            start = time.perf_counter()
            for chunk in chunks.tolist():
                read(chunk)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    ours = statistics.median(seconds["hearsae"])
    for name, times in seconds.items():
        median = statistics.median(times)
        print(f"  {name:20s} {len(chunks) * len(flat) / median / 1e9:6.2f} GB/s   hearsae is {median / ours:5.2f}x")


def consume(store: ActivationStore, batches: int, work_s: float = 0.0, buffer_mib: int = 256, skip: int = 0) -> tuple[float, float]:
    """Seconds for so many batches, and the part of them spent waiting for rows, beyond the first block."""
    with RowStream([store], [SITE], BATCH, buffer_bytes=buffer_mib << 20) as stream:
        for _ in range(1 + skip):
            next(stream)
        waited, start = stream.wait_seconds, time.perf_counter()
        for _ in range(batches):
            next(stream)
            if work_s:
                time.sleep(work_s)
        took = time.perf_counter() - start
        return took, (stream.wait_seconds - waited) / took


def mixing(store: ActivationStore, buffer_mib: int | None) -> tuple[float, float]:
    """Mean of distinct clips in a batch, and of the largest part of one clip; of rows drawn from the whole set where there is no buffer."""

    def summed_up(clips: np.ndarray) -> tuple[int, float]:
        counts = np.bincount(clips)
        return int((counts > 0).sum()), float(counts.max() / len(clips))

    if buffer_mib is None:
        lengths = store.clips["n_frames"].to_numpy()
        of_row = np.repeat(np.arange(len(lengths)), lengths)
        generator = np.random.default_rng(0)
        found = [summed_up(generator.choice(of_row, BATCH, replace=False)) for _ in range(100)]
    else:
        with RowStream([store], [SITE], BATCH, buffer_bytes=buffer_mib << 20) as stream:
            batches = (batch.rows[SITE][:, :2].numpy().astype(np.int64) for batch in islice(stream, 0, None, 3))
            found = [summed_up(rows[:, 0] + BASE * rows[:, 1]) for rows in islice(batches, 100)]
    return statistics.mean(clips for clips, _ in found), statistics.mean(share for _, share in found)


def drop_from_cache(store: ActivationStore) -> None:
    for shard in range(store.axis(SITE).shards):
        with open(store.object_path(SITE, shard), "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class _Bucket(BaseHTTPRequestHandler):
    """What of S3 reading a store needs, from a folder, late."""

    protocol_version = "HTTP/1.1"
    root: Path

    def do_GET(self) -> None:
        time.sleep(LATENCY_S)
        url = urlsplit(self.path)
        query = parse_qs(url.query)
        if "list-type" in query:
            folder = query.get("prefix", [""])[0]
            entries = sorted(os.scandir(self.root / folder), key=lambda entry: entry.name) if (self.root / folder).is_dir() else []
            files = [entry for entry in entries if entry.is_file()]
            listed = "".join(
                f"<Contents><Key>{folder}{one.name}</Key><Size>{one.stat().st_size}</Size><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
                "<ETag>e</ETag></Contents>"
                for one in files
            )
            listed += "".join(f"<CommonPrefixes><Prefix>{folder}{one.name}/</Prefix></CommonPrefixes>" for one in entries if one.is_dir())
            self._answer(200, f"<ListBucketResult><IsTruncated>false</IsTruncated>{listed}</ListBucketResult>".encode(), {})
            return
        path = self.root / unquote(url.path).split("/", 2)[2]
        if not path.is_file():
            self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>", {})
            return
        size, asked = path.stat().st_size, self.headers.get("Range")
        with open(path, "rb") as file:
            if asked is None or self.command == "HEAD":
                self._answer(200, file.read() if self.command == "GET" else b"", {"Content-Length": str(size)})
                return
            first, last = asked.removeprefix("bytes=").split("-")
            start, stop = (max(0, size - int(last)), size) if not first else (int(first), min(size, int(last) + 1) if last else size)
            self._answer(206, os.pread(file.fileno(), stop - start, start), {"Content-Range": f"bytes {start}-{stop - 1}/{size}"})

    do_HEAD = do_GET

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response_only(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.send_header("ETag", '"e"')
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def late_bucket(root: Path) -> Iterator[None]:
    """Serves a folder as `s3://bucket/`, in a process of its own, and points this one at it."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bucket", (_Bucket,), {"root": root}))
        server.daemon_threads = True
        os.write(writer, str(server.server_address[1]).encode().ljust(8))
        server.serve_forever()
    port = int(os.read(reader, 8))
    settings = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_REGION": "us-east-1"}
    try:
        with patch.dict(os.environ, settings):
            yield
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="on the disk to be measured; default: a temporary folder")
    parser.add_argument("--shards", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--consumer-ms", type=float, default=10.0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=arguments.out) as folder, late_bucket(Path(folder)):
        measure(make_store(Path(folder) / "store", arguments.shards), arguments)


def measure(store: ActivationStore, arguments: argparse.Namespace) -> None:
    rows = sum(store.clips["n_frames"].to_pylist())
    batches, work_s = rows // BATCH, arguments.consumer_ms / 1e3
    print(f"{rows} rows, {rows * ROW_BYTES / 1e9:.2f} GB, {store.clips.num_rows} clips\nchunks, warm, in random order")
    warm_chunks(store, arguments.rounds)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    runs = [consume(store, 2 * batches, skip=batches) for _ in range(arguments.rounds)]
    took, waited = map(statistics.median, zip(*runs, strict=True))
    speed = 2 * batches * BATCH / took
    print(f"stream, warm: {speed:,.0f} rows/s, {speed * ROW_BYTES / 1e9:.2f} GB/s, waiting {waited:.0%}")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"  its peak memory: {grown:.0f} MiB more than before, two blocks of 256 MiB")
    print("mixing: distinct clips in a batch of 4,096, largest part of one clip")
    for buffer_mib in (*BUFFERS_MIB, None):
        clips, share = mixing(store, buffer_mib)
        print(f"  {'whole set, at random' if buffer_mib is None else f'--buffer-mib {buffer_mib}':22s} {clips:7.1f} clips   {share:.2%}")
    print(f"a consumer of {arguments.consumer_ms:g} ms a batch waits, beyond the first block")
    drop_from_cache(store)
    print(f"  cold disk:               {consume(store, batches, work_s, 64)[1]:6.1%}")
    print(f"  warm:                    {consume(store, batches, work_s, 64)[1]:6.1%}")
    remote = ActivationStore.open("s3://bucket/store")
    print(f"  50 ms late:              {consume(remote, batches, work_s, 64)[1]:6.1%}")
    with patch.object(stream_module, "in_order", lambda function, items, place: map(function, items)):
        print(f"  50 ms late, one by one:  {consume(remote, batches // 4, work_s, 64)[1]:6.1%}")


if __name__ == "__main__":
    main()
