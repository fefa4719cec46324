"""What an SAE has to be better than: k numbers a row in a basis that nobody had to learn sparse, on the same held-out rows.

Every baseline is an orthogonal basis and a rule which k coefficients of a centred row are kept, so

    ||x - x_hat||^2 = ||x - mean||^2 - sum of the squares of those kept

and one pass over the rows gives the FVU for all k. The mean, and the basis of PCA, come from the training rows.

- `pca`: the k first principal components, the same for every row. On the training rows no linear map to k numbers and back does better.
- `pca-largest`: the k largest coefficients of each row among all components.
- `neurons`: the k largest of the row's centred coordinates: the basis that the model itself has there.
- `random`: the k largest coefficients in a random orthogonal basis.

The last three say, like an SAE, which k they are for every row; `pca` need not.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cache.errors import HearsaeError
from cache.model import fast_matmul
from cache.store import ActivationStore
from sae.chunks import read_valid, valid_chunks
from sae.metrics import EQUAL

BASELINES = ("pca", "pca-largest", "neurons", "random")


class Baseline(NamedTuple):
    """One baseline at one k, over all held-out rows of a site."""

    site: str
    name: str
    """One of `BASELINES`."""
    k: int
    """Numbers kept of each row: what L0 is of an SAE."""
    rows: int
    fvu: float
    """As `Evaluation.fvu`: the denominator is about the mean of the held-out rows, the reconstruction about that of the training rows."""


class Moments(NamedTuple):
    """Mean and covariance of a site's rows."""

    rows: int
    mean: np.ndarray
    """float64 [d]"""
    covariance: np.ndarray
    """float64 [d, d]; divided by the number of rows."""

    def principal_axes(self) -> np.ndarray:
        """float64 [d, d]: orthonormal columns, by falling variance."""
        return np.linalg.eigh(self.covariance).eigenvectors[:, ::-1].copy()


def moments(store: ActivationStore, site: str, on_rows: Callable[[int], object] = lambda rows: None) -> Moments:
    """Mean, from the commit records, and covariance of all committed rows, in one pass, in float64. Raises HearsaeError where there are no rows."""
    mean = torch.from_numpy(store.stats(site).mean)
    square, rows = torch.zeros(len(mean), len(mean), dtype=torch.float64), 0
    for x in _rows(store, site):
        centred = x.double() - mean
        square.addmm_(centred.t(), centred)
        rows += len(x)
        on_rows(len(x))
    return Moments(rows, mean.numpy(), (square / rows).numpy())


def random_basis(d: int, seed: int) -> np.ndarray:
    """float64 [d, d]: orthonormal columns, uniformly distributed over all orthogonal bases (Mezzadri, math-ph/0609050: QR of a Gaussian matrix,
    signs fixed by R's diagonal)."""
    q, r = np.linalg.qr(np.random.default_rng(seed).standard_normal((d, d)))
    return q * np.sign(np.diag(r))


def baselines(
    store: ActivationStore,
    train_store: ActivationStore,
    site: str,
    ks: Sequence[int],
    *,
    seed: int = 0,
    on_rows: Callable[[int], object] = lambda rows: None,
) -> list[Baseline]:
    """Every baseline at every k, on all committed rows of `store`.

    Reads the site once in each store; takes d^2 multiplications for every training row and 2 d^2 for every other.
    seed: of the random basis. on_rows: told the number of rows of each chunk that is done, of either store.
    Raises HearsaeError for a k that is not between 1 and the site's width, stores of different models or widths, and stores without rows.
    """
    width = _check(store, train_store, site, ks)
    train = moments(train_store, site, on_rows)
    mean, own_mean = torch.from_numpy(train.mean).float(), torch.from_numpy(store.stats(site).mean).float()
    axes, random = (torch.from_numpy(basis).float() for basis in (train.principal_axes(), random_basis(width, seed)))
    rows, energy = 0, torch.zeros(2, dtype=torch.float64)
    """Of the rows about the training mean, and about their own."""
    kept = {name: torch.zeros(width, dtype=torch.float64) for name in BASELINES}
    """Sums over rows of the first, the second, ... squared coefficient that is kept."""
    most = max(ks)
    with fast_matmul():
        for x in _rows(store, site):
            centred, about = x - mean, x - own_mean
            in_axes = (centred @ axes).square()
            kept["pca"] += in_axes.sum(0, dtype=torch.float64)
            for name, square in (("pca-largest", in_axes), ("neurons", centred.square()), ("random", (centred @ random).square())):
                kept[name][:most] += square.topk(most, dim=1).values.sum(0, dtype=torch.float64)
            energy += torch.stack([torch.linalg.vecdot(part, part).sum(dtype=torch.float64) for part in (centred, about)])
            rows += len(x)
            on_rows(len(x))
    spread = float(energy[1]) if energy[1] > EQUAL * rows * float(own_mean @ own_mean) else 0.0
    left = {name: (energy[0] - sums.cumsum(0)).clamp(min=0.0) for name, sums in kept.items()}
    return [Baseline(site, name, k, rows, float(left[name][k - 1]) / spread if spread else float("nan")) for name in BASELINES for k in ks]


def _check(store: ActivationStore, train_store: ActivationStore, site: str, ks: Sequence[int]) -> int:
    for one in (store, train_store):
        one.axis(site)  # raises for a site that it does not have
    width, train_width = store.sites[site]["width"], train_store.sites[site]["width"]
    model, train_model = store.header.model["sha256"], train_store.header.model["sha256"]
    if model != train_model or width != train_width:
        raise HearsaeError(f"{train_store.path} holds activations of another model ({train_model[:12]}) than {store.path} ({model[:12]})")
    if not ks or not all(1 <= k <= width for k in ks):
        raise HearsaeError(f"baselines of {site}, which has width {width}, keep 1 to {width} numbers of a row, not {list(ks)}")
    return int(width)


def _rows(store: ActivationStore, site: str) -> Iterator[Tensor]:
    """All committed rows of a site, float32 [rows, d], chunk by chunk."""
    for shard in store.committed(site):
        spans = store.spans(shard, site)
        for chunk in valid_chunks(store, [site], shard):
            yield torch.from_numpy(read_valid(store, site, chunk, spans)).float()
