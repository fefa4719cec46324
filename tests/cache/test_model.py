"""Loading a Whisper, and the capture forward against openai-whisper's own."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import whisper
from conftest import asset, micro_audio, write_tiny_whisper
from whisper.decoding import DecodingOptions, DecodingTask
from whisper.model import AudioEncoder, Whisper

from cache import micro
from cache.errors import HearsaeError, ModelError
from cache.model import capture, choose_device, fast_matmul, load_model, log_mel
from cache.sites import all_sites, match_sites

MULTILINGUAL = {"n_vocab": 51865}
TEXTS = ["THE BIRCH CANOE", "it slid, on the smooth planks: twice!"]


def relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    return float((value - reference).norm() / reference.norm())


def as_float16(value: torch.Tensor) -> torch.Tensor:
    return value.half().float()


def plain_forward(path, audio: list[np.ndarray], tokens: list[list[int]]) -> dict[str, torch.Tensor]:
    """Outputs of every module of openai-whisper, hooked, in padded fp32, clip by clip: nothing of our code."""
    checkpoint = torch.load(path, weights_only=True)
    weights = {key: value.float() for key, value in checkpoint["model_state_dict"].items()}
    dims = whisper.model.ModelDimensions(**checkpoint["dims"])
    with_decoder = any(key.startswith("decoder.") for key in weights)
    model = Whisper(dims) if with_decoder else torch.nn.ModuleDict(
        {"encoder": AudioEncoder(dims.n_mels, dims.n_audio_ctx, dims.n_audio_state, dims.n_audio_head, dims.n_audio_layer)}
    )  # fmt: skip
    model.load_state_dict(weights)
    model.eval()
    found: dict[str, list[torch.Tensor]] = {}

    def keep(name):
        def hook(module, inputs, output):
            found.setdefault(name, []).append((output[0] if isinstance(output, tuple) else output)[0])

        return hook

    for name, module in model.named_modules():
        module.register_forward_hook(keep(name))
    with torch.inference_mode():
        for samples, ids in zip(audio, tokens, strict=True):
            mel = whisper.log_mel_spectrogram(whisper.pad_or_trim(samples), n_mels=dims.n_mels)[None]
            encoded = model["encoder"](mel) if not with_decoder else model.encoder(mel)
            if with_decoder:
                model.decoder(torch.tensor([ids]), encoded)
    return found


def made_up_audio(seconds: float, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(round(seconds * 16000))).astype(np.float32)


def real_audio(count: int) -> list[np.ndarray]:
    files = sorted(asset("speech/test").glob("*.flac"))[:: 117 // count][:count]
    return [soundfile.read(file, dtype="float32")[0] for file in files]


def hold_to_plain(path, audio: list[np.ndarray]) -> None:
    """Every site, captured for all clips at once under the settings of a run, is within 1e-3 of the plain forward after rounding."""
    model = load_model(str(path), "cpu")
    tokens = [model.decoder_input(TEXTS[i % 2]) for i in range(len(audio))]
    sites = [site for site in all_sites(model.dims_dict) if model.has_decoder or not site.needs_decoder]
    plain = plain_forward(path, audio, tokens)
    mel = torch.stack([log_mel(samples, model) for samples in audio])
    with fast_matmul():
        captured = capture(model, mel, sites, tokens)
    assert captured.keys() == {site.name for site in sites}
    for site in sites:
        for clip, reference in enumerate(plain[site.name]):
            value = captured[site.name][clip, : len(reference)]
            n = len(tokens[clip]) if site.axis == "token" else -(-len(audio[clip]) // 320)
            assert value.shape == reference.shape and value.dtype == torch.float32 and value.shape[1] == site.width
            assert relative(as_float16(value[:n]), reference[:n]) < 1e-3, (site.name, clip)
            assert relative(value, reference) < 1e-4, (site.name, clip)  # padding frames too, before rounding


@pytest.mark.parametrize("settings", [{}, MULTILINGUAL, {"n_mels": 128, "n_vocab": 51866}, {"encoder_only": True}], ids=str)
def test_every_site_is_that_of_a_plain_forward_on_random_weights(tiny_whisper, tmp_path, settings):
    hold_to_plain(tiny_whisper(tmp_path / "w.pt", **settings), [made_up_audio(2.3), made_up_audio(0.01), made_up_audio(30.0)])


def test_every_encoder_site_is_that_of_a_plain_forward_on_real_speech():
    hold_to_plain(asset("whisper/tiny.en.encoder.pt"), real_audio(3))


def test_every_site_is_that_of_a_plain_forward_on_speech():
    hold_to_plain(micro.MODEL, micro_audio(3))


def test_values_published_for_tiny_en():
    model = load_model(str(asset("whisper/tiny.en.encoder.pt")), "cpu")
    published = torch.tensor([-0.21382, -0.48528, 0.42348, -1.33874, -0.14191])  # keras-hub
    with fast_matmul():
        out = capture(model, torch.ones(1, 80, 3000), match_sites(["encoder.ln_post"], model.dims_dict))["encoder.ln_post"]
    assert (out[0, 0, :5] - published).abs().max() < 3.4e-4  # the weights were published in float16


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A whole Whisper of random weights. Read only."""
    return load_model(str(write_tiny_whisper(tmp_path_factory.mktemp("tiny") / "tiny.pt")), "cpu")


