"""Effects of changes for people: lines, rows of tables, pictures."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from analysis.pictures import new_figure

COLOURS = ("#0072B2", "#999999", "#D55E00", "#009E73", "#CC79A7")
EXAMPLES = 12


COLUMNS: dict[str, tuple[Callable[[Mapping[str, Any]], Any], str]] = {
    "WER": (lambda one: one["wer"], ".1%"),
    "subst.": (lambda one: one["substitutions"], ".4g"),
    "del.": (lambda one: one["deletions"], ".4g"),
    "ins.": (lambda one: one["insertions"], ".4g"),
    "changed": (lambda one: one["changed"], ".1%"),
    "cross-entropy": (lambda one: one["ce"], ".4f"),
    "change": (lambda one: one["ce_change"], "+.4f"),
    "site": (lambda one: (one["site"] or {}).get("relative"), ".3f"),
    "output inside": (lambda one: (one["output"]["inside"] or {}).get("relative"), ".3f"),
    "cosine": (lambda one: (one["output"]["inside"] or {}).get("cosine"), ".4f"),
    "outside": (lambda one: (one["output"]["outside"] or {}).get("relative"), ".3f"),
}
"""Of an effect on the terminal: heading -> its value, and how it is written."""
LEGENDS = {
    "changed": "changed: transcripts that are not as before",
    "change": "change: of the cross-entropy, nats a token",
    "output inside": "site, output inside, outside: how far rows of the site and the encoder's output moved, inside and outside the edited frames, "
    "relative to their size",
}


def in_lines(effects: Mapping[str, Mapping[str, Any]], indent: str = "  ") -> list[str]:
    """Name -> effect (`effects.summarise`), as aligned columns, and what they are; without those that nothing was measured for."""
    kept = {name: how for name, how in COLUMNS.items() if any(how[0](one) is not None for one in effects.values())}
    table = [["", *kept]]
    for name, one in effects.items():
        cells = ["" if value(one) is None else format(value(one), form) for value, form in kept.values()]
        table += [[name, *cells]] if any(cells) else []
    return [indent + line for line in [*aligned(table), *(text for name, text in LEGENDS.items() if name in kept)]]


def aligned(table: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Aligned columns, the first `left` of them to the left."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    padded = (
        [cell.ljust(width) if at < left else cell.rjust(width) for at, (cell, width) in enumerate(zip(row, widths, strict=True))] for row in table
    )
    return ["  ".join(cells).rstrip() for cells in padded]


def as_row(effect: Mapping[str, Any]) -> dict[str, Any]:
    """An effect as columns of a table; what was not measured is left out."""
    output, site = effect["output"], effect["site"] or {}
    row = {
        **{"WER": effect["wer"], "CER": effect["cer"], "substitutions": effect["substitutions"]},
        **{"deletions": effect["deletions"], "insertions": effect["insertions"], "transcripts_changed": effect["changed"]},
        **{"cross-entropy": effect["ce"], "its change": effect["ce_change"], "site_moved": site.get("relative")},
        **{f"output_{where}_{key}": (drift or {}).get(key) for where, drift in output.items() for key in ("relative", "cosine")},
    }
    return row


def without_empty(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows without the columns that are None in all of them."""
    kept = [name for name in rows[0] if any(row[name] is not None for row in rows)] if rows else []
    return [{name: row[name] for name in kept} for row in rows]


def examples(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Transcripts that changed, those first that lost most."""
    changed = [row for row in rows if row["after"] is not None and row["after"] != row["before"]]
    worst = sorted(changed, key=lambda row: -(row["ce_change"] or 0.0))[:EXAMPLES]
    return [{"clip": row["clip"], "change": row["change"], "text": row["text"], "before": row["before"], "after": row["after"]} for row in worst]


def bars(effects: Mapping[str, Mapping[str, Mapping[str, Any]]], unchanged: Mapping[str, Any]) -> Any:
    """A picture of change -> what was changed -> effect: error rates and cross-entropy, or the encoder's output where there is no decoder."""
    measures = {
        "word error rate": (lambda one: one["wer"], unchanged["wer"]),
        "cross-entropy, nats a token": (lambda one: one["ce"], unchanged["ce"]),
        "encoder output moved, relative": (lambda one: (one["output"]["inside"] or {}).get("relative"), 0.0),
    }
    every = [one for of_change in effects.values() for one in of_change.values()]
    shown = {name: how for name, how in measures.items() if all(how[0](one) is not None for one in every)}
    shown = dict(list(shown.items())[:2]) or {"encoder output moved, relative": (lambda one: 0.0, 0.0)}
    kinds = list(dict.fromkeys(kind for of_change in effects.values() for kind in of_change))
    figure = new_figure(5.0 * len(shown) + 1.0, 4.0)
    width = 0.8 / len(kinds)
    for axes, (label, (value, level)) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True):
        for at, kind in enumerate(kinds):
            places = [place + (at - (len(kinds) - 1) / 2) * width for place in range(len(effects))]
            heights = [value(of_change[kind]) if kind in of_change else 0.0 for of_change in effects.values()]
            axes.bar(places, heights, width=width, color=COLOURS[at % len(COLOURS)], label=kind)
        if level is not None:
            axes.axhline(level, color="0.4", linewidth=1, linestyle="--", label="unchanged model")
        axes.set_xticks(range(len(effects)), list(effects))
        axes.set(ylabel=label, ylim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), frameon=False, fontsize=8, ncols=len(kinds) + 1, loc="outside lower center")
    return figure
