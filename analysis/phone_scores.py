"""From counts to scores: AUC, F1, PMI, selectivity, onset, polysemanticity, each with a jackknife interval. `docs/phones.md` says what they mean."""

from typing import NamedTuple

import numpy as np

from analysis.arpabet import CLASSES, SILENCE
from analysis.phone_counts import PhoneCounts, spread
from analysis.phone_details import PhoneDetails, Targets, histograms
from analysis.phone_kernels import (
    ALL,
    CLASS,
    DETECTED,
    FOUND,
    HITS,
    LATENCIES,
    LATENCY_US,
    LOWER,
    NEAR_HITS,
    PHONE,
    TOP,
    WINDOW_US,
    ZERO,
    bin_lo_hi,
)

LEAST_FRAMES = 30
"""That a phone or a class must have to be a feature's best: on few frames a high AUC comes by chance."""
TOP_FRAMES = 100
"""That the top of a feature's activations must hold: some 25 occurrences of a phone."""
TOP_SHARE = 0.5
"""Of the maximum: above it everything is top."""
LOWER_SHARE = 0.2
"""Of where the top begins: below it, activations are nobody's claim, and are not compared with the top."""
FRAMES_PER_PHONE = 4
"""A phone lasts about 80 ms: so many frames are one observation."""
EXCESS_SE = 2.0
"""A phone counts as in excess only by what it has beyond so many standard errors."""
LEAST_EXCESS = 0.05
"""Below it, a stratum is as good as the base mix: it says nothing."""
Z_95 = 1.959963984540054
"""Of the normal distribution, two-sided."""
STUDENT_95 = (12.706204736432095, 4.302652729911275, 3.182446305284263, 2.7764451051977987)
"""Of Student's t with 1, 2, ... degrees of freedom, two-sided."""


class AucTable(NamedTuple):
    """How well every feature tells every phone and class from all other labelled frames."""

    names: tuple[str, ...]
    """Phones, then classes."""
    n_phones: int
    """How many of them are phones."""
    frames: np.ndarray
    """int64 [names]"""
    auc: np.ndarray
    """float64 [features, names]; NaN for what no frame is, or all."""
    responds: np.ndarray
    """bool [features, names]: whether the feature is active (above 0) on at least as large a share of those frames as of all."""
    shuffled: np.ndarray
    """`auc` under shuffled labels."""
    shuffled_responds: np.ndarray
    """`responds` under shuffled labels."""


class Scores(NamedTuple):
    """One value a feature, float64 [features], NaN where undefined; those with an interval [features, 3]: value, low, high."""

    phone: np.ndarray
    """int64: index into the phones, -1 for none."""
    phone_class: np.ndarray
    """int64: index into the classes, -1 for none."""
    auc: np.ndarray
    auc_active: np.ndarray
    """AUC of max(value, 0): every inactive frame ties."""
    auc_shuffled: np.ndarray
    p_value: np.ndarray
    f1: np.ndarray
    precision: np.ndarray
    recall: np.ndarray
    threshold: np.ndarray
    pmi: np.ndarray
    selectivity: np.ndarray
    onset_ms: np.ndarray
    class_auc: np.ndarray
    polysemanticity: np.ndarray
    phones_at_top: np.ndarray


CLASS_NAMES = tuple(CLASSES)


def class_members(phones: tuple[str, ...]) -> np.ndarray:
    """bool [classes, phones]: which phones are in which class."""
    return np.array([[phone in CLASSES[name] for phone in phones] for name in CLASS_NAMES])


# First pass


def auc_table(counts: PhoneCounts, phones: tuple[str, ...]) -> AucTable:
    """The area under the ROC curve over frames; values in one bin tie, and ties count half."""
    members = class_members(phones)
    frames = np.concatenate([counts.frames, members @ counts.frames])
    true, shuffled = (_auc(counts, members, frames, by_shuffled) for by_shuffled in (False, True))
    return AucTable((*phones, *CLASS_NAMES), len(phones), frames, *true, *shuffled)


def _auc(counts: PhoneCounts, members: np.ndarray, frames: np.ndarray, by_shuffled: bool) -> tuple[np.ndarray, np.ndarray]:
    auc = np.empty((len(counts.high), len(frames)))
    responds = np.empty(auc.shape, bool)
    for some, by_phone in spread(counts, by_shuffled):
        wide = by_phone.astype(np.float64)
        inside, everything = np.concatenate([wide, members.astype(np.float64) @ wide], axis=1), wide.sum(axis=1, keepdims=True)
        auc[some] = area(inside, everything)
        active = [counted[..., ZERO + 1 :].sum(axis=-1) for counted in (inside, everything)]
        responds[some] = (active[0] > 0) & (active[0] * counts.frames.sum() >= active[1] * frames)
    return auc, responds


