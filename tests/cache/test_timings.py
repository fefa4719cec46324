"""Times of words and phones in a store: what was written is read, and no damaged byte passes for a time."""

import json

import numpy as np
import pyarrow as pa
import pytest
from conftest import fill_store, plan_of

from cache.errors import StoreError
from cache.timings import FILES, INTERVALS, RECORD, UNALIGNED, has_timings, read_timings, write_timings


@pytest.fixture
def store(tmp_path):
    return fill_store(tmp_path / "acts.zarr", plan_of([1.0, 2.0, 1.5]), {"encoder.blocks.0": 4}, lambda site, clip, n: np.ones((n, 4)))


def intervals(*rows):
    return pa.table(list(zip(*rows, strict=True)), schema=INTERVALS) if rows else INTERVALS.empty_table()


def write(store, words=((1, 0.1, 0.4, "Hot"),), phones=((1, 0.2, 0.4, "T"), (1, 0.1, 0.2, "HH"), (0, 0.0, 0.1, "SIL"))):
    unaligned = pa.table([[2], ["no text"]], schema=UNALIGNED)
    return write_timings(store, intervals(*words), intervals(*phones), unaligned, {"method": "jsonl", "phone_set": "arpabet"})


def test_a_new_store_says_how_to_get_times(store):
    assert not has_timings(store)
    with pytest.raises(StoreError, match="run 'hearsae align --store"):
        read_timings(store)


def test_what_was_written_is_read_in_order_of_clip_and_time(store):
    written, read = write(store), read_timings(store)
    assert read == written
    assert read.phones["label"].to_pylist() == ["SIL", "HH", "T"]
    assert (read.info["clips"], read.info["failed"], read.info["method"]) == (3, 1, "jsonl")
    assert read.unaligned.to_pylist() == [{"clip": 2, "reason": "no text"}]


def test_the_same_times_are_the_same_bytes(store):
    write(store)
    before = [(store.path / name).read_bytes() for name in [*FILES, RECORD]]
    write(store)
    assert [(store.path / name).read_bytes() for name in [*FILES, RECORD]] == before


@pytest.mark.parametrize("name", [*FILES])
def test_verify_notices_any_changed_byte_and_repair_drops_all_times(store, name):
    write(store)
    data = bytearray((store.path / name).read_bytes())
    data[len(data) // 2] ^= 1
    (store.path / name).write_bytes(data)
    with pytest.raises(StoreError, match="--again"):
        read_timings(store)
    assert [damage.site for damage in store.verify()[1]] == [name]
    store.repair()
    assert not has_timings(store)
    assert store.verify()[1] == []
    write(store)
    assert read_timings(store).words.num_rows == 1


@pytest.mark.parametrize("text", [b"{", b"[]", b"{}", json.dumps({"format": 1, "files": {}}).encode()])
def test_a_damaged_record_is_damage_too(store, text):
    write(store)
    (store.path / RECORD).write_bytes(text)
    assert [damage.site for damage in store.verify()[1]] == [RECORD]
    store.repair()
    assert not has_timings(store)


@pytest.mark.parametrize("row", [(9, 0.0, 1.0, "x"), (0, 1.0, 0.5, "x"), (0, -1.0, 0.5, "x"), (0, float("nan"), 0.5, "x")])
def test_impossible_times_are_refused_before_anything_is_replaced(store, row):
    write(store)
    with pytest.raises(StoreError, match=r"words\.parquet would"):
        write(store, words=[row])
    assert read_timings(store).words.num_rows == 1
