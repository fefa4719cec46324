"""An SAE's reconstruction put in place of its site while Whisper runs: how much of what Whisper needs the SAE has kept.

Recovered is the part of what is lost without the site that is not lost with the SAE in its place: (zero - spliced) / (zero - original), of the
cross-entropy of the right text, of the word error rate, and of the squared error of the encoder's output.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from analysis.experiments.changes import Change, Replaced, Stretch
from analysis.experiments.effect_tables import aligned
from analysis.experiments.effects import Outcome, run_changes, summarise
from analysis.experiments.speech import Mapper, Speech, in_this_process, worker_model
from analysis.experiments.steer import check_language
from analysis.experiments.word_times import StoredSpeech
from analysis.steering import ChangeRows, check_sae
from cache.errors import HearsaeError
from cache.header import PADDED, name_of_context
from cache.location import Location, location
from cache.model import LoadedModel
from cache.store import ActivationStore
from sae.models import Dictionary, SaeConfig, load_dictionary

FIT_ROWS = 4096
"""From which the size of a random dictionary's reconstructions is fitted: one number, so few rows do."""


@dataclass(frozen=True)
class CapturedSpeech(StoredSpeech):
    """The clips of a store that have rows of a site; the audio is read from where the store's came from."""

    captured: str = ""
    """The site."""

    @cached_property
    def table(self) -> pa.Table:
        clips = [span.clip for shard in self.store.committed(self.captured) for span in self.store.spans(shard, self.captured)]
        return self.store.clips.take(clips[: self.limit])


# Changes


@lru_cache(maxsize=4)
def _worker_dictionary(folder: str, device: str) -> Dictionary:
    return load_dictionary(location(folder)).requires_grad_(False).to(device)


@dataclass(frozen=True)
class Spliced:
    """Every row is replaced by its reconstruction."""

    site: str
    folder: str
    """Of the SAE."""

    def open(self, model: LoadedModel) -> ChangeRows:
        return reconstruct_with(_worker_dictionary(self.folder, str(model.device)))


@dataclass(frozen=True, eq=False)
class RandomlySpliced:
    """The control: the same by a dictionary that nobody trained."""

    config: SaeConfig
    """Of the SAE that it stands beside."""
    k: int
    mean: np.ndarray
    """float64 [d], of the site's rows."""
    gain: float
    seed: int

    @property
    def site(self) -> str:
        return self.config.site

    def open(self, model: LoadedModel) -> ChangeRows:
        return reconstruct_with(random_dictionary(self.config, self.k, self.mean, self.gain, self.seed).to(model.device))


def reconstruct_with(dictionary: Dictionary) -> ChangeRows:
    def change(rows: Tensor) -> Tensor:
        return dictionary.reconstruct(rows)[0].to(rows.dtype) if len(rows) else rows

    return change


def random_dictionary(config: SaeConfig, k: int, mean: np.ndarray, gain: float, seed: int) -> Dictionary:
    """Of the same shape, as training begins: random unit decoder rows, the encoder their transpose. Each row of x - mean keeps its k largest
    latents, and what they give is multiplied by `gain`."""
    dictionary = Dictionary(replace(config, arch="topk", k=k, sparsity=0.0))
    dictionary.init_parameters(torch.Generator().manual_seed(seed))
    dictionary.W_dec.data *= gain
    dictionary.b_dec.data.copy_(torch.from_numpy(mean))
    return dictionary.requires_grad_(False)


def fitted_gain(config: SaeConfig, k: int, mean: np.ndarray, rows: Tensor, seed: int) -> float:
    """The gain with which a random dictionary comes closest to rows [n, d]: sum of x_hat . x over sum of ||x_hat||^2, both about the mean.

    Without it the sum of latents that are not orthogonal is too long, and the control would lose by that alone.
    """
    dictionary = random_dictionary(config, k, mean, 1.0, seed)
    centre = torch.from_numpy(mean).float()
    x, x_hat = rows.float() - centre, dictionary.reconstruct(rows.float())[0] - centre
    return float((x_hat * x).sum(dtype=torch.float64) / x_hat.square().sum(dtype=torch.float64))


