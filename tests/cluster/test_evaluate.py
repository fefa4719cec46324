"""`hearsae evaluate`: what it says, to people and to programs, and what it leaves."""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import fill_store, plan_of

sys.path.append(str(Path(__file__).parents[1] / "sae"))
from planted_rows import D_IN, OTHER, SITE, planted_rows, planted_store

from cache.location import location, names_below, put
from cache.store import ActivationStore
from cluster.cli import main
from sae.baselines import baselines
from sae.card import model_card
from sae.metrics import evaluate
from sae.models import Dictionary, SaeConfig, load_dictionary
from sae.similarity import stability
from sae.train import train
from sae.train_config import TrainConfig


class Bench(NamedTuple):
    """What the tests start from. Not to be written to, but for `--save` where a test says so."""

    train: ActivationStore
    test: ActivationStore
    root: Path

    def saes(self, *names: str) -> list[Path]:
        return [self.root / name for name in names]


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    root = tmp_path_factory.mktemp("bench")
    train = planted_store(root / "train.zarr", seconds=60.0)
    plan = plan_of([9.0] * 5, chunk_rows=128, shard_rows=1024)
    test = fill_store(root / "test.zarr", plan, {SITE: D_IN, OTHER: D_IN}, lambda site, clip, n: planted_rows(site, clip + 100, n), skip={3: "noise"})
    bench = Bench(train, test, root)
    for name, seed in (("a", 0), ("b", 1)):
        make(bench, name, seed=seed)
    make(bench, "wide", d_sae=70)
    make(bench, "half-dead", seed=2)
    half_dead = load_dictionary(root / "half-dead")
    half_dead.b_enc[:25] = -100.0
    half_dead.save(root / "half-dead")
    make(bench, "transcoder", target=OTHER)
    make(bench, "crosscoder", site=f"{SITE}+{OTHER}", d_in=2 * D_IN, widths=(D_IN, D_IN))
    return bench


def make(bench: Bench, name: str, **settings) -> None:
    """An SAE as it is before training, in units of the rows."""
    config = {"arch": "batchtopk", "d_in": D_IN, "d_sae": 50, "k": 3, "site": SITE, "model_sha256": bench.test.header.model["sha256"]} | settings
    sae = Dictionary(SaeConfig(**config))
    sae.init_parameters(torch.Generator().manual_seed(sae.config.seed))
    sae.b_dec.data.fill_(5.0)
    if sae.config.target:
        sae.b_enc.data -= 5.0 * sae.W_enc.data.sum(0)
    sae.threshold.fill_(0.7)
    sae.save(bench.root / name)


def run(capfd, *arguments: Any) -> tuple[int, str, str]:
    capfd.readouterr()
    status = main(["evaluate", *map(str, arguments)])
    return (status, *capfd.readouterr())


def answer(capfd, *arguments: Any) -> dict[str, Any]:
    status, out, err = run(capfd, *arguments, "--json")
    assert status == 0, err
    return json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_it_answers_what_the_functions_measure(bench, capfd):
    result = answer(capfd, "--sae", *bench.saes("a", "crosscoder"), "--store", bench.test.path)
    assert result.keys() == {"results"}
    for one, name in zip(result["results"], ("a", "crosscoder"), strict=True):
        expected = json.loads(json.dumps(evaluate(load_dictionary(bench.root / name), bench.test).to_json()))
        assert expected.items() <= one.items()
        assert one["dir"] == str(bench.root / name)
    assert [(one["kind"], one["d_sae"], one["seed"]) for one in result["results"]] == [("sae", 50, 0), ("crosscoder", 50, 0)]


def test_the_folder_of_a_grid_stands_for_all_of_its_saes(bench, tmp_path, capfd):
    recipe = {"batch": 256, "rows": 256 * 4, "threads": 1, "quiet": True, "plots": False}
    train(TrainConfig((bench.train.path,), (SITE,), tmp_path / "grid", d_sae=(32,), k=(2, 3), **recipe))
    result = answer(capfd, "--sae", tmp_path / "grid", bench.root / "a", "--store", bench.test.path)
    assert [(one["d_sae"], one["k"]) for one in result["results"]] == [(32, 2), (32, 3), (50, 3)]
    assert Path(result["results"][0]["dir"]).parent == tmp_path / "grid"


def test_baselines_and_stability_stand_beside_it(bench, capfd):
    asked = ("--baselines", "--train-store", bench.train.path, "--stability")
    result = answer(capfd, "--sae", *bench.saes("a", "wide", "b", "transcoder"), "--store", bench.test.path, *asked)
    ks = sorted({one["k"] for one in result["baselines"]})
    assert set(ks) == {1, 2, 4, 8, 16} | {round(one["l0"]) for one in result["results"][:3]}
    expected = baselines(bench.test, bench.train, SITE, ks)
    assert result["baselines"] == [one._asdict() for one in expected]

    measured = result["results"]
    pair = stability([load_dictionary(bench.root / name) for name in "ab"], [np.ones(50)] * 2)[0]
    assert [(one["a"], one["b"]) for one in result["stability"]] == [(measured[0]["dir"], measured[2]["dir"])]
    assert measured[0]["dead_fraction"] == measured[2]["dead_fraction"] == 0
    assert result["stability"][0]["mean_max_cosine_a"] == pytest.approx(pair.mean_max_cosine_a)


def test_latents_that_never_fired_are_left_out_of_stability(bench, capfd):
    (pair,) = answer(capfd, "--sae", *bench.saes("a", "half-dead"), "--store", bench.test.path, "--stability")["stability"]
    assert (pair["latents_a"], pair["latents_b"]) == (50, 25)


