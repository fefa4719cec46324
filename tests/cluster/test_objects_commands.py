"""The commands on an object store that fails now and then: everything there, and the same bytes as on a disk."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from s3_server import FAULTS, S3

from cache import micro
from cache.location import Location, location, put
from cache.store import ActivationStore
from cluster.cli import main

RESIDUAL, NEURONS = "encoder.blocks.0", "encoder.blocks.1.mlp.1"
CLIPS = 6
SMALL_SHARDS = ("--shard-rows", "384", "--chunk-rows", "64")
SMALL_SAE = ("--d-sae", "64", "--k", "4", "--rows", "4000", "--batch", "100", "--threads", "1", "--checkpoint-every", "1000")
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def speech_at(folder: Location) -> None:
    rows = [json.loads(line) for line in (micro.SPEECH / "test" / "metadata.jsonl").read_text().splitlines()[:CLIPS]]
    for row in rows:
        put(folder / row["file_name"], (micro.SPEECH / "test" / row["file_name"]).read_bytes())
    put(folder / "metadata.jsonl", "\n".join(map(json.dumps, rows)).encode())
    put(folder.parent / "model.pt", micro.MODEL.read_bytes())


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> dict[str, Any]:
    capsys.readouterr()
    status = main([*map(str, arguments), "--json"])
    printed = capsys.readouterr()
    assert status == 0, printed.err
    return json.loads(printed.out)


def cache(place: Location, *more: str) -> list[Any]:
    named = ["--dataset", place / "speech", "--model", place / "model.pt", "--out", place / "acts.zarr"]
    return ["cache", *named, "--sites", RESIDUAL, NEURONS, *SMALL_SHARDS, *more]


def train(place: Location) -> list[Any]:
    return ["train", "--store", place / "acts.zarr", "--site", RESIDUAL, "--out", place / "sae", *SMALL_SAE]


def story(capsys: pytest.CaptureFixture[str], place: Location) -> dict[str, Any]:
    """What the commands answer, without what names places and times."""
    kept = {"cache": run(capsys, *cache(place, "--no-ray")), "verify": run(capsys, "verify", place / "acts.zarr")}
    kept["info"] = run(capsys, "info", place / "acts.zarr")
    kept["train"] = run(capsys, *train(place))["runs"][0]
    kept["evaluate"] = run(capsys, "evaluate", "--sae", place / "sae", "--store", place / "acts.zarr")["results"][0]
    kept["align"] = run(capsys, "align", "--store", place / "acts.zarr", "--no-ray")
    for name, spec in (("latents", f"sae:{place / 'sae'}"), ("neurons", f"neurons:{NEURONS}")):
        kept[name] = run(capsys, "scan", "--store", place / "acts.zarr", "--features", spec, "--out", place / name, "--no-ray")
    kept["moments"] = run(capsys, "query", "--scan", place / "neurons", "--feature", 3)
    kept["features"] = run(capsys, "query", "--scan", place / "latents", "--clip", 2, "--time", 0.5)
    names = {
        "cache": ("clips", "skipped", "frames", "shards", "sites"),
        "info": ("clips", "hours", "skipped", "sites", "axes"),
        "train": ("rows", "fvu", "l0", "dead_fraction"),
        "evaluate": ("rows", "fvu", "l0", "dead_fraction"),
        "latents": ("features", "rows"),
        "neurons": ("features", "rows"),
        "align": ("clips", "aligned", "failed", "words", "phones"),
        "moments": ("rows",),
        "features": ("rows",),
    }
    return {step: {name: answer[name] for name in names[step]} if step in names else answer for step, answer in kept.items()}


def results(place: Location) -> dict[str, bytes]:
    """The files whose bytes follow from the data alone."""
    shards = range(ActivationStore.open(place / "acts.zarr").axis(RESIDUAL).shards)
    names = [f"acts.zarr/{site}/{name}" for site in (RESIDUAL, NEURONS) for name in ("zarr.json", *(f"c/{shard}/0" for shard in shards))]
    names += ["acts.zarr/clips.parquet", "acts.zarr/skipped.parquet", "sae/sae.safetensors"]
    names += [f"acts.zarr/{table}.parquet" for table in ("words", "phones", "unaligned")]
    tables = ("features", "examples", "coactivation", "phone_scores", "phone_auc", "phone_counts", "phone_ranges")
    names += [f"{scan}/{table}.parquet" for scan in ("latents", "neurons") for table in tables]
    return {name: (place / name).read_bytes() for name in names}


@pytest.mark.slow
def test_the_whole_story_is_that_of_a_disk(s3: S3, tmp_path: Path, capsys, monkeypatch):
    remote = location(f"s3://{s3.bucket}/project")
    for place in (tmp_path, remote):
        speech_at(place / "speech")
    on_disk = story(capsys, tmp_path)
    s3.faults = dict.fromkeys(FAULTS, 0.02)
    # Training is stopped after its second checkpoint, by a store that refuses the third; then goes on from there.
    run(capsys, *cache(remote, "--no-ray"))
    checkpoints = iter([False, False])
    s3.refuses = lambda method, path: method == "PUT" and path.endswith("checkpoint.safetensors") and next(checkpoints, True)
    monkeypatch.setattr("cache.bucket.WHOLE_PUT_BYTES", 1 << 30)  # a checkpoint is one PUT
    assert main([str(argument) for argument in train(remote)]) == 1
    assert "checkpoint.safetensors: the object store refuses (AccessDenied" in capsys.readouterr().err
    s3.refuses = lambda method, path: False
    assert (remote / "sae" / "checkpoint.safetensors").is_file() and not (remote / "sae" / "train.json").exists()
    assert story(capsys, remote) == on_disk
    assert results(remote) == results(tmp_path)
    assert not (remote / "sae" / "checkpoint.safetensors").exists()
    assert [path.name for path in (remote / "sae" / "tb").iterdir()]
    assert sum(s3.injected.values()) > 20 and all(s3.injected[fault] for fault in FAULTS)
    page = run(capsys, "explore", remote / "latents", "--out", tmp_path / "page")
    assert Path(page["index"]).is_file() and page["clips_without_audio"] == 0


def test_what_can_not_work_says_so_in_a_line(s3: S3, tmp_path, capsys, monkeypatch):
    def refused(*arguments: Any) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "there is no bucket s3://nosuchbucket" in refused(*cache(location("s3://nosuchbucket/project"), "--no-ray"))
    capture = ("cache", "--dataset", "micro", "--model", "micro", "--sites", RESIDUAL, "--no-ray", "--out")
    assert "there is no bucket s3://nosuchbucket" in refused(*capture, "s3://nosuchbucket/acts.zarr")
    assert "there is no activation store at s3://" in refused("info", f"s3://{s3.bucket}/acts.zarr")
    assert "can't be used there: give a path of this machine" in refused("explore", "scan", "--out", f"s3://{s3.bucket}/page")
    assert "addresses begin with s3:// or gs://" in refused("verify", "ftp://host/acts.zarr")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "")
    assert "there are no credentials for s3://" in refused("verify", f"s3://{s3.bucket}/acts.zarr")


@pytest.mark.cluster
@pytest.mark.slow
def test_workers_on_ray_write_to_an_object_store(s3: S3, capsys):
    place = location(f"s3://{s3.bucket}/project")
    speech_at(place / "speech")
    s3.faults = dict.fromkeys(FAULTS, 0.02)
    done = run(capsys, *cache(place, "--workers", "2"))
    assert done["clips"] == CLIPS and done["skipped"] == 0 and done["shards_computed"] == done["shards"]
    found = run(capsys, "verify", place / "acts.zarr")
    assert found["ok"] and found["objects"] == 2 * done["shards"]
    assert sum(s3.injected.values())
