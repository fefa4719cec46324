"""Evaluation equals what one computes directly, in float64, from all rows at once."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import fill_store, plan_of
from planted_rows import D_IN, OTHER, SITE, planted_rows

from cache.errors import HearsaeError
from sae.metrics import evaluate
from sae.models import Dictionary, SaeConfig


@pytest.fixture
def store(tmp_path):
    """With a skipped clip, and a last shard that is not full."""
    return fill_store(tmp_path / "acts.zarr", plan_of([9.0] * 7, chunk_rows=128, shard_rows=1024), {SITE: D_IN, OTHER: 8}, rows_of, skip={2: "noise"})


def rows_of(site: str, clip: int, n: int) -> np.ndarray:
    return planted_rows(site, clip, n)[:, : D_IN if site == SITE else 8]


def make(store, **settings) -> Dictionary:
    config = {"arch": "batchtopk", "d_in": D_IN, "d_sae": 50, "k": 3, "site": SITE, "model_sha256": store.header.model["sha256"]} | settings
    sae = Dictionary(SaeConfig(**config))
    sae.init_parameters(torch.Generator().manual_seed(0))
    sae.b_dec.data.fill_(5.0)
    sae.b_enc.data[:5] = -100.0
    sae.b_enc.data[5] = 100.0
    sae.threshold.fill_(0.7)
    return sae.requires_grad_(False)


def test_evaluation_equals_a_direct_computation(store):
    sae = make(store)
    x = np.concatenate([store.read_clip(SITE, clip) for clip in range(7) if clip != 2]).astype(np.float64)
    W_enc, b_enc, W_dec, b_dec = (p.detach().double().numpy() for p in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec))
    pre = (x - b_dec) @ W_enc + b_enc
    z = np.where(pre > np.float32(0.7), pre, 0)
    x_hat = z @ W_dec + b_dec
    density = (z > 0).mean(axis=0)

    seen = []
    measured = evaluate(sae, store, on_rows=seen.append)
    assert measured.rows == len(x) == sum(seen)
    assert measured.l0 == pytest.approx((z > 0).sum(axis=1).mean(), rel=1e-3)
    assert measured.fvu == pytest.approx(((x - x_hat) ** 2).sum() / ((x - x.mean(0)) ** 2).sum(), rel=1e-4)
    assert measured.dead_fraction == (density == 0).mean() >= 0.1
    assert measured.dense_fraction == (density > 0.1).mean() > 0
    assert abs(measured.firings - (z > 0).sum(axis=0)).max() <= 2
    assert measured.density_count.sum() == (density > 0).sum()
    assert measured.density_count[-1] >= 1, "the latent that always fires"
    np.testing.assert_array_equal(measured.density_count, np.histogram(np.log10(density[density > 0]), measured.density_edges)[0])
    assert set(measured.to_json()) >= {"site", "rows", "l0", "fvu", "dead_fraction", "dense_fraction", "density_edges", "density_count"}


def test_another_site_width_or_model_is_refused(store):
    with pytest.raises(HearsaeError, match=f"was trained on {SITE}, not on {OTHER}"):
        evaluate(make(store), store, site=OTHER)
    with pytest.raises(HearsaeError, match=r"has no site 'encoder.blocks.3'"):
        evaluate(make(store, site="encoder.blocks.3"), store)
    with pytest.raises(HearsaeError, match=r"takes rows of width 24; .* has width 8"):
        evaluate(make(store, site=OTHER), store)
    other = make(store, model_sha256="f" * 64)
    with pytest.raises(HearsaeError, match=r"activations of another model \(made-up, 000000000000\).*ffffffffffff"):
        evaluate(other, store)
    assert evaluate(other, store, any_model=True).rows == evaluate(make(store), store).rows


def test_a_store_without_rows_is_refused(tmp_path):
    plan = plan_of([2.0], chunk_rows=128, shard_rows=1024)
    empty = fill_store(tmp_path / "empty.zarr", plan, {SITE: D_IN}, rows_of, shards=[])
    with pytest.raises(HearsaeError, match="has no rows"):
        evaluate(make(empty), empty)
    skipped = fill_store(tmp_path / "skipped.zarr", plan, {SITE: D_IN}, rows_of, skip={0: "silent"})
    with pytest.raises(HearsaeError, match="has no rows"):
        evaluate(make(skipped), skipped)


def test_a_dictionary_that_names_no_site_takes_the_one_given(store):
    sae = make(store)
    sae.config = replace(sae.config, site="")
    assert evaluate(sae, store, site=SITE).fvu == evaluate(make(store), store).fvu
