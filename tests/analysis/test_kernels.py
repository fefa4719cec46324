"""The parts of a scan, each against a plain twin: the grid of values, the hash of frames, the compiled loops."""

from collections import Counter
from typing import NamedTuple

import numpy as np
import pytest
import scan_twin as twin
from scan_twin import Example

from analysis.coactivation import PairCounter, pair, strongest
from analysis.grid import BINS, MAGNITUDES, bin_edges, bin_of, fixed_point, frame_hash
from analysis.kernels import (
    CANDIDATE,
    LONGEST_RUN,
    Rows,
    by_feature,
    draw,
    draw_examples,
    insert,
    merge_candidates,
    merge_counts,
    merge_moments,
    new_tally,
    no_moments,
    tally_dense,
    tally_sparse,
)
from sae.models import Codes


def test_the_grid_follows_from_the_bits_of_a_value():
    edges = bin_edges()
    assert len(edges) == BINS + 1 and (np.diff(edges) > 0).all() and edges[MAGNITUDES] == 0
    inner = edges[MAGNITUDES + 1 : -1]
    assert inner[0] == 2.0**-12 and edges[-1] == 2.0**16
    values = np.concatenate([inner, np.nextafter(inner.astype(np.float32), 0), np.nextafter(inner.astype(np.float32), 1e9)]).astype(np.float32)
    beyond = np.array([1e-30, 1e-40, 65504, 65536, 1e30], np.float32)
    for value in (values, -values, beyond, -beyond):
        assert bin_of(value).tolist() == [twin.bin_number(float(v)) for v in value]
    assert bin_of(np.array([0.0, -0.0])).tolist() == [-1, -1]


def test_frames_are_hashed_by_splitmix64():
    assert twin.splitmix64(0) == 0xE220A8397B1DCDAF  # the generator's published first output
    clips, frames = np.array([0, 1, 401, 2**31 - 1], np.int32), np.array([0, 5, 1499, 3], np.int32)
    for seed in (0, 1, 2**64 - 1):
        assert frame_hash(seed, clips, frames).tolist() == [twin.hash_of(seed, int(c), int(f)) for c, f in zip(clips, frames, strict=True)]


def test_fixed_point_sums_do_not_depend_on_their_order():
    values = np.random.Generator(np.random.PCG64(0)).standard_normal((3, 1000)) * np.geomspace(1e-6, 1e15, 1000)
    exact = fixed_point(values)
    assert (exact.sum(axis=1) == exact[:, ::-1].sum(axis=1)).all()
    np.testing.assert_allclose([float(x) / 2**64 for x in exact.sum(axis=1)], values.sum(axis=1), rtol=1e-12)


class Made(NamedTuple):
    """A block, and the same as sparse codes."""

    values: np.ndarray
    rows: Rows
    codes: Codes
    start: np.ndarray

    @property
    def plain(self) -> twin.Rows:
        frame = np.arange(len(self.values)) - self.rows.first_row[self.rows.clip_of_row]
        return twin.Rows(self.values, self.rows.clip[self.rows.clip_of_row], frame)


@pytest.fixture(scope="module")
def block() -> Made:
    """300 rows of 7 clips of 3 speakers, 70 features, half of the values zero (some of them -0.0), some equal, some always positive or never."""
    generator = np.random.Generator(np.random.PCG64(5))
    values = (generator.standard_normal((300, 70)) * generator.integers(0, 2, (300, 70))).astype(np.float32)
    values[:, :35] = np.round(values[:, :35])
    values[:, 35], values[:, 36] = np.abs(values[:, 35]) + 1, -np.abs(values[:, 36])
    values[:, 37] = 0
    first_row = np.array([0, 1, 60, 100, 180, 181, 250, 300])
    row, latent = np.nonzero(values)
    codes = Codes(row.astype(np.int64), latent.astype(np.int32), values[row, latent])
    clips = np.arange(10, 17, dtype=np.int32)
    clip_of_row = np.repeat(np.arange(7, dtype=np.int32), np.diff(first_row))
    hashes = generator.integers(0, 2**63, 300).astype(np.uint64)
    rank = np.empty(300, np.int32)
    rank[np.argsort(hashes)] = np.arange(300)
    rows = Rows(first_row, clips, (clips % 3).astype(np.int32), clip_of_row, hashes, rank)
    return Made(values, rows, codes, np.searchsorted(codes.row, np.arange(301)))


