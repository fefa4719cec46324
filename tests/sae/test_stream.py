"""The row stream: every valid row once an epoch, in an order that the seed alone fixes."""

import threading
import time
from collections import Counter
from concurrent.futures import CancelledError
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import fill_store, plan_of

from cache.errors import HearsaeError
from cache.store import ActivationStore
from sae.chunks import not_finite
from sae.kernels import gather
from sae.stream import RowStream

SITE, OTHER = "encoder.blocks.0", "encoder.blocks.0.mlp.1"
SECONDS = [1.0, 2.37, 0.01, 3.3, 11.0, 5.5, 2.0, 7.7, 4.0, 6.1]
WIDTHS = {SITE: 8, OTHER: 16}
CHUNK_BYTES = 64 * (8 + 16) * 2
TOTAL = sum(-(-round(s * 16000) // 320) for s in SECONDS)


def rows_of(site: str, clip: int, n: int) -> np.ndarray:
    """Each row says where it is from: clip, frame, site."""
    rows = np.full((n, WIDTHS.get(site, 8)), 1000 if site == OTHER else 500, np.float16)
    rows[:, 0], rows[:, 1] = clip + 1, np.arange(n)
    return rows


def make(path, **settings) -> ActivationStore:
    return fill_store(path, plan_of(SECONDS, chunk_rows=64, shard_rows=640), WIDTHS, rows_of, **settings)


@pytest.fixture
def store(tmp_path) -> ActivationStore:
    return make(tmp_path / "acts.zarr")


def take(stream: RowStream, n: int) -> list[torch.Tensor]:
    """The first `n` batches of the first site."""
    with stream:
        return [batch.rows[stream.sites[0]] for batch in islice(stream, n)]


def addresses(batches: list[torch.Tensor]) -> list[tuple[int, int]]:
    return [(int(clip) - 1, int(frame)) for batch in batches for clip, frame in batch[:, :2]]


@pytest.mark.parametrize("chunks_in_buffer", [1, 3, 1000])
def test_an_epoch_is_every_valid_row_once_and_nothing_else(store, chunks_in_buffer):
    stream = RowStream([store], [SITE, OTHER], 50, buffer_bytes=chunks_in_buffer * CHUNK_BYTES)
    assert stream.rows == TOTAL
    expected = Counter((clip["clip"], frame) for clip in store.clips.to_pylist() for frame in range(clip["n_frames"]))
    batches = take(stream, -(-3 * TOTAL // 50))
    seen = addresses(batches)
    for epoch in range(3):
        assert Counter(seen[epoch * TOTAL : (epoch + 1) * TOTAL]) == expected
    assert seen[:TOTAL] != seen[TOTAL : 2 * TOTAL]
    assert all(len(batch) == 50 and batch.dtype == torch.float32 for batch in batches)
    assert all((batch[:, 2:] == 500).all() for batch in batches)


def test_skipped_clips_never_appear(tmp_path):
    store = make(tmp_path / "acts.zarr", skip={3: "too loud", 5: "too quiet"})
    stream = RowStream([store], [SITE], 10)
    clips = {clip for clip, _ in addresses(take(stream, stream.rows // 10))}
    assert clips == set(range(len(SECONDS))) - {3, 5}
    assert stream.rows == TOTAL - sum(store.clips["n_frames"][clip].as_py() for clip in (3, 5))


def test_only_shards_that_all_sites_have_take_part(tmp_path):
    store = make(tmp_path / "acts.zarr", shards=[0, 2])
    (store.path / "commits" / OTHER / "000002.json").unlink()
    assert {clip for clip, _ in addresses(take(RowStream([store], [SITE, OTHER], 10), 200))} == set(store.shard_clips(0))
    assert {clip for clip, _ in addresses(take(RowStream([store], [SITE], 10), 200))} == set(store.shard_clips(0)) | set(store.shard_clips(2))


def test_sites_give_the_same_rows(store):
    with RowStream([store], [SITE, OTHER], 32, buffer_bytes=2 * CHUNK_BYTES) as stream:
        for batch in islice(stream, 100):
            assert torch.equal(batch.rows[SITE][:, :2], batch.rows[OTHER][:, :2])
            assert (batch.rows[OTHER][:, 2:] == 1000).all()


def test_the_seed_alone_fixes_the_order(store):
    def first(seed):
        return addresses(take(RowStream([store], [SITE], 20, seed=seed), 60))

    assert first(1) == first(1)
    assert first(1) != first(2)


def test_several_stores_are_mixed(tmp_path):
    stores = [make(tmp_path / "a.zarr"), make(tmp_path / "b.zarr")]
    stream = RowStream(stores, [SITE], 10)
    assert stream.rows == 2 * TOTAL
    assert stream.stats(SITE).rows == 2 * TOTAL
    np.testing.assert_allclose(stream.stats(SITE).mean, stores[0].stats(SITE).mean)
    assert stream.stats(SITE).mean_sq_dist == pytest.approx(stores[0].stats(SITE).mean_sq_dist)
    assert set(Counter(addresses(take(stream, 2 * TOTAL // 10))).values()) <= {1, 2}


def test_a_stream_goes_on_from_any_position(store):
    def stream(position):
        return RowStream([store], [SITE], 30, seed=5, position=position, buffer_bytes=4 * CHUNK_BYTES)

    with stream(0) as straight:
        batches = list(islice(straight, 150))
    assert batches[-1].position == 150 * 30
    for done in (1, 7, 64, 65, 66, 110):
        for ours, theirs in zip(take(stream(batches[done - 1].position), 20), batches[done:], strict=False):
            assert torch.equal(ours, theirs.rows[SITE])


class CountingStore(ActivationStore):
    """Counts reads, and dawdles over every third."""

    def __init__(self, path, header):
        super().__init__(path, header)
        self.reads = 0

    def read_into(self, site, start, out):
        self.reads += 1
        if self.reads % 3 == 0:
            time.sleep(0.003)
        super().read_into(site, start, out)


def test_timing_changes_nothing(store):
    expected = take(RowStream([store], [SITE], 40, buffer_bytes=3 * CHUNK_BYTES), 100)
    with RowStream([CountingStore.open(store.path)], [SITE], 40, buffer_bytes=3 * CHUNK_BYTES) as slow:
        for number, batch in enumerate(islice(slow, 100)):
            if number % 20 == 0:
                time.sleep(0.01)
            assert torch.equal(batch.rows[SITE], expected[number])
    assert slow.wait_seconds > 0


def test_at_most_two_blocks_are_read_ahead(store):
    counting = CountingStore.open(store.path)
    with RowStream([counting], [SITE], 1, buffer_bytes=2 * 64 * 8 * 2) as stream:
        next(stream)
        time.sleep(0.2)
        assert counting.reads == 4


def test_a_started_stream_reads_before_anyone_asks_and_gives_the_same(store):
    two_chunks = 2 * 64 * 8 * 2
    expected = take(RowStream([store], [SITE], 40, buffer_bytes=two_chunks), 10)
    counting = CountingStore.open(store.path)
    with RowStream([counting], [SITE], 40, buffer_bytes=two_chunks) as stream:
        stream.start()
        time.sleep(0.2)
        assert counting.reads == 2
        stream.seek(0)
        assert all(torch.equal(batch.rows[SITE], rows) for batch, rows in zip(islice(stream, 10), expected, strict=True))


def test_closing_waits_for_a_chunk_and_not_for_the_block(store):
    class SlowStore(CountingStore):
        def read_into(self, site, start, out):
            time.sleep(0.1)
            super().read_into(site, start, out)

    slow = SlowStore.open(store.path)
    stream = RowStream([slow], [SITE], 40)
    assert len(stream.chunks) > 4  # all in one block
    stream.start()
    time.sleep(0.15)
    stream.close()
    assert slow.reads <= 2


def test_what_goes_wrong_in_the_background_is_raised_in_the_loop(store):
    for path in (store.path / SITE / "c").glob("*/0"):
        data = bytearray(path.read_bytes())
        data[100] ^= 0xFF
        path.write_bytes(data)
    with pytest.raises(HearsaeError, match="damaged"), RowStream([store], [SITE], 10) as stream:
        list(islice(stream, TOTAL // 10))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_values_that_are_not_finite_are_named(tmp_path, bad, dtype):
    def rows(site, clip, n):
        made = rows_of(site, clip, n)
        if site == SITE and clip == 4:
            made[0, 3] = bad
        return made

    store = fill_store(tmp_path / "acts.zarr", plan_of(SECONDS, chunk_rows=64, shard_rows=640), WIDTHS, rows, dtype=dtype)
    where = store.planned_span("frame", 4).start
    message = f"{SITE} has NaN or infinite values in shard {where // 640}, first in row {where}"
    with pytest.raises(HearsaeError, match=message), RowStream([store], [OTHER, SITE], 10) as stream:
        list(islice(stream, TOTAL // 10))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_rows_that_are_not_finite_leave_their_place_to_others_when_asked(tmp_path, bad):
    spoilt = {(4, 0), (4, 7), (6, 100)}

    def rows(site, clip, n):
        made = rows_of(site, clip, n)
        for where, frame in spoilt:
            if where == clip and site == (SITE if clip == 4 else OTHER):
                made[frame, 3] = bad
        return made

    store = fill_store(tmp_path / "acts.zarr", plan_of(SECONDS, chunk_rows=64, shard_rows=640), WIDTHS, rows)
    with RowStream([store], [SITE, OTHER], 10, skip_not_finite=True) as stream:
        batches = list(islice(stream, stream.rows // 10))
        assert stream.rows == TOTAL
    seen = Counter(addresses([batch.rows[SITE] for batch in batches]))
    everything = {(clip["clip"], frame) for clip in store.clips.to_pylist() for frame in range(clip["n_frames"])}
    assert len(everything - set(seen)) <= len(spoilt) + TOTAL % 10 and not spoilt & set(seen)
    assert all(torch.isfinite(batch.rows[site]).all() for batch in batches for site in (SITE, OTHER))
    assert stream.skipped_rows in (len(spoilt), 2 * len(spoilt))  # the next epoch may have been read already
    # The statistics are those of the rows that are finite, too.
    good = [store.read_clip(SITE, clip).astype(np.float64) for clip in range(len(SECONDS))]
    good = np.concatenate(good)
    good = good[np.isfinite(good).all(axis=1)]
    stats = stream.stats(SITE)
    np.testing.assert_allclose(stats.mean, good.mean(0), rtol=1e-9)
    assert stats.mean_sq_dist == pytest.approx(np.square(good - good.mean(0)).sum(1).mean(), rel=1e-9)
    assert stats.rows == len(good)
    with pytest.raises(HearsaeError, match="NaN or infinite values in shard"):
        RowStream([store], [SITE], 10).stats(SITE)


def test_stores_that_do_not_fit_are_refused(tmp_path, store):
    with pytest.raises(HearsaeError, match=f"{TOTAL} committed rows .* fewer than one batch of 5000"):
        RowStream([store], [SITE], 5000)
    with pytest.raises(HearsaeError, match=r"has no site 'encoder.blocks.9'"):
        RowStream([store], ["encoder.blocks.9"], 10)
    empty = make(tmp_path / "empty.zarr", shards=[])
    with pytest.raises(HearsaeError, match="no committed shard"):
        RowStream([empty], [SITE], 10)
    single = fill_store(tmp_path / "single.zarr", plan_of(SECONDS, chunk_rows=64, shard_rows=640), {SITE: 8}, rows_of, dtype="float32")
    with pytest.raises(HearsaeError, match="can't be read together: dtype is float32 and float16"):
        RowStream([store, single], [SITE], 10)


def test_sites_on_different_axes_are_refused(tmp_path):
    plan = plan_of(SECONDS, chunk_rows=64, shard_rows=640, tokenize=lambda text, language: [1, 2, 3])
    store = fill_store(tmp_path / "acts.zarr", plan, {SITE: 8, "decoder.blocks.0": 8}, rows_of)
    with pytest.raises(HearsaeError, match="different axes"):
        RowStream([store], [SITE, "decoder.blocks.0"], 10)
    assert RowStream([store], ["decoder.blocks.0"], 10).rows == 3 * len(SECONDS)


def test_the_fingerprint_changes_with_what_is_read(tmp_path, store):
    prints = [
        RowStream([store], [SITE], 10).fingerprint(),
        RowStream([store], [SITE], 10, seed=1).fingerprint(),
        RowStream([store], [SITE, OTHER], 10).fingerprint(),
        RowStream([make(tmp_path / "fewer.zarr", shards=[0, 1])], [SITE], 10).fingerprint(),
    ]
    assert len(set(prints)) == 4
    assert RowStream([ActivationStore.open(store.path)], [SITE], 10).fingerprint() == prints[0]


def test_the_sequence_is_the_one_that_checkpoints_rely_on(store):
    seen = addresses(take(RowStream([store], [SITE], 50, seed=3, position=7000, buffer_bytes=3 * CHUNK_BYTES), 1))
    assert seen[:6] == [(9, 59), (1, 1), (8, 188), (0, 263), (0, 191), (0, 288)]
    seen = addresses(take(RowStream([store], [SITE], 50, seed=3, position=7000, buffer_bytes=3 * CHUNK_BYTES, lanes=2), 1))
    assert seen[:3] + seen[25:28] == [(3, 232), (5, 127), (9, 100), (4, 138), (0, 288), (0, 318)]


# Lanes


def lane_rows(store: ActivationStore, lane: int, lanes: int) -> int:
    """Rows of a lane in the first epoch."""
    chunks = RowStream([store], [SITE], 50, lanes=lanes).chunks
    return sum(chunks[i].rows for i in np.random.default_rng([0, 0, 0]).permutation(len(chunks))[lane::lanes])


@pytest.mark.parametrize("lanes", [2, 3, 5])
def test_the_lanes_of_an_epoch_are_every_valid_row_once(store, lanes):
    seen = Counter()
    for lane in range(lanes):
        rows = lane_rows(store, lane, lanes)
        stream = RowStream([store], [SITE], 50, buffer_bytes=4 * CHUNK_BYTES, lanes=lanes, only=[lane])
        seen += Counter(addresses(take(stream, -(-rows // (50 // lanes))))[:rows])
    assert seen == Counter((clip["clip"], frame) for clip in store.clips.to_pylist() for frame in range(clip["n_frames"]))


@pytest.mark.parametrize("buffer", [4 * CHUNK_BYTES, 1 << 28])
def test_whoever_reads_some_lanes_reads_their_part_of_every_batch(store, buffer):
    def batches(only):
        return take(RowStream([store], [SITE, OTHER], 50, seed=2, buffer_bytes=buffer, lanes=3, only=only), 150)

    whole, first, others = batches(None), batches([0]), batches([1, 2])
    assert {len(batch) for batch in whole} == {50}
    assert [len(batch) for batch in (first[0], others[0])] == [16, 34]
    for together, one, two in zip(whole, first, others, strict=True):
        assert torch.equal(together, torch.cat([one, two]))


def test_lanes_go_on_from_the_end_of_any_batch(store):
    def stream(position):
        return RowStream([store], [SITE], 30, seed=5, position=position, buffer_bytes=4 * CHUNK_BYTES, lanes=4)

    straight = take(stream(0), 150)
    for done in (1, 7, 64, 65, 110):
        for ours, theirs in zip(take(stream(30 * done), 20), straight[done:], strict=False):
            assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match="position 31 lies within a batch"):
        next(stream(31))


def test_lanes_share_the_buffer(store):
    counting = CountingStore.open(store.path)
    with RowStream([counting], [SITE], 8, buffer_bytes=4 * 64 * 8 * 2, lanes=2) as stream:
        next(stream)
        time.sleep(0.3)
        assert counting.reads == 8, "two blocks of two chunks in each of two lanes"


def test_more_lanes_than_chunks_or_rows_are_refused(store):
    n_chunks = len(RowStream([store], [SITE], 10).chunks)
    assert len(take(RowStream([store], [SITE], 100, lanes=n_chunks), 3)) == 3
    with pytest.raises(HearsaeError, match=rf"{n_chunks} chunks have rows, fewer than {n_chunks + 1} lanes"):
        RowStream([store], [SITE], 100, lanes=n_chunks + 1)
    with pytest.raises(HearsaeError, match="a batch of 2 rows can't be put together from 3 lanes"):
        RowStream([store], [SITE], 2, lanes=3)


def test_the_fingerprint_changes_with_the_lanes(store):
    assert len({RowStream([store], [SITE], 10, lanes=lanes).fingerprint() for lanes in (1, 2, 3)}) == 3


# A store that is still being written


class Writer(threading.Thread):
    """Commits the shards of a store one by one, in any order, with pauses."""

    def __init__(self, path, order, seed=0, **settings):
        super().__init__(daemon=True)
        self.path, self.order, self.settings, self.rng = path, order, settings, np.random.default_rng(seed)

    def run(self):
        for shard in self.order:
            time.sleep(float(self.rng.uniform(0, 0.1)))
            make(self.path, shards=[shard], **self.settings)


def following(store: ActivationStore, **settings) -> RowStream:
    return RowStream(
        [store], **{"sites": [SITE, OTHER], "batch": 50, "seed": 1, "buffer_bytes": 4 * CHUNK_BYTES, "follow_timeout_s": 30.0} | settings
    )


@pytest.mark.parametrize("lanes", [1, 3])
def test_following_gives_what_a_finished_store_gives(tmp_path, lanes):
    skip = {3: "too loud", 5: "too quiet"}
    finished = make(tmp_path / "finished.zarr", skip=skip)
    shards = finished.axis(SITE).shards
    straight = take(following(finished, lanes=lanes), 120)
    assert 2 * following(finished).rows < 120 * 50, "two epochs"
    for attempt in range(3):
        order = np.random.default_rng(attempt).permutation(shards) if attempt else np.arange(shards)
        growing = make(tmp_path / f"{attempt}.zarr", shards=[], skip=skip)
        stream = following(growing, lanes=lanes)
        writer = Writer(growing.path, order, attempt, skip=skip)
        writer.start()
        live = take(stream, 120)
        writer.join()
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(live, straight, strict=True))
        assert stream.wait_seconds > 0


def test_following_starts_with_the_first_shards_and_then_mixes_all(store):
    seen = addresses(take(following(store, sites=[SITE], buffer_bytes=10 * 64 * 8 * 2), 2 * TOTAL // 50))
    shard = store.clips["shard"].to_numpy()
    first = {int(shard[clip]) for clip, _ in seen[:200]}
    assert first == {0}
    assert Counter(seen[:TOTAL]) == Counter((clip["clip"], frame) for clip in store.clips.to_pylist() for frame in range(clip["n_frames"]))
    assert len({int(shard[clip]) for clip, _ in seen[TOTAL : TOTAL + 200]}) > 1
    usual = take(RowStream([store], [SITE], 50, seed=1, position=TOTAL // 50 * 50 + 50, buffer_bytes=10 * 64 * 8 * 2), 10)
    assert addresses(usual) == seen[TOTAL // 50 * 50 + 50 :][:500], "from the second epoch on it is the usual stream"


def test_following_goes_on_from_any_position(tmp_path):
    store = make(tmp_path / "acts.zarr", skip={3: "too loud"})
    straight = take(following(store, lanes=2), 150)
    for done in (1, 20, 43, 44, 45, 100):
        for ours, theirs in zip(take(following(store, lanes=2, position=50 * done), 10), straight[done:], strict=False):
            assert torch.equal(ours, theirs)


def test_following_several_stores_mixes_their_shards_in_proportion(tmp_path):
    stores = [make(tmp_path / "a.zarr"), make(tmp_path / "b.zarr")]
    stream = RowStream(stores, [SITE], 50, follow_timeout_s=1.0)
    order = list(dict.fromkeys((chunk.shard, chunk.store) for chunk in stream._planned))
    assert order == sorted(order)
    assert len(take(stream, 5)) == 5


def test_what_is_known_of_a_followed_store_is_known_from_its_plan(tmp_path, store, monkeypatch):
    monkeypatch.setattr("sae.stream.FOLLOWED_STATS_ROWS", 700)
    first = make(tmp_path / "first.zarr", shards=[0, 1])
    ours, theirs = following(first), following(store)
    assert ours.fingerprint() == theirs.fingerprint() != RowStream([store], [SITE, OTHER], 50, seed=1).fingerprint()
    assert ours.stats(SITE).rows == theirs.stats(SITE).rows < TOTAL
    np.testing.assert_array_equal(ours.stats(SITE).mean, theirs.stats(SITE).mean)
    with pytest.raises(HearsaeError, match=f"{TOTAL} planned rows .* fewer than one batch of 5000"):
        following(first, batch=5000)


def test_a_wait_without_any_new_shard_ends_in_one_line(tmp_path):
    store = make(tmp_path / "acts.zarr", shards=[0, 2])
    (store.path / "commits" / OTHER / "000002.json").unlink()
    message = f"acts.zarr: shard 1 of {SITE} is missing, and no shard was committed in 0.3 s: start 'hearsae cache' again"
    with pytest.raises(HearsaeError, match=message), following(store, follow_timeout_s=0.3) as stream:
        list(islice(stream, TOTAL // 50))
    make(store.path, shards=[1])
    with pytest.raises(HearsaeError, match=f"shard 2 of {OTHER} is missing"), following(store, follow_timeout_s=0.3) as stream:
        list(islice(stream, TOTAL // 50))


def test_any_new_shard_prolongs_the_wait(tmp_path):
    store = make(tmp_path / "acts.zarr", shards=[])
    shards = store.axis(SITE).shards
    writer = Writer(store.path, range(shards - 1, -1, -1))
    writer.rng = SimpleNamespace(uniform=lambda *_: 0.4)
    writer.start()
    assert len(take(following(store, follow_timeout_s=1.0), 3)) == 3
    assert shards * 0.4 > 1.2


def test_a_wait_ends_when_the_stream_is_closed(tmp_path):
    stream = following(make(tmp_path / "acts.zarr", shards=[]), follow_timeout_s=600.0)
    raised: list[BaseException] = []

    def read_on():
        try:
            next(stream)
        except CancelledError as error:
            raised.append(error)

    thread = threading.Thread(target=read_on, daemon=True)
    thread.start()
    time.sleep(0.2)
    stream.close()
    thread.join(10)
    assert not thread.is_alive() and raised


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_rows_are_gathered_as_torch_would(dtype):
    stored = (np.random.default_rng(0).standard_normal((50, 12)) * 1e3).astype(dtype)
    stored[7, :4] = np.nan, np.inf, -0.0, 6e-8
    rows, out = np.array([7, 0, 49, 7]), np.empty((4, 12), np.float32)
    gather(stored.view(f"u{stored.itemsize}"), rows, out)
    expected = torch.from_numpy(stored).index_select(0, torch.from_numpy(rows)).float().numpy()
    assert np.array_equal(out.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_found(dtype, value):
    rows = (np.random.default_rng(0).standard_normal((5, 7)) * 1e4).astype(dtype)
    rows[0, 0] = np.finfo(dtype).max
    assert not not_finite(rows).any()
    rows[3, 6] = value
    assert not_finite(rows).tolist() == [False, False, False, True, False]


def test_stores_of_different_contexts_are_not_read_together(store):
    trimmed = ActivationStore(store.path, replace(store.header, context={"mode": "trimmed", "margin_s": 1.0}))
    with pytest.raises(HearsaeError, match="can't be read together: context is trimmed with a margin of 1 s and padded"):
        RowStream([store, trimmed], [SITE], 8)
