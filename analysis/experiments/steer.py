"""Steering: what Whisper writes when features are made stronger, weaker, or set to a value, against random features and a random direction."""

from collections.abc import Sequence
from typing import Any

from whisper.model import Whisper

from analysis.experiments.activity import activity
from analysis.experiments.changes import Change, SameSize, Steered, Stretch, worker_steerable
from analysis.experiments.effect_tables import as_row, bars, examples, in_lines, without_empty
from analysis.experiments.effects import mean_of, row_of, run_changes, summarise
from analysis.experiments.report import Report
from analysis.experiments.speech import Mapper, Speech, in_this_process, worker_model
from analysis.interventions import tokenizer_for
from analysis.steering import Edit, How, edit_rows
from cache.errors import HearsaeError
from cache.model import LoadedModel

CONTROLS = 3
"""Sets of random features."""
SHOWN_CLIPS = 3
"""So many clips at most have their transcripts on the terminal."""
ENCODER_OUTPUT = "encoder output"
THEIRS, RANDOM_FEATURES, RANDOM_DIRECTION = "the features", "random features", "random direction"
MEANING = {"scale": "multiplied by", "set": "set to", "add": "raised by", "clamp": "held at or below"}


def steer(
    speech: Speech,
    model: str,
    features: str,
    feature: Sequence[int],
    how: How,
    amounts: Sequence[float],
    stretch: Stretch | None = None,
    controls: int = CONTROLS,
    seed: int = 0,
    language: str = "en",
    device: str = "auto",
    map_pieces: Mapper = in_this_process,
) -> Report:
    """Edits all of `feature` at once, with each amount in turn, and compares what comes out with the unchanged model.

    features: as `analysis.steering.open_steerable` takes it. stretch: where in the clips; None: in their own frames.
    controls: how many sets of random features, as active as these (`Activity.matched`), are edited in the same way. Besides, every row is moved
    as far as by the edit, in one random direction. seed: of these, and of a random basis. language: that Whisper is told it hears.
    A checkpoint without a decoder is measured at the encoder's output alone.
    Raises HearsaeError for features, edits and places that can't be, and where there are too few other features for the control.
    """
    stretch = stretch or Stretch()
    if not feature or not amounts:
        raise HearsaeError("give at least one --feature, and one amount")
    if controls < 1:
        raise HearsaeError(f"--controls {controls}: there must be at least one set of random features to compare with")
    loaded = worker_model(model, device)
    steerable = worker_steerable(features, model, device, seed)
    chosen, amounts = tuple(dict.fromkeys(feature)), tuple(dict.fromkeys(amounts))
    for amount in amounts:  # refused before there is work to lose
        edit_rows(steerable, [Edit(chosen, how, amount)])
    stretch.check(steerable.site, speech.clips)
    check_language(loaded, language)

    known = activity(speech, model, device, steerable.spec, seed, language, map_pieces)
    others = known.matched(chosen, controls, seed)
    names, changes = [], []
    for amount in amounts:
        edits: list[Change] = [Steered(steerable.site, steerable.spec, (Edit(one, how, amount),), device, seed) for one in (chosen, *others)]
        changes += [*edits, SameSize(edits[0], seed)]
        names += [(amount, kind) for kind in (THEIRS, *[RANDOM_FEATURES] * controls, RANDOM_DIRECTION)]
    unchanged, columns = run_changes(speech, model, device, changes, stretch, language, True, map_pieces)

    effects: dict[str, dict[str, Any]] = {}
    rows: list[dict[str, Any]] = []
    for amount in amounts:
        of_amount = {
            kind: [one for name, one in zip(names, columns, strict=True) if name == (amount, kind)]
            for kind in (THEIRS, RANDOM_FEATURES, RANDOM_DIRECTION)
        }
        effects[f"{how} {amount:g}"] = {
            kind: mean_of([summarise(speech.clips, unchanged, one, language) for one in several]) for kind, several in of_amount.items()
        }
        for kind, several in of_amount.items():
            for number_of_set, outcomes in enumerate(several):
                edited = chosen if kind == THEIRS else others[number_of_set] if kind == RANDOM_FEATURES else ()
                about = {"change": f"{how} {amount:g}", "of": kind, "features": list(edited)}
                rows += [about | row_of(*one, language) for one in zip(speech.clips, unchanged, outcomes, strict=True)]
    summary: dict[str, Any] = {
        "features": steerable.spec,
        "site": steerable.site,
        "feature": list(chosen),
        "how": how,
        "where": stretch.words() if steerable.site.startswith("encoder.") else "at all tokens",
        "measured": measured(loaded),
        "clips": len(speech.clips),
        "mean_abs": float(known.mean_abs[list(chosen)].mean()),
        "activity": {str(one): {"density": float(known.density[one]), "mean_abs": float(known.mean_abs[one])} for one in chosen},
        "unchanged": summarise(speech.clips, unchanged, unchanged, language),
        "by_amount": {name: one[THEIRS] for name, one in effects.items()},
        "control": {
            "features": [list(one) for one in others],
            "mean_abs": [float(known.mean_abs[list(one)].mean()) for one in others],
            "by_amount": {name: {kind: one[kind] for kind in (RANDOM_FEATURES, RANDOM_DIRECTION)} for name, one in effects.items()},
        },
    }
    return Report(
        title="Steering",
        what=f"The values of {len(chosen)} of the features {steerable.spec} ({', '.join(map(str, chosen[:20]))}{' ...' if len(chosen) > 20 else ''}) "
        f"were {MEANING[how]} {', '.join(f'{amount:g}' for amount in amounts)}, {summary['where']}; what else is in a row stays, also what an SAE "
        f"does not reconstruct. {explained(loaded)}\n\nControls, at the same places: {controls} sets of random features that are as active in this "
        f"speech as others can be, edited in the same way (means over the sets; mean |value| {summary['mean_abs']:.3g} of the features, "
        f"{sum(summary['control']['mean_abs']) / controls:.3g} of these), and every row moved as far as by the edit itself, along one random "
        "direction. An edit that does no more than these has shown nothing about its features.",
        rows=rows,
        summary=summary,
        figures={"steering": bars(effects, summary["unchanged"])},
        captions={"steering": "What the edit does, against the controls. Dashed: the unchanged model."},
        tables={
            "Effects": without_empty([{"change": name, "of": kind, **as_row(one)} for name, kinds in effects.items() for kind, one in kinds.items()]),
            "Transcripts that changed": examples([row for row in rows if row["of"] == THEIRS]),
        },
        lines=[*lines(summary, effects), *written([row for row in rows if row["of"] == THEIRS])],
    )


