"""Dictionaries in the formats of SAELens, dictionary_learning and sparsify: there and back, and as those libraries compute them."""

import io
import json
import os
import pickle
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

from cache.errors import HearsaeError
from sae.interop import FORMATS, Named, export_dictionary, import_dictionary, save_imported
from sae.models import ARCHS, THRESHOLDS, WITH_K, Dictionary, SaeConfig, load_dictionary

D_IN, D_OUT, D_SAE, K = 12, 9, 40, 5
SITE, TARGET = "encoder.blocks.2.mlp_ln", "encoder.blocks.2.mlp"
TRANSCODER = {"target": TARGET, "d_out": D_OUT}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
HELD = [("saelens", arch, {}) for arch in ARCHS]
HELD += [("saelens", arch, TRANSCODER) for arch in ARCHS if arch != "topk"]
HELD += [("dictionary_learning", arch, {}) for arch in ARCHS]
HELD += [("sparsify", "topk", {}), ("sparsify", "topk", {"target": TARGET, "d_out": D_IN})]
"""All that the formats can hold: format, architecture, kind."""
MADE = [("saelens", arch) for arch in ("standard", "standard-unshifted", "topk", "topk-rescaled", "jumprelu", "gated", "transcoder")]
MADE += [("saelens", "jumprelu_transcoder"), ("sparsify", "topk"), ("sparsify", "transcoder")]
MADE += [("dictionary_learning", name) for name in ("AutoEncoder", "AutoEncoderNew", "AutoEncoderTopK", "BatchTopKSAE")]
MADE += [("dictionary_learning", name) for name in ("MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder", "GatedAutoEncoder")]
"""What their own classes make, and hearsae has too."""
NOT_OURS = [("saelens", "layer-norm"), ("saelens", "skip_transcoder"), ("sparsify", "skip"), ("sparsify", "groupmax")]


def make(arch: str, unit: bool = True, **kind: Any) -> Dictionary:
    generator = torch.Generator().manual_seed(3)
    source = {"site": SITE, "model_sha256": "ab" * 32, "store": ("a.zarr",), "plan_hash": ("1",), "rows": 7, "seed": 2, "scale": 0.5}
    sae = Dictionary(SaeConfig(arch, D_IN, D_SAE, K if arch in WITH_K else 0, **source | kind)).requires_grad_(False)
    for parameter in sae.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    if unit:
        sae.W_dec.copy_(F.normalize(sae.W_dec, dim=1))
    if arch == "tied" and not kind:
        sae.W_enc.copy_(sae.W_dec.t())
    if arch in ("batchtopk", "matryoshka"):
        sae.threshold.fill_(1.5)
    elif arch in THRESHOLDS:
        sae.threshold.copy_(torch.linspace(-0.5, 3.0, D_SAE))
    return sae


def rows() -> torch.Tensor:
    return torch.randn(300, D_IN, generator=torch.Generator().manual_seed(4))


def named(config: SaeConfig | str) -> Named:
    """What a user says of a dictionary of another library."""
    return Named(SITE, TARGET if (config.target if isinstance(config, SaeConfig) else "transcoder" in config) else "")


def name_of(case: tuple[Any, ...]) -> str:
    return "-".join(str(part) if isinstance(part, str) else "transcoder" * bool(part) for part in case).rstrip("-")


held = pytest.mark.parametrize(("form", "arch", "kind"), HELD, ids=map(name_of, HELD))


# There and back


@held
def test_there_and_back_it_is_the_same_dictionary(form, arch, kind, tmp_path):
    sae = make(arch, **kind)
    assert set(export_dictionary(sae, form, tmp_path / "theirs")) == {path.name for path in (tmp_path / "theirs").iterdir()}
    save_imported(import_dictionary(form, tmp_path / "theirs"), tmp_path / "ours")
    back = load_dictionary(tmp_path / "ours")
    expected = replace(sae.config, arch="relu") if arch == "tied" and kind else sae.config  # a transcoder has nothing to tie
    assert replace(back.config, hearsae="") == expected
    torch.testing.assert_close(back.encode(rows()), sae.encode(rows()), **CLOSE)
    torch.testing.assert_close(back(rows()), sae(rows()), **CLOSE)


