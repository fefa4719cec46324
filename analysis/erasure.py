"""Erasing a concept: probes for it in one basis, sparse ones, and fresh ones after more and more of the features are gone.

Everything is chosen on training speakers and tested on held-out ones. `analysis.experiments.erase` says what it is for.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from analysis.concepts import Samples
from analysis.probes import class_differences, fit_probes, forward_selection, probe_scores, scale_of

STEPS = (1, 2, 5)
"""Of every power of ten, up to a tenth of the features: how many are removed. Then every tenth of them."""
FINER = 8
"""Numbers of features tried besides, between the last that leaves the concept and the first that does not."""
STUDENT_T = 2.13
"""97.5 % point of Student's t with SHUFFLES - 1 degrees of freedom."""
ORDERS = ("ranked", "random", "shuffled")
"""In which features go: most telling first, at random, and most telling for shuffled labels, to which the probe is then trained."""
SILENCED = "silenced"
"""Most telling first, and the probe is the one that was trained on all."""


class ErasureData(NamedTuple):
    """What is needed to probe for any concept. Small enough to be sent to workers once."""

    samples: Samples
    concepts: dict[str, np.ndarray]
    values: dict[str, np.ndarray]
    """Of each basis: float32 [samples, features]."""
    least: int
    ks: tuple[int, ...]
    folds: int
    seed: int


@dataclass(frozen=True)
class _Fold:
    """Training and test samples of one basis and one concept, standardised by the training samples."""

    train: Tensor
    test: Tensor
    labels: Tensor
    """bool [training samples, 1 + SHUFFLES]: the concept, and the same of the shuffled labels."""
    test_labels: np.ndarray
    """bool [test samples, 1 + SHUFFLES]"""
    ranked: Tensor
    """int64 [features]: those that vary in training, most telling first."""
    ranked_shuffled: list[Tensor]
    at_random: Tensor
    """The same features in random order."""


