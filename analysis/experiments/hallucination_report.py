"""What `hearsae experiment hallucination` shows: what is written where nobody speaks, before and after, with the controls beside it."""

import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from analysis.experiments.report import Report
from analysis.hearing import RECORDED, Heard, Item, Rule, Sounds, Steer, errors_of, false_detections
from analysis.pictures import new_figure
from cache.header import SAMPLE_RATE

BEFORE = "unsteered"
SHOWN = 12
"""Transcripts on the page."""
WORDS = {
    BEFORE: "unsteered",
    "features": "features",
    "random": "random features (mean)",
    "vector": "difference of means",
}
COLOURS = {BEFORE: "0.35", "features": "#0072B2", "random": "#E69F00", "vector": "#009E73"}

Row = dict[str, Any]


class Candidate(NamedTuple):
    """A way of steering, and how it did on the training half."""

    steer: Steer
    false_detections: float
    """Share of the sounds."""
    wer: float


class Trial(NamedTuple):
    """A way of steering on the held-out half."""

    name: str
    """`features`, `vector`, or `random 0` and so on."""
    steer: Steer
    heard: list[Heard]
    """For each held-out item."""


class Outcome(NamedTuple):
    """All that the report is made of."""

    items: list[Item]
    before: list[Heard]
    """For each item, unsteered."""
    wrong: list[int]
    """Items of the training half on which the unsteered model hallucinates: what features were ranked by, beside its speech."""
    tried: list[Candidate]
    chosen: dict[str, Candidate | None]
    """`features`, `vector`: the best within the budget; None where there is none."""
    most_wer: float
    """Word error rate that was allowed on the training half."""
    trials: list[Trial]


def hallucination_report(outcome: Outcome, sounds: Sounds, settings: dict[str, Any]) -> Report:
    """settings: what the summary says of the experiment; `rule` among them."""
    items, rule = outcome.items, Rule(**settings["rule"])
    held_out = [i for i, item in enumerate(items) if item.held_out]
    kinds = list(dict.fromkeys(item.kind for item in items if not item.is_speech))
    own = [items[i] for i in held_out]
    measured = {BEFORE: figures_of(own, [outcome.before[i] for i in held_out], kinds, rule)}
    measured |= {trial.name: figures_of(own, trial.heard, kinds, rule) for trial in outcome.trials}
    draws = [one for name, one in measured.items() if name.startswith("random")]
    summary = {
        **settings,
        "kinds": kinds,
        "items": {half: _counts([item for item in items if item.held_out == (half == "held_out")]) for half in ("training", "held_out")},
        "unsteered_by_kind": _by_kind(items, outcome.before, kinds, rule),
        "training": {
            "hallucinated_on": len(outcome.wrong),
            "unsteered": _unsteered_share(outcome),
            "most_wer": outcome.most_wer,
            "candidates": [_candidate(one) for one in outcome.tried],
        },
        "chosen": {name: _candidate(one) | {"features": _features(one.steer)} if one else None for name, one in outcome.chosen.items()},
        "before": measured[BEFORE],
        "after": measured.get("features"),
        "control": {"vector": measured.get("vector"), "random": _mean(draws) if draws else None, "random_draws": draws},
    }
    shown = {BEFORE: summary["before"], "features": summary["after"], "random": summary["control"]["random"], "vector": summary["control"]["vector"]}
    shown = {name: one for name, one in shown.items() if one is not None}
    rows = _rows(outcome, held_out, sounds)
    return Report(
        title="Hallucinations",
        what=_what(summary, rule),
        rows=rows,
        summary=summary,
        figures={"kinds": _kinds_figure(shown, kinds), "candidates": _candidates_figure(outcome)},
        captions={
            "kinds": "Share of the held-out sounds of each kind for which something is written.",
            "candidates": "What each way of steering did on the training half, where the best within the budget (dashed) was chosen. Rings: chosen.",
        },
        tables={
            "Held-out half": [{"steered": WORDS[name], **_flat(one)} for name, one in shown.items()],
            "Held-out sounds, by kind": _kind_table(shown, kinds),
            "Unsteered model, both halves": [{"kind": kind, **one} for kind, one in summary["unsteered_by_kind"].items()],
            "Ways of steering, training half": [_candidate(one) for one in outcome.tried],
            "Transcripts": _examples(rows),
        },
        sounds=_sounds(items, kinds, sounds),
        lines=_lines(summary, shown, rule),
    )


