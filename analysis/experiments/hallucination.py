"""Hallucinations: what Whisper writes where nobody speaks, and how much of it goes when features are steered.

The procedure is that of AudioSAE (2602.05027): features that tell sounds on which Whisper hallucinates from speech are found and steered. 2606.07473
compares that with steering by the difference of means in activation space, which is here the baseline. Everything is chosen on one half of speech
and sounds; what is reported is of the other half.
"""

import math
from collections.abc import Sequence
from functools import partial

import numpy as np

from analysis.experiments.hallucination_report import Candidate, Outcome, Trial, hallucination_report
from analysis.experiments.report import Report
from analysis.experiments.speech import Mapper, Speech, in_this_process, whole_model
from analysis.hearing import Heard, Item, Rule, Sounds, Steer, errors_of, false_detections, hear, means
from analysis.nonspeech import KINDS as ALL_KINDS
from analysis.steering import Edit, open_steerable
from cache.errors import HearsaeError

KINDS = ("silence", "pink", "hum", "tones", "clicks", "modulated", "buzz", "scrambled")
"""Of those of `analysis.nonspeech`: the others are much like one of these."""
PER_KIND = 8
"""Sounds of each kind, half of them held out."""
NS = (5, 50)
"""Features steered."""
ADDED = (0.5, 1.0, 2.0)
"""Times the difference of means, added to each feature: 1 takes the mean of speech to that of the sounds."""
SCALED = (0.0, 2.0)
"""Factors of the value of features that are stronger in the sounds than in speech; 0 removes them. Where such a feature is silent nothing changes."""
WER_BUDGET = 0.01
"""How much the word error rate of speech may rise on the training half, in absolute terms."""
RANDOM_DRAWS = 3
"""Sets of random features that the control steers."""
MATCHED = 10
"""Features of like size that each random one is drawn from."""
PIECE_ITEMS = 32
"""Sounds or clips that a worker is given at once: as many as are decoded at once."""


def hallucination(
    speech: Speech,
    model: str,
    features: str,
    nonspeech: Speech | None = None,
    kinds: Sequence[str] = KINDS,
    per_kind: int = PER_KIND,
    ns: Sequence[int] = NS,
    added: Sequence[float] = ADDED,
    scaled: Sequence[float] = SCALED,
    wer_budget: float = WER_BUDGET,
    rule: Rule = Rule(),  # noqa: B008
    seed: int = 0,
    device: str = "auto",
    map_pieces: Mapper = in_this_process,
) -> Report:
    """Transcribes speech and sounds in which nobody speaks, finds the features that tell them apart, and steers them.

    features: as `analysis.steering` takes them. nonspeech: recordings without speech, instead of the sounds of `analysis.nonspeech`; of those the
    `kinds`, `per_kind` of each. rule: when a transcript counts as silence.
    The way of steering is the one with the fewest false detections on the training half among those that raise the word error rate there by no more
    than wer_budget. Controls: the same steering of random features, and adding the difference of means of whole activations.
    Raises HearsaeError for a model without a decoder, clips without text, and where Whisper hallucinates on nothing.
    """
    _check(ns, per_kind, kinds, added, scaled)
    loaded = whole_model(model, device, "transcribing")
    steerable = open_steerable(features, loaded, seed)
    if steerable.axis != "frame":
        raise HearsaeError(f"{steerable.site} is a site of the decoder: sounds are told from speech in the encoder's frames")
    speech.texts()  # refuses clips without one
    sounds = Sounds(speech, nonspeech, tuple(dict.fromkeys(kinds)), per_kind, seed)
    items = sounds.items()

    def listen(steers: Sequence[Steer | None], chosen: Sequence[int]) -> list[list[Heard]]:
        """For each way of steering what is heard in each of the chosen items."""
        work = partial(hear, sounds, model, device, rule, steerable.site, seed, steers)
        found = map_pieces(work, _pieces([items[i] for i in chosen]))
        return [list(column) for column in zip(*(one for piece in found for one in piece), strict=True)] if steers else []

    (before,) = listen([None], range(len(items)))
    train, held_out = ([i for i, item in enumerate(items) if item.held_out == half] for half in (False, True))
    spoken = [i for i in train if items[i].is_speech]
    wrong = [i for i in train if not items[i].is_speech and not before[i].is_silent]
    if not wrong:
        raise HearsaeError(
            f"{model} hallucinates on none of the {len(train) - len(spoken)} sounds of the training half: there is nothing to suppress"
        )

    compared = [*wrong, *spoken]
    found = map_pieces(partial(means, sounds, model, device, steerable.spec, seed), _pieces([items[i] for i in compared]))
    values, rows = (np.stack(part) for part in zip(*(one for piece in found for one in piece), strict=True))
    of_sounds, of_speech = values[: len(wrong)], values[len(wrong) :]
    steers = candidates(steerable.spec, rank_features(of_sounds, of_speech), of_sounds.mean(0) - of_speech.mean(0), ns, added, scaled)
    vector = rows[: len(wrong)].mean(0) - rows[len(wrong) :].mean(0)
    steers += [of_vector(steerable.site, vector, amount) for amount in added]
    tried = [
        Candidate(steer, false_detections([items[i] for i in train], heard), errors_of([items[i] for i in train], heard).wer or 0.0)
        for steer, heard in zip(steers, listen(steers, train), strict=True)
    ]
    budget = (errors_of([items[i] for i in train], [before[i] for i in train]).wer or 0.0) + wer_budget
    chosen = {
        "features": best_of([one for one in tried if one.steer.basis == "features"], budget),
        "vector": best_of([one for one in tried if one.steer.basis == "vector"], budget),
    }
    final = [(name, one.steer) for name, one in chosen.items() if one is not None]
    if chosen["features"] is not None:
        drawn = [at_random(chosen["features"].steer, np.abs(of_sounds).mean(0), seed + draw) for draw in range(RANDOM_DRAWS)]
        final += [(f"random {draw}", steer) for draw, steer in enumerate(drawn) if steer is not None]
    heard = listen([steer for _, steer in final], held_out)
    trials = [Trial(name, steer, one) for (name, steer), one in zip(final, heard, strict=True)]
    outcome = Outcome(items, before, wrong, tried, chosen, budget, trials)
    settings = {"model": model, "features": steerable.spec, "site": steerable.site, "rule": rule._asdict(), "wer_budget": wer_budget, "seed": seed}
    return hallucination_report(outcome, sounds, settings)


