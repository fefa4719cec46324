"""Other features that a feature's page leads to: those that write alike, and those that are active in the same rows."""

from typing import Any

import numpy as np

from analysis.explorer.datafiles import numbers
from analysis.features import Features, SaeLatents
from analysis.scan_folder import Scan
from sae.similarity import nearest_latents

SHOWN = 8
"""Of each kind."""


class Related:
    """What `related` finds, by feature."""

    def __init__(self, nearest: dict[int, list[list[Any]]] | None, together: dict[int, list[list[Any]]]) -> None:
        """nearest: [feature, cosine] each; None where features have no decoder. together: [feature, rows in which both are active, jaccard, lift]."""
        self.nearest = nearest
        self.together = together

    def of(self, feature: int) -> dict[str, Any]:
        """`nearest`, where features have a decoder, and `together`, strongest first."""
        together = {"together": self.together.get(feature, [])}
        return together if self.nearest is None else {"nearest": self.nearest[feature]} | together


def related(scan: Scan, features: Features, wanted: np.ndarray) -> Related:
    """wanted: int64 [n], sorted. Raises HearsaeError where the scan's coactivation can't be read."""
    nearest = None
    if isinstance(features, SaeLatents):
        other, cosine = nearest_latents(features.dictionary, wanted, SHOWN)
        nearest = {
            feature: [list(pair) for pair in zip(others, numbers(cosines, 3), strict=True)]
            for feature, others, cosines in zip(wanted.tolist(), other.tolist(), cosine.tolist(), strict=True)
        }
    table = scan.coactivation
    shown = table.filter((table["rank"].to_numpy() < SHOWN) & np.isin(table["feature"].to_numpy(), wanted))
    columns = [shown[name].to_pylist() for name in ("feature", "other", "both")]
    columns += [numbers(shown[name].to_pylist(), 3) for name in ("jaccard", "lift")]
    together: dict[int, list[list[Any]]] = {}
    for feature, *partner in zip(*columns, strict=True):
        together.setdefault(feature, []).append(partner)
    return Related(nearest, together)
