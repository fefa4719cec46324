"""Rows whose features are known: what a dictionary learner should find in them is no matter of opinion.

After SynthSAEBench (2602.14687): many sparse features with unit directions in few dimensions, firing by a power law, correlated, some only
where a parent fires. `docs/ground_truth.md` says what is taken from there and what is chosen here. `sae.recovery` scores what was learnt.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from cache.errors import HearsaeError
from cache.header import Header
from cache.location import Location
from cache.plan import SAMPLES_PER_FRAME, SourceItem, make_plan
from cache.sites import Site
from cache.store import ActivationStore
from sae.models import Dictionary, SaeConfig
from sae.selection import Codes, SparseRows
from sae.sparse import decode_rows

SITE = "encoder.blocks.0"
"""The name under which rows are stored."""
BLOCK_ROWS = 1024
"""Rows that are drawn together, from a generator of their own: any range of rows is cut from whole blocks."""
CLIP_ROWS = 1024
"""Rows of each clip of a store: 20.48 s, four to a chunk."""
HELD_OUT = 1 << 40
"""First row of those that no store reaches."""
LARGEST_CHILD = 0.5
"""Part of its parent's firings, at most, in which a child fires: one that nearly always does could not be told from its parent."""
REPULSIONS = 2000
"""Steps in which directions are pushed apart before `max_cosine` is given up."""
GRAM_ROWS = 2048
"""Directions whose cosines to all others are in memory at once."""


@dataclass(frozen=True)
class SyntheticConfig:
    """Which features there are and how they fire. Equal configs give equal rows."""

    d_in: int = 64
    """Dimensions."""
    features: int = 256
    """Number of features, ordered by how often they fire."""
    l0: float = 8.0
    """Mean number of features that fire in a row: the sum of their probabilities."""
    zipf: float = 0.5
    """Exponent of the power law: feature i fires with a probability proportional to (i + 1)^-zipf."""
    max_probability: float = 0.4
    """Highest probability; the power law is cut there."""
    max_cosine: float = 1.0
    """Largest cosine, in absolute value, between two directions; at 1 they are random."""
    magnitude: tuple[float, float] = (5.0, 4.0)
    """Mean of the value of the first and of the last feature when they fire, linear between them."""
    spread: float = 0.5
    """Mean of the standard deviations of these values, which are |N(spread, spread)|, one for each feature."""
    correlation: float = 0.0
    """Part of the variance behind a feature's firing that comes from factors which it shares with the others (features without parent)."""
    factors: int = 8
    """Number of these factors."""
    children: float = 0.0
    """Part of the features that look for a parent; those for which there is none left stay without."""
    branching: int = 4
    """Largest number of children."""
    depth: int = 3
    """Largest number of generations below the first."""
    exclusive: bool = False
    """Of the children of one parent at most one fires in a row."""
    scale_children: bool = False
    """A child's value is multiplied by its parent's, divided by the mean of the latter."""
    noise: float = 0.05
    """Standard deviation of the Gaussian noise in every dimension."""
    offset: float = 2.0
    """Norm of the constant vector that is part of every row."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.d_in < 1 or self.features < 1 or not 0 < self.max_probability <= 1:
            raise HearsaeError(f"{self.features} features in {self.d_in} dimensions of probability up to {self.max_probability:g} can't be made")
        if not 0 < self.l0 <= self.features * self.max_probability:
            raise HearsaeError(f"l0 = {self.l0:g} can't be reached: {self.features} features of {self.max_probability:g} each are too few")
        if not (0 <= self.correlation < 1 and 0 <= self.children <= 1 and self.factors >= 1):
            raise HearsaeError(f"correlation {self.correlation:g}, children {self.children:g} and {self.factors} factors make no model")
        if min(self.magnitude) <= 0 or min(self.spread, self.noise, self.offset, self.zipf, self.seed) < 0:
            raise HearsaeError("magnitudes must be positive; spread, noise, offset, zipf and seed not negative")
        if self.max_cosine < (bound := _welch_bound(self.features, self.d_in)):
            raise HearsaeError(f"of {self.features} directions in {self.d_in} dimensions some have a cosine above {bound:.3f}, whatever they are")

    @property
    def sha256(self) -> str:
        """Of the config: takes the place of the Whisper's in the header of a store."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()