def test_people_get_aligned_tables(bench, capfd):
    asked = ("--baselines", "--train-store", bench.train.path, "--stability")
    status, out, _ = run(capfd, "--sae", *bench.saes("a", "b"), "--store", bench.test.path, *asked)
    assert status == 0
    measured, compared, again = (part.splitlines() for part in out.split("\n\n"))
    assert measured[0] == f"{SITE}, 1800 rows:"
    result = evaluate(load_dictionary(bench.root / "a"), bench.test)
    assert measured[2].split()[:3] == [str(bench.root / "a"), f"{result.l0:.1f}", f"{result.fvu:.4f}"]
    for column in ("FVU", "dense", "near-duplicates"):
        end = measured[1].index(column) + len(column)
        assert all(line[end - 1] != " " and line[end : end + 1] in ("", " ") for line in measured[2:]), column
    assert compared[0].startswith(SITE) and len(compared) == 2 + len({1, 2, 4, 8, 16, round(result.l0)})
    assert [line.split()[:2] for line in again[1:]] == [[str(x), str(y)] for x, y in (bench.saes("a", "b"), bench.saes("b", "a"))]


def test_several_sites_are_told_apart(bench, capfd):
    status, out, _ = run(capfd, "--sae", *bench.saes("a", "transcoder", "crosscoder"), "--store", bench.test.path)
    lines = out.splitlines()
    assert status == 0 and len(lines) == 5
    assert f" {SITE} to {OTHER} " in lines[2]
    assert lines[4].startswith(f"{bench.root / 'crosscoder'}: FVU {SITE} ") and f", {OTHER} " in lines[4]


def test_what_it_found_is_kept(bench, tmp_path, capfd):
    asked = ("--baselines", "--train-store", bench.train.path, "--out", tmp_path / "out", "--save")
    result = answer(capfd, "--sae", *bench.saes("a", "wide"), "--store", bench.test.path, *asked)
    kept = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert result.items() <= kept.items()
    assert (kept["store"], kept["plan_hash"]) == ("test.zarr", bench.test.header.plan["hash"])
    for path in (tmp_path / "out" / "plots" / "density.png", tmp_path / "out" / "plots" / "pareto.png", bench.root / "a" / "plots" / "density.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    for folder, one in zip(bench.saes("a", "wide"), result["results"], strict=True):
        beside = json.loads((folder / "evaluation.json").read_text())
        config = ("kind", "arch", "d_sae", "k", "sparsity", "seed")
        assert beside == {key: value for key, value in (kept | one).items() if key not in ("dir", "results", "baselines", *config)}
        assert f"| fraction of variance unexplained | {one['fvu']:.4g} |" in model_card(folder)


def test_all_of_it_may_lie_in_an_object_store(bench, s3, capfd):
    place = location(f"s3://{s3.bucket}")
    for root in (bench.test.path, bench.root / "a"):
        for name in names_below(root):
            put(place / root.name / name, (root / name).read_bytes())
    result = answer(capfd, "--sae", place / "a", "--store", place / "test.zarr", "--out", place / "out", "--save")
    assert json.loads((place / "out" / "evaluation.json").read_bytes())["results"] == result["results"]
    assert json.loads((place / "a" / "evaluation.json").read_bytes())["fvu"] == evaluate(load_dictionary(bench.root / "a"), bench.test).fvu
    for path in (place / "a" / "plots" / "density.png", place / "out" / "plots" / "density.png", place / "out" / "plots" / "pareto.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_rows_without_spread_are_no_reason_to_fail(bench, tmp_path, capfd):
    plan = plan_of([4.0] * 2, chunk_rows=128, shard_rows=512)
    fill_store(tmp_path / "equal.zarr", plan, {SITE: D_IN}, lambda site, clip, n: np.full((n, D_IN), 0.1))
    asked = ("--sae", *bench.saes("a", "b"), "--store", tmp_path / "equal.zarr", "--baselines", "--train-store", bench.train.path)
    result = answer(capfd, *asked, "--out", tmp_path / "out")
    assert {one["fvu"] for one in (*result["results"], *result["baselines"])} == {None}
    status, out, _ = run(capfd, *asked)
    assert status == 0 and "none" in out


def test_nothing_is_kept_unless_asked_for(bench, capfd):
    before = sorted(bench.root.rglob("*"))
    assert run(capfd, "--sae", *bench.saes("b"), "--store", bench.test.path)[0] == 0
    assert sorted(bench.root.rglob("*")) == before


@pytest.mark.parametrize(
    ("saes", "more", "words"),
    [
        (["a"], ["--baselines"], "--baselines and --train-store go together"),
        (["a"], ["--train-store", "train.zarr"], "--baselines and --train-store go together"),
        (["transcoder"], ["--baselines", "--train-store", "train.zarr"], "none of these is an SAE of one"),
        (["a", "wide"], ["--stability"], "at least two SAEs that differ in their seed alone"),
        ([], [], "--sae: give the folder of at least one SAE"),
        (["a", "gone"], [], "there is no SAE in"),
    ],
)
def test_what_can_not_work_is_said_in_one_line(bench, capfd, monkeypatch, saes, more, words):
    monkeypatch.chdir(bench.root)
    status, out, err = run(capfd, "--sae", *saes, "--store", "test.zarr", *more)
    assert (status, out) == (1, "")
    assert words in err and err.count("\n") == 1
