"""`hearsae evaluate`."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import numpy as np
from tqdm import tqdm

from analysis.experiments.effect_tables import aligned
from analysis.experiments.speech import Speech, worker_model
from analysis.experiments.splice import CapturedSpeech, ToSplice, check, splice, table
from cache.errors import HearsaeError
from cache.location import Location, put
from cache.store import ActivationStore
from cluster.commands import Output
from cluster.commands.experiments import mapper
from cluster.workers import WorkerOptions
from sae.baselines import BASELINES, Baseline, baselines
from sae.metrics import check_fits, evaluate, plain
from sae.models import SaeConfig, load_dictionary
from sae.plots import EVALUATION, PLOTS, runs_of_grid, save_density, save_pareto
from sae.similarity import stability

NAMES = {"pca": "PCA", "pca-largest": "PCA, k largest", "neurons": "neurons, k largest", "random": "random, k largest"}
"""Of `BASELINES`, in the table."""
NAMED_BY = ("kind", "arch", "d_sae", "k", "sparsity", "seed")
"""Fields of an SAE's config that stand in the results. Beside the SAE they are left out: config.json has them."""


@dataclass(frozen=True, kw_only=True)
class Evaluate(Output, WorkerOptions):
    """L0, FVU, dead and dense latents, densities and more of trained SAEs, over all rows of a (held-out) store."""

    sae: tuple[Location, ...]
    """Folders of trained SAEs, transcoders and crosscoders; that of a grid stands for all of its SAEs."""
    store: Location
    """The store to evaluate on."""
    baselines: bool = False
    """Beside them, on the same rows: PCA, the model's own neurons and a random basis, each with k numbers a row (needs --train-store)."""
    train_store: Location | None = None
    """Where --baselines takes means and principal components from: the store that the SAEs were trained on."""
    stability: bool = False
    """How many latents are found again by SAEs that differ from each other in their seed alone."""
    splice: bool = False
    """What Whisper still writes with each SAE's reconstruction in place of its site: cross-entropy, word error rate, the encoder's output. Only this
    runs the model, and on workers."""
    splice_everywhere: bool = False
    """With --splice: in the padding after each clip too, on which SAEs are not trained."""
    dataset: str | None = None
    """With --splice: other speech than that of the store, as in `hearsae cache`."""
    split: str | None = None
    """Split of that dataset."""
    limit: int | None = None
    """With --splice: the first so many clips of the store, or files or rows of --dataset, only."""
    model: str | None = None
    """With --splice: where the store's model is now; default: where it was."""
    language: str = "en"
    """With --splice: that a multilingual Whisper is told it hears."""
    device: str = "auto"
    """With --splice: auto, cpu or cuda."""
    out: Location | None = None
    """Folder for evaluation.json and plots of all that was evaluated."""
    save: bool = False
    """Write evaluation.json and plots/density.png into the folder of each SAE too."""

    def run(self) -> dict[str, Any]:
        saes = tuple(one for folder in self.sae for one in _saes_in(folder))
        return replace(self, sae=saes)._run()

    def _run(self) -> dict[str, Any]:
        store = ActivationStore.open(self.store)
        train_store = ActivationStore.open(self.train_store) if self.train_store else None
        configs = self._check(store, train_store)
        results, firings = [], []
        for folder in self.sae:
            dictionary = load_dictionary(folder)
            rows = store.stats(check_fits(dictionary, store).split("+")[0]).rows
            with self._bar(rows, folder.name) as bar:
                measured = evaluate(dictionary, store, on_rows=bar.update)
            firings.append(measured.firings)
            named = {name: getattr(dictionary.config, name) for name in NAMED_BY}
            results.append({"dir": str(folder), **named, **measured.to_json()})
        if self.splice:
            todo = [ToSplice(folder, config, one["l0"]) for folder, config, one in zip(self.sae, configs, results, strict=True)]
            workers = mapper(self, "splice")
            speech, model = self._speech(store, configs), self._model(store)
            spliced = splice(todo, store, speech, model, self.splice_everywhere, language=self.language, device=self.device, map_pieces=workers)
            results = [one | {"splice": of_one} for one, of_one in zip(results, spliced, strict=True)]
        result: dict[str, Any] = {"results": results}
        if self.baselines and train_store:
            result["baselines"] = [plain(one._asdict()) for one in self._baselines(store, train_store, configs, results)]
        if self.stability:
            result["stability"] = self._stability(configs, firings)
        self._write(store, result)
        return result

    def _check(self, store: ActivationStore, train_store: ActivationStore | None) -> list[SaeConfig]:
        """All that can be refused before there is work to lose. The SAEs are read one by one: together they may not fit."""
        if not self.sae:
            raise HearsaeError("--sae: give the folder of at least one SAE")
        configs = []
        for folder in self.sae:
            dictionary = load_dictionary(folder)
            check_fits(dictionary, store)
            configs.append(dictionary.config)
        if self.baselines != (train_store is not None):
            raise HearsaeError("--baselines and --train-store go together: means and principal components must not come from the held-out rows")
        if self.baselines and not _plain_sites(configs):
            raise HearsaeError("--baselines are those of one site, and none of these is an SAE of one: leave it out")
        if self.stability and not _same_but_for_seed(configs):
            raise HearsaeError("--stability needs at least two SAEs that differ in their seed alone")
        WorkerOptions.check(self)
        if self.splice:
            check(
                list(zip(self.sae, configs, strict=True)),
                store,
                worker_model(self._model(store), self.device),
                self._speech(store, configs),
                self.language,
            )
        elif self.splice_everywhere or self.dataset or self.limit or self.model:
            raise HearsaeError("--splice-everywhere, --dataset, --limit and --model are of --splice: nothing else runs the model")
        return configs

    def _model(self, store: ActivationStore) -> str:
        return self.model or str(store.header.model["name"])

    def _speech(self, store: ActivationStore, configs: Sequence[SaeConfig]) -> Speech:
        if self.dataset:
            return Speech(self.dataset, self.split, self.limit)
        if self.split:
            raise HearsaeError("--split is of --dataset: a store has the split that it was made of")
        return CapturedSpeech(str(store.path), None, self.limit, captured=configs[0].site)

    def _baselines(
        self, store: ActivationStore, train_store: ActivationStore, configs: Sequence[SaeConfig], results: Sequence[dict[str, Any]]
    ) -> list[Baseline]:
        """At powers of two, and at the L0 of each SAE of the site."""
        found: list[Baseline] = []
        for site in _plain_sites(configs):
            width = store.sites[site]["width"]
            same_l0 = {min(width, max(1, round(result["l0"]))) for result in results if result["kind"] == "sae" and result["site"] == site}
            ks = sorted(same_l0 | {2**power for power in range(width.bit_length()) if 2**power < width})
            with self._bar(store.stats(site).rows + train_store.stats(site).rows, f"baselines of {site}") as bar:
                found += baselines(store, train_store, site, ks, on_rows=bar.update)
        return found

    def _stability(self, configs: Sequence[SaeConfig], firings: Sequence[np.ndarray]) -> list[dict[str, Any]]:
        found = []
        for group in _same_but_for_seed(configs):
            dictionaries = [load_dictionary(self.sae[number]) for number in group]
            for pair in stability(dictionaries, [firings[number] for number in group]):
                found.append(pair._asdict() | {"a": str(self.sae[group[pair.a]]), "b": str(self.sae[group[pair.b]])})
        return found

    def _write(self, store: ActivationStore, result: dict[str, Any]) -> None:
        source = {"store": store.path.name, "plan_hash": store.header.plan["hash"], "hearsae": version("hearsae")}
        for folder, one in zip(self.sae, result["results"], strict=True) if self.save else ():
            own = {key: value for key, value in one.items() if key not in ("dir", *NAMED_BY)}
            put(folder / EVALUATION, json.dumps(source | own, indent=1, allow_nan=False).encode())
            save_density([one], folder / PLOTS / "density.png")
        if self.out:
            put(self.out / EVALUATION, json.dumps(source | result, indent=1, allow_nan=False).encode())
            save_density(result["results"], self.out / PLOTS / "density.png")
            save_pareto(result["results"], self.out / PLOTS / "pareto.png", [Baseline(**one) for one in result.get("baselines", ())])

    def _bar(self, rows: int, what: str) -> "tqdm[Any]":
        return tqdm(total=rows, desc=what, unit="row", unit_scale=True, file=sys.stderr, disable=not sys.stderr.isatty())

    def summary(self, result: dict[str, Any]) -> str:
        tables = [_measured(result["results"])]
        if "splice" in result["results"][0]:
            tables.append(table(result["results"]))
        for site in dict.fromkeys(one["site"] for one in result.get("baselines", ())):
            tables.append(_compared(site, [one for one in result["baselines"] if one["site"] == site]))
        if "stability" in result:
            tables.append(_found_again(result["stability"]))
        return "\n\n".join(map("\n".join, tables))


