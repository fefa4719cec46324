"""Repositories of dictionaries: folders, and a hub on loopback that the real client talks to; model cards."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hub_server import Hub, running_hub

from cache import micro
from cache.errors import HearsaeError
from cache.model import load_model, name_of_checkpoint
from sae.card import model_card
from sae.hub import pull, push
from sae.interop import export_dictionary
from sae.models import Dictionary, SaeConfig, load_dictionary

ROOT = Path(__file__).parents[2]
SITE = "encoder.blocks.2"
PNG = b"\x89PNG\r\n\x1a\n"
PUSHED = ["README.md", "config.json", "plots/density.png", "sae.safetensors", "saelens/cfg.json", "saelens/sae_weights.safetensors"]
STAYS = [
    "train.json",
    "evaluation.json",
    "checkpoint.safetensors",
    "plots/.hidden.png",
    "plots/notes.txt",
    "saelens/notes.txt",
    "ae.pt",
    "log/events",
]


def save(folder: Path, **settings: Any) -> Dictionary:
    given = {"arch": "topk", "d_in": 12, "d_sae": 40, "k": 5, "site": SITE, "model_sha256": "ab" * 32, "store": ("a.zarr",), "rows": 12345}
    sae = Dictionary(SaeConfig(**given | settings)).requires_grad_(False)
    for parameter in sae.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    sae.save(folder)
    return sae


@pytest.fixture
def trained(tmp_path) -> Path:
    """A folder as it may look after training, with all that goes along and all that doesn't."""
    folder = tmp_path / "sae"
    export_dictionary(save(folder), "saelens", folder / "saelens")
    for name in [*STAYS, "plots/density.png"]:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(PNG)
    run = {"dir": str(folder), "site": SITE, "arch": "topk", "d_sae": 40, "k": 5, "seed": 0, "target": "", "sparsity": 0.0}
    settings = {"store": ["/home/somebody/a.zarr"], "out": str(folder), "batch": 4096, "lr": None, "aux": 1 / 32, "site": [SITE], "arch": "topk"}
    (folder / "train.json").write_text(json.dumps({"config": settings, "runs": [run]}))
    result = {"dir": str(folder), "site": SITE, "rows": 5000, "fvu": 0.25, "l0": 5.0, "novel_metric": 0.5, "density_count": [1, 2]}
    (folder / "evaluation.json").write_text(json.dumps({"results": [result]}))
    return folder


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# Folders


def test_pushed_and_pulled_it_is_the_same_and_only_what_is_listed_goes_along(trained, tmp_path):
    before = files_in(trained)
    assert push(trained, f"{tmp_path}/repo") == PUSHED
    assert pull(f"{tmp_path}/repo", tmp_path / "back") == PUSHED
    assert files_in(trained) == before
    back = files_in(tmp_path / "back")
    assert sorted(back) == PUSHED and all(back[name] == before[name] for name in PUSHED if name != "README.md")
    x = torch.randn(9, 12)
    assert torch.equal(load_dictionary(tmp_path / "back").encode(x), load_dictionary(trained).encode(x))


def test_nothing_of_this_machine_is_pushed(trained, tmp_path):
    push(trained, f"{tmp_path}/repo")
    for name, data in files_in(tmp_path / "repo").items():
        assert str(tmp_path).encode() not in data and b"somebody" not in data, name


def test_what_is_not_listed_is_not_pulled(trained, tmp_path):
    assert pull(str(trained), tmp_path / "back") == [name for name in PUSHED if name != "README.md"]


def test_links_out_of_the_folder_are_refused_both_ways(trained, tmp_path):
    (tmp_path / "secret").write_text("mine")
    (trained / "plots" / "secret.png").symlink_to(tmp_path / "secret")
    for do in (lambda: push(trained, f"{tmp_path}/repo"), lambda: pull(str(trained), tmp_path / "back")):
        with pytest.raises(HearsaeError, match=r"secret\.png is a link out of its folder"):
            do()
    assert not (tmp_path / "repo").exists() and not (tmp_path / "back").exists()


def test_a_card_of_ones_own_is_pushed_as_it_is(trained, tmp_path):
    (trained / "README.md").write_text("mine")
    with pytest.raises(HearsaeError, match=r"README\.md of its own"):
        push(trained, f"{tmp_path}/repo", license_name="mit")
    push(trained, f"{tmp_path}/repo")
    assert (tmp_path / "repo" / "README.md").read_text() == "mine"


