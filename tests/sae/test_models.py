"""Dictionaries: inference, folding, saving, loading."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cache.errors import HearsaeError
from sae.models import ARCHS, Dictionary, SaeConfig, load_dictionary


def make(arch: str, d_in: int = 12, d_sae: int = 40) -> Dictionary:
    generator = torch.Generator().manual_seed(3)
    config = SaeConfig(
        arch, d_in, d_sae, 0 if arch == "relu" else 5, site="encoder.blocks.0", model_sha256="ab", store=("a.zarr",), plan_hash=("1",), rows=7
    )
    sae = Dictionary(config)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        sae.W_dec.copy_(F.normalize(sae.W_dec, dim=1))
        if arch == "batchtopk":
            sae.threshold.fill_(1.5)
    return sae


def rows(n: int = 2500) -> torch.Tensor:
    return torch.randn(n, 12, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("arch", ARCHS)
def test_sparse_codes_are_the_dense_ones(arch):
    sae, x = make(arch), rows()
    codes = sae.encode_sparse(x)
    assert (codes.row.dtype, codes.latent.dtype, codes.value.dtype) == (np.int64, np.int32, np.float32)
    assert (np.diff(codes.row * 40 + codes.latent) > 0).all()
    assert (codes.value > 0).all()
    dense = np.zeros((len(x), 40), np.float32)
    dense[codes.row, codes.latent] = codes.value
    np.testing.assert_allclose(dense, sae.encode(x).detach(), rtol=1e-5, atol=1e-5)
    x_hat, sparse = sae.reconstruct(x)
    torch.testing.assert_close(x_hat, sae.decode(sae.encode(x)), rtol=1e-4, atol=1e-4)
    assert len(sparse.value) == len(codes.value)


def test_each_architecture_keeps_what_it_says():
    x = rows()
    pre = (x - make("relu").b_dec) @ make("relu").W_enc + make("relu").b_enc
    assert ((make("relu").encode(x) > 0) == (pre > 0)).all()
    assert ((make("topk").encode(x) > 0).sum(1) == 5).all()
    assert ((make("batchtopk").encode(x) > 0) == (pre > 1.5)).all()


@pytest.mark.parametrize("arch", ARCHS)
def test_folding_is_exact(arch):
    sae, scale = make(arch), 3.7
    mean = np.random.default_rng(0).standard_normal(12) * 10
    raw = sae.folded(mean, scale)
    x = rows()
    stored = x / scale + torch.from_numpy(mean).float()
    torch.testing.assert_close(raw.encode(stored) * scale, sae.encode(x), rtol=1e-4, atol=1e-4)
    expected = sae.decode(sae.encode(x)) / scale + torch.from_numpy(mean).float()
    torch.testing.assert_close(raw.decode(raw.encode(stored)), expected, rtol=1e-4, atol=1e-4)
    assert raw.config.scale == scale
    torch.testing.assert_close(raw.W_dec.norm(dim=1), torch.ones(40))


@pytest.mark.parametrize("arch", ARCHS)
def test_a_saved_dictionary_is_the_same_when_loaded(arch, tmp_path):
    sae = make(arch)
    sae.save(tmp_path / "sae")
    loaded = load_dictionary(tmp_path / "sae")
    assert replace(loaded.config, hearsae="") == sae.config
    assert loaded.config.hearsae
    for name, tensor in sae.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert torch.equal(loaded.encode(rows()), sae.encode(rows()))
    assert sorted(path.name for path in (tmp_path / "sae").iterdir()) == ["config.json", "sae.safetensors"]


def test_no_rows_give_no_codes():
    for arch in ARCHS:
        assert len(make(arch).encode_sparse(torch.empty(0, 12)).value) == 0


def test_rows_of_another_width_are_refused():
    for method in ("encode", "encode_sparse", "reconstruct"):
        with pytest.raises(HearsaeError, match=r"width 12 \(encoder.blocks.0\), not 13"):
            getattr(make("topk"), method)(torch.zeros(2, 13))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"arch": "magic"}, "no SAE architecture 'magic'"), ({"k": 41}, "k = 41 is not between"), ({"k": 0}, "k = 0"), ({"d_sae": 0}, "positive")],
)
def test_configs_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(HearsaeError, match=message):
        SaeConfig(**{"arch": "topk", "d_in": 12, "d_sae": 40, "k": 5} | settings)


def damage_nothing_there(folder):
    for path in folder.iterdir():
        path.unlink()


def damage_weights_missing(folder):
    (folder / "sae.safetensors").unlink()


def damage_cut_short(folder):
    path = folder / "sae.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def damage_not_finite(folder):
    sae = load_dictionary(folder)
    sae.b_enc[3] = torch.nan
    sae.save(folder)


def damage_other_shape(folder):
    edit(folder, d_sae=10**12)


def damage_format(folder):
    edit(folder, format=99)


def damage_field(folder):
    edit(folder, d_sae="many")


def damage_no_json(folder):
    (folder / "config.json").write_text("{")


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_nothing_there, "there is no SAE in .*config.json is missing"),
        (damage_weights_missing, "sae.safetensors is missing"),
        (damage_cut_short, "damaged"),
        (damage_not_finite, "b_enc in sae.safetensors .*not finite"),
        (damage_other_shape, "W_enc in sae.safetensors"),
        (damage_format, "format 1"),
        (damage_field, "config.json is damaged"),
        (damage_no_json, "damaged"),
    ],
)
def test_a_damaged_dictionary_is_refused_in_one_line(damage, message, tmp_path):
    make("topk").save(tmp_path)
    damage(tmp_path)
    with pytest.raises(HearsaeError, match=message) as error:
        load_dictionary(tmp_path)
    assert "\n" not in str(error.value)
