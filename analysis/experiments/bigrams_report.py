"""What `hearsae experiment bigrams` shows: a picture for each prompt, and the agreement with the corpus beside the controls'."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from analysis.experiments.labels import drawn
from analysis.experiments.report import Report
from analysis.pictures import new_figure

MODEL, CORPUS, CONTROL = "#0072B2", "#D55E00", "0.6"
NEXT_SHOWN = 5
"""Tokens in a line of the terminal."""

Row = dict[str, Any]


def bigrams_report(rows: Sequence[Row], prefixes: Sequence[Row], summary: dict[str, Any]) -> Report:
    """rows: the likeliest tokens after prompts and prefixes. prefixes: the table of these."""
    figures, captions = {}, {}
    for number, prompt in enumerate(summary["prompts"], start=1):
        of_prompt = [row for row in rows if row["kind"] == "prompt" and row["prompt"] == prompt]
        figures[f"prompt-{number}"] = _next(prompt, of_prompt)
        captions[f"prompt-{number}"] = f"After {prompt!r}: the likeliest next tokens, with their logits." + (
            " Marks: how often they follow in the corpus." if of_prompt[0]["corpus_probability"] is not None else ""
        )
    figures["agreement"] = _agreement(summary)
    captions["agreement"] = (
        "Left: how often the model's first word, or one of its first five, is the corpus' most frequent follower; 95 % intervals over prefixes. "
        "Right: bits that a follower costs; the line is the corpus' own entropy, which nothing goes below."
    )
    corpus = summary["corpus"]
    return Report(
        title="Bigrams of the decoder",
        what="The decoder is given the encoder's output for silence alone, and a prompt. What it expects next is what it knows of text: there is "
        "nothing to hear. Logits are as the decoder gives them, probabilities are over the whole vocabulary.\n\n"
        f"For the {summary['agreement']['prefixes']} words of the corpus ({corpus['name']}, {corpus['words']} words) that are most often followed by "
        "another, what the model expects is held against what follows in the corpus: the first token of the next word, in the case in which it is "
        "written. A sign between two words parts them. Top 1, top 5 and the rank are among all tokens with which a word begins; Spearman's "
        "correlation and bits are over the first tokens of all words that follow any word of the corpus. Unigrams: the same of an expectation that "
        "knows how often a word follows anything, counted in the same corpus, and not what it follows. Controls: the model with random weights, and "
        "each prefix held against what the model expects after another one.",
        rows=rows,
        summary=summary,
        figures=figures,
        captions=captions,
        tables={"Agreement": [{"of": name, **_short(one)} for name, one in _sides(summary).items()], "Prefixes": prefixes},
        lines=_lines(rows, summary),
    )


def _sides(summary: dict[str, Any]) -> dict[str, dict[str, Any]]:
    sides = {
        "the model": summary["agreement"],
        "unigrams": summary["unigrams"],
        "random weights": summary["control"]["random_weights"],
        "shuffled prefixes": summary["control"]["shuffled_prefixes"],
    }
    return {name: one for name, one in sides.items() if one}


def _short(one: dict[str, Any]) -> Row:
    return {name: one[name] for name in ("top1", "top5", "median_rank", "spearman", "cross_entropy")}


def _next(prompt: str, rows: Sequence[Row]) -> Any:
    figure = new_figure(6.5, 0.7 + 0.24 * len(rows))
    axes = figure.subplots()
    at = list(range(len(rows)))
    axes.barh(at, [row["probability"] for row in rows], color=MODEL, label="the model")
    for y, row in zip(at, rows, strict=True):
        axes.text(1.02, y, f"{row['probability']:.3f}  ({row['logit']:.1f})", fontsize=7, va="center")
    if rows[0]["corpus_probability"] is not None:
        heard = [(row["corpus_probability"], y) for y, row in zip(at, rows, strict=True) if row["corpus_probability"]]
        axes.plot([share for share, _ in heard], [y for _, y in heard], "D", color=CORPUS, markersize=5, label="the corpus", clip_on=False)
        figure.legend(frameon=False, fontsize=8, loc="outside upper right", ncols=2)
    axes.set_yticks(at, [drawn(repr(row["text"])) for row in rows], parse_math=False, fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set(xlim=(0, 1), xticks=np.linspace(0, 1, 6), xlabel="probability; at the right with the logit")
    axes.set_title(f"after {drawn(repr(prompt))}", loc="left", fontsize=10, parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _agreement(summary: dict[str, Any]) -> Any:
    figure = new_figure(9.0, 4.0)
    shares, bits = figure.subplots(1, 2, width_ratios=(3, 2))
    sides = _sides(summary)
    colours = dict(zip(sides, (MODEL, "#009E73", CONTROL, "0.8"), strict=False))
    width = 0.8 / len(sides)
    for number, (name, one) in enumerate(sides.items()):
        at = np.arange(2) + (number - (len(sides) - 1) / 2) * width
        values = np.array([one["top1"], one["top5"]])
        low, high = np.array([one["intervals"][key] or (one[key], one[key]) for key in ("top1", "top5")]).T
        around = np.maximum([values - low, high - values], 0)
        bars = shares.bar(at, values, width, yerr=around, color=colours[name], ecolor="0.25", capsize=2, label=name)
        shares.bar_label(bars, [f"{value:.0%}" for value in values], padding=2, fontsize=7)
    shares.set_xticks(range(2), ["its first word", "one of its first five"])
    shares.set(ylabel="share of prefixes", ylim=(0, 1.1), yticks=np.linspace(0, 1, 6))
    for number, (name, one) in enumerate(sides.items()):
        bits.plot(number, one["cross_entropy"], "o", color=colours[name], markersize=9)
        bits.annotate(f"{one['cross_entropy']:.1f}", (number, one["cross_entropy"]), (0, 8), textcoords="offset points", ha="center", fontsize=8)
    bits.set_yscale("log", base=2)
    bits.yaxis.set_major_formatter("{x:g}")
    if summary["entropy_of_corpus"] > 0:  # else every word has one follower
        bits.axhline(summary["entropy_of_corpus"], color=CORPUS, linewidth=1, label="entropy of the corpus")
    bits.set_xticks(range(len(sides)), [name.replace(" ", "\n") for name in sides], fontsize=8)
    bits.set(ylabel="bits for each follower", xlim=(-0.5, len(sides) - 0.5))
    bits.margins(y=0.12)
    for axes in (shares, bits):
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, fontsize=8, loc="outside upper center", ncols=5)
    return figure


def _lines(rows: Sequence[Row], summary: dict[str, Any]) -> list[str]:
    lines = []
    for prompt in summary["prompts"]:
        best = [row for row in rows if row["kind"] == "prompt" and row["prompt"] == prompt][:NEXT_SHOWN]
        lines.append(f"{prompt!r}: " + ", ".join(f"{row['text']!r} {row['probability']:.3f}" for row in best))
    corpus = summary["corpus"]
    prefixes, entropy = summary["agreement"]["prefixes"], summary["entropy_of_corpus"]
    lines.append(f"{prefixes} words of {corpus['name']} ({corpus['words']} words) and what follows them, {entropy:.1f} bits:")
    for name, one in _sides(summary).items():
        correlation = "-" if one["spearman"] is None else f"{one['spearman']:.2f}"
        lines.append(
            f"  {name:17} top 1 {one['top1']:.0%}, top 5 {one['top5']:.0%}, median rank {one['median_rank']:g}, Spearman {correlation}, "
            f"{one['cross_entropy']:.1f} bits"
        )
    return lines
