"""Concept erasure: how many features carry a concept, and how many must go until no linear probe finds it any more.

The procedure is that of AudioSAE (2602.05027), with the sparse probes of Gurnee et al. (2305.01610). Everything is chosen on training speakers and
tested on held-out ones.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from analysis.concepts import PARTS, Pool, Samples, choose_samples, open_track, sample_values
from analysis.erasure import SILENCED, ErasureData, enough_of, grid, mean_of, probe_concept
from analysis.experiments.report import Report
from analysis.experiments.speech import Mapper, in_this_process
from analysis.features import Features, Neurons, open_features
from analysis.pictures import new_figure
from cache.errors import HearsaeError
from cache.location import Location
from cache.store import ActivationStore

KS = (1, 2, 5, 20)
"""Features of sparse probes, as in AudioSAE and Gurnee et al."""
SAMPLES = 20_000
"""Enough for a few hundred of a phone that is 2 % of speech, few enough for a minute a concept."""
MOST_BYTES = 4 << 30
"""Of the values of all samples, in the memory of every worker."""
LEAST = {"frame": 50, "clip": 8}
"""Training samples with and without a concept that a probe needs; half as many for its test."""


def erase(
    store: Location,
    features: str,
    concept: str,
    ks: Sequence[int] = KS,
    pool: Pool | None = None,
    samples: int = SAMPLES,
    folds: int = 1,
    limit: int | None = None,
    baseline: bool = True,
    seed: int = 0,
    map_pieces: Mapper = in_this_process,
) -> Report:
    """Probes for a concept, or each of several, in `features` and, with `baseline`, in the neurons of the same site.

    concept: as in `analysis.concepts`. pool: of a column's concepts, how the frames of a clip become one sample; `none` takes frames; phones are
    always of frames. samples: at most so many. folds: groups of speakers that are held out in turn, of PARTS; scores are means over them.
    limit: the first so many clips of the store only.
    Raises HearsaeError for what can't be read and for concepts of which there are too few samples.
    """
    if not ks or min(ks) < 1:
        raise HearsaeError("--k: give one number of features or more, each at least 1")
    if not 1 <= folds <= PARTS:
        raise HearsaeError(f"--folds {folds} must be between 1 and {PARTS}: the speakers are dealt out to {PARTS} groups")
    if samples < 1 or (limit is not None and limit < 1):
        raise HearsaeError("--samples and --limit must be at least 1")
    opened = ActivationStore.open(store)
    track = open_track(opened, concept)
    if track.phones is not None and pool not in (None, "none"):
        raise HearsaeError(f"--pool {pool}: phones are said in frames, which are not pooled; leave it away")
    bases = _bases(opened, features, baseline, seed)
    how: Pool = pool or ("none" if track.phones is not None else "mean")
    chosen = choose_samples(opened, bases[0].site, track, samples, how != "none", limit, seed)
    width = sum(one.count for one in bases)
    if len(chosen.clip) * width * 4 > MOST_BYTES:
        most = MOST_BYTES // 4 // width
        raise HearsaeError(f"{len(chosen.clip)} samples of {width} features do not fit into {MOST_BYTES >> 30} GB of memory: use --samples {most}")
    data = ErasureData(chosen, track.concepts, {}, LEAST["frame" if how == "none" else "clip"], tuple(dict.fromkeys(ks)), folds, seed)
    probed, skipped = enough_of(data)
    if not probed:
        what = f"{data.least} training and {data.least // 2} test samples with it and without it" + (
            "" if track.column == "speaker" else ", by different speakers"
        )
        raise HearsaeError(f"concept '{concept}' can't be probed in {opened.path}: none of its {len(skipped)} values has {what}")
    shards = sorted({int(opened.clips["shard"][int(clip)].as_py()) for clip in np.unique(chosen.clip)})
    parts = map_pieces(partial(sample_values, opened, bases, chosen, how), shards)
    data = data._replace(values={one.spec: np.concatenate([part[i] for part in parts]) for i, one in enumerate(bases)})
    pieces = [(one.spec, name) for name in probed for one in bases]
    found = map_pieces(partial(probe_concept, data), pieces)
    rows = [row for part in found for row in part.rows]
    results = [part.result for part in found]
    settings = {
        "concept": concept,
        "features": features,
        "site": bases[0].site,
        "pool": how,
        "by": "clip" if track.column == "speaker" else "speaker",
    }
    summary = _summary(results, settings, chosen, skipped, data)
    return _report(rows, summary)


def _bases(store: ActivationStore, spec: str, baseline: bool, seed: int) -> list[Features]:
    opened = open_features(spec, store, seed)
    if store.sites[opened.site]["axis"] != "frame":
        raise HearsaeError(f"{opened.site} is a site of the decoder: phones and clips are probed in the encoder's frames")
    neurons = Neurons(opened.site, store.sites[opened.site]["width"])
    return [opened, neurons] if baseline and opened.spec != neurons.spec else [opened]


# What is said of it


def _summary(results: list[dict[str, Any]], settings: dict[str, Any], samples: Samples, skipped: list[str], data: ErasureData) -> dict[str, Any]:
    bases = list(dict.fromkeys(one["basis"] for one in results))
    return {
        **settings,
        "results": results,
        "bases": {basis: _means([one for one in results if one["basis"] == basis]) for basis in bases},
        "control": {basis: _control([one for one in results if one["basis"] == basis]) for basis in bases},
        "samples": len(samples.clip),
        "clips": len(np.unique(samples.clip)),
        "speakers": samples.speakers,
        "held_out_clips": len(np.unique(samples.clip[samples.part < data.folds])),
        "folds": data.folds,
        "left_out_clips": samples.left_out,
        "skipped_concepts": skipped,
    }


def _means(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Over concepts. Of the numbers of features medians, over the concepts that the dense probe finds at all."""
    median = {
        name: float(np.median([one[name] for one in results if one["works"]])) if any(one["works"] for one in results) else None
        for name in results[0]
        if name.startswith("until_")
    }
    ks = results[0]["by_k"]
    return {
        "concepts": len(results),
        "found": sum(one["works"] for one in results),
        "alive": results[0]["alive"],
        "dense": mean_of(one["dense"]["balanced_accuracy"] for one in results),
        "dense_auc": mean_of(one["dense"]["auc"] for one in results),
        "by_k": {k: mean_of(one["by_k"][k] for one in results) for k in ks},
        **median,
    }


