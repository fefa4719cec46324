"""What `hearsae experiment chop` shows: rates with the control beside them, and what became of the transcripts."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from analysis.experiments.report import Report
from analysis.pictures import new_figure
from cache.header import FRAME_SECONDS

SHOWN = 12
"""Examples on the page."""
DURATION_BINS = 4
"""Of equally many words."""
WORD, OTHERS, CONTROL = "#0072B2", "#009E73", "0.6"
GONE_ELSEWHERE = "word gone, elsewhere chopped"
SHARES = (-0.03, 1.05)
"""Limits of an axis, with room for the marks of 0 and 1."""
NAMES = {"word_gone": "word gone", "others_kept": "others kept", "deleted": "deleted", "replaced": "replaced"}

Row = dict[str, Any]


def by_word_report(rows: Sequence[Row], summary: dict[str, Any]) -> Report:
    """rows: one for each word and margin. summary: the rates of one margin, and in `by_margin` those of each."""
    main = [row for row in rows if row["margin"] == summary["margin"]]
    figures = {"rates": _rates(summary), "duration": _by_duration(main)}
    captions = {
        "rates": "What became of the transcripts, with 95 % intervals over clips. Grey: as many frames chopped elsewhere in the same clip. "
        "Deleted and replaced are shares of the trials where the word is gone.",
        "duration": "Words by how long they are said, in groups of equally many.",
    }
    if summary["by_margin"]:
        figures["margins"] = _margins(summary["by_margin"])
        captions["margins"] = "Rates against the frames on either side that are chopped with the word. Grey: the control. Bands: 95 % over clips."
    return Report(
        title="Chop a word",
        what=f"The frames of the encoder's output in which a word is said, and {summary['margin']} more on either side, are replaced by those that "
        "the padded, silent input has at the same places. Whisper then writes the transcript again. Word gone: the word is nowhere in it. Others "
        "kept: the share of the transcript's other words that are still there. Of the trials where the word is gone: deleted, where the transcript "
        "is otherwise the same; replaced, where a word is in it that was not there before.\n\n"
        "Looked for are words of 3 letters or more, longer than 0.1 s, that are said once and written once, in a transcript of 3 words or more. "
        "Words are compared in lower case and without punctuation. The control chops as many frames at a random place of the same clip that has "
        "none of the word's: what is gone then is gone for want of sound anywhere.",
        rows=rows,
        summary=summary,
        figures=figures,
        captions=captions,
        tables={"Rates": _table(summary), "Examples": _examples(main)},
        lines=_lines(summary),
    )


def by_place_report(rows: Sequence[Row], summary: dict[str, Any]) -> Report:
    """rows: one for each clip."""
    first, last = summary["frames"]
    where = f"frames {first} to {last} ({first * FRAME_SECONDS:.2f} to {last * FRAME_SECONDS:.2f} s)"
    return Report(
        title="Chop a stretch of time",
        what=f"In every clip {where} of the encoder's output are replaced by those that the padded, silent input has at the same places, and "
        "Whisper writes the transcript again. Words kept: the share of the words of the transcript before that are in the one after. The control "
        "chops as many frames at a random place of the same clip outside of these, where they fit.",
        rows=rows,
        summary=summary,
        figures={"kept": _kept(rows, summary)},
        captions={"kept": "Clips by the share of their words that are kept. Grey: the control."},
        tables={"Transcripts": [{"clip": row["clip"], "before": row["before"], "after": row["after"]} for row in rows]},
        lines=_place_lines(rows, summary, where),
    )


# Words


def _table(summary: dict[str, Any]) -> list[Row]:
    rows = []
    for margin, one in (summary["by_margin"] or {str(summary["margin"]): summary}).items():
        rates = {name: one[name] for name in NAMES}
        low_high = one["intervals"]["word_gone"]
        interval = f"{low_high[0]:.3f} to {low_high[1]:.3f}" if low_high else None
        control = {"control: word_gone": one["control"]["word_gone"], "control: others_kept": one["control"]["others_kept"]}
        rows.append({"margin": int(margin), "trials": one["trials"], **rates, "word_gone, 95 %": interval, **control})
    return rows


def _examples(rows: Sequence[Row]) -> list[Row]:
    """Words that are gone and words that are not, in turn."""
    gone, there = ([row for row in rows if row["gone"] is gone] for gone in (True, False))
    shown = [*gone[: SHOWN - min(len(there), SHOWN // 3)], *there[: SHOWN // 3]]
    return [{"clip": row["clip"], "word": row["word"], "gone": row["gone"], "before": row["before"], "after": row["after"],
             "elsewhere chopped": row["control_after"]} for row in shown]  # fmt: skip


def _bars(axes: Any, at: Sequence[float], one: dict[str, Any], names: Sequence[str], colour: str, label: str) -> None:
    values = [one[name] for name in names]
    around = [one["intervals"][name] or (value, value) for name, value in zip(names, values, strict=True)]
    # A percentile interval of a rate near 0 or 1 need not hold the rate itself.
    below = [max(0, value - low) for value, (low, _) in zip(values, around, strict=True)]
    above = [max(0, high - value) for value, (_, high) in zip(values, around, strict=True)]
    bars = axes.bar(at, values, width=0.38, yerr=[below, above], color=colour, ecolor="0.25", capsize=3, label=label)
    axes.bar_label(bars, [f"{value:.0%}" for value in values], padding=2, fontsize=8)


def _rates(summary: dict[str, Any]) -> Any:
    figure = new_figure(7.0, 4.0)
    axes = figure.subplots()
    names = [name for name in NAMES if summary[name] is not None]
    _bars(axes, [number - 0.2 for number in range(len(names))], summary, names, WORD, "the word chopped")
    both = [name for name in ("word_gone", "others_kept") if summary["control"][name] is not None]
    if both:
        _bars(axes, [names.index(name) + 0.2 for name in both], summary["control"], both, CONTROL, "as many frames elsewhere")
    axes.set_xticks(range(len(names)), [NAMES[name] for name in names])
    axes.set(ylabel="share of trials (others kept: of words)", ylim=(0, 1.12), yticks=np.linspace(0, 1, 6))
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, fontsize=8, loc="outside upper center", ncols=2)
    return figure


def _by_duration(rows: Sequence[Row]) -> Any:
    figure = new_figure(7.0, 4.0)
    axes = figure.subplots()
    seconds = np.array([row["end_s"] - row["start_s"] for row in rows])
    groups = [group for group in np.array_split(np.argsort(seconds, kind="stable"), DURATION_BINS) if len(group)]
    middles = [float(np.median(seconds[group])) for group in groups]
    curves = {"gone": ("word gone", "o-", WORD), "others_kept": ("others kept", "s--", OTHERS), "control_gone": (GONE_ELSEWHERE, "o-", CONTROL)}
    for name, (what, style, colour) in curves.items():
        values = np.array([row[name] for row in rows], float)  # None becomes nan
        axes.plot(middles, np.array([np.nanmean(values[group]) if np.isfinite(values[group]).any() else np.nan for group in groups]), style,
                  color=colour, label=what)  # fmt: skip
    axes.set(xlabel="seconds that the word is said (median of its group)", ylabel="share", ylim=SHARES)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, fontsize=8, loc="outside upper center", ncols=3)
    return figure


def _margins(by_margin: dict[str, Any]) -> Any:
    figure = new_figure(7.0, 4.0)
    axes = figure.subplots()
    margins = sorted(map(int, by_margin))
    curves = [
        ("word_gone", "word gone", "o-", WORD, False), ("others_kept", "others kept", "s--", OTHERS, False),
        ("deleted", "deleted, of those gone", "^:", "#D55E00", False), ("word_gone", GONE_ELSEWHERE, "o-", CONTROL, True),
        ("others_kept", "others kept, elsewhere chopped", "s--", CONTROL, True),
    ]  # fmt: skip
    for name, what, style, colour, of_control in curves:
        each = [by_margin[str(margin)]["control"] if of_control else by_margin[str(margin)] for margin in margins]
        around = [one["intervals"].get(name) or (np.nan, np.nan) for one in each]
        axes.plot(margins, [np.nan if one[name] is None else one[name] for one in each], style, color=colour, label=what)
        axes.fill_between(margins, [low for low, _ in around], [high for _, high in around], color=colour, alpha=0.15, linewidth=0)
    axes.set_xticks(margins)
    axes.set(xlabel="margin: frames of 20 ms chopped with the word on either side", ylabel="share", ylim=SHARES)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, fontsize=8, loc="outside upper center", ncols=3)
    return figure


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _lines(summary: dict[str, Any]) -> list[str]:
    drawn = "" if summary["trials"] == summary["words_found"] else f" (of {summary['words_found']} that can be looked for)"
    low_high = summary["intervals"]["word_gone"]
    lines = [
        f"{summary['trials']} words{drawn} of {summary['clips']} clips, margin {summary['margin']} frames:",
        f"  the word is gone: {_percent(summary['word_gone'])}" + (f" (95 %: {low_high[0]:.1%} to {low_high[1]:.1%})" if low_high else ""),
        f"  other words kept: {_percent(summary['others_kept'])}",
        f"  of those gone: nothing else changed {_percent(summary['deleted'])}, something new {_percent(summary['replaced'])}",
        f"  control, as many frames elsewhere ({summary['control']['trials']} words): gone {_percent(summary['control']['word_gone'])}, "
        f"others kept {_percent(summary['control']['others_kept'])}",
    ]
    for margin, one in summary["by_margin"].items():
        lines.append(
            f"  margin {margin:>2}: gone {_percent(one['word_gone'])}, others kept {_percent(one['others_kept'])}, "
            f"deleted {_percent(one['deleted'])}; control: gone {_percent(one['control']['word_gone'])}"
        )
    return lines


# Places


def _kept(rows: Sequence[Row], summary: dict[str, Any]) -> Any:
    figure = new_figure(7.0, 4.0)
    axes = figure.subplots()
    bins = np.linspace(0, 1, 11)
    for name, colour, at, label in (
        ("words_kept", WORD, -0.02, "the range chopped"),
        ("control_words_kept", CONTROL, 0.02, "as many frames elsewhere"),
    ):
        values = [row[name] for row in rows if row[name] is not None]
        counts, _ = np.histogram(values, np.append(bins, 1.1) - 0.05)
        axes.bar(bins + at, counts, width=0.04, color=colour, label=label)
    axes.set(xlabel="share of the words of the transcript that are kept", ylabel="clips", xticks=bins, xlim=(-0.06, 1.06))
    axes.locator_params(axis="y", integer=True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, fontsize=8, loc="outside upper center", ncols=2)
    return figure


def _place_lines(rows: Sequence[Row], summary: dict[str, Any], where: str) -> list[str]:
    control = summary["control"]
    lines = [f"{summary['clips']} clips without {where}; {summary['clips_reached']} of them have sound there"]
    lines += [f"  {row['source']}: {row['before'].strip()!r} -> {row['after'].strip()!r}" for row in rows[:SHOWN]]
    lines += [f"  and {len(rows) - SHOWN} more"] if len(rows) > SHOWN else []
    lines.append(f"  transcripts changed: {_percent(summary['changed'])}, words kept: {_percent(summary['words_kept'])}")
    of_control = f"changed {_percent(control['changed'])}, words kept {_percent(control['words_kept'])}"
    lines.append(f"  control, as many frames elsewhere ({control['clips']} clips): {of_control}")
    return lines
