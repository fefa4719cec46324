"""The main job through the command line: from a folder of sound to a page, on a Whisper of random weights."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
from conftest import write_tiny_whisper

from cluster.cli import main

SITE, NEURONS = "encoder.blocks.1", "encoder.blocks.1.mlp.1"
EXAMPLE_COLUMNS = ["feature", "kind", "bin", "rank", "value", "clip", "frame", "start_s", "end_s", "text"]
SECONDS = [2.0 + 0.37 * i for i in range(12)]


class Story:
    """Runs commands with --json in one folder and remembers what each said."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.said: dict[str, dict] = {}

    def tell(self, name: str, capsys, *arguments: str) -> dict:
        capsys.readouterr()
        status = main([*map(str, arguments), "--json"])
        out, err = capsys.readouterr()
        assert status == 0, err
        assert len(out.splitlines()) == 1
        self.said[name] = json.loads(out)
        return self.said[name]


@pytest.fixture(scope="module")
def story(tmp_path_factory) -> Story:
    """A folder with `sound/train` (12 clips of tones that come and go, with texts), `sound/test` (4 of them) and `tiny.pt`."""
    root = tmp_path_factory.mktemp("story")
    rng = np.random.default_rng(0)
    for split, seconds in (("train", SECONDS), ("test", SECONDS[:4])):
        (root / "sound" / split).mkdir(parents=True)
        lines = []
        for i, s in enumerate(seconds):
            t = np.arange(round(s * 16000)) / 16000
            tone = 0.2 * np.sin(2 * np.pi * (200 + 90 * i) * t) * (np.sin(2 * np.pi * 1.5 * t) > 0)
            name = f"{split}{i:02d}.wav"
            soundfile.write(root / "sound" / split / name, tone + 0.01 * rng.standard_normal(len(t)), 16000)
            lines.append(json.dumps({"file_name": name, "text": f"tone of {200 + 90 * i} <Hz>", "speaker": f"s{i % 3}"}))
        (root / "sound" / split / "metadata.jsonl").write_text("\n".join(lines))
    write_tiny_whisper(root / "tiny.pt")
    return Story(root)


