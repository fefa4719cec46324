"""A scan finds exactly what looking at everything finds, and nothing but the data decides what it writes."""

import json
import pickle
from dataclasses import replace
from functools import reduce
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scan_twin as twin
from conftest import fill_store, plan_of
from said import say
from scan_twin import SITE, Example, all_rows, save_sae

from analysis.evidence import PhoneEvidence, measure
from analysis.features import SaeLatents, open_features
from analysis.grid import bin_edges
from analysis.phone_labels import labels_of
from analysis.scan import Scan, ScanOptions, ShardScan, merge, scan, scan_shard, speakers
from analysis.scan_folder import PHONE_FILES
from cache.errors import HearsaeError
from cache.store import ActivationStore
from cache.timings import read_timings

SECONDS = [0.4, 1.7, 0.02, 2.5, 0.9, 1.2, 3.0, 0.1, 0.66, 2.0, 1.5, 0.8, 2.2, 0.3, 1.1, 0.5, 2.8, 0.7, 1.9, 0.06, 1.3, 2.4, 0.2, 1.0, 2.6]
WIDTH = 16
DEAD, NEVER_POSITIVE, TIED, ON_GRID, ONE_CLIP = 1, 2, 3, 4, 5
"""Features that are always 0; always negative; one of few values; in steps of 1/8 up to 8; positive in a single clip."""
OPTIONS = ScanOptions(top=4, ranges=8, quantiles=5, per_bin=3, seed=7)


def made_up_rows(site: str, clip: int, n: int) -> np.ndarray:
    generator = np.random.Generator(np.random.PCG64(clip))
    rows = generator.standard_normal((n, WIDTH)) * np.geomspace(1e-3, 1e3, WIDTH)
    rows[:, DEAD] = 0
    rows[:, NEVER_POSITIVE] = -np.abs(rows[:, NEVER_POSITIVE]) - 0.125
    rows[:, TIED] = generator.integers(-1, 3, n)
    rows[:, ON_GRID] = generator.integers(1, 65, n) / 8
    rows[:, ONE_CLIP] = rows[:, ONE_CLIP] if clip == 6 else 0
    return rows


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> ActivationStore:
    """25 clips in 9 shards of several chunks, some of them skipped, one shard not there."""
    plan = plan_of(SECONDS, shard_rows=256, chunk_rows=64)
    assert plan.axes["frame"].shards == 9
    path = tmp_path_factory.mktemp("scan") / "acts.zarr"
    return fill_store(path, plan, {SITE: WIDTH}, made_up_rows, skip={3: "unreadable", 11: "too short"}, shards=[0, 1, 2, 3, 4, 6, 7, 8])


@pytest.fixture(scope="module")
def rows(store) -> twin.Rows:
    return all_rows(store, SITE)


@pytest.fixture(scope="module")
def scanned(store, tmp_path_factory) -> Scan:
    return scan(store, f"neurons:{SITE}", tmp_path_factory.mktemp("out") / "neurons", OPTIONS)


def examples(scanned: Scan, feature: int, kind: str, bin_: int = 0) -> list[Example]:
    table = scanned.examples(feature).to_pylist()
    found = [row for row in table if row["kind"] == kind and row["bin"] == bin_]
    assert [row["rank"] for row in found] == list(range(len(found)))
    return [Example(row["value"], row["clip"], row["frame"]) for row in found]


def column(scanned: Scan, name: str) -> np.ndarray:
    return scanned.features[name].to_numpy()


# What a scan says