# The measurement


class ToSplice(NamedTuple):
    """An SAE, and what its controls take from the store."""

    folder: Location
    config: SaeConfig
    l0: float
    """Mean number of latents that fire in a row: a random dictionary keeps as many."""


def check(todo: Sequence[tuple[Location, SaeConfig]], store: ActivationStore, model: LoadedModel, speech: Speech, language: str) -> None:
    """All that can be refused before there is work to lose. Raises HearsaeError for transcoders and crosscoders, another model than the store's,
    a store of trimmed windows, and decoder sites without a decoder or texts."""
    if model.sha256 != store.header.model["sha256"]:
        theirs = f"{store.header.model['name']}, {store.header.model['sha256'][:12]}"
        raise HearsaeError(
            f"{store.path} holds activations of another model ({theirs}) than {model.name} ({model.sha256[:12]}): give its own --model"
        )
    if store.header.context != PADDED:
        raise HearsaeError(f"{store.path} is {name_of_context(store.header.context)}, but codes are put back into whole windows: give a padded store")
    check_language(model, language)
    sites = [check_sae(folder, config, model) for folder, config in todo]
    if not speech.clips:
        raise HearsaeError(f"{speech.dataset} has no clips of {sites[0].name}")
    for site in sites:
        if site.needs_decoder and not any(clip.text for clip in speech.clips):
            raise HearsaeError(f"{site.name} is in the decoder, and no clip of {speech.dataset} has a text: without one there is nothing to measure")


def splice(
    saes: Sequence[ToSplice],
    store: ActivationStore,
    speech: Speech,
    model: str,
    everywhere: bool = False,
    seed: int = 0,
    language: str = "en",
    device: str = "auto",
    map_pieces: Mapper = in_this_process,
) -> list[dict[str, Any]]:
    """Of each SAE, ready for JSON: what comes out of the model as it is, with the SAE in place of its site, with the site's rows at zero, at their
    mean in the store, and with a random dictionary of the same shape and L0 in its place. `check` says first what can't be.

    everywhere: splice in the padding after each clip too. SAEs are trained on the clips' own frames, so by default it stays as it is.
    """
    stretch = Stretch(everywhere=everywhere)
    changes: list[Change] = []
    names: list[tuple[str, str]] = []
    """(SAE or site, what is put in its place)"""
    for site in dict.fromkeys(one.config.site for one in saes):
        changes += [Replaced(site, None), Replaced(site, store.stats(site).mean)]
        names += [(site, "zero"), (site, "mean")]
    for one in saes:
        k, mean = max(1, round(one.l0)), store.stats(one.config.site).mean
        gain = fitted_gain(one.config, k, mean, _some_rows(store, one.config.site), seed)
        folder = str(one.folder.absolute())  # workers may be elsewhere
        changes += [Spliced(one.config.site, folder), RandomlySpliced(one.config, k, mean, gain, seed)]
        names += [(folder, "spliced"), (folder, "random")]
    unchanged, columns = run_changes(speech, model, device, changes, stretch, language, True, map_pieces)
    by_name = {name: summarise(speech.clips, unchanged, outcomes, language) for name, outcomes in zip(names, columns, strict=True)}
    original = summarise(speech.clips, unchanged, unchanged, language)
    has_decoder = worker_model(model, device).has_decoder
    results = []
    for one in saes:
        site, folder = one.config.site, str(one.folder.absolute())
        effects = {
            "original": original,
            "spliced": by_name[folder, "spliced"],
            "zero": by_name[site, "zero"],
            "mean": by_name[site, "mean"],
            "random": by_name[folder, "random"],
        }
        where = stretch.words() if site.startswith("encoder.") else "at all tokens"
        results.append(_result(effects, unchanged, where, has_decoder))
    return results


