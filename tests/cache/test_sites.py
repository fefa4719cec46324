"""Site names and patterns, against the modules of a real Whisper."""

from dataclasses import asdict

import pytest
import torch
from whisper.model import ModelDimensions, Whisper

from cache.errors import HearsaeError
from cache.sites import Site, all_sites, match_sites

DIMS = ModelDimensions(n_mels=80, n_audio_ctx=40, n_audio_state=32, n_audio_head=2, n_audio_layer=2,
                       n_vocab=200, n_text_ctx=16, n_text_state=32, n_text_head=2, n_text_layer=3)  # fmt: skip
NOT_SITES = {"", "encoder", "encoder.conv1", "encoder.conv2", "encoder.blocks", "decoder", "decoder.blocks"}
"""Containers, and what comes before there are frames."""
TINY = {"n_audio_state": 384, "n_audio_layer": 4, "n_text_state": 384, "n_text_layer": 4}


def names(sites: list[Site]) -> list[str]:
    return [site.name for site in sites]


@pytest.fixture(scope="module")
def outputs() -> dict[str, torch.Tensor]:
    """What every module of a Whisper puts out in one forward pass of 40 frames and 7 tokens, in the order in which they finish."""
    model = Whisper(DIMS).eval()
    found: dict[str, torch.Tensor] = {}

    def keep(name):
        def hook(module, inputs, output):
            found[name] = output[0] if isinstance(output, tuple) else output

        return hook

    for name, module in model.named_modules():
        module.register_forward_hook(keep(name))
    with torch.inference_mode():
        model(torch.randn(1, 80, 80), torch.zeros(1, 7, dtype=torch.long))
    assert found.keys() == dict(model.named_modules()).keys() - {"encoder.blocks", "decoder.blocks"}
    return found


def test_sites_are_the_modules_of_a_whisper(outputs):
    assert set(names(all_sites(asdict(DIMS)))) == outputs.keys() - NOT_SITES


def test_sites_are_in_the_order_of_computation(outputs):
    sites = all_sites(asdict(DIMS))
    assert names(sites) == [name for name in outputs if name not in NOT_SITES]
    assert [site.order for site in sites] == list(range(len(sites)))


def test_axis_and_width_are_those_of_the_output(outputs):
    for site in all_sites(asdict(DIMS)):
        assert tuple(outputs[site.name].shape) == (1, {"frame": 40, "token": 7}[site.axis], site.width), site


def test_a_pattern_matches_as_a_file_name_does():
    assert names(match_sites(["encoder.blocks.*.mlp.1"], TINY)) == [f"encoder.blocks.{i}.mlp.1" for i in range(4)]
    assert names(match_sites(["encoder.blocks.?"], TINY)) == [f"encoder.blocks.{i}" for i in range(4)]
    assert names(match_sites(["decoder.blocks.[01].cross_attn"], TINY)) == ["decoder.blocks.0.cross_attn", "decoder.blocks.1.cross_attn"]


def test_each_site_comes_once_and_in_order_whatever_the_patterns():
    assert names(match_sites(["encoder.ln_post", "encoder.blocks.1", "encoder.blocks.?", "encoder.blocks.1.mlp.1"], TINY)) == [
        "encoder.blocks.0",
        "encoder.blocks.1.mlp.1",
        "encoder.blocks.1",
        "encoder.blocks.2",
        "encoder.blocks.3",
        "encoder.ln_post",
    ]


@pytest.mark.parametrize(
    ("wrong", "close"),
    [
        ("encoder.block.2.mlp.1", "encoder.blocks.2.mlp.1"),
        ("encoder.blocks.2.mpl", "encoder.blocks.2.mlp"),
        ("encoder.lnpost", "encoder.ln_post"),
        ("encoder.blocks.9", "encoder.blocks.3"),
        ("Encoder.blocks.1", "encoder.blocks.1"),
        ("nothing like it", "encoder.blocks.0"),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused_with_what_comes_close(wrong, close):
    with pytest.raises(HearsaeError, match=f"no site matches '{wrong}'") as refusal:
        match_sites(["encoder.blocks.0", wrong], TINY)
    assert close in str(refusal.value).replace(",", " ").split()
    assert "\n" not in str(refusal.value)


def test_decoder_sites_need_a_decoder():
    with pytest.raises(HearsaeError, match=r"'decoder\.blocks\.0' names decoder sites, but this checkpoint has no decoder"):
        match_sites(["encoder.blocks.0", "decoder.blocks.0"], TINY, has_decoder=False)


def test_a_pattern_over_both_means_the_encoder_where_there_is_no_decoder():
    assert names(match_sites(["*.blocks.1.mlp.1"], TINY, has_decoder=False)) == ["encoder.blocks.1.mlp.1"]
    assert names(match_sites(["*.blocks.1.mlp.1"], TINY)) == ["encoder.blocks.1.mlp.1", "decoder.blocks.1.mlp.1"]
