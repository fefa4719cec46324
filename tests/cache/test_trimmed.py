"""`--context trimmed`: short windows for short clips, what they are, by how much they differ from whole ones, and that the two are never mixed."""

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import whisper
from conftest import write_tiny_whisper
from test_capture import NEURONS, RESIDUAL, WORDS, hearsae, objects, run, samples_of, write_clips

from cache.capture import CaptureConfig, Worker, prepare
from cache.deviation import COMPARED_CLIPS, DeviationSums, clips_to_compare, compare, take_due
from cache.errors import HearsaeError, StoreError
from cache.store import ActivationStore

TRIMMED = {"context": "trimmed"}
LAST = "encoder.ln_post"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """Checkpoint of a whole Whisper of random weights."""
    return write_tiny_whisper(tmp_path_factory.mktemp("model") / "tiny.pt")


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    return write_clips(tmp_path_factory.mktemp("audio") / "clips")


@pytest.fixture(scope="module")
def trimmed(tmp_path_factory, clips, tiny) -> tuple[ActivationStore, dict]:
    """Three sites of eight clips with a margin of 1 s, float32; and the run's summary. Read only."""
    out = tmp_path_factory.mktemp("trimmed") / "acts.zarr"
    return run(clips, tiny, out, RESIDUAL, NEURONS, LAST, dtype="float32", **TRIMMED)


@pytest.fixture(scope="module")
def padded(tmp_path_factory, clips, tiny) -> ActivationStore:
    """The same of whole windows."""
    return run(clips, tiny, tmp_path_factory.mktemp("padded") / "acts.zarr", RESIDUAL, NEURONS, LAST, dtype="float32")[0]


def apart(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


# What the rows are


def test_rows_are_those_of_whispers_own_encoder_with_a_shorter_window(trimmed, clips, tiny):
    store, _ = trimmed
    model, found = whisper.load_model(str(tiny), "cpu"), {}
    for name in (RESIDUAL, NEURONS, LAST):
        model.get_submodule(name).register_forward_hook(lambda module, inputs, output, name=name: found.update({name: output[0]}))
    positions = model.encoder.positional_embedding
    for clip, n_frames in enumerate(store.clips["n_frames"].to_pylist()):
        model.encoder.positional_embedding = positions[: n_frames + 50]
        mel = whisper.log_mel_spectrogram(whisper.pad_or_trim(samples_of(store, clips, clip)))
        with torch.inference_mode():
            model.encoder(mel[None, :, : 2 * (n_frames + 50)])
        for name, values in found.items():
            assert apart(store.read_clip(name, clip), values[:n_frames].numpy()) < 1e-5, (clip, name)


def test_a_margin_that_fills_the_window_gives_what_padded_gives(padded, clips, tiny, tmp_path):
    store, summary = run(clips, tiny, tmp_path / "acts.zarr", RESIDUAL, NEURONS, dtype="float32", margin=30.0, **TRIMMED)
    for clip in range(store.clips.num_rows):
        for site in (RESIDUAL, NEURONS):
            assert apart(store.read_clip(site, clip), padded.read_clip(site, clip)) < 1e-5
    assert all(found["relative"] == 0 for found in summary["deviation"].values())


def test_a_model_of_a_shorter_window_is_never_asked_for_more(clips, tmp_path):
    short = write_tiny_whisper(tmp_path / "short.pt", n_audio_ctx=100)
    whole, _ = run(clips, short, tmp_path / "padded.zarr")
    store, _ = run(clips, short, tmp_path / "trimmed.zarr", margin=0.5, **TRIMMED)
    for clip, n_frames in enumerate(store.clips["n_frames"].to_pylist()):
        assert (n_frames + 25 >= 100) == np.array_equal(store.read_clip(RESIDUAL, clip), whole.read_clip(RESIDUAL, clip)), n_frames


def test_only_clips_of_one_length_share_a_batch(trimmed, tiny, tmp_path):
    lengths = (16000, 12345, 16000, 16000, 48000, 12345, 16000, 16001)
    folder = write_clips(tmp_path / "clips", lengths)
    one, _ = run(folder, tiny, tmp_path / "one.zarr", RESIDUAL, NEURONS, dtype="float32", **TRIMMED)
    three, _ = run(folder, tiny, tmp_path / "three.zarr", RESIDUAL, NEURONS, dtype="float32", batch=3, **TRIMMED)
    for clip in range(one.clips.num_rows):
        for site in (RESIDUAL, NEURONS):
            assert apart(three.read_clip(site, clip), one.read_clip(site, clip)) < 1e-5
    config = CaptureConfig(str(folder), str(tiny), (RESIDUAL,), tmp_path / "three.zarr", chunk_rows=64, device="cpu", batch=3, **TRIMMED)
    worker = Worker(config)
    batches = list(worker._batches({row["clip"]: np.zeros(0) for row in one.clips.to_pylist()}))
    assert sorted(clip for batch in batches for clip in batch) == list(range(8)) and max(map(len, batches)) == 3
    assert all(len({one.clips["n_frames"][clip].as_py() for clip in batch}) == 1 for batch in batches)


# How far they are from those of whole windows


def test_the_deviation_is_measured_stored_and_summed_up(trimmed, padded):
    store, summary = trimmed
    compared = clips_to_compare(8, range(8))
    assert compared == list(range(8))  # there are no more
    for name in (RESIDUAL, NEURONS, LAST):
        ours, theirs = (np.concatenate([one.read_clip(name, clip) for clip in compared]).astype(np.float64) for one in (store, padded))
        cosine = (ours * theirs).sum(1) / (np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1))
        found = summary["deviation"][name]
        assert found == {"relative": pytest.approx(apart(ours, theirs), rel=1e-4), "cosine": pytest.approx(cosine.mean(), rel=1e-6), "clips": 8}
        assert found["relative"] > 1e-4
        assert store.totals(name).deviation.deviation() == tuple(found.values())
    assert padded.totals(RESIDUAL).deviation.deviation() is None
    assert b"deviation" not in (padded.path / "commits" / RESIDUAL / "000000.json").read_bytes()


