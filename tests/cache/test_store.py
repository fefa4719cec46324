"""The store on disk: what `docs/store.md` promises."""

import json
import pickle
import shutil
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import zarr
from conftest import fill_store, plan_of

from cache.errors import StoreError
from cache.plan import SourceItem, make_plan
from cache.sites import Site
from cache.store import ActivationStore

SECONDS = [1.0, 2.37, 0.01, 3.3, 41.0, 5.5, 2.0, 7.7]
WIDTHS = {"encoder.blocks.0": 16, "encoder.blocks.0.mlp.1": 64}


def rows_of(site: str, clip: int, n: int) -> np.ndarray:
    rng = np.random.default_rng([clip, zlib.crc32(site.encode())])
    return rng.standard_normal((n, WIDTHS.get(site, 8))).astype(np.float16)


@pytest.fixture
def store(tmp_path) -> ActivationStore:
    return fill_store(tmp_path / "acts.zarr", plan_of(SECONDS, chunk_rows=256, shard_rows=2048), WIDTHS, rows_of)


def test_every_row_is_where_the_plan_says(store):
    for site in WIDTHS:
        for clip in range(store.clips.num_rows):
            n = store.clips["n_frames"][clip].as_py()
            np.testing.assert_array_equal(store.read_clip(site, clip), rows_of(site, clip, n))


def test_frames_are_20_ms_and_padding_has_no_rows(store):
    for clip in store.clips.to_pylist():
        assert clip["n_frames"] == -(-round(clip["duration_s"] * 16000) // 320)
    assert sum(record.rows for record in map(lambda s: store.record("encoder.blocks.0", s), store.committed("encoder.blocks.0"))) == sum(
        store.clips["n_frames"].to_pylist()
    )


@pytest.mark.parametrize("reader", ["zarr", "tensorstore", "xarray"])
@pytest.mark.parametrize("codec", ["none", "lz4", "zstd"])
def test_other_readers_read_the_arrays(tmp_path, reader, codec):
    from cache.header import Header

    plan = plan_of(SECONDS, chunk_rows=256, shard_rows=2048)
    header = Header(
        model={"name": "m", "sha256": "1", "dims": {}, "has_decoder": False}, dataset={}, axes=plan.axes, plan=plan.summary(), codec=codec
    )
    path = tmp_path / "acts.zarr"
    made = ActivationStore.create(path, header, plan, [Site("encoder.blocks.0", "frame", 16, 0)])
    expected = np.random.default_rng(0).standard_normal((plan.axes["frame"].shards * 2048, 16)).astype(np.float16)
    planned = np.zeros(len(expected), bool)
    for clip in range(len(SECONDS)):
        span = made.planned_span("frame", clip)
        planned[span.start : span.stop] = True
    expected[~planned] = 0
    for shard in range(plan.axes["frame"].shards):
        made.write_shard("encoder.blocks.0", shard, expected[shard * 2048 : (shard + 1) * 2048], [], {})
    if reader == "zarr":
        found = zarr.open_group(path, mode="r")["encoder.blocks.0"][:]
    elif reader == "tensorstore":
        tensorstore = pytest.importorskip("tensorstore")
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path / "encoder.blocks.0")}}
        found = tensorstore.open(spec).result().read().result()
    else:
        xarray = pytest.importorskip("xarray")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = xarray.open_zarr(path, consolidated=False)["encoder.blocks.0"].values
    np.testing.assert_array_equal(found, expected)


def test_a_shard_without_a_record_does_not_exist(store):
    (store.path / "commits" / "encoder.blocks.0" / "000001.json").unlink()
    again = ActivationStore.open(store.path)
    assert again.committed("encoder.blocks.0") == [s for s in range(store.axis("encoder.blocks.0").shards) if s != 1]
    assert 1 in again.pending(["encoder.blocks.0"]) and 1 not in again.committed(*WIDTHS)
    with pytest.raises(StoreError, match="not committed"):
        again.read("encoder.blocks.0", 2048, 2060)


def test_skipped_clips_have_no_rows_for_any_reader(tmp_path):
    store = fill_store(tmp_path / "a.zarr", plan_of(SECONDS, chunk_rows=256, shard_rows=2048), WIDTHS, rows_of, skip={3: "truncated"})
    assert store.skipped(*WIDTHS) == {3: "truncated"}
    assert 3 not in {span.clip for shard in store.committed(*WIDTHS) for span in store.spans(shard, *WIDTHS)}
    with pytest.raises(StoreError, match="clip 3 was skipped: truncated"):
        store.read_clip("encoder.blocks.0", 3)
    assert store.stats("encoder.blocks.0").rows == sum(store.clips["n_frames"].to_pylist()) - store.clips["n_frames"][3].as_py()


def test_a_store_travels_to_another_process_without_its_caches(store):
    assert len(store.clips) and store.record("encoder.blocks.0", 0)
    travelled = pickle.dumps(store)
    assert len(travelled) < 4000
    np.testing.assert_array_equal(pickle.loads(travelled).read_clip("encoder.blocks.0", 1), store.read_clip("encoder.blocks.0", 1))