def tallies(block: Made, k: int = 3, per_bin: int = 2, per_speaker: int = 0):
    dense, sparse = new_tally(70, k), new_tally(70, k)
    found = tally_dense(block.values, block.rows, per_bin, per_speaker, dense)
    sparse_found = tally_sparse(block.start, block.codes.latent, block.codes.value, block.rows, per_bin, per_speaker, sparse)
    return (dense, found), (sparse, sparse_found)


def test_columns_of_sparse_rows_are_their_transpose(block):
    first, row, value = by_feature(block.start, block.codes.latent, block.codes.value, 70)
    for feature, column in enumerate(block.values.T):
        own = slice(first[feature], first[feature + 1])
        assert row[own].tolist() == np.flatnonzero(column).tolist()
        assert value[own].tolist() == column[column != 0].tolist()


def test_sums_and_bounds_equal_their_plain_twin(block):
    (dense, _), (sparse, _) = tallies(block)
    values = block.values.astype(np.float64)
    np.testing.assert_allclose(dense.total, [values.sum(0), (values**2).sum(0), np.maximum(values, 0).sum(0)], rtol=1e-12)
    np.testing.assert_array_equal(dense.total, sparse.total)
    np.testing.assert_array_equal(dense.nonzero, (block.values != 0).sum(axis=0))
    np.testing.assert_array_equal(sparse.nonzero, dense.nonzero)
    np.testing.assert_array_equal(dense.low, block.values.min(axis=0))
    np.testing.assert_array_equal(dense.high, block.values.max(axis=0))
    np.testing.assert_array_equal(sparse.high, [column[column != 0].max(initial=-np.inf) for column in block.values.T])
    np.testing.assert_array_equal(sparse.low, [column[column != 0].min(initial=np.inf) for column in block.values.T])


def test_bins_equal_their_plain_twin(block):
    bins = bin_of(block.values)
    counted = {}
    for feature in range(70):
        for b, n in zip(*np.unique(bins[bins[:, feature] >= 0, feature], return_counts=True), strict=True):
            counted[feature * BINS + int(b)] = int(n)
    for _, found in tallies(block):
        assert dict(zip(found.bins.tolist(), found.bin_counts.tolist(), strict=True)) == counted
        assert (np.diff(found.bins) > 0).all()


@pytest.mark.parametrize("per_bin", [1, 2, 5])
def test_candidates_are_the_frames_of_lowest_hash_of_every_cell_one_per_clip(block, per_bin):
    bins, plain = bin_of(block.values), block.plain
    wanted = []
    for feature in range(70):
        for m in range(MAGNITUDES):
            kept: dict[int, tuple] = {}
            for row in np.argsort(block.rows.hash):
                if bins[row, feature] == MAGNITUDES + m:
                    clip = int(plain.clip[row])
                    cell = feature * MAGNITUDES + m
                    kept.setdefault(clip, (int(block.rows.hash[row]), cell, float(block.values[row, feature]), clip, int(plain.frame[row])))
            wanted += list(kept.values())[:per_bin]
    for _, found in tallies(block, per_bin=per_bin):
        assert found.candidates.tolist() == wanted


def test_runs_are_stretches_of_consecutive_positive_frames_within_a_clip(block):
    for tally, found in tallies(block):
        feature, length = np.divmod(found.runs, LONGEST_RUN)
        for f in range(70):
            runs = twin.runs(block.plain, f)
            assert np.repeat(length[feature == f], found.run_counts[feature == f]).tolist() == sorted(run.frames for run in runs)
            assert (tally.rise[f], tally.fall[f]) == (sum(run.rise for run in runs), sum(run.fall for run in runs))


