"""`export`, `import`, `push` and `pull`: what they print, and what they refuse."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cache.model import load_model
from cluster.cli import main
from sae.models import Dictionary, SaeConfig, load_dictionary

SITE, INPUT, OUTPUT = "encoder.blocks.1", "encoder.blocks.1.mlp_ln", "encoder.blocks.1.mlp"
WIDTH = 32


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_whisper) -> Path:
    return tiny_whisper(tmp_path_factory.mktemp("model") / "m.pt", encoder_only=True)


def save(folder: Path, arch: str = "topk", **settings: Any) -> Path:
    sae = Dictionary(SaeConfig(arch, WIDTH, 64, 4 if arch == "topk" else 0, **{"site": SITE} | settings)).requires_grad_(False)
    sae.init_parameters(torch.Generator().manual_seed(0))
    sae.save(folder)
    return folder


@pytest.mark.parametrize("form", ["saelens", "dictionary_learning", "sparsify"])
def test_an_sae_goes_out_and_comes_back(form, model, tmp_path, succeeds, capfd):
    sae = save(tmp_path / "sae", model_sha256=load_model(str(model), "cpu").sha256, rows=5)
    result = succeeds("export", "--sae", sae, "--format", form, "--out", tmp_path / "theirs")
    assert (result["format"], result["arch"], result["site"], len(result["files"])) == (form, "topk", SITE, 2)
    result = succeeds("import", "--format", form, "--source", tmp_path / "theirs", "--out", tmp_path / "back", "--model", model)
    assert (result["arch"], result["kind"], result["site"], result["k"], result["d_sae"]) == ("topk", "sae", SITE, 4, 64)
    assert result["decoder_norms"] == pytest.approx([1, 1])
    assert load_dictionary(tmp_path / "back").config == load_dictionary(sae).config
    assert main(["import", "--format", form, "--source", str(tmp_path / "theirs"), "--out", str(tmp_path / "again")]) == 0
    assert capfd.readouterr().out == f"{tmp_path / 'again'}: topk SAE of {SITE}, 32 -> 64 latents\n"


def test_an_sae_of_others_gets_its_site_and_model(model, tmp_path, succeeds):
    theirs = exported(tmp_path, save(tmp_path / "sae", "relu", site=INPUT, target=OUTPUT, d_out=WIDTH), succeeds)
    named = ["--site", INPUT, "--target", OUTPUT, "--model", model]
    result = succeeds("import", "--format", "saelens", "--source", theirs, "--out", tmp_path / "back", *named)
    assert (result["kind"], result["site"], result["target"]) == ("transcoder", INPUT, OUTPUT)
    assert result["model_sha256"] == load_model(str(model), "cpu").sha256 == load_dictionary(tmp_path / "back").config.model_sha256


def exported(tmp_path: Path, sae: Path, succeeds: Callable[..., Any]) -> Path:
    """An export for SAELens that does not say that hearsae made it."""
    succeeds("export", "--sae", sae, "--format", "saelens", "--out", tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "cfg.json").read_text())
    (tmp_path / "theirs" / "cfg.json").write_text(json.dumps(config | {"metadata": {"sae_lens_version": "6.1.0"}}))
    return tmp_path / "theirs"


def test_values_in_units_of_their_own_are_said(tmp_path, succeeds, capfd):
    sae = load_dictionary(save(tmp_path / "sae", "relu"))
    sae.W_dec *= torch.linspace(0.5, 2, 64)[:, None]
    sae.save(tmp_path / "sae")
    theirs = exported(tmp_path, tmp_path / "sae", succeeds)
    assert main(["import", "--format", "saelens", "--source", str(theirs), "--site", SITE, "--out", str(tmp_path / "back")]) == 0
    out = capfd.readouterr().out
    assert "its decoder's rows are 0.5 to 2 long" in out and "its model is not known" in out


def test_an_import_that_can_not_be_right_is_refused(model, tmp_path, succeeds, refused):
    theirs = exported(tmp_path, save(tmp_path / "sae"), succeeds)
    command = ["import", "--format", "saelens", "--source", theirs, "--out", tmp_path / "out"]
    for more, words in (
        ([], "does not say which site's rows it takes: name it with --site"),
        (["--site", SITE, "--target", OUTPUT], "is no transcoder: leave --target out"),
        (["--site", "encoder.blocks.9", "--model", model], "has no site 'encoder.blocks.9'"),
        (["--site", "encoder.blocks.1.mlp.1", "--model", model], "has width 128, and this SAE 32"),
        (["--site", SITE, "--model", "tinyy"], "there is no model 'tinyy'"),
        (["--site", SITE, "--source", tmp_path / "nowhere"], "no such dictionary in"),
        (["--site", SITE, "--source", tmp_path / "sae"], "cfg.json is missing"),
        (["--site", SITE, "--format", "sparsify"], "sae.safetensors is missing"),
        (["--site", SITE, "--out", theirs], "holds other files (cfg.json): give a new folder"),
    ):
        assert words in refused(*command, *more)
    assert not (tmp_path / "out").exists()


def test_an_export_that_a_format_can_not_hold_is_refused(tmp_path, refused):
    relu, crosscoder = save(tmp_path / "relu", "relu"), save(tmp_path / "cross", site=f"{SITE}+{INPUT}", widths=(16, 16))
    out = ["--out", tmp_path / "out"]
    assert "a relu SAE can't be one of its" in refused("export", "--sae", relu, "--format", "sparsify", *out)
    assert "no format of another library holds one" in refused("export", "--sae", crosscoder, "--format", "saelens", *out)
    assert "there is no SAE in" in refused("export", "--sae", tmp_path / "nowhere", "--format", "saelens", *out)
    assert "holds other files" in refused("export", "--sae", relu, "--format", "dictionary_learning", "--out", relu)
    assert not (tmp_path / "out").exists()


def test_a_folder_serves_as_repository(tmp_path, succeeds, refused, capfd):
    sae = save(tmp_path / "sae")
    repo = tmp_path / "repo"
    assert succeeds("push", "--sae", sae, "--repo", repo, "--license", "mit") == {
        "repo": str(repo),
        "files": ["README.md", "config.json", "sae.safetensors"],
    }
    assert succeeds("pull", "--repo", repo, "--out", tmp_path / "back")["arch"] == "topk"
    assert main(["pull", "--repo", str(repo), "--out", str(tmp_path / "again")]) == 0
    assert capfd.readouterr().out == f"{tmp_path / 'again'}: topk of {SITE}, 64 latents (README.md, config.json, sae.safetensors)\n"
    assert "give a new folder" in refused("pull", "--repo", repo, "--out", tmp_path / "back")
    assert "'repo' is no repository" in refused("push", "--sae", sae, "--repo", "repo")
    assert "there is no SAE in" in refused("push", "--sae", tmp_path, "--repo", repo)


@pytest.mark.parametrize("arguments", [["export"], ["import"], ["push"], ["pull"], ["export", "--format", "onnx"]])
def test_wrong_usage_exits_with_2(arguments, capfd):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    out, err = capfd.readouterr()
    assert stopped.value.code == 2 and not out and "--help" in err and "Traceback" not in err