def test_moments_and_counts_are_those_of_all_rows(scanned, rows):
    values = rows.values.astype(np.float64)
    positive = values > 0
    assert column(scanned, "feature").tolist() == list(range(WIDTH))
    assert (column(scanned, "rows") == len(values)).all()
    np.testing.assert_array_equal(column(scanned, "active"), positive.sum(axis=0))
    np.testing.assert_array_equal(column(scanned, "density"), positive.mean(axis=0))
    np.testing.assert_array_equal(column(scanned, "max"), rows.values.max(axis=0))
    np.testing.assert_array_equal(column(scanned, "min"), rows.values.min(axis=0))
    np.testing.assert_allclose(column(scanned, "mean"), values.mean(axis=0), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(column(scanned, "std"), values.std(axis=0), rtol=1e-12)
    for feature, mean_active in enumerate(scanned.features["mean_active"].to_pylist()):
        if positive[:, feature].any():
            assert mean_active == pytest.approx(values[positive[:, feature], feature].mean(), rel=1e-12)
        else:
            assert mean_active is None


def test_top_examples_are_the_strongest_frame_of_each_of_the_strongest_clips(scanned, rows):
    for feature in range(WIDTH):
        assert examples(scanned, feature, "top") == twin.top(rows, feature, OPTIONS.top)


def test_bottom_examples_are_the_most_negative_frame_of_each_clip(scanned, rows):
    for feature in range(WIDTH):
        assert examples(scanned, feature, "bottom") == twin.top(rows, feature, OPTIONS.top, sign=-1)
    assert len(examples(scanned, NEVER_POSITIVE, "bottom")) == OPTIONS.top
    for feature in (DEAD, ON_GRID):  # no negative value
        assert examples(scanned, feature, "bottom") == []


@pytest.mark.parametrize("per_speaker", [1, 3])
def test_no_speaker_has_more_than_its_share_of_the_top_and_bottom(store, rows, tmp_path, per_speaker):
    found = scan(store, f"neurons:{SITE}", tmp_path / "out", replace(OPTIONS, per_speaker=per_speaker))
    speaker_of = store.clips["speaker"].to_pylist()
    for feature in range(WIDTH):
        for kind, sign in (("top", 1), ("bottom", -1)):
            wanted = twin.top(rows, feature, OPTIONS.top, sign, speaker_of, per_speaker)
            assert examples(found, feature, kind) == wanted
    assert len(examples(found, 0, "top")) == min(OPTIONS.top, 3 * per_speaker)  # of three speakers
    assert examples(found, 0, "range") == examples(scan(store, f"neurons:{SITE}", tmp_path / "b", OPTIONS), 0, "range")


def test_a_clip_without_a_speaker_is_its_own(store):
    speaker = pa.array([None, "b", None, "a", "b", None], pa.string())

    class Clips:
        clips = pa.table({"speaker": pa.chunked_array([speaker[:2], speaker[2:]])})

    numbers = speakers(Clips, np.array([0, 1, 2, 3, 4, 5])).tolist()
    assert numbers[1] == numbers[4] and len(set(numbers)) == 5


def test_of_equal_values_the_first_clip_and_its_first_frame_win(scanned, rows):
    found = examples(scanned, TIED, "top")
    clips_with_the_maximum = np.unique(rows.clip[rows.values[:, TIED] == 2])
    assert [example.clip for example in found] == clips_with_the_maximum[: OPTIONS.top].tolist()
    for example in found:
        of_clip = rows.values[rows.clip == example.clip, TIED]
        assert example.frame == int(np.argmax(of_clip == 2))


def test_histograms_count_every_nonzero_value(scanned, rows):
    edges = bin_edges()
    for feature, row in enumerate(scanned.features.to_pylist()):
        values = rows.values[:, feature]
        bins, counts = np.unique([twin.bin_number(value) for value in values[values != 0]], return_counts=True)
        assert row["hist_count"] == counts.tolist()
        assert row["hist_lo"] == edges[bins.astype(int)].tolist()
        assert row["hist_hi"] == edges[bins.astype(int) + 1].tolist()


def test_range_examples_are_the_frames_of_lowest_hash_in_equally_wide_ranges(scanned, rows):
    """Exactly so where the edges of the ranges are edges of the grid."""
    edges = scanned.features["range_edges"][ON_GRID].as_py()
    assert edges == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    for i in range(8):
        assert examples(scanned, ON_GRID, "range", i) == twin.draw(rows, ON_GRID, edges[i], edges[i + 1], OPTIONS, closed=i == 7)


def test_range_examples_lie_in_their_range_and_never_twice_in_a_clip(scanned, rows):
    drawn = possible = 0
    for feature in range(WIDTH):
        edges = scanned.features["range_edges"][feature].as_py()
        for i in range(len(edges) - 1):
            found = examples(scanned, feature, "range", i)
            closed = i == OPTIONS.ranges - 1
            assert all(edges[i] <= example.value and (example.value < edges[i + 1] or closed) for example in found)
            assert len({example.clip for example in found}) == len(found)
            for example in found:
                assert rows.values[(rows.clip == example.clip) & (rows.frame == example.frame), feature] == [example.value]
            drawn += len(found)
            possible += len(twin.draw(rows, feature, edges[i], edges[i + 1], OPTIONS, closed))
    assert 0.95 * possible <= drawn <= possible


def test_quantile_bins_hold_about_equally_many_active_frames(scanned, rows):
    fine = bin_edges()
    for feature in range(WIDTH):
        edges = scanned.features["quantile_edges"][feature].as_py()
        active = rows.values[rows.values[:, feature] > 0, feature]
        if not len(active):
            assert edges == []
            continue
        assert len(edges) == OPTIONS.quantiles + 1 and edges == sorted(edges) and set(edges) <= set(fine.tolist())
        assert edges[0] <= active.min() and active.max() < edges[-1]
        fullest_fine_bin = np.histogram(active, fine)[0].max()
        below = [(active < edge).sum() for edge in edges]
        np.testing.assert_allclose(below, np.linspace(0, len(active), len(edges)), atol=fullest_fine_bin / 2)


def test_quantile_examples_are_the_frames_of_lowest_hash_in_their_bin(scanned, rows):
    for feature in range(WIDTH):
        edges = scanned.features["quantile_edges"][feature].as_py()
        for i in range(len(edges) - 1):
            assert examples(scanned, feature, "quantile", i) == twin.draw(rows, feature, edges[i], edges[i + 1], OPTIONS)


def test_a_feature_that_is_never_active_has_no_examples_but_negative_ones(scanned):
    for feature, high in ((DEAD, 0), (NEVER_POSITIVE, None)):
        assert set(scanned.examples(feature)["kind"].to_pylist()) <= {"bottom"}
        assert scanned.examples(feature).num_rows == (0 if feature == DEAD else OPTIONS.top)
        row = scanned.features.slice(feature, 1).to_pylist()[0]
        assert row["active"] == 0 and row["density"] == 0 and row["mean_active"] is None
        assert row["range_edges"] == row["quantile_edges"] == []
        assert high is None or (row["max"], row["min"], row["mean"], row["std"], row["hist_count"]) == (0, 0, 0, 0, [])
    assert scanned.features["max"][NEVER_POSITIVE].as_py() < 0


def test_a_feature_of_one_clip_has_one_top_example(scanned):
    assert [example.clip for example in examples(scanned, ONE_CLIP, "top")] == [6]


def test_examples_say_when_and_what(scanned, store):
    for feature in range(WIDTH):
        for row in scanned.examples(feature).to_pylist():
            clip = store.clips.slice(row["clip"], 1).to_pylist()[0]
            assert row["start_s"] == clip["start_s"] + 0.02 * row["frame"]
            assert row["end_s"] == row["start_s"] + 0.02
            assert row["text"] == clip["text"] == f"words of {clip['source'][:-4]}"


def test_examples_are_sorted(scanned):
    for feature in range(WIDTH):
        keys = [(row["feature"], row["kind"], row["bin"], row["rank"]) for row in scanned.examples(feature).to_pylist()]
        assert keys == sorted(keys) and {key[0] for key in keys} <= {feature}


def test_times_are_those_of_the_source_also_for_its_later_clips(tmp_path):
    """A source of 2.5 s in clips of 1 s; the feature fires at 2.3 s."""
    plan = plan_of([2.5], clip_seconds=1.0, shard_rows=128, chunk_rows=64, shuffle=False)
    peak = {2: 15}
    made = fill_store(tmp_path / "a.zarr", plan, {SITE: 1}, lambda site, clip, n: (np.arange(n) == peak.get(clip, -1)).astype(float)[:, None])
    found = scan(made, f"neurons:{SITE}", tmp_path / "out").examples(0).to_pylist()
    assert {(row["clip"], row["frame"]) for row in found} == {(2, 15)}
    assert found[0]["start_s"] == pytest.approx(2.3) and found[0]["text"] == "words of s0"  # of a part of a source: the source's


def test_values_beyond_the_grid_are_counted_and_drawn(tmp_path):
    plan = plan_of([0.1] * 10, shard_rows=64, chunk_rows=64)
    made = fill_store(tmp_path / "a.zarr", plan, {SITE: 1}, lambda site, clip, n: np.full((n, 1), 1e5 * (clip + 1)), dtype="float32")
    found = scan(made, f"neurons:{SITE}", tmp_path / "out", OPTIONS)
    row = found.features.to_pylist()[0]
    assert (row["max"], row["hist_hi"], row["hist_count"]) == (1e6, [2.0**16], [50])
    assert [example.clip for example in examples(found, 0, "top")] == [9, 8, 7, 6]
    widths = np.diff(row["quantile_edges"])
    assert [len(examples(found, 0, "quantile", i)) for i in range(5)] == [OPTIONS.per_bin if width else 0 for width in widths]


def test_tokens_have_an_index_and_no_time(tmp_path):
    plan = plan_of([1.0, 0.5, 0.7], shard_rows=64, chunk_rows=64, tokenize=lambda text, language: list(range(5)))
    made = fill_store(tmp_path / "a.zarr", plan, {"decoder.blocks.0": 2}, lambda site, clip, n: np.eye(5, 2, -2) * (clip + 1))
    found = scan(made, "neurons:decoder.blocks.0", tmp_path / "out")
    assert found.info["axis"] == "token" and found.info["rows"] == 15
    top = [row for row in found.examples(0).to_pylist() if row["kind"] == "top"]
    assert [(row["clip"], row["frame"], row["value"]) for row in top] == [(2, 2, 3), (1, 2, 2), (0, 2, 1)]
    assert all(row["start_s"] is None and row["end_s"] is None for row in top)


def test_scan_json_says_what_was_scanned(scanned, store, rows):
    assert scanned.info == {
        "format": 2,
        "store": str(store.path.absolute()),
        "features": f"neurons:{SITE}",
        "site": SITE,
        "axis": "frame",
        "count": WIDTH,
        "rows": len(rows.values),
        "shards": 8,
        "coactive_rows_cut": 0,
        "options": {"top": 4, "ranges": 8, "quantiles": 5, "per_bin": 3, "seed": 7}
        | {"per_speaker": 0, "coactive": 10, "coactive_among": 64, "no_phones": False},
        "model": store.header.model,
        "software": scanned.info["software"],
    }


def test_runs_are_those_of_all_clips(scanned, rows):
    for feature, row in enumerate(scanned.features.to_pylist()):
        runs = twin.runs(rows, feature)
        columns = [row[name] for name in ("run_frames_mean", "run_frames_median", "rise_frames_mean", "fall_frames_mean")]
        assert row["runs"] == len(runs)
        if runs:
            assert sum(run.frames for run in runs) == row["active"]
            frames = [run.frames for run in runs]
            wanted = [np.mean(frames), np.median(frames), np.mean([run.rise for run in runs]), np.mean([run.fall for run in runs])]
            assert columns == pytest.approx(wanted, rel=1e-14)
        else:
            assert columns == [None] * 4
    assert scanned.features["runs"][ON_GRID].as_py() == len(np.unique(rows.clip))  # always positive: a run is a clip


@pytest.mark.parametrize("among", [3, 64])
def test_partners_are_the_features_most_often_active_together(store, rows, tmp_path, among):
    found = scan(store, f"neurons:{SITE}", tmp_path / "out", replace(OPTIONS, coactive=6, coactive_among=among))
    counted = twin.counted_rows(rows, among)
    table = found.coactivation.to_pylist()
    for feature in range(WIDTH):
        own = [row for row in table if row["feature"] == feature]
        assert [row["rank"] for row in own] == list(range(len(own)))
        assert [(row["other"], row["both"]) for row in own] == [partner[:2] for partner in twin.partners(counted, feature, 6)]
        for row, partner in zip(own, twin.partners(counted, feature, 6), strict=True):
            assert (row["jaccard"], row["lift"]) == (partner.jaccard, pytest.approx(partner.lift, rel=1e-14))
    assert found.info["coactive_rows_cut"] == ((rows.values > 0).sum(axis=1) > among).sum()
    assert not {DEAD, NEVER_POSITIVE} & {row["feature"] for row in table}


def test_pairs_are_counted_only_on_request_where_there_are_many_features(store, tmp_path):
    assert ScanOptions().partners(8192) == 10 and ScanOptions().partners(8193) == 0 and ScanOptions(coactive=3).partners(10**5) == 3
    none = scan(store, f"neurons:{SITE}", tmp_path / "out", replace(OPTIONS, coactive=0))
    assert none.coactivation.num_rows == 0 and none.coactivation.column_names == ["feature", "rank", "other", "both", "jaccard", "lift"]
    assert none.info["options"]["coactive"] == 0


@pytest.mark.parametrize("reader", ["pandas", "duckdb"])
def test_other_tools_read_the_tables(scanned, reader):
    path = scanned.path / "examples.parquet"
    if reader == "pandas":
        columns = pytest.importorskip("pandas").read_parquet(path)
        text, kind = columns["text"].tolist(), columns["kind"].tolist()
    else:
        text, kind = zip(*pytest.importorskip("duckdb").sql(f"select text, kind from '{path}'").fetchall(), strict=True)
    table = pq.read_table(path)
    assert table.schema.field("text").type == pa.string()
    assert list(text) == table["text"].to_pylist() and set(kind) == {"top", "bottom", "range", "quantile"}


# What must not matter


def files(folder: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in folder.iterdir()}


def over_workers(n_workers: int):
    """As on a cluster: every task gets its own copy, results arrive in another order, some of them merged already."""

    def map_shards(function, merge, shards):
        random = np.random.Generator(np.random.PCG64(n_workers))
        parts = np.array_split(random.permutation(shards), n_workers)
        for part in random.permutation(len(parts)):
            results = [pickle.loads(pickle.dumps(function))(int(shard)) for shard in parts[part]]
            while len(results) > 1:
                i, j = random.choice(len(results), 2, replace=False)
                joined = merge(results[i], results[j])
                results = [result for k, result in enumerate(results) if k not in (i, j)] + [joined]
            yield from pickle.loads(pickle.dumps(results))

    return map_shards


@pytest.fixture(scope="module")
def spoken_store(tmp_path_factory) -> ActivationStore:
    """The same with a phone every 70 ms, and none in some clips."""
    plan = plan_of(SECONDS, shard_rows=256, chunk_rows=64)
    store = fill_store(tmp_path_factory.mktemp("spoken") / "acts.zarr", plan, {SITE: WIDTH}, made_up_rows, skip={3: "unreadable"})
    durations = store.clips["duration_s"].to_pylist()
    phones = [(clip, s / 100, (s + 7) / 100, "TSML"[s % 4]) for clip in range(20) for s in range(0, int(100 * durations[clip]), 7)]
    say(store, [(0, 0.0, 0.1, "word")], phones)
    return store


@pytest.mark.parametrize("workers", [1, 2, 7])
@pytest.mark.parametrize("kind", ["neurons", "random", "pca", "sae"])
def test_any_split_over_workers_gives_the_same_bytes(spoken_store, tmp_path, kind, workers):
    store = spoken_store
    spec = f"sae:{save_sae(tmp_path / 'sae')}" if kind == "sae" else f"{kind}:{SITE}"
    options = replace(OPTIONS, per_speaker=2)
    alone = scan(store, spec, tmp_path / "alone", options)
    shared = scan(store, spec, tmp_path / "shared", options, map_shards=over_workers(workers))
    assert alone.coactivation.num_rows > 100 and PhoneEvidence.exists(alone)
    assert sum(len(alone.examples(feature)) for feature in range(alone.info["count"])) > 100
    assert files(alone.path) == files(shared.path)


def test_a_scan_in_which_nothing_is_ever_active_is_one_too(tmp_path):
    store = fill_store(tmp_path / "acts.zarr", plan_of([0.5, 0.3], chunk_rows=64), {SITE: 3}, lambda site, clip, n: np.full((n, 3), -1.0))
    found = scan(store, f"neurons:{SITE}", tmp_path / "out")
    assert set(column(found, "active")) == {0} and set(found.examples(1)["kind"].to_pylist()) == {"bottom"}


def test_phones_are_counted_where_their_times_are_known_and_wanted(spoken_store, tmp_path):
    """In the same pass as everything else, to what two passes of their own give; an earlier scan's do not stay."""
    spec, out = f"neurons:{SITE}", tmp_path / "out"
    with_phones = files(scan(spoken_store, spec, out, OPTIONS).path)
    features = open_features(spec, spoken_store)
    measure(features, spoken_store, labels_of(read_timings(spoken_store).phones, spoken_store.clips, OPTIONS.seed), tmp_path / "alone")
    assert files(tmp_path / "alone") == {name: with_phones[name] for name in PHONE_FILES}
    without = files(scan(spoken_store, spec, out, replace(OPTIONS, no_phones=True)).path)
    assert set(without) == set(with_phones) - set(PHONE_FILES)
    assert all(without[name] == with_phones[name] for name in without if name != "scan.json")


def same(one, other) -> bool:
    """To the last bit."""
    if isinstance(one, np.ndarray) and one.dtype != object:
        return one.dtype == other.dtype and one.tobytes() == other.tobytes()
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, ShardScan):
        return all(same(getattr(one, name), getattr(other, name)) for name in ShardScan.__dataclass_fields__)
    return bool(np.all(one == other))