def area(inside: np.ndarray, everything: np.ndarray) -> np.ndarray:
    """AUC of histograms over ascending bins, the last axis: of some frames, and of all. Mann and Whitney's U over the number of pairs."""
    below = np.cumsum(everything, axis=-1) - everything
    n, total = inside.sum(axis=-1), everything.sum(axis=-1)
    u = (inside * (below + everything / 2)).sum(axis=-1) - n * n / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        return u / (n * (total - n))


def best(auc: np.ndarray, considered: np.ndarray) -> np.ndarray:
    """int64 [features]: the column of the highest AUC among those considered (bool, like auc); -1 where none is."""
    return np.where(considered.any(axis=1), np.where(considered, auc, -np.inf).argmax(axis=1), -1)


def may_be_best(table: AucTable, classes: bool, responds: np.ndarray) -> np.ndarray:
    """bool [features, names]: phones, or classes, that may be a feature's best: with enough frames, no silence, and where the feature is active.

    Without the last, post-GELU neurons would be credited with what they never fire on: far below zero GELU comes back to nearly 0, which is
    above its values between, so that a phone which shuts a neuron off altogether can have the highest AUC.
    """
    is_class = np.arange(len(table.names)) >= table.n_phones
    enough = (table.frames >= LEAST_FRAMES) & ~np.isnan(table.auc).any(axis=0)
    return responds & (enough & (is_class == classes) & (np.array(table.names) != SILENCE))


def targets(counts: PhoneCounts, table: AucTable) -> Targets:
    """What the second pass has to look for: each feature's best phone and class, and where its values are cut."""
    n_features, phones = len(counts.high), table.names[: table.n_phones]
    phone, class_ = (best(table.auc, may_be_best(table, classes, table.responds)) for classes in (False, True))
    threshold = np.full(n_features, np.inf, np.float32)
    top_from = np.full(n_features, np.inf)
    first_bin, n_bins = np.full(n_features, ZERO), np.ones(n_features, np.int64)
    lo, _ = bin_lo_hi()
    for some, by_phone in spread(counts):
        everything = by_phone.sum(axis=1)
        for f, feature in enumerate(range(some.start, some.stop)):
            held = np.flatnonzero(everything[f])
            if not len(held) or phone[feature] < 0:
                continue
            first_bin[feature] = min(held[0], ZERO)
            n_bins[feature] = max(held[-1], ZERO) + 1 - first_bin[feature]
            if held[-1] <= ZERO:
                continue  # never active
            inside = by_phone[f, phone[feature]]
            hits, detections = (np.cumsum(h[:ZERO:-1])[::-1] for h in (inside, everything[f]))  # at and above each positive bin
            f1 = 2 * hits / (detections + inside.sum())
            highest = len(f1) - 1 - f1[::-1].argmax()  # of equally good ones
            # The bin next to zero begins above zero: zeros are not active.
            threshold[feature] = max(np.float32(lo[ZERO + 1 + highest]), np.finfo(np.float32).smallest_subnormal)
            enough = np.flatnonzero(detections >= TOP_FRAMES)
            if len(enough):
                top_from[feature] = min(TOP_SHARE * float(counts.high[feature]), lo[ZERO + 1 + enough[-1]])
    members = np.concatenate([class_members(phones), np.zeros((1, len(phones)), bool)])
    class_of = np.where(class_ < 0, len(members) - 1, class_ - table.n_phones).astype(np.int16)
    return Targets(
        phone.astype(np.int16), class_of, members, threshold, counts.high, top_from, LOWER_SHARE * top_from, first_bin.astype(np.int64), n_bins
    )  # fmt: skip


# Second pass