def test_a_longer_margin_comes_closer(trimmed, clips, tiny, tmp_path):
    none, _ = run(clips, tiny, tmp_path / "none.zarr", RESIDUAL, margin=0.0, dtype="float32", **TRIMMED)
    _, summary = trimmed
    assert none.totals(RESIDUAL).deviation.deviation().relative > summary["deviation"][RESIDUAL]["relative"]


def test_compared_clips_lie_at_even_distances_and_the_next_readable_one_stands_in():
    assert clips_to_compare(800, range(800)) == [50, 150, 250, 350, 450, 550, 650, 750]
    assert clips_to_compare(800, range(100, 300)) == [150, 250]
    assert clips_to_compare(3, range(3)) == [0, 1, 2]
    assert len(clips_to_compare(10**6, range(10**6))) == COMPARED_CLIPS
    due = [3, 4, 9]
    assert take_due(due, [0, 1, 2]) == [] and take_due(due, [4, 5, 6, 7]) == [4, 5] and take_due(due, [8, 10]) == [10] and due == []


def test_a_clip_that_cannot_be_read_is_not_compared(tiny, tmp_path):
    folder = write_clips(tmp_path / "clips", (16000, 12345, 48000))
    broken = np.zeros(8000, np.float32)
    broken[4000] = np.nan
    soundfile.write(folder / "nan.wav", broken, 16000, subtype="FLOAT")
    _, summary = run(folder, tiny, tmp_path / "acts.zarr", **TRIMMED)
    assert summary["skipped"] == 1 and summary["deviation"][RESIDUAL]["clips"] == 3


def test_sums_of_deviations_add_up():
    rng = np.random.default_rng(0)
    ours, theirs = rng.standard_normal((2, 30, 5)).astype(np.float32)
    theirs[3] = 0
    parts = DeviationSums().plus(compare(ours[:10], theirs[:10])).plus(compare(ours[10:], theirs[10:]))
    assert parts == pytest.approx(compare(ours, theirs)._replace(clips=2))
    assert DeviationSums().deviation() is None


def test_a_site_added_later_is_measured_then(trimmed, clips, tiny, tmp_path):
    run(clips, tiny, tmp_path / "acts.zarr", RESIDUAL, dtype="float32", **TRIMMED)
    _, summary = run(clips, tiny, tmp_path / "acts.zarr", RESIDUAL, NEURONS, dtype="float32", **TRIMMED)
    assert summary["deviation"] == {name: pytest.approx(trimmed[1]["deviation"][name], rel=1e-4) for name in (RESIDUAL, NEURONS)}
    _, again = run(clips, tiny, tmp_path / "acts.zarr", RESIDUAL, NEURONS, dtype="float32", **TRIMMED)
    assert again["shards_computed"] == 0 and again["deviation"] == summary["deviation"]


def test_a_byte_of_the_deviation_is_covered_by_the_records_checksum(clips, tiny, tmp_path):
    store, _ = run(clips, tiny, tmp_path / "acts.zarr", **TRIMMED)
    assert store.verify()[1] == []
    record = store.path / "commits" / RESIDUAL / "000000.json"
    record.write_bytes(record.read_bytes().replace(b'"sq_padded": ', b'"sq_padded": 1'))
    assert [damage.reason for damage in store.verify()[1]] == ["commit record is damaged"]
    store.repair()
    _, summary = run(clips, tiny, tmp_path / "acts.zarr", **TRIMMED)
    assert summary["shards_computed"] == 1 and summary["deviation"][RESIDUAL]["clips"] == 8


# Never mixed, and refused before there is work to lose