def test_stats_are_those_of_the_stored_rows(store):
    rows = np.concatenate([store.read_clip("encoder.blocks.0", c) for c in range(store.clips.num_rows)]).astype(np.float64)
    stats = store.stats("encoder.blocks.0")
    np.testing.assert_allclose(stats.mean, rows.mean(0), atol=1e-12)
    np.testing.assert_allclose(stats.mean_sq_dist, ((rows - rows.mean(0)) ** 2).sum(1).mean())


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "record"])
def test_verify_names_the_bad_object_and_repair_makes_room_for_it(store, damage):
    path = store.path / "encoder.blocks.0.mlp.1" / "c" / "1" / "0"
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif damage == "truncate":
        path.write_bytes(data[:-7])
    elif damage == "delete":
        path.unlink()
    else:
        (store.path / "commits" / "encoder.blocks.0.mlp.1" / "000001.json").write_text('{"site": ')
    fresh = ActivationStore.open(store.path)
    objects, bad = fresh.verify()
    assert objects == 2 * fresh.axis("encoder.blocks.0").shards
    assert [(b.site, b.shard) for b in bad] == [("encoder.blocks.0.mlp.1", 1)]
    with pytest.raises(StoreError, match="repair"):
        ActivationStore.open(store.path).read("encoder.blocks.0.mlp.1", 2048, 4096)
    if damage != "flip":  # a flipped byte is found where its chunk is read, a missing or cut object by any read
        with pytest.raises(StoreError, match="repair"):
            ActivationStore.open(store.path).read_clip("encoder.blocks.0.mlp.1", store.shard_clips(1)[-1])
    (store.path / "encoder.blocks.0" / "c" / "0" / ".0.abc.tmp").write_bytes(b"half")
    fresh.repair()
    assert fresh.pending(WIDTHS) == {1: ["encoder.blocks.0.mlp.1"]}
    assert not list(store.path.rglob(".*.tmp"))


def test_objects_of_two_shards_that_changed_places_are_noticed(tmp_path):
    store = fill_store(tmp_path / "acts.zarr", plan_of([1.0, 1.0], chunk_rows=64, shard_rows=64), {"encoder.blocks.0": 16}, rows_of)
    first, second = (store.path / "encoder.blocks.0" / "c" / shard / "0" for shard in "01")
    a, b = first.read_bytes(), second.read_bytes()
    assert a != b and len(a) == len(b)
    first.write_bytes(b)
    second.write_bytes(a)
    _, bad = ActivationStore.open(store.path).verify()
    assert [(damage.shard, damage.reason) for damage in bad] == [(shard, "object's XXH3 is not that of its record") for shard in (0, 1)]


def test_create_continues_its_own_store_and_refuses_any_other(store):
    plan = plan_of(SECONDS, chunk_rows=256, shard_rows=2048)
    site = Site("encoder.blocks.0.attn", "frame", 16, 9)
    again = ActivationStore.create(store.path, store.header, plan, [site])
    assert again.pending([site.name]).keys() == set(range(again.axis(site.name).shards))
    assert "encoder.blocks.0.attn" in ActivationStore.open(store.path).sites

    from dataclasses import replace

    for other, named in [
        (replace(store.header, model={**store.header.model, "sha256": "f" * 64}), "model.sha256"),
        (replace(store.header, dtype="float32"), "dtype"),
        (replace(store.header, codec="lz4"), "codec"),
        (replace(store.header, plan={**store.header.plan, "seed": 7}), "plan.seed"),
        (replace(store.header, plan={**store.header.plan, "hash": "0"}), "plan.hash"),
    ]:
        with pytest.raises(StoreError, match=named):
            ActivationStore.create(store.path, other, plan, [site])


def test_other_folders_and_formats_are_refused(tmp_path, store):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"x")
    with pytest.raises(StoreError, match="holds other things"):
        ActivationStore.create(tmp_path / "photos", store.header, plan_of(SECONDS), [])
    with pytest.raises(StoreError, match="no activation store"):
        ActivationStore.open(tmp_path / "nowhere")
    shutil.copytree(store.path, tmp_path / "future.zarr")
    meta = json.loads((tmp_path / "future.zarr" / "zarr.json").read_text())
    meta["attributes"]["hearsae"]["format"] = 2
    (tmp_path / "future.zarr" / "zarr.json").write_text(json.dumps(meta))
    with pytest.raises(StoreError, match="format 2"):
        ActivationStore.open(tmp_path / "future.zarr")


def test_token_rows_have_their_own_axis(tmp_path):
    items = [SourceItem(f"s{i}.wav", 0, 16000 * (i + 1), text="x" * (i + 1) if i != 2 else None) for i in range(6)]
    plan = make_plan(items, chunk_rows=256, shard_rows=512, tokenize=lambda text, language: list(range(len(text) + 3)))
    store = fill_store(tmp_path / "a.zarr", plan, {"decoder.blocks.0": 8}, rows_of)
    seen = 0
    for clip in store.clips.to_pylist():
        if clip["n_tokens"] is None:
            assert clip["source"] == "s2.wav"
            continue
        assert clip["tokens"] == list(range(len(clip["text"]) + 3))
        np.testing.assert_array_equal(store.read_clip("decoder.blocks.0", clip["clip"]), rows_of("decoder.blocks.0", clip["clip"], clip["n_tokens"]))
        seen += 1
    assert seen == 5


def test_plan_is_the_same_for_the_same_input_and_packs_whole_clips():
    one, two, other = plan_of(SECONDS, chunk_rows=256), plan_of(SECONDS, chunk_rows=256), plan_of(SECONDS, chunk_rows=256, seed=1)
    assert one.clips.equals(two.clips) and one.summary() == two.summary()
    assert one.summary()["hash"] != other.summary()["hash"]
    rows = one.axes["frame"].shard_rows
    for clip in one.clips.to_pylist():
        assert clip["row_start"] // rows == clip["shard"] == (clip["row_start"] + clip["n_frames"] - 1) // rows
    covered = sorted((c["source"], c["start_s"], c["duration_s"]) for c in one.clips.to_pylist())
    assert ("s4.wav", 0.0, 30.0) in covered and ("s4.wav", 30.0, 11.0) in covered


def test_a_full_disk_or_read_only_place_is_one_clear_line(tmp_path, store):
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(StoreError, match="can't"):
        ActivationStore.create(Path(blocker) / "a.zarr", store.header, plan_of(SECONDS), [])
