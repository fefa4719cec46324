"""From a feature to its moments, and from a moment to its features."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from conftest import fill_store, plan_of
from scan_twin import SITE, save_sae

from analysis.features import Features, open_features
from analysis.query import StoredNeurons, feature_moments, features_of, span_features, top_features
from analysis.scan import Scan, ScanOptions, scan
from cache.errors import HearsaeError
from cache.store import ActivationStore

WIDTH = 16


def made_up_rows(site: str, clip: int, n: int) -> np.ndarray:
    rows = np.random.Generator(np.random.PCG64(clip)).normal(np.arange(WIDTH), 1, (n, WIDTH))
    rows[:, 5] = 7  # never varies
    return rows


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> ActivationStore:
    """s0.wav in clips 0 to 2 (1 s, 1 s, 0.51 s), s1.wav in 3 (skipped), s2.wav in 4, s3.wav in 5 (not committed)."""
    plan = plan_of([2.51, 0.6, 0.9, 1.0], clip_seconds=1.0, shard_rows=64, chunk_rows=64, shuffle=False)
    assert plan.clips["source"].to_pylist() == ["s0.wav"] * 3 + ["s1.wav", "s2.wav", "s3.wav"]
    path = tmp_path_factory.mktemp("query") / "acts.zarr"
    return fill_store(path, plan, {SITE: WIDTH}, made_up_rows, skip={3: "unreadable"}, shards=[0, 1, 2, 3])


@pytest.fixture(scope="module")
def neurons(store) -> Features:
    return open_features(f"neurons:{SITE}", store)


@pytest.fixture(scope="module")
def scanned(store, neurons, tmp_path_factory) -> Scan:
    return scan(store, neurons.spec, tmp_path_factory.mktemp("out") / "scan", ScanOptions(top=3, ranges=4, quantiles=2, per_bin=2))


# A feature's moments


def test_the_moments_of_a_feature_are_its_examples_with_source_and_speaker(scanned, store):
    rows = feature_moments(scanned, 9)
    kinds = [row["kind"] for row in rows]
    assert kinds == sorted(kinds, key=["top", "range", "quantile"].index) and kinds.count("top") == 3 and kinds.count("quantile") == 4
    assert set(rows[0]) == {"feature", "kind", "bin", "rank", "value", "clip", "source", "frame", "start_s", "end_s", "text", "speaker"}
    speakers = {"s0.wav": "a", "s1.wav": "b", "s2.wav": "c", "s3.wav": "a"}
    for row in rows:
        assert row["source"] == store.clips["source"][row["clip"]].as_py()
        assert row["speaker"] == speakers[row["source"]]
        assert store.read_clip(SITE, row["clip"])[row["frame"], 9] == row["value"]


def test_moments_of_one_kind(scanned):
    rows = feature_moments(scanned, 9, "top")
    assert [row["rank"] for row in rows] == [0, 1, 2]
    assert [row["value"] for row in rows] == sorted((row["value"] for row in rows), reverse=True)


def test_an_unknown_feature_or_kind_is_refused(scanned):
    with pytest.raises(HearsaeError, match=r"there is no feature 16 .*: it has features 0 to 15"):
        feature_moments(scanned, WIDTH)
    with pytest.raises(HearsaeError, match="no feature -1"):
        feature_moments(scanned, -1)
    with pytest.raises(HearsaeError, match="no examples of kind 'best': use one of top, range, quantile"):
        feature_moments(scanned, 0, "best")


def test_a_store_that_moved_can_be_named(scanned, store):
    moved = Scan(scanned.path, scanned.info | {"store": "/nowhere/acts.zarr"})
    with pytest.raises(HearsaeError, match=r"there is no activation store at /nowhere/acts.zarr"):
        feature_moments(moved, 9)
    assert feature_moments(moved, 9, store=store) == feature_moments(scanned, 9)


# The features of a moment


def test_the_top_features_of_a_moment_are_the_largest_stored_values(store, neurons):
    rows = top_features(store, neurons, 1, 1.33, n=4)
    stored = store.read_clip(SITE, 1)[16].astype(np.float32)  # 1.33 s is 0.33 s into the clip
    order = np.argsort(-stored)[:4]
    assert [row["feature"] for row in rows] == order.tolist()
    assert [row["value"] for row in rows] == stored[order].tolist()
    assert {(row["clip"], row["source"], row["frame"]) for row in rows} == {(1, "s0.wav", 16)}
    assert rows[0]["start_s"] == pytest.approx(1.32) and rows[0]["end_s"] == pytest.approx(1.34)
    assert "z" not in rows[0]


def test_a_moment_can_be_given_as_frame(store, neurons):
    assert top_features(store, neurons, 1, frame=16) == top_features(store, neurons, 1, 1.33)


def test_only_active_features_are_told(store, neurons):
    rows_of_clip = store.read_clip(SITE, 0)
    frame = int(rows_of_clip[:, 0].argmin())
    stored = rows_of_clip[frame]
    assert (stored <= 0).any()
    rows = top_features(store, neurons, 0, frame=frame, n=100)
    assert len(rows) == (stored > 0).sum() and min(row["value"] for row in rows) > 0


def test_a_scan_adds_how_unusual_a_value_is(store, neurons, scanned):
    values = np.concatenate([store.read_clip(SITE, clip) for clip in (0, 1, 2, 4)]).astype(np.float64)
    rows = top_features(store, neurons, 0, 0.5, n=WIDTH, scan=scanned)
    assert [row["feature"] for row in rows] == [row["feature"] for row in top_features(store, neurons, 0, 0.5, n=WIDTH)]
    for row in rows:
        column = values[:, row["feature"]]
        assert row["density"] == (column > 0).mean()
        if row["feature"] == 5:
            assert row["z"] is None
        else:
            assert row["z"] == pytest.approx((row["value"] - column.mean()) / column.std())


def test_every_example_is_found_again_at_its_own_time(scanned, store, neurons):
    for feature in range(WIDTH):
        for row in (row for row in feature_moments(scanned, feature) if row["kind"] != "bottom"):
            found = top_features(store, neurons, row["clip"], row["start_s"], n=WIDTH)
            by_source = top_features(store, neurons, row["source"], row["start_s"], n=WIDTH)
            assert found == by_source and {other["frame"] for other in found} == {row["frame"]}
            assert {"feature": feature, "value": row["value"]}.items() <= next(other for other in found if other["feature"] == feature).items()


def test_a_source_is_known_by_its_path_or_its_name(tmp_path):
    plan = plan_of([0.5, 0.5], shard_rows=64, chunk_rows=64)
    renamed = plan.clips.set_column(plan.clips.schema.get_field_index("source"), "source", pa.array(["train/a.flac", "test/a.flac"]))
    made = fill_store(tmp_path / "a.zarr", replace(plan, clips=renamed), {SITE: WIDTH}, made_up_rows)
    neurons = open_features(f"neurons:{SITE}", made)
    assert top_features(made, neurons, "test/a.flac", 0.1)[0]["clip"] == 1
    with pytest.raises(HearsaeError, match=r"'a.flac' names several clips \(0, 1\): give a clip's number"):
        top_features(made, neurons, "a.flac", 0.1)


@pytest.mark.parametrize(
    ("clip", "moment", "complaint"),
    [
        (1, {"time_s": 0.99}, "0.99 s is outside clip 1, which goes from 1 to 2 s of its source"),
        (1, {"time_s": 2.0}, "2 s is outside clip 1"),
        (2, {"time_s": 2.51}, "2.51 s is outside clip 2, which goes from 2 to 2.51 s"),
        (1, {"time_s": float("nan")}, "nan s is outside clip 1"),
        (1, {"frame": 50}, "clip 1 has no frame 50: it has 50, counted from 0"),
        (1, {"frame": -1}, "clip 1 has no frame -1"),
        (6, {"time_s": 0.0}, "there is no clip 6 in .*: it has clips 0 to 5"),
        ("6", {"time_s": 0.0}, "there is no clip 6"),
        ("s9.wav", {"time_s": 0.0}, "has no clip of a source 's9.wav'"),
        ("s0.wav", {"time_s": 3.0}, "'s0.wav' has no clip at 3 s; its clips end at 2.51 s"),
        ("s0.wav", {"frame": 3}, r"'s0.wav' names several clips \(0, 1, 2\): give a clip's number"),
        (3, {"time_s": 0.1}, "clip 3 was skipped: unreadable"),
        (5, {"time_s": 0.1}, "shard 4 of encoder.blocks.0 is not committed"),
        (1, {}, "give either a time or a frame"),
        (1, {"time_s": 1.0, "frame": 0}, "give either a time or a frame"),
    ],
)
def test_a_moment_that_does_not_exist_is_refused(store, neurons, clip, moment, complaint):
    with pytest.raises(HearsaeError, match=complaint):
        top_features(store, neurons, clip, **moment)


def test_the_last_frame_of_a_clip_is_within_it(store, neurons):
    assert top_features(store, neurons, 2, 2.505)[0]["frame"] == 25


def test_a_scan_of_other_features_is_refused(store, scanned, tmp_path):
    latents = open_features(f"sae:{save_sae(tmp_path / 'sae')}", store)
    assert top_features(store, latents, 0, 0.1)
    with pytest.raises(HearsaeError, match=r"is a scan of neurons:encoder.blocks.0, not of sae:"):
        top_features(store, latents, 0, 0.1, scan=scanned)


def test_a_token_is_known_by_its_index(tmp_path: Path):
    plan = plan_of([1.0, 0.5], shard_rows=64, chunk_rows=64, tokenize=lambda text, language: list(range(5)))
    made = fill_store(tmp_path / "a.zarr", plan, {"decoder.blocks.0": 2}, lambda site, clip, n: np.eye(5, 2, -2) * (clip + 1))
    neurons = open_features("neurons:decoder.blocks.0", made)
    rows = top_features(made, neurons, 1, frame=3)
    assert [(row["feature"], row["value"], row["start_s"], row["end_s"]) for row in rows] == [(1, 2.0, None, None)]
    with pytest.raises(HearsaeError, match="has tokens, not times: give the token's index"):
        top_features(made, neurons, 1, 0.1)
    with pytest.raises(HearsaeError, match="clip 1 has no token 5"):
        top_features(made, neurons, 1, frame=5)


# Unusual features, and spans


def test_by_z_come_the_most_unusual_features_first(store, neurons, scanned):
    rows = top_features(store, neurons, 0, 0.5, n=WIDTH, scan=scanned, by="z")
    every = {row["feature"]: row["z"] for row in top_features(store, neurons, 0, 0.5, n=WIDTH, scan=scanned)}
    assert [row["z"] for row in rows] == sorted((row["z"] for row in rows), reverse=True) and min(row["z"] for row in rows) > 0
    assert {row["feature"] for row in rows} >= {feature for feature, z in every.items() if z is not None and z > 0}
    assert 5 not in {row["feature"] for row in rows}  # never varies
    with pytest.raises(HearsaeError, match="that needs a scan"):
        top_features(store, neurons, 0, 0.5, by="z")


@pytest.mark.parametrize("over", ["mean", "max"])
def test_the_features_of_a_span_are_those_of_its_frames(store, neurons, scanned, over):
    rows = span_features(store, neurons, "s0.wav", 1.105, 1.2, n=WIDTH, scan=scanned, over=over)
    frames = store.read_clip(SITE, 1)[5:10].astype(np.float64)  # 1.105 s lies within frame 5
    expected = getattr(frames, over)(axis=0)
    assert [row["feature"] for row in rows] == np.argsort(-expected)[: len(rows)].tolist()
    assert [row["value"] for row in rows] == pytest.approx(np.sort(expected)[::-1][: len(rows)].tolist())
    assert {(row["clip"], row["frame"], row["frames"]) for row in rows} == {(1, 5, 5)}
    assert (rows[0]["start_s"], rows[0]["end_s"]) == pytest.approx((1.1, 1.2))
    mean, std = (scanned.features[name].to_numpy() for name in ("mean", "std"))
    assert rows[0]["z"] == pytest.approx((rows[0]["value"] - mean[rows[0]["feature"]]) / std[rows[0]["feature"]])


def test_a_span_within_one_frame_is_that_frame(store, neurons):
    (row,) = span_features(store, neurons, 1, 1.331, 1.332, n=1)
    assert row == top_features(store, neurons, 1, 1.33, n=1)[0]


def test_neurons_are_asked_without_torch(store, neurons, scanned):
    light = features_of(scanned, store)
    rows = store.read_clip(SITE, 0)
    assert isinstance(light, StoredNeurons) and (light.spec, light.site, light.count) == (neurons.spec, neurons.site, neurons.count)
    assert np.array_equal(light.dense(rows), neurons.dense(rows)) and light.dense(rows).dtype == np.float32