# Figures of a set of items


def figures_of(items: Sequence[Item], heard: Sequence[Heard], kinds: Sequence[str], rule: Rule) -> dict[str, Any]:
    """Of sounds false detections and words, of speech errors. Ready for JSON."""
    sounds = [(item, one) for item, one in zip(items, heard, strict=True) if not item.is_speech]
    speech = [one for item, one in zip(items, heard, strict=True) if item.is_speech]
    errors = errors_of(items, heard)
    by_kind = _by_kind(items, heard, kinds, rule)
    return {
        "false_detections": false_detections(items, heard),
        "by_no_speech_alone": float(np.mean([not Rule(rule.no_speech, 0.0).is_silent(*one[:3]) for _, one in sounds])),
        "words_per_minute": _words_per_minute([one for _, one in sounds]),
        "wer": errors.wer,
        "insertions": errors.insertions,
        "deletions": errors.deletions,
        "substitutions": errors.substitutions,
        "words": errors.words,
        "silenced_speech": float(np.mean([one.is_silent for one in speech])),
        "by_kind": {kind: one["false_detections"] for kind, one in by_kind.items()},
    }


def _by_kind(items: Sequence[Item], heard: Sequence[Heard], kinds: Sequence[str], rule: Rule) -> dict[str, Row]:
    found = {}
    for kind in kinds:
        own = [one for item, one in zip(items, heard, strict=True) if item.kind == kind]
        found[kind] = {
            "sounds": len(own),
            "false_detections": float(np.mean([not one.is_silent for one in own])),
            "by_no_speech_alone": float(np.mean([not Rule(rule.no_speech, 0.0).is_silent(*one[:3]) for one in own])),
            "words_per_minute": _words_per_minute(own),
            "no_speech": float(np.median([one.no_speech for one in own])),
            "logprob": float(np.median([one.logprob for one in own])),
            "example": max(own, key=lambda one: len(one.written)).text[:80],
        }
    return found


def _words_per_minute(heard: Sequence[Heard]) -> float:
    return sum(len(one.written.split()) for one in heard) / (sum(one.duration_s for one in heard) / 60)


def _counts(items: Sequence[Item]) -> dict[str, int]:
    speech = sum(item.is_speech for item in items)
    return {"speech": speech, "sounds": len(items) - speech}


def _mean(several: Sequence[dict[str, Any]]) -> dict[str, Any]:
    def mean(values: list[Any]) -> Any:
        if isinstance(values[0], dict):
            return {key: mean([value[key] for value in values]) for key in values[0]}
        return None if None in values else sum(values) / len(values)

    return {key: mean([one[key] for one in several]) for key in several[0]}


def _candidate(one: Candidate) -> Row:
    steer = one.steer
    return {"basis": steer.basis, "n": steer.n, "how": steer.how, "amount": steer.amount, "false_detections": one.false_detections, "wer": one.wer}


def _unsteered_share(outcome: Outcome) -> float:
    """False detections of the training half without steering."""
    return len(outcome.wrong) / sum(not item.held_out and not item.is_speech for item in outcome.items)


def _features(steer: Steer) -> list[int]:
    """In the order of their rank; of a vector none."""
    return [] if steer.basis == "vector" else [feature for edit in steer.edits for feature in edit.features]


# Rows