def test_merging_is_associative_and_commutative(store):
    features = open_features(f"neurons:{SITE}", store)
    parts = [scan_shard(features, store, shard, OPTIONS) for shard in store.committed(SITE)]
    forwards, backwards = reduce(merge, parts), reduce(merge, parts[::-1])
    tree = merge(merge(parts[5], merge(parts[0], parts[3])), merge(merge(parts[1], parts[6]), merge(parts[4], merge(parts[7], parts[2]))))
    assert same(forwards, backwards) and same(forwards, tree)
    assert not same(forwards, parts[0])


def test_block_size_does_not_matter(store, scanned, tmp_path, monkeypatch):
    """Blocks of one clip each, instead of whole shards. Only the last bit of a sum may differ."""
    monkeypatch.setattr("analysis.blocks.BLOCK_ROWS", 1)
    small = scan(store, f"neurons:{SITE}", tmp_path / "small", OPTIONS)
    assert files(small.path)["examples.parquet"] == files(scanned.path)["examples.parquet"]
    for name in scanned.features.column_names:
        if name not in ("mean", "std", "mean_active"):
            assert small.features[name].equals(scanned.features[name])
    np.testing.assert_allclose(column(small, "mean"), column(scanned, "mean"), rtol=1e-13)


def test_shard_size_does_not_matter(tmp_path):
    """The same clips in other shards have the same numbers, and so the same hashes."""
    folders = []
    for shard_rows in (192, 1024):
        plan = plan_of(SECONDS, shard_rows=shard_rows, chunk_rows=64)
        made = fill_store(tmp_path / f"{shard_rows}.zarr", plan, {SITE: WIDTH}, made_up_rows)
        folders.append(files(scan(made, f"neurons:{SITE}", tmp_path / f"{shard_rows}.scan", OPTIONS).path))
        shards = plan.axes["frame"].shards
    assert shards < 5
    assert folders[0]["examples.parquet"] == folders[1]["examples.parquet"]
    assert folders[0]["coactivation.parquet"] == folders[1]["coactivation.parquet"]


