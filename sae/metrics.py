"""How good a dictionary is, over a whole held-out store."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from cache.errors import HearsaeError
from cache.model import fast_matmul
from cache.store import ActivationStore
from sae.chunks import read_valid, valid_chunks
from sae.models import Dictionary

DENSE = 0.1
"""A latent that fires on more than this part of the rows counts as dense."""
DENSITY_EDGES = np.arange(-8, 0.25, 0.25)
"""log10 of the edges of the density histogram; the last bin includes density 1."""


class Evaluation(NamedTuple):
    """A dictionary against all rows of its site in a store."""

    site: str
    rows: int
    l0: float
    """Mean number of latents that fire in a row."""
    fvu: float
    """Sum of ||x - x_hat||^2 over sum of ||x - mean||^2, both over all rows, with the mean of these rows."""
    dead_fraction: float
    """Part of the latents that never fired."""
    dense_fraction: float
    """Part of the latents that fired in more than a tenth of the rows."""
    density_edges: np.ndarray
    """float64 [bins + 1], log10."""
    density_count: np.ndarray
    """int64 [bins]: latents by log10 of the part of the rows in which they fired, those that never did in none."""
    firings: np.ndarray
    """int64 [d_sae]: rows in which each latent fired."""

    def to_json(self) -> dict[str, object]:
        """Without `firings`, ready for JSON."""
        data = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in self._asdict().items()}
        del data["firings"]
        return data


def evaluate(
    dictionary: Dictionary,
    store: ActivationStore,
    *,
    site: str | None = None,
    any_model: bool = False,
    on_rows: Callable[[int], object] = lambda rows: None,
) -> Evaluation:
    """Encodes and reconstructs every committed row of the dictionary's site. Sums are float64; memory does not grow with the store.

    site: must be the dictionary's own, where it names one. any_model: accept activations of another Whisper than it was trained on.
    on_rows: told the number of rows of each chunk that is done.
    Raises HearsaeError for another site, width or model, for a store without rows, and for rows that are not finite.
    """
    site = check_fits(dictionary, store, site, any_model)
    shards = store.committed(site)
    stats = store.stats(site, shards)
    firings = np.zeros(dictionary.config.d_sae, dtype=np.int64)
    squared_error, rows_seen = 0.0, 0
    device = dictionary.W_dec.device
    with fast_matmul():
        for shard in shards:
            spans = store.spans(shard, site)
            for chunk in valid_chunks(store, [site], shard):
                x = torch.from_numpy(read_valid(store, site, chunk, spans)).to(device).float()
                x_hat, codes = dictionary.reconstruct(x)
                squared_error += float((x - x_hat).square().sum(dtype=torch.float64))
                firings += torch.bincount(codes.latent, minlength=len(firings)).cpu().numpy()
                rows_seen += len(x)
                on_rows(len(x))
    density = firings / rows_seen
    count, _ = np.histogram(np.log10(density[firings > 0]).clip(DENSITY_EDGES[0], 0), DENSITY_EDGES)
    spread = stats.mean_sq_dist * rows_seen
    return Evaluation(
        site=site,
        rows=rows_seen,
        l0=float(firings.sum() / rows_seen),
        fvu=squared_error / spread if spread else float("nan"),
        dead_fraction=float((firings == 0).mean()),
        dense_fraction=float((density > DENSE).mean()),
        density_edges=DENSITY_EDGES,
        density_count=count,
        firings=firings,
    )


def check_fits(dictionary: Dictionary, store: ActivationStore, site: str | None = None, any_model: bool = False) -> str:
    """The site of `store` whose rows the dictionary takes. Raises HearsaeError if they are not what it was trained on."""
    config = dictionary.config
    if site and config.site and site != config.site:
        raise HearsaeError(f"this SAE was trained on {config.site}, not on {site}")
    site = site or config.site
    store.axis(site)  # raises for a site that it does not have
    width = store.sites[site]["width"]
    if width != config.d_in:
        raise HearsaeError(f"this SAE takes rows of width {config.d_in}; {site} in {store.path} has width {width}")
    theirs = store.header.model["sha256"]
    if config.model_sha256 and theirs != config.model_sha256 and not any_model:
        name = f"{store.header.model.get('name')}, {theirs[:12]}"
        raise HearsaeError(f"{store.path} holds activations of another model ({name}) than this SAE was trained on ({config.model_sha256[:12]})")
    return site