@held
def test_without_our_metadata_the_function_is_still_the_same(form, arch, kind, tmp_path):
    sae = make(arch, **kind)
    export_dictionary(sae, form, tmp_path)
    config = tmp_path / ("config.json" if form == "dictionary_learning" else "cfg.json")
    data = json.loads(config.read_text())
    data.pop("hearsae", None)
    data.get("metadata", {}).pop("hearsae", None)
    config.write_text(json.dumps(data))
    with pytest.raises(HearsaeError, match="name it with --site"):
        import_dictionary(form, tmp_path)
    back = import_dictionary(form, tmp_path, named(sae.config)._replace(model_sha256="cd"))
    assert (back.config.site, back.config.targets, back.config.model_sha256) == (SITE, sae.config.targets, "cd")
    torch.testing.assert_close(back.encode(rows()), sae.encode(rows()), **CLOSE)
    torch.testing.assert_close(back(rows()), sae(rows()), **CLOSE)


def test_decoders_of_other_norms_keep_their_values(tmp_path):
    for form, arch in [(form, arch) for form in ("saelens", "dictionary_learning") for arch in ARCHS] + [("sparsify", "topk")]:
        sae = make(arch, unit=False)
        export_dictionary(sae, form, tmp_path / form / arch)
        back = import_dictionary(form, tmp_path / form / arch)
        torch.testing.assert_close(back.encode(rows()), sae.encode(rows()), **CLOSE)
        torch.testing.assert_close(back(rows()), sae(rows()), **CLOSE)


def test_an_export_is_the_same_bytes_again(tmp_path):
    for form in FORMATS:
        for name in ("a", "b"):
            export_dictionary(make("topk"), form, tmp_path / form / name)
        for path in (tmp_path / form / "a").iterdir():
            assert path.read_bytes() == (tmp_path / form / "b" / path.name).read_bytes(), path


# The libraries themselves


