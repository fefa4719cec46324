"""How much of a synthetic model a dictionary has found."""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numba import njit

from cache.errors import HearsaeError
from cache.model import fast_matmul
from sae.models import Dictionary
from sae.synthetic import HELD_OUT, SyntheticModel

FOUND = 0.9
"""Cosine above which a feature counts as recovered."""
EVALUATION_ROWS = 50_000
SLICE_ROWS = 8192
"""Rows scored at once."""


class Recovery(NamedTuple):
    """A dictionary against the model that made its rows. Firing and reconstruction are those of rows that no store has."""

    mcc: float
    """Mean cosine of matched pairs of true direction and decoder row: one to one, with the largest sum there is. With a sign: values are
    never negative, so a latent with the opposite direction has not found the feature."""
    recovered: float
    """Part of the features whose matched cosine is above 0.9."""
    uniqueness: float
    """Number of different features that are the nearest one to some latent that fires, over the number of these latents."""
    precision: float
    """Mean over matched features: of the rows in which the latent fires, the part in which the feature does (0 if it never fires)."""
    recall: float
    """Mean over matched features: of the rows in which the feature fires, the part in which the latent does."""
    f1: float
    """Mean over matched features of the harmonic mean of the two."""
    l0: float
    """Mean number of latents that fire in a row."""
    true_l0: float
    """Mean number of features that do."""
    fvu: float
    """Sum of ||x - x_hat||^2 over sum of ||x - mean||^2."""
    best_fvu: float
    """That of the true directions with the true values: the noise."""
    dead_fraction: float
    """Part of the latents that never fired."""
    absorption: float
    """How much more often a parent's latent misses it when one of its children fires too than when none does; nan without children."""
    cosine: np.ndarray
    """float64 [features]: of the matched pairs, nan for features without a latent."""
    latent: np.ndarray
    """int64 [features]: the matched latent, -1 without."""
    feature_f1: np.ndarray
    """float64 [features]: nan without a latent, or if the feature never fired."""

    def to_json(self) -> dict[str, object]:
        """Without the arrays, ready for JSON."""
        return {name: None if value != value else value for name, value in self._asdict().items() if not isinstance(value, np.ndarray)}


def recovery(dictionary: Dictionary, model: SyntheticModel, rows: int = EVALUATION_ROWS, start: int = HELD_OUT) -> Recovery:
    """Matches the decoder's rows to the true directions and scores rows [start, start + rows) of the model.

    Raises HearsaeError for another width, another model than the dictionary was trained on, or a transcoder or crosscoder.
    """
    sae = dictionary.config
    if sae.d_in != model.config.d_in or sae.kind != "sae":
        raise HearsaeError(f"a {sae.kind} of width {sae.d_in} can't be held against a synthetic model of {model.config.d_in} dimensions")
    if sae.model_sha256 and sae.model_sha256 != model.config.sha256:
        raise HearsaeError("this SAE was trained on the rows of another synthetic model")
    if rows < 1:
        raise HearsaeError(f"{rows} rows are too few to score")
    n = model.config.features
    cosine = (torch.from_numpy(model.direction) @ F.normalize(dictionary.W_dec.detach().cpu(), dim=1).T).double().numpy()
    feature_of, latent_of = _match(cosine)
    counts = _count(dictionary, model, feature_of, rows, start)

    matched = latent_of >= 0
    scored = matched & (counts.true > 0)
    latent = counts.fired[latent_of]
    precision = counts.hits / np.maximum(1, latent)
    recall = counts.hits / np.maximum(1, counts.true)
    f1 = np.where(scored, 2 * counts.hits / np.maximum(1, counts.true + latent), np.nan)
    matched_cosine = np.where(matched, cosine[np.arange(n), latent_of], np.nan)
    alive = np.flatnonzero(counts.fired)
    nearest = cosine[:, alive].argmax(axis=0) if len(alive) else alive
    (missed, parents), (missed_alone, alone) = counts.with_child, counts.without_child
    return Recovery(
        mcc=float(matched_cosine[matched].mean()),
        recovered=float((matched_cosine > FOUND).mean()),
        uniqueness=len(np.unique(nearest)) / max(1, len(alive)),
        precision=float(precision[scored].mean()),
        recall=float(recall[scored].mean()),
        f1=float(f1[scored].mean()),
        l0=float(counts.fired.sum() / rows),
        true_l0=float(counts.true.sum() / rows),
        fvu=counts.error / counts.energy,
        best_fvu=counts.noise / counts.energy,
        dead_fraction=float((counts.fired == 0).mean()),
        absorption=missed / parents - missed_alone / alone if parents and alone else float("nan"),
        cosine=matched_cosine,
        latent=latent_of,
        feature_f1=f1,
    )


class _Counts(NamedTuple):
    """Sums over the scored rows."""

    true: np.ndarray
    """int64 [features]: rows in which each fires."""
    fired: np.ndarray
    """int64 [d_sae]: the same of latents."""
    hits: np.ndarray
    """int64 [features]: rows in which feature and matched latent fire."""
    error: float
    noise: float
    energy: float
    """Squared distances of rows: from the reconstruction, from what the features make, from the mean."""
    with_child: tuple[int, int]
    """(firings of matched parents that their latent misses, all of them) in rows in which a child fires."""
    without_child: tuple[int, int]