@pytest.mark.parametrize(
    "pattern", [site.name for site in all_sites({"n_audio_layer": 2, "n_audio_state": 32, "n_text_layer": 2, "n_text_state": 32})]
)
def test_the_forward_stops_after_the_deepest_site(tiny, pattern):
    called = []
    handles = [module.register_forward_pre_hook(lambda m, i, name=name: called.append(name)) for name, module in tiny.module.named_modules()]
    try:
        capture(tiny, torch.zeros(1, 80, 3000), match_sites(["encoder.blocks.0", pattern], tiny.dims_dict), [[50257, 50362, 220]])
    finally:
        for handle in handles:
            handle.remove()
    order = {site.name: site.order for site in all_sites(tiny.dims_dict)}
    deepest = max(order[pattern], order["encoder.blocks.0"])
    # A module that contains the deepest site, or is computed on the way to one that does, has begun: leaves tell what has been computed.
    leaves = {name for name, module in tiny.module.named_modules() if not list(module.children())}
    assert {name for name in called if name in leaves and name in order} == {name for name in leaves & order.keys() if order[name] <= deepest}
    assert any(name.startswith("decoder") for name in called) == pattern.startswith("decoder.")


def test_hooks_are_gone_after_a_capture_even_one_that_failed(tiny):
    sites = match_sites(["decoder.ln", "encoder.ln_post"], tiny.dims_dict)
    capture(tiny, torch.zeros(1, 80, 3000), sites, [[50257]])
    with pytest.raises(AssertionError):
        capture(tiny, torch.zeros(1, 80, 2000), sites, [[50257]])
    assert not any(module._forward_hooks for module in tiny.module.modules())


def test_filled_up_tokens_change_nothing(tiny):
    sites = match_sites(["decoder.*"], tiny.dims_dict)
    mel = torch.stack([log_mel(made_up_audio(1.0, seed), tiny) for seed in (0, 1)])
    short, long = tiny.decoder_input("one"), tiny.decoder_input("one two three four five")
    together = capture(tiny, mel, sites, [short, long])
    alone = capture(tiny, mel[:1], sites, [short])
    for site in sites:
        n = len(short) if site.axis == "token" else 1500
        assert relative(together[site.name][0, :n], alone[site.name][0]) < 1e-5


