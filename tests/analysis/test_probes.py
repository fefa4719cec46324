"""Probes against PyTorch's own optimiser, their scores against plain counting, and the choice of features against brute force."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from analysis.probes import L2, class_differences, fit_probes, forward_selection, probe_scores, scale_of


@pytest.fixture(scope="module")
def rows():
    """Correlated columns, three labels of different frequency, and what each probe may look at."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1500, 40, generator=generator) @ torch.randn(40, 40, generator=generator) * 0.3
    x = scale_of(x)(x)
    noise = torch.randn(1500, 3, generator=generator)
    labels = torch.stack([x[:, 0] + noise[:, 0] > 0, x[:, 1] - x[:, 2] + noise[:, 1] > 2, noise[:, 2] > 2], dim=1)
    return x, labels, torch.rand(40, 3, generator=generator) < 0.7


def plain_fit(x, labels):
    """One probe, by torch.optim.LBFGS in float64: the same problem, nothing of ours."""
    x, at = x.double(), torch.zeros(x.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    share = torch.where(labels, 0.5 / labels.sum(), 0.5 / (~labels).sum()).double()
    optimiser = torch.optim.LBFGS([at], max_iter=1000, tolerance_grad=1e-9, tolerance_change=1e-14, line_search_fn="strong_wolfe")

    def loss():
        optimiser.zero_grad()
        value = (share * F.binary_cross_entropy_with_logits(x @ at[:-1] + at[-1], labels.double(), reduction="none")).sum()
        value = value + L2 / 2 * at[:-1].square().sum()
        value.backward()
        return value

    optimiser.step(loss)
    return at.detach().float()


def test_many_probes_at_once_are_each_what_a_plain_optimiser_finds_for_it_alone(rows):
    x, labels, keep = rows
    probes = fit_probes(x, labels, keep)
    assert (probes.weight[~keep] == 0).all()
    for i in range(3):
        alone = plain_fit(x[:, keep[:, i]], labels[:, i])
        torch.testing.assert_close(probes.weight[keep[:, i], i], alone[:-1], atol=0.01, rtol=0)
        torch.testing.assert_close(probes.bias[i], alone[-1], atol=0.01, rtol=0)


def test_a_probe_that_may_look_at_nothing_knows_nothing(rows):
    x, labels, _ = rows
    odds = fit_probes(x, labels, torch.zeros(40, 3, dtype=torch.bool))(x).numpy()
    assert probe_scores(labels[:, 1].numpy(), odds[:, 1]).balanced_accuracy == 0.5


def test_scores_are_those_of_plain_counting():
    generator = np.random.default_rng(0)
    labels, odds = generator.random(60) < 0.3, np.round(generator.standard_normal(60), 1)
    pairs = [(a > b) + 0.5 * (a == b) for a, b in itertools.product(odds[labels], odds[~labels])]
    hits, alarms, misses = (odds[labels] > 0).sum(), (odds[~labels] > 0).sum(), (odds[labels] <= 0).sum()
    scores = probe_scores(labels, odds)
    assert scores.auc == pytest.approx(np.mean(pairs))
    assert scores.accuracy == pytest.approx(np.mean((odds > 0) == labels))
    assert scores.balanced_accuracy == pytest.approx((hits / labels.sum() + (odds[~labels] <= 0).mean()) / 2)
    assert scores.f1 == pytest.approx(2 * hits / (2 * hits + alarms + misses))


def test_features_that_say_nothing_new_are_not_chosen():
    generator = torch.Generator().manual_seed(1)
    signal = torch.randn(2000, 2, generator=generator)
    x = torch.cat([signal[:, :1], signal[:, :1] * 1.5, signal[:, 1:] * 0.8, torch.randn(2000, 20, generator=generator)], dim=1)
    labels = signal[:, 0] + 0.5 * signal[:, 1] > 0
    x = scale_of(x)(x)
    differences = class_differences(x, labels[:, None])[:, 0]
    assert differences[:2].min() > differences[2] > differences[3:].abs().max()
    chosen = forward_selection(x, labels, 2)
    assert chosen[0] in (0, 1) and chosen[1] == 2  # the copy of the first tells as much alone, and nothing beside it
    assert not {0, 1} <= set(forward_selection(x, labels, 23))


def test_forward_selection_is_least_squares_one_feature_at_a_time(rows):
    x, labels, _ = rows
    share = torch.where(labels[:, 1], 0.5 / labels[:, 1].sum(), 0.5 / (~labels[:, 1]).sum()).double().sqrt()
    chosen: list[int] = []
    for _ in range(4):
        errors = []
        for i in range(40):
            design = torch.cat([x[:, [*chosen, i]].double(), torch.ones(len(x), 1, dtype=torch.float64)], dim=1) * share[:, None]
            wanted = (labels[:, 1].double() * share)[:, None]
            errors.append((design @ torch.linalg.lstsq(design, wanted).solution - wanted).square().sum().item())
        chosen.append(int(np.argmin(errors)))
    assert forward_selection(x, labels[:, 1], 4) == chosen


def test_a_constant_feature_tells_nothing():
    x = torch.full((50, 2), 3.3)
    x[:, 1] = torch.arange(50)
    scale = scale_of(x)
    assert scale.deviation[0] == 0
    assert (scale(x)[:, 0] == 0).all() and scale(x)[:, 1].std(correction=0) == pytest.approx(1.0, abs=1e-5)
