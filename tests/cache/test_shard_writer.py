"""Shards written chunk by chunk: the bytes that zarr-python would write, and nothing left of what was not committed."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import xxhash
import zarr
from conftest import plan_of
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.storage import MemoryStore

from cache.errors import StoreError
from cache.header import Header
from cache.shard_writer import ShardWriter, add_up
from cache.sites import Site
from cache.store import ActivationStore, Skip

SITE = Site("encoder.blocks.0", "frame", 24, 0)
SECONDS = [1.0, 2.0, 1.28, 0.3, 5.0, 0.7]
"""514 frames: chunks of 64 and shards of 256 put clips across chunks, and leave room at the end of each."""


def by_zarr(rows: np.ndarray, chunk_rows: int, codec: str) -> bytes | None:
    """The plain twin: an array of one shard, assigned at once."""
    memory = MemoryStore()
    blosc = [] if codec == "none" else [BloscCodec(cname=codec, clevel=3, shuffle="bitshuffle")]
    array = zarr.create_array(
        memory,
        shape=rows.shape,
        dtype=rows.dtype,
        chunks=(chunk_rows, rows.shape[1]),
        shards=rows.shape,
        compressors=[*blosc, Crc32cCodec()],
        fill_value=0,
    )
    array[:] = rows
    value = memory._store_dict.get("c/0/0")
    return None if value is None else bytes(value.as_numpy_array())


def new_store(path, dtype: str = "float16", codec: str = "none") -> ActivationStore:
    plan = plan_of(SECONDS, shard_rows=256, chunk_rows=64, shuffle=False)
    model = {"name": "none", "sha256": "0", "dims": {}, "has_decoder": False}
    return ActivationStore.create(path, Header(model, {"kind": "none"}, plan.axes, plan.summary(), dtype=dtype, codec=codec), plan, [SITE])


def rows_of(store: ActivationStore, clip: int) -> np.ndarray:
    span = store.planned_span("frame", clip)
    return np.random.default_rng(clip).standard_normal((span.stop - span.start, SITE.width)).astype(store.header.dtype)


def whole(store: ActivationStore, shard: int, rows: dict[int, np.ndarray]) -> np.ndarray:
    out = np.zeros((256, SITE.width), store.header.dtype)
    for clip, values in rows.items():
        start = store.planned_span("frame", clip).start - shard * 256
        out[start : start + len(values)] = values
    return out


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("codec", ["none", "lz4", "zstd"])
def test_the_bytes_are_those_of_zarr(tmp_path, dtype, codec):
    store = new_store(tmp_path / "s.zarr", dtype, codec)
    for shard in range(store.axis(SITE.name).shards):
        clips = list(store.shard_clips(shard))
        rows = {clip: rows_of(store, clip) for clip in clips if clip != 2}  # one was skipped
        with ThreadPoolExecutor(1) as thread, ShardWriter(store, SITE.name, shard, thread) as writer:
            for clip, values in rows.items():
                writer.add(clip, values)
            record = writer.commit([Skip(2, "it is broken")] if 2 in clips else [], {})
        expected = whole(store, shard, rows)
        written = store.object_path(SITE.name, shard).read_bytes()
        assert written == by_zarr(expected, 64, codec)
        assert (record.object_bytes, record.object_xxh3) == (len(written), xxhash.xxh3_64_hexdigest(written))
        assert record.rows == sum(map(len, rows.values()))
        np.testing.assert_allclose(record.sum, expected.astype(np.float64).sum(0), rtol=1e-12, atol=1e-9)
        assert record.sum_sq_norm == pytest.approx(np.square(expected.astype(np.float64)).sum(), rel=1e-12)
        np.testing.assert_array_equal(store.read(SITE.name, shard * 256, shard * 256 + 256), expected)
    assert not store.verify()[1]


@pytest.mark.parametrize("codec", ["none", "lz4"])
def test_chunks_of_zeros_are_left_out_as_zarr_leaves_them_out(tmp_path, codec):
    store = new_store(tmp_path / "s.zarr", codec=codec)
    rows = np.zeros((256, SITE.width), np.float16)
    rows[130, 3] = 1.0  # the third chunk alone
    record = store.write_shard(SITE.name, 0, rows, [], {})
    assert store.object_path(SITE.name, 0).read_bytes() == by_zarr(rows, 64, codec)
    rows[130, 3] = -0.0
    assert by_zarr(rows, 64, codec) is None or store.write_shard(SITE.name, 0, rows, [], {}).object_bytes
    nothing = store.write_shard(SITE.name, 1, np.zeros_like(rows), [], {})
    assert (nothing.object_bytes, record.object_bytes > 0) == (0, True) and not store.object_path(SITE.name, 1).exists()
    assert store.read(SITE.name, 256, 300).any() == 0


def test_what_is_not_committed_leaves_nothing(tmp_path):
    store = new_store(tmp_path / "s.zarr")
    with pytest.raises(ZeroDivisionError), ThreadPoolExecutor(1) as thread, ShardWriter(store, SITE.name, 0, thread) as writer:
        for clip in store.shard_clips(0):
            writer.add(clip, rows_of(store, clip))
        raise ZeroDivisionError
    assert not store.committed(SITE.name)
    assert not [path for path in (tmp_path / "s.zarr" / SITE.name).rglob("*") if path.is_file() and path.name != "zarr.json"]


def test_a_place_that_cannot_be_written_is_said_and_nothing_is_committed(tmp_path):
    store = new_store(tmp_path / "s.zarr")
    (tmp_path / "s.zarr" / SITE.name / "c").write_text("in the way")
    with pytest.raises(StoreError, match="can't write"), ThreadPoolExecutor(1) as thread, ShardWriter(store, SITE.name, 0, thread) as writer:
        for clip in store.shard_clips(0):
            writer.add(clip, rows_of(store, clip))
        writer.commit([], {})
    assert not store.committed(SITE.name)


def test_a_clip_of_another_length_is_refused(tmp_path):
    store = new_store(tmp_path / "s.zarr")
    with ThreadPoolExecutor(1) as thread, ShardWriter(store, SITE.name, 0, thread) as writer, pytest.raises(ValueError, match="50 rows"):
        writer.add(0, np.zeros((49, SITE.width), np.float16))


def test_few_chunks_wait_for_a_slow_disk(tmp_path):
    store, held = new_store(tmp_path / "s.zarr"), threading.Event()
    with ThreadPoolExecutor(1) as thread, ShardWriter(store, SITE.name, 0, thread) as writer:
        thread.submit(held.wait)
        done = threading.Event()

        def fill() -> None:
            for clip in store.shard_clips(0):
                writer.add(clip, rows_of(store, clip))
            writer.commit([], {})
            done.set()

        filling = threading.Thread(target=fill)
        filling.start()
        assert not done.wait(0.5) and len(writer._pending) <= 2
        held.set()
        filling.join(10)
        assert done.is_set()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_sums_are_those_of_float64(dtype):
    rows = (np.random.default_rng(0).standard_normal((1000, 33)) * 100).astype(dtype)
    rows[0, :4] = 0.0, -0.0, 6e-8, 65504.0
    total, total_sq = np.ones(33), np.ones(1)
    assert add_up(rows.view(f"u{rows.itemsize}"), total, total_sq)
    np.testing.assert_allclose(total, 1 + rows.astype(np.float64).sum(0), rtol=1e-12, atol=1e-8)
    assert total_sq[0] == pytest.approx(1 + np.square(rows.astype(np.float64)).sum(), rel=1e-13)


def test_no_bit_is_set_in_zeros_alone():
    rows = np.zeros((3, 5), np.float16)
    assert not add_up(rows.view("u2"), np.zeros(5), np.zeros(1))
    rows[2, 4] = -0.0
    assert add_up(rows.view("u2"), np.zeros(5), np.zeros(1))
