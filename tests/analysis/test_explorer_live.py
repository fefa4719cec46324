"""What the live page is told: real micro, a real store of its speech, real scans and SAEs."""

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from conftest import micro_audio, write_tiny_whisper

from analysis.explorer.export import export
from analysis.explorer.live import Live, decode_upload, matches
from analysis.explorer.live_api import KEPT_SOUNDS, STRIPS, LiveApi, quantised
from analysis.explorer.reuse import is_current, made_from, remember
from analysis.scan import ScanOptions, scan
from cache.audio import load_clip
from cache.capture import CaptureConfig, capture_in_process, prepare
from cache.errors import HearsaeError, SourceError
from cache.store import ActivationStore
from sae.models import Dictionary, SaeConfig

SITE, NEURONS = "encoder.blocks.2", "encoder.blocks.2.mlp.1"
SCANS = ("neurons", "a", "b", "random")
CLIPS = 6
RATE = 16000
OPTIONS = ScanOptions(top=3, ranges=2, quantiles=2, per_bin=1)
D_SAE = 192
TWINS = D_SAE // 2
"""Latents of `a` that `b` has too, in the opposite order."""


def make_sae(folder: Path, sha256: str, mean: np.ndarray, seed: int, like: Dictionary | None = None) -> Dictionary:
    """Random directions of unit norm that read what they write, 8 of which are active."""
    generator = torch.Generator().manual_seed(seed)
    sae = Dictionary(SaeConfig("topk", len(mean), D_SAE, k=8, site=SITE, model_sha256=sha256))
    with torch.no_grad():
        sae.init_parameters(generator)
        sae.b_dec.copy_(torch.from_numpy(mean))
        sae.b_enc[-1] = -1e4  # a dead latent
        if like is not None:
            sae.W_dec[:TWINS] = like.W_dec[:TWINS].flip(0)
            sae.W_enc[:, :TWINS] = like.W_enc[:, :TWINS].flip(1)
    sae.save(folder)
    return sae


def make_live_world(root: Path) -> Path:
    """`acts.zarr` of a few clips of micro's speech, two SAEs, and scans `neurons`, `a`, `b`, `random`."""
    config = CaptureConfig("micro", "micro", (SITE, NEURONS), root / "acts.zarr", split="test", limit=CLIPS, chunk_rows=64, device="cpu")
    list(capture_in_process(config, prepare(config).pending))
    store = ActivationStore.open(root / "acts.zarr")
    mean, sha256 = store.stats(SITE).mean, store.header.model["sha256"]
    make_sae(root / "sae-b", sha256, mean, 1, like=make_sae(root / "sae-a", sha256, mean, 0))
    specs = {"neurons": f"neurons:{NEURONS}", "a": f"sae:{root / 'sae-a'}", "b": f"sae:{root / 'sae-b'}", "random": f"random:{SITE}"}
    for name, spec in specs.items():
        scan(store, spec, root / name, OPTIONS)
    return root


@pytest.fixture(scope="module")
def live_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_live_world(tmp_path_factory.mktemp("live"))


@pytest.fixture(scope="module")
def live(live_world: Path) -> Live:
    return Live.open([live_world / name for name in SCANS])


@pytest.fixture(scope="module")
def page(live_world: Path) -> Path:
    export([live_world / "neurons"], live_world / "page", audio="none")
    return live_world / "page"


def audio_file(samples: np.ndarray, rate: int = RATE, format: str = "WAV") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=format)
    return file.getvalue()


# What is computed


@pytest.mark.parametrize("name", ["scan0", "scan1", "scan2", "scan3"])
def test_a_clip_heard_again_gives_the_values_that_its_scan_saw(live: Live, name: str) -> None:
    one = live.scan(name)
    examples = pq.read_table(one.scan.path / "examples.parquet").to_pandas()
    assert len(examples) > 100
    for clip in range(CLIPS):
        values = one.values(live.hear(load_clip(one.store, clip)))
        own = examples[examples["clip"] == clip]
        assert values.shape == (one.store.clips["n_frames"][clip].as_py(), one.features.count)
        assert values[own["frame"], own["feature"]] == pytest.approx(own["value"].to_numpy(), rel=0.02, abs=2e-3)


