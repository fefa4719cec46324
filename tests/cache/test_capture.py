"""Capture from audio to a store: which rows are kept, where they lie in time, and what a run that was killed leaves."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import whisper
from conftest import asset, write_tiny_whisper

from cache.capture import CaptureConfig, capture_in_process, prepare, summarise
from cache.errors import HearsaeError, SourceError, StoreError
from cache.model import capture, load_model, log_mel
from cache.sites import match_sites
from cache.store import ActivationStore

RESIDUAL, NEURONS, WORDS = "encoder.blocks.0", "encoder.blocks.1.mlp.1", "decoder.blocks.0"
LENGTHS = (16000, 12345, 1, 320, 321, 48000, 4000, 70000)
"""Samples."""


def write_clips(folder: Path, lengths: tuple[int, ...] = LENGTHS, texts: bool = True) -> Path:
    """An audio folder of tones in noise, one file a length; every third one has no text."""
    folder.mkdir(parents=True)
    rng, lines = np.random.default_rng(0), []
    for i, n in enumerate(lengths):
        tone = 0.2 * np.sin(2 * np.pi * (200 + 50 * i) * np.arange(n) / 16000)
        soundfile.write(folder / f"clip{i:02d}.wav", tone + 0.02 * rng.standard_normal(n), 16000, subtype="PCM_16")
        lines.append({"file_name": f"clip{i:02d}.wav"} | ({"text": "word " * (i + 1)} if texts and i % 3 else {}))
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """Checkpoint of a whole Whisper of random weights."""
    return write_tiny_whisper(tmp_path_factory.mktemp("model") / "tiny.pt")


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    return write_clips(tmp_path_factory.mktemp("audio") / "clips")


def run(dataset: Path, model: Path, out: Path, *sites: str, **settings) -> tuple[ActivationStore, dict]:
    """Captures in this process; the store and the run's summary."""
    config = CaptureConfig(str(dataset), str(model), sites or (RESIDUAL,), out, **{"chunk_rows": 64, "device": "cpu"} | settings)
    prepared = prepare(config)
    results = list(capture_in_process(config, prepared.pending))
    return ActivationStore.open(out), summarise(prepared, {"shards_computed": len(results)}, 0.0)


@pytest.fixture(scope="module")
def captured(tmp_path_factory, clips, tiny) -> ActivationStore:
    """Three sites of eight clips. Read only."""
    return run(clips, tiny, tmp_path_factory.mktemp("captured") / "acts.zarr", RESIDUAL, NEURONS, WORDS)[0]


def samples_of(store: ActivationStore, folder: Path, clip: int) -> np.ndarray:
    row = store.clips.slice(clip, 1).to_pylist()[0]
    start = round(row["start_s"] * 16000)
    return soundfile.read(folder / row["source"], dtype="float32")[0][start : start + round(row["duration_s"] * 16000)]


def objects(store: Path) -> dict[str, bytes]:
    """Every array object of a store and its metadata, by path."""
    files = (path for path in sorted(store.rglob("*")) if path.is_file() and not {"commits", "runs"} & set(path.parts))
    return {str(path.relative_to(store)): path.read_bytes() for path in files}


# Rows


