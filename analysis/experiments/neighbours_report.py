"""What `hearsae experiment neighbours` shows: the neighbours of some words, and whether they go with sound or with meaning."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from analysis.experiments.labels import drawn
from analysis.experiments.report import Report
from analysis.pictures import new_figure

MODEL, CHANCE, CONTROL = "#0072B2", "0.85", "0.6"
SAME_STEM, VARIANT = "#D55E00", "0.5"
COLUMNS = 7
"""Neighbours of a word in the picture."""
WIDTH, LEAST_PAIRS = 0.1, 20
"""Of the groups of pairs by how alike they sound; groups with fewer pairs are not shown."""
NAMES = {
    "sound": "sound",
    "spelling": "spelling",
    "sound_given_spelling": "sound, spelling being the same",
    "spelling_given_sound": "spelling, sound being the same",
    "company": "company in the corpus",
    "vectors": "the given vectors",
}

Row = dict[str, Any]


def neighbours_report(
    rows: Sequence[Row], shown: Sequence[str], summary: dict[str, Any], tables: tuple[np.ndarray | None, np.ndarray, np.ndarray]
) -> Report:
    """rows: neighbours of words. shown: the words of the picture. tables: [words, words]: sound, cosines, and those of random weights."""
    sound, cosines, of_random = tables
    figures = {"neighbours": _neighbours(rows, shown), "scores": _scores(summary)}
    captions = {
        "neighbours": "The nearest words, with the cosine of their embeddings. Orange: of the same stem. Grey: the word itself in another case.",
        "scores": "Left: Spearman's rank correlation of the cosine and each similarity over all pairs of words; the grey bars are the 95 % range "
        "when the words' labels are dealt out anew. Right: how often a neighbour is more like the word than a word drawn at random, with 95 % "
        "intervals over words; half is chance.",
    }
    if sound is not None:
        figures["sound"] = _by_sound(sound, cosines, of_random)
        captions["sound"] = (
            "The cosine of two words' embeddings by how alike they sound, medians of groups of pairs; bars: from the 25th to the 75th percentile."
        )
    corpus = summary["corpus"]
    return Report(
        title="Neighbours in the embedding",
        what="Words whose token embeddings in the decoder have the largest cosine. Words are tokens of letters with a space before them, whose "
        f"embedding no other token has. Scored are the {summary['words']} most frequent of the corpus ({corpus['name']}, {corpus['words']} words), "
        f"each in its more frequent case; neighbours are looked for among {summary['pool']} words. The word itself in another case is counted "
        "apart.\n\n"
        "Sound: 1 less the share of phones to be changed, of PocketSphinx's pronouncing dictionary, without stress. Spelling: the same of letters. "
        "Company: the cosine of positive pointwise mutual information in the corpus, where that is large enough. Vectors: the cosine of the word "
        "vectors that were given. Stems: English inflection by rules of spelling. Words that sound alike are spelled alike and often of one stem; "
        "therefore correlations where the other is the same, and rates without words of the same stem.\n\n"
        "Controls: the same tokens of the model with random weights; and the words' labels dealt out anew, so that each pair has another pair's "
        "similarity.",
        rows=rows,
        summary=summary,
        figures=figures,
        captions=captions,
        tables={"Correlation with the cosine": _correlations(summary), "Neighbours against words at random": _nearest(summary)},
        lines=_lines(rows, shown, summary),
    )


def _rho(one: Any) -> float | None:
    return one["rho"] if isinstance(one, dict) else one


def _correlations(summary: dict[str, Any]) -> list[Row]:
    of_random = summary["control"]["random_weights"]["correlation"]
    rows = []
    for name, one in summary["correlation"].items():
        shuffled = f"{one['shuffled'][0]:.3f} to {one['shuffled'][1]:.3f}" if isinstance(one, dict) else None
        pairs = one["pairs"] if isinstance(one, dict) else None
        rows.append(
            {"of": NAMES[name], "pairs": pairs, "Spearman": _rho(one), "shuffled, 95 %": shuffled, "random weights": _rho(of_random.get(name))}
        )
    return rows


def _measures(summary: dict[str, Any]) -> list[str]:
    return [name for name, one in summary["nearest"].items() if name in NAMES and one["closer"] is not None]


def _nearest(summary: dict[str, Any]) -> list[Row]:
    of_random = summary["control"]["random_weights"]["nearest"]
    rows = []
    for name in _measures(summary):
        one = summary["nearest"][name]
        rows.append(
            {"of": NAMES[name], "neighbours": one["neighbours"], "words at random": one["random"], "neighbour is closer": one["closer"],
             "of other stems": one["other_stems"], "random weights: neighbour is closer": of_random[name]["closer"]}
        )  # fmt: skip
    return rows


# Pictures


def _neighbours(rows: Sequence[Row], shown: Sequence[str]) -> Any:
    figure = new_figure(10.0, 0.6 + 0.34 * len(shown))
    axes = figure.subplots()
    for line, word in enumerate(shown):
        axes.text(-0.15, line, drawn(word), ha="right", va="center", weight="bold", fontsize=10, parse_math=False)
        for column, row in enumerate([row for row in rows if row["word"] == word][:COLUMNS]):
            colour = VARIANT if row["case_variant"] else SAME_STEM if row["same_stem"] else "black"
            axes.text(column, line, drawn(row["neighbour"]), va="center", fontsize=9, color=colour, parse_math=False)
            axes.text(column + 0.86, line, f"{row['cosine']:.2f}", ha="right", va="center", fontsize=7, color="0.45")
        axes.axhline(line + 0.5, color="0.9", linewidth=0.6)
    axes.set(xlim=(-0.9, COLUMNS), ylim=(len(shown) - 0.5, -0.5))
    axes.axis("off")
    return figure


def _scores(summary: dict[str, Any]) -> Any:
    figure = new_figure(10.0, 3.8)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    of_random = summary["control"]["random_weights"]
    names = [name for name, one in summary["correlation"].items() if one is not None]
    at = list(range(len(names)))
    for y, name in zip(at, names, strict=True):
        one = summary["correlation"][name]
        if isinstance(one, dict):
            low, high = one["shuffled"]
            left.barh(y, high - low, left=low, height=0.6, color=CHANCE, label="labels shuffled" if y == 0 else None)
    left.plot([_rho(summary["correlation"][name]) for name in names], at, "o", color=MODEL, markersize=8, label="the model")
    left.plot([_rho(of_random["correlation"].get(name)) or 0.0 for name in names], at, "x", color="0.3", markersize=7, label="random weights")
    left.axvline(0, color="0.4", linewidth=0.8)
    left.set_yticks(at, [NAMES[name] for name in names])
    left.set(ylim=(len(names) - 0.4, -0.6), xlabel="rank correlation with the cosine, over pairs of words")
    measures = _measures(summary)
    for offset, nearest, colour, label in ((-0.2, summary["nearest"], MODEL, "the model"), (0.2, of_random["nearest"], CONTROL, "random weights")):
        values = np.array([nearest[name]["closer"] for name in measures], float)
        low, high = np.array([nearest[name]["interval"] or (np.nan, np.nan) for name in measures]).reshape(-1, 2).T
        places = [number + offset for number in range(len(measures))]
        bars = right.bar(places, values, 0.38, yerr=np.maximum([values - low, high - values], 0), color=colour, ecolor="0.25", capsize=3, label=label)
        right.bar_label(bars, [f"{value:.0%}" for value in values], padding=2, fontsize=8)
    right.axhline(0.5, color="0.4", linewidth=0.8)
    right.set_xticks(range(len(measures)), [NAMES[name].replace(" in ", "\nin ") for name in measures])
    right.set(ylabel="a neighbour is closer than a random word", ylim=(0, 1.1), yticks=np.linspace(0, 1, 6))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*left.get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside upper left", ncols=3)
    figure.legend(*right.get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside upper right", ncols=2)
    return figure


def _by_sound(sound: np.ndarray, cosines: np.ndarray, of_random: np.ndarray) -> Any:
    """sound, cosines, of_random: [words, words]."""
    figure = new_figure(7.0, 4.0)
    axes = figure.subplots()
    upper = np.triu_indices(len(sound), 1)
    alike = sound[upper]
    known = np.isfinite(alike)
    group = np.where(known, np.floor(np.nan_to_num(alike) / WIDTH + 0.5), -1)
    groups = [number for number in np.unique(group) if number >= 0 and (group == number).sum() >= LEAST_PAIRS]
    for table, colour, marker, label in ((cosines, MODEL, "o", "the model"), (of_random, CONTROL, "x", "random weights")):
        each = [table[upper][group == number] for number in groups]
        middles = [float(alike[group == number].mean()) for number in groups]
        medians, low, high = (np.array([np.percentile(of_group, q) for of_group in each]) for q in (50, 25, 75))
        axes.errorbar(middles, medians, [medians - low, high - medians], fmt=f"{marker}-", color=colour, capsize=3, label=label)
    axes.set(xlabel="how alike two words sound (1: the same phones)", ylabel="cosine of their embeddings")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    return figure


# Terminal


def _number(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None else format(value, form)


def _lines(rows: Sequence[Row], shown: Sequence[str], summary: dict[str, Any]) -> list[str]:
    width = max(map(len, shown))
    lines = [
        f"{word:>{width}}: " + ", ".join(f"{row['neighbour']} {row['cosine']:.2f}" for row in [row for row in rows if row["word"] == word][:COLUMNS])
        for word in shown
    ]
    lines.append(
        f"{summary['words']} words of {summary['corpus']['name']}, rank correlation of the cosine of their embeddings with how alike they are:"
    )
    of_random = summary["control"]["random_weights"]
    for name, one in summary["correlation"].items():
        if one is None:
            lines.append(f"  {NAMES[name]}: not known: the corpus is too small, or too few of the words have it")
            continue
        shuffled = f" (shuffled: {one['shuffled'][0]:.2f} to {one['shuffled'][1]:.2f})" if isinstance(one, dict) else ""
        lines.append(f"  {NAMES[name]}: {_rho(one):.2f}{shuffled}, random weights {_number(_rho(of_random['correlation'].get(name)))}")
    lines.append(f"the {summary['k']} nearest of {summary['pool']} words, against words at random:")
    for name in _measures(summary):
        one = summary["nearest"][name]
        lines.append(
            f"  {NAMES[name]}: closer {one['closer']:.0%}, of other stems {_number(one['other_stems'], '.0%')}; "
            f"random weights {_number(of_random['nearest'][name]['closer'], '.0%')}"
        )
    stems, variants = summary["nearest"]["same_stem"], summary["nearest"]["case_variants"]
    lines.append(f"  of the same stem: {_number(stems['neighbours'], '.1%')} of neighbours, {_number(stems['random'], '.1%')} at random")
    lines.append(
        f"  {variants['words']} words are there in another case too, which is the nearest of all for {_number(variants['nearest'], '.0%')} of them"
    )
    return lines