def test_an_encoder_alone_does_encoder_work_and_refuses_the_rest(tiny_whisper, tmp_path):
    model = load_model(str(tiny_whisper(tmp_path / "encoder.pt", encoder_only=True)), "cpu")
    assert not model.has_decoder and model.header()["has_decoder"] is False
    assert capture(model, torch.zeros(1, 80, 3000), match_sites(["encoder.ln_post"], model.dims_dict))["encoder.ln_post"].shape == (1, 1500, 32)
    with pytest.raises(ModelError, match=r"decoder\.ln needs a checkpoint with a decoder"):
        capture(model, torch.zeros(1, 80, 3000), match_sites(["decoder.ln"], model.dims_dict), [[50257]])
    with pytest.raises(HearsaeError, match="this checkpoint has no decoder"):
        match_sites(["decoder.ln"], model.dims_dict, model.has_decoder)


def test_an_encoder_alone_is_the_encoder_of_the_whole(tiny, tiny_whisper, tmp_path):
    whole = torch.load(tiny.name, weights_only=True)
    weights = {name: value for name, value in whole["model_state_dict"].items() if name.startswith("encoder.")}
    torch.save({"dims": whole["dims"], "model_state_dict": weights}, tmp_path / "encoder.pt")
    alone = load_model(str(tmp_path / "encoder.pt"), "cpu")
    mel, sites = log_mel(made_up_audio(1.0), tiny)[None], match_sites(["encoder.ln_post"], tiny.dims_dict)
    assert torch.equal(capture(alone, mel, sites)["encoder.ln_post"], capture(tiny, mel, sites)["encoder.ln_post"])


def test_decoder_sites_need_tokens(tiny):
    with pytest.raises(ModelError, match="clips with text"):
        capture(tiny, torch.zeros(1, 80, 3000), match_sites(["decoder.ln"], tiny.dims_dict))


def test_log_mel_is_that_of_whisper(tiny):
    audio = made_up_audio(3.21)
    assert torch.equal(log_mel(audio, tiny), whisper.log_mel_spectrogram(whisper.pad_or_trim(audio)))


def test_a_shorter_window_is_filled_up_to_its_own_length(tiny_whisper, tmp_path):
    model = load_model(str(tiny_whisper(tmp_path / "short.pt", n_audio_ctx=50)), "cpu")
    mel = log_mel(made_up_audio(1.0), model)[None]
    assert capture(model, mel, match_sites(["encoder.ln_post"], model.dims_dict))["encoder.ln_post"].shape == (1, 50, 32)


# Multiplying faster


@pytest.mark.parametrize("before", ["highest", "high", "medium"])
@pytest.mark.parametrize("fails", [False, True])
def test_fast_matmul_restores_the_setting(before, fails):
    at_start = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(before)
        try:
            with fast_matmul() as precision:
                assert torch.get_float32_matmul_precision() == precision in ("medium", before)
                if fails:
                    raise OSError
        except OSError:
            pass
        assert torch.get_float32_matmul_precision() == before
    finally:
        torch.set_float32_matmul_precision(at_start)


@pytest.mark.parametrize("name", ["random weights", "micro", "whisper/tiny.en.encoder.pt"])
def test_fast_matmul_is_exact_for_the_whole_encoder(tiny, name):
    model = tiny if name == "random weights" else load_model(name if name == "micro" else str(asset(name)), "cpu")
    audio = {"random weights": lambda: made_up_audio(5.0), "micro": lambda: micro_audio(1)[0]}.get(name, lambda: real_audio(1)[0])()
    mel = log_mel(audio, model)[None]
    sites = match_sites(["encoder.blocks.?", "encoder.ln_post"], model.dims_dict)
    assert torch.get_float32_matmul_precision() == "highest"
    plain = capture(model, mel, sites)
    with fast_matmul():
        fast = capture(model, mel, sites)
    for site in sites:
        assert relative(fast[site.name], plain[site.name]) < 1e-5, site.name


# The decoder's input