def enough_of(data: ErasureData) -> tuple[list[str], list[str]]:
    """The concepts of which there are enough samples in every fold, and the others."""
    good: list[str] = []
    bad: list[str] = []
    for name, has in data.concepts.items():
        with_it = has[data.samples.label]
        few = False
        for fold in range(data.folds):
            test = data.samples.part == fold
            for rows, least in ((~test, data.least), (test, data.least // 2)):
                few |= min(int(with_it[rows].sum()), int((~with_it[rows]).sum())) < least
        (bad if few else good).append(name)
    return good, bad


class Found(NamedTuple):
    rows: list[dict[str, Any]]
    result: dict[str, Any]


def probe_concept(data: ErasureData, piece: tuple[str, str]) -> Found:
    basis, concept = piece
    folds = [_fold(data, basis, concept, number) for number in range(data.folds)]
    alive = min(len(fold.ranked) for fold in folds)
    names = {"basis": basis, "concept": concept}
    sparse = _sparse(data, folds)
    rows: list[dict[str, Any]] = [{**names, "kind": "probe", "k": k, "m": None, "order": order, **one} for k, order, one in sparse]
    curve = _erased(folds, grid(alive), ORDERS) | _silenced(folds, grid(alive))
    dense = curve[0, "ranked"]["balanced_accuracy"]
    chance = _chance([one["balanced_accuracy"] for (m, order), one in curve.items() if order == "shuffled" and m < alive])
    levels = {"until_chance": chance, "until_half": (dense + 0.5) / 2}
    works = dense > chance
    found: dict[str, Any] = {}
    for order in ("ranked", "random", SILENCED):
        more = sorted({m for level in levels.values() for m in _between(_line(curve, order), level)})
        curve |= _silenced(folds, more) if order == SILENCED else _erased(folds, more, (order,))
        for name, level in levels.items():
            found[f"{name}{'' if order == 'ranked' else f'_{order}'}"] = first_below(_line(curve, order), level) if works else None
    rows += [{**names, "kind": "erase", "k": None, "m": m, "order": order, "features": None, **one} for (m, order), one in sorted(curve.items())]
    share = {f"{name}_share": None if m is None else m / alive for name, m in found.items()}
    result = {
        **names,
        "alive": alive,
        "samples": int(data.concepts[concept][data.samples.label].sum()),
        "dense": curve[0, "ranked"],
        "by_k": {str(k): one["balanced_accuracy"] for k, order, one in sparse if order == "chosen"},
        "features": {str(k): one["features"] for k, order, one in sparse if order == "chosen"},
        "chance": chance,
        "works": works,
        **found,
        **share,
        "control": {
            "dense_shuffled": curve[0, "shuffled"]["balanced_accuracy"],
            "by_k_random": {str(k): one["balanced_accuracy"] for k, order, one in sparse if order == "random"},
            "by_k_shuffled": {str(k): one["balanced_accuracy"] for k, order, one in sparse if order == "shuffled"},
        },
    }
    return Found(rows, result)


def _fold(data: ErasureData, basis: str, concept: str, number: int) -> _Fold:
    has = data.concepts[concept]
    labels = np.stack([has[data.samples.label], *has[data.samples.shuffled]], axis=1)
    held_out = data.samples.part == number
    raw = torch.tensor(data.values[basis][~held_out])
    scale = scale_of(raw)
    train, test = scale(raw), scale(torch.tensor(data.values[basis][held_out]))
    of_train = torch.from_numpy(labels[~held_out])
    of_test = torch.from_numpy(labels[held_out])
    usable = of_train.any(0) & ~of_train.all(0) & of_test.any(0) & ~of_test.all(0)  # of a rare concept, not every shuffle is
    distance = class_differences(train, of_train[:, usable]).abs()
    alive = (scale.deviation > 0).nonzero()[:, 0]
    orders = [alive[distance[alive, i].argsort(descending=True, stable=True)] for i in range(distance.shape[1])]
    generator = torch.Generator().manual_seed(data.seed + number)
    shuffled = alive[torch.randperm(len(alive), generator=generator)]
    return _Fold(train, test, of_train[:, usable], of_test[:, usable].numpy(), orders[0], orders[1:], shuffled)


def _scores(folds: Sequence[_Fold], keeps: Sequence[Sequence[Tensor]], column: Sequence[int]) -> list[dict[str, float]]:
    """Mean scores over folds of probes: keeps[fold][probe] are the features that a probe may look at, column[probe] its labels."""
    of_folds = []
    for fold, own in zip(folds, keeps, strict=True):
        keep = torch.zeros(fold.train.shape[1], len(own), dtype=torch.bool)
        for i, kept in enumerate(own):
            keep[kept, i] = True
        columns = [1 + (i - 1) % (fold.labels.shape[1] - 1) if i else 0 for i in column]
        odds = fit_probes(fold.train, fold.labels[:, columns], keep)(fold.test).numpy()
        of_folds.append([probe_scores(fold.test_labels[:, label], odds[:, i])._asdict() for i, label in enumerate(columns)])
    return [_mean_scores([scores[i] for scores in of_folds]) for i in range(len(column))]


def _sparse(data: ErasureData, folds: Sequence[_Fold]) -> list[tuple[int, str, dict[str, Any]]]:
    """(k, order, scores) of sparse probes on chosen features, on random ones, and on those chosen for shuffled labels."""
    most = max(data.ks)
    chosen = [forward_selection(fold.train, fold.labels[:, 0], most) for fold in folds]
    for_shuffled = [forward_selection(fold.train, fold.labels[:, 1], most) for fold in folds]
    keeps = [
        [torch.tensor(order[:k]) for k in data.ks for order in (own, fold.at_random.tolist(), other)]
        for fold, own, other in zip(folds, chosen, for_shuffled, strict=True)
    ]
    scores = _scores(folds, keeps, [0, 0, 1] * len(data.ks))
    orders = [(k, order) for k in data.ks for order in ("chosen", "random", "shuffled")]
    features = {"chosen": chosen[0], "random": folds[0].at_random.tolist(), "shuffled": for_shuffled[0]}
    return [(k, order, {"features": features[order][:k], **one}) for (k, order), one in zip(orders, scores, strict=True)]


def _erased(folds: Sequence[_Fold], ms: Sequence[int], orders: Sequence[str]) -> dict[tuple[int, str], dict[str, float]]:
    """Scores of fresh dense probes when the first m features of each order are gone.

    A removed feature is the same in all rows, 0 or its mean, and then says nothing to a fresh probe; here it is left out, which is the same.
    Every m has shuffled labels of its own.
    """
    if not ms:
        return {}
    wanted = [(m, order, 1 + i if order == "shuffled" else 0) for i, m in enumerate(ms) for order in orders]
    keeps = []
    for fold in folds:
        by_order = {"ranked": fold.ranked, "random": fold.at_random}
        last = fold.ranked_shuffled
        keeps.append([(by_order[order] if label == 0 else last[(label - 1) % len(last)])[m:] for m, order, label in wanted])
    scores = _scores(folds, keeps, [label for _, _, label in wanted])
    return {(m, order): one for (m, order, _), one in zip(wanted, scores, strict=True)}


def _silenced(folds: Sequence[_Fold], ms: Sequence[int]) -> dict[tuple[int, str], dict[str, float]]:
    """Scores of the probe that was trained on all features when the first m are silenced: put to their training mean."""
    of_folds = []
    for fold in folds:
        probe = fit_probes(fold.train, fold.labels[:, :1])
        weights = probe.weight.repeat(1, len(ms))
        for i, m in enumerate(ms):
            weights[fold.ranked[:m], i] = 0.0  # standardised, the mean is 0
        odds = (fold.test @ weights + probe.bias).numpy()
        of_folds.append([probe_scores(fold.test_labels[:, 0], odds[:, i])._asdict() for i in range(len(ms))])
    return {(m, SILENCED): _mean_scores([scores[i] for scores in of_folds]) for i, m in enumerate(ms)}


def _mean_scores(of_folds: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: mean_of(scores[name] for scores in of_folds) for name in of_folds[0]}


def grid(alive: int) -> list[int]:
    """0, 1, 2, 5, 10, ..., then every tenth of the features, and all."""
    steps = [step * 10**power for power in range(len(str(alive))) for step in STEPS]
    tenths = [round(alive * tenth / 10) for tenth in range(1, 10)]
    return sorted({0, *(m for m in steps if m < tenths[0]), *tenths, alive})


def _line(curve: dict[tuple[int, str], dict[str, float]], order: str) -> list[tuple[int, float]]:
    return sorted((m, one["balanced_accuracy"]) for (m, own), one in curve.items() if own == order)


def _between(line: Sequence[tuple[int, float]], level: float) -> list[int]:
    """Numbers between the last m at which the probe still works and the first from which on it fails."""
    stop = first_below(line, level)
    start = max((m for m, _ in line if m < stop), default=0)
    return sorted({round(m) for m in np.linspace(start, stop, FINER + 2)[1:-1]} - {start, stop})


def first_below(line: Sequence[tuple[int, float]], level: float) -> int:
    """The first m from which on the balanced accuracy stays at or below a level.

    line: (m, balanced accuracy), ascending; the last is of no features at all.
    """
    first = line[-1][0]
    for m, accuracy in reversed(line):
        if accuracy > level:
            break
        first = m
    return first


def _chance(shuffled: Sequence[float]) -> float:
    """The upper end of the interval in which the balanced accuracy of one more probe of shuffled labels lies in 95 of 100 cases."""
    deviation = float(np.std(shuffled, ddof=1)) if len(shuffled) > 1 else 0.0
    return max(0.5, float(np.mean(shuffled)) + STUDENT_T * deviation * (1 + 1 / len(shuffled)) ** 0.5)


def mean_of(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))