def _rows(outcome: Outcome, held_out: Sequence[int], sounds: Sounds) -> list[Row]:
    """One for each item. What steering made of it is told of the held-out half alone."""
    place = {i: number for number, i in enumerate(held_out)}
    names = ("features", "vector", "random 0")
    trials = {trial.name: trial.heard for trial in outcome.trials}
    rows = []
    for i, (item, before) in enumerate(zip(outcome.items, outcome.before, strict=True)):
        row: Row = {"kind": item.kind, "number": item.number, "clip": item.number if item.is_speech or item.kind == RECORDED else None}
        row |= {"held_out": item.held_out, "duration_s": before.duration_s, "text": item.text}
        row |= {"before": before.text, "is_silent_before": before.is_silent}
        row |= {"no_speech_before": before.no_speech, "logprob_before": before.logprob}
        for name in names:
            ending = {"features": "", "vector": "_vector", "random 0": "_random"}[name]
            after = trials[name][place[i]] if name in trials and i in place else None
            row |= {f"after{ending}": after and after.text, f"is_silent_after{ending}": after and after.is_silent}
            row |= {f"no_speech_after{ending}": after and after.no_speech, f"logprob_after{ending}": after and after.logprob}
        rows.append(row)
    return rows


def _examples(rows: Sequence[Row]) -> list[Row]:
    """Held-out sounds, one of each kind, and some speech."""
    own = [row for row in rows if row["held_out"]]
    first = {(row["kind"], row["kind"] == "speech" and row["number"]): row for row in reversed(own)}
    chosen = sorted(first.values(), key=lambda row: (row["kind"] == "speech", row["kind"], row["number"]))[:SHOWN]
    keys = ("kind", "number", "before", "is_silent_before", "after", "is_silent_after", "after_vector", "is_silent_after_vector")
    return [{key: row[key] for key in keys} for row in chosen]


def _sounds(items: Sequence[Item], kinds: Sequence[str], sounds: Sounds) -> dict[str, bytes]:
    """One held-out sound of each kind, to listen to."""
    import soundfile

    found = {}
    for kind in kinds:
        item = next((item for item in items if item.kind == kind and item.held_out), None)
        if item is not None:
            data = io.BytesIO()
            soundfile.write(data, sounds.audio(item), SAMPLE_RATE, format="FLAC")
            found[f"{kind}-{item.number}.flac"] = data.getvalue()
    return found


# For people


def _flat(one: dict[str, Any]) -> Row:
    return {key: value for key, value in one.items() if key != "by_kind"}


def _kind_table(shown: dict[str, dict[str, Any]], kinds: Sequence[str]) -> list[Row]:
    return [{"kind": kind} | {WORDS[name]: one["by_kind"][kind] for name, one in shown.items()} for kind in kinds]


def _kinds_figure(shown: dict[str, dict[str, Any]], kinds: Sequence[str]) -> Any:
    figure = new_figure(max(6.0, 1.5 + 0.9 * len(kinds)), 4.0)
    axes = figure.subplots()
    width = 0.8 / len(shown)
    for number, (name, one) in enumerate(shown.items()):
        at = np.arange(len(kinds)) + (number + 0.5) * width - 0.4
        axes.bar(at, [one["by_kind"][kind] for kind in kinds], width, color=COLOURS[name], label=WORDS[name])
    axes.set_xticks(range(len(kinds)), kinds, rotation=30 if len(kinds) > 6 else 0)
    axes.set(ylabel="false detections", ylim=(0, 1.05))
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, fontsize=8, loc="outside upper center", ncols=len(shown))
    return figure


def _candidates_figure(outcome: Outcome) -> Any:
    figure = new_figure(7.0, 4.0)
    axes = figure.subplots()
    for basis, marker in (("features", "o"), ("vector", "s")):
        own = [one for one in outcome.tried if one.steer.basis == basis]
        colour = COLOURS[basis]
        axes.scatter(
            [one.wer for one in own], [one.false_detections for one in own], marker=marker, s=36, color=colour, alpha=0.7, label=WORDS[basis]
        )
        best = outcome.chosen[basis]
        if best is not None:
            axes.scatter([best.wer], [best.false_detections], marker=marker, s=150, facecolors="none", edgecolors=colour, linewidths=1.5)
    axes.axvline(outcome.most_wer, color="0.5", linestyle="--", linewidth=1)
    axes.set(xlabel="word error rate of speech, training half", ylabel="false detections", ylim=(-0.05, 1.05))
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, fontsize=8, loc="outside upper center", ncols=2)
    return figure


