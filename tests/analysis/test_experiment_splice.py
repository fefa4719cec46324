"""`hearsae evaluate --splice` on micro: what Whisper still writes with a dictionary in place of a site."""

import json

import pytest
import torch
from conftest import nearly, write_tiny_whisper

from analysis.experiments.changes import Stretch
from analysis.experiments.effects import measure
from analysis.experiments.speech import encode, in_this_process, worker_model
from analysis.experiments.splice import CapturedSpeech, Spliced, ToSplice, fitted_gain, random_dictionary, splice
from analysis.interventions import edit_site
from cache.location import location
from cache.store import ActivationStore
from cluster.cli import main
from sae.models import Dictionary, SaeConfig, load_dictionary
from sae.train import train
from sae.train_config import TrainConfig

SITE = "encoder.blocks.2"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A store of 50 clips of micro, an SAE of it, and one whose reconstruction is its input."""
    root = tmp_path_factory.mktemp("splice")
    store = ["--dataset", "micro", "--model", "micro", "--limit", "50", "--sites", SITE, "decoder.blocks.0", "--out", str(root / "S"), "--no-ray"]
    assert main(["cache", *store]) == 0
    train(TrainConfig(store=(root / "S",), site=(SITE,), d_sae=(384,), k=(32,), rows=150_000, out=root / "SAE"))
    for site in (SITE, "decoder.blocks.0"):
        exact_sae(site).save(root / f"exact-{site}")
    return root


def exact_sae(site):
    """relu(x) - relu(-x) is x, to the bit."""
    sae = Dictionary(SaeConfig(arch="relu", d_in=96, d_sae=192, site=site, model_sha256=worker_model("micro").sha256))
    sae.W_dec.data.copy_(torch.cat([torch.eye(96), -torch.eye(96)]))
    sae.W_enc.data.copy_(sae.W_dec.data.t())
    return sae


def test_a_trained_sae_recovers_most_and_a_random_dictionary_less(succeeds, root, tmp_path):
    run = ("--sae", root / "SAE", "--store", root / "S", "--splice", "--limit", 6, "--no-ray", "--out", tmp_path / "out")
    result = succeeds("evaluate", *run)["results"][0]
    found, ce, wer = result["splice"], result["splice"]["ce"], result["splice"]["wer"]
    assert found["clips"] == 6 and found["where"].startswith("in the clips' own frames")
    assert ce["original"] < ce["spliced"] < ce["random"] < min(ce["zero"], ce["mean"])
    assert found["ce_recovered"] == pytest.approx((ce["zero"] - ce["spliced"]) / (ce["zero"] - ce["original"]))
    assert found["wer_recovered_mean"] == pytest.approx((wer["mean"] - wer["spliced"]) / (wer["mean"] - wer["original"]))
    assert min(found["ce_recovered"], found["ce_recovered_mean"]) > 0.9
    assert found["wer_recovered"] > 0.7 and found["control"]["wer_recovered"] < found["wer_recovered"]
    assert wer["zero"] > 0.8 and wer["mean"] > 0.8
    lost, lost_at_random = (1 - one["ce_recovered"] for one in (found, found["control"]))
    assert lost_at_random > 3 * lost
    squared = {name: found["output"][name]["relative"] ** 2 for name in ("spliced", "zero", "random")}
    assert found["output_recovered"] == pytest.approx(1 - squared["spliced"] / squared["zero"])
    assert squared["random"] > 1.5 * squared["spliced"]
    kept = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert kept["results"][0]["splice"] == found


def test_a_reconstruction_that_is_the_input_changes_no_bit(root):
    loaded, store = worker_model("micro"), ActivationStore.open(root / "S")
    speech = CapturedSpeech(str(root / "S"), None, 3, captured=SITE)
    for site in (SITE, "decoder.blocks.0"):
        for everywhere in (False, True):
            changes = [Spliced(site, str(root / f"exact-{site}"))]
            outcomes = measure(speech, "micro", "auto", changes, Stretch(everywhere=everywhere), "en", True, speech.clips)
            for before, after in outcomes:
                assert (after.text, after.loss, after.inside.moved, after.outside.moved) == (before.text, before.loss, 0, 0)
    assert not any(module._forward_hooks for module in loaded.module.modules())
    exact, trained = (
        ToSplice(location(root / name), load_dictionary(root / name).config, l0) for name, l0 in ((f"exact-{SITE}", 96.0), ("SAE", 32.0))
    )
    whole, part = splice([exact, trained], store, speech, "micro", map_pieces=in_this_process)
    assert whole["ce_recovered"] == whole["wer_recovered"] == whole["output_recovered"] == 1
    assert part["ce_recovered"] < 1 and part["ce"]["zero"] == whole["ce"]["zero"]


def test_padding_stays_as_it_is_unless_it_is_asked_for(root):
    """With padding spliced too, the rows that reach the next block are the reconstructions of all 1500; without, of the clip's own."""
    loaded, sae = worker_model("micro"), load_dictionary(root / "SAE")
    speech = CapturedSpeech(str(root / "S"), None, 1, captured=SITE)

    def by_hand(stop):
        def change(x):
            out = x.clone()
            out[0, :stop] = sae(x[0, :stop])
            return out

        with edit_site(loaded.module, SITE, change):
            return encode(loaded, speech, speech.clips)[0]

    plain, frames = encode(loaded, speech, speech.clips)[0], speech.clips[0].n_frames
    for everywhere, stop in ((False, frames), (True, 1500)):
        ((_, after),) = measure(
            speech, "micro", "auto", [Spliced(SITE, str(root / "SAE"))], Stretch(everywhere=everywhere), "en", False, speech.clips
        )
        moved = (by_hand(stop) - plain).square().sum(1)
        assert after.inside.moved == pytest.approx(float(moved[:stop].sum()), rel=1e-3)
        assert after.outside.moved == pytest.approx(float(moved[stop:].sum()), rel=1e-3)