def scores(table: AucTable, sought: Targets, details: PhoneDetails) -> Scores:
    """All of `phone_scores.parquet`. Deterministic: it depends on the counts alone."""
    n, weight = len(sought.phone), details.frames.sum(axis=1)
    phone = sought.phone.astype(np.int64)
    class_ = np.where(sought.class_of == len(CLASS_NAMES), -1, sought.class_of).astype(np.int64)
    triple = {name: np.full((n, 3), np.nan) for name in ("auc", "f1", "pmi", "selectivity", "onset_ms", "class_auc", "polysemanticity")}
    single = {name: np.full(n, np.nan) for name in ("auc_active", "auc_shuffled", "p_value", "precision", "recall", "threshold", "phones_at_top")}
    shuffled = np.where(may_be_best(table, False, table.shuffled_responds), table.shuffled, -np.inf).max(axis=1)
    null = np.sort(shuffled[np.isfinite(shuffled)])

    of_phone, everything = leave_one_out(details.frames), leave_one_out(details.frames.sum(axis=1))
    of_class = of_phone @ sought.members.T
    near = leave_one_out(details.near_frames)
    detected, latency, strata = (leave_one_out(part.swapaxes(0, 1)) for part in (details.detected, details.latency, details.strata))
    middle = np.mean(bin_lo_hi(), axis=0)

    def interval(values: np.ndarray, low: float = -np.inf, high: float = np.inf) -> np.ndarray:
        return jackknife(values, weight, low, high)

    for f, histogram in enumerate(histograms(details, sought)):
        p, first = phone[f], sought.first_bin[f]
        if p < 0:
            continue
        single["auc_shuffled"][f] = shuffled[f] if np.isfinite(shuffled[f]) else np.nan
        frames = np.stack([everything, of_phone[:, p], of_class[:, sought.class_of[f]]], axis=1)
        filled = leave_one_out(histogram)
        filled[..., ZERO - first] += frames - filled.sum(axis=-1)
        triple["auc"][f] = interval(area(filled[:, PHONE], filled[:, ALL]), 0, 1)
        active = filled[0, :, ZERO - first :].copy()
        active[:, 0] += filled[0, :, : ZERO - first].sum(axis=-1)
        single["auc_active"][f] = area(active[PHONE], active[ALL])
        single["p_value"][f] = (1 + len(null) - np.searchsorted(null, triple["auc"][f, 0])) / (1 + len(null))
        if class_[f] >= 0:
            triple["class_auc"][f] = interval(area(filled[:, CLASS], filled[:, ALL]), 0, 1)
        triple["selectivity"][f] = interval(d_prime(filled[:, PHONE], filled[:, ALL], middle[first : first + filled.shape[-1]]))
        if np.isfinite(sought.threshold[f]):
            own = detected[:, f]
            precision, recall, f1 = tolerant_f1(own, frames[:, 1])
            single["precision"][f], single["recall"][f], single["threshold"][f] = precision[0], recall[0], sought.threshold[f]
            triple["f1"][f] = interval(f1, 0, 1)
            triple["pmi"][f] = interval(pmi(own[:, HITS], own[:, DETECTED], frames[:, 1], everything))
            triple["onset_ms"][f] = interval(median_latency_ms(latency[:, f]))
        if np.isfinite(sought.top_from[f]):
            change, at_top = polysemanticity(strata[:, f], near[:, p])
            triple["polysemanticity"][f], single["phones_at_top"][f] = interval(change, 0, 1), at_top[0]
    return Scores(phone=phone, phone_class=class_, **triple, **single)


def leave_one_out(parts: np.ndarray) -> np.ndarray:
    """[groups, ...] counts -> int64 [1 + groups, ...]: of all groups together, then of all but one of them."""
    parts = parts.astype(np.int64)
    total = parts.sum(axis=0, keepdims=True)
    return np.concatenate([total, total - parts])


def jackknife(values: np.ndarray, weight: np.ndarray, low: float = -np.inf, high: float = np.inf) -> np.ndarray:
    """value, and the ends of its 95 % interval, float64 [3], by the delete-a-group jackknife for groups of unequal size.

    values: [1 + groups], of everything, then without each group. weight: [groups], the frames of each. Busing, Meijer and van der Leeden,
    Delete-m jackknife for unequal m, Statistics and Computing 9 (1999). The quantile is Student's. low, high: what the value can't exceed.
    The ends are NaN with fewer than two groups, and where the value is undefined without one of them.
    """
    used = weight > 0
    value, without, share = values[0], values[1:][used], weight[used] / weight.sum()
    if len(without) < 2 or not np.isfinite(value) or not np.isfinite(without).all():
        return np.array([value, np.nan, np.nan])
    pseudo = value / share - (1 / share - 1) * without
    centre = len(without) * value - ((1 - share) * without).sum()
    variance = ((pseudo - centre) ** 2 / (1 / share - 1)).mean()
    half = student_95(len(without) - 1) * np.sqrt(variance)
    return np.array([value, max(low, value - half), min(high, value + half)])


def student_95(freedom: int) -> float:
    """Two-sided 95 % quantile of Student's t: exact for few degrees of freedom, else the expansion of Abramowitz and Stegun, 26.7.5."""
    if freedom <= len(STUDENT_95):
        return STUDENT_95[freedom - 1]
    z, v = Z_95, freedom
    terms = (z**3 + z) / 4 / v, (5 * z**5 + 16 * z**3 + 3 * z) / 96 / v**2, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384 / v**3
    return z + sum(terms)


