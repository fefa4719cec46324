"""Cosines of decoder rows, block by block, equal those of the full matrix; dictionaries are compared as it says."""

import numpy as np
import pytest
import torch

import sae.similarity
from cache.errors import HearsaeError
from sae.models import Dictionary, SaeConfig
from sae.similarity import decoder_cosine, nearest_latents, stability

D_IN = 16


def dictionary_of(rows: np.ndarray, **settings) -> Dictionary:
    sae = Dictionary(SaeConfig(**{"arch": "relu", "d_in": D_IN, "d_sae": len(rows), "site": "encoder.blocks.0"} | settings))
    sae.W_dec.data.copy_(torch.from_numpy(rows))
    return sae


def random_rows(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, D_IN))


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture(params=["one block", "many blocks"])
def blocks(request, monkeypatch):
    """A few rows at a time, the last time fewer."""
    if request.param == "many blocks":
        monkeypatch.setattr(sae.similarity, "BLOCK_VALUES", 7 * 50)


def test_the_nearest_other_latent_is_that_of_the_full_matrix(blocks):
    rows = random_rows(50, 0)
    rows[7] = 3 * rows[20] + 0.01 * random_rows(1, 9)  # nearly the same direction, another length
    cosines = unit(rows) @ unit(rows).T
    np.fill_diagonal(cosines, -1)
    nearest = cosines.max(axis=1)
    found = decoder_cosine(dictionary_of(rows))
    expected = [nearest.mean(), *np.quantile(nearest, [0.5, 0.9, 0.99]), 2 / 50]
    assert found == pytest.approx(expected, abs=1e-6)


def test_the_nearest_latents_are_those_of_the_full_matrix(blocks):
    rows = random_rows(50, seed=5)
    cosines = unit(rows) @ unit(rows).T
    np.fill_diagonal(cosines, -2)
    asked = np.array([3, 17, 49, 0])
    other, cosine = nearest_latents(dictionary_of(rows), asked, 8)
    assert np.array_equal(other, np.argsort(-cosines[asked], axis=1)[:, :8])
    assert np.allclose(cosine, np.sort(cosines[asked], axis=1)[:, :-9:-1], atol=1e-5)


def test_a_latent_has_no_more_neighbours_than_there_are_others():
    other, cosine = nearest_latents(dictionary_of(random_rows(3, seed=6)), np.array([1]), 8)
    assert sorted(other[0]) == [0, 2] and cosine.shape == (1, 2)
    assert nearest_latents(dictionary_of(random_rows(1, seed=6)), np.array([0]), 8)[0].shape == (1, 0)


def test_stability_is_that_of_the_full_matrix(blocks):
    a, b = random_rows(50, 0), random_rows(40, 1)
    b[:20] = a[10:30] + 0.2 * random_rows(20, 2)
    b[20] = b[0]  # two latents of b near one of a: a pair for one of them only
    cosines = unit(a) @ unit(b).T
    (found,) = stability([dictionary_of(a), dictionary_of(b, seed=1)])
    assert (found.a, found.b, found.latents_a, found.latents_b) == (0, 1, 50, 40)
    assert found.matched_a == (cosines.max(axis=1) > 0.7).mean() >= 0.4
    assert found.matched_b == (cosines.max(axis=0) > 0.7).mean() >= 21 / 40
    assert found.mean_max_cosine_a == pytest.approx(cosines.max(axis=1).mean(), abs=1e-6)
    assert found.mean_max_cosine_b == pytest.approx(cosines.max(axis=0).mean(), abs=1e-6)
    pairs = [(i, j) for i, j in enumerate(cosines.argmax(axis=1)) if cosines[:, j].argmax() == i and cosines[i, j] > 0.7]
    assert found.one_to_one == len(pairs) / 40 >= 0.5


def test_the_order_of_latents_and_the_length_of_rows_do_not_count():
    rows = random_rows(30, 0)
    shuffled = np.random.default_rng(1).permutation(rows) * np.random.default_rng(2).uniform(0.5, 2, (30, 1))
    (found,) = stability([dictionary_of(rows), dictionary_of(shuffled)])
    assert (found.matched_a, found.matched_b, found.one_to_one) == (1.0, 1.0, 1.0)
    assert found.mean_max_cosine_a == pytest.approx(1.0, abs=1e-5)


def test_latents_that_never_fired_are_left_out():
    rows, other = random_rows(30, 0), random_rows(30, 1)
    other[:10] = rows[:10]
    fired = np.r_[np.ones(10, np.int64), np.zeros(20, np.int64)]
    (found,) = stability([dictionary_of(rows), dictionary_of(other)], [fired, fired])
    assert (found.latents_a, found.matched_a, found.matched_b, found.one_to_one) == (10, 1.0, 1.0, 1.0)
    assert stability([dictionary_of(rows), dictionary_of(other)])[0].matched_a < 0.7
    with pytest.raises(HearsaeError, match="no latent of the SAE of seed 5 ever fired"):
        stability([dictionary_of(rows), dictionary_of(other, seed=5)], [fired, np.zeros(30, np.int64)])


def test_all_pairs_are_compared():
    found = stability([dictionary_of(random_rows(20, seed)) for seed in range(3)])
    assert [(pair.a, pair.b) for pair in found] == [(0, 1), (0, 2), (1, 2)]


def test_what_can_not_be_compared_is_refused():
    one = dictionary_of(random_rows(20, 0))
    with pytest.raises(HearsaeError, match="at least two, not 1"):
        stability([one])
    with pytest.raises(HearsaeError, match=r"one site: these reconstruct encoder.blocks.0 and encoder.blocks.1"):
        stability([one, dictionary_of(random_rows(20, 0), site="encoder.blocks.1")])
