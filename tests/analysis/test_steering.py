"""Steering, on a Whisper of random weights: what an edit changes is exactly what its formula says, and nothing else."""

import numpy as np
import pytest
import torch
from conftest import write_tiny_whisper

from analysis.interventions import edit_site, limit_attention, transcribe_encoded
from analysis.steering import Edit, open_steerable, steering
from cache.errors import HearsaeError
from cache.model import load_model
from sae.models import ARCHS, Dictionary, SaeConfig

SITE = "encoder.blocks.0"
SITES = (SITE, "encoder.blocks.1.mlp", "encoder.blocks.0.mlp.1", "encoder.blocks.1.attn", "encoder.ln_post")
TOKEN_SITES = ("decoder.blocks.0", "decoder.blocks.1.mlp.1", "decoder.blocks.0.cross_attn")
ALL_HOWS = ("scale", "set", "add", "clamp")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Two blocks of width 32, a window of 60 frames."""
    return load_model(str(write_tiny_whisper(tmp_path_factory.mktemp("tiny") / "tiny.pt", n_audio_ctx=60)), "cpu")


@pytest.fixture
def mel():
    return torch.randn(2, 80, 120, generator=torch.Generator().manual_seed(0))


def write_sae(folder, loaded, site=SITE, arch="batchtopk", d_in=32, **settings):
    """An SAE as it is before training; each latent's threshold lies among its values."""
    settings = {"k": 4 if arch in ("topk", "batchtopk", "matryoshka") else 0, "model_sha256": loaded.sha256} | settings
    sae = Dictionary(SaeConfig(arch=arch, d_in=d_in, d_sae=3 * d_in, site=site, **settings))
    sae.init_parameters(torch.Generator().manual_seed(7))
    sae.threshold.copy_(torch.linspace(0.05, 0.2, sae.threshold.numel()).reshape(sae.threshold.shape))
    sae.save(folder)
    return f"sae:{folder}"


@torch.no_grad()
def encode(loaded, mel):
    return loaded.module.encoder(mel)


@torch.no_grad()
def at_site(loaded, mel, site):
    """What the site gives [batch, positions, d], with all edits that are in force."""
    found = []
    with edit_site(loaded.module, site, lambda x: found.append(x) or x):
        encoded = loaded.module.encoder(mel)
        if site.startswith("decoder."):
            loaded.module.decoder(torch.tensor([[50257, 50362, 11, 12]] * len(mel)), encoded)
    return found[0]


def specs(loaded, folder, site):
    width = 128 if site.endswith("mlp.1") else 32
    return [f"neurons:{site}", f"random:{site}", write_sae(folder, loaded, site, d_in=width)]


@pytest.mark.parametrize("arch", ARCHS)
def test_values_of_latents_are_those_of_the_sae(loaded, tmp_path, arch):
    latents = open_steerable(write_sae(tmp_path, loaded, arch=arch), loaded)
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(1))
    chosen = [40, 3, 95]
    whole = latents.dictionary.encode(x)[:, chosen]
    torch.testing.assert_close(latents.values(x, chosen), whole)
    assert 0 < (whole > 0).float().mean() < 1
    assert torch.equal(latents.directions(chosen), latents.dictionary.W_dec[chosen])