def _measured(results: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each SAE, and one more for each that has several sites."""
    sites = [r["site"] if r["target"] == r["site"] else f"{r['site']} to {r['target']}" for r in results]
    of_all = len(set(zip(sites, (r["rows"] for r in results), strict=True))) == 1
    rows = [["SAE", *([] if of_all else ["site", "rows"]), "L0", "FVU", "cosine", "bias", "dead", "dense", "near-duplicates"]]
    for r, site in zip(results, sites, strict=True):
        numbers = [_number(r["l0"], ".1f"), *(_number(r[name], ".4f") for name in ("fvu", "cosine", "reconstruction_bias"))]
        shares = (r["dead_fraction"], r["dense_fraction"], r["decoder_cosine"]["near_duplicate_fraction"])
        rows.append([r["dir"], *([] if of_all else [site, str(r["rows"])]), *numbers, *(_number(share, ".2%") for share in shares)])
    lines = [f"{sites[0]}, {results[0]['rows']} rows:"] if of_all else []
    lines += aligned(rows, left=1 if of_all else 2)
    for r in results:
        if len(r["fvu_by_site"]) > 1:
            lines.append(f"{r['dir']}: FVU " + ", ".join(f"{site} {_number(fvu, '.4f')}" for site, fvu in r["fvu_by_site"].items()))
    return lines


def _compared(site: str, of_site: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each k."""
    fvu = {(one["name"], one["k"]): one["fvu"] for one in of_site}
    rows = [["k", *(NAMES[name] for name in BASELINES)]]
    rows += [[str(k), *(_number(fvu[name, k], ".4f") for name in BASELINES)] for k in sorted({k for _, k in fvu})]
    return [f"{site}, FVU from k numbers a row:", *aligned(rows, left=0)]


def _found_again(pairs: Sequence[dict[str, Any]]) -> list[str]:
    """Two lines for each pair."""
    rows = [["latents of", "found again in", "cosine > 0.7", "one to one", "mean largest cosine"]]
    for pair in pairs:
        for side, other in (("a", "b"), ("b", "a")):
            numbers = [f"{pair[f'matched_{side}']:.1%}", f"{pair['one_to_one']:.1%}", f"{pair[f'mean_max_cosine_{side}']:.3f}"]
            rows.append([pair[side], pair[other], *numbers])
    return aligned(rows, left=2)


def _saes_in(folder: Location) -> list[Location]:
    """The SAEs of a grid, or the folder itself, of which loading it says what is wrong."""
    try:
        return [folder / name for name in runs_of_grid(folder)] or [folder]
    except HearsaeError:
        return [folder]


def _plain_sites(configs: Sequence[SaeConfig]) -> list[str]:
    """The sites that SAEs read and reconstruct, which transcoders and crosscoders do not."""
    return list(dict.fromkeys(config.site for config in configs if config.kind == "sae"))


def _same_but_for_seed(configs: Sequence[SaeConfig]) -> list[list[int]]:
    """Numbers of the SAEs in each group of at least two."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for number, config in enumerate(configs):
        settings = (config.arch, config.d_in, config.d_sae, config.k, config.sparsity, config.site, config.target)
        groups.setdefault(settings, []).append(number)
    return [group for group in groups.values() if len({configs[number].seed for number in group}) == len(group) > 1]


def _number(value: float | None, form: str) -> str:
    return "none" if value is None else format(value, form)
