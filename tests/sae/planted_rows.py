"""Stores whose rows are sums of few known features, for the tests here."""

from pathlib import Path

import numpy as np
from conftest import fill_store, plan_of

from cache.store import ActivationStore

SITE, OTHER = "encoder.blocks.0", "encoder.blocks.1"
D_IN, FEATURES, PER_ROW = 24, 40, 3
OFFSET = 5.0


def planted_features() -> np.ndarray:
    """float64 [FEATURES, D_IN], unit rows."""
    directions = np.random.default_rng(11).standard_normal((FEATURES, D_IN))
    return directions / np.linalg.norm(directions, axis=1, keepdims=True)


def planted_rows(site: str, clip: int, n: int) -> np.ndarray:
    """PER_ROW features of strength 1 to 2 in each row, a constant offset, a little noise."""
    rng = np.random.default_rng([clip, len(site), ord(site[-1])])
    strength = np.zeros((n, FEATURES))
    which = rng.random((n, FEATURES)).argsort(axis=1)[:, :PER_ROW]
    np.put_along_axis(strength, which, rng.uniform(1, 2, (n, PER_ROW)), axis=1)
    return strength @ planted_features() + OFFSET + 0.02 * rng.standard_normal((n, D_IN))


def planted_store(path: Path, seconds: float = 300.0, rows_of=planted_rows) -> ActivationStore:
    plan = plan_of([20.0] * round(seconds / 20), chunk_rows=512, shard_rows=2048)
    return fill_store(path, plan, {SITE: D_IN, OTHER: D_IN}, rows_of)
