"""Which phones the features of a basis follow, and what they respond to at lower activation: scans with phone evidence, as a report."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from analysis.evidence import PhoneEvidence
from analysis.experiments.report import Report
from analysis.phone_figure import draw_mix
from analysis.phone_table import F1_LEVELS, LEVELS, most_polysemantic, phone_rows, summary
from analysis.pictures import new_figure
from analysis.scan import Scan

BEST = 12
"""Features in the table of the best detectors."""
MIXES = 2
"""Features that are drawn."""
SHOWN = ("feature", "phone", "f1", "precision", "recall", "auc", "auc_shuffled", "onset_ms", "polysemanticity", "ranges")


def phone_report(title: str, name: str, scan: Scan, controls: Mapping[str, Scan]) -> Report:
    """The features that tell a phone best, how many do, and how many of the controls, and of the same features under shuffled labels.

    scan: with phone evidence, else HearsaeError. controls: name -> scan of another basis of the same space, usually a random one.
    """
    evidence = PhoneEvidence.open(scan)
    counts = {name: summary(evidence)} | {control: summary(PhoneEvidence.open(of)) for control, of in controls.items()}
    best = phone_rows(evidence, _best_detectors(evidence, BEST))
    figures = {"detectors": _curves({name: evidence} | {control: PhoneEvidence.open(of) for control, of in controls.items()})}
    captions = {"detectors": "The F1 of every feature with its best phone, from best to worst; and of the controls."}
    for row in best[:MIXES]:
        feature = row["feature"]
        figures[f"feature-{feature}"] = draw_mix(evidence.mix(feature), f"{name}, feature {feature}: {row['phone']}, F1 {row['f1']:.2f}")
        captions[f"feature-{feature}"] = f"What is said in each range of the activation of feature {feature}, over all labelled frames."
    covered = len(counts[name]["phones_covered"])
    return Report(
        title=title,
        what=f"Each feature with the phone that it follows best, over all frames of the speech. F1 asks whether it is active in the phone's frames "
        f"and in no others; AUC whether it is higher in them than elsewhere. {covered} phones have a feature with an F1 above {F1_LEVELS[0]}. "
        "Controls: a random basis of the same space, and the same features under shuffled labels.",
        rows=evidence.scores,
        summary={"features": counts[name], "control": {control: counts[control] for control in controls}},
        figures=figures,
        captions=captions,
        tables={"How many": _how_many(counts), "The best detectors": [{key: row[key] for key in SHOWN} for row in best]},
        lines=[
            f"{of}: F1 above {F1_LEVELS[0]}: {count['f1'][f'above_{F1_LEVELS[0]}']} of {count['features']}, AUC above {LEVELS[0]}: "
            f"{count['auc'][f'above_{LEVELS[0]}']} (shuffled labels {count['auc_shuffled'][f'above_{LEVELS[0]}']})"
            for of, count in counts.items()
        ],
    )


def polysemantic_report(title: str, name: str, scan: Scan, control: Scan) -> Report:
    """The features whose phones most surely change with activation: what looks like one phone at the top is another below."""
    evidence, of_control = PhoneEvidence.open(scan), PhoneEvidence.open(control)
    most = phone_rows(evidence, most_polysemantic(evidence, BEST))
    medians = {of: summary(one)["polysemanticity_median"] for of, one in ((name, evidence), ("control", of_control))}
    figures = {f"feature-{row['feature']}": draw_mix(evidence.mix(row["feature"]), f"{name}, feature {row['feature']}") for row in most[:MIXES]}
    columns = ("feature", "phone", "phones_at_top", "polysemanticity", "polysemanticity_lo", "polysemanticity_hi", "ranges")
    return Report(
        title=title,
        what="At its strongest moments a feature may look like a detector of one phone. Polysemanticity says by how much the mix of phones changes "
        "from the top of its activation to the ranges below, from 0 to 1, with its 95 % interval over speakers. Listed are features about at most "
        "three phones at the top, by the lower end of the interval. The control is a random basis of the same space.",
        rows=most,
        summary={"polysemanticity_median": medians[name], "control": {"polysemanticity_median": medians["control"]}, "listed": len(most)},
        figures=figures,
        captions={key: "The phones in each range of activation, over all labelled frames; at the right what is said at any time." for key in figures},
        tables={"The most polysemantic": [{key: row[key] for key in columns} for row in most]},
        lines=[f"median polysemanticity: {', '.join(f'{of} {_two(value)}' for of, value in medians.items())}"],
    )


def _two(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}"


def _best_detectors(evidence: PhoneEvidence, n: int) -> list[int]:
    """By F1: AUC also ranks frames in which a feature is not active (docs/phones.md)."""
    f1 = np.nan_to_num(evidence.scores["f1"].to_numpy(), nan=-1.0)
    order = np.argsort(-f1, kind="stable")[:n]
    return [int(feature) for feature in order if f1[feature] >= 0]


def _how_many(counts: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for name, count in counts.items():
        row: dict[str, Any] = {"basis": name, "features": count["features"]}
        row |= {f"F1 > {level}": count["f1"][f"above_{level}"] for level in F1_LEVELS}
        row |= {f"AUC > {level}": count["auc"][f"above_{level}"] for level in LEVELS}
        row |= {f"AUC > {level}, shuffled labels": count["auc_shuffled"][f"above_{level}"] for level in LEVELS}
        rows.append(row | {"phones with F1 > 0.5": len(count["phones_covered"])})
    return rows


def _curves(evidences: Mapping[str, PhoneEvidence]) -> Any:
    figure = new_figure(8, 4)
    axes = figure.subplots()
    styles: Sequence[tuple[str, str]] = (("#0072B2", "-"), ("#D55E00", "--"), ("#009E73", ":"), ("0.5", "-."))
    for (name, evidence), (colour, style) in zip(evidences.items(), styles, strict=False):
        f1 = np.sort(np.nan_to_num(evidence.scores["f1"].to_numpy()))[::-1]
        axes.plot(np.arange(1, len(f1) + 1), f1, color=colour, linestyle=style, label=f"{name} ({len(f1)})")
    axes.set(xscale="log", xlabel="features, from best to worst", ylabel="F1 with the best phone", ylim=(0, 1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure
