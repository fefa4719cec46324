"""Climbing a feature, making sound of what was found, and `hearsae experiment sonify` on micro."""

import io

import pytest
import soundfile
import torch
from conftest import micro_audio
from whisper.audio import log_mel_spectrogram, mel_filters

from analysis.ascent import AscentSettings, ascend, padded_rows, random_starts, spread_padding, trimmed_rows, window_rows
from analysis.ascent_targets import Negated, Neuron, open_probe
from analysis.inversion import fit_power, mel_power, sound_of
from analysis.steering import site_of
from cache.model import load_model, log_mel

SITE = "encoder.blocks.2.mlp.1"
SHORT = AscentSettings(seconds=0.6, steps=60, jitter=2)
CEILING = 1.3


@pytest.fixture(scope="module")
def micro():
    return load_model("micro", "cpu")


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


# Sound


@pytest.mark.parametrize("n_mels", [80, 128])
def test_sound_made_of_a_log_mel_has_that_log_mel(n_mels):
    (speech,) = micro_audio(1)
    mel = log_mel_spectrogram(speech[: len(speech) // 320 * 320], n_mels)
    again = log_mel_spectrogram(sound_of(mel), n_mels)
    assert again.shape == mel.shape
    assert (again - mel).abs().mean() < 0.03  # of a range of 2: 0.12 decades of power
    assert (mel - mel.mean(1, keepdim=True)).abs().mean() > 0.2  # what knowing each band's mean alone would leave


def test_the_fitted_spectrum_has_the_mel_bands_and_nothing_below_zero():
    mel = mel_power(log_mel_spectrogram(micro_audio(1)[0], 80))
    power = fit_power(mel)
    assert power.min() >= 0
    assert (mel_filters("cpu", 80) @ power / mel).log10().abs().max() < 0.05


def test_the_same_seed_makes_the_same_sound(generator):
    mel = random_starts(1, 80, 20, CEILING, generator)[0]
    assert torch.equal(sound_of(mel, 3), sound_of(mel, 3))
    assert not torch.equal(sound_of(mel, 3), sound_of(mel, 4))


# The window


@pytest.mark.parametrize("site", ["encoder.blocks.2.mlp.0", "encoder.blocks.1.attn", "encoder.ln_post"])
@torch.no_grad()
def test_a_trimmed_window_that_keeps_all_padding_is_the_whole_window(micro, generator, site):
    mel = random_starts(2, 80, 30, CEILING, generator)
    whole = padded_rows(micro.module, mel, site)
    assert (trimmed_rows(micro.module, mel, site, torch.arange(31, 1499)) - whole).abs().max() < 1e-4 * whole.std()
    assert torch.allclose(window_rows(micro, mel[0], site_of(site, micro)), whole[0], atol=1e-4 * float(whole.std()))
    few = trimmed_rows(micro.module, mel, site, spread_padding(30, 1500, generator))
    assert 1e-4 < (few - whole).norm() / whole.norm() < 0.1


def test_what_is_kept_of_the_padding_is_spread_over_all_of_it(generator):
    drawn = torch.stack([spread_padding(30, 1500, generator) for _ in range(200)])
    assert drawn.min() == 31 and drawn.max() == 1498
    assert (drawn.diff(dim=1) > 0).all()
    assert torch.equal(spread_padding(30, 40, generator), torch.arange(31, 39))


@pytest.mark.parametrize("context", ["trimmed", "padded"])
def test_gradients_lead_up_and_those_of_the_negative_down(micro, generator, context):
    settings = AscentSettings(seconds=0.4, steps=25 if context == "trimmed" else 6, jitter=1, context=context)
    site, number = "encoder.blocks.2", 17
    probe = open_probe(f"neurons:{site}", number, micro)
    start = random_starts(1, 80, settings.frames, CEILING, generator)
    ends = [ascend(micro, one, start, CEILING, 0.5, settings, torch.Generator().manual_seed(1)).mel[0] for one in (probe, Negated(probe))]
    low, before, high = (float(settings.mean(probe.value(window_rows(micro, mel, site_of(site, micro))))) for mel in (ends[1], start[0], ends[0]))
    margin = 1.0 if context == "trimmed" else 0.2
    assert high > before + margin and low < before - margin


def test_what_is_found_could_come_from_whispers_front_end(micro, generator):
    probe = open_probe(f"neurons:{SITE}", 5, micro)
    mel = ascend(micro, probe, random_starts(1, 80, SHORT.frames, CEILING, generator), CEILING, 0.5, SHORT, generator).mel
    assert mel.max() <= CEILING and mel.min() >= mel.max() - 2


def test_a_neuron_behind_a_gelu_is_climbed_before_it(micro):
    """A GELU falls as its input rises from far below: climbing behind it would lead away."""
    rows = torch.tensor([[-3.0, 0.0], [-1.0, 0.0], [2.0, 0.0]], requires_grad=True)
    neuron = open_probe(f"neurons:{SITE}", 0, micro)
    assert neuron.site == "encoder.blocks.2.mlp.0"
    assert torch.equal(neuron.value(rows), torch.nn.functional.gelu(rows[:, 0]))
    (behind,) = torch.autograd.grad(neuron.value(rows).sum(), rows)
    (before,) = torch.autograd.grad(neuron.score(rows).sum(), rows)
    assert behind[1, 0] < 0 and (before[:, 0] == 1).all()
    assert Neuron("encoder.blocks.2", 0).site == "encoder.blocks.2"


# The experiment


@pytest.fixture(scope="module")
def sae(tmp_path_factory):
    from cluster.cli import main

    folder = tmp_path_factory.mktemp("sae")
    cache = ["cache", "--dataset", "micro", "--split", "train", "--limit", "60", "--model", "micro", "--sites", "encoder.blocks.2"]
    assert main([*cache, "--out", str(folder / "store.zarr"), "--no-ray"]) == 0
    train = ["train", "--store", str(folder / "store.zarr"), "--site", "encoder.blocks.2", "--d-sae", "256", "--k", "16", "--rows", "60000"]
    assert main([*train, "--out", str(folder / "runs"), "--no-ray"]) == 0
    (config,) = (folder / "runs").rglob("config.json")
    return config.parent


QUICK = ("--split", "test", "--limit", "4", "--seconds", "0.6", "--steps", "80", "--starts", "1", "--no-ray")


@pytest.mark.slow
def test_the_inputs_found_for_neurons_go_far_beyond_real_speech_and_so_does_their_sound(succeeds, tmp_path):
    result = succeeds("experiment", "sonify", *QUICK, "--features", f"neurons:{SITE}", "--feature", "5", "40", "113", "--out", tmp_path / "report")
    rows = [row for row in result["rows"] if row["of"] == "feature"]
    assert [row["feature"] for row in rows] == [5, 40, 113]
    for row in rows:
        assert row["optimised"] > 1.5 * row["strongest"] > 0 and row["gain"] > 1.5
        assert all(start["after"] > start["before"] + 1 for start in row["starts"])
        assert {start["start"] for start in row["starts"]} == {"noise 0", "strongest real moment"}
        assert next(s["before"] for s in row["starts"] if s["start"] != "noise 0") > next(
            s["before"] for s in row["starts"] if s["start"] == "noise 0"
        )
        assert row["audio"] > row["silence"] + 0.5 * (row["strongest"] - row["silence"])
        assert row["audio"] < row["optimised"]
    assert set(result["summary"]["control"]) == {"random direction", "random weights"}
    assert set(result["summary"]["control"]["random weights"]) == {"5", "40", "113"}
    sound, rate = soundfile.read(io.BytesIO((tmp_path / "report" / "neuron-40.flac").read_bytes()), dtype="float32")
    assert rate == 16000 and len(sound) == 0.6 * 16000 and abs(sound).max() > 0.01
    assert {path.stem for path in (tmp_path / "report").glob("*.png")} == {"gains", "neuron-5", "neuron-40", "neuron-113"}


@pytest.mark.slow
def test_the_reported_values_are_those_of_the_sound_on_the_page(succeeds, tmp_path, micro):
    result = succeeds("experiment", "sonify", *QUICK, "--features", f"neurons:{SITE}", "--feature", "40", "--out", tmp_path / "report")
    settings = AscentSettings(seconds=0.6)
    sound = soundfile.read(tmp_path / "report" / "neuron-40.flac", dtype="float32")[0]
    with torch.no_grad():
        hidden = []
        handle = micro.module.get_submodule(SITE).register_forward_hook(lambda module, inputs, output: hidden.append(output))
        micro.module.encoder(log_mel(sound, micro)[None])
        handle.remove()
    expected = float(settings.mean(hidden[0][0, : settings.frames, 40]))
    assert result["rows"][0]["audio"] == pytest.approx(expected, rel=1e-3)
    again = succeeds("experiment", "sonify", *QUICK, "--features", f"neurons:{SITE}", "--feature", "40", "--out", tmp_path / "again")
    assert again["rows"] == result["rows"]


@pytest.mark.slow
def test_a_latent_of_an_sae_can_be_climbed(succeeds, refused, tmp_path, sae, micro, tiny_whisper):
    mel = log_mel(micro_audio(1)[0], micro)[:, :200]
    rows = window_rows(micro, mel, site_of("encoder.blocks.2", micro))
    latent = int(open_probe(f"sae:{sae}", 0, micro).dictionary.encode(rows).mean(0).argmax())
    result = succeeds("experiment", "sonify", *QUICK, "--features", f"sae:{sae}", "--feature", latent, "--out", tmp_path / "report")
    row = result["rows"][0]
    assert row["optimised"] > 1.5 * row["strongest"] > 0
    assert row["audio"] > row["silence"]
    other = tiny_whisper(tmp_path / "other.pt", encoder_only=True, n_audio_state=96, n_audio_layer=3)
    arguments = ("--model", other, "--features", f"sae:{sae}", "--feature", "0", "--no-ray", "--out", tmp_path / "a")
    assert "was trained on model" in refused("experiment", "sonify", *arguments)


@pytest.mark.slow
def test_the_lowest_value_can_be_looked_for(succeeds, tmp_path):
    arguments = (*QUICK, "--features", "neurons:encoder.blocks.2", "--feature", "17", "--negate", "--out", tmp_path / "report")
    row = succeeds("experiment", "sonify", *arguments)["rows"][0]
    assert row["optimised"] < row["strongest"] < row["real_mean"]
    assert row["gain"] > 1


def test_what_cannot_be_done_is_refused_before_there_is_work(refused, tmp_path):
    def line(*arguments):
        return refused("experiment", "sonify", "--no-ray", "--out", tmp_path / "a", *arguments)

    one = ("--feature", "0")
    assert "a site of the decoder" in line("--features", "neurons:decoder.blocks.0.mlp.1", *one)
    assert "is a pattern: name one site" in line("--features", "neurons:encoder.blocks.*.mlp.1", *one)
    assert "close to it: encoder.blocks.2" in line("--features", "neurons:encoder.block.2", *one)
    assert "neurons 0 to 383" in line("--features", f"neurons:{SITE}", "--feature", "384")
    assert "use neurons:SITE or sae:DIR" in line("--features", "pca:encoder.blocks.2", *one)
    assert "there is no SAE" in line("--features", f"sae:{tmp_path}", *one)
    assert "--seconds 30 is too long" in line("--features", f"neurons:{SITE}", *one, "--seconds", "30")
    assert "--span 99" in line("--features", f"neurons:{SITE}", *one, "--span", "99")
    assert not (tmp_path / "a").exists()
