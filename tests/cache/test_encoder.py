"""The encoder's forward pass of capture beside its plain twin, openai-whisper's modules with hooks, and the kernels that it may run on."""

import numpy as np
import pytest
import torch
from conftest import asset, micro_audio, write_tiny_whisper
from whisper.audio import log_mel_spectrogram

from cache import amx, micro
from cache.encoder import Plain, best_arithmetic, encode
from cache.model import LoadedModel, capture, load_model, log_mel
from cache.sites import Site, match_sites

EXACT = 1e-5
"""Relative to openai-whisper in fp32. Storing as float16 rounds by 2e-4."""
needs_amx = pytest.mark.skipif(not amx.are_here(), reason="this CPU has no AMX units, or they are not ours to use")
ARITHMETICS = [pytest.param(Plain, id="plain"), pytest.param(amx.Amx, id="amx", marks=needs_amx)]


def relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    return float((value.double() - reference.double()).norm() / reference.double().norm())


def encoder_sites(model: LoadedModel) -> list[Site]:
    return match_sites(["encoder.*"], model.dims_dict, model.has_decoder)


def worst(model: LoadedModel, audio: list[np.ndarray], arithmetic, rows: int | None) -> float:
    """Largest relative difference of any encoder site from openai-whisper's, over the rows that are kept."""
    sites = encoder_sites(model)
    mel = torch.stack([log_mel(samples, model) for samples in audio])
    plain = capture(model, mel, sites)
    ours = encode(model.module.encoder, mel, [site.name for site in sites], rows, arithmetic)
    assert list(ours) == [site.name for site in sites]
    for name, value in ours.items():
        assert value.shape == plain[name][:, :rows].shape
    return max(relative(value, plain[name][:, :rows]) for name, value in ours.items())


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("rows", [None, 101, 1])
def test_every_site_is_as_exact_as_openai_whispers_own(arithmetic, rows):
    assert worst(load_model(micro.NAME, "cpu"), micro_audio(2), arithmetic(), rows) < EXACT


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_the_real_encoder_is_exact_at_every_site(arithmetic):
    model = load_model(str(asset("whisper/tiny.en.encoder.pt")), "cpu")
    assert worst(model, micro_audio(1), arithmetic(), 60) < EXACT


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("dims", [{"n_mels": 128}, {"n_audio_state": 72, "n_audio_head": 3}, {"n_audio_state": 128, "n_audio_head": 2}])
def test_other_widths_are_exact_too(tmp_path, arithmetic, dims):
    model = load_model(str(write_tiny_whisper(tmp_path / "model.pt", **dims)), "cpu")
    seconds = min(1.0, model.dims.n_audio_ctx * 0.02)
    audio = np.random.default_rng(0).standard_normal(int(seconds * 8000)).astype(np.float32) * 0.1
    assert worst(model, [audio], arithmetic(), None) < EXACT


@pytest.mark.parametrize("n_samples", [1, 400, 8000, 31999, 479_000, 479_700, 480_000])
def test_frames_of_padding_need_no_transform(n_samples):
    model = load_model(micro.NAME, "cpu")
    audio = np.random.default_rng(n_samples).standard_normal(n_samples).astype(np.float32) * 0.1
    padded = torch.zeros(480_000)
    padded[:n_samples] = torch.from_numpy(audio)
    torch.testing.assert_close(log_mel(audio, model), log_mel_spectrogram(padded, n_mels=80), rtol=0, atol=1e-6)


@pytest.mark.parametrize("n_samples", [1, 8000, 470_000, 478_000, 479_900, 480_000])
def test_padding_is_convolved_once(n_samples):
    audio = np.random.default_rng(n_samples).standard_normal(n_samples).astype(np.float32) * 0.1
    assert worst(load_model(micro.NAME, "cpu"), [audio], Plain(), None) < EXACT


def test_silence_is_convolved_once_and_exact():
    assert worst(load_model(micro.NAME, "cpu"), [np.zeros(16000, np.float32), *micro_audio(1)], Plain(), None) < EXACT