def test_an_export_that_is_not_of_the_dictionary_is_not_pushed(trained, tmp_path):
    sae = load_dictionary(trained)
    sae.b_enc += 1
    sae.save(trained)
    with pytest.raises(HearsaeError, match=r"saelens is no export of the SAE beside it: delete it, or run 'hearsae export' again"):
        push(trained, f"{tmp_path}/repo")
    export_dictionary(sae, "saelens", trained / "more")
    (trained / "more" / "sae_weights.safetensors").rename(trained / "saelens" / "sae_weights.safetensors")
    push(trained, f"{tmp_path}/repo")


def test_what_can_not_be_pushed_or_pulled_is_refused_and_leaves_nothing(trained, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").touch()
    damaged = tmp_path / "damaged"
    save(damaged)
    (damaged / "sae.safetensors").write_bytes(b"short")
    repo, out = f"{tmp_path}/repo", tmp_path / "out"
    for do, words in (
        (lambda: push(tmp_path / "nowhere", repo), "there is no SAE in .*nowhere"),
        (lambda: push(damaged, repo), "is damaged"),
        (lambda: push(trained, str(trained)), "is the folder that is to be pushed"),
        (lambda: push(trained, repo, license_name="MIT licence"), "'MIT licence' is no identifier of a licence"),
        (lambda: push(trained, "repo"), "'repo' is no repository: write owner/name for one on the Hub, or ./folder"),
        (lambda: push(trained, "owner/name/x"), "is no repository"),
        (lambda: push(trained, "hf://owner"), "is no repository"),
        (lambda: push(trained, "https://hub/owner/name"), "is no repository"),
        (lambda: pull("owner/na me", out), "is no repository"),
        (lambda: pull(repo, out), "there is no SAE in .*repo"),
        (lambda: pull(str(damaged), out), "is damaged"),
        (lambda: pull(str(trained), tmp_path / "full"), "full holds files already: give a new folder"),
        (lambda: pull(str(trained), out, revision="main"), "--revision main has no meaning"),
    ):
        with pytest.raises(HearsaeError, match=words) as error:
            do()
        assert "\n" not in str(error.value)
    assert not out.exists() and not (tmp_path / "repo").exists()


def test_repositories_may_lie_in_an_object_store(trained, tmp_path, s3):
    repo = f"s3://{s3.bucket}/models/sae"
    assert push(trained, repo) == PUSHED
    assert pull(repo, tmp_path / "back") == PUSHED


# The hub


@pytest.fixture(scope="module")
def hub():
    with running_hub() as server:
        yield server


MANY = """
import contextlib, io, json, sys
from cluster.cli import main
for arguments in json.loads(sys.stdin.read()):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(arguments)
    print(json.dumps([status, out.getvalue(), err.getvalue()]))
"""


def run(hub: Hub, home: Path, *commands: list[Any], **environment: str) -> list[tuple[int, str, str]]:
    """(status, stdout, stderr) of commands in a process of their own: the client reads its settings when it is loaded."""
    given = {name: value for name, value in os.environ.items() if not name.startswith("HF_")} | {"OMP_NUM_THREADS": "1"}
    lines = json.dumps([[str(argument) for argument in command] for command in commands])
    environment = given | hub.environment(str(home)) | environment
    done = subprocess.run([sys.executable, "-c", MANY], cwd=ROOT, env=environment, input=lines, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def test_the_hub_s_own_client_uploads_and_downloads_it(hub, trained, tmp_path):
    hub.repos["someone/odd"] = {"evil.pt": b"pickle", "plots/../../out.png": PNG, "../up.png": PNG, "plots/deep/x.png": PNG}
    hub.repos["someone/empty"] = {"evil.pt": b"pickle"}
    out = tmp_path / "out"
    done = run(
        hub,
        tmp_path / "home",
        ["push", "--sae", trained, "--repo", "someone/whisper-sae", "--license", "mit", "--private", "--json"],
        ["push", "--sae", trained, "--repo", "hf://someone/odd", "--json"],
        ["pull", "--repo", "hf://someone/whisper-sae", "--out", tmp_path / "back", "--json"],
        ["pull", "--repo", "someone/odd", "--out", tmp_path / "odd", "--json"],
        ["pull", "--repo", "someone/else", "--out", out],
        ["pull", "--repo", "someone/odd", "--revision", "v9", "--out", out],
        ["pull", "--repo", "someone/empty", "--out", out],
    )
    for status, printed, err in done[:4]:
        assert (status, err) == (0, "")
        assert json.loads(printed)["files"] == PUSHED
    assert hub.visibility["someone/whisper-sae"] == "private"
    repo = hub.repos["someone/whisper-sae"]
    assert sorted(repo) == [".gitattributes", *PUSHED]
    assert b'SAE.from_pretrained("someone/whisper-sae", "saelens")' in repo["README.md"]
    x = torch.randn(9, 12)
    for name in ("back", "odd"):
        assert sorted(files_in(tmp_path / name)) == PUSHED
        assert torch.equal(load_dictionary(tmp_path / name).encode(x), load_dictionary(trained).encode(x))
    assert not list(tmp_path.rglob("out.png")) and not list(tmp_path.rglob("up.png"))
    missing, revision, empty = done[4:]
    assert_refused(missing, f"the Hub at {hub.endpoint} has no repository someone/else, or it is private")
    assert_refused(revision, "someone/odd on the Hub has no such revision")
    assert_refused(empty, "there is no SAE of hearsae in someone/empty: it has no config.json and no sae.safetensors")
    assert not out.exists()


def assert_refused(done: tuple[int, str, str], words: str) -> None:
    status, out, err = done
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert err.startswith(f"hearsae: {words}")


def test_a_hub_that_can_not_be_asked_is_said_in_one_line(hub, tmp_path):
    pull_it = ["pull", "--repo", "someone/else", "--out", tmp_path / "out"]
    nobody = "http://127.0.0.1:9"
    [unreachable] = run(hub, tmp_path / "home", pull_it, HF_ENDPOINT=nobody)
    assert_refused(unreachable, f"the Hub at {nobody} can't be asked for someone/else: ")
    [offline] = run(hub, tmp_path / "home", pull_it, HF_HUB_OFFLINE="1")
    assert_refused(offline, "someone/else is on the Hub, which HF_HUB_OFFLINE forbids to ask")


def test_a_token_that_the_hub_does_not_know_is_said_in_one_line(hub, trained, tmp_path):
    [done] = run(hub, tmp_path / "home", ["push", "--sae", trained, "--repo", "someone/new"], HF_TOKEN="hf_wrong")
    assert_refused(done, f"the Hub at {hub.endpoint} does not allow that with someone/new (401): log in")
    assert "hf_wrong" not in done[2] and "someone/new" not in hub.repos


def test_saelens_loads_what_was_pushed_as_the_card_says(hub, trained, tmp_path):
    interpreter = os.environ.get("HEARSAE_PEERS")
    if not interpreter:
        pytest.skip("needs an interpreter with sae-lens, named by HEARSAE_PEERS")
    push(trained, f"{tmp_path}/repo")
    hub.repos["someone/for-saelens"] = files_in(tmp_path / "repo")
    card = model_card(trained, "someone/for-saelens")
    code = re.search(r"With SAELens:\n\n```python\n(.*?)```", card, re.DOTALL)
    x = torch.randn(50, 12, generator=torch.Generator().manual_seed(1))
    np.save(tmp_path / "x.npy", x.numpy())
    more = f"import numpy, torch\nx = torch.from_numpy(numpy.load({str(tmp_path / 'x.npy')!r}))\n"
    more += f"numpy.save({str(tmp_path / 'z.npy')!r}, sae.encode(x).detach().numpy())"
    environment = os.environ | hub.environment(str(tmp_path / "home")) | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([interpreter, "-c", f"{code[1]}\n{more}"], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(np.load(tmp_path / "z.npy"), load_dictionary(trained).encode(x), rtol=1e-5, atol=1e-5)


# Cards


def front_matter(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def test_a_card_tells_what_there_is(trained):
    card = model_card(trained, "someone/sae", "mit")
    head = front_matter(card)
    assert (head["library_name"], head["license"]) == ("hearsae", "mit")
    assert {"sparse-autoencoder", "whisper", "topk", "saelens"} <= set(head["tags"])
    for part in (
        f"# Sparse autoencoder: `{SITE}`",
        "| widths | 12 → 40 latents → 12 |",
        "| rows seen in training | 12,345 |",
        "hearsae pull --repo someone/sae",
        "| `batch` | 4,096 |",
        "| `aux` | 0.03125 |",
        "| fraction of variance unexplained | 0.25 |",
        "| `novel_metric` | 0.5 |",
        "![density](plots/density.png)",
    ):
        assert part in card, part
    for part in ("hidden", "notes", "density_count", "`store`", "`out`", "`lr`", "somebody"):
        assert part not in card, part


def test_a_card_of_nothing_but_a_dictionary(tmp_path):
    sae = {"target": "encoder.blocks.2.mlp", "d_out": 9}
    for kind, title in (({}, "Sparse autoencoder"), (sae, "Transcoder"), ({"site": "a+b", "widths": (6, 6)}, "Crosscoder")):
        save(tmp_path / title, **kind)
        card = model_card(tmp_path / title)
        assert f"# {title}" in card and "license" not in front_matter(card)
        assert "## Training" not in card and "## Evaluation" not in card and "plots/" not in card
        assert ("SAELens" in card) == (title == "Sparse autoencoder")  # a TopK transcoder or a crosscoder it can't have


def test_an_sae_of_a_grid_finds_the_settings_of_its_run(tmp_path):
    save(tmp_path / "a", seed=3)
    save(tmp_path / "b", seed=4)
    run = {"site": SITE, "arch": "topk", "d_sae": 40, "k": 5, "seed": 3, "target": "", "sparsity": 0.0}
    (tmp_path / "train.json").write_text(json.dumps({"config": {"batch": 77}, "runs": [run]}))
    assert "| `batch` | 77 |" in model_card(tmp_path / "a")
    assert "## Training" not in model_card(tmp_path / "b")


def test_a_card_names_the_whisper(tmp_path):
    tiny = "65147644a518d12f04e32d6f3b26facc3f8dd46e5390956a9424a650c0ce22b9"
    save(tmp_path / "tiny", model_sha256=tiny)
    save(tmp_path / "micro", model_sha256=load_model(micro.NAME, "cpu").sha256)
    assert "OpenAI's Whisper `tiny`" in model_card(tmp_path / "tiny")
    assert "Whisper `micro`" in model_card(tmp_path / "micro")
    assert [name_of_checkpoint(sha256) for sha256 in (tiny, "", "models", "ab" * 32)] == ["tiny", "", "", ""]


def test_texts_of_others_mean_nothing_in_a_card(trained):
    hostile = "x` </td><script>alert(1)</script> | [a](http://b) ![c](d)\n# Heading\n---\n\u202e"
    config = json.loads((trained / "config.json").read_text()) | {"site": hostile, "store": [hostile], "hearsae": hostile, "model_sha256": hostile}
    (trained / "config.json").write_text(json.dumps(config))
    data = json.loads((trained / "train.json").read_text())
    data["config"] |= {hostile: hostile}
    data["runs"][0]["site"] = hostile
    (trained / "train.json").write_text(json.dumps(data))
    (trained / "evaluation.json").write_text(json.dumps({"site": hostile, hostile: 0.5}))
    (trained / "plots" / "a](b) <script>.png").write_bytes(PNG)
    card = model_card(trained, "someone/sae")
    assert set(front_matter(card)["tags"]) == {"sparse-autoencoder", "interpretability", "whisper", "sae", "topk", "saelens"}
    body = card.split("---\n", 2)[2]
    outside = "".join(re.split(r"(?<!`)`(?!`)[^`\n]*`(?!`)", body))
    for part in ("<script", "alert", "http://b", "Heading", "\u202e"):
        assert part not in outside, part
    assert "script" in card and "\n# Heading" not in card and "\u202e" not in card
    for line in body.splitlines():
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) == 3, line  # two cells, whatever is in them


@pytest.mark.parametrize("name", ["train.json", "evaluation.json"])
def test_damaged_files_beside_a_dictionary_are_refused(name, trained):
    for text in ("{", "[1]", "[" * 10**6):
        (trained / name).write_text(text)
        with pytest.raises(HearsaeError, match=f"{name} is damaged"):
            model_card(trained)
    for text in ("{}", '{"results": 3, "runs": 3}', '{"results": [3], "runs": [3], "config": 3}'):
        (trained / name).write_text(text)
        assert model_card(trained)