@pytest.mark.parametrize(
    ("dims", "language", "whispers"),
    [
        ({}, None, None),
        ({}, "en", None),
        (MULTILINGUAL, None, "en"),
        (MULTILINGUAL, "de", "de"),
        (MULTILINGUAL, "German", "de"),
        (MULTILINGUAL, "de-CH", "de"),
        (MULTILINGUAL, "pt_BR", "pt"),
        ({"n_mels": 128, "n_vocab": 51866}, "yue", "yue"),
    ],
)
@pytest.mark.parametrize("text", ["MISTER QUILTER IS THE APOSTLE", "  Grüße, und 3 Äpfel \n", ""])
def test_decoder_input_is_what_whisper_feeds(tiny_whisper, tmp_path, dims, language, whispers, text):
    model = load_model(str(tiny_whisper(tmp_path / "w.pt", **dims)), "cpu")
    options = DecodingOptions(language=whispers, prefix=text or None, without_timestamps=True, fp16=False)
    expected = list(DecodingTask(model.module, options).initial_tokens)
    ids = model.decoder_input(text, language)
    assert ids[: len(expected)] == expected
    assert text or len(ids) <= len(expected) + 1  # of no text, the blank alone


def test_decoder_input_ends_with_the_context(tiny):
    ids = tiny.decoder_input("a longer story " * 100)
    assert len(ids) == tiny.dims.n_text_ctx == 64
    capture(tiny, torch.zeros(1, 80, 3000), match_sites(["decoder.ln"], tiny.dims_dict), [ids])


def test_text_that_spells_a_special_token_is_text(tiny):
    ids = tiny.decoder_input("so <|endoftext|> he said")
    assert ids[:2] == [50257, 50362] and max(ids[2:]) < 50256


def test_a_language_that_whisper_does_not_know_is_refused_where_it_matters(tiny, tiny_whisper, tmp_path):
    multilingual = load_model(str(tiny_whisper(tmp_path / "w.pt", **MULTILINGUAL)), "cpu")
    with pytest.raises(ModelError, match="does not know the language 'klingon'"):
        multilingual.decoder_input("nuqneH", "klingon")
    assert tiny.decoder_input("nuqneH", "klingon") == tiny.decoder_input("nuqneH")


# Checkpoints


def test_the_header_names_the_file_by_its_hash(tiny, tmp_path):
    assert tiny.header()["sha256"] == hashlib.sha256(Path(tiny.name).read_bytes()).hexdigest()
    assert json.loads(json.dumps(tiny.header()))["dims"]["n_audio_state"] == 32


def test_float16_weights_are_computed_in_fp32(tiny, tmp_path):
    checkpoint = torch.load(tiny.name, weights_only=True)
    halved = {key: value.half() for key, value in checkpoint["model_state_dict"].items()}
    torch.save({"dims": checkpoint["dims"], "model_state_dict": halved}, tmp_path / "half.pt")
    model = load_model(str(tmp_path / "half.pt"), "cpu")
    assert {parameter.dtype for parameter in model.module.parameters()} == {torch.float32}


class Attack:
    def __reduce__(self):
        return open, ("pickle-was-run", "w")


@pytest.mark.parametrize(
    "content",
    [
        "text",
        "empty",
        "pickle",
        "list",
        "no dims",
        "dims that lack one",
        "weights that lack one",
        "weights of another width",
        "truncated",
        "no tensors",
    ],
)
def test_what_is_no_checkpoint_is_refused_in_one_line(tiny, tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "bad.pt"
    good = torch.load(tiny.name, weights_only=True)
    dims, weights = good["dims"], good["model_state_dict"]
    made = {
        "pickle": {"dims": Attack(), "model_state_dict": weights},
        "list": [1, 2],
        "no dims": {"model_state_dict": weights},
        "dims that lack one": {"dims": {k: v for k, v in dims.items() if k != "n_mels"}, "model_state_dict": weights},
        "weights that lack one": {"dims": dims, "model_state_dict": {k: v for k, v in weights.items() if k != "encoder.ln_post.bias"}},
        "weights of another width": {"dims": dims | {"n_audio_state": 64}, "model_state_dict": weights},
        "no tensors": {"dims": dims, "model_state_dict": {"encoder.ln_post.bias": "text"}},
    }
    if content in made:
        torch.save(made[content], path)
    else:
        path.write_bytes({"text": b"this is no checkpoint\n" * 99, "empty": b"", "truncated": Path(tiny.name).read_bytes()[:5000]}[content])
    with pytest.raises(ModelError, match=re.escape(str(path))) as refusal:
        load_model(str(path), "cpu")
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "pickle-was-run").exists()