def test_nothing_is_computed_beyond_the_deepest_site():
    class Counted(Plain):
        layers: list[torch.nn.Module] = []  # noqa: RUF012

        def linear(self, x, layer):
            self.layers.append(layer)
            return super().linear(x, layer)

    model, arithmetic = load_model(micro.NAME, "cpu"), Counted()
    encode(model.module.encoder, log_mel(micro_audio(1)[0], model)[None], ["encoder.blocks.1", "encoder.blocks.2.mlp.1"], 10, arithmetic)
    last = model.module.encoder.blocks[2]
    assert arithmetic.layers[-1] is last.mlp[0] and len(arithmetic.layers) == 6 + 6 + 5
    arithmetic.layers.clear()
    encode(model.module.encoder, log_mel(micro_audio(1)[0], model)[None], ["encoder.blocks.0.attn.query"], 10, arithmetic)
    assert arithmetic.layers == [model.module.encoder.blocks[0].attn.query]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@needs_amx
def test_the_units_are_used_where_they_are():
    assert isinstance(best_arithmetic(torch.device("cpu")), amx.Amx)


@needs_amx
@pytest.mark.parametrize("n, k, width", [(1, 32, 32), (33, 96, 288), (100, 512, 160), (64, 1536, 416)])
@pytest.mark.parametrize("kept", [torch.float32, torch.float16])
def test_products_on_amx_are_as_exact_as_fp32(n, k, width, kept):
    layer = torch.nn.Linear(k, width).requires_grad_(False)
    layer.weight.copy_(layer.weight.to(kept))
    x = normal(1, n, k)
    exact = torch.nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
    arithmetic = amx.Amx()
    for _ in range(2):  # packed, and from what was packed
        assert relative(arithmetic.linear(x, layer), exact) < 5e-7


@needs_amx
@pytest.mark.parametrize("rows, n, width, n_head", [(1, 1, 32, 1), (7, 31, 64, 2), (45, 45, 96, 3), (32, 64, 128, 2), (10, 200, 128, 4)])
def test_attention_on_amx_is_as_exact_as_fp32(rows, n, width, n_head):
    query, key, value = normal(2, rows, width) * 3, normal(2, n, width, seed=1) * 3, normal(2, n, width, seed=2) + 1
    exact = Plain().attention(query.double(), key.double(), value.double(), n_head)
    assert relative(amx.Amx().attention(query, key, value, n_head), exact) < 3e-6


@needs_amx
def test_threads_share_the_work_and_change_no_bit():
    layer, arithmetic = torch.nn.Linear(96, 96).requires_grad_(False), amx.Amx()
    x, before = normal(1, 201, 96), torch.get_num_threads()
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            results.append((arithmetic.linear(x, layer), arithmetic.attention(x, x, x, 3)))
        finally:
            torch.set_num_threads(before)
    for one, three in zip(*results, strict=True):
        assert torch.equal(one, three)


@needs_amx
def test_attention_on_amx_holds_where_scores_are_far_from_zero():
    query, key, value = normal(1, 20, 32), normal(1, 70, 32, seed=1), normal(1, 70, 32, seed=2)
    query[..., 0], key[..., 0] = 100.0, -100.0  # all scores near -1,800: padding's zero is far above them
    exact = Plain().attention(query.double(), key.double(), value.double(), 1)
    assert relative(amx.Amx().attention(query, key, value, 1), exact) < 1e-3  # fp32's own is 2e-4: its scores end at 1e-4


@needs_amx
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so_on_amx(bad):
    layer = torch.nn.Linear(32, 32).requires_grad_(False)
    x = normal(1, 40, 32)
    x[0, 3, 5] = bad
    assert not torch.isfinite(amx.Amx().linear(x, layer)[0, 3]).any()
    for which in range(3):
        parts = [normal(1, 40, 32, seed=i) for i in range(3)]
        parts[which][0, 3, 5] = bad
        expected = torch.isfinite(Plain().attention(*parts, 1)).all(-1)
        assert not (torch.isfinite(amx.Amx().attention(*parts, 1)).all(-1) & ~expected).any()


def test_a_cpu_without_the_units_runs_pytorchs_own(monkeypatch):
    monkeypatch.setattr(amx, "is_exact_here", lambda: False)
    assert isinstance(best_arithmetic(torch.device("cpu")), Plain)
    assert isinstance(best_arithmetic(torch.device("cuda")), Plain)
