"""obstore or s3fs? Both against one S3 protocol server on loopback, with the requests that hearsae makes; and under faults.

In an environment of its own, since s3fs and boto3 want different versions of botocore:

    python -m venv /tmp/bench && /tmp/bench/bin/pip install zarr obstore s3fs 'moto[server]'
    /tmp/bench/bin/python benchmarks/object_store.py

moto's server is one process of Python: figures are of the clients' work where they differ, and of the server's where they do not.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import obstore
import s3fs
import zarr
from obstore.store import S3Store
from zarr.codecs import Crc32cCodec
from zarr.storage import FsspecStore, ObjectStore

SERVER = Path(__file__).parents[1] / "tests" / "s3_server.py"
SHARD_ROWS, CHUNK_ROWS, WIDTH = 65536, 4096, 384
RECORDS = 300
FAULTS = ("500", "503", "lost", "slow", "cut", "reset")
FAULT_SHARE, FAULT_OBJECTS, FAULT_BYTES = 0.2, 40, 300_000


@contextmanager
def server(faults: dict[str, float] | None = None) -> Iterator[dict[str, str]]:
    """Runs the server in a process of its own."""
    process = subprocess.Popen(
        [sys.executable, str(SERVER), json.dumps(faults or {})], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout and process.stdin
    try:
        yield json.loads(process.stdout.readline())
    finally:
        process.stdin.close()
        process.wait(timeout=10)


class Obstore:
    name = f"obstore {version('obstore')}"

    def __init__(self, url: str, env: dict[str, str], prefix: str = "o") -> None:
        self.settings: dict[str, Any] = {
            "endpoint": url,
            "access_key_id": env["AWS_ACCESS_KEY_ID"],
            "secret_access_key": env["AWS_SECRET_ACCESS_KEY"],
            "client_options": {"allow_http": True},
            "disable_bulk_delete": True,
        }
        self.store = S3Store("bucket", prefix=prefix, **self.settings)

    def put(self, key: str, data: bytes) -> None:
        obstore.put(self.store, key, data, use_multipart=False)

    def get(self, key: str) -> bytes:
        return bytes(obstore.get(self.store, key).bytes())

    def names(self, folder: str) -> int:
        return len(obstore.list_with_delimiter(self.store, folder)["objects"])

    def zarr_store(self) -> Any:
        return ObjectStore(self.store)


class S3fs:
    name = f"s3fs {version('s3fs')}"

    def __init__(self, url: str, env: dict[str, str], prefix: str = "f") -> None:
        self.settings = {"key": env["AWS_ACCESS_KEY_ID"], "secret": env["AWS_SECRET_ACCESS_KEY"], "client_kwargs": {"endpoint_url": url}}
        self.fs = s3fs.S3FileSystem(**self.settings, use_listings_cache=False, skip_instance_cache=True)
        self.root = f"bucket/{prefix}"

    def put(self, key: str, data: bytes) -> None:
        self.fs.pipe_file(f"{self.root}/{key}", data)

    def get(self, key: str) -> bytes:
        return self.fs.cat_file(f"{self.root}/{key}")

    def names(self, folder: str) -> int:
        return len(self.fs.ls(f"{self.root}/{folder}", detail=False))

    def zarr_store(self) -> Any:
        asynchronous = s3fs.S3FileSystem(**self.settings, asynchronous=True, skip_instance_cache=True)
        return FsspecStore(asynchronous, path=self.root)


def seconds(work: Callable[[], Any], times: int = 3) -> float:
    """The best of some runs."""
    best = float("inf")
    for _ in range(times):
        began = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - began)
    return best


def throughput(client: Any) -> dict[str, str]:
    """Whole shards, small records, listings, chunks at random through zarr."""
    shard = np.random.default_rng(0).bytes(SHARD_ROWS * WIDTH * 2)
    record = bytes(1000)
    found = {"put shard, MB/s": len(shard) / 1e6 / seconds(lambda: client.put("shard", shard))}
    found["get shard, MB/s"] = len(shard) / 1e6 / seconds(lambda: client.get("shard"))

    def one_by_one(function: Callable[[int], Any]) -> None:
        for i in range(RECORDS):
            function(i)

    def in_threads(function: Callable[[int], Any]) -> None:
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(function, range(RECORDS)))

    found["put records, /s"] = RECORDS / seconds(lambda: one_by_one(lambda i: client.put(f"records/{i:06d}.json", record)), 1)
    found["get records, /s"] = RECORDS / seconds(lambda: one_by_one(lambda i: client.get(f"records/{i:06d}.json")))
    found["get records, 16 threads, /s"] = RECORDS / seconds(lambda: in_threads(lambda i: client.get(f"records/{i:06d}.json")))
    assert client.names("records") == RECORDS
    found[f"list {RECORDS} records, ms"] = 1000 * seconds(lambda: client.names("records"))

    shape = (2 * SHARD_ROWS, WIDTH)
    array = zarr.create_array(
        client.zarr_store(), shape=shape, dtype="float16", chunks=(CHUNK_ROWS, WIDTH), shards=(SHARD_ROWS, WIDTH), compressors=[Crc32cCodec()]
    )
    array[:] = np.random.default_rng(0).standard_normal(shape, dtype=np.float32).astype("float16")
    reading = zarr.open_array(client.zarr_store(), mode="r")
    order = np.random.default_rng(0).permutation(shape[0] // CHUNK_ROWS)

    def chunks() -> None:
        for i in order:
            assert reading[i * CHUNK_ROWS : (i + 1) * CHUNK_ROWS].any()

    found["chunks of 4096 rows through zarr, MB/s"] = shape[0] * WIDTH * 2 / 1e6 / seconds(chunks)
    return {what: f"{value:.3g}" if value < 100 else f"{value:.0f}" for what, value in found.items()}


def under_faults(make: Callable[..., Any], fault: str) -> str:
    """Puts and gets where a part of the requests goes wrong: how many fail, how many come back changed, how long it took."""
    with server({fault: FAULT_SHARE}) as env:
        client = make(env["AWS_ENDPOINT_URL"], env)
        began, failed, wrong, kinds = time.perf_counter(), 0, 0, set()
        for i in range(FAULT_OBJECTS):
            data = np.random.default_rng(i).bytes(FAULT_BYTES)
            try:
                client.put(f"x{i}", data)
                wrong += client.get(f"x{i}") != data
            except Exception as error:  # whatever a library raises
                failed += 1
                kinds.add(type(error).__name__)
        what = f"{failed} failed ({', '.join(sorted(kinds))})" if failed else "all good"
        return f"{what}{f', {wrong} wrong' if wrong else ''}, {time.perf_counter() - began:.1f} s"


def main() -> None:
    os.environ["NO_PROXY"] = "127.0.0.1"
    rows: dict[str, list[str]] = {}
    with server() as env:
        for make in (Obstore, S3fs):
            for what, value in throughput(make(env["without_proxy"], env)).items():
                rows.setdefault(what, []).append(value)
    for fault in FAULTS:
        rows[f"{FAULT_SHARE:.0%} {fault}: {FAULT_OBJECTS} puts and gets of {FAULT_BYTES // 1000} kB"] = [
            under_faults(make, fault) for make in (Obstore, S3fs)
        ]
    print(f"| | {Obstore.name} | {S3fs.name} |\n|---|---|---|")
    for what, values in rows.items():
        print(f"| {what} | {' | '.join(values)} |")


if __name__ == "__main__":
    main()
