"""How far a rate may be from that of other speech of the same kind: bootstrap intervals over clips."""

import numpy as np

RESAMPLES = 2000
INTERVAL = (2.5, 97.5)
"""Percentiles: 95 %."""


def ratio_interval(parts: np.ndarray, wholes: np.ndarray, seed: int = 0) -> tuple[float, float] | None:
    """95 % percentile bootstrap interval of sum(parts) / sum(wholes) over units (clips, words, ...) that are drawn whole (Efron 1979).

    parts, wholes: numbers [units]. Draws without anything in `wholes` are left out. None where there is no unit with any.
    """
    n = len(wholes)
    if n == 0 or not np.sum(wholes):
        return None
    drawn = np.random.Generator(np.random.PCG64(seed)).multinomial(n, np.full(n, 1 / n), RESAMPLES)
    below = drawn @ wholes
    low, high = np.percentile((drawn @ parts)[below > 0] / below[below > 0], INTERVAL)
    return float(low), float(high)