def _count(dictionary: Dictionary, model: SyntheticModel, feature_of: np.ndarray, rows: int, start: int) -> _Counts:
    n = model.config.features
    true, fired, hits = np.zeros(n, np.int64), np.zeros(len(feature_of), np.int64), np.zeros(n, np.int64)
    error, noise, square, total = 0.0, 0.0, 0.0, np.zeros(model.config.d_in)
    missed, parents = np.zeros(2, np.int64), np.zeros(2, np.int64)
    has_latent = np.isin(np.arange(n), feature_of)
    is_parent = np.isin(np.arange(n), model.parent) & has_latent
    for first in range(start, start + rows, SLICE_ROWS):
        x, codes = model.rows(first, min(first + SLICE_ROWS, start + rows))
        with torch.no_grad(), fast_matmul():
            x_hat, found = dictionary.reconstruct(torch.from_numpy(x).to(dictionary.W_dec.device))
        error += float(np.square(x - x_hat.cpu().numpy(), dtype=np.float64).sum())
        made = np.zeros((len(x), n), np.float32)
        made[codes.row, codes.latent] = codes.value
        noise += float(np.square(x - made @ model.direction - model.offset, dtype=np.float64).sum())
        total += x.sum(axis=0, dtype=np.float64)
        square += float(np.square(x, dtype=np.float64).sum())

        latent, row = found.latent.cpu().numpy(), found.rows().cpu().numpy()
        detected = np.zeros((len(x), n), bool)
        with_feature = feature_of[latent] >= 0
        detected[row[with_feature], feature_of[latent[with_feature]]] = True
        fired += np.bincount(latent, minlength=len(fired))
        true += np.bincount(codes.latent, minlength=n)
        hit = detected[codes.row, codes.latent]
        hits += np.bincount(codes.latent[hit], minlength=n)

        with_child = np.zeros((len(x), n), bool)
        child = model.parent[codes.latent] >= 0
        with_child[codes.row[child], model.parent[codes.latent[child]]] = True
        beside = with_child[codes.row, codes.latent].astype(np.int64)
        of_parent = is_parent[codes.latent]
        parents += np.bincount(beside[of_parent], minlength=2)
        missed += np.bincount(beside[of_parent & ~hit], minlength=2)
    energy = square - float(total @ total) / rows
    return _Counts(true, fired, hits, error, noise, energy, (int(missed[1]), int(parents[1])), (int(missed[0]), int(parents[0])))


def _match(cosine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One to one, as many pairs as there can be: (feature of each latent, latent of each feature), int64, -1 without. cosine: [features, d_sae]."""
    features, d_sae = cosine.shape
    feature_of, latent_of = np.full(d_sae, -1), np.full(features, -1)
    if features <= d_sae:
        latent_of[:] = best_assignment(cosine)
        feature_of[latent_of] = np.arange(features)
    else:
        feature_of[:] = best_assignment(cosine.T)
        latent_of[feature_of] = np.arange(d_sae)
    return feature_of, latent_of


def best_assignment(gain: np.ndarray) -> np.ndarray:
    """int64 [rows]: the column of each row, all different, for which the sum of gains is largest. gain: [rows, columns], rows <= columns.

    The Hungarian method, by shortest augmenting paths (Jonker and Volgenant 1987): rows^2 * columns steps at most.
    """
    if gain.shape[0] > gain.shape[1] or not np.isfinite(gain).all():
        raise HearsaeError(f"no assignment for gains {list(gain.shape)}: there must be at least as many columns as rows, and finite numbers")
    return _assign(np.ascontiguousarray(-gain, np.float64))


@njit(cache=True)
def _assign(cost: np.ndarray) -> np.ndarray:
    rows, columns = cost.shape
    row_price, column_price = np.zeros(rows), np.zeros(columns)
    row_of = np.full(columns, -1)
    for new_row in range(rows):
        # Dijkstra from the new row over reduced costs, until a column without a row is reached.
        distance, previous, closed = np.full(columns, np.inf), np.full(columns, -1), np.zeros(columns, np.bool_)
        row, column, reached = new_row, -1, 0.0
        while True:
            nearest, at = np.inf, -1
            for j in range(columns):
                if not closed[j]:
                    through = reached + cost[row, j] - row_price[row] - column_price[j]
                    if through < distance[j]:
                        distance[j], previous[j] = through, column
                    if distance[j] < nearest:
                        nearest, at = distance[j], j
            column, reached = at, nearest
            closed[column] = True
            if row_of[column] < 0:
                break
            row = row_of[column]
        for j in range(columns):
            if closed[j]:
                if row_of[j] >= 0:
                    row_price[row_of[j]] += reached - distance[j]
                column_price[j] -= reached - distance[j]
        row_price[new_row] += reached
        while column >= 0:
            before = previous[column]
            row_of[column] = row_of[before] if before >= 0 else new_row
            column = before
    column_of = np.full(rows, -1)
    for j in range(columns):
        if row_of[j] >= 0:
            column_of[row_of[j]] = j
    return column_of
