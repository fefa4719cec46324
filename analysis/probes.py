"""Linear probes: how well a concept can be read from the values of features, and which features tell it.

A probe is a logistic regression on standardised features, either class weighing half, with an L2 penalty. That is a strictly convex problem: a
probe has one answer, whatever it is started from. Many probes on the same rows are trained at once, each with labels of its own and with its
own choice of features, because one product of matrices for all of them costs little more than one for each.

Sparse probes are those of "Finding Neurons in a Haystack" (Gurnee et al. 2305.01610): the same on k features alone.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cache.model import fast_matmul

L2 = 1e-2
"""Weight of the penalty, half the squared norm of the weights, beside the mean loss. Probes for phones in 3,072 latents and 384 neurons of tiny.en
recognise on held-out speakers: 1e-4 91 and 94 %, 1e-3 91 and 95 %, 1e-2 93 and 96 %, 1e-1 95 and 95 %."""
MOST_STEPS = 150
"""Of the optimiser. It is stopped earlier where every gradient is near 0."""
GRADIENT = 1e-4
"""Largest partial derivative of a probe that counts as trained; the derivatives of an untrained one are up to 0.5."""
HISTORY = 10
"""Steps that L-BFGS remembers, as is usual."""
SUFFICIENT = 1e-4
"""Share of the fall which the slope promises that a step must bring (Armijo's rule, the usual value)."""
HALVINGS = 20
"""Of a step that does not bring it; the last is a millionth."""
SHORTLIST = 256
"""Features among which a sparse probe's are chosen: those whose class means lie furthest apart."""
ALREADY_SAID = 1e-3
"""Share of a feature's variance that those chosen before must have left for it to be chosen too."""


class Probes(NamedTuple):
    """C trained probes on F features."""

    weight: Tensor
    """float32 [F, C]; 0 where a probe may not look."""
    bias: Tensor
    """float32 [C]"""

    def __call__(self, x: Tensor) -> Tensor:
        """Log odds of the concept: standardised rows [n, F] -> [n, C]."""
        return x @ self.weight + self.bias


class ProbeScores(NamedTuple):
    """How well a probe does on rows that it was not trained on."""

    accuracy: float
    balanced_accuracy: float
    """Mean of the shares of either class that are recognised; 0.5 is chance."""
    auc: float
    """Probability that a row with the concept gets higher odds than one without it; ties count half."""
    f1: float


class Scale(NamedTuple):
    """What standardises features: the mean and the deviation of every feature over the training rows."""

    mean: Tensor
    """float32 [F]"""
    deviation: Tensor
    """float32 [F]; 0 of a feature that is the same in all rows."""

    def __call__(self, x: Tensor) -> Tensor:
        """[n, F] -> the same with mean 0 and deviation 1. A feature without deviation becomes 0 in all rows: it can tell nothing."""
        varies = self.deviation > 0
        return (x - self.mean) * torch.where(varies, 1 / self.deviation.clamp(min=torch.finfo(torch.float32).tiny), 0.0)


def scale_of(x: Tensor) -> Scale:
    """The scale of training rows [n, F]."""
    deviation, mean = torch.std_mean(x, dim=0, correction=0)
    smallest = torch.finfo(torch.float32).eps * x.abs().amax(0)  # a constant's deviation is but rounding
    return Scale(mean, torch.where(deviation > smallest, deviation, 0.0))


def fit_probes(x: Tensor, labels: Tensor, keep: Tensor | None = None, l2: float = L2) -> Probes:
    """Trains a probe for each column of `labels`.

    x: float32 [n, F], standardised. labels: bool [n, C], both classes in every column. keep: bool [F, C], the features that each probe may look at;
    None is all. A step of L-BFGS for all probes takes two products of matrices: along a step the odds are linear, so that looking for its length
    takes none.
    """
    used = torch.arange(x.shape[1]) if keep is None else keep.any(1).nonzero()[:, 0]
    if len(used) < x.shape[1]:
        part = fit_probes(x[:, used], labels, None if keep is None else keep[used], l2)
        weight = torch.zeros(x.shape[1], labels.shape[1])
        weight[used] = part.weight
        return Probes(weight, part.bias)
    mask = torch.ones(1, 1) if keep is None else keep.float()
    sign = labels.float() * 2 - 1
    share = torch.where(labels, 0.5 / labels.sum(0), 0.5 / (~labels).sum(0))
    columns = labels.shape[1]
    at = torch.zeros(x.shape[1] + 1, columns)
    """The weights, and the bias below them."""
    odds = torch.zeros(len(x), columns)

    def value(odds: Tensor, at: Tensor) -> Tensor:
        return (share * F.softplus(-sign * odds)).sum(0) + l2 / 2 * at[:-1].square().sum(0)

    def gradient(odds: Tensor, at: Tensor) -> Tensor:
        slope = -share * sign * torch.sigmoid(-sign * odds)
        return torch.cat([(x.t() @ slope) * mask + l2 * at[:-1], slope.sum(0, keepdim=True)])

    with fast_matmul():
        steps: list[tuple[Tensor, Tensor, Tensor]] = []
        now, loss = gradient(odds, at), value(odds, at)
        for _ in range(MOST_STEPS):
            if now.abs().max() <= GRADIENT:
                break
            direction = -_inverse_curvature(now, steps)
            fall = (direction * now).sum(0)
            direction = torch.where(fall < 0, direction, -now)  # rounding can turn a direction upwards
            fall = (direction * now).sum(0)
            along = x @ direction[:-1] + direction[-1]
            length = torch.ones(columns)
            for _ in range(HALVINGS):
                enough = value(odds + length * along, at + length * direction) <= loss + SUFFICIENT * length * fall
                if enough.all():
                    break
                length = torch.where(enough, length, length / 2)
            before, at, odds = now, at + length * direction, odds + length * along
            now, loss = gradient(odds, at), value(odds, at)
            step, change = length * direction, now - before
            product = (step * change).sum(0)
            inverse = torch.where(product > torch.finfo(torch.float32).eps * change.square().sum(0), 1 / product, 0.0)
            steps = [*steps[1 - HISTORY :], (step, change, inverse)]
    return Probes(at[:-1], at[-1])


def _inverse_curvature(gradient: Tensor, steps: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """The two loops of L-BFGS (Nocedal and Wright, Numerical Optimization, algorithm 7.4), column by column."""
    if not steps:
        return gradient / gradient.norm(dim=0).clamp(min=1.0)
    found, taken = gradient, []
    for step, change, inverse in reversed(steps):
        taken.append(inverse * (step * found).sum(0))
        found = found - taken[-1] * change
    step, change, inverse = steps[-1]
    found = found * torch.where(inverse > 0, 1 / (inverse * change.square().sum(0)), 1.0)
    for (step, change, inverse), amount in zip(steps, reversed(taken), strict=True):
        found = found + step * (amount - inverse * (change * found).sum(0))
    return found


def probe_scores(labels: np.ndarray, odds: np.ndarray) -> ProbeScores:
    """labels: bool [n], both classes. odds: float [n], above 0 where the probe says yes."""
    said = odds > 0
    hit, passed = float((said & labels).sum()), float((~said & ~labels).sum())
    yes, no = int(labels.sum()), int((~labels).sum())
    ordered, place = np.unique(odds, return_inverse=True)
    with_it = np.bincount(place[labels], minlength=len(ordered))
    without = np.bincount(place[~labels], minlength=len(ordered))
    below = np.cumsum(without) - without
    auc = float((with_it * (below + without / 2)).sum() / (yes * no))
    wrong = yes - hit + no - passed
    return ProbeScores((hit + passed) / len(labels), (hit / yes + passed / no) / 2, auc, 2 * hit / (2 * hit + wrong) if hit + wrong else 0.0)


def class_differences(x: Tensor, labels: Tensor) -> Tensor:
    """How far the class means of each feature lie apart, in its standard deviations: standardised x [n, F], bool labels [n, C] -> [F, C]."""
    share = torch.where(labels, 1 / labels.sum(0), -1 / (~labels).sum(0))
    with fast_matmul():
        return x.t() @ share


def forward_selection(x: Tensor, labels: Tensor, k: int) -> list[int]:
    """The k features of a sparse probe, in the order in which they were chosen.

    Each is the one that, with those before it, fits the labels best by least squares, the classes weighing the same: what the others already say
    counts for nothing. Only the SHORTLIST features whose class means lie furthest apart are looked at.
    x: standardised [n, F]. labels: bool [n]. Fewer than k where the rest says nothing new.
    """
    listed = class_differences(x, labels[:, None])[:, 0].abs().topk(min(SHORTLIST, x.shape[1])).indices
    share = torch.where(labels, 0.5 / labels.sum(), 0.5 / (~labels).sum())
    part = x[:, listed].double()
    part -= share.double() @ part
    weighted = part * share[:, None].double()
    common, fit = weighted.t() @ part, weighted.t() @ (labels.double() - 0.5)
    whole = common.diagonal().clone()
    chosen: list[int] = []
    for _ in range(min(k, len(listed))):
        left = common.diagonal()
        gain = torch.where(left > ALREADY_SAID * whole, fit.square() / left, -1.0)
        best = int(gain.argmax())
        if gain[best] < 0:
            break
        chosen.append(int(listed[best]))
        column = common[:, best] / common[best, best]
        fit = fit - column * fit[best]
        common = common - torch.outer(column, common[best])
    return chosen
