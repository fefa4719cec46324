"""Rows read straight from a shard's object: those that zarr-python reads, or a refusal."""

import os

import numpy as np
import pytest
import zarr
from conftest import plan_of
from zarr.storage import LocalStore

from cache.chunk_reader import ChunkReader, Layout
from cache.errors import StoreError
from cache.header import Header
from cache.sites import Site
from cache.store import ActivationStore

SITE = Site("encoder.blocks.0", "frame", 20, 0)
ROWS, CHUNK = 256, 64


def filled(path, codec: str = "none", dtype: str = "float16") -> ActivationStore:
    """Two shards of 250 rows; the second chunk of the first is all zero."""
    plan = plan_of([5.0, 5.0], shard_rows=ROWS, chunk_rows=CHUNK, shuffle=False)
    model = {"name": "none", "sha256": "0", "dims": {}, "has_decoder": False}
    store = ActivationStore.create(path, Header(model, {}, plan.axes, plan.summary(), dtype=dtype, codec=codec), plan, [SITE])
    for shard in range(2):
        rows = np.random.default_rng(shard).standard_normal((ROWS, SITE.width)).astype(dtype)
        rows[250:] = 0
        rows[CHUNK : 2 * CHUNK] *= shard
        store.write_shard(SITE.name, shard, rows, [], {})
    return store


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("codec", ["none", "lz4", "zstd"])
def test_any_range_is_what_zarr_reads(tmp_path, codec, dtype):
    store = filled(tmp_path / "s.zarr", codec, dtype)
    by_zarr = zarr.open_array(LocalStore(store.path / SITE.name, read_only=True), mode="r")
    for start, stop in ((0, 256), (0, 64), (64, 128), (63, 65), (10, 20), (1, 255), (200, 256), (256, 512), (300, 301), (320, 448)):
        found = store.read(SITE.name, start, stop)
        assert found.dtype == dtype and np.array_equal(found, by_zarr[start:stop])
        out = np.full((stop - start, SITE.width), 7, dtype)
        store.read_into(SITE.name, start, out)
        assert np.array_equal(out, found)
    with pytest.raises(StoreError, match="cross a shard"):
        store.read(SITE.name, 200, 300)


@pytest.mark.parametrize("codec", ["none", "lz4"])
@pytest.mark.parametrize("place", ["chunk", "checksum", "index", "index checksum", "end"])
def test_no_flipped_byte_and_no_cut_is_read_over(tmp_path, codec, place):
    store = filled(tmp_path / "s.zarr", codec)
    path = store.object_path(SITE.name, 1)
    data = bytearray(path.read_bytes())
    first_chunk = int.from_bytes(data[-4 - 16 * 4 + 8 : -4 - 16 * 4 + 16], "little")
    at = {"chunk": 30, "checksum": first_chunk - 2, "index": len(data) - 40, "index checksum": len(data) - 1, "end": 0}[place]
    data[at] ^= 1
    path.write_bytes(data if place != "end" else data[:-1])
    with pytest.raises(StoreError, match=r"c/1/0.*(damaged|cut short)"):
        ActivationStore.open(store.path).read(SITE.name, 256, 512)


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_a_shard_that_was_written_again_is_read_anew(tmp_path, codec):
    store = filled(tmp_path / "s.zarr", codec)
    assert not store.read(SITE.name, 64, 128).any()  # left out: its index says so, and is kept
    rows = np.random.default_rng(9).standard_normal((ROWS, SITE.width)).astype(np.float16)
    rows[250:] = 0
    ActivationStore.open(store.path).write_shard(SITE.name, 0, rows, [], {})
    assert np.array_equal(store.read(SITE.name, 0, 256), rows)


def test_the_index_is_read_once(tmp_path, monkeypatch):
    store, counted = filled(tmp_path / "s.zarr"), []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda *arguments: counted.append(arguments) or pread(*arguments))
    reader, out = (
        ChunkReader(store.object_path(SITE.name, 1), Layout(4, CHUNK, SITE.width, "float16", "none")),
        np.empty((CHUNK, SITE.width), np.float16),
    )
    for start in (0, 64, 128):
        reader.read(start, out)
    assert len(counted) == 1


def test_an_object_that_is_gone_is_no_zeros(tmp_path):
    store = filled(tmp_path / "s.zarr")
    store.read(SITE.name, 256, 300)
    store.object_path(SITE.name, 1).unlink()
    with pytest.raises(StoreError, match="is damaged"):
        store.read(SITE.name, 256, 300)