@pytest.mark.parametrize("per_speaker", [0, 1, 2])
@pytest.mark.parametrize("k", [1, 3, 20])
def test_the_running_top_and_bottom_equal_sorting(block, k, per_speaker):
    speaker_of = [clip % 3 for clip in range(17)]
    for tally, _ in tallies(block, k, per_speaker=per_speaker):
        for sign, moments in ((1, tally.top), (-1, tally.bottom)):
            for feature in range(70):
                found = [Example(sign * value, clip, frame) for value, clip, frame, _ in moments[feature].tolist() if clip >= 0]
                assert found == twin.top(block.plain, feature, k, sign, speaker_of, per_speaker)


@pytest.mark.parametrize("per_speaker", [0, 1, 2, 3])
def test_merged_moments_are_those_of_all_clips_whatever_the_parts(per_speaker):
    """Few values, so that many are equal; few speakers, of very unequal numbers of clips; parts of any size."""
    generator = np.random.Generator(np.random.PCG64(per_speaker))
    k, features = 5, 4
    for _ in range(200):
        n = int(generator.integers(1, 60))
        values = generator.integers(0, 8, (n, features)).astype(np.float32)
        speaker = np.minimum(generator.geometric(0.4, n), 6)

        def best(clips: np.ndarray, values=values, speaker=speaker) -> np.ndarray:
            moments = no_moments(features, k)
            for clip in np.sort(clips):
                for feature in range(features):
                    insert(moments[feature], values[clip, feature], clip, 0, speaker[clip], per_speaker)
            return moments

        parts = [best(part) for part in np.array_split(generator.permutation(n), generator.integers(1, 9))]
        while len(parts) > 1:
            i, j = generator.choice(len(parts), 2, replace=False)
            merged = merge_moments(parts[i], parts[j], per_speaker)
            parts = [part for p, part in enumerate(parts) if p not in (i, j)] + [merged]
        plain = twin.Rows(values, np.arange(n), np.zeros(n, int))
        for feature in range(features):
            found = [Example(value, clip, frame) for value, clip, frame, _ in parts[0][feature].tolist() if clip >= 0]
            assert found == twin.top(plain, feature, k, 1, speaker.tolist(), per_speaker)


def test_merged_counts_are_sums(block):
    generator = np.random.Generator(np.random.PCG64(3))
    for n, m in ((40, 50), (0, 7), (7, 0), (0, 0)):
        a, b = (np.unique(generator.integers(0, 60, size)) for size in (n, m))
        counts, other = generator.integers(1, 9, len(a)), generator.integers(1, 9, len(b))
        expected = Counter(dict(zip(a.tolist(), counts.tolist(), strict=True))) + Counter(dict(zip(b.tolist(), other.tolist(), strict=True)))
        for merged in (merge_counts(a, counts, b, other), merge_counts(b, other, a, counts)):
            assert list(zip(*(part.tolist() for part in merged), strict=True)) == sorted(expected.items())


@pytest.mark.parametrize("among", [1, 3, 10, 1000])
def test_pairs_are_counted_among_the_strongest_of_each_row(block, among):
    dense, sparse = PairCounter(70, among), PairCounter(70, among)
    dense.add_dense(block.values)
    sparse.add_sparse(block.start, block.codes.latent, block.codes.value)
    counted = twin.counted_rows(block.plain, among).astype(int)
    both = counted.T @ counted
    for pairs in (dense.pairs(), sparse.pairs()):
        assert pairs.active.tolist() == np.diag(both).tolist()
        assert pairs.cut == ((block.values > 0).sum(axis=1) > among).sum()
        assert pairs.both.tolist() == [both[a, b] for a in range(70) for b in range(a + 1, 70)]
        assert pairs.both[pair(3, 9, 70)] == both[3, 9]


