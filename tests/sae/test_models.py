"""Dictionaries: inference, folding, saving, loading."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cache.errors import HearsaeError
from sae.models import ARCHS, THRESHOLDS, WITH_K, Centre, Dictionary, SaeConfig, load_dictionary

TRANSCODER = {"target": "encoder.blocks.0.mlp", "d_out": 9}
CROSSCODER = {"site": "encoder.blocks.0+encoder.blocks.1", "widths": (8, 4)}
KINDS = pytest.mark.parametrize("kind", [{}, TRANSCODER, CROSSCODER], ids=["sae", "transcoder", "crosscoder"])


def make(arch: str, d_in: int = 12, d_sae: int = 40, **kind) -> Dictionary:
    generator = torch.Generator().manual_seed(3)
    source = {"site": "encoder.blocks.0", "model_sha256": "ab", "store": ("a.zarr",), "plan_hash": ("1",), "rows": 7}
    config = SaeConfig(arch, d_in, d_sae, 5 if arch in WITH_K else 0, **source | kind)
    sae = Dictionary(config)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        sae.W_dec.copy_(F.normalize(sae.W_dec, dim=1))
        if arch in ("batchtopk", "matryoshka"):
            sae.threshold.fill_(1.5)
        elif arch in THRESHOLDS:
            sae.threshold.copy_(torch.linspace(-0.5, 3.0, d_sae))
    return sae


def rows(n: int = 2500) -> torch.Tensor:
    return torch.randn(n, 12, generator=torch.Generator().manual_seed(4))


@KINDS
@pytest.mark.parametrize("arch", ARCHS)
def test_sparse_codes_are_the_dense_ones(arch, kind):
    sae, x = make(arch, **kind), rows()
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
    assert ((make("jumprelu").encode(x) > 0) == ((pre > 0) & (pre > torch.linspace(-0.5, 3.0, 40)))).all()
    shifted = (make("relu", **TRANSCODER).encode(x) > 0) == (x @ make("relu", **TRANSCODER).W_enc + make("relu", **TRANSCODER).b_enc > 0)
    assert shifted.all()


def centre(width: int, scale: float) -> Centre:
    """Random means."""
    return Centre.of(np.random.default_rng(0).standard_normal(width), scale)


def stored(x: torch.Tensor, scaled: Centre) -> torch.Tensor:
    """The rows of which `x` is what training sees."""
    return (x.detach() / torch.from_numpy(scaled.scale) + torch.from_numpy(scaled.mean)).float()


CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.mark.parametrize("arch", ARCHS)
def test_folding_is_exact(arch):
    sae, scaled = make(arch), centre(12, 3.7)
    raw = sae.folded(scaled)
    x = rows()
    torch.testing.assert_close(raw.encode(stored(x, scaled)) * 3.7, sae.encode(x), **CLOSE)
    torch.testing.assert_close(raw.reconstruct(stored(x, scaled))[0], stored(sae(x), scaled), **CLOSE)
    assert raw.config.scale == 3.7
    torch.testing.assert_close(raw.W_dec.norm(dim=1), torch.ones(40))


@pytest.mark.parametrize("arch", ARCHS)
def test_folding_is_exact_where_sites_have_scales_of_their_own(arch):
    x = rows()
    transcoder, read, wanted = make(arch, **TRANSCODER), centre(12, 3.7), centre(9, 0.2)
    raw = transcoder.folded(read, wanted)
    torch.testing.assert_close(raw(stored(x, read)), stored(transcoder(x), wanted), **CLOSE)
    torch.testing.assert_close(raw.W_dec.norm(dim=1), torch.ones(40))
    crosscoder, both = make(arch, **CROSSCODER), centre(8, 3.7) + centre(4, 0.2)
    raw = crosscoder.folded(both)
    torch.testing.assert_close(raw(stored(x, both)), stored(crosscoder(x), both), **CLOSE)


@pytest.mark.parametrize("arch", [arch for arch in ARCHS if arch not in WITH_K])
def test_norms_of_the_decoder_can_be_moved_into_the_encoder(arch):
    for kind in ({}, CROSSCODER):
        sae, x = make(arch, **kind), rows()
        with torch.no_grad():
            sae.W_dec.mul_(torch.linspace(0.1, 3, 40)[:, None])
        before = sae(x)
        sae.with_unit_decoder()
        torch.testing.assert_close(sae(x), before, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(sae.decoder_norms(), torch.ones(40))


@KINDS
@pytest.mark.parametrize("arch", ARCHS)
def test_a_saved_dictionary_is_the_same_when_loaded(arch, kind, tmp_path):
    sae = make(arch, **kind)
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
    [
        ({"arch": "magic"}, "no SAE architecture 'magic'"),
        ({"k": 41}, "k = 41 is not between"),
        ({"k": 0}, "k = 0"),
        ({"d_sae": 0}, "positive"),
        ({"arch": "gated"}, "k has no effect on a gated SAE"),
        ({"d_out": 3}, "neither transcoder nor crosscoder"),
        ({"site": "a+b", "widths": (3, 3)}, "do not fit its sites"),
        ({"site": "a", "widths": (3, 9)}, "do not fit its sites"),
    ],
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


def damage_stores(folder):
    edit(folder, store=3)


def damage_rows(folder):
    edit(folder, rows="many")


def damage_deep(folder):
    (folder / "config.json").write_text("[" * 10**6)


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
        (damage_stores, "config.json is damaged"),
        (damage_rows, "config.json is damaged: its widths, seed or rows"),
        (damage_deep, "damaged"),
        (damage_no_json, "damaged"),
    ],
)
def test_a_damaged_dictionary_is_refused_in_one_line(damage, message, tmp_path):
    make("topk").save(tmp_path)
    damage(tmp_path)
    with pytest.raises(HearsaeError, match=message) as error:
        load_dictionary(tmp_path)
    assert "\n" not in str(error.value)