def test_the_same_scan_twice_gives_the_same_bytes(store, scanned, tmp_path):
    assert files(scan(store, f"neurons:{SITE}", tmp_path / "again", OPTIONS).path) == files(scanned.path)


def test_another_seed_draws_other_examples_but_the_same_top(store, scanned, tmp_path):
    other = scan(store, f"neurons:{SITE}", tmp_path / "other", replace(OPTIONS, seed=8))
    assert examples(other, 0, "top") == examples(scanned, 0, "top")
    assert [examples(other, 0, "quantile", i) for i in range(5)] != [examples(scanned, 0, "quantile", i) for i in range(5)]


def test_sparse_and_dense_codes_of_an_sae_give_the_same_scan(store, tmp_path):
    class Scattered(SaeLatents):
        def dense(self, rows: np.ndarray) -> np.ndarray:
            codes = super().sparse(rows)
            values = np.zeros((len(rows), self.count), np.float32)
            values[codes.row, codes.latent] = codes.value
            return values

        def sparse(self, rows: np.ndarray) -> None:
            return None

    sparse = open_features(f"sae:{save_sae(tmp_path / 'sae')}", store)
    dense = Scattered(sparse.spec, sparse.dictionary)
    for shard in store.committed(SITE):
        assert same(scan_shard(sparse, store, shard, OPTIONS), scan_shard(dense, store, shard, OPTIONS))