def test_neurons_and_directions_of_a_basis_say_all_of_a_row(loaded):
    x = torch.randn(9, 32, generator=torch.Generator().manual_seed(1))
    for spec in (f"neurons:{SITE}", f"random:{SITE}"):
        features = open_steerable(spec, loaded)
        torch.testing.assert_close(features.values(x, range(32)) @ features.directions(range(32)), x)
    one, same, other = (open_steerable(f"random:{SITE}", loaded, seed).directions([0]) for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.allclose(one, other)


@pytest.mark.parametrize("site", SITES + TOKEN_SITES)
def test_a_factor_of_one_changes_no_bit(loaded, mel, tmp_path, site):
    before, texts = at_site(loaded, mel, site), transcribe_encoded(loaded.module, encode(loaded, mel))
    for spec in specs(loaded, tmp_path, site):
        features = open_steerable(spec, loaded)
        everything = tuple(range(features.count))
        for edit in (Edit(everything, "scale", 1.0), Edit(everything, "add", 0.0), Edit(everything, "clamp", 1e9)):
            with steering(loaded.module, features, [edit]):
                assert torch.equal(at_site(loaded, mel, site), before)
                assert transcribe_encoded(loaded.module, encode(loaded, mel)) == texts


@pytest.mark.parametrize("how", ALL_HOWS)
@pytest.mark.parametrize("site", SITES + TOKEN_SITES)
def test_an_edit_adds_its_formula_and_leaves_the_rest_of_the_row(loaded, mel, tmp_path, site, how):
    """The formula written out, feature by feature and row by row."""
    before = at_site(loaded, mel, site)
    for spec in specs(loaded, tmp_path, site):
        features, amount = open_steerable(spec, loaded), {"scale": 3.0, "set": 2.0, "add": -1.0, "clamp": 0.02}[how]
        with steering(loaded.module, features, [Edit((1, 5), how, amount)]):
            after = at_site(loaded, mel, site)
        expected = before.clone()
        for b, position in np.ndindex(*before.shape[:2]):
            for f in (1, 5):
                value = float(features.values(before[b, position][None], [f]))
                new = {"scale": value * amount, "set": amount, "add": value + amount, "clamp": min(value, amount)}[how]
                expected[b, position] += (new - value) * features.directions([f])[0]
        torch.testing.assert_close(after, expected, atol=1e-5, rtol=1e-4)
        assert torch.equal(after, before) == torch.equal(expected, before)
        if how in ("set", "add"):  # of the others a latent may fire nowhere, or never reach the amount
            assert not torch.equal(after, before)


def test_a_removed_neuron_is_nought_and_a_removed_direction_gone(loaded, mel):
    for spec in (f"neurons:{SITE}", f"random:{SITE}"):
        features = open_steerable(spec, loaded)
        with steering(loaded.module, features, [Edit((4,), "scale", 0.0)]):
            left = features.values(at_site(loaded, mel, SITE).flatten(0, 1), [4, 5])
        assert left[:, 0].abs().max() < 1e-5 and left[:, 1].abs().min() > 1e-5


def test_edits_of_one_feature_follow_each_other(loaded, mel):
    features = open_steerable(f"neurons:{SITE}", loaded)
    with steering(loaded.module, features, [Edit((4, 4), "set", 2.0), Edit((4, 6), "scale", 3.0), Edit((4,), "add", 1.0)]):
        after = at_site(loaded, mel, SITE)
    torch.testing.assert_close(after[..., 4], torch.full((2, 60), 7.0))
    before = at_site(loaded, mel, SITE)
    torch.testing.assert_close(after[..., 6], 3.0 * before[..., 6])
    assert torch.equal(after[..., 5], before[..., 5])


def test_each_clip_is_edited_in_its_own_stretch_and_nowhere_else(loaded, mel, tmp_path):
    for spec in specs(loaded, tmp_path, SITE):
        features = open_steerable(spec, loaded)
        edits, before = [Edit((2, 9), "add", 1.0)], at_site(loaded, mel, SITE)
        with steering(loaded.module, features, edits):
            everywhere = at_site(loaded, mel, SITE)
        with steering(loaded.module, features, edits, [(10, 20), (0, 5)]):
            within = at_site(loaded, mel, SITE)
        for clip, (start, stop) in enumerate([(10, 20), (0, 5)]):
            for frame in range(60):
                assert torch.equal(within[clip, frame], (everywhere if start <= frame < stop else before)[clip, frame])
        with steering(loaded.module, features, edits, [(7, 7), (0, 0)]):
            assert torch.equal(at_site(loaded, mel, SITE), before)


def test_decoding_piece_by_piece_is_steered_as_all_positions_at_once_are(loaded, mel):
    """Whisper decodes with a cache of keys and values, one position after the other."""
    from whisper.decoding import PyTorchInference

    encoded = encode(loaded, mel)
    tokens = torch.tensor([[50257, 50362, 11, 12, 13]] * 2)
    for site in (*TOKEN_SITES, "decoder.blocks.1.attn.key", "decoder.blocks.0.cross_attn.value"):
        with torch.no_grad(), steering(loaded.module, open_steerable(f"neurons:{site}", loaded), [Edit((0, 3), "set", 4.0)]):
            at_once = loaded.module.decoder(tokens, encoded)
            stepwise = PyTorchInference(loaded.module, initial_token_length=2)
            pieces = [stepwise.logits(tokens[:, :n], encoded) for n in (2, 3, 4, 5)]
            stepwise.cleanup_caching()
        torch.testing.assert_close(torch.cat(pieces, dim=1), at_once, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(at_once, loaded.module.decoder(tokens, encoded), atol=1e-3)


def test_it_composes_with_other_edits_and_undoes_itself_however_it_is_left(loaded, mel):
    features, edits = open_steerable(f"neurons:{SITE}", loaded), [Edit((4,), "add", 3.0)]
    plain = encode(loaded, mel)
    with limit_attention(loaded.module, 3):
        narrow = encode(loaded, mel)
        with steering(loaded.module, features, edits):
            both = encode(loaded, mel)
        assert torch.equal(encode(loaded, mel), narrow)
    with steering(loaded.module, features, edits), limit_attention(loaded.module, 3):
        assert torch.equal(encode(loaded, mel), both)
    assert not torch.equal(both, narrow)
    with steering(loaded.module, features, edits), steering(loaded.module, features, edits):
        twice = encode(loaded, mel)
    with steering(loaded.module, features, [*edits, *edits]):
        assert torch.equal(encode(loaded, mel), twice)
    with pytest.raises(KeyError), steering(loaded.module, features, edits):
        raise KeyError
    assert torch.equal(encode(loaded, mel), plain)
    assert not any(module._forward_hooks for module in loaded.module.modules())


def test_what_cannot_be_steered_is_refused(loaded, tmp_path):
    def refused(spec, match):
        with pytest.raises(HearsaeError, match=match):
            open_steerable(spec, loaded)

    refused("latents:x", "use neurons:SITE, sae:DIR or random:SITE")
    refused("neurons:", "can't be steered")
    refused("neurons:encoder.blocks.9", "no site matches 'encoder.blocks.9'")
    refused("random:encoder.blocks.?", "is a pattern: name one site, such as encoder.blocks.0")
    refused(f"sae:{tmp_path / 'none'}", "there is no SAE")
    refused(write_sae(tmp_path / "a", loaded, model_sha256="f" * 64), "trained on model ffffffffffff")
    refused(write_sae(tmp_path / "b", loaded, d_in=16), "width 16, but encoder.blocks.0 of .* has width 32")
    refused(write_sae(tmp_path / "c", loaded, target="encoder.blocks.1"), "is a transcoder")
    refused(write_sae(tmp_path / "d", loaded, site=f"{SITE}+encoder.blocks.1", d_in=64, widths=(32, 32)), "is a crosscoder")
    encoder = load_model(str(write_tiny_whisper(tmp_path / "e.pt", encoder_only=True, n_audio_ctx=60)), "cpu")
    with pytest.raises(HearsaeError, match="no decoder"):
        open_steerable("neurons:decoder.blocks.0", encoder)


def test_edits_that_cannot_be_are_refused(loaded, mel):
    features = open_steerable(f"neurons:{SITE}", loaded)

    def refused(match, edit=None, spans=None, features=features):
        with pytest.raises(HearsaeError, match=match), steering(loaded.module, features, [edit or Edit((0,), "scale", 2.0)], spans):
            encode(loaded, mel)

    refused("no feature 32: neurons:encoder.blocks.0 has 0 to 31", Edit((32,), "scale", 2.0))
    refused("no feature -1", Edit((-1,), "scale", 2.0))
    refused("by 'double'", Edit((0,), "double", 2.0))
    refused("finite", Edit((0,), "set", float("nan")))
    refused("frames 5:3 are no stretch", spans=[(5, 3), (0, 1)])
    refused("stretches of time for 1 clips, and the batch has 2", spans=[(0, 3)])
    refused("window has 60", spans=[(0, 3), (0, 61)])
    refused("has tokens, not frames", spans=[(0, 1), (0, 1)], features=open_steerable("neurons:decoder.blocks.0", loaded))
    assert not any(module._forward_hooks for module in loaded.module.modules())