def _what(summary: dict[str, Any], rule: Rule) -> str:
    training, held_out = summary["items"]["training"], summary["items"]["held_out"]
    return (
        f"Sounds in which nobody speaks ({', '.join(summary['kinds'])}) and speech were transcribed. A transcript counts as silence without a word, "
        f"or where the no-speech token has more than {rule.no_speech:g} of the probability and the text's mean log probability is below "
        f"{rule.logprob:g}: the two thresholds of whisper's transcribe(). All else that is written for a sound is a false detection; 'by no speech "
        "alone' leaves out the second threshold.\n\n"
        f"On {training['sounds']} sounds and {training['speech']} clips of speech the features of {summary['features']} were ranked by how far their "
        "means lie apart between sounds that Whisper writes something for and speech, and ways of steering were tried, in the frames of each sound "
        f"or clip alone. Chosen was the one with the fewest false detections that raises the word error rate by no more than "
        f"{summary['wer_budget']:g}. All figures of the held-out half are of {held_out['sounds']} other sounds and {held_out['speech']} clips "
        "that nothing was chosen on.\n\n"
        "Controls: the same edits of as many random features of like mean value in the sounds, and the baseline: the difference of means of whole "
        "activations, added to every row, its amount chosen in the same way. Steering that does no better than these has shown nothing about its "
        "features."
    )


def _lines(summary: dict[str, Any], shown: dict[str, dict[str, Any]], rule: Rule) -> list[str]:
    training, held_out = summary["items"]["training"], summary["items"]["held_out"]
    lines = [
        f"{summary['features']}; silent: no_speech > {rule.no_speech:g} and logprob < {rule.logprob:g}, or no word",
        f"unsteered, all {training['sounds'] + held_out['sounds']} sounds:",
        f"  {'':12}{'sounds':>6}  {'false':>6}  {'by no_speech':>12}  {'words/min':>9}  {'no_speech':>9}  {'logprob':>7}  longest",
    ]
    for kind, one in summary["unsteered_by_kind"].items():
        lines.append(
            f"  {kind:12}{one['sounds']:6}  {one['false_detections']:6.0%}  {one['by_no_speech_alone']:12.0%}  {one['words_per_minute']:9.0f}"
            f"  {one['no_speech']:9.4f}  {one['logprob']:7.2f}  {one['example'][:48].strip()}"
        )
    lines.append(
        f"chosen on {training['sounds']} sounds and {training['speech']} clips of speech, WER at most {summary['training']['most_wer']:.1%}:"
    )
    for name, one in summary["chosen"].items():
        if one is None:
            lines.append(f"  {WORDS[name]}: nothing that was tried is within the budget")
            continue
        some = ", ".join(map(str, one["features"][:6])) + (" ..." if len(one["features"]) > 6 else "")
        what = f"{one['n']} ({some}), {one['how']} {one['amount']:g}" if one["features"] else f"{one['how']} {one['amount']:g}"
        lines.append(f"  {WORDS[name]}: {what}; false {one['false_detections']:.0%}, WER {one['wer']:.1%}")
    fewest = min((one["false_detections"] for one in summary["chosen"].values() if one), default=1.0)
    if fewest >= summary["training"]["unsteered"]:
        lines.append(f"  no way of steering within the budget has fewer false detections than none ({summary['training']['unsteered']:.0%})")
    lines += [
        f"held out, {held_out['sounds']} sounds and {held_out['speech']} clips of speech:",
        f"  {'':24}{'false':>6}  {'by no_speech':>12}  {'words/min':>9}  {'WER':>6}  {'ins.':>5}  {'del.':>5}  {'subst.':>6}",
    ]
    for name, one in shown.items():
        lines.append(
            f"  {WORDS[name]:24}{one['false_detections']:6.0%}  {one['by_no_speech_alone']:12.0%}  {one['words_per_minute']:9.0f}  {one['wer']:6.1%}"
            f"  {one['insertions']:5.3g}  {one['deletions']:5.3g}  {one['substitutions']:6.3g}"
        )
    if "features" in shown and "random" not in shown:
        lines.append("  no control: there are not as many other features as were steered; use a smaller --n")
    return lines