def _check(ns: Sequence[int], per_kind: int, kinds: Sequence[str], added: Sequence[float], scaled: Sequence[float]) -> None:
    if not ns or min(ns) < 1:
        raise HearsaeError("--n: give one number of features or more, each at least 1")
    if per_kind < 2:
        raise HearsaeError(f"--per-kind {per_kind} must be at least 2: half of the sounds are held out")
    if not kinds:
        raise HearsaeError(f"--kinds: give one or more of {', '.join(ALL_KINDS)}")
    for kind in kinds:
        if kind not in ALL_KINDS:
            raise HearsaeError(f"there is no kind '{kind}' of sound without speech; there are: {', '.join(ALL_KINDS)}")
    if not added and not scaled:
        raise HearsaeError("--add, --scale: give one amount or more")
    for amount in (*added, *scaled):
        if not math.isfinite(amount):
            raise HearsaeError(f"--add, --scale: {amount} is not a finite number")


def _pieces(items: Sequence[Item]) -> list[list[Item]]:
    return [list(items[first : first + PIECE_ITEMS]) for first in range(0, len(items), PIECE_ITEMS)]


# Which features, and what is done to them


def rank_features(sounds: np.ndarray, speech: np.ndarray) -> np.ndarray:
    """Features by how far the means of the two lie apart, in their common deviation; those that tell most first, those that tell nothing left out.

    sounds, speech: [clips, features], means over each clip's frames.
    """
    difference = sounds.mean(0) - speech.mean(0)
    deviation = np.sqrt((sounds.var(0) + speech.var(0)) / 2)
    telling = np.abs(difference) / np.maximum(deviation, np.finfo(np.float32).tiny)
    order = np.argsort(-telling, kind="stable")
    return order[np.abs(difference[order]) > 0]


def candidates(
    spec: str, ranked: np.ndarray, difference: np.ndarray, ns: Sequence[int], added: Sequence[float], scaled: Sequence[float]
) -> list[Steer]:
    """Ways of steering the first n of the ranked features: each by so many times its difference of means, or by factors those that are stronger in
    the sounds."""
    steers = []
    louder = [int(feature) for feature in ranked if difference[feature] > 0]
    for n in dict.fromkeys(ns):
        for amount in added:
            chosen = [int(feature) for feature in ranked[:n]]
            edits = tuple(Edit((feature,), "add", float(amount * difference[feature])) for feature in chosen)
            steers.append(Steer("features", spec, "add", len(chosen), amount, edits))
        for factor in scaled:
            if louder:
                steers.append(Steer("features", spec, "scale", len(louder[:n]), factor, (Edit(tuple(louder[:n]), "scale", factor),)))
    return steers


def of_vector(site: str, vector: np.ndarray, amount: float) -> Steer:
    """The baseline in activation space: a multiple of the difference of means [width], added to every row."""
    edits = tuple(Edit((i,), "add", float(amount * value)) for i, value in enumerate(vector))
    return Steer("vector", f"neurons:{site}", "add", len(vector), amount, edits)


def at_random(steer: Steer, sizes: np.ndarray, seed: int) -> Steer | None:
    """The same edits of as many other features: in place of each one of the MATCHED that come closest to it in size, or as many as there are.

    sizes: [features], mean |value| in the sounds; where it is 0 a feature is not drawn. None where there are not as many others.
    """
    random = np.random.default_rng(seed)
    old = list(dict.fromkeys(feature for edit in steer.edits for feature in edit.features))
    others = np.setdiff1d(np.flatnonzero(sizes > 0), old)
    if len(others) < len(old):
        return None
    new = {}
    for feature in old:
        nearest = others[np.argsort(np.abs(sizes[others] - sizes[feature]), kind="stable")[:MATCHED]]
        new[feature] = int(random.choice(nearest))
        others = others[others != new[feature]]
    edits = tuple(edit._replace(features=tuple(new[feature] for feature in edit.features)) for edit in steer.edits)
    return steer._replace(basis="random", edits=edits)


def best_of(tried: Sequence[Candidate], most_wer: float) -> Candidate | None:
    """The one with the fewest false detections among those within the budget; of equals the one with fewer errors. None where none is within."""
    within = [one for one in tried if one.wer <= most_wer]
    return min(within, key=lambda one: (one.false_detections, one.wer), default=None)
