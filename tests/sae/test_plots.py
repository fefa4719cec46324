"""What is drawn is what was measured; pictures land beside the run, wherever that is."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image
from planted_rows import SITE, planted_store

from cache.errors import HearsaeError
from cache.location import Location, location, put
from cache.store import ActivationStore
from sae.baselines import Baseline
from sae.metrics import DENSITY_EDGES, evaluate
from sae.models import load_dictionary
from sae.plots import COLOURS, Curve, density_figure, pareto_figure, read_curves, save_density, save_pareto, save_run_plots, training_figure
from sae.train import train
from sae.train_config import TrainConfig

SMALL = {"batch": 256, "rows": 256 * 40, "threads": 1, "plots": False, "quiet": True, "log_every": 512}


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> ActivationStore:
    return planted_store(tmp_path_factory.mktemp("planted") / "acts.zarr", seconds=100.0)


def run_in(folder: Location, store: ActivationStore, **settings) -> None:
    train(TrainConfig(**{"store": (store.path,), "site": (SITE,), "out": folder, "d_sae": (32,), "k": (3,)} | SMALL | settings))


def sae(l0: float, fvu: float | None, **named) -> dict:
    return {"site": SITE, "target": SITE, "arch": "batchtopk", "d_sae": 64, "k": round(l0), "seed": 0, "l0": l0, "fvu": fvu} | named


def measured(**named) -> dict:
    count = np.zeros(len(DENSITY_EDGES) - 1, dtype=int)
    count[20:25] = [1, 5, 9, 4, 2]
    return sae(4.0, 0.1) | {"rows": 1000, "dead_fraction": 0.25, "density_edges": DENSITY_EDGES.tolist(), "density_count": count.tolist()} | named


def png(path: Location) -> np.ndarray:
    """[height, width, 3]; it is not blank, and nothing touches its border."""
    pixels = np.asarray(Image.open(io.BytesIO(path.read_bytes())).convert("RGB"))
    assert min(pixels.shape[:2]) > 400
    assert (pixels < 128).any()
    for border in (pixels[:3], pixels[-3:], pixels[:, :3], pixels[:, -3:]):
        assert (border == 255).all(), "something is cut off"
    return pixels


def lines(axes) -> dict[str, list[tuple[float, float]]]:
    return {line.get_label(): [tuple(point) for point in line.get_xydata()] for line in axes.get_lines()}


def test_pareto_joins_saes_that_differ_in_sparsity_alone():
    results = [
        sae(8, 0.2),
        sae(4, 0.4),
        sae(4, 0.3, d_sae=128),
        sae(16, 0.1),
        sae(5, None),
        sae(6, 0.5, seed=1),
        sae(9, 0.7, site="other", target="other"),
    ]
    named = [Baseline(SITE, "pca", k, 100, fvu) for k, fvu in ((8, 0.5), (2, 0.8), (64, 1e-9))]
    figure = pareto_figure(results, [*named, Baseline("other", "random", 3, 100, 0.9)])
    here, other = figure.axes
    assert (here.get_title(), other.get_title()) == (SITE, "other")
    drawn = lines(here)
    assert drawn["batchtopk, 64 latents"] == [(4, 0.4), (8, 0.2), (16, 0.1)]
    assert drawn["batchtopk, 128 latents"] == [(4, 0.3)]
    assert drawn["PCA, first k"] == [(2, 0.8), (8, 0.5)], "what keeps everything is off the scale"
    assert [(6, 0.5)] in drawn.values(), "another seed is another line"
    assert lines(other) == {"random basis, k largest": [(3, 0.9)], "batchtopk, 64 latents": [(9, 0.7)]}
    assert (here.get_xscale(), here.get_yscale()) == ("log", "log")
    assert "L0" in here.get_xlabel() and here.get_ylabel() == "FVU"
    colours = {line.get_label(): to_hex(line.get_color()).upper() for line in here.get_lines()}
    assert colours["batchtopk, 64 latents"] != colours["batchtopk, 128 latents"]
    assert colours["PCA, first k"] not in COLOURS


def test_a_transcoder_has_a_panel_of_its_own():
    figure = pareto_figure([sae(4, 0.2), sae(4, 0.3, target="encoder.blocks.1")])
    assert [axes.get_title() for axes in figure.axes] == [SITE, f"{SITE} to encoder.blocks.1"]


def test_densities_are_the_bins_that_were_counted():
    (axes,) = density_figure([measured(), measured(seed=1, dead_fraction=0.0)]).axes
    first, second = axes.patches
    assert first.get_data().values.tolist() == measured()["density_count"]
    np.testing.assert_allclose(np.log10(first.get_data().edges), DENSITY_EDGES)
    assert first.get_label() == "batchtopk, 64 latents, k 4, seed 0\n25.0% never fired"
    assert first.get_edgecolor() == second.get_edgecolor() and first.get_linestyle() != second.get_linestyle()
    assert axes.get_xscale() == "log"
    low, high = axes.get_xlim()
    assert low < 10.0 ** DENSITY_EDGES[20] and high == 1.0


def test_saes_are_told_apart_by_what_differs_in_a_panel_for_each_site():
    saes = [measured(), measured(k=0, arch="relu", sparsity=2.0), measured(k=8, arch="jumprelu", sparsity=1.0), measured(target="other")]
    here, other = density_figure(saes).axes
    assert [patch.get_label().partition("\n")[0] for patch in here.patches] == [
        "batchtopk, 64 latents, k 4, seed 0",
        "relu, 64 latents, sparsity 2, seed 0",
        "jumprelu, 64 latents, k 8, seed 0",
    ]
    assert len({patch.get_edgecolor() for patch in here.patches}) == 3
    assert other.get_title() == f"{SITE} to other, 1,000 rows"
    assert [patch.get_label() for patch in other.patches] == ["batchtopk, 64 latents, k 4\n25.0% never fired"]


def test_names_stand_as_they_are():
    figure = density_figure([measured(site="$x^2$", target="$x^2$")])
    assert figure.axes[0].get_title() == r"\$x^2\$, 1,000 rows", "no formula"


def test_training_curves_have_a_panel_each():
    rows = np.arange(1, 4) * 100
    curves = {"fvu": Curve(rows, np.array([0.5, 0.2, 0.1])), "dead": Curve(rows, np.array([0.0, 0.0, 0.02])), "aux_loss": Curve(rows, np.zeros(3))}
    figure = training_figure([(sae(4, 0.1), curves), (sae(4, 0.1, seed=1), {"fvu": curves["fvu"]})])
    fvu, dead = (axes for axes in figure.axes if axes.get_ylabel())
    assert "FVU" in fvu.get_ylabel() and fvu.get_yscale() == "log" and fvu.get_xlabel() == "rows"
    assert list(lines(fvu)) == ["batchtopk, 64 latents, k 4, seed 0", "batchtopk, 64 latents, k 4, seed 1"]
    assert dead.get_ylabel() == "dead latents (%)"
    assert lines(dead)["batchtopk, 64 latents, k 4, seed 0"] == [(100, 0), (200, 0), (300, 2)]


def test_saved_pictures_are_whole_and_the_same_each_time(tmp_path):
    results = [measured(), measured(l0=16.0, fvu=0.05), measured(arch="relu", k=0, l0=30.0, fvu=0.2)]
    for name in ("a.png", "b.png"):
        save_pareto(results, tmp_path / name, [Baseline(SITE, "neurons", k, 100, 1 / k) for k in (2, 4, 8)])
        save_density(results, tmp_path / f"density-{name}")
    pixels = png(tmp_path / "a.png")
    png(tmp_path / "density-a.png")
    save_density([*results, *(measured(site=f"encoder.blocks.{i}.mlp.1", target=f"encoder.blocks.{i}.mlp_ln") for i in range(3))], tmp_path / "c.png")
    png(tmp_path / "c.png")
    always = [0] * (len(DENSITY_EDGES) - 2) + [9]
    save_density([measured(density_count=always), measured(density_count=[0] * len(always), seed=1)], tmp_path / "always.png")
    png(tmp_path / "always.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    for colour in COLOURS[:2]:
        wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (pixels == wanted).all(axis=2).any(), "each has its colour"


def test_a_finished_run_gets_its_pictures(planted, tmp_path):
    run_in(tmp_path / "run", planted)
    assert save_run_plots(tmp_path / "run") == [tmp_path / "run" / "plots" / "training.png"]
    png(tmp_path / "run" / "plots" / "training.png")
    curves = read_curves(tmp_path / "run")
    assert curves["l0"].rows.tolist() == list(range(512, 256 * 40 + 1, 512))
    assert curves["l0"].value == pytest.approx(3.0)

    evaluation = evaluate(load_dictionary(tmp_path / "run"), planted).to_json()
    put(tmp_path / "run" / "evaluation.json", json.dumps(evaluation).encode())
    assert [path.name for path in save_run_plots(tmp_path / "run")] == ["training.png", "density.png"]
    png(tmp_path / "run" / "plots" / "density.png")


def test_a_grid_gets_those_of_each_and_of_all(planted, tmp_path):
    out = tmp_path / "grid"
    run_in(out, planted, k=(2, 4), d_sae=(32, 48))
    drawn = {path.relative_to(out).as_posix() for path in save_run_plots(out)}
    of_each = {f"{SITE}-batchtopk-{d_sae}-k{k}-seed0/plots/training.png" for d_sae in (32, 48) for k in (2, 4)}
    assert drawn == of_each | {"plots/training.png", "plots/pareto.png"}
    for path in drawn:
        png(out / path)


def test_runs_in_an_object_store(planted, tmp_path, s3):
    out = location(f"s3://{s3.bucket}/grid")
    run_in(out, planted, k=(2, 4))
    drawn = save_run_plots(out)
    assert len(drawn) == 4
    for path in drawn:
        png(path)


def test_what_can_not_be_drawn_is_said_in_one_line(tmp_path):
    with pytest.raises(HearsaeError, match=r"there is no finished run in .*: train.json is missing"):
        save_run_plots(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert save_run_plots(tmp_path) == [], "an SAE without a log has nothing to draw"
    for damaged in ('{"site": "x"}', '{"site": "x", "density_count": 3', "[]", json.dumps(measured(density_count="none"))):
        (tmp_path / "evaluation.json").write_text(damaged)
        with pytest.raises(HearsaeError, match=r"evaluation\.json is damaged"):
            save_run_plots(tmp_path)


def test_matplotlib_is_loaded_only_where_something_is_drawn():
    code = "import sys, sae.plots, cluster.commands.evaluate; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0


def test_a_run_that_names_another_folder_does_not_lead_out_of_its_own(planted, tmp_path):
    out, outside = tmp_path / "grid", tmp_path / "outside"
    run_in(out, planted, k=(2, 4))
    run_in(outside, planted)
    result = json.loads((out / "train.json").read_text())
    result["runs"][0]["dir"] = str(outside)
    result["runs"][1]["dir"] = ".."
    (out / "train.json").write_text(json.dumps(result))
    with pytest.raises(HearsaeError, match="names no SAE in it"):
        save_run_plots(out)
    assert not (outside / "plots").exists() and not (Path(tmp_path) / "plots").exists()
