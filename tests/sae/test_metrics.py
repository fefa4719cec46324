"""Evaluation equals what one computes directly, in float64, from all rows at once."""

import json
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
    sae.b_dec.data.fill_(4.0)
    sae.b_enc.data[:5] = -100.0
    sae.b_enc.data[5:6] = 8.0
    sae.threshold.fill_(0.7)
    return sae.requires_grad_(False)


def directly(sae: Dictionary, x: np.ndarray, y: np.ndarray) -> dict:
    """The twin: every number from the rows x [n, d_in] and what is to be reconstructed, y [n, d_out], all at once in float64."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    W_enc, b_enc, W_dec, b_dec = (p.detach().double().numpy() for p in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec))
    pre = (x if sae.config.target else x - b_dec) @ W_enc + b_enc
    z = np.where(pre > np.float32(0.7), pre, 0)
    y_hat, mean, fired = z @ W_dec + b_dec, y.mean(axis=0), z > 0
    density = fired.mean(axis=0)

    def cosine(a, b):
        return ((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).mean()

    def bias(a, b):
        return (b**2).sum() / (a * b).sum()

    return {
        "rows": len(x),
        "l0": fired.sum(axis=1).mean(),
        "fvu": ((y - y_hat) ** 2).sum() / ((y - mean) ** 2).sum(),
        "explained_variance": 1 - ((y - y_hat) ** 2).sum() / ((y - mean) ** 2).sum(),
        "cosine": cosine(y, y_hat),
        "centred_cosine": cosine(y - mean, y_hat - mean),
        "reconstruction_bias": bias(y, y_hat),
        "centred_reconstruction_bias": bias(y - mean, y_hat - mean),
        "dead_fraction": (density == 0).mean(),
        "dense_fraction": (density > 0.1).mean(),
        "y_hat": y_hat,
        "fired": fired,
    }


def agrees(measured, expected: dict) -> None:
    for name, value in expected.items():
        found = getattr(measured, name, None)
        if name.endswith("bias"):  # the inverse is well conditioned also where x and x_hat have nothing to do with each other
            found, value = 1 / found, 1 / value
        if name not in ("y_hat", "fired"):
            assert found == pytest.approx(value, rel=1e-3 if name == "l0" else 1e-4, abs=1e-6), name


def test_evaluation_equals_a_direct_computation(store):
    sae = make(store)
    x = np.concatenate([store.read_clip(SITE, clip) for clip in range(7) if clip != 2])
    expected = directly(sae, x, x)
    fired = expected["fired"]

    seen = []
    measured = evaluate(sae, store, on_rows=seen.append)
    agrees(measured, expected)
    assert measured.rows == sum(seen)
    assert measured.dead_fraction >= 0.1 and measured.dense_fraction > 0
    assert abs(measured.cosine - measured.centred_cosine) > 0.01 < abs(measured.reconstruction_bias - measured.centred_reconstruction_bias)
    assert measured.fvu_by_site == {SITE: measured.fvu}
    assert (measured.site, measured.target) == (SITE, SITE)
    assert abs(measured.firings - fired.sum(axis=0)).max() <= 2
    for quantile, value in measured.l0_quantiles.items():
        assert abs(value - np.quantile(fired.sum(axis=1), float(quantile), method="inverted_cdf")) <= 1
    assert len(set(measured.l0_quantiles.values())) > 2
    density = fired.mean(axis=0)
    assert measured.density_count.sum() == (density > 0).sum()
    assert measured.density_count[-1] >= 1, "the latent that always fires"
    np.testing.assert_array_equal(measured.density_count, np.histogram(np.log10(density[density > 0]), measured.density_edges)[0])


def test_what_is_kept_of_it_is_strict_json(store):
    sae = make(store, d_sae=1, k=1)  # one latent: no cosine with another
    sae.b_enc.data.fill_(-100.0)
    kept = json.loads(json.dumps(evaluate(sae, store).to_json(), allow_nan=False))
    assert "firings" not in kept
    assert kept.keys() >= {"site", "rows", "l0", "fvu", "dead_fraction", "dense_fraction", "density_edges", "density_count", "fvu_by_site"}
    assert kept["decoder_cosine"] == dict.fromkeys(("mean", "median", "q90", "q99", "near_duplicate_fraction"))
    assert (kept["l0"], kept["dead_fraction"]) == (0.0, 1.0)


def test_a_transcoder_is_held_against_its_target(store):
    transcoder = make(store, target=OTHER, d_out=8)
    x, y = (np.concatenate([store.read_clip(site, clip) for clip in range(7) if clip != 2]) for site in (SITE, OTHER))
    measured = evaluate(transcoder, store)
    agrees(measured, directly(transcoder, x, y))
    assert (measured.site, measured.target) == (SITE, OTHER)
    assert measured.fvu_by_site == {OTHER: measured.fvu}
    with pytest.raises(HearsaeError, match=rf"reconstructs rows of width 9; {OTHER} in .* has width 8"):
        evaluate(make(store, target=OTHER, d_out=9), store)
    with pytest.raises(HearsaeError, match=r"has no site 'encoder.blocks.3'"):
        evaluate(make(store, target="encoder.blocks.3", d_out=8), store)


def test_a_crosscoder_is_measured_site_by_site_on_rows_that_all_sites_have(tmp_path):
    plan = plan_of([9.0] * 5, chunk_rows=128, shard_rows=1024)
    fill_store(tmp_path / "acts.zarr", plan, {SITE: D_IN}, rows_of, skip={2: "noise"})
    store = fill_store(tmp_path / "acts.zarr", plan, {OTHER: 8}, rows_of, skip={1: "silent"})  # in one chunk with rows of clip 0
    sae = make(store, site=f"{SITE}+{OTHER}", widths=(D_IN, 8), d_in=D_IN + 8)
    x = np.concatenate([np.concatenate([store.read_clip(site, clip) for site in (SITE, OTHER)], axis=1) for clip in (0, 3, 4)])
    expected, measured = directly(sae, x, x), evaluate(sae, store)
    about_the_mean = {name: expected.pop(name) for name in ("centred_cosine", "centred_reconstruction_bias")}
    agrees(measured, expected)
    for name, value in about_the_mean.items():  # of all rows of a site: here a quarter more than are compared
        assert getattr(measured, name) == pytest.approx(value, rel=0.1)
    for site, columns in ((SITE, slice(None, D_IN)), (OTHER, slice(D_IN, None))):
        y, y_hat = x[:, columns].astype(np.float64), expected["y_hat"][:, columns]
        assert measured.fvu_by_site[site] == pytest.approx(((y - y_hat) ** 2).sum() / ((y - y.mean(0)) ** 2).sum(), rel=1e-4)
    assert measured.fvu_by_site[SITE] != pytest.approx(measured.fvu_by_site[OTHER], rel=0.01)
    with pytest.raises(HearsaeError, match=rf"takes rows of width 25; {SITE} in .* has width 24"):
        evaluate(make(store, site=f"{SITE}+{OTHER}", widths=(25, 7), d_in=32), store)


def test_rows_that_are_all_equal_have_no_fvu(tmp_path):
    plan = plan_of([9.0] * 3, chunk_rows=128, shard_rows=1024)
    store = fill_store(tmp_path / "acts.zarr", plan, {SITE: D_IN}, lambda site, clip, n: np.full((n, D_IN), 0.1))
    assert np.isnan(evaluate(make(store), store).fvu)


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