class Peers:
    """Their interpreter, told many things at once: it takes seconds to start."""

    def __init__(self, folder: Path) -> None:
        interpreter = os.environ.get("HEARSAE_PEERS")
        if not interpreter:
            pytest.skip("needs an interpreter with sae-lens, eai-sparsify and dictionary-learning, named by HEARSAE_PEERS")
        self.interpreter = interpreter
        self.folder = folder
        self.calls: list[list[str]] = []
        np.save(folder / "rows.npy", rows().numpy())

    def ask(self, *words: Any) -> Path:
        """Where codes and reconstruction will be."""
        out = self.folder / f"{len(self.calls)}.npz"
        self.calls.append([*map(str, words), str(self.folder / "rows.npy"), str(out)])
        return out

    def run(self) -> None:
        lines = "\n".join(map(json.dumps, self.calls))
        environment = os.environ | {"SPARSIFY_DISABLE_TRITON": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        script = str(Path(__file__).with_name("peers.py"))
        done = subprocess.run([self.interpreter, script], input=lines, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> dict[str, Any]:
    """What they make of every export."""
    peers, answers = Peers(tmp_path_factory.mktemp("peers")), {}
    for case in HELD:
        form, arch, kind = case
        folder = peers.folder / name_of(case)
        export_dictionary(make(arch, **kind), form, folder)
        answers[name_of(case)] = peers.ask("load", form, folder)
    for arch in ARCHS:
        export_dictionary(make(arch, unit=False), "dictionary_learning", peers.folder / f"long-{arch}")
        answers[f"long-{arch}"] = peers.ask("load", "dictionary_learning", peers.folder / f"long-{arch}")
    peers.run()
    return {name: np.load(path) for name, path in answers.items()}


@held
def test_their_own_loader_computes_the_same(form, arch, kind, loaded):
    sae, theirs = make(arch, **kind), loaded[name_of((form, arch, kind))]
    assert (theirs["z"] > 0).any()
    np.testing.assert_allclose(theirs["z"], sae.encode(rows()), **CLOSE)
    np.testing.assert_allclose(theirs["x_hat"], sae(rows()), **CLOSE)


@pytest.mark.parametrize("arch", ARCHS)
def test_their_own_loader_keeps_values_of_decoders_of_other_norms(arch, loaded):
    sae, theirs = make(arch, unit=False), loaded[f"long-{arch}"]
    np.testing.assert_allclose(theirs["z"], sae.encode(rows()), **CLOSE)
    np.testing.assert_allclose(theirs["x_hat"], sae(rows()), **CLOSE)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Any]:
    """What their own classes saved, and compute."""
    peers = Peers(tmp_path_factory.mktemp("made"))
    answers = {f"{form}-{arch}": peers.ask("make", form, arch, peers.folder / f"{form}-{arch}") for form, arch in MADE + NOT_OURS}
    peers.run()
    return {name: (peers.folder / name, np.load(path)) for name, path in answers.items()}


@pytest.mark.parametrize(("form", "arch"), MADE)
def test_what_their_own_classes_made_computes_the_same_here(form, arch, made, tmp_path):
    folder, theirs = made[f"{form}-{arch}"]
    save_imported(import_dictionary(form, folder, named(arch)), tmp_path)
    sae = load_dictionary(tmp_path)
    assert (theirs["z"] > 0).any()
    np.testing.assert_allclose(sae.encode(rows()), theirs["z"], **CLOSE)
    np.testing.assert_allclose(sae(rows()), theirs["x_hat"], **CLOSE)


@pytest.mark.parametrize(("form", "arch"), NOT_OURS)
def test_what_hearsae_can_not_compute_is_refused(form, arch, made):
    with pytest.raises(HearsaeError, match="hearsae"):
        import_dictionary(form, made[f"{form}-{arch}"][0], named(arch))


# What is refused


def test_what_a_format_can_not_hold_is_refused(tmp_path):
    crosscoder = {"site": "encoder.blocks.0+encoder.blocks.1", "widths": (8, 4)}
    refused = [(form, "topk", crosscoder, "crosscoder of encoder.blocks.0") for form in FORMATS]
    refused += [("sparsify", arch, {}, f"a {arch} SAE can't be one of its") for arch in ARCHS if arch != "topk"]
    refused += [("sparsify", "topk", TRANSCODER, "one width only, not from 12 to 9"), ("saelens", "topk", TRANSCODER, "no TopK transcoder")]
    refused += [("dictionary_learning", "relu", TRANSCODER, "autoencoders only"), ("pickle", "relu", {}, "no format 'pickle'; there are: saelens")]
    for form, arch, kind, words in refused:
        with pytest.raises(HearsaeError, match=words) as error:
            export_dictionary(make(arch, **kind), form, tmp_path / "out")
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_no_folder_comes_to_hold_files_of_two_formats(tmp_path):
    make("topk").save(tmp_path / "ours")
    before = (tmp_path / "ours" / "sae.safetensors").read_bytes()
    for form in FORMATS:
        with pytest.raises(HearsaeError, match="holds other files"):
            export_dictionary(make("topk"), form, tmp_path / "ours")
        export_dictionary(make("topk"), form, tmp_path / form)
        export_dictionary(make("topk"), form, tmp_path / form)  # the same again is no harm
        with pytest.raises(HearsaeError, match="holds other files"):
            save_imported(import_dictionary(form, tmp_path / form), tmp_path / form)
    assert (tmp_path / "ours" / "sae.safetensors").read_bytes() == before


def test_what_is_named_must_agree_with_what_travelled_along(tmp_path):
    export_dictionary(make("topk"), "sparsify", tmp_path / "sae")
    export_dictionary(make("relu", **TRANSCODER), "saelens", tmp_path / "transcoder")
    assert import_dictionary("sparsify", tmp_path / "sae", Named(SITE, model_sha256="ab" * 32)).config.rows == 7
    for form, folder, wrong, words in (
        ("sparsify", "sae", Named("encoder.blocks.0"), f"its site is '{SITE}', not 'encoder.blocks.0'"),
        ("sparsify", "sae", Named(model_sha256="cd"), "its model_sha256 is"),
        ("sparsify", "sae", Named(SITE, TARGET), "no transcoder: leave --target out"),
        ("saelens", "transcoder", Named(SITE, "encoder.ln_post"), f"its target is '{TARGET}'"),
    ):
        with pytest.raises(HearsaeError, match=words):
            import_dictionary(form, tmp_path / folder, wrong)


def test_a_transcoder_needs_the_name_of_its_target(tmp_path):
    export_dictionary(make("relu", **TRANSCODER), "saelens", tmp_path)
    edit(tmp_path / "cfg.json", metadata={"sae_lens_version": "6.0.0"})
    with pytest.raises(HearsaeError, match="name the site that it reconstructs with --target"):
        import_dictionary("saelens", tmp_path, Named(SITE))


def edit(path: Path, **changes: Any) -> None:
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))


