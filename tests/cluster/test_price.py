"""The dry run: what it says of rows, bytes and operations is what the capture then comes to, and it leaves nothing behind."""

import json
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch
from torch.utils.flop_counter import FlopCounterMode
from whisper.model import disable_sdpa

from cache.capture import CaptureConfig, Worker, prepare
from cache.errors import HearsaeError, SourceError, StoreError
from cache.model import capture, load_model
from cache.sites import match_sites
from cluster.cli import main
from cluster.pipeline import Pool, PoolOptions
from cluster.price import Calibration, _estimate, price, price_text, window_flop

TINY = {"n_audio_state": 384, "n_audio_head": 6, "n_audio_layer": 4, "n_text_state": 384, "n_text_head": 6, "n_text_layer": 4}


@pytest.fixture
def config(tmp_path, tiny_whisper) -> CaptureConfig:
    """23 clips of one to three seconds, every other one with a text, and a small Whisper."""
    (tmp_path / "speech").mkdir()
    lines = []
    for i in range(23):
        soundfile.write(tmp_path / "speech" / f"{i:02d}.wav", 0.1 * np.random.default_rng(i).standard_normal(16000 + 1400 * i), 16000)
        lines.append(json.dumps({"file_name": f"{i:02d}.wav"} | ({"text": f"words of {i}"} if i % 2 else {})))
    (tmp_path / "speech" / "metadata.jsonl").write_text("\n".join(lines))
    model = tiny_whisper(tmp_path / "m.pt")
    sites = ("encoder.blocks.0", "encoder.blocks.1.mlp.1", "decoder.blocks.0")
    return CaptureConfig(str(tmp_path / "speech"), str(model), sites, tmp_path / "acts.zarr", chunk_rows=64, shard_rows=512, device="cpu")


@pytest.mark.parametrize("dims", [{}, pytest.param(TINY, marks=pytest.mark.slow)], ids=["small", "tiny"])
def test_operations_are_those_that_the_forward_pass_performs(dims, tmp_path, tiny_whisper):
    model = load_model(str(tiny_whisper(tmp_path / "m.pt", **dims)), "cpu")
    mel, tokens = torch.zeros(1, 80, 3000), [list(range(40))]
    ends = ["encoder.blocks.0.attn.key", "encoder.blocks.1", "decoder.blocks.1.cross_attn", "decoder.ln"]
    for name in ends:
        sites = match_sites(["encoder.blocks.0.attn_ln", name], model.dims_dict)
        with FlopCounterMode(display=False) as counter, disable_sdpa():  # the counter does not know the CPU's fused attention
            capture(model, mel, sites, tokens)
        assert window_flop(model.dims_dict, sites, 40) == pytest.approx(counter.get_total_flops(), rel=0.01), name


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_rows_and_bytes_are_what_the_capture_then_writes(config, codec):
    if codec != "none":  # some dozens of tokens have more index than rows
        config = replace(config, codec=codec, sites=config.sites[:2])
    said = price(config, seconds=10)  # it ends with the last clip
    prepared, worker = prepare(config), Worker(config)
    for shard in prepared.pending:
        worker.run(shard)
    for site in prepared.sites:
        records = [prepared.store.record(site.name, shard) for shard in prepared.store.committed(site.name)]
        assert said["rows"][site.axis] == sum(record.rows for record in records)
        written = sum(record.object_bytes for record in records)
        assert said["sites"][site.name]["bytes"] == (written if codec == "none" else pytest.approx(written, rel=0.2))
    assert (said["shards"], said["clips"]) == (len(prepared.pending), 23)
    assert said["bytes"] == said["bytes_to_write"] == sum(site["bytes"] for site in said["sites"].values())


