"""The model card of a dictionary: README.md as model hubs show it, with YAML at its head.

Names and texts come from files that others may have written, so all of them stand in code spans, where Markdown and HTML mean nothing.
"""

import json
import re
from collections.abc import Iterable, Mapping
from numbers import Real
from pathlib import PurePath
from typing import Any

from cache.errors import HearsaeError
from cache.location import Location, location, names_in
from cache.model import name_of_checkpoint
from sae.models import CONFIG, SaeConfig, read_config
from sae.train import HOW_NOT_WHAT, RESULT

CARD = "README.md"
EVALUATION = "evaluation.json"
"""What `hearsae evaluate --json` prints, kept beside the dictionary."""
PLOTS = "plots"
SAELENS = "saelens"
"""Folder of the same dictionary in SAELens's format, below that of the dictionary."""
PLOT = re.compile(r"\w[\w.-]*\.png", re.ASCII)
LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]*")
LONGEST_TEXT = 200
"""Characters of one value that a card shows."""
KIND = {"sae": "Sparse autoencoder", "transcoder": "Transcoder", "crosscoder": "Crosscoder"}
METRICS = {
    "rows": "rows evaluated",
    "fvu": "fraction of variance unexplained",
    "l0": "latents that fire in a row, mean",
    "dead_fraction": "part of the latents that never fired",
    "dense_fraction": "part of the latents that fired in more than a tenth of the rows",
    "explained_variance": "variance explained",
    "cosine": "cosine of rows and their reconstructions, mean",
    "centred_cosine": "the same about the mean",
    "reconstruction_bias": "relative reconstruction bias (2404.16014)",
    "centred_reconstruction_bias": "the same about the mean",
}
"""What the numbers of an evaluation are; others are shown by their names."""


def model_card(folder: str | Location, repo: str = "", license_name: str = "") -> str:
    """Markdown about the dictionary in `folder`, from its config and what lies beside it: train.json, evaluation.json, plots/*.png.

    repo: where it will be loaded from, `owner/name`. license_name: an identifier like `mit`; without one the card names no licence.
    Raises HearsaeError if there is no dictionary, something beside it is damaged, or the licence is no identifier.
    """
    folder = location(folder)
    if license_name and not LICENSE.fullmatch(license_name):
        raise HearsaeError(f"'{license_name}' is no identifier of a licence: write it as hubs do, for example mit or cc-by-4.0")
    config = read_config(folder / CONFIG, _read(folder / CONFIG))
    has_saelens = bool(names_in(folder / SAELENS))
    parts = [
        _head(config, license_name, has_saelens),
        f"# {KIND[config.kind]}: {_code(config.site)}" + (f" to {_code(config.target)}" if config.target else ""),
        _what(config),
        _table(("", ""), _facts(config)),
        "## Loading",
        _loading(config, repo, has_saelens),
    ]
    settings = _training(folder, config)
    if settings:
        parts += ["## Training", _table(("setting", "value"), settings)]
    metrics = _evaluation(folder, config)
    if metrics:
        parts += ["## Evaluation", _table(("metric", "value"), metrics)]
    plots = sorted(name for name in names_in(folder / PLOTS) if PLOT.fullmatch(name))
    parts += [f"![{name.removesuffix('.png')}]({PLOTS}/{name})" for name in plots]
    return "\n\n".join(parts) + "\n"


def _head(config: SaeConfig, license_name: str, has_saelens: bool) -> str:
    tags = ["sparse-autoencoder", "interpretability", "whisper", config.kind, config.arch, *([SAELENS] if has_saelens else [])]
    lines = ["---", "library_name: hearsae", *([f'license: "{license_name}"'] if license_name else []), "tags:"]
    return "\n".join([*lines, *(f"- {tag}" for tag in dict.fromkeys(tags)), "---"])


def _what(config: SaeConfig) -> str:
    known = name_of_checkpoint(config.model_sha256) if config.model_sha256 else ""
    model = f"OpenAI's Whisper `{known}`" if known and known != "micro" else "hearsae's small Whisper `micro`" if known else "a Whisper checkpoint"
    learnt = f"Reads the activations of {model} at {', '.join(map(_code, config.sites))}"
    learnt += f" and reconstructs those at {_code(config.target)}." if config.target else " and reconstructs them from few latents."
    return f"{learnt} Its rows are those activations as they are, without normalisation."


