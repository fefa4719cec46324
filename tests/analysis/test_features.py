"""Neurons, SAE latents, principal components and a random basis behind one interface."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import fill_store, plan_of
from scan_twin import SITE, save_sae

from analysis.features import open_features
from cache.errors import HearsaeError
from cache.store import ActivationStore


@pytest.fixture
def store(tmp_path: Path) -> ActivationStore:
    """4 clips of 50 rows; columns of very unequal means."""
    generator = np.random.Generator(np.random.PCG64(0))
    plan = plan_of([1.0] * 4, shard_rows=128, chunk_rows=64)
    return fill_store(tmp_path / "acts.zarr", plan, {SITE: 16}, lambda site, clip, n: generator.normal(np.arange(16), 1, (n, 16)))


def rows_of(store: ActivationStore) -> np.ndarray:
    return np.concatenate([store.read_clip(SITE, clip) for clip in range(4)])


def test_neurons_are_the_stored_values(store):
    features = open_features(f"neurons:{SITE}", store)
    assert (features.site, features.count, features.spec) == (SITE, 16, f"neurons:{SITE}")
    rows = rows_of(store)
    assert rows.dtype == np.float16
    values = features.dense(rows)
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, rows.astype(np.float32))
    assert features.sparse(rows) is None


def test_a_random_basis_rotates_the_centred_rows(store):
    features = open_features(f"random:{SITE}", store, seed=3)
    rows = rows_of(store)
    values = features.dense(rows)
    centred = rows.astype(np.float64) - rows.astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(np.linalg.norm(values, axis=1), np.linalg.norm(centred, axis=1), rtol=1e-5)
    np.testing.assert_allclose(values @ values.T, centred @ centred.T, atol=1e-4)
    np.testing.assert_allclose(values.mean(axis=0), 0, atol=1e-5)
    assert np.abs(values).max(axis=0).min() > 0.5  # no axis was left alone
    assert features.sparse(rows) is None


def test_a_random_basis_depends_on_its_seed_alone(store):
    rows = rows_of(store)
    first, again, other = (open_features(f"random:{SITE}", store, seed).dense(rows) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)


def test_random_directions_have_no_preferred_sign(store):
    """QR alone fixes signs by its algorithm: without the correction the first entry would be negative throughout."""
    signs = [open_features(f"random:{SITE}", store, seed).basis[0, 0] > 0 for seed in range(40)]
    assert 8 < sum(signs) < 32


def test_principal_components_are_uncorrelated_and_fall_in_variance(tmp_path):
    generator = np.random.Generator(np.random.PCG64(1))
    mix = generator.standard_normal((16, 16))
    plan = plan_of([1.0] * 4, shard_rows=128, chunk_rows=64)
    made = fill_store(tmp_path / "acts.zarr", plan, {SITE: 16}, lambda site, clip, n: generator.standard_normal((n, 16)) @ mix + 20)
    features = open_features(f"pca:{SITE}", made)
    rows = rows_of(made)
    values = features.dense(rows).astype(np.float64)
    np.testing.assert_allclose(values.mean(axis=0), 0, atol=1e-4)
    covariance = np.cov(rows.astype(np.float64).T, ddof=0)
    np.testing.assert_allclose(np.cov(values.T, ddof=0), np.diag(np.linalg.eigvalsh(covariance)[::-1]), atol=1e-3)
    assert (np.abs(features.basis).argmax(axis=0) == features.basis.argmax(axis=0)).all()  # of either sign the one with the largest positive
    assert (features.spec, features.count, features.sparse(rows)) == (f"pca:{SITE}", 16, None)


def test_principal_components_do_not_depend_on_the_threads(store):
    threads = torch.get_num_threads()
    try:
        found = []
        for n in (1, 2):
            torch.set_num_threads(n)
            found.append(open_features(f"pca:{SITE}", store).basis)
            assert torch.get_num_threads() == n
    finally:
        torch.set_num_threads(threads)
    np.testing.assert_array_equal(*found)


def test_sae_latents_are_what_the_dictionary_encodes(store, tmp_path):
    folder = save_sae(tmp_path / "sae")
    features = open_features(f"sae:{folder}", store)
    assert (features.site, features.count, features.spec) == (SITE, 48, f"sae:{folder}")
    rows = rows_of(store)
    values, codes = features.dense(rows), features.sparse(rows)
    assert values.dtype == np.float32 and values.shape == (200, 48)
    assert 0 < (values > 0).mean() < 0.5
    scattered = np.zeros_like(values)
    scattered[codes.row, codes.latent] = codes.value
    np.testing.assert_allclose(scattered, values, atol=1e-5)


@pytest.mark.parametrize("kind", ["neurons", "random", "pca", "sae"])
def test_features_travel_to_other_processes(store, tmp_path, kind):
    spec = f"sae:{save_sae(tmp_path / 'sae')}" if kind == "sae" else f"{kind}:{SITE}"
    features = open_features(spec, store)
    arrived = pickle.loads(pickle.dumps(features))
    rows = rows_of(store)
    np.testing.assert_array_equal(arrived.dense(rows), features.dense(rows))


def test_encoding_leaves_torch_as_it_was(store, tmp_path):
    features = open_features(f"sae:{save_sae(tmp_path / 'sae')}", store)
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    features.sparse(rows_of(store))
    assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == before


@pytest.mark.parametrize(
    ("made_for", "complaint"),
    [
        ({"site": "encoder.blocks.9"}, r"is for site 'encoder.blocks.9', which .* lacks; it has: encoder.blocks.0"),
        ({"d_in": 8}, "takes rows of width 8, but encoder.blocks.0 in .* has width 16"),
        ({"model_sha256": "f" * 64}, "was trained on model ffffffffffff, but .* holds model 000000000000"),
    ],
)
def test_an_sae_of_another_site_width_or_model_is_refused(store, tmp_path, made_for, complaint):
    with pytest.raises(HearsaeError, match=complaint):
        open_features(f"sae:{save_sae(tmp_path / 'sae', **made_for)}", store)


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("neurons:encoder.blocks.7", "no site 'encoder.blocks.7'"),
        ("random:encoder.blocks.7", "no site 'encoder.blocks.7'"),
        ("pca:encoder.blocks.7", "no site 'encoder.blocks.7'"),
        ("sae:/nowhere", "there is no SAE in /nowhere"),
        ("encoder.blocks.0", "can't be read: use neurons:SITE, sae:DIR, pca:SITE or random:SITE"),
        ("neurons:", "can't be read"),
        ("axes:encoder.blocks.0", "can't be read"),
    ],
)
def test_an_unknown_specification_is_refused(store, spec, complaint):
    with pytest.raises(HearsaeError, match=complaint):
        open_features(spec, store)