def test_the_random_dictionary_is_as_long_as_the_rows_and_keeps_k(root):
    config, mean = load_dictionary(root / "SAE").config, torch.full((96,), 0.5).double().numpy()
    rows = torch.randn(500, 96, generator=torch.Generator().manual_seed(0)) + 0.5
    gain = fitted_gain(config, 24, mean, rows, seed=0)
    dictionary = random_dictionary(config, 24, mean, gain, seed=0)
    assert (dictionary.encode(rows) > 0).sum(1).tolist() == [24] * 500
    error = {factor: float((random_dictionary(config, 24, mean, gain * factor, 0)(rows) - rows).square().sum()) for factor in (0.9, 1.0, 1.1)}
    assert error[1.0] < min(error[0.9], error[1.1])


def test_other_speech_and_a_decoder_site(succeeds, root):
    run = ("--sae", root / "exact-decoder.blocks.0", "--store", root / "S", "--splice", "--no-ray")
    found = succeeds("evaluate", *run, "--dataset", "micro", "--split", "test", "--limit", 2)["results"][0]["splice"]
    assert found["where"] == "at all tokens" and found["clips"] == 2
    assert found["ce_recovered"] == 1 and found["output_recovered"] is None and found["ce"]["zero"] > 1


def test_an_encoder_alone_is_measured_at_its_output(succeeds, tmp_path, capfd):
    encoder = write_tiny_whisper(tmp_path / "encoder.pt", encoder_only=True)
    capture = ["--dataset", "micro", "--model", str(encoder), "--limit", "4", "--sites", "encoder.blocks.0", "--out", str(tmp_path / "S"), "--no-ray"]
    assert main(["cache", *capture]) == 0
    store = ActivationStore.open(tmp_path / "S")
    mean = store.stats("encoder.blocks.0").mean
    config = SaeConfig(arch="topk", d_in=32, d_sae=64, k=16, site="encoder.blocks.0", model_sha256=worker_model(str(encoder)).sha256)
    gain = fitted_gain(config, 16, mean, torch.from_numpy(store.read_clip("encoder.blocks.0", 0)), seed=1)
    random_dictionary(config, 16, mean, gain, seed=1).save(tmp_path / "SAE")
    run = ("--sae", tmp_path / "SAE", "--store", tmp_path / "S", "--splice", "--no-ray", "--limit", 2)
    found = succeeds("evaluate", *run)["results"][0]["splice"]
    assert found["measured"] == "encoder output" and found["ce"]["spliced"] is None and found["wer_recovered"] is None
    assert 0 < found["output"]["spliced"]["relative"] < found["output"]["zero"]["relative"]
    assert main(["evaluate", *map(str, run)]) == 0
    said = capfd.readouterr().out
    assert "no decoder in this checkpoint: measured at the encoder's output" in said and "WER" not in said


def test_what_cannot_be_spliced_is_refused(refused, root, tmp_path):
    def says(*arguments):
        return refused("evaluate", "--store", root / "S", "--no-ray", *arguments)

    assert "are of --splice" in says("--sae", root / "SAE", "--splice-everywhere")
    assert "another model" in says("--sae", root / "SAE", "--splice", "--model", write_tiny_whisper(tmp_path / "t.pt"))
    assert "--split is of --dataset" in says("--sae", root / "SAE", "--splice", "--split", "test")
    assert "must be at least 1" in says("--sae", root / "SAE", "--splice", "--limit", 0)
    sha256 = worker_model("micro").sha256
    transcoder = Dictionary(SaeConfig(arch="topk", d_in=96, d_sae=96, k=4, site=SITE, target=SITE, model_sha256=sha256))
    transcoder.save(tmp_path / "transcoder")
    assert "is a transcoder" in says("--sae", tmp_path / "transcoder", "--splice")
    crosscoder = Dictionary(SaeConfig(arch="topk", d_in=192, d_sae=96, k=4, site=f"{SITE}+{SITE}", widths=(96, 96), model_sha256=sha256))
    crosscoder.save(tmp_path / "crosscoder")
    assert "is a crosscoder" in says("--sae", tmp_path / "crosscoder", "--splice")


@pytest.mark.cluster
@pytest.mark.slow
def test_workers_find_what_this_process_finds(succeeds, root):
    run = ("evaluate", "--sae", root / "SAE", "--store", root / "S", "--splice", "--limit", 18)
    assert succeeds(*run, "--workers", 2)["results"] == nearly(succeeds(*run, "--no-ray")["results"])
