"""The main job through the command line: from speech to a page, on micro and the speech that comes with it."""

import json
from collections import Counter, defaultdict
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import soundfile

from cache import micro
from cache.store import ActivationStore
from cluster.cli import main

SITE, NEURONS, WORDS = "encoder.blocks.2", "encoder.blocks.2.mlp.1", "decoder.blocks.1"
WIDTH = {SITE: 96, NEURONS: 384, WORDS: 96}
CLIPS = {"train": 40, "test": 8}
EXAMPLE_COLUMNS = ["feature", "kind", "bin", "rank", "value", "clip", "frame", "start_s", "end_s", "text"]


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
    return Story(tmp_path_factory.mktemp("story"))


def frames(split: str) -> int:
    files = sorted((micro.SPEECH / split).glob("*.flac"))[: CLIPS[split]]
    return sum(-(-soundfile.info(file).frames // 320) for file in files)


@pytest.mark.parametrize("split", CLIPS)
def test_1_cache(story, capsys, split):
    out = story.root / f"{split}.zarr"
    said = story.tell(
        f"cache {split}", capsys, "cache", "--dataset", "micro", "--split", split, "--limit", CLIPS[split], "--model", "micro",
        "--sites", *WIDTH, "--out", out, "--chunk-rows", "512", "--no-ray",
    )  # fmt: skip
    assert {"store", "clips", "skipped", "frames", "shards", "shards_computed", "seconds", "sites"} <= said.keys()
    assert said["clips"] == CLIPS[split] and said["skipped"] == 0 and said["frames"] == frames(split)
    assert {name: site["width"] for name, site in said["sites"].items()} == WIDTH
    assert all(said["sites"][site]["bytes"] > 2 * WIDTH[site] * frames(split) for site in (SITE, NEURONS))
    assert story.tell("verify", capsys, "verify", out) == {"ok": True, "objects": len(WIDTH) * said["shards"], "bad": []}
    info = story.tell("info", capsys, "info", out)
    assert info["sites"][SITE]["rows"] == frames(split) and info["sites"][SITE]["committed"] == said["shards"]
    assert info["sites"][WORDS]["axis"] == "token" and 0 < info["sites"][WORDS]["rows"] < frames(split)
    assert info["model"]["name"] == "micro" and info["dataset"]["kind"] == "micro"


def test_2_train(story, capsys):
    said = story.tell(
        "train", capsys, "train", "--store", story.root / "train.zarr", "--site", SITE, "--d-sae", "768", "--k", "32", "--rows", "200000",
        "--out", story.root / "sae", "--threads", "1", "--device", "cpu",
    )  # fmt: skip
    (run,) = said["runs"]
    assert {"dir", "site", "arch", "d_sae", "k", "seed", "rows", "seconds", "rows_per_s", "wait_fraction"} <= run.keys()
    assert (run["site"], run["arch"], run["d_sae"], run["k"], run["seed"]) == (SITE, "batchtopk", 768, 32, 0)
    assert 200000 - 4096 < run["rows"] <= 200000
    assert (Path(run["dir"]) / "sae.safetensors").exists() and json.loads((Path(run["dir"]) / "config.json").read_text())["d_sae"] == 768


def test_3_evaluate(story, capsys):
    (run,) = story.said["train"]["runs"]
    (result,) = story.tell("evaluate", capsys, "evaluate", "--sae", run["dir"], "--store", story.root / "test.zarr")["results"]
    assert {"dir", "site", "rows", "l0", "fvu", "dead_fraction"} <= result.keys()
    assert result["dir"] == run["dir"] and result["site"] == SITE and result["rows"] == frames("test")
    assert 16 < result["l0"] < 48 and 0 < result["fvu"] < 0.3 and 0 <= result["dead_fraction"] < 0.5


@pytest.mark.parametrize("kind", ["neurons", "sae", "random"])
def test_4_scan(story, capsys, kind):
    spec = {"neurons": f"neurons:{NEURONS}", "sae": f"sae:{story.said['train']['runs'][0]['dir']}", "random": f"random:{SITE}"}[kind]
    out = story.root / f"scan-{kind}"
    said = story.tell(f"scan {kind}", capsys, "scan", "--store", story.root / "train.zarr", "--features", spec, "--out", out, "--no-ray")
    count = {"neurons": 384, "sae": 768, "random": 96}[kind]
    assert said.keys() >= {"dir", "features", "rows", "seconds"}
    assert (said["dir"], said["features"], said["rows"]) == (str(out), count, frames("train"))

    features = pq.read_table(out / "features.parquet")
    assert {"feature", "density", "mean", "std", "max", "min", "hist_lo", "hist_hi", "hist_count"} <= set(features.column_names)
    assert features["feature"].to_pylist() == list(range(count)) and set(features["rows"].to_pylist()) == {frames("train")}
    examples = pq.read_table(out / "examples.parquet")
    assert [name for name in EXAMPLE_COLUMNS if name in examples.column_names] == EXAMPLE_COLUMNS
    assert set(examples["kind"].to_pylist()) == {"top", "range", "quantile"} | ({"bottom"} if kind != "sae" else set())
    highest = dict(zip(features["feature"].to_pylist(), features["max"].to_pylist(), strict=True))
    for row in examples.to_pylist():
        assert row["value"] <= highest[row["feature"]] * (1 + 1e-6)
        assert row["end_s"] == pytest.approx(row["start_s"] + 0.02) and row["start_s"] == pytest.approx(0.02 * row["frame"])
        assert row["text"]


def neurons_of_one_phone(story: Story, seconds_later: float) -> int:
    """How many neurons have one phone, by the corpus's own times, at six or more of their ten strongest moments; or at that time after them."""
    alignments = map(json.loads, (micro.SPEECH / "alignments.jsonl").read_text().splitlines())
    phones = {row["file_name"]: row["phones"] for row in alignments}
    sources = ActivationStore.open(story.root / "train.zarr").clips["source"].to_pylist()
    said: dict[int, Counter[str]] = defaultdict(Counter)
    for row in pq.read_table(story.root / "scan-neurons" / "examples.parquet").to_pylist():
        if row["kind"] == "top" and row["rank"] < 10:
            time = row["start_s"] + 0.01 + seconds_later
            said[row["feature"]].update(phone for start, end, phone in phones[sources[row["clip"]]] if start <= time < end and phone != "SIL")
    return sum(max(counts.values(), default=0) >= 6 for counts in said.values())


def test_5_the_strongest_moments_of_neurons_are_phones(story):
    """The known truth: micro was trained to tell phones apart, so its neurons follow them, at the very moments that the scan names."""
    assert neurons_of_one_phone(story, seconds_later=0.0) >= 50
    assert neurons_of_one_phone(story, seconds_later=0.3) <= 4


def test_6_query_a_feature_and_then_one_of_its_moments(story, capsys):
    features = pq.read_table(story.root / "scan-sae" / "features.parquet").to_pylist()
    latent = max(features, key=lambda row: row["max"])["feature"]
    rows = story.tell("query", capsys, "query", "--scan", story.root / "scan-sae", "--feature", latent, "--kind", "top")["rows"]
    assert set(EXAMPLE_COLUMNS) <= rows[0].keys() and {row["kind"] for row in rows} == {"top"}
    assert [row["value"] for row in rows] == sorted((row["value"] for row in rows), reverse=True)
    assert rows[0]["source"].startswith("train/")
    moment = ["--clip", rows[0]["clip"], "--time", rows[0]["start_s"] + 0.01]
    there = story.tell("query", capsys, "query", "--scan", story.root / "scan-sae", *moment, "--n", 768)["rows"]
    assert {"feature", "value"} <= there[0].keys()
    assert {row["feature"]: row["value"] for row in there}[latent] == pytest.approx(rows[0]["value"], rel=1e-4)


def test_7_explore(story, capsys):
    scans = [story.root / "scan-neurons", story.root / "scan-sae"]
    said = story.tell("explore", capsys, "explore", *scans, "--out", story.root / "page")
    assert (story.root / "page" / "index.html").read_text().lstrip().lower().startswith("<!doctype html>")
    assert said["features"] == 384 + 768 and said["clips"] == CLIPS["train"] and said["clips_without_audio"] == 0
    files = [path for path in (story.root / "page").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) == said["bytes"]


def test_8_every_command_says_it_to_people_too(story, capsys):
    root = story.root
    dry = ["--dataset", "micro", "--model", "micro", "--sites", "encoder.blocks.*", "--out", root / "no", "--dry-run", "--calibrate", "1"]
    commands = {
        "info": [root / "train.zarr"],
        "verify": [root / "train.zarr"],
        "repair": [root / "train.zarr"],
        "evaluate": ["--sae", root / "sae", "--store", root / "test.zarr"],
        "query": ["--scan", root / "scan-sae", "--feature", "0"],
        "cache": dry,
    }
    for name, arguments in commands.items():
        assert main([name, *map(str, arguments)]) == 0, name
        out, err = capsys.readouterr()
        assert out.strip() and not out.startswith("{") and "Traceback" not in err
    assert not (root / "no").exists()
