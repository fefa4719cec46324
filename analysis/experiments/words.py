"""Which words the neurons of the decoder respond to: scans of a decoder site, whose examples are tokens in their transcripts, as a report."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow.compute as pc

from analysis.experiments.report import Report
from analysis.pictures import new_figure
from analysis.query import feature_tokens
from analysis.scan import Scan

LISTED = 12
"""Neurons in each table."""
MOSTLY = 0.9
"""A neuron is of one word if so much of its strongest examples is at it, or before it."""
IN_CONTEXT = 3
"""Examples shown of each listed neuron."""
SIDES = {"read": "the word that it reads", "written": "the word that comes next"}


def word_report(scan: Scan, control: Scan) -> Report:
    """The neurons that are most of one word: of the word that the decoder reads at their strongest examples, and of the one that it writes next.

    control: the same site of the same model with random weights, on the same transcripts. Raises HearsaeError for scans of an encoder's site.
    """
    found = {of: _of_one_word(of_scan) for of, of_scan in (("model", scan), ("control", control))}
    summary = {"features": scan.info["count"], **{side: found["model"][side]["count"] for side in SIDES}}
    summary["control"] = {side: found["control"][side]["count"] for side in SIDES}
    rows = [{"side": side, **_renamed(row)} for side in SIDES for row in found["model"][side]["rows"]]
    tables: dict[str, Sequence[Mapping[str, Any]]] = {
        f"Neurons of one word: {words}": [_listed(scan, row) for row in found["model"][side]["rows"][:LISTED]] for side, words in SIDES.items()
    }
    return Report(
        title="Decoder neurons and words",
        what=f"The strongest examples of every neuron of {scan.info['site']}, at most one a clip, over the transcripts. A neuron is of one word if "
        f"at least {MOSTLY:.0%} of them are at the same one. The word that a position reads is the decoder's input, and even random weights follow "
        "it: what was learnt shows in the word that comes next. The control is the same model with random weights on the same transcripts.",
        rows=rows,
        summary=summary,
        figures={"words": _bars(found)},
        captions={"words": f"Neurons of one word, of {scan.info['count']}; in brackets how many different words."},
        tables=tables,
        lines=[
            f"neurons of one word, {words}: {found['model'][side]['count']} of {scan.info['count']} ({len(found['model'][side]['words'])} words); "
            f"random weights {found['control'][side]['count']}"
            for side, words in SIDES.items()
        ],
    )


def _of_one_word(scan: Scan) -> dict[str, Any]:
    result = {}
    for side in SIDES:
        rows = [_renamed(row) for row in feature_tokens(scan, scan.info["count"], following=side == "written")]
        sure = [row for row in rows if row["count"] >= MOSTLY * row["examples"]]
        result[side] = {"rows": rows, "count": len(sure), "words": Counter(row["word"] for row in sure)}
    return result


def _renamed(row: dict[str, Any]) -> dict[str, Any]:
    return {"word" if name in ("token", "next_token") else name: value for name, value in row.items()}


def _listed(scan: Scan, row: dict[str, Any]) -> dict[str, Any]:
    examples = scan.examples(row["feature"])
    texts = examples.filter(pc.equal(examples["kind"].cast("string"), "top")).sort_by("rank").slice(0, IN_CONTEXT).to_pylist()
    shown = " | ".join(_marked(one) for one in texts)
    return {
        "neuron": row["feature"],
        "word": row["word"],
        "examples": f"{row['count']} of {row['examples']}",
        "mean": row["mean"],
        "in context": shown,
    }


def _marked(example: dict[str, Any]) -> str:
    text, start, end = example["text"] or "", example["token_start"], example["token_end"]
    return text if start is None else f"{text[:start]}[{text[start:end].strip()}]{text[end:]}"


def _bars(found: dict[str, Any]) -> Any:
    figure = new_figure(7, 3.4)
    axes = figure.subplots()
    for at, (of, colour) in enumerate((("model", "#0072B2"), ("control", "0.6"))):
        counts = [found[of][side]["count"] for side in SIDES]
        bars = axes.bar(
            [i + 0.4 * at - 0.2 for i in range(len(SIDES))], counts, width=0.38, color=colour, label="model" if at == 0 else "random weights"
        )
        axes.bar_label(bars, [f"{found[of][side]['count']} ({len(found[of][side]['words'])})" for side in SIDES], fontsize=9)
    axes.set_xticks(range(len(SIDES)), list(SIDES.values()))
    axes.set(ylabel="neurons of one word")
    axes.margins(y=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure
