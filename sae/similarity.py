"""How alike decoder rows are: within one dictionary, and between dictionaries that were trained from different seeds.

Cosines of all pairs are a matrix of d_sae^2 values, 9.7 GB for 49,152 latents. It is made, looked at and forgotten a few rows at a time.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cache.errors import HearsaeError
from cache.model import fast_matmul
from sae.models import Dictionary

BLOCK_VALUES = 1 << 24
"""Cosines held at once: 64 MiB of them."""
NEAR_DUPLICATE = 0.9
"""Two latents whose decoder rows have a larger cosine than this write nearly the same."""
MATCH = 0.7
"""A latent is found again in another dictionary if one there has a larger cosine; the cut of 2501.16615."""


class DecoderCosine(NamedTuple):
    """For every latent the largest cosine of its decoder row with that of another latent: its distribution. NaN where there is one latent."""

    mean: float
    median: float
    q90: float
    """90 % of the latents have a smaller one."""
    q99: float
    near_duplicate_fraction: float
    """Part of the latents for which it is above 0.9."""


class PairStability(NamedTuple):
    """Two dictionaries against each other; latents that never fired are left out where that is known."""

    a: int
    """Number of the first in what was given."""
    b: int
    latents_a: int
    """Latents of a that were compared."""
    latents_b: int
    matched_a: float
    """Part of a's latents with a cosine above 0.7 to some latent of b."""
    matched_b: float
    mean_max_cosine_a: float
    """Mean over a's latents of the largest cosine with a latent of b."""
    mean_max_cosine_b: float
    one_to_one: float
    """Pairs in which each is the other's nearest and the cosine is above 0.7, over the latents of the smaller of the two."""


def decoder_cosine(dictionary: Dictionary) -> DecoderCosine:
    """How near the latents of one dictionary lie to each other. Takes d_sae^2 * d_out multiplications and 64 MiB."""
    rows = _unit_rows(dictionary)
    if len(rows) < 2:
        return DecoderCosine(*[float("nan")] * 5)
    nearest = torch.empty(len(rows), device=rows.device)
    for first, cosines in _cosines(rows, rows):
        here = torch.arange(len(cosines), device=rows.device)
        cosines[here, first + here] = -1.0
        nearest[first : first + len(cosines)] = cosines.max(dim=1).values
    found = nearest.cpu().numpy().astype(np.float64)
    median, q90, q99 = np.quantile(found, (0.5, 0.9, 0.99)).tolist()
    return DecoderCosine(float(found.mean()), median, q90, q99, float((found > NEAR_DUPLICATE).mean()))


def nearest_latents(dictionary: Dictionary, latents: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The other latents of the dictionary whose decoder rows lie nearest to those of `latents` [n], nearest first.

    Returns their numbers, int64 [n, k], and the cosines, float32 [n, k], k = min(count, d_sae - 1).
    """
    rows = _unit_rows(dictionary)
    k = min(count, len(rows) - 1)
    other, cosine = np.zeros((len(latents), k), np.int64), np.zeros((len(latents), k), np.float32)
    chosen = torch.from_numpy(np.asarray(latents, np.int64)).to(rows.device)
    for first, cosines in _cosines(rows[chosen], rows):
        here = slice(first, first + len(cosines))
        cosines[torch.arange(len(cosines), device=rows.device), chosen[here]] = -2.0
        best = cosines.topk(k, dim=1)
        other[here], cosine[here] = best.indices.cpu().numpy(), best.values.cpu().numpy()
    return other, cosine


def stability(dictionaries: Sequence[Dictionary], firings: Sequence[np.ndarray] | None = None) -> list[PairStability]:
    """Every pair of dictionaries, by the cosines of their decoder rows. They may differ in width and architecture.

    One to one: not the Hungarian algorithm's assignment (2501.16615), which takes d_sae^3, but mutual nearest neighbours. Each such pair is a
    possible pair of an assignment, so the number is a lower bound of how many pairs above the cut one could choose.
    firings: int64 [d_sae] for each, from `evaluate`; latents that never fired count in neither number.
    Raises HearsaeError for fewer than two, for ones that reconstruct different sites, and for one without a latent that fired.
    """
    if len(dictionaries) < 2:
        raise HearsaeError(f"stability compares dictionaries: give at least two, not {len(dictionaries)}")
    reconstructs = [(d.config.targets, d.config.out_width) for d in dictionaries]
    if len(set(reconstructs)) > 1:
        names = " and ".join("+".join(targets) for targets in dict.fromkeys(targets for targets, _ in reconstructs))
        raise HearsaeError(f"stability compares dictionaries of one site: these reconstruct {names}")
    rows = [_unit_rows(dictionary) for dictionary in dictionaries]
    for number, fired in enumerate(firings or ()):
        rows[number] = rows[number][torch.from_numpy(fired > 0).to(rows[number].device)]
        if not len(rows[number]):
            raise HearsaeError(f"no latent of the SAE of seed {dictionaries[number].config.seed} ever fired: it can't be compared")
    return [_pair(a, b, rows[a], rows[b]) for a in range(len(rows)) for b in range(a + 1, len(rows))]


def _pair(number_a: int, number_b: int, a: Tensor, b: Tensor) -> PairStability:
    best_a, nearest_a = torch.empty(len(a), device=a.device), torch.empty(len(a), dtype=torch.int64, device=a.device)
    best_b, nearest_b = torch.full((len(b),), -2.0, device=a.device), torch.zeros(len(b), dtype=torch.int64, device=a.device)
    for first, cosines in _cosines(a, b):
        here = slice(first, first + len(cosines))
        best_a[here], nearest_a[here] = cosines.max(dim=1)
        best, nearest = cosines.max(dim=0)
        better = best > best_b
        best_b[better], nearest_b[better] = best[better], nearest[better] + first
    mutual = nearest_b[nearest_a] == torch.arange(len(a), device=a.device)
    return PairStability(
        a=number_a,
        b=number_b,
        latents_a=len(a),
        latents_b=len(b),
        matched_a=float((best_a > MATCH).double().mean()),
        matched_b=float((best_b > MATCH).double().mean()),
        mean_max_cosine_a=float(best_a.double().mean()),
        mean_max_cosine_b=float(best_b.double().mean()),
        one_to_one=int((mutual & (best_a > MATCH)).sum()) / min(len(a), len(b)),
    )


def _unit_rows(dictionary: Dictionary) -> Tensor:
    """[d_sae, d_out]"""
    return F.normalize(dictionary.W_dec.detach(), dim=1)


def _cosines(a: Tensor, b: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first row, cosines [some rows of a, all rows of b]), block after block."""
    block = max(1, BLOCK_VALUES // len(b))
    with fast_matmul():
        for first in range(0, len(a), block):
            yield first, a[first : first + block] @ b.t()