def _result(effects: dict[str, dict[str, Any]], unchanged: Sequence[Outcome], where: str, has_decoder: bool) -> dict[str, Any]:
    output = {name: one["output"]["inside"] for name, one in effects.items() if name != "original"}
    moved = {"original": 0.0} | {name: drift["relative"] ** 2 if drift and drift["relative"] is not None else None for name, drift in output.items()}
    ce, wer = ({name: one[key] for name, one in effects.items()} for key in ("ce", "wer"))
    measures = {"ce": ce, "wer": wer, "output": moved}

    def recovered(what: str) -> dict[str, float | None]:
        return {
            f"{key}_recovered{suffix}": _recovered(values, what, without)
            for key, values in measures.items()
            for without, suffix in (("zero", ""), ("mean", "_mean"))
        }

    return {
        "measured": "cross-entropy, transcripts and encoder output" if has_decoder else "encoder output",
        "where": where,
        "clips": len(unchanged),
        "tokens": sum(one.tokens for one in unchanged),
        "ce": ce,
        "wer": wer,
        "output": output,
        **recovered("spliced"),
        "control": recovered("random"),
    }


def _recovered(values: dict[str, float | None], what: str, without: str) -> float | None:
    """None where nothing was measured, or nothing is lost without the site."""
    here, lost, whole = values[what], values[without], values["original"]
    if here is None or lost is None or whole is None or lost == whole:
        return None
    return (lost - here) / (lost - whole)


def _some_rows(store: ActivationStore, site: str) -> Tensor:
    """The first rows of the site: float32 [at most about FIT_ROWS, d]."""
    parts, rows = [], 0
    for shard in store.committed(site):
        for span in store.spans(shard, site):
            parts.append(torch.from_numpy(store.read_clip(site, span.clip)).float())
            rows += len(parts[-1])
            if rows >= FIT_ROWS:
                return torch.cat(parts)
    return torch.cat(parts)


# For people


def table(results: Sequence[dict[str, Any]]) -> list[str]:
    """Lines for the terminal. results: those of `hearsae evaluate`, each with its `splice`."""
    first = results[0]["splice"]
    lines = [f"spliced into {', '.join(dict.fromkeys(one['site'] for one in results))}, {first['where']}; {first['clips']} clips:"]
    has_ce, has_wer = (any(one["splice"][key]["original"] is not None for one in results) for key in ("ce", "wer"))
    if first["measured"] == "encoder output":
        lines.append("no decoder in this checkpoint: measured at the encoder's output")
    head = ["in its place", *(["cross-entropy", "recovered", "of mean"] if has_ce else []), *(["WER", "recovered", "of mean"] if has_wer else [])]
    rows = [[*head, "output moved", "cosine", "recovered", "of mean"]]

    def add(name: str, splice: dict[str, Any], what: str, recovered: dict[str, Any] | None) -> None:
        row = [name]
        for key, form, has in (("ce", ".4f", has_ce), ("wer", ".1%", has_wer)):
            row += [_number(splice[key][what], form), *_both(recovered, key)] if has else []
        drift = splice["output"].get(what) or {}
        rows.append([*row, _number(drift.get("relative"), ".3f"), _number(drift.get("cosine"), ".4f"), *_both(recovered, "output")])

    seen: set[str] = set()
    for one in results:
        splice = one["splice"]
        if one["site"] not in seen:
            seen.add(one["site"])
            for name, what in ((one["site"], "original"), ("  its mean", "mean"), ("  zeros", "zero")):
                add(name, splice, what, None)
        add(one["dir"], splice, "spliced", splice)
        add("  control: random dictionary", splice, "random", splice["control"])
    return [*lines, *aligned(rows)]


def _both(recovered: dict[str, Any] | None, key: str) -> list[str]:
    return [_number((recovered or {}).get(f"{key}_recovered{suffix}"), ".1%") for suffix in ("", "_mean")]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