def test_an_sae_scan_finds_what_its_dense_codes_hold(store, tmp_path):
    folder = save_sae(tmp_path / "sae")
    found = scan(store, f"sae:{folder}", tmp_path / "out", OPTIONS)
    latents = open_features(f"sae:{folder}", store)
    raw = all_rows(store, SITE)
    rows = raw._replace(values=latents.dense(raw.values))
    # Rows in other batches may differ in the last bits.
    np.testing.assert_array_equal(column(found, "active"), (rows.values > 0).sum(axis=0))
    np.testing.assert_allclose(column(found, "mean"), rows.values.mean(axis=0), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(column(found, "min"), rows.values.min(axis=0))
    for feature in range(latents.count):
        want, have = twin.top(rows, feature, OPTIONS.top), examples(found, feature, "top")
        assert [example[1:] for example in have] == [example[1:] for example in want]
        np.testing.assert_allclose([example.value for example in have], [example.value for example in want], rtol=1e-4)


def test_skipped_clips_and_uncommitted_shards_are_not_there(scanned, store):
    absent = {3, 11} | set(store.shard_clips(5))
    seen = {row["clip"] for feature in range(WIDTH) for row in scanned.examples(feature).to_pylist()}
    assert seen and not seen & absent
    n_frames = store.clips["n_frames"].to_numpy()
    assert scanned.info["rows"] == sum(int(n) for clip, n in enumerate(n_frames) if clip not in absent)


def test_a_shard_whose_clips_were_all_skipped_adds_nothing(tmp_path):
    plan = plan_of([1.0] * 4, shard_rows=64, chunk_rows=64)
    made = fill_store(tmp_path / "a.zarr", plan, {SITE: WIDTH}, made_up_rows, skip={2: "unreadable"})
    without = fill_store(tmp_path / "b.zarr", plan, {SITE: WIDTH}, made_up_rows, shards=[0, 1, 3])
    with_it, without_it = (scan(s, f"neurons:{SITE}", s.path.with_suffix(".scan")) for s in (made, without))
    assert (with_it.info["shards"], without_it.info["shards"]) == (4, 3)
    assert with_it.features.equals(without_it.features)
    assert files(with_it.path)["examples.parquet"] == files(without_it.path)["examples.parquet"]


# What is refused


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_named(tmp_path, bad):
    def rows_of(site: str, clip: int, n: int) -> np.ndarray:
        rows = made_up_rows(site, clip, n)
        if clip == 2:
            rows[7, 3] = bad
        return rows

    made = fill_store(tmp_path / "a.zarr", plan_of([1.0] * 3, shard_rows=64, chunk_rows=64), {SITE: WIDTH}, rows_of)
    with pytest.raises(HearsaeError, match=rf"{SITE} in .*a.zarr has a value that is not finite in shard 2, clip 2, row 7"):
        scan(made, f"neurons:{SITE}", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_store_without_rows_is_refused(tmp_path):
    made = fill_store(tmp_path / "a.zarr", plan_of([1.0], shard_rows=64, chunk_rows=64), {SITE: WIDTH}, made_up_rows, shards=[])
    with pytest.raises(HearsaeError, match=r"has no rows of encoder.blocks.0 yet: run 'hearsae cache' first"):
        scan(made, f"neurons:{SITE}", tmp_path / "out")


def test_a_folder_of_other_things_is_left_alone(store, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(HearsaeError, match="holds other things and is no scan"):
        scan(store, f"neurons:{SITE}", tmp_path, OPTIONS)
    with pytest.raises(HearsaeError, match=r"can't use .*thesis.tex as the scan's folder"):
        scan(store, f"neurons:{SITE}", tmp_path / "thesis.tex", OPTIONS)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_scan_replaces_an_older_one(store, scanned, tmp_path):
    scan(store, f"neurons:{SITE}", tmp_path / "out", replace(OPTIONS, top=1, seed=1))
    scan(store, f"neurons:{SITE}", tmp_path / "out", OPTIONS)
    assert files(tmp_path / "out") == files(scanned.path)


def test_lost_results_are_noticed(store, tmp_path):
    with pytest.raises(HearsaeError, match="some results were lost"):
        scan(store, f"neurons:{SITE}", tmp_path / "out", OPTIONS, map_shards=lambda function, merge, shards: map(function, shards[1:]))
    with pytest.raises(ValueError, match="twice"):
        scan(store, f"neurons:{SITE}", tmp_path / "out", OPTIONS, map_shards=lambda function, merge, shards: map(function, [0, *shards]))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"top": 0}, "--top 0"),
        ({"per_bin": -1}, "--per-bin -1"),
        ({"per_speaker": -1}, "--per-speaker -1"),
        ({"coactive": -2}, "--coactive -2"),
        ({"coactive_among": 0}, "--coactive-among 0"),
        ({"seed": -1}, "--seed -1"),
    ],
)
def test_options_without_sense_are_refused(options, complaint):
    with pytest.raises(HearsaeError, match=complaint):
        ScanOptions(**options)


def test_what_is_no_scan_is_not_opened_as_one(scanned, tmp_path):
    with pytest.raises(HearsaeError, match=r"there is no scan at .*nowhere: make one with 'hearsae scan'"):
        Scan.open(tmp_path / "nowhere")
    (tmp_path / "scan.json").write_text("{")
    with pytest.raises(HearsaeError, match="damaged"):
        Scan.open(tmp_path)
    (tmp_path / "scan.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(HearsaeError, match="has scan format 99; this hearsae reads format 2: scan it again"):
        Scan.open(tmp_path)
    (tmp_path / "scan.json").write_text(json.dumps(scanned.info))
    with pytest.raises(HearsaeError, match=r"features.parquet can't be read"):
        _ = Scan.open(tmp_path).features
    with pytest.raises(HearsaeError, match=r"examples.parquet can't be read"):
        Scan.open(tmp_path).examples(0)
    with pytest.raises(HearsaeError, match=r"coactivation.parquet can't be read"):
        _ = Scan.open(tmp_path).coactivation
    with pytest.raises(HearsaeError, match=r"there is no feature 16 in .*: it has features 0 to 15"):
        scanned.examples(16)
