"""Moments like this one: the answers are those of comparing with every row."""

import numpy as np
import pytest
from conftest import fill_store, plan_of
from scan_twin import SITE, all_rows, save_sae

from analysis import neighbours
from analysis.features import open_features
from analysis.moments import stretch_at
from analysis.neighbours import nearest, nearest_codes, nearest_rows
from cache.errors import HearsaeError
from cache.store import ActivationStore

WIDTH = 16


def made_up_rows(site: str, clip: int, n: int) -> np.ndarray:
    rows = np.random.Generator(np.random.PCG64(clip)).normal(3, 1, (n, WIDTH))
    rows[0] = 3  # in every clip the same: equal cosines
    return rows


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> ActivationStore:
    plan = plan_of([1.0, 2.51, 0.6, 0.9, 1.0, 1.7], clip_seconds=1.0, shard_rows=128, chunk_rows=64)
    return fill_store(tmp_path_factory.mktemp("like") / "acts.zarr", plan, {SITE: WIDTH}, made_up_rows, skip={3: "unreadable"}, shards=[0, 1])


def cosines(rows: np.ndarray, query: np.ndarray) -> np.ndarray:
    return rows @ query / np.maximum(np.linalg.norm(rows, axis=1) * np.linalg.norm(query), 1e-9)


def expected(store: ActivationStore, cosine: np.ndarray, clip: int, frame: int, n: int, one_per_clip: bool, other_clips: bool) -> list[tuple]:
    rows = all_rows(store, SITE)
    found, seen = [], set()
    for i in sorted(range(len(cosine)), key=lambda i: (-round(cosine[i], 5), rows.clip[i], rows.frame[i])):
        same = rows.clip[i] == clip
        if (same and (other_clips or rows.frame[i] == frame)) or (one_per_clip and rows.clip[i] in seen):
            continue
        seen.add(rows.clip[i])
        found.append((int(rows.clip[i]), int(rows.frame[i])))
    return found[:n]


def places(answer: list[dict]) -> list[tuple]:
    return [(row["clip"], row["frame"]) for row in sorted(answer, key=lambda row: (-round(row["cosine"], 5), row["clip"], row["frame"]))]


@pytest.fixture(params=[64, 1 << 25], ids=["small blocks", "large blocks"])
def _blocks(request, monkeypatch):
    monkeypatch.setattr(neighbours, "BLOCK_BYTES", request.param)


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize(("one_per_clip", "other_clips"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("centred", [True, False])
def test_the_nearest_rows_are_those_of_comparing_with_all(store, centred, one_per_clip, other_clips):
    rows = all_rows(store, SITE).values.astype(np.float64)
    mean = rows.mean(axis=0) if centred else 0
    where = stretch_at(store, SITE, 1, frame=20)
    found = nearest_rows(store, SITE, where, 12, centred=centred, one_per_clip=one_per_clip, other_clips=other_clips)
    query = store.read_clip(SITE, 1)[20].astype(np.float64)
    every = cosines(rows - mean, query - mean)
    assert places(found) == expected(store, every, 1, 20, 12, one_per_clip, other_clips)
    assert [row["cosine"] for row in found] == sorted((row["cosine"] for row in found), reverse=True)
    for row in found:
        own = store.read_clip(SITE, row["clip"])[row["frame"]].astype(np.float64) - mean
        assert row["cosine"] == pytest.approx(cosines(own[None], query - mean)[0], abs=1e-5)
        assert row["start_s"] == pytest.approx(store.clips["start_s"][row["clip"]].as_py() + 0.02 * row["frame"])


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("one_per_clip", [False, True])
@pytest.mark.parametrize("clip", [0, 1, 4])
def test_the_nearest_codes_are_those_of_making_every_code(store, tmp_path, monkeypatch, clip, one_per_clip):
    monkeypatch.setattr(neighbours, "REFINED_AT_ONCE", 8)
    latents = open_features(f"sae:{save_sae(tmp_path / 'sae')}", store)
    where = stretch_at(store, SITE, clip, frame=20)
    found = nearest_codes(store, latents, where, 15, one_per_clip=one_per_clip)
    every = nearest_codes(store, latents, where, 15, one_per_clip=one_per_clip, every_code=True)
    assert places(found) == places(every)
    assert [row["cosine"] for row in found] == pytest.approx([row["cosine"] for row in every], abs=1e-6)
    codes = latents.dense(all_rows(store, SITE).values.astype(np.float16)).astype(np.float64)
    query = latents.dense(store.read_clip(SITE, clip)[20:21])[0].astype(np.float64)
    assert places(found) == [p for p in expected(store, cosines(codes, query), clip, 20, 15, one_per_clip, False)]


def test_few_whole_codes_are_made(store, tmp_path, monkeypatch):
    monkeypatch.setattr(neighbours, "REFINED_AT_ONCE", 8)
    latents = open_features(f"sae:{save_sae(tmp_path / 'sae')}", store)
    made = []
    real = latents.sparse
    monkeypatch.setattr(latents, "sparse", lambda rows: made.append(len(rows)) or real(rows))
    nearest_codes(store, latents, stretch_at(store, SITE, 1, frame=20), 3)
    assert 0 < sum(made) < len(all_rows(store, SITE).clip)


def test_of_equal_moments_the_first_come_first(store):
    found = nearest_rows(store, SITE, stretch_at(store, SITE, 2, frame=0), 3, centred=False)
    assert [(row["clip"], row["frame"]) for row in found] == [(0, 0), (1, 0), (4, 0)]
    assert all(row["cosine"] == pytest.approx(1) for row in found)


def test_other_features_are_compared_by_the_rows_of_their_site(store):
    where = stretch_at(store, SITE, 1, frame=20)
    assert nearest(store, open_features(f"random:{SITE}", store), where, 4) == nearest_rows(store, SITE, where, 4)


def test_a_frame_without_direction_is_like_nothing(tmp_path):
    made = fill_store(tmp_path / "a.zarr", plan_of([1.0], chunk_rows=64), {SITE: 2}, lambda site, clip, n: np.ones((n, 2)))
    with pytest.raises(HearsaeError, match="frame 3 of clip 0 has no direction"):
        nearest_rows(made, SITE, stretch_at(made, SITE, 0, frame=3))


def test_torch_converts_every_half_as_numpy_does(store, monkeypatch):
    halves = np.arange(65536, dtype=np.uint16).view(np.float16).reshape(256, 256)
    numpys, torchs = np.empty(halves.shape, np.float32), np.empty(halves.shape, np.float32)
    np.copyto(numpys, halves)
    neighbours._copy_by_torch(torchs, halves)
    assert np.array_equal(numpys, torchs, equal_nan=True)
    where = stretch_at(store, SITE, 1, frame=20)
    plain = nearest_rows(store, SITE, where, 5)
    monkeypatch.setattr(neighbours, "TORCH_VALUES", 0)
    assert nearest_rows(store, SITE, where, 5) == plain
