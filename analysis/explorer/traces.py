"""Activation traces around examples: what a feature does in the frames before and after its peak."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from analysis.features import Features
from cache.errors import HearsaeError
from cache.store import ActivationStore
from sae.models import Codes

LEVELS = 255
TOLERATED_DIFFERENCE = 0.02
"""Of a feature's scanned value: rows are the same, but a matrix product's rounding depends on its shape."""
TOLERATED_SHARE = 0.01
"""Of the examples: a latent that lies just at its threshold may be zero in one evaluation and not in another."""


class Traces(NamedTuple):
    """The surroundings of n examples, `context` positions to either side, `width = 2 * context + 1`."""

    levels: np.ndarray
    """uint8 [n, width]; the value is `lo + (hi - lo) * level / 255`."""
    lo: np.ndarray
    """float32 [n], the least value of the example's trace."""
    hi: np.ndarray
    """float32 [n], the greatest."""
    first: np.ndarray
    """uint16 [n]; positions of `levels` before this one lie before the clip."""
    stop: np.ndarray
    """uint16 [n]; positions from this one on lie behind the clip's end."""


def cut_traces(
    store: ActivationStore,
    features: Features,
    feature: np.ndarray,
    clip: np.ndarray,
    position: np.ndarray,
    value: np.ndarray,
    context: int,
    progress: Callable[[int, int], None] | None = None,
    visit: Callable[[int, np.ndarray | Codes, int], None] | None = None,
) -> Traces:
    """Evaluates the features around n examples, reading each clip's rows once.

    feature, clip, position, value: [n] each; position is the frame or token within the clip, value what the scan found there.
    progress: called with (clips done, clips in all).
    visit: called with each clip, its values (float32 [rows, features], or those that are not zero) and its number of rows: whoever needs whole
    clips need not read them again.

    Raises HearsaeError where the store's rows do not give the scanned values, StoreError where they can't be read.
    """
    n, width = len(feature), 2 * context + 1
    traces = Traces(
        levels=np.zeros((n, width), np.uint8),
        lo=np.zeros(n, np.float32),
        hi=np.zeros(n, np.float32),
        first=np.zeros(n, np.uint16),
        stop=np.zeros(n, np.uint16),
    )
    different = 0
    n_clips = len(np.unique(clip))
    for done, (number, members) in enumerate(_by_clip(clip)):
        rows = store.read_clip(features.site, number)
        if position[members].max() >= len(rows):
            raise HearsaeError(
                f"{store.path} is not the store of this scan: clip {number} has {len(rows)} rows there, fewer than an example's position"
            )
        wanted = position[members, None] + np.arange(-context, context + 1)
        inside = (wanted >= 0) & (wanted < len(rows))
        codes = features.sparse(rows)
        of_clip = features.dense(rows) if codes is None else codes
        values = _values_at(of_clip, features.count, wanted.clip(0, len(rows) - 1), feature[members])
        lo = np.where(inside, values, np.inf).min(axis=1)
        hi = np.where(inside, values, -np.inf).max(axis=1)
        spread = np.where(hi > lo, hi - lo, 1)
        traces.levels[members] = np.where(inside, np.rint((values - lo[:, None]) / spread[:, None] * LEVELS), 0).astype(np.uint8)
        traces.lo[members], traces.hi[members] = lo, hi
        traces.first[members], traces.stop[members] = inside.argmax(axis=1), width - inside[:, ::-1].argmax(axis=1)
        scanned = value[members]
        different += int((np.abs(values[:, context] - scanned) > TOLERATED_DIFFERENCE * np.abs(scanned) + 1e-3).sum())
        if visit:
            visit(number, of_clip, len(rows))
        if progress:
            progress(done + 1, n_clips)
    if different > TOLERATED_SHARE * n:
        raise HearsaeError(f"{store.path} does not give the values of this scan ({different} of {n} examples differ): scan it again")
    return traces


def _by_clip(clip: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Each clip with the indices of its examples, in the order of the store's addresses."""
    order = np.argsort(clip, kind="stable")
    numbers, starts = np.unique(clip[order], return_index=True)
    for number, members in zip(numbers, np.split(order, starts[1:]), strict=True):
        yield int(number), members


def _values_at(of_clip: np.ndarray | Codes, count: int, wanted: np.ndarray, feature: np.ndarray) -> np.ndarray:
    """Values of `feature[i]` of `count` at the rows `wanted[i]`: float32 [n, width]."""
    if isinstance(of_clip, np.ndarray):
        return of_clip[wanted, feature[:, None]]
    keys = of_clip.row * count + of_clip.latent
    wanted_keys = wanted * count + feature[:, None]
    at = np.searchsorted(keys, wanted_keys).clip(0, max(0, len(keys) - 1))
    return np.where(keys[at] == wanted_keys, of_clip.value[at], np.float32(0)) if len(keys) else np.zeros(wanted.shape, np.float32)