def test_a_model_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(ModelError, match=r"there is no model 'tinny': give a checkpoint file or one of micro, .*tiny\.en"):
        load_model("tinny", "cpu")


def test_micro_is_the_checkpoint_that_comes_with_hearsae_whatever_lies_in_the_working_directory(tiny_whisper, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_whisper(tmp_path / "micro")
    model = load_model("micro", "cpu")
    assert model.has_decoder and model.header()["name"] == "micro"
    assert model.sha256 == hashlib.sha256(micro.MODEL.read_bytes()).hexdigest()
    assert (model.dims.n_audio_layer, model.dims.n_audio_ctx, model.dims.n_vocab) == (4, 1500, 51864)
    assert load_model("./micro", "cpu").dims.n_audio_layer == 2


def test_openai_whisper_loads_micro_as_it_is():
    ours, theirs = load_model("micro", "cpu"), whisper.load_model(str(micro.MODEL), "cpu")
    assert all(torch.equal(weight, ours.module.state_dict()[name]) for name, weight in theirs.state_dict().items())


def test_an_installation_without_micro_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(micro, "MODEL", tmp_path / "micro.pt")
    with pytest.raises(ModelError, match="this installation of hearsae lacks the model micro"):
        load_model("micro", "cpu")


def test_a_device_that_is_not_there_is_refused():
    assert choose_device("cpu").type == "cpu"
    if not torch.cuda.is_available():
        assert choose_device("auto").type == "cpu"
        with pytest.raises(ModelError, match="there is no CUDA device"):
            choose_device("cuda")
    with pytest.raises(ModelError, match="abacus"):
        choose_device("abacus")


def test_weights_drawn_anew_keep_sizes_and_nothing_else():
    learnt, drawn = load_model("micro", "cpu"), load_model("random:7:micro", "cpu")
    assert drawn.name == "random:7:micro" and drawn.dims == learnt.dims and drawn.has_decoder
    for name, before in learnt.module.state_dict().items():
        after = drawn.module.state_dict()[name]
        if name == "encoder.positional_embedding":
            assert torch.equal(before, after)
        elif before.numel() > 5000:
            assert float(after.mean()) == pytest.approx(float(before.mean()), abs=0.06 * float(before.std())), name
            assert float(after.std()) == pytest.approx(float(before.std()), rel=0.05), name
            assert abs(torch.corrcoef(torch.stack([before.flatten(), after.flatten()]))[0, 1]) < 0.06, name
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)  # a worker's number is another than the planner's
    again, other = load_model("random:7:micro", "cpu"), load_model("random:8:micro", "cpu")
    torch.set_num_threads(threads)
    assert drawn.sha256 == again.sha256 and len({learnt.sha256, drawn.sha256, other.sha256}) == 3
    weight = "encoder.blocks.0.mlp.0.weight"
    assert torch.equal(drawn.module.state_dict()[weight], again.module.state_dict()[weight])
    assert not torch.equal(drawn.module.state_dict()[weight], other.module.state_dict()[weight])


def test_a_file_can_have_its_weights_drawn_anew_too(tiny_whisper, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_whisper(tmp_path / "m.pt", encoder_only=True)
    model = load_model("random:0:./m.pt", "cpu")
    mel = torch.randn(1, 80, 3000, generator=torch.Generator().manual_seed(0))
    assert capture(model, mel, match_sites(["encoder.blocks.1"], model.dims_dict, False))["encoder.blocks.1"].isfinite().all()
    for name in ("random:./m.pt", "random:-1:./m.pt", "random:0:none"):
        with pytest.raises(ModelError, match="there is no model"):
            load_model(name, "cpu")
