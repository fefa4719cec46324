"""Baselines equal what one computes directly, in float64, from all rows at once."""

import numpy as np
import pytest
from conftest import fill_store, plan_of

from cache.errors import HearsaeError
from sae.baselines import BASELINES, baselines, moments, random_basis

SITE, OTHER = "encoder.blocks.0", "encoder.blocks.1"
WIDTH, KS = 12, (1, 3, 7, 12)
MIXING = np.random.default_rng(5).standard_normal((WIDTH, WIDTH)) * np.geomspace(4, 0.1, WIDTH)[:, None]


def rows_of(site: str, clip: int, n: int) -> np.ndarray:
    """Correlated columns far from the origin, another mean for each clip."""
    rng = np.random.default_rng([clip, n, ord(site[-1])])
    return rng.standard_normal((n, WIDTH)) @ MIXING + 20 + rng.standard_normal(WIDTH)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Training and held-out rows, both with a skipped clip."""
    root = tmp_path_factory.mktemp("stores")
    layout = {"chunk_rows": 128, "shard_rows": 512}
    train = fill_store(root / "train.zarr", plan_of([5.0] * 9, **layout), {SITE: WIDTH, OTHER: WIDTH}, rows_of, skip={4: "noise"})
    test = fill_store(root / "test.zarr", plan_of([4.0] * 7, **layout), {SITE: WIDTH}, lambda s, c, n: rows_of(s, c + 50, n), skip={1: "noise"})
    return train, test


def all_rows(store) -> np.ndarray:
    """float64, as stored."""
    skipped = store.skipped(SITE)
    return np.concatenate([store.read_clip(SITE, clip) for clip in range(store.clips.num_rows) if clip not in skipped]).astype(np.float64)


def keep_largest(coefficients: np.ndarray, k: int) -> np.ndarray:
    """The k largest of each row by magnitude, zeros elsewhere."""
    kept = np.zeros_like(coefficients)
    which = np.argsort(-np.abs(coefficients), axis=1)[:, :k]
    np.put_along_axis(kept, which, np.take_along_axis(coefficients, which, axis=1), axis=1)
    return kept


def test_moments_are_those_of_all_rows(stores):
    train, _ = stores
    x = all_rows(train)
    found = moments(train, SITE)
    assert found.rows == len(x)
    np.testing.assert_allclose(found.mean, x.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(x.T, bias=True), rtol=1e-9, atol=1e-9)
    axes = found.principal_axes()
    np.testing.assert_allclose(axes.T @ axes, np.eye(WIDTH), atol=1e-12)
    assert (np.diff(((x - x.mean(0)) @ axes).var(axis=0)) < 0).all(), "by falling variance"


def test_every_baseline_equals_its_direct_computation(stores):
    train, test = stores
    seen = []
    found = {(one.name, one.k): one for one in baselines(test, train, SITE, KS, seed=3, on_rows=seen.append)}
    assert found.keys() == {(name, k) for name in BASELINES for k in KS}

    fitted, x = all_rows(train), all_rows(test)
    mean = fitted.mean(axis=0)
    axes = np.linalg.svd(fitted - mean, full_matrices=False)[2].T
    random = random_basis(WIDTH, 3)
    centred = x - mean
    spread = ((x - x.mean(axis=0)) ** 2).sum()
    for k in KS:
        reconstructed = {
            "pca": centred @ axes[:, :k] @ axes[:, :k].T,
            "pca-largest": keep_largest(centred @ axes, k) @ axes.T,
            "neurons": keep_largest(centred, k),
            "random": keep_largest(centred @ random, k) @ random.T,
        }
        for name, x_hat in reconstructed.items():
            assert found[name, k].fvu == pytest.approx(((centred - x_hat) ** 2).sum() / spread, rel=1e-4, abs=1e-6), (name, k)
    assert {one.rows for one in found.values()} == {len(x)}
    assert sum(seen) == len(x) + len(fitted)
    assert found["pca", 3].fvu > found["pca-largest", 3].fvu > 0.01


def test_a_random_basis_is_orthogonal_and_follows_its_seed():
    basis = random_basis(30, 1)
    np.testing.assert_allclose(basis.T @ basis, np.eye(30), atol=1e-12)
    np.testing.assert_array_equal(basis, random_basis(30, 1))
    assert abs(basis - random_basis(30, 2)).max() > 0.1


def test_what_can_not_be_compared_is_refused(stores, tmp_path):
    train, test = stores
    for ks in ((0,), (13,), ()):
        with pytest.raises(HearsaeError, match=r"keep 1 to 12 numbers of a row"):
            baselines(test, train, SITE, ks)
    with pytest.raises(HearsaeError, match=f"has no site '{OTHER}'"):
        baselines(test, train, OTHER, KS)
    narrow = fill_store(tmp_path / "narrow.zarr", plan_of([4.0], chunk_rows=128, shard_rows=512), {SITE: 8}, lambda s, c, n: rows_of(s, c, n)[:, :8])
    with pytest.raises(HearsaeError, match=r"narrow.zarr holds activations of another model"):
        baselines(test, narrow, SITE, KS)
