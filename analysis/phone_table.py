"""The table of features and phones, as people read it: which phone each feature follows, and what it responds to from high to low activation."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc

from analysis.evidence import PhoneEvidence, PhoneMix

LEVELS = (0.8, 0.9)
"""Of AUC: the summary counts the features above."""
F1_LEVELS = (0.5, 0.7)
"""Of F1, likewise."""
LEAST_IN_RANGE = 20
"""Frames that a range must hold to be spoken of."""
LEAST_BEYOND = 0.1
"""By so much a phone's share must exceed its base rate for a range to be said to respond to it."""
MOST_P = 0.01
"""Of a feature that is listed as polysemantic: what tells no phone better than shuffled labels would is not about phones."""
MOST_AT_TOP = 3.0
"""Phones at the top of such a feature: the question is what else is behind what looks like one or two."""


class Stretch(NamedTuple):
    """Neighbouring ranges in which the same phone stands out most, from the highest activation to the lowest."""

    phone: str | None
    """None where no phone stands out."""
    high: float
    """Upper end of the stretch."""
    low: float
    """Lower end."""
    share_high: float
    """The phone's largest share of the frames of a range of the stretch."""
    share_low: float
    """Its smallest."""

    def __str__(self) -> str:
        if self.phone is None:
            return "-"
        high, low = round(100 * self.share_high), round(100 * self.share_low)
        return f"{self.phone} {high}%" if high == low else f"{self.phone} {high}-{low}%"


def stretches(mix: PhoneMix) -> list[Stretch]:
    """What the ranges respond to, from high to low. Ranges with fewer than LEAST_IN_RANGE frames are passed over."""
    found: list[Stretch] = []
    for i in range(len(mix.frames) - 1, -1, -1):
        n = mix.frames[i].sum()
        if n < LEAST_IN_RANGE:
            continue
        share = mix.frames[i] / n
        most = int((share - mix.base).argmax())
        stands_out = share[most] - mix.base[most] >= LEAST_BEYOND
        phone, part = (mix.phones[most], float(share[most])) if stands_out else (None, 0.0)
        if found and found[-1].phone == phone:
            last = found.pop()
            found.append(Stretch(phone, last.high, float(mix.edges[i]), max(last.share_high, part), min(last.share_low, part)))
        else:
            found.append(Stretch(phone, float(mix.edges[i + 1]), float(mix.edges[i]), part, part))
    return found


def phone_rows(evidence: PhoneEvidence, features: Iterable[int]) -> list[dict[str, Any]]:
    """The rows of phone_scores.parquet of these features, and `ranges`, what they respond to from high to low.

    Raises HearsaeError for a feature that does not exist.
    """
    rows = []
    for feature in features:
        evidence.scan.check(feature)
        (row,) = evidence.scores.slice(feature, 1).to_pylist()
        rows.append(row | {"ranges": ", ".join(map(str, stretches(evidence.mix(feature))))})
    return rows


def strongest(evidence: PhoneEvidence, n: int) -> list[int]:
    """The n features that tell their phone best."""
    return _first(evidence.scores["auc"].to_numpy(), n)


def most_polysemantic(evidence: PhoneEvidence, n: int) -> list[int]:
    """The n features whose phones most certainly change with activation, by the lower end of the interval of their polysemanticity.

    Only of those that tell their phone better than chance, and that are about no more than MOST_AT_TOP phones at the top.
    """
    scores = evidence.scores
    certain = pc.coalesce(scores["polysemanticity_lo"], scores["polysemanticity"]).to_numpy()
    eligible = (scores["p_value"].to_numpy() <= MOST_P) & (scores["phones_at_top"].to_numpy() <= MOST_AT_TOP)
    return _first(np.where(eligible, certain, np.nan), n)


def _first(values: np.ndarray, n: int) -> list[int]:
    order = np.argsort(-values, kind="stable")
    return [int(feature) for feature in order[: min(n, int((~np.isnan(values)).sum()))]]


def summary(evidence: PhoneEvidence) -> dict[str, Any]:
    """How many features tell their best phone, or class, well, and how many would under shuffled labels.

    `significant`: features whose phone has p <= MOST_P; `polysemanticity_median` is theirs. `phones_covered`: by features with an F1 above the
    first of F1_LEVELS.
    """
    scores = evidence.scores
    result: dict[str, Any] = {"features": scores.num_rows, "with_phone": scores.num_rows - scores["phone"].null_count}
    levels = {"auc": LEVELS, "auc_active": LEVELS, "class_auc": LEVELS, "auc_shuffled": LEVELS, "f1": F1_LEVELS}
    for name, above in levels.items():
        values = scores[name].to_numpy()
        result[name] = {f"above_{level}": int((values > level).sum()) for level in above} | {"median": _median(values), "max": _largest(values)}
    significant = scores["p_value"].to_numpy() <= MOST_P
    result["significant"] = int(significant.sum())
    result["polysemanticity_median"] = _median(scores["polysemanticity"].to_numpy()[significant])
    result["phones_covered"] = sorted(set(scores.filter(pc.greater(scores["f1"], F1_LEVELS[0]))["phone"].to_pylist()))
    return result


def _median(values: np.ndarray) -> float | None:
    return None if np.isnan(values).all() else float(np.nanmedian(values))


def _largest(values: np.ndarray) -> float | None:
    return None if np.isnan(values).all() else float(np.nanmax(values))