def test_the_estimate_follows_from_the_calibration(config):
    said = price(config, 0.5, PoolOptions(workers=3), price_per_hour=7200.0)
    timed = said["calibration"]
    assert 0 < timed["windows"] <= 23 and timed["windows_per_s"] == pytest.approx(timed["windows"] / timed["seconds"])
    assert {"decode", "compute", "write"} <= timed["seconds_by_stage"].keys()
    alone = 23 / timed["windows_per_s"]
    rounds = -(-said["shards"] // 3)
    assert said["estimated_seconds"] == pytest.approx(alone / said["shards"] * rounds)
    assert said["price"] == pytest.approx(said["estimated_seconds"] * 3 * 2)
    assert price(config, 0.1, PoolOptions(workers=1000))["workers"] == said["shards"]


def test_nothing_is_left_behind(config, tmp_path, monkeypatch):
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    before = set(tmp_path.rglob("*"))
    price(config, seconds=0.2)
    assert set(tmp_path.rglob("*")) == before


def test_what_is_committed_is_not_counted_again(config):
    prepared, worker = prepare(config), Worker(config)
    for shard in [0, 1]:
        worker.run(shard)
    said = price(config, seconds=0.1)
    assert said["shards_to_compute"] == said["shards"] - 2
    assert said["windows"] == 23 - len(prepared.store.shard_clips(0)) - len(prepared.store.shard_clips(1))
    assert said["bytes_to_write"] < said["bytes"]
    for shard in range(2, said["shards"]):
        worker.run(shard)
    done = price(config, seconds=0.1)
    assert (done["windows"], done["calibration"], done["estimated_seconds"], done["bytes_to_write"]) == (0, None, None, 0)
    assert "nothing is left to compute" in price_text(done)
    more = price(replace(config, sites=(*config.sites, "encoder.ln_post")), seconds=0.1)
    assert more["shards_to_compute"] == more["shards"] and 0 < more["bytes_to_write"] < more["bytes"]


def test_a_store_made_otherwise_is_refused_before_it_is_priced(config):
    prepare(config)
    with pytest.raises(StoreError, match="dtype is float16 there and float32 here"):
        price(replace(config, dtype="float32"))


def test_a_disk_that_is_too_small_is_named(config, monkeypatch):
    said = price(config, seconds=0)
    assert said["fits"] and said["free_bytes"] > 0 and said["calibration"] is None and "WARNING" not in price_text(said)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": said["bytes"] - 1}))
    said = price(config, seconds=0)
    assert not said["fits"] and "WARNING" in price_text(said)


def test_audio_that_nobody_can_read_is_an_error(config, tmp_path):
    for file in (tmp_path / "speech").glob("*.wav"):
        soundfile.write(file, np.full(16000, np.nan, np.float32), 16000, subtype="FLOAT")
    with pytest.raises(HearsaeError, match=r"none of the .* clips tried can be read: .*it has NaN or infinite samples"):
        price(config, seconds=0.2)
    with pytest.raises(SourceError, match="NaN or infinite"):
        price(replace(config, strict=True), seconds=0.2)


def test_how_many_workers_there_will_be(config):
    assert price(config, 0, PoolOptions(no_ray=True, workers=7))["workers"] == 1
    assert price(config, 0, PoolOptions(workers=2))["workers"] == 2
    assert 1 <= price(config, 0, PoolOptions())["workers"] <= price(config, 0)["shards"]
    with pytest.raises(HearsaeError, match="--workers 0"):
        price(config, 0, PoolOptions(workers=0))


def test_decoding_beside_the_workers_takes_no_time_of_theirs():
    timed = Calibration("cuda", 100, 10.0, {"decode": 6.0, "compute": 3.0, "write": 1.0}, {})
    assert _estimate(timed, 1000, 10, Pool(2, 2, 1, 1.0, decoders=0)) == pytest.approx(50)
    assert _estimate(timed, 1000, 10, Pool(2, 2, 1, 1.0, decoders=6)) == pytest.approx(20)
    assert _estimate(timed, 1000, 10, Pool(2, 2, 1, 1.0, decoders=2)) == pytest.approx(30)  # the decoders are what takes long
    assert _estimate(timed, 1000, 10, Pool(4, 4, 1, 1.0, decoders=6)) == pytest.approx(12)  # the third round keeps two workers busy


def test_the_command_prints_it(config, capsys):
    command = ["cache", "--dataset", config.dataset, "--model", config.model, "--sites", *config.sites, "--out", str(config.out), "--dry-run"]
    command += ["--chunk-rows", "64", "--shard-rows", "512"]
    assert main([*command, "--calibrate", "0.3", "--workers", "2", "--price-per-hour", "3", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    for part in ("23 clips", "frame rows", "token rows", "GFLOP per window of 30 s", "windows/s", "with 2 workers", "price: ", "free for"):
        assert part in out, out
    assert main([*command, "--calibrate", "0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["estimated_seconds"] is None