class SyntheticRows(NamedTuple):
    """Rows and what they are made of."""

    x: np.ndarray
    """float32 [rows, d_in]"""
    codes: Codes
    """The values of the features that fire; `latent` numbers features."""


class SyntheticModel:
    """The features that a config stands for. Everything about them is drawn from its seed."""

    def __init__(self, config: SyntheticConfig) -> None:
        """Raises HearsaeError where the directions can't be brought below `max_cosine`."""
        self.config = config
        rng = np.random.default_rng([config.seed, 0])
        n = config.features
        self.probability = _power_law(config)
        """float64 [features]: how often each fires, exactly."""
        self.direction = _directions(config, rng)
        """float32 [features, d_in], unit rows."""
        self.parent, self.generation = _families(config, self.probability, rng)
        """int64 [features]: the parent, -1 without; 0 for those, else one more than the parent's."""
        self.mean = np.linspace(*config.magnitude, n)
        """float64 [features]: of the normal distribution whose absolute value a feature takes when it fires."""
        self.deviation = np.abs(rng.normal(config.spread, config.spread, n))
        """float64 [features]: its standard deviation."""
        offset = rng.standard_normal(config.d_in)
        self.offset = (config.offset * offset / np.linalg.norm(offset)).astype(np.float32)
        """float32 [d_in]"""
        loading = rng.standard_normal((n, config.factors))
        self.loading = np.sqrt(config.correlation) * loading / np.linalg.norm(loading, axis=1, keepdims=True)
        """float64 [features, factors]: of those without parent."""

        # Whether a feature fires is one comparison: of its own Gaussian with a threshold, or, of a child, of a uniform number with an
        # interval. Exclusive siblings share the number and have intervals side by side.
        self._threshold = np.array([NormalDist().inv_cdf(1 - p) if p < 1 else -np.inf for p in self.probability])
        self._interval = np.zeros((2, n))
        self._number = np.arange(n)
        taken = np.zeros(n)
        for child in np.flatnonzero(self.parent >= 0):
            parent = self.parent[child]
            low = taken[parent] if config.exclusive else 0.0
            taken[parent] = high = low + self.probability[child] / self.probability[parent]
            self._interval[:, child] = low, high
            self._number[child] = parent if config.exclusive else child

    def rows(self, start: int, stop: int) -> SyntheticRows:
        """Rows [start, stop) of an endless sequence: the same whatever range they are part of."""
        blocks = list(self._blocks(start, stop))
        if not blocks:
            none = Codes(np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32))
            return SyntheticRows(np.zeros((0, self.config.d_in), np.float32), none)
        first = [0, *np.cumsum([len(block.x) for block in blocks])]
        row = np.concatenate([block.codes.row + before for block, before in zip(blocks, first, strict=False)])
        latent, value = (np.concatenate([getattr(block.codes, name) for block in blocks]) for name in ("latent", "value"))
        return SyntheticRows(np.concatenate([block.x for block in blocks]), Codes(row, latent, value))

    def _blocks(self, start: int, stop: int) -> Iterator[SyntheticRows]:
        for number in range(start // BLOCK_ROWS, -(-stop // BLOCK_ROWS)):
            x, codes = self._block(number)
            first, last = (min(max(0, edge - number * BLOCK_ROWS), BLOCK_ROWS) for edge in (start, stop))
            low, high = np.searchsorted(codes.row, [first, last])
            yield SyntheticRows(x[first:last], Codes(codes.row[low:high] - first, codes.latent[low:high], codes.value[low:high]))

    def _block(self, number: int) -> SyntheticRows:
        rng = np.random.default_rng([self.config.seed, 1, number])
        value = self._values(self._firings(rng), rng)
        row, feature = np.nonzero(value)
        codes = Codes(row.astype(np.int64), feature.astype(np.int32), value[row, feature])
        start = torch.from_numpy(np.searchsorted(row, np.arange(BLOCK_ROWS + 1)).astype(np.int32))
        sparse = SparseRows(start, torch.from_numpy(codes.latent), torch.from_numpy(codes.value))
        x = decode_rows(sparse, torch.from_numpy(self.direction)).numpy() + self.offset
        x += np.float32(self.config.noise) * rng.standard_normal(x.shape, np.float32)
        return SyntheticRows(x, codes)

    def _firings(self, rng: np.random.Generator) -> np.ndarray:
        """bool [BLOCK_ROWS, features]"""
        fires = np.zeros((BLOCK_ROWS, self.config.features), bool)
        first = np.flatnonzero(self.generation == 0)
        own = rng.standard_normal((BLOCK_ROWS, len(first)), np.float32)
        if self.config.correlation:
            shared = rng.standard_normal((BLOCK_ROWS, self.config.factors), np.float32)
            own *= np.float32(np.sqrt(1 - self.config.correlation))
            own += shared @ self.loading[first].T.astype(np.float32)
        fires[:, first] = own > self._threshold[first].astype(np.float32)
        if len(first) < self.config.features:
            number = rng.random(fires.shape, np.float32)
        for generation in range(1, int(self.generation.max()) + 1):
            born = np.flatnonzero(self.generation == generation)
            drawn, (low, high) = number[:, self._number[born]], self._interval[:, born].astype(np.float32)
            fires[:, born] = fires[:, self.parent[born]] & (drawn >= low) & (drawn < high)
        return fires

    def _values(self, fires: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """float32, like `fires`: what fires is positive, the rest 0."""
        value = np.zeros(fires.shape, np.float32)
        row, feature = np.nonzero(fires)
        drawn = np.abs(self.mean[feature] + self.deviation[feature] * rng.standard_normal(len(feature)))
        value[row, feature] = np.maximum(drawn, np.finfo(np.float32).tiny)
        for generation in range(1, int(self.generation.max()) + 1) if self.config.scale_children else ():
            born = np.flatnonzero(self.generation == generation)
            value[:, born] *= value[:, self.parent[born]] / self.mean[self.parent[born]].astype(np.float32)
        return value

    def true_dictionary(self) -> Dictionary:
        """An SAE with the true directions, and the encoder that would be right if they were orthogonal: their transpose.

        Its thresholds lie halfway between 0 and each feature's mean: of such encoders a fair one, not the best.
        """
        sae = Dictionary(SaeConfig("jumprelu", self.config.d_in, self.config.features, site=SITE, model_sha256=self.config.sha256))
        with torch.no_grad():
            sae.W_dec.copy_(torch.from_numpy(self.direction))
            sae.W_enc.copy_(sae.W_dec.t())
            sae.b_dec.copy_(torch.from_numpy(self.offset))
            sae.threshold.copy_(torch.from_numpy(self.mean / 2))
        return sae.requires_grad_(False)


def write_store(path: str | Location, config: SyntheticConfig, rows: int) -> ActivationStore:
    """A store of rows [0, rows) of the model at `SITE`, float32, for `sae.train.train` to read like any other.

    Continues one that was left unfinished. Raises StoreError where `path` holds something else.
    """
    if rows < 1:
        raise HearsaeError(f"a store of {rows} rows has no sense")
    model = SyntheticModel(config)
    clips = [min(CLIP_ROWS, rows - first) for first in range(0, rows, CLIP_ROWS)]
    plan = make_plan([SourceItem(f"rows-{i}", 0, n * SAMPLES_PER_FRAME) for i, n in enumerate(clips)], shuffle=False)
    header = Header(
        model={"name": "synthetic", "sha256": config.sha256, "dims": {}, "has_decoder": False},
        dataset={"synthetic": asdict(config)},
        axes=plan.axes,
        plan=plan.summary(),
        dtype="float32",
    )
    store = ActivationStore.create(path, header, plan, [Site(SITE, "frame", config.d_in, 0)])
    for shard in store.pending([SITE]):
        spans = [store.planned_span("frame", clip) for clip in store.shard_clips(shard)]
        first = spans[0].clip * CLIP_ROWS
        there = sum(span.stop - span.start for span in spans)
        x = np.zeros((store.axis(SITE).shard_rows, config.d_in), np.float32)
        x[:there] = model.rows(first, first + there).x
        store.write_shard(SITE, shard, x, [], {})
    return ActivationStore.open(path)


def _power_law(config: SyntheticConfig) -> np.ndarray:
    """float64 [features]: min(c (i + 1)^-zipf, max_probability), with the c for which they add up to `l0`."""
    law = np.arange(1, config.features + 1) ** -config.zipf
    for cut in range(config.features + 1):  # the first `cut` features are held at the highest probability
        rest = config.l0 - cut * config.max_probability
        if cut == config.features or rest * law[cut] <= config.max_probability * law[cut:].sum() * (1 + 1e-12):
            return np.concatenate([np.full(cut, config.max_probability), law[cut:] * (rest / law[cut:].sum() if cut < config.features else 0.0)])
    raise AssertionError("unreachable: the last cut is always taken")


def _welch_bound(n: int, d: int) -> float:
    """The largest cosine of n directions in d dimensions is at least this (Welch 1974)."""
    return float(np.sqrt((n - d) / (d * (n - 1)))) if n > d else 0.0


def _directions(config: SyntheticConfig, rng: np.random.Generator) -> np.ndarray:
    """Random ones; where two are closer than `max_cosine`, all such pairs are pushed apart until none is."""
    drawn = F.normalize(torch.from_numpy(rng.standard_normal((config.features, config.d_in))), dim=1).float()
    if config.max_cosine >= 1:
        return drawn.numpy()
    aim = 0.98 * config.max_cosine  # so that the last steps, which become ever smaller, need not be made
    for _ in range(REPULSIONS):
        moved, largest = drawn.clone(), 0.0
        for first in range(0, len(drawn), GRAM_ROWS):
            cosine = drawn[first : first + GRAM_ROWS] @ drawn.T
            cosine[torch.arange(len(cosine)), torch.arange(first, first + len(cosine))] = 0.0
            largest = max(largest, float(cosine.abs().max()))
            moved[first : first + GRAM_ROWS] -= 0.5 * (cosine - cosine.clamp(-aim, aim)) @ drawn
        if largest <= config.max_cosine:
            return drawn.numpy()
        drawn = F.normalize(moved, dim=1)
    raise HearsaeError(
        f"no {config.features} directions in {config.d_in} dimensions were found with cosines below {config.max_cosine:g}: "
        f"the closest pair still has {largest:.3f}"
    )


def _families(config: SyntheticConfig, probability: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(parent, generation), int64 [features].

    In order of how often they fire, features that look for a parent take one of the earlier ones that can have them without firing less
    often than they should: of those that have children already, if there are any such, so that families fill up.
    """
    n = config.features
    parent, generation = np.full(n, -1), np.zeros(n, np.int64)
    number, taken = np.zeros(n, np.int64), np.zeros(n)
    for child in np.flatnonzero(rng.random(n) < config.children):
        earlier = slice(0, child)
        room = probability[earlier] - (taken[earlier] if config.exclusive else 0.0)
        fits = np.minimum(room, LARGEST_CHILD * probability[earlier]) >= probability[child]
        fits &= (number[earlier] < config.branching) & (generation[earlier] < config.depth)
        able = np.flatnonzero(fits & (number[earlier] > 0))
        able = able if len(able) else np.flatnonzero(fits)
        if len(able):
            chosen = int(rng.choice(able))
            parent[child], generation[child] = chosen, generation[chosen] + 1
            number[chosen] += 1
            taken[chosen] += probability[child]
    return parent, generation