def _control(results: list[dict[str, Any]]) -> dict[str, Any]:
    of = [one["control"] for one in results]
    by_k = {name: {k: mean_of(one[name][k] for one in of) for k in of[0][name]} for name in ("by_k_random", "by_k_shuffled")}
    return {"dense_shuffled": mean_of(one["dense_shuffled"] for one in of), **by_k}


def _report(rows: list[dict[str, Any]], summary: dict[str, Any]) -> Report:
    kind = {"none": "frames", "mean": "clips, every feature's mean over its frames", "max": "clips, every feature's largest value over its frames"}
    held_out = {
        "clip": "clips that no probe was trained on (the concept is the speaker, so speakers can't be held out)",
        "speaker": "speakers that no probe was trained on",
    }
    return Report(
        title="Concept erasure",
        what=f"Linear probes for {summary['concept']} in {summary['features']}. Samples are {kind[summary['pool']]}; probes are tested on "
        f"{held_out[summary['by']]}. Balanced accuracy is the mean share of samples with and without the concept that are recognised: 0.5 is chance."
        "\n\nSparse probes look at the k features that tell the concept best on the training samples. For erasure the m most telling features are "
        "removed, and a fresh probe is trained on all that are left. 'Until half': how many must go until half of what the probe is above chance is "
        "gone; 'until chance': until it is no better than probes of shuffled labels are (95 % interval). 'Not trained again' is the same for "
        "the probe that was trained on all features, with the removed ones at their mean. Controls: features removed in random order, and "
        "shuffled labels.",
        rows=rows,
        summary=summary,
        figures={"erasure": _erasure_figure(rows, summary), "sparse": _sparse_figure(summary)},
        captions={
            "erasure": "Balanced accuracy on held-out samples against the number of removed features"
            + (", mean over concepts." if len({row["concept"] for row in rows}) > 1 else "."),
            "sparse": "Balanced accuracy of probes on k features: chosen for the concept, taken at random, and chosen for shuffled labels.",
        },
        tables={"Bases": _basis_table(summary), "Concepts": _concept_table(summary)},
        lines=_lines(summary),
    )