def test_strength_is_measured_against_the_scan(live: Live) -> None:
    one = live.scan("scan0")
    table = one.scan.features.to_pandas()
    values = one.values(live.hear(micro_audio(1)[0]))
    most = values.max(axis=0)
    for scale, expected in (("z", (most - table["mean"]) / table["std"]), ("share", most / table["max"])):
        strongest = one.strongest(values, scale, STRIPS)
        assert strongest.tolist() == expected.where(most > 0).sort_values(ascending=False, kind="stable").index[:STRIPS].tolist()
        strips = one.strips(values, scale, strongest)
        assert strips.strength == pytest.approx(expected[strongest].to_numpy(), rel=1e-6)
        assert (strips.values[np.arange(STRIPS), strips.frame] == most[strongest]).all()
    with pytest.raises(HearsaeError, match="there is no scale 'loud'"):
        one.strength(values, "loud")
    with pytest.raises(HearsaeError, match="there is no feature 999"):
        one.strips(values, "z", [999])


def test_a_feature_that_never_varied_has_no_strength(live: Live) -> None:
    one = live.scan("scan1")
    everything = np.ones((2, one.features.count), np.float32)
    for scale in ("z", "share"):
        assert np.isnan(one.strength(everything, scale)[:, D_SAE - 1]).all()
        assert D_SAE - 1 not in one.strongest(everything, scale, one.features.count)


def test_reconstruction_error_is_that_of_the_rows(live: Live) -> None:
    one = live.scan("scan1")
    sound = live.hear(micro_audio(1)[0])
    rows = torch.from_numpy(sound.rows[one.model_sha256, SITE].astype(np.float32)).double()
    error = (rows - one.features.dictionary(rows.float()).double()).square().sum()
    spread = (rows - torch.from_numpy(one.store.stats(SITE).mean)).square().sum()
    assert one.fvu(sound) == pytest.approx(float(error / spread), rel=1e-4)
    assert one.fvu(sound) > 0 and live.scan("scan0").fvu(sound) is None


def test_a_transcoder_is_measured_by_what_it_reconstructs(live: Live, tmp_path: Path) -> None:
    store = live.scans[0].store
    mean = store.stats(NEURONS).mean
    config = SaeConfig("topk", 96, 64, k=4, site=SITE, target=NEURONS, d_out=len(mean), model_sha256=store.header.model["sha256"])
    transcoder = Dictionary(config)
    with torch.no_grad():
        transcoder.b_dec.copy_(torch.from_numpy(mean))  # all that it says is the mean
    transcoder.save(tmp_path / "transcoder")
    scan(store, f"sae:{tmp_path / 'transcoder'}", tmp_path / "scan", OPTIONS)
    both = Live.open([tmp_path / "scan"])
    assert both.scans[0].fvu(both.hear(micro_audio(1)[0])) == pytest.approx(1, abs=1e-5)


def test_latents_find_their_twins_in_another_sae(live: Live) -> None:
    a, b = live.scan("scan1"), live.scan("scan2")
    sound = live.hear(micro_audio(1)[0])
    found = matches(a, b, a.values(sound), b.values(sound), [0, 5, TWINS])
    assert [(match.feature, match.other) for match in found[:2]] == [(0, TWINS - 1), (5, TWINS - 6)]
    assert [match.cosine for match in found[:2]] == pytest.approx([1, 1], abs=1e-5) and found[2].cosine < 0.9
    with pytest.raises(HearsaeError, match="only latents of two SAEs"):
        matches(a, live.scan("scan0"), a.values(sound), a.values(sound), [0])


def test_correlation_is_pearsons_and_none_where_nothing_changes(live: Live) -> None:
    a, b = live.scan("scan1"), live.scan("scan2")
    noise = np.random.default_rng(0)
    of_a, of_b = noise.random((50, D_SAE), np.float32), noise.random((50, D_SAE), np.float32)
    of_b[:, TWINS - 1] += of_a[:, 0]
    of_a[:, 1] = 3
    found = matches(a, b, of_a, of_b, [0, 1])
    assert found[0].correlation == pytest.approx(np.corrcoef(of_a[:, 0], of_b[:, TWINS - 1])[0, 1], abs=1e-6)
    assert found[1].correlation is None


def test_whispers_own_transcript_where_there_is_a_decoder(live: Live, live_world: Path, tmp_path: Path) -> None:
    store = live.scans[0].store
    heard = [live.hear(load_clip(store, clip)) for clip in range(3)]
    assert [sound.text.lower().split() for sound in heard] == [store.clips["text"][clip].as_py().lower().split() for clip in range(3)]
    assert heard[0].no_text is None

    model = write_tiny_whisper(tmp_path / "encoder.pt", encoder_only=True)
    config = CaptureConfig("micro", str(model), ("encoder.blocks.0",), tmp_path / "acts.zarr", split="test", limit=2, chunk_rows=64, device="cpu")
    list(capture_in_process(config, prepare(config).pending))
    scan(ActivationStore.open(config.out), "neurons:encoder.blocks.0", tmp_path / "scan", OPTIONS)
    sound = Live.open([tmp_path / "scan"]).hear(micro_audio(1)[0])
    assert sound.text is None and "encoder alone" in sound.no_text

    model.rename(tmp_path / "moved.pt")
    with pytest.raises(HearsaeError, match="name its checkpoint with --model"):
        Live.open([tmp_path / "scan"])
    assert Live.open([tmp_path / "scan"], models=[str(tmp_path / "moved.pt")]).hear(micro_audio(1)[0]).n_frames == sound.n_frames
    write_tiny_whisper(model, encoder_only=True, seed=1)
    with pytest.raises(HearsaeError, match="it is another one now"):
        Live.open([tmp_path / "scan"])
    # Scans of two models side by side: each gets the rows of its own.
    both = Live.open([live_world / "neurons", tmp_path / "scan"], models=[str(tmp_path / "moved.pt")])
    sound = both.hear(micro_audio(1)[0])
    assert [one.values(sound).shape[1] for one in both.scans] == [384, 32]


