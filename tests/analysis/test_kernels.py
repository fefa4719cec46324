"""The parts of a scan, each against a plain twin: the grid of values, the hash of frames, the compiled loops."""

import numpy as np
import pytest
import scan_twin as twin
from scan_twin import Example

from analysis.grid import BINS, MAGNITUDES, bin_edges, bin_of, fixed_point, frame_hash
from analysis.kernels import CANDIDATE, MOMENT, draw, merge_candidates, new_tally, tally_dense, tally_sparse, top_dense, top_sparse
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


@pytest.fixture(scope="module")
def block() -> dict[str, np.ndarray]:
    """300 rows of 7 clips, 70 features, half of the values zero (some of them -0.0), some equal, and the same as sparse codes."""
    generator = np.random.Generator(np.random.PCG64(5))
    values = (generator.standard_normal((300, 70)) * generator.integers(0, 2, (300, 70))).astype(np.float32)
    values[:, :35] = np.round(values[:, :35])
    first_row = np.array([0, 1, 60, 100, 180, 181, 250, 300])
    row, latent = np.nonzero(values)
    codes = Codes(row.astype(np.int64), latent.astype(np.int32), values[row, latent])
    clips = np.arange(10, 17, dtype=np.int32)
    return {
        "values": values, "first_row": first_row, "clips": clips, "clip_of_row": np.repeat(clips, np.diff(first_row)), "codes": codes,
        "start": np.searchsorted(codes.row, np.arange(301)), "order": generator.permutation(300),
    }  # fmt: skip


def test_the_tally_equals_its_plain_twin(block):
    per_bin = 2
    dense, sparse = new_tally(70, per_bin), new_tally(70, per_bin)
    tally_dense(block["values"], block["order"], block["clip_of_row"], dense)
    tally_sparse(block["start"], block["codes"].latent, block["codes"].value, block["order"], block["clip_of_row"], sparse)
    values = block["values"].astype(np.float64)
    np.testing.assert_allclose(dense.total, [values.sum(0), (values**2).sum(0), np.maximum(values, 0).sum(0)], rtol=1e-12)
    np.testing.assert_array_equal(dense.total, sparse.total)
    np.testing.assert_array_equal(dense.low, block["values"].min(axis=0))
    np.testing.assert_array_equal(dense.high, block["values"].max(axis=0))
    np.testing.assert_array_equal(sparse.high, [column[column != 0].max() for column in block["values"].T])
    bins = bin_of(block["values"])
    for feature in range(70):
        counts = np.bincount(bins[bins[:, feature] >= 0, feature], minlength=BINS)
        np.testing.assert_array_equal(dense.histogram[feature, :BINS], counts)
        np.testing.assert_array_equal(sparse.histogram[feature, :BINS], counts)
        for m in range(MAGNITUDES):
            kept: list[int] = []
            for row in block["order"]:
                if bins[row, feature] == MAGNITUDES + m and len(kept) < per_bin and block["clip_of_row"][row] not in block["clip_of_row"][kept]:
                    kept.append(int(row))
            for tally in (dense, sparse):
                assert tally.slot_row[feature, m, : tally.kept[feature, m]].tolist() == kept
                assert tally.slot_value[feature, m, : tally.kept[feature, m]].tolist() == block["values"][kept, feature].tolist()


def test_the_running_top_equals_sorting(block):
    tops = []
    for sparse in (False, True):
        top = np.zeros((70, 3), MOMENT)
        top["clip"] = -1
        if sparse:
            top_sparse(block["start"], block["codes"].latent, block["codes"].value, block["first_row"], block["clips"], top)
        else:
            top_dense(block["values"], block["first_row"], block["clips"], top)
        tops.append(top)
    frame_of_row = np.concatenate([np.arange(n) for n in np.diff(block["first_row"])])
    rows = twin.Rows(block["values"], block["clip_of_row"], frame_of_row)
    for top in tops:
        for feature in range(70):
            assert [Example(*moment) for moment in top[feature].tolist() if moment[1] >= 0] == twin.top(rows, feature, 3)


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