def d_prime(inside: np.ndarray, everything: np.ndarray, middle: np.ndarray) -> np.ndarray:
    """(mean inside - mean of the rest) / root of the mean of both variances; values are those of the bins' middles. Last axis: bins."""
    rest = everything - inside
    with np.errstate(invalid="ignore", divide="ignore"):
        means, variances = zip(*(_moments(counts, middle) for counts in (inside, rest)), strict=True)
        return (means[0] - means[1]) / np.sqrt((variances[0] + variances[1]) / 2)


def _moments(counts: np.ndarray, middle: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    n = counts.sum(axis=-1)
    mean = (counts * middle).sum(axis=-1) / n
    return mean, (counts * (middle - mean[..., None]) ** 2).sum(axis=-1) / n


def tolerant_f1(detected: np.ndarray, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision, recall, F1 with a tolerance of one frame. detected: [..., 4]. frames: of the phone."""
    with np.errstate(invalid="ignore", divide="ignore"):
        precision, recall = detected[..., NEAR_HITS] / detected[..., DETECTED], detected[..., FOUND] / frames
        return precision, recall, 2 * precision * recall / (precision + recall)


def pmi(hits: np.ndarray, detections: np.ndarray, frames: np.ndarray, everything: np.ndarray) -> np.ndarray:
    """Pointwise mutual information of 'in the phone' and 'at or above the threshold', in bits; NaN without a hit."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(hits > 0, np.log2(hits * everything / (detections * frames.astype(np.float64))), np.nan)


def median_latency_ms(latency: np.ndarray) -> np.ndarray:
    """The median, interpolated within its bin; NaN without any. latency: counts [..., LATENCIES]."""
    upto = np.cumsum(latency, axis=-1)
    half = upto[..., -1:] / 2
    at = np.minimum((upto < half).sum(axis=-1, keepdims=True), LATENCIES - 1)
    inside = np.take_along_axis(latency, at, axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        part = (half - (np.take_along_axis(upto, at, axis=-1) - inside)) / inside
    return ((WINDOW_US[0] + LATENCY_US * (at + part)) / 1000)[..., 0]


# Polysemanticity


def polysemanticity(strata: np.ndarray, base: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How much what a feature responds to at lower activation differs from what it responds to at the top; and how many phones are at the top.

    strata: frames [..., 2, phones], of the top and of the lower activations. base: frames [..., phones], at any activation.
    Returns the Jensen-Shannon divergence of the two strata's excess mixes, in bits, less what sampling alone would give (0: the same phones,
    1: others); and the effective number of phones in the top's excess mix, the exponential of its entropy. Both are NaN where the top is no
    more than the base mix; the divergence is 0 where the lower activations are.
    """
    amount, mix, observations = excess(strata, base[..., None, :])
    top, lower = mix[..., TOP, :], mix[..., LOWER, :]
    between = (top + lower) / 2
    divergence = _entropy(between) - (_entropy(top) + _entropy(lower)) / 2
    # Of a chi-square statistic of as many degrees of freedom as there are phones less one, over 8 ln 2 (Grosse and others 2002).
    kinds = (between > 0).sum(axis=-1) - 1
    with np.errstate(divide="ignore", invalid="ignore"):
        by_chance = kinds / (8 * np.log(2)) * (1 / observations[..., TOP] + 1 / observations[..., LOWER])
        change = np.clip(divergence - by_chance, 0, 1)
    change = np.where(amount[..., LOWER] >= LEAST_EXCESS, change, 0)
    says_something = amount[..., TOP] >= LEAST_EXCESS
    return np.where(says_something, change, np.nan), np.where(says_something, 2 ** _entropy(top), np.nan)


def excess(frames: np.ndarray, base: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What a stratum has of each phone beyond the base mix and beyond chance: its share in all, the mix within, how many observations that is.

    frames, base: [..., phones]. Frames that come at random, whatever is said, add to every phone by its base rate, and so to no excess.
    """
    n = frames.sum(axis=-1, keepdims=True)
    rate = base / base.sum(axis=-1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        chance = np.sqrt(rate * (1 - rate) * FRAMES_PER_PHONE / n)
        beyond = np.where(n > 0, np.maximum(frames / n - rate - EXCESS_SE * chance, 0), 0)
        amount = beyond.sum(axis=-1)
        mix = np.where(amount[..., None] > 0, beyond / amount[..., None], 0)
    return amount, mix, amount * n[..., 0] / FRAMES_PER_PHONE


def _entropy(mix: np.ndarray) -> np.ndarray:
    """In bits."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return -np.where(mix > 0, mix * np.log2(mix), 0).sum(axis=-1)