def test_silence_and_a_single_sample_are_sound_and_nothing_is_not(live: Live) -> None:
    assert live.hear(np.zeros(RATE, np.float32)).n_frames == 50
    assert live.hear(np.zeros(1, np.float32)).n_frames == 1
    with pytest.raises(SourceError, match="no sound"):
        live.hear(np.zeros(0, np.float32))
    assert live.hear(np.zeros(31 * RATE, np.float32)).n_frames == 1500  # the window, and no more


def test_uploads_are_resampled_and_cut_and_what_is_no_sound_is_refused() -> None:
    tone = np.sin(2 * np.pi * 440 * np.arange(44100) / 44100).astype(np.float32) * 0.5
    expected = np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE) * 0.5
    samples, duration_s = decode_upload(audio_file(np.stack([tone, tone], 1), 44100), 30 * RATE)
    assert duration_s == pytest.approx(1) and samples.dtype == np.float32
    assert samples[200:-200] == pytest.approx(expected[200:-200], abs=0.01)
    for format in ("FLAC", "OGG", "MP3"):
        samples, duration_s = decode_upload(audio_file(tone, 44100, format), RATE // 2)
        assert len(samples) == RATE // 2 and duration_s == pytest.approx(1, abs=0.1)
    cut, duration_s = decode_upload(audio_file(tone, 44100)[: 44 + 8820], RATE)  # a tenth of a second is there
    assert len(cut) == 1600 and duration_s == pytest.approx(0.1)
    for data in (b"", b"RIFF", b"not audio" * 100, audio_file(tone)[:30]):
        with pytest.raises(SourceError, match="no audio file"):
            decode_upload(data, RATE)
    with pytest.raises(SourceError, match="no sound"):
        decode_upload(audio_file(np.zeros(0)), RATE)
    for channels, rate in ((200, 96000), (1, 50)):
        with pytest.raises(SourceError, match=f"{channels} channels at {rate} Hz"):
            decode_upload(audio_file(np.zeros((4, channels)), rate), RATE)
    with pytest.raises(SourceError, match="NaN or infinite"):
        file = io.BytesIO()
        soundfile.write(file, np.full(100, np.nan), RATE, format="WAV", subtype="FLOAT")
        decode_upload(file.getvalue(), RATE)


def test_levels_give_the_values_back() -> None:
    values = np.random.default_rng(0).normal(size=(3, 40)).astype(np.float32)
    values[2] = 7
    levels, lo, hi = quantised(values)
    assert lo[:, None] + (hi - lo)[:, None] * levels / 255 == pytest.approx(values, abs=float((hi - lo).max()) / 255)


def test_sounds_are_forgotten_oldest_first(live: Live) -> None:
    api = LiveApi(live)
    names = [api.hear_upload(audio_file(sample))["audio"] for sample in [np.zeros(320)] * (KEPT_SOUNDS + 1)]
    assert api.moment({"audio": names[-1], "scan": "scan0", "frame": "0"})["frame"] == 0
    with pytest.raises(HearsaeError, match="send it again"):
        api.moment({"audio": names[0], "scan": "scan0", "frame": "0"})


# Serving a page again


def test_a_page_is_served_again_only_as_long_as_nothing_changed(live_world: Path, page: Path) -> None:
    wanted = made_from([live_world / "neurons"], {"features": None})
    assert not is_current(page, wanted)
    remember(page, wanted)
    assert is_current(page, wanted) and is_current(page, made_from([live_world / "neurons"], {"features": None}))
    assert not is_current(page, made_from([live_world / "neurons"], {"features": "0-3"}))
    assert not is_current(page, made_from([live_world / "a"], {"features": None}))
    (page / "index.html").write_bytes((page / "index.html").read_bytes())  # as another export does
    assert not is_current(page, wanted)
    (page / "served.json").unlink()