def test_contexts_are_not_mixed(padded, trimmed, clips, tiny):
    settings = {"dtype": "float32"}
    with pytest.raises(StoreError, match="context is padded there and trimmed with a margin of 1 s here"):
        run(clips, tiny, padded.path, **settings, **TRIMMED)
    with pytest.raises(StoreError, match="context is trimmed with a margin of 1 s there and padded here"):
        run(clips, tiny, trimmed[0].path, **settings)
    with pytest.raises(StoreError, match=r"context is trimmed with a margin of 1 s there and trimmed with a margin of 0\.5 s here"):
        run(clips, tiny, trimmed[0].path, margin=0.5, **settings, **TRIMMED)
    assert trimmed[0].header.context == {"mode": "trimmed", "margin_s": 1.0} and padded.header.context == {"mode": "padded"}


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"margin": 1.0}, "--margin 1 is of --context trimmed"),
        ({"margin": -0.5, **TRIMMED}, "--margin -0.5 is not a number of seconds from 0 on"),
        ({"margin": float("nan"), **TRIMMED}, "--margin nan is not a number of seconds from 0 on"),
        ({"margin": float("inf"), **TRIMMED}, "--margin inf is not a number of seconds from 0 on"),
        ({"sites": (RESIDUAL, WORDS), **TRIMMED}, "--context trimmed is for encoder sites: decoder.blocks.0 reads the whole window"),
        ({"sites": ("decoder.blocks.1.cross_attn.key",), **TRIMMED}, "decoder.blocks.1.cross_attn.key reads the whole window"),
    ],
)
def test_what_makes_no_sense_is_refused(clips, tiny, tmp_path, settings, reason):
    with pytest.raises(HearsaeError) as refusal:
        prepare(CaptureConfig(**{"dataset": str(clips), "model": str(tiny), "sites": (RESIDUAL,), "out": tmp_path / "acts.zarr", **settings}))
    assert reason in str(refusal.value)
    assert not (tmp_path / "acts.zarr").exists()


# The command


def test_the_command_prints_it_and_info_shows_it(succeeds, refused, clips, tiny, tmp_path, capfd):
    from cluster.cli import main

    command = ["cache", "--dataset", clips, "--model", tiny, "--sites", RESIDUAL, "--out", tmp_path / "a.zarr", "--no-ray", "--device", "cpu"]
    done = succeeds(*command, "--context", "trimmed", "--margin", "0.5")
    assert done["context"] == {"mode": "trimmed", "margin_s": 0.5}
    found = done["deviation"][RESIDUAL]
    again = succeeds(*command, "--context", "trimmed", "--margin", "0.5")
    assert again["shards_computed"] == 0 and again["deviation"] == done["deviation"]
    told = f"{100 * found['relative']:.3g} % from padded, mean cosine {found['cosine']:.5f} (8 clips)"
    for words in ([*command, "--context", "trimmed", "--margin", "0.5"], ["info", tmp_path / "a.zarr"]):
        assert main([str(word) for word in words]) == 0
        out = capfd.readouterr().out
        assert "trimmed with a margin of 0.5 s" in out and told in out
    assert succeeds("info", tmp_path / "a.zarr")["sites"][RESIDUAL]["deviation"] == found
    assert "context is trimmed with a margin of 0.5 s there and padded here" in refused(*command)
    assert "is of --context trimmed" in refused(*command[:-2], "--margin", "0.5")
    priced = [succeeds(*command[:8], tmp_path / "b.zarr", *context, "--dry-run", "--no-ray") for context in ((), ("--context", "trimmed"))]
    assert priced[0]["gflop_per_window"] > 10 * priced[1]["gflop_per_window"] and priced[0]["window_seconds"] == 30


def test_a_run_that_was_killed_goes_on_to_the_same_bytes_and_the_same_deviation(tiny, tmp_path):
    folder = write_clips(tmp_path / "clips", tuple(16000 + 500 * i for i in range(24)))
    sizes = {"chunk_rows": 64, "shard_rows": 128}
    undisturbed, summary = run(folder, tiny, tmp_path / "undisturbed.zarr", RESIDUAL, NEURONS, **sizes, **TRIMMED)
    out = tmp_path / "killed.zarr"
    command = ["cache", "--dataset", str(folder), "--model", str(tiny), "--sites", RESIDUAL, NEURONS, "--out", str(out), "--no-ray"]
    command += ["--chunk-rows", "64", "--shard-rows", "128", "--device", "cpu", "--json", "--context", "trimmed"]
    first = out / "commits" / RESIDUAL
    process = hearsae(*command)
    while process.poll() is None and not (first.is_dir() and any(name.name.endswith(".json") for name in os.scandir(first))):
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it was done before it could be killed"
    assert ActivationStore.open(out).pending([RESIDUAL, NEURONS])

    process = hearsae(*command)
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert json.loads(stdout)["deviation"] == summary["deviation"]
    ActivationStore.open(out).repair()  # a writer that was killed may leave its temporary file
    assert objects(out) == objects(undisturbed.path)
