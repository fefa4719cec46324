"""Every size of Whisper, by its own numbers of mel bins, blocks, tokens and languages; widths are small and weights random."""

import pytest
import torch

from cache.capture import CaptureConfig, capture_in_process, prepare
from cache.model import load_model
from cache.store import ActivationStore

SIZES = {
    "tiny.en": {"n_vocab": 51864, "n_audio_layer": 4, "n_text_layer": 4},
    "base": {"n_vocab": 51865, "n_audio_layer": 6, "n_text_layer": 6},
    "small": {"n_vocab": 51865, "n_audio_layer": 12, "n_text_layer": 12},
    "medium.en": {"n_vocab": 51864, "n_audio_layer": 24, "n_text_layer": 24},
    "large-v2": {"n_vocab": 51865, "n_audio_layer": 32, "n_text_layer": 32},
    "large-v3": {"n_vocab": 51866, "n_audio_layer": 32, "n_text_layer": 32, "n_mels": 128},
    "turbo": {"n_vocab": 51866, "n_audio_layer": 32, "n_text_layer": 4, "n_mels": 128},
}
"""As openai-whisper publishes them, but for widths, heads and the length of a text, which are those of the fixture."""


@pytest.fixture(scope="module", params=SIZES)
def checkpoint(request, tiny_whisper, tmp_path_factory):
    return tiny_whisper(tmp_path_factory.mktemp(request.param) / "whisper.pt", n_text_ctx=16, **SIZES[request.param])


def test_its_encoder_and_decoder_sites_are_captured(checkpoint, tmp_path):
    model = load_model(str(checkpoint), "cpu")
    sites = (f"encoder.blocks.{model.dims.n_audio_layer - 1}", f"decoder.blocks.{model.dims.n_text_layer - 1}.mlp.1")
    config = CaptureConfig("micro", str(checkpoint), sites, tmp_path / "acts.zarr", split="test", limit=1)
    prepared = prepare(config)
    assert all(result.computed for result in capture_in_process(config, prepared.pending))
    store = ActivationStore.open(config.out)
    assert store.read_clip(sites[0], 0).shape == (store.clips["n_frames"][0].as_py(), 32)
    assert store.read_clip(sites[1], 0).shape == (len(store.clips["tokens"][0].as_py()), 128)


@pytest.mark.slow
def test_experiments_take_it(checkpoint, succeeds, tmp_path):
    def experiment(name, *options):
        speech = ["--model", checkpoint, "--split", "test", "--limit", "1", "--no-ray"]
        return succeeds("experiment", name, *speech, *options, "--out", tmp_path / name)

    whole, narrow = experiment("window", "--k", "1500", "3")["rows"]
    assert whole["after"] == whole["before"] and narrow["k"] == 3
    (chopped,) = experiment("chop", "--by", "frame", "--start", "10", "--end", "10")["rows"]
    assert chopped["after"] == chopped["before"]
    layers = {row["layer"] for row in experiment("attention", "--maps", "0")["rows"]} - {None}
    assert layers == set(range(load_model(str(checkpoint), "cpu").dims.n_audio_layer))
    assert experiment("bigrams", "--prompt", " traffic", "--top", "3", "--least", "1")["rows"]
    last = f"neurons:encoder.blocks.{max(layers)}.mlp.1"
    unchanged = experiment("steer", "--features", last, "--feature", "5", "--scale", "1")["rows"]
    assert all(row["after"] == row["before"] for row in unchanged)


def test_it_transcribes_with_times(checkpoint, succeeds, tmp_path):
    options = ["--dataset", "micro", "--split", "test", "--limit", "1", "--model", checkpoint, "--language", "en", "--no-ray"]
    (row,) = succeeds("transcribe", *options, "--out", tmp_path / "heard.jsonl")["rows"]
    assert isinstance(row["after"], str)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
