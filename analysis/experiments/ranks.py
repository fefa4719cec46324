"""Rank correlation."""

import numpy as np


def ranks(values: np.ndarray) -> np.ndarray:
    """float64 [n]: ranks from 1; tied values share their mean rank."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[which.ravel()]


def spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    """Spearman's rank correlation of two rows of numbers. None where one of them does not vary, or there are fewer than 3."""
    return correlation(ranks(np.asarray(a)), ranks(np.asarray(b)))


def correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Pearson's, of [n] and [n]; None as in `spearman`."""
    a, b = a - a.mean() if len(a) else a, b - b.mean() if len(b) else b
    size = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b / size) if len(a) > 2 and size > 0 else None


def partial_correlation(a_b: float, a_c: float, b_c: float) -> float | None:
    """The correlation of a and b that is left when both are freed of what goes with c, from the three correlations."""
    rest = (1 - a_c**2) * (1 - b_c**2)
    return (a_b - a_c * b_c) / rest**0.5 if rest > 0 else None