def check_language(model: LoadedModel, language: str) -> None:
    """Raises HearsaeError for a language that the model does not know."""
    if isinstance(model.module, Whisper):
        tokenizer_for(model.module, language)


def measured(model: LoadedModel) -> str:
    """For the summary."""
    return "transcripts, cross-entropy and encoder output" if model.has_decoder else ENCODER_OUTPUT


def explained(model: LoadedModel) -> str:
    """For people."""
    if model.has_decoder:
        return (
            "Error rates are of greedy transcripts against the texts of the dataset; cross-entropy is that of these texts, teacher-forced, in nats a "
            "token. How far the encoder's output moved is ||x' - x|| over ||x||, over all frames inside and outside the edited stretch; outside is "
            "also the padding."
        )
    return (
        "This checkpoint has no decoder, so there are no transcripts: measured is how far the encoder's output moved, ||x' - x|| over ||x||, and its "
        "cosine with what it was, over all frames inside and outside the edited stretch; outside is also the padding."
    )


def lines(summary: dict[str, Any], effects: dict[str, dict[str, Any]]) -> list[str]:
    """For the terminal."""
    some = ", ".join(map(str, summary["feature"][:8])) + (" ..." if len(summary["feature"]) > 8 else "")
    out = [f"{summary['features']}: {len(summary['feature'])} features ({some}), {summary['where']}; {summary['clips']} clips"]
    if summary["measured"] == ENCODER_OUTPUT:
        out.append("no decoder in this checkpoint: measured at the encoder's output")
    named = {f"{name}, {kind}": one for name, kinds in effects.items() for kind, one in kinds.items()}
    own, theirs = summary["mean_abs"], summary["control"]["mean_abs"]
    matched = f"  random features: {len(theirs)} sets, means over them; mean |value| {sum(theirs) / len(theirs):.3g}, of the features {own:.3g}"
    return [*out, *in_lines({"unchanged": summary["unchanged"]} | named), matched]


def written(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Transcripts for the terminal, where there are few clips."""
    clips = dict.fromkeys(row["clip"] for row in rows)
    if len(clips) > SHOWN_CLIPS or any(row["after"] is None for row in rows):
        return []
    out = []
    for clip in clips:
        of_clip = [row for row in rows if row["clip"] == clip]
        out += [f"  {of_clip[0]['source']}: {of_clip[0]['before']}", *(f"    {row['change']}: {row['after']}" for row in of_clip)]
    return out
