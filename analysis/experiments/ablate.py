"""Ablation: what is lost when features are removed, one by one or together, or when a whole site is put out."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from analysis.experiments.activity import Activity, activity
from analysis.experiments.changes import Change, Replaced, SameSize, Steered, Stretch, worker_steerable
from analysis.experiments.effect_tables import aligned, as_row, bars, examples, in_lines, without_empty
from analysis.experiments.effects import Outcome, row_of, run_changes, summarise
from analysis.experiments.report import Report
from analysis.experiments.speech import Clip, Mapper, Speech, in_this_process, worker_model
from analysis.experiments.steer import CONTROLS, ENCODER_OUTPUT, RANDOM_DIRECTION, check_language, explained, measured, steer
from analysis.pictures import new_figure
from analysis.steering import Edit, edit_rows, site_of
from cache.errors import HearsaeError

RANKED = 20
"""Features whose removal is tried, one after the other."""
SHOWN = 20
"""Of a ranking on the terminal."""
Mode = Literal["zero", "mean"]


def remove(
    speech: Speech,
    model: str,
    features: str,
    feature: Sequence[int],
    stretch: Stretch | None = None,
    controls: int = CONTROLS,
    seed: int = 0,
    language: str = "en",
    device: str = "auto",
    map_pieces: Mapper = in_this_process,
) -> Report:
    """Removes features together: `steer` by a factor of 0."""
    report = steer(speech, model, features, feature, "scale", (0.0,), stretch, controls, seed, language, device, map_pieces)
    return replace(report, title="Ablation of features")


def rank(
    speech: Speech,
    model: str,
    features: str,
    feature: Sequence[int] = (),
    top: int = RANKED,
    stretch: Stretch | None = None,
    seed: int = 0,
    language: str = "en",
    device: str = "auto",
    map_pieces: Mapper = in_this_process,
) -> Report:
    """Removes each of the features alone, and orders them by the damage: the rise of the cross-entropy of the clips' texts; of a checkpoint without
    a decoder, or of speech without texts, how far the encoder's output moves.

    feature: those to try; none: the `top` with the largest mean |value| in this speech. The control is as many others that are active, at random.
    Nothing is transcribed. Raises HearsaeError for features and places that can't be, and where there is nothing to measure.
    """
    stretch = stretch or Stretch()
    loaded = worker_model(model, device)
    steerable = worker_steerable(features, model, device, seed)
    edit_rows(steerable, [Edit(tuple(feature), "scale", 0.0)])  # refuses features that are not there
    if top < 1:
        raise HearsaeError(f"--top {top} must be at least 1")
    stretch.check(steerable.site, speech.clips)
    check_language(loaded, language)
    by_loss = loaded.has_decoder and any(clip.text for clip in speech.clips)
    if not by_loss and not steerable.site.startswith("encoder."):
        raise HearsaeError(f"{speech.dataset} has no texts, without which the damage of a feature of {steerable.site} can't be told: give some")

    known = activity(speech, model, device, steerable.spec, seed, language, map_pieces)
    chosen = tuple(dict.fromkeys(feature)) or known.most_active(top)
    others = known.random(chosen, len(chosen), seed)
    changes = [Steered(steerable.site, steerable.spec, (Edit((one,), "scale", 0.0),), device, seed) for one in (*chosen, *others)]
    unchanged, columns = run_changes(speech, model, device, changes, stretch, language, False, map_pieces)
    rows = [
        _damage(speech.clips, known, one, one not in chosen, unchanged, outcomes) for one, outcomes in zip((*chosen, *others), columns, strict=True)
    ]
    key = "ce_change" if by_loss else "output_relative"
    rows.sort(key=lambda row: (row["is_control"], -row[key]))
    ranking, control = [row for row in rows if not row["is_control"]], [row for row in rows if row["is_control"]]
    summary: dict[str, Any] = {
        "features": steerable.spec,
        "site": steerable.site,
        "where": stretch.words() if steerable.site.startswith("encoder.") else "at all tokens",
        "measured": "cross-entropy" if by_loss else ENCODER_OUTPUT,
        "by": key,
        "clips": len(speech.clips),
        "unchanged": summarise(speech.clips, unchanged, unchanged, language),
        "ranking": ranking,
        "mean": float(np.mean([row[key] for row in ranking])),
        "control": {"ranking": control, "mean": float(np.mean([row[key] for row in control])) if control else None},
    }
    damage = "the cross-entropy of the clips' texts rises, in nats a token" if by_loss else "the encoder's output moves, relative to its size"
    return Report(
        title="Ablation, feature by feature",
        what=f"Each of {len(ranking)} features of {steerable.spec} was removed alone, {summary['where']}. Its damage is by how much {damage}. "
        + ("The features are those asked for. " if feature else f"The features are the {len(ranking)} with the largest mean |value| in this speech. ")
        + f"Control: {len(control)} other features that are active, drawn at random, each removed alone.",
        rows=rows,
        summary=summary,
        figures={"ranking": _ranking(ranking, control, key, damage)},
        captions={"ranking": "Damage of each feature's removal, from the largest on; grey: random features."},
        tables={"Ranking": without_empty(ranking), "Control: random features": without_empty(control)},
        lines=_lines(summary),
    )


def put_out(
    speech: Speech,
    model: str,
    site: str,
    mode: Mode = "zero",
    stretch: Stretch | None = None,
    seed: int = 0,
    language: str = "en",
    device: str = "auto",
    map_pieces: Mapper = in_this_process,
) -> Report:
    """Replaces every row of a site by zeros, or by the mean of its rows in this speech. The control moves every row as far, in one random direction.

    Raises HearsaeError for a site or a place that can't be.
    """
    stretch = stretch or Stretch()
    loaded = worker_model(model, device)
    site_of(site, loaded)  # refused before there is work to lose
    stretch.check(site, speech.clips)
    check_language(loaded, language)
    mean = activity(speech, model, device, f"neurons:{site}", seed, language, map_pieces).mean_row if mode == "mean" else None
    change = Replaced(site, mean)
    changes: list[Change] = [change, SameSize(change, seed)]
    unchanged, columns = run_changes(speech, model, device, changes, stretch, language, True, map_pieces)
    name = f"{site} at {'zero' if mode == 'zero' else 'its mean'}"
    effects = {kind: summarise(speech.clips, unchanged, outcomes, language) for kind, outcomes in zip((name, RANDOM_DIRECTION), columns, strict=True)}
    rows = [
        {"change": kind} | row_of(*one, language)
        for kind, outcomes in zip((name, RANDOM_DIRECTION), columns, strict=True)
        for one in zip(speech.clips, unchanged, outcomes, strict=True)
    ]
    where = stretch.words() if site.startswith("encoder.") else "at all tokens"
    summary: dict[str, Any] = {
        "site": site,
        "mode": mode,
        "where": where,
        "measured": measured(loaded),
        "clips": len(speech.clips),
        "unchanged": summarise(speech.clips, unchanged, unchanged, language),
        "ablated": effects[name],
        "control": {RANDOM_DIRECTION: effects[RANDOM_DIRECTION]},
    }
    said = "no decoder in this checkpoint: measured at the encoder's output; " if summary["measured"] == ENCODER_OUTPUT else ""
    return Report(
        title="Ablation of a site",
        what=f"Every row of {site} was replaced by {'zeros' if mode == 'zero' else 'the mean of its rows in this speech'}, {where}. "
        f"{explained(loaded)}\n\nControl, at the same places: every row moved as far, along one random direction.",
        rows=rows,
        summary=summary,
        figures={"ablation": bars({name: {"put out": effects[name], RANDOM_DIRECTION: effects[RANDOM_DIRECTION]}}, summary["unchanged"])},
        captions={"ablation": "What putting the site out does, against a move of the same size in a random direction. Dashed: the unchanged model."},
        tables={
            "Effects": without_empty([{"change": kind, **as_row(one)} for kind, one in effects.items()]),
            "Transcripts that changed": examples([row for row in rows if row["change"] == name]),
        },
        lines=[f"{said}{where}; {len(speech.clips)} clips", *in_lines({"unchanged": summary["unchanged"]} | effects)],
    )


def _damage(
    clips: Sequence[Clip], known: Activity, feature: int, is_control: bool, unchanged: Sequence[Outcome], changed: Sequence[Outcome]
) -> dict[str, Any]:
    effect = summarise(clips, unchanged, changed)
    output = effect["output"]["inside"] or {}
    worse = [b.loss > a.loss for a, b in zip(unchanged, changed, strict=True) if a.loss is not None and b.loss is not None]
    return {
        "feature": feature,
        "is_control": is_control,
        "ce_change": effect["ce_change"],
        "clips_worse": sum(worse) / len(worse) if worse else None,
        "output_relative": output.get("relative"),
        "output_cosine": output.get("cosine"),
        "density": float(known.density[feature]),
        "mean_abs": float(known.mean_abs[feature]),
    }


def _ranking(ranking: Sequence[dict[str, Any]], control: Sequence[dict[str, Any]], key: str, damage: str) -> Any:
    figure = new_figure(8.0, 4.0)
    axes = figure.subplots()
    axes.plot(range(1, len(control) + 1), [row[key] for row in control], color="0.6", marker="s", markersize=4, label="random features")
    axes.plot(range(1, len(ranking) + 1), [row[key] for row in ranking], color="#0072B2", marker="o", markersize=4, label="the features")
    for place, row in enumerate(ranking[:8], 1):
        axes.annotate(str(row["feature"]), (place, row[key]), xytext=(4, 4), textcoords="offset points", fontsize=8)
    axes.axhline(0, color="0.4", linewidth=1, linestyle="--")
    axes.set(xlabel="rank", ylabel="damage", title=f"By how much {damage}")
    axes.title.set_fontsize(10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    return figure


def _lines(summary: dict[str, Any]) -> list[str]:
    by_loss = summary["by"] == "ce_change"
    out = [f"{summary['features']}: each of {len(summary['ranking'])} features removed alone, {summary['where']}; {summary['clips']} clips"]
    if by_loss:
        out.append(f"  unchanged: cross-entropy {summary['unchanged']['ce']:.4f} nats a token; damage is its rise")
    else:
        out.append("  no texts or no decoder: damage is how far the encoder's output moves, relative to its size")
    table = [["feature", "damage", *(["clips worse"] if by_loss else ["cosine"]), "active in", "mean |value|"]]
    for row in summary["ranking"][:SHOWN]:
        second = f"{row['clips_worse']:.0%}" if by_loss else f"{row['output_cosine']:.4f}"
        table.append([str(row["feature"]), f"{row[summary['by']]:+.4f}", second, f"{row['density']:.1%}", f"{row['mean_abs']:.4f}"])
    control = summary["control"]
    out += ["  " + line for line in aligned(table)]
    out.append(f"  mean {summary['mean']:+.4f}")
    if control["ranking"]:
        largest = control["ranking"][0]
        out.append(f"  control, {len(control['ranking'])} random features: mean {control['mean']:+.4f}, largest {largest[summary['by']]:+.4f}")
    return out