def test_padding_has_no_rows(captured):
    assert sorted(captured.clips["n_frames"].to_pylist()) == sorted(-(-n // 320) for n in LENGTHS)
    total = sum(-(-n // 320) for n in LENGTHS)
    for site in (RESIDUAL, NEURONS):
        assert sum(captured.record(site, shard).rows for shard in captured.committed(site)) == total
        spans = [span for shard in captured.committed(site) for span in captured.spans(shard, site)]
        assert sum(span.stop - span.start for span in spans) == total
        for shard in captured.committed(site):  # what no clip owns was never written
            inside = np.zeros(captured.axis(site).shard_rows, bool)
            first = shard * len(inside)
            for span in captured.spans(shard, site):
                inside[span.start - first : span.stop - first] = True
            rows = captured.read(site, first, first + len(inside))
            assert not rows[~inside].any()
            assert rows[inside].any(axis=1).all()


def test_rows_are_the_first_frames_of_a_plain_padded_forward(captured, clips, tiny):
    model = whisper.load_model(str(tiny), "cpu")
    found = {}
    model.encoder.blocks[0].register_forward_hook(lambda m, i, output: found.update({RESIDUAL: output[0]}))
    model.encoder.blocks[1].mlp[1].register_forward_hook(lambda m, i, output: found.update({NEURONS: output[0]}))
    for clip in range(captured.clips.num_rows):
        samples = samples_of(captured, clips, clip)
        with torch.inference_mode():
            model.encoder(whisper.log_mel_spectrogram(whisper.pad_or_trim(samples))[None])
        n = -(-len(samples) // 320)
        for site in (RESIDUAL, NEURONS):
            stored, plain = captured.read_clip(site, clip).astype(np.float32), found[site][:n].numpy()
            assert stored.shape == plain.shape
            assert np.linalg.norm(stored - plain) < 1e-3 * np.linalg.norm(plain)


def test_token_rows_are_those_of_a_decoder_fed_the_text(captured, clips, tiny):
    model = load_model(str(tiny), "cpu")
    with_text = 0
    for clip, row in enumerate(captured.clips.to_pylist()):
        if row["text"] is None:
            assert row["n_tokens"] is None and row["token_start"] is None
            with pytest.raises(StoreError, match=f"clip {clip} has no rows of {WORDS}"):
                captured.read_clip(WORDS, clip)
            continue
        with_text += 1
        ids = model.decoder_input(row["text"])
        assert row["tokens"] == ids and row["n_tokens"] == len(ids)
        mel = log_mel(samples_of(captured, clips, clip), model)[None]
        plain = capture(model, mel, match_sites([WORDS], model.dims_dict), [ids])[WORDS][0].numpy()
        stored = captured.read_clip(WORDS, clip).astype(np.float32)
        assert stored.shape == plain.shape == (len(ids), 32)
        assert np.linalg.norm(stored - plain) < 1e-3 * np.linalg.norm(plain)
    assert with_text == 5


def test_summary_counts_what_is_there(clips, tiny, tmp_path):
    store, summary = run(clips, tiny, tmp_path / "acts.zarr", RESIDUAL, WORDS)
    frames = sum(-(-n // 320) for n in LENGTHS)
    assert summary["clips"] == 8 and summary["skipped"] == 0 and summary["frames"] == frames
    assert summary["shards"] == summary["shards_computed"] == store.axis(RESIDUAL).shards
    assert {name: site["width"] for name, site in summary["sites"].items()} == {RESIDUAL: 32, WORDS: 32}
    on_disk = sum(path.stat().st_size for path in (tmp_path / "acts.zarr" / RESIDUAL / "c").rglob("*") if path.is_file())
    assert summary["sites"][RESIDUAL]["bytes"] == on_disk > frames * 32 * 2


def test_batches_change_nothing_but_rounding(captured, clips, tiny, tmp_path):
    batched, _ = run(clips, tiny, tmp_path / "acts.zarr", RESIDUAL, NEURONS, WORDS, batch=3)
    for clip, row in enumerate(captured.clips.to_pylist()):
        for site in (RESIDUAL, NEURONS, WORDS) if row["text"] else (RESIDUAL, NEURONS):
            one, three = (store.read_clip(site, clip).astype(np.float32) for store in (captured, batched))
            assert np.linalg.norm(one - three) < 1e-3 * np.linalg.norm(one)


def test_float32_keeps_what_float16_rounds(captured, clips, tiny, tmp_path):
    exact, _ = run(clips, tiny, tmp_path / "acts.zarr", dtype="float32")
    for clip in range(captured.clips.num_rows):
        rows = exact.read_clip(RESIDUAL, clip)
        assert rows.dtype == np.float32
        np.testing.assert_array_equal(rows.astype(np.float16), captured.read_clip(RESIDUAL, clip))
    assert (exact.read_clip(RESIDUAL, 0) != captured.read_clip(RESIDUAL, 0)).any()


@pytest.mark.filterwarnings("error")
def test_values_beyond_float16_are_refused_in_one_clear_line(clips, tiny, tmp_path):
    checkpoint = torch.load(tiny, weights_only=True)
    checkpoint["model_state_dict"]["encoder.blocks.0.mlp.2.weight"] *= 1e6
    torch.save(checkpoint, tmp_path / "loud.pt")
    with pytest.raises(HearsaeError, match=r"encoder\.blocks\.0 has values that float16 can't hold .*--dtype float32") as refusal:
        run(clips, tmp_path / "loud.pt", tmp_path / "half.zarr")
    assert "\n" not in str(refusal.value)
    assert ActivationStore.open(tmp_path / "half.zarr").committed(RESIDUAL) == []
    store, _ = run(clips, tmp_path / "loud.pt", tmp_path / "single.zarr", dtype="float32")
    assert np.abs(store.read_clip(RESIDUAL, 0)).max() > 65504


def test_values_that_are_not_numbers_are_refused_as_such(clips, tiny, tmp_path):
    checkpoint = torch.load(tiny, weights_only=True)
    checkpoint["model_state_dict"]["encoder.blocks.0.mlp.2.weight"][0, 0] = float("nan")
    torch.save(checkpoint, tmp_path / "nan.pt")
    with pytest.raises(HearsaeError, match=r"encoder\.blocks\.0 .* NaN"):
        run(clips, tmp_path / "nan.pt", tmp_path / "acts.zarr", dtype="float32")


# Time


CLICKS_S = (0.5, 1.2345, 2.0, 3.971)


@pytest.mark.parametrize("name", ["random weights", "micro", "whisper/tiny.en.encoder.pt"])
@pytest.mark.parametrize("clip_seconds", [30.0, 2.0])
def test_a_click_is_found_at_its_time(tiny, tmp_path, name, clip_seconds):
    """Frame i of a clip begins at clip.start_s + 0.02 i: where a click is added, the frame that changes most is the one at its time."""
    model = {"random weights": tiny, "micro": Path("micro")}.get(name) or asset(name)
    hiss = 0.003 * np.random.default_rng(0).standard_normal(5 * 16000)
    for folder, clicks in {"without": ()}.items() | {f"at {t}": (t,) for t in CLICKS_S}.items():
        audio = hiss.copy()
        for t in clicks:
            audio[round(t * 16000) :][:32] += 0.03 * np.hanning(32)
        (tmp_path / folder).mkdir()
        soundfile.write(tmp_path / folder / "a.wav", audio, 16000, subtype="FLOAT")
    quiet, _ = run(tmp_path / "without", model, tmp_path / "without.zarr", clip_seconds=clip_seconds)
    pieces = [row["clip"] for row in sorted(quiet.clips.to_pylist(), key=lambda row: row["start_s"])]
    starts = [quiet.clips["start_s"][clip].as_py() for clip in pieces]
    assert starts == [i * clip_seconds for i in range(len(pieces))] and len(pieces) == (3 if clip_seconds == 2.0 else 1)
    for t in CLICKS_S:
        clicking, _ = run(tmp_path / f"at {t}", model, tmp_path / f"at {t}.zarr", clip_seconds=clip_seconds)
        change = {}
        for clip, start_s in zip(pieces, starts, strict=True):
            rows = (store.read_clip(RESIDUAL, clip).astype(np.float64) for store in (clicking, quiet))
            for i, distance in enumerate(np.linalg.norm(np.subtract(*rows), axis=1)):
                change[round(start_s + 0.02 * i, 6)] = distance
        assert len(change) == 250  # the clips' frames tile the source
        found = max(change, key=change.__getitem__)
        assert abs(round(found / 0.02) - round(t / 0.02)) <= 1, (t, found)


def test_pieces_of_a_source_tile_it(clips, tiny, tmp_path):
    store, _ = run(clips, tiny, tmp_path / "acts.zarr", clip_seconds=2.0)
    for i, n in enumerate(LENGTHS):
        pieces = sorted((row for row in store.clips.to_pylist() if row["source"] == f"clip{i:02d}.wav"), key=lambda row: row["start_s"])
        assert [row["start_s"] for row in pieces] == [2.0 * j for j in range(-(-n // 32000))]
        assert sum(round(row["duration_s"] * 16000) for row in pieces) == n
        assert sum(row["n_frames"] for row in pieces) == -(-n // 320)
        assert all(row["text"] is None for row in pieces) or len(pieces) == 1  # a text belongs to the whole


def test_a_model_of_a_shorter_window_gets_shorter_clips(clips, tmp_path):
    short = write_tiny_whisper(tmp_path / "short.pt", n_audio_ctx=100)
    store, summary = run(clips, short, tmp_path / "acts.zarr")
    assert max(store.clips["duration_s"].to_pylist()) == 2.0
    assert summary["frames"] == sum(-(-n // 320) for n in LENGTHS)


# Again, later, and in spite of


def test_the_same_command_again_computes_nothing(clips, tiny, tmp_path):
    first, _ = run(clips, tiny, tmp_path / "acts.zarr")
    before = objects(first.path)
    _, summary = run(clips, tiny, tmp_path / "acts.zarr")
    assert summary["shards_computed"] == 0 and summary["frames"] == sum(-(-n // 320) for n in LENGTHS)
    assert objects(first.path) == before


def test_a_site_added_later_is_computed_alone(captured, clips, tiny, tmp_path):
    run(clips, tiny, tmp_path / "acts.zarr", RESIDUAL)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "acts.zarr" / RESIDUAL).rglob("*")}
    records = {path: path.read_bytes() for path in (tmp_path / "acts.zarr" / "commits" / RESIDUAL).iterdir()}
    store, summary = run(clips, tiny, tmp_path / "acts.zarr", RESIDUAL, NEURONS)
    assert summary["shards_computed"] == store.axis(NEURONS).shards
    assert {path: path.stat().st_mtime_ns for path in written} == written and {path: path.read_bytes() for path in records} == records
    store, _ = run(clips, tiny, tmp_path / "acts.zarr", WORDS)
    for name, data in objects(captured.path).items():
        if "/c/" in name:
            assert (store.path / name).read_bytes() == data, name


def test_another_model_is_refused(captured, clips, tmp_path):
    other = write_tiny_whisper(tmp_path / "other.pt", seed=1)
    with pytest.raises(StoreError, match=r"made otherwise: model\.sha256 is"):
        run(clips, other, captured.path, RESIDUAL)


def test_decoder_sites_without_any_text_are_refused(tiny, tmp_path):
    folder = write_clips(tmp_path / "silent", (16000, 16000), texts=False)
    with pytest.raises(HearsaeError, match="decoder sites need text"):
        run(folder, tiny, tmp_path / "acts.zarr", WORDS)
    assert not (tmp_path / "acts.zarr").exists()


def test_what_cannot_be_read_is_skipped_with_its_reason(captured, clips, tiny, tmp_path):
    folder = write_clips(tmp_path / "clips")
    broken = np.zeros(8000, np.float32)
    broken[4000] = np.nan
    soundfile.write(folder / "nan.wav", broken, 16000, subtype="FLOAT")
    (folder / "text.wav").write_text("I am no audio")
    store, summary = run(folder, tiny, tmp_path / "acts.zarr", RESIDUAL, WORDS)
    assert summary["clips"] == 8 and summary["skipped"] == 2
    reasons = "\n".join(summary["skipped_reasons"])
    assert "nan.wav (row 0): it has NaN or infinite samples" in reasons and "text.wav (row 0): it can't be decoded" in reasons
    (clip,) = (row["clip"] for row in store.clips.to_pylist() if row["source"] == "nan.wav")
    assert list(store.skipped(RESIDUAL)) == list(store.skipped(WORDS)) == [clip]
    with pytest.raises(StoreError, match=r"was skipped: .*NaN"):
        store.read_clip(RESIDUAL, clip)
    assert summary["frames"] == sum(-(-n // 320) for n in LENGTHS)
    whole = {row["source"]: row["clip"] for row in captured.clips.to_pylist()}
    for row in store.clips.to_pylist():  # the others are as if it had not been there
        if row["clip"] != clip:
            np.testing.assert_array_equal(store.read_clip(RESIDUAL, row["clip"]), captured.read_clip(RESIDUAL, whole[row["source"]]))
    again = run(folder, tiny, tmp_path / "acts.zarr", RESIDUAL, WORDS)[1]
    assert again["skipped"] == 2 and again["shards_computed"] == 0


def test_a_store_goes_on_after_its_dataset_moved(tiny, tmp_path):
    folder, out = write_clips(tmp_path / "here" / "clips"), tmp_path / "acts.zarr"
    store, _ = run(folder, tiny, out)
    before = objects(out)
    for record in (out / "commits" / RESIDUAL).iterdir():
        record.unlink()
    moved = folder.rename(tmp_path / "there")
    _, summary = run(moved, tiny, out)
    assert summary["shards_computed"] == store.axis(RESIDUAL).shards and summary["skipped"] == 0
    assert objects(out) == before


def test_strict_stops_at_what_cannot_be_read(tiny, tmp_path):
    folder = write_clips(tmp_path / "clips", (16000,))
    broken = np.full(8000, np.inf, np.float32)
    soundfile.write(folder / "inf.wav", broken, 16000, subtype="FLOAT")
    with pytest.raises(SourceError, match=r"inf\.wav \(row 0\): it has NaN or infinite samples"):
        run(folder, tiny, tmp_path / "acts.zarr", strict=True)
    (folder / "inf.wav").write_text("I am no audio")
    with pytest.raises(SourceError, match=r"inf\.wav \(row 0\): it can't be decoded"):
        run(folder, tiny, tmp_path / "other.zarr", strict=True)


def test_a_clip_of_nothing_but_zeros_has_rows(tiny, tmp_path):
    (tmp_path / "zeros").mkdir()
    soundfile.write(tmp_path / "zeros" / "a.wav", np.zeros(16000), 16000)
    store, _ = run(tmp_path / "zeros", tiny, tmp_path / "acts.zarr")
    assert np.isfinite(store.read_clip(RESIDUAL, 0)).all() and len(store.read_clip(RESIDUAL, 0)) == 50


# Killed


def hearsae(*arguments: str) -> subprocess.Popen:
    code = "import sys, cluster.cli; sys.exit(cluster.cli.main())"
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def test_a_run_that_was_killed_goes_on_to_the_same_bytes(tiny, tmp_path):
    folder = write_clips(tmp_path / "clips", tuple(16000 + 500 * i for i in range(24)))
    settings = {"chunk_rows": 64, "shard_rows": 128}
    undisturbed, summary = run(folder, tiny, tmp_path / "undisturbed.zarr", RESIDUAL, NEURONS, **settings)
    shards = summary["shards"]
    out = tmp_path / "killed.zarr"
    command = ["cache", "--dataset", str(folder), "--model", str(tiny), "--sites", RESIDUAL, NEURONS, "--out", str(out), "--no-ray"]
    command += ["--chunk-rows", "64", "--shard-rows", "128", "--device", "cpu", "--json"]
    first = out / "commits" / RESIDUAL
    process = hearsae(*command)
    while process.poll() is None and not (first.is_dir() and any(name.name.endswith(".json") for name in os.scandir(first))):
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it was done before it could be killed"

    done = ActivationStore.open(out)
    missing = done.pending([RESIDUAL, NEURONS])
    assert missing and 0 < len(done.committed(RESIDUAL)) < shards
    committed = {
        path: path.stat().st_mtime_ns for site in (RESIDUAL, NEURONS) for s in done.committed(site) for path in [out / site / "c" / str(s) / "0"]
    }
    assert done.verify() == (len(committed), [])

    process = hearsae(*command)
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert json.loads(stdout)["shards_computed"] == len(missing)
    assert {path: path.stat().st_mtime_ns for path in committed} == committed

    done.repair()  # a writer that was killed may leave its temporary file
    have, want = objects(out), objects(undisturbed.path)
    assert have == want  # arrays, clips and the header: all but when and where it was made
    for site in (RESIDUAL, NEURONS):
        for shard in range(shards):
            one, other = (replace(store.record(site, shard), seconds={}).to_json() for store in (ActivationStore.open(out), undisturbed))
            assert one == other