def _basis_table(summary: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for basis, one in summary["bases"].items():
        control = summary["control"][basis]
        rows.append(
            {"features": _short(basis), "alive": one["alive"], "concepts": one["concepts"], "found": one["found"]}
            | {f"k = {k}": value for k, value in one["by_k"].items()}
            | {"all": one["dense"], "all, shuffled labels": control["dense_shuffled"]}
            | {f"gone until {level}{words}": one[f"until_{level}{order}_share"] for order, words in GONE.items() for level in ("half", "chance")}
        )
    return rows


def _concept_table(summary: dict[str, Any]) -> list[dict[str, Any]]:
    ordered = sorted(summary["results"], key=lambda one: (one["concept"], one["basis"]))
    return [
        {"concept": one["concept"], "features": _short(one["basis"]), "samples": one["samples"]}
        | {f"k = {k}": value for k, value in one["by_k"].items()}
        | {"all": one["dense"]["balanced_accuracy"], "AUC": one["dense"]["auc"], "F1": one["dense"]["f1"], "chance, upper end": one["chance"]}
        | {"until half": one["until_half"], "until chance": one["until_chance"], "share until chance": one["until_chance_share"]}
        | {"best features": ", ".join(map(str, list(one["features"].values())[-1][:5]))}
        for one in ordered
    ]


def _short(basis: str) -> str:
    kind, _, name = basis.partition(":")
    return f"{kind} {name.rstrip('/').rpartition('/')[2]}"


GONE = {"": "", f"_{SILENCED}": ", not trained again", "_random": ", random order"}
COLOURS = ("#0072B2", "#D55E00")
STYLES = {"ranked": "-", SILENCED: "-.", "random": "--", "shuffled": ":"}
WORDS = {"ranked": "most telling first", SILENCED: "the same, probe not trained again", "random": "random order", "shuffled": "shuffled labels"}


def _erasure_figure(rows: Sequence[dict[str, Any]], summary: dict[str, Any]) -> Any:
    figure = new_figure()
    axes = figure.subplots()
    for (basis, one), colour in zip(summary["bases"].items(), COLOURS, strict=False):
        own = [row for row in rows if row["basis"] == basis and row["kind"] == "erase"]
        for order in STYLES:
            ms = sorted({row["m"] for row in own if row["order"] == order and row["m"] in grid(one["alive"])})
            means = [mean_of(row["balanced_accuracy"] for row in own if row["order"] == order and row["m"] == m) for m in ms]
            axes.plot(ms, means, color=colour, linestyle=STYLES[order], marker="o" if order == "ranked" else None, markersize=4,
                      label=f"{_short(basis)}: {WORDS[order]}")  # fmt: skip
    axes.set_xscale("symlog", linthresh=1)
    most = max(one["alive"] for one in summary["bases"].values())
    ticks = [0, *(10**power for power in range(len(str(most))))]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set(xlabel="features removed", ylabel="balanced accuracy, held out", ylim=(0.4, 1.02), xlim=(-0.1, most * 1.3))
    axes.axhline(0.5, color="0.7", linewidth=1)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, fontsize=8, ncols=2, loc="outside lower center")
    return figure


def _sparse_figure(summary: dict[str, Any]) -> Any:
    bases = summary["bases"]
    figure = new_figure()
    axes = figure.subplots()
    ks = [*next(iter(bases.values()))["by_k"], "all"]
    width = 0.8 / (len(bases) * 3)
    place = np.arange(len(ks))
    for number, ((basis, one), colour) in enumerate(zip(bases.items(), COLOURS, strict=False)):
        control = summary["control"][basis]
        series = (
            ("chosen", [*one["by_k"].values(), one["dense"]], 1.0),
            ("random features", [*control["by_k_random"].values(), np.nan], 0.5),
            ("shuffled labels", [*control["by_k_shuffled"].values(), control["dense_shuffled"]], 0.2),
        )
        for i, (name, heights, alpha) in enumerate(series):
            at = place + (number * 3 + i + 0.5) * width - 0.4
            axes.bar(at, np.array(heights) - 0.5, width, bottom=0.5, color=colour, alpha=alpha, label=f"{_short(basis)}: {name}")
    axes.set_xticks(place, ks)
    axes.set(xlabel="features that the probe looks at", ylabel="balanced accuracy, held out", ylim=(0.4, 1.02))
    axes.axhline(0.5, color="0.7", linewidth=1)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, fontsize=8, ncols=len(bases), loc="outside lower center")
    return figure


def _lines(summary: dict[str, Any]) -> list[str]:
    what = "frames" if summary["pool"] == "none" else "clips"
    found = next(iter(summary["bases"].values()))["concepts"]
    lines = [
        f"{found} concept{'s' * (found != 1)}, {summary['samples']} {what} of {summary['clips']} clips; tested on {summary['held_out_clips']} clips "
        + ("that were held out, of known speakers" if summary["by"] == "clip" else f"of held-out speakers ({summary['speakers']} speakers in all)")
    ]
    if summary["skipped_concepts"]:
        lines.append(
            f"  with too few samples to be probed: {', '.join(summary['skipped_concepts'][:10])}{' ...' * (len(summary['skipped_concepts']) > 10)}"
        )
    if summary["left_out_clips"]:
        lines.append(f"  {summary['left_out_clips']} clips were left out: their speaker or label is not known")
    for basis, one in summary["bases"].items():
        control = summary["control"][basis]
        by_k = ", ".join(f"k = {k}: {value:.3f}" for k, value in one["by_k"].items())
        lines.append(f"{_short(basis)} ({one['alive']} features that vary): balanced accuracy {by_k}, all: {one['dense']:.3f}")
        by_k = ", ".join(f"k = {k}: {value:.3f}" for k, value in control["by_k_random"].items())
        lines.append(f"  controls: shuffled labels {control['dense_shuffled']:.3f}; random features {by_k}")
        if one["found"]:
            lines.append(f"  must go until half of it is gone: {_shares(one, 'half')}")
            lines.append(f"  must go until chance: {_shares(one, 'chance')}")
        else:
            lines.append("  nothing to erase: the dense probe is no better than shuffled labels")
    return lines


def _shares(one: dict[str, Any], level: str) -> str:
    shares = "; ".join(f"{one[f'until_{level}{order}_share']:.1%}{words}" for order, words in GONE.items())
    return f"{one[f'until_{level}']:.0f} features ({shares})"