def edit_tensors(path: Path, **changes: Any) -> None:
    state = torch.load(path, weights_only=True) if path.suffix == ".pt" else safetensors.torch.load_file(path)
    state = {name: tensor for name, tensor in (state | changes).items() if tensor is not None}
    torch.save(state, path) if path.suffix == ".pt" else safetensors.torch.save_file(state, path)


class Bomb:
    """Pickled, it would write a file where it is unpickled."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("unpickled"),)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"normalize_activations": "layer_norm"}, "normalize_activations 'layer_norm'"),
        ({"normalize_activations": "expected_average_only_in"}, "normalize_activations 'expected_average_only_in'"),
        ({"reshape_activations": "hook_z"}, "reshape_activations 'hook_z'"),
        ({"finetuning_scaling_factor": True}, "finetuning_scaling_factor"),
        ({"architecture": "temporal"}, "architecture that hearsae does not have .'temporal'"),
        ({"architecture": ["x" * 500]}, "architecture that hearsae does not have"),
        ({"architecture": "standard", "activation_fn_str": "tanh-relu"}, "standard with activation tanh-relu"),
        ({"d_in": 13}, r"W_enc is torch.float32 \[12, 40\], or not finite; \[13, 40\] was expected"),
        ({"d_sae": 10**12}, "W_enc is"),
        ({"d_sae": "many"}, "d_sae is 'many', and should be a positive whole number"),
        ({"k": 41}, "k = 41 is not between"),
        ({"k": None}, "k is None"),
        ({"metadata": {"hearsae": 3}}, "no SAE config of format"),
        ({"metadata": {"hearsae": {"format": 1, "arch": "topk", "d_in": 5, "d_sae": 40, "k": 5}}}, "is that of another dictionary"),
    ],
)
def test_configs_of_saelens_that_are_damaged_or_not_ours_are_refused(changes, words, tmp_path):
    export_dictionary(make("topk"), "saelens", tmp_path)
    edit(tmp_path / "cfg.json", **changes)
    with pytest.raises(HearsaeError, match=words) as error:
        import_dictionary("saelens", tmp_path, Named(SITE))
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_an_old_config_of_saelens_is_understood(tmp_path):
    """Before its version 6, a TopK SAE was a standard one with another activation function."""
    sae = make("topk")
    export_dictionary(sae, "saelens", tmp_path)
    changes = {"architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}, "normalize_activations": False}
    edit(tmp_path / "cfg.json", k=..., metadata=..., reshape_activations=..., **changes)
    edit_tensors(tmp_path / "sae_weights.safetensors", scaling_factor=torch.ones(D_SAE))
    assert torch.equal(import_dictionary("saelens", tmp_path, Named(SITE)).encode(rows()), sae.encode(rows()))
    edit_tensors(tmp_path / "sae_weights.safetensors", scaling_factor=torch.full((D_SAE,), 2.0))
    with pytest.raises(HearsaeError, match="has a scaling_factor"):
        import_dictionary("saelens", tmp_path, Named(SITE))


@pytest.mark.parametrize(
    ("form", "config", "weights"),
    [
        ("saelens", "cfg.json", "sae_weights.safetensors"),
        ("dictionary_learning", "config.json", "ae.pt"),
        ("sparsify", "cfg.json", "sae.safetensors"),
    ],
)
def test_damaged_files_are_refused_in_one_line(form, config, weights, tmp_path):
    name = "b_dec"
    damages = {
        "missing": (lambda folder: (folder / weights).unlink(), f"no such dictionary in .*{weights} is missing"),
        "nothing": (lambda folder: [path.unlink() for path in folder.iterdir()], f"no such dictionary in .*{config} is missing"),
        "cut": (lambda folder: (folder / weights).write_bytes((folder / weights).read_bytes()[:-100]), "is damaged"),
        "empty": (lambda folder: (folder / weights).write_bytes(b""), "is damaged"),
        "no-json": (lambda folder: (folder / config).write_text("{"), "is damaged"),
        "deep": (lambda folder: (folder / config).write_text("[" * 10**6), "is damaged"),
        "list": (lambda folder: (folder / config).write_text("[1]"), "no JSON object"),
        "not-there": (lambda folder: edit_tensors(folder / weights, **{name: None}), f"has no {name}; it has"),
        "nan": (lambda folder: edit_tensors(folder / weights, **{name: torch.full((D_IN,), torch.nan)}), f"{name} is .*not finite"),
        "wide": (lambda folder: edit_tensors(folder / weights, **{name: torch.zeros(D_IN + 1)}), rf"{name} is .*\[13\]"),
        "square": (lambda folder: edit_tensors(folder / weights, **{name: torch.zeros(D_IN, 1)}), rf"{name} is .*\[12, 1\]"),
    }
    for damage, (do, words) in damages.items():
        export_dictionary(make("topk"), form, tmp_path / damage)
        do(tmp_path / damage)
        with pytest.raises(HearsaeError, match=words) as error:
            import_dictionary(form, tmp_path / damage)
        assert "\n" not in str(error.value), damage
    with pytest.raises(HearsaeError, match="no such dictionary"):
        import_dictionary(form, tmp_path / "nowhere")


def test_pickles_are_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, data in {"bare": pickle.dumps(Bomb()), "saved": _saved({"W_enc": Bomb()}), "module": _saved(torch.nn.Linear(2, 2))}.items():
        export_dictionary(make("topk"), "dictionary_learning", tmp_path / name)
        (tmp_path / name / "ae.pt").write_bytes(data)
        with pytest.raises(HearsaeError, match="holds more than tensors"):
            import_dictionary("dictionary_learning", tmp_path / name)
    assert not Path("unpickled").exists()


def _saved(what: object) -> bytes:
    data = io.BytesIO()
    torch.save(what, data)
    return data.getvalue()


def test_tensors_that_claim_more_than_they_hold_are_refused(tmp_path):
    """A few bytes with the shape of terabytes: filling that in would end the process."""
    for name, huge in {"repeated": torch.zeros(1).expand(10**12), "sparse": torch.sparse_coo_tensor(size=(10**12,), check_invariants=True)}.items():
        export_dictionary(make("topk"), "dictionary_learning", tmp_path / name)
        edit_tensors(tmp_path / name / "ae.pt", **{"encoder.bias": huge})
        with pytest.raises(HearsaeError, match=r"encoder\.bias is"):
            import_dictionary("dictionary_learning", tmp_path / name)


@pytest.mark.parametrize(
    ("trainer", "words"),
    [
        ({"dict_class": "IdentityDict"}, "a class that hearsae does not read .'IdentityDict'.; it reads AutoEncoder,"),
        ({"dict_class": ["AutoEncoder"]}, "a class that hearsae does not read"),
        ({}, "a class that hearsae does not read"),
        ([], "a class that hearsae does not read"),
        ({"dict_class": "AutoEncoderTopK", "k": 6}, "it says k = 6, and ae.pt has k = 5"),
        ({"dict_class": "JumpReluAutoEncoder"}, "has no W_enc"),
    ],
)
def test_configs_of_dictionary_learning_that_are_damaged_or_not_ours_are_refused(trainer, words, tmp_path):
    export_dictionary(make("topk"), "dictionary_learning", tmp_path)
    edit(tmp_path / "config.json", trainer=trainer)
    with pytest.raises(HearsaeError, match=words):
        import_dictionary("dictionary_learning", tmp_path)


def test_a_claim_of_an_architecture_that_the_weights_are_not_is_not_believed(tmp_path):
    export_dictionary(make("jumprelu"), "saelens", tmp_path / "thresholds")
    export_dictionary(make("relu"), "saelens", tmp_path / "untied")
    for folder, claim, k, arch in (("thresholds", "batchtopk", 5, "jumprelu"), ("untied", "tied", 0, "relu"), ("untied", "topk", 5, "relu")):
        data = json.loads((tmp_path / folder / "cfg.json").read_text())
        data["metadata"]["hearsae"] |= {"arch": claim, "k": k}
        edit(tmp_path / folder / "cfg.json", **data)
        assert import_dictionary("saelens", tmp_path / folder).config.arch == arch


def test_the_groups_of_a_matryoshka_sae_are_those_of_its_training(tmp_path):
    for rows_seen, groups in ((7, [1, 3, 5, 10, 21]), (0, [D_SAE])):
        export_dictionary(make("matryoshka", rows=rows_seen), "dictionary_learning", tmp_path / str(rows_seen))
        state = torch.load(tmp_path / str(rows_seen) / "ae.pt", weights_only=True)
        assert state["group_sizes"].tolist() == groups