def frames(seconds: list[float]) -> int:
    return sum(-(-round(s * 16000) // 320) for s in seconds)


@pytest.mark.parametrize(("split", "seconds"), [("train", SECONDS), ("test", SECONDS[:4])])
def test_1_cache(story, capsys, split, seconds):
    root = story.root
    said = story.tell(
        f"cache {split}", capsys, "cache", "--dataset", root / "sound", "--split", split, "--model", root / "tiny.pt", "--sites", SITE, NEURONS,
        "--out", root / f"{split}.zarr", "--chunk-rows", "128", "--no-ray",
    )  # fmt: skip
    assert {"store", "clips", "skipped", "frames", "shards", "shards_computed", "seconds", "sites"} <= said.keys()
    assert said["clips"] == len(seconds) and said["skipped"] == 0 and said["frames"] == frames(seconds)
    assert said["sites"].keys() == {SITE, NEURONS} and said["sites"][NEURONS]["width"] == 128
    assert all(site.keys() >= {"width", "bytes"} and site["bytes"] > 2 * site["width"] * frames(seconds) for site in said["sites"].values())
    assert story.tell("verify", capsys, "verify", root / f"{split}.zarr") == {"ok": True, "objects": 2 * said["shards"], "bad": []}
    info = story.tell("info", capsys, "info", root / f"{split}.zarr")
    assert info["sites"][SITE]["rows"] == frames(seconds) and info["sites"][SITE]["committed"] == said["shards"]


def test_2_train(story, capsys):
    said = story.tell(
        "train", capsys, "train", "--store", story.root / "train.zarr", "--site", SITE, "--d-sae", "64", "--k", "8", "--rows", "40960",
        "--batch", "512", "--out", story.root / "sae", "--threads", "1", "--device", "cpu",
    )  # fmt: skip
    (run,) = said["runs"]
    assert {"dir", "site", "arch", "d_sae", "k", "seed", "rows", "seconds", "rows_per_s", "wait_fraction"} <= run.keys()
    assert (run["site"], run["arch"], run["d_sae"], run["k"], run["seed"]) == (SITE, "batchtopk", 64, 8, 0)
    assert run["rows"] == 40960
    assert (Path(run["dir"]) / "sae.safetensors").exists() and json.loads((Path(run["dir"]) / "config.json").read_text())["d_sae"] == 64


def test_3_evaluate(story, capsys):
    (run,) = story.said["train"]["runs"]
    (result,) = story.tell("evaluate", capsys, "evaluate", "--sae", run["dir"], "--store", story.root / "test.zarr")["results"]
    assert {"dir", "site", "rows", "l0", "fvu", "dead_fraction"} <= result.keys()
    assert result["dir"] == run["dir"] and result["site"] == SITE and result["rows"] == frames(SECONDS[:4])
    assert 0 < result["l0"] < 16 and 0 < result["fvu"] < 0.5 and 0 <= result["dead_fraction"] < 0.9


@pytest.mark.parametrize("kind", ["neurons", "sae", "random"])
def test_4_scan(story, capsys, kind):
    spec = {"neurons": f"neurons:{NEURONS}", "sae": f"sae:{story.said['train']['runs'][0]['dir']}", "random": f"random:{SITE}"}[kind]
    out = story.root / f"scan-{kind}"
    said = story.tell(f"scan {kind}", capsys, "scan", "--store", story.root / "train.zarr", "--features", spec, "--out", out, "--no-ray")
    count = {"neurons": 128, "sae": 64, "random": 32}[kind]
    assert said.keys() >= {"dir", "features", "rows", "seconds"}
    assert (said["dir"], said["features"], said["rows"]) == (str(out), count, frames(SECONDS))

    features = pq.read_table(out / "features.parquet")
    assert {"feature", "density", "mean", "std", "max", "min", "hist_lo", "hist_hi", "hist_count"} <= set(features.column_names)
    assert features["feature"].to_pylist() == list(range(count)) and set(features["rows"].to_pylist()) == {frames(SECONDS)}
    examples = pq.read_table(out / "examples.parquet")
    assert [name for name in EXAMPLE_COLUMNS if name in examples.column_names] == EXAMPLE_COLUMNS
    assert set(examples["kind"].to_pylist()) == {"top", "range", "quantile"}
    highest = dict(zip(features["feature"].to_pylist(), features["max"].to_pylist(), strict=True))
    for row in examples.to_pylist():
        assert row["value"] <= highest[row["feature"]] * (1 + 1e-6)
        assert row["end_s"] == pytest.approx(row["start_s"] + 0.02) and row["start_s"] == pytest.approx(0.02 * row["frame"])
        assert row["text"].startswith("tone of ")


def test_5_query_a_feature_and_then_one_of_its_moments(story, capsys):
    features = pq.read_table(story.root / "scan-sae" / "features.parquet").to_pylist()
    latent = max(features, key=lambda row: row["max"])["feature"]
    rows = story.tell("query", capsys, "query", "--scan", story.root / "scan-sae", "--feature", latent, "--kind", "top")["rows"]
    assert set(EXAMPLE_COLUMNS) <= rows[0].keys() and {row["kind"] for row in rows} == {"top"}
    assert [row["value"] for row in rows] == sorted((row["value"] for row in rows), reverse=True)
    assert rows[0]["source"].startswith("train/train")
    moment = ["--clip", rows[0]["clip"], "--time", rows[0]["start_s"] + 0.01]
    there = story.tell("query", capsys, "query", "--scan", story.root / "scan-sae", *moment, "--n", 64)["rows"]
    assert {"feature", "value"} <= there[0].keys()
    assert {row["feature"]: row["value"] for row in there}[latent] == pytest.approx(rows[0]["value"], rel=1e-4)


def test_6_explore(story, capsys):
    scans = [story.root / "scan-neurons", story.root / "scan-sae"]
    said = story.tell("explore", capsys, "explore", *scans, "--out", story.root / "page")
    assert (story.root / "page" / "index.html").read_text().lstrip().lower().startswith("<!doctype html>")
    assert said["features"] == 128 + 64 and said["clips"] == len(SECONDS) and said["clips_without_audio"] == 0
    files = [path for path in (story.root / "page").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) == said["bytes"]
    assert not any(b"<Hz>" in path.read_bytes() for path in files if path.suffix == ".html")


def test_7_every_command_says_it_to_people_too(story, capsys):
    root = story.root
    commands = {
        "info": ["info", root / "train.zarr"],
        "verify": ["verify", root / "train.zarr"],
        "repair": ["repair", root / "train.zarr"],
        "evaluate": ["evaluate", "--sae", root / "sae", "--store", root / "test.zarr"],
        "query": ["query", "--scan", root / "scan-sae", "--feature", "0"],
        "cache": [
            "cache",
            "--dataset",
            root / "sound",
            "--model",
            root / "tiny.pt",
            "--sites",
            "encoder.blocks.*",
            "--out",
            root / "no",
            "--dry-run",
        ],
    }
    for name, command in commands.items():
        assert main([*map(str, command)]) == 0, name
        out, err = capsys.readouterr()
        assert out.strip() and not out.startswith("{") and "Traceback" not in err
    assert not (root / "no").exists()