def test_the_strongest_are_a_sorts():
    generator = np.random.Generator(np.random.PCG64(4))
    for n in (1, 5, 40, 200):
        for among in (1, 5, 39, 40):
            value = generator.integers(1, 20, n).astype(np.float32)
            wanted = sorted(np.argsort(-value, kind="stable")[:among].tolist())
            feature, kept = np.arange(n, dtype=np.int32), value.copy()
            found = strongest(feature, kept, n, among)
            assert feature[:found].tolist() == wanted and kept[:found].tolist() == value[wanted].tolist()


def test_merged_candidates_equal_sorting_them_all():
    generator = np.random.Generator(np.random.PCG64(2))

    def candidates(n: int, first_clip: int) -> np.ndarray:
        made = np.zeros(n, CANDIDATE)
        made["cell"], made["hash"] = generator.integers(0, 30, n), generator.integers(0, 20, n)
        made["clip"], made["frame"] = np.arange(first_clip, first_clip + n), generator.integers(0, 9, n)
        return np.sort(made, order=["cell", "hash", "clip"])

    for n_a, n_b in ((200, 150), (0, 40), (40, 0), (0, 0)):
        a, b = candidates(n_a, 0), candidates(n_b, 1000)
        every = np.sort(np.concatenate([a, b]), order=["cell", "hash", "clip"])
        rank = np.arange(len(every)) - np.searchsorted(every["cell"], every["cell"])
        np.testing.assert_array_equal(merge_candidates(a, b, 3), every[rank < 3])
        np.testing.assert_array_equal(merge_candidates(b, a, 3), every[rank < 3])


def test_draw_takes_the_first_of_every_bin_one_per_clip():
    bins, clips = np.array([0, 0, 2, 0, 0, 2]), np.array([4, 4, 4, 5, 6, 4], np.int32)
    assert draw(bins, clips, 3, 2).tolist() == [[0, 3], [-1, -1], [2, -1]]


def test_drawn_examples_are_those_of_each_feature_alone():
    generator = np.random.Generator(np.random.PCG64(6))
    n, per_bin = 400, 2
    found = np.zeros(n, CANDIDATE)
    found["cell"] = np.sort(generator.integers(0, 3 * MAGNITUDES, n)) // MAGNITUDES * 2 * MAGNITUDES + generator.integers(200, 260, n)  # 0, 2, 4
    found["hash"], found["clip"] = generator.permutation(n), generator.integers(0, 9, n)
    edges = bin_edges()[MAGNITUDES:]
    found["value"] = edges[found["cell"] % MAGNITUDES] * 1.01
    found = np.sort(found, order=["cell", "hash", "clip"])
    start = np.searchsorted(found["cell"], np.arange(7) * MAGNITUDES)
    features = np.array([0, 2, 4])
    high = np.array([found["value"][start[f] : start[f + 1]].max() for f in features], np.float64)
    ranges = high[:, None] * np.arange(5) / 4
    quantiles = np.tile(edges[[200, 220, 220, 260]], (3, 1))
    drawn = draw_examples(found, start, features, ranges, quantiles, edges, np.array([7, 9]), per_bin)
    wanted = []
    for i, feature in enumerate(features):
        own = np.arange(start[feature], start[feature + 1])
        own = own[np.argsort(found["hash"][own])]
        for kind, cuts, values in ((7, ranges[i], found["value"][own]), (9, quantiles[i], edges[found["cell"][own] % MAGNITUDES])):
            bins = np.clip(np.searchsorted(cuts, values, side="right") - 1, 0, len(cuts) - 2)
            taken = draw(bins, found["clip"][own], len(cuts) - 1, per_bin)
            wanted += [[feature, kind, b, rank, own[taken[b, rank]]] for b, rank in zip(*np.nonzero(taken >= 0), strict=True)]
    assert drawn.T.tolist() == wanted