def _facts(config: SaeConfig) -> Iterable[tuple[str, str]]:
    yield "architecture", _code(config.arch)
    yield "widths", f"{config.d_in} → {config.d_sae} latents → {config.out_width}"
    if config.k:
        yield "k", str(config.k)
    if config.sparsity:
        yield "coefficient of the penalty", f"{config.sparsity:.4g}"
    yield "checkpoint (SHA-256)", _code(config.model_sha256)
    yield "trained on", ", ".join(map(_code, config.store)) or "—"
    yield "rows seen in training", f"{config.rows:,}" if isinstance(config.rows, int) else "—"
    yield "value in units of mean squared norm d", f"value × {config.scale:.6g}"
    yield "made by", f"hearsae {_code(config.hearsae)}"


def _loading(config: SaeConfig, repo: str, has_saelens: bool) -> str:
    name = repo or "OWNER/NAME"
    lines = ["```", f"$ hearsae pull --repo {name} --out sae", "```", "", "```python", "from sae.models import load_dictionary", ""]
    lines += ['sae = load_dictionary("sae")', "codes = sae.encode_sparse(rows)  # (row, latent, value) of rows [n, d_in]", "```"]
    if has_saelens:
        lines += ["", "With SAELens:", "", "```python", "from sae_lens import SAE", "", f'sae = SAE.from_pretrained("{name}", "{SAELENS}")', "```"]
    elif config.kind == "sae" or (config.kind == "transcoder" and config.arch != "topk"):
        lines += ["", "With SAELens:", "", "```", "$ hearsae export --sae sae --format saelens --out theirs", "```", ""]
        lines += ["```python", "from sae_lens import SAE", "", 'sae = SAE.load_from_disk("theirs")', "```"]
    return "\n".join(lines)


def _training(folder: Location, config: SaeConfig) -> list[tuple[str, str]]:
    """Settings from train.json: in the folder, or in that of the grid that this dictionary is of. Paths stay where they are."""
    for path in (folder / RESULT, folder.parent / RESULT):
        data = _read(path, optional=True)
        runs, settings = data.get("runs"), data.get("config")
        if isinstance(runs, list) and isinstance(settings, dict) and any(_is_run(run, config) for run in runs):
            grid = ("arch", "site", "target", "d_sae", "k", "sparsity", "seed", *HOW_NOT_WHAT)
            return [(_code(name), _value(value)) for name, value in settings.items() if name not in grid and isinstance(value, str | Real)]
    return []


def _is_run(run: object, config: SaeConfig) -> bool:
    names = ("site", "target", "arch", "d_sae", "k", "sparsity", "seed")
    return isinstance(run, dict) and all(run.get(name) == getattr(config, name) for name in names)


def _evaluation(folder: Location, config: SaeConfig) -> list[tuple[str, str]]:
    data = _read(folder / EVALUATION, optional=True)
    results = data.get("results", [data])
    for result in results if isinstance(results, list) else []:
        if isinstance(result, dict) and result.get("site") == config.site and PurePath(str(result.get("dir", ""))).name in ("", folder.name):
            numbers = {name: value for name, value in result.items() if isinstance(value, Real)}
            return [(METRICS.get(name) or _code(name), _value(value)) for name, value in numbers.items()]
    return []


def _read(path: Location, optional: bool = False) -> dict[str, Any]:
    try:
        data = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        if optional:
            return {}
        raise HearsaeError(f"there is no SAE in {path.parent}: {path.name} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise HearsaeError(f"{path} is damaged: {error}") from error
    if not isinstance(data, Mapping):
        raise HearsaeError(f"{path} is damaged: it is no JSON object")
    return dict(data)


def _table(head: tuple[str, str], rows: Iterable[tuple[str, str]]) -> str:
    return "\n".join(f"| {left} | {right} |" for left, right in [head, ("---", "---"), *rows])


def _value(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return _code(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _code(value: object) -> str:
    """Any text as one code span that can stand in a table."""
    text = "".join(char if char.isprintable() else " " for char in str(value))[:LONGEST_TEXT].replace("`", "'").replace("|", "\\|").strip()
    return f"`{text}`" if text else "—"
