"""How good a dictionary is, over a whole held-out store. `docs/evaluation.md` has the formulas and where they come from."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cache.errors import HearsaeError
from cache.header import name_of_context
from cache.model import fast_matmul
from cache.store import ActivationStore
from sae.chunks import read_valid, valid_chunks
from sae.models import Dictionary, SaeConfig
from sae.similarity import DecoderCosine, decoder_cosine

DENSE = 0.1
"""A latent that fires on more than this part of the rows counts as dense."""
DENSITY_EDGES = np.arange(-8, 0.25, 0.25)
"""log10 of the edges of the density histogram; the last bin includes density 1."""
L0_QUANTILES = (0.01, 0.25, 0.5, 0.75, 0.99)
EQUAL = 1e-12
"""Rows whose spread is less than this part of their mean's squared norm are equal but for rounding: there is nothing to explain."""
TINY = float(np.finfo(np.float64).tiny)


class Evaluation(NamedTuple):
    """A dictionary against all rows of its sites in a store. Below, x is a row of what it reconstructs, and mean the mean of these rows."""

    site: str
    """What it reads; of a crosscoder all sites, joined by `+`."""
    target: str
    """What it reconstructs, spelled in the same way; of an SAE the site."""
    rows: int
    l0: float
    """Mean number of latents that fire in a row."""
    l0_quantiles: dict[str, int]
    """The same number's 1, 25, 50, 75 and 99 % quantiles over rows: the smallest number that so many rows do not exceed."""
    fvu: float
    """Sum of ||x - x_hat||^2 over sum of ||x - mean||^2, both over all rows."""
    explained_variance: float
    """1 - fvu."""
    fvu_by_site: dict[str, float]
    """The fvu of the columns of each site that it reconstructs."""
    cosine: float
    """Mean cosine of x and x_hat. Rows far from the origin have a high one with their mean already."""
    centred_cosine: float
    """Mean cosine of x - mean and x_hat - mean; here and in `centred_reconstruction_bias` the mean is that of all rows of each site, also of
    those that another site of the dictionary skipped."""
    reconstruction_bias: float
    """Gamma of 2404.16014: sum of ||x_hat||^2 over sum of x_hat . x. Below 1 reconstructions are too short; 1 is no bias."""
    centred_reconstruction_bias: float
    """The same of x_hat - mean and x - mean: without what the bias of the decoder alone gets right."""
    dead_fraction: float
    """Part of the latents that never fired."""
    dense_fraction: float
    """Part of the latents that fired in more than a tenth of the rows."""
    decoder_cosine: DecoderCosine
    density_edges: np.ndarray
    """float64 [bins + 1], log10."""
    density_count: np.ndarray
    """int64 [bins]: latents by log10 of the part of the rows in which they fired, those that never did in none."""
    firings: np.ndarray
    """int64 [d_sae]: rows in which each latent fired."""

    def to_json(self) -> dict[str, object]:
        """Without `firings`, ready for JSON, which knows no NaN: None in its place."""
        data = {name: plain(value) for name, value in self._asdict().items() if name != "firings"}
        return data | {"decoder_cosine": plain(self.decoder_cosine._asdict())}


def plain(value: Any) -> Any:
    """For JSON, which knows no NaN: None in its place; lists for arrays."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value.tolist() if isinstance(value, np.ndarray) else value


def evaluate(
    dictionary: Dictionary,
    store: ActivationStore,
    *,
    site: str | None = None,
    any_model: bool = False,
    on_rows: Callable[[int], object] = lambda rows: None,
) -> Evaluation:
    """Encodes and reconstructs every row that is committed for all of the dictionary's sites. Sums are float64; memory does not grow with the store.

    site: must be the dictionary's own, where it names one. any_model: accept activations of another Whisper than it was trained on.
    on_rows: told the number of rows of each chunk that is done.
    Raises HearsaeError for another site, width or model, for a store without rows, and for rows that are not finite.
    """
    site = check_fits(dictionary, store, site, any_model)
    config = dictionary.config
    sources = config.sites if config.site else (site,)
    targets = (config.target,) if config.target else sources
    everything = list(dict.fromkeys((*sources, *targets)))
    shards = store.committed(*everything)
    device = dictionary.W_dec.device
    # Only something near the rows, so that sums of squares lose no digits: another site may have skipped clips that count here.
    near = torch.from_numpy(np.concatenate([store.stats(name, shards).mean for name in targets])).to(device)
    sums = _Sums([store.sites[name]["width"] for name in targets], near, config.d_sae)
    with fast_matmul() if device.type == "cpu" else nullcontext():  # which on a GPU would round to TF32
        for shard in shards:
            spans = store.spans(shard, *everything)
            for chunk in valid_chunks(store, everything, shard):
                rows = {name: torch.from_numpy(read_valid(store, name, chunk, spans)).to(device).float() for name in everything}
                x_hat, codes = dictionary.reconstruct(_beside([rows[name] for name in sources]))
                sums.add(_beside([rows[name] for name in targets]), x_hat, codes.latent, codes.start)
                on_rows(len(x_hat))
    if not sums.rows:
        raise HearsaeError(f"{store.path} has no rows of {' and '.join(everything)}: every clip was skipped")
    return sums.evaluation(site, "+".join(targets), targets, decoder_cosine(dictionary))


def _beside(rows: list[Tensor]) -> Tensor:
    return rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)


class _Sums:
    """What is kept of the rows seen: as much for a million of them as for one."""

    def __init__(self, widths: list[int], near: Tensor, d_sae: int) -> None:
        """widths: columns of each site that is reconstructed; near: float64, about the mean of the rows."""
        device = near.device
        self.widths, self.near = widths, near.float()
        self.rows = 0
        self.shift = torch.zeros_like(near, dtype=torch.float64)
        """Sum of x - near."""
        self.spread, self.error = (torch.zeros(len(widths), dtype=torch.float64, device=device) for _ in range(2))
        """Site by site, of ||x - near||^2 and ||x - x_hat||^2."""
        self.cosine, self.centred_cosine = (torch.zeros((), dtype=torch.float64, device=device) for _ in range(2))
        self.energy, self.centred_energy = torch.zeros(2, dtype=torch.float64, device=device), torch.zeros(2, dtype=torch.float64, device=device)
        """||x_hat||^2 and x_hat . x."""
        self.firings = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self.rows_by_l0 = torch.zeros(d_sae + 1, dtype=torch.int64, device=device)

    def add(self, x: Tensor, x_hat: Tensor, latent: Tensor, start: Tensor) -> None:
        """x, x_hat: float32 [rows, d]; latent, start: of the codes. Products of two rows are float32, sums over rows are float64."""
        centred, centred_hat = x - self.near, x_hat - self.near
        self.rows += len(x)
        self.shift += centred.sum(0, dtype=torch.float64)
        self.spread += self._by_site(centred)
        self.error += self._by_site(x - x_hat)
        for a, b, energy, cosine in ((x, x_hat, self.energy, self.cosine), (centred, centred_hat, self.centred_energy, self.centred_cosine)):
            dots, squares, squares_hat = (torch.linalg.vecdot(*pair).double() for pair in ((a, b), (a, a), (b, b)))
            energy += torch.stack([squares_hat.sum(), dots.sum()])
            cosine += (dots / (squares * squares_hat).sqrt().clamp(min=TINY)).sum()
        self.firings += torch.bincount(latent, minlength=len(self.firings))
        self.rows_by_l0 += torch.bincount(start.diff(), minlength=len(self.rows_by_l0))

    def _by_site(self, difference: Tensor) -> Tensor:
        return torch.stack([torch.linalg.vecdot(part, part).sum(dtype=torch.float64) for part in difference.split(self.widths, dim=1)])

    def evaluation(self, site: str, target: str, names: tuple[str, ...], cosines: DecoderCosine) -> Evaluation:
        shift = torch.stack([part.square().sum() for part in self.shift.split(self.widths)]) / self.rows
        mean = self.near.double() + self.shift / self.rows
        spread, error = (self.spread - shift).cpu(), self.error.cpu()
        spread[spread <= EQUAL * self.rows * self._by_site(mean[None]).cpu()] = 0.0
        firings = self.firings.cpu().numpy()
        density = firings / self.rows
        count, _ = np.histogram(np.log10(density[firings > 0]).clip(DENSITY_EDGES[0], 0), DENSITY_EDGES)
        fvu = _ratio(float(error.sum()), float(spread.sum()))
        reached = self.rows_by_l0.cumsum(0).cpu().numpy()
        return Evaluation(
            site=site,
            target=target,
            rows=self.rows,
            l0=float(firings.sum() / self.rows),
            l0_quantiles={f"{q:g}": int(np.searchsorted(reached, q * self.rows)) for q in L0_QUANTILES},
            fvu=fvu,
            explained_variance=1 - fvu,
            fvu_by_site={name: _ratio(e, s) for name, e, s in zip(names, error.tolist(), spread.tolist(), strict=True)},
            cosine=float(self.cosine) / self.rows,
            centred_cosine=float(self.centred_cosine) / self.rows,
            reconstruction_bias=_ratio(*self.energy.tolist()),
            centred_reconstruction_bias=_ratio(*self.centred_energy.tolist()),
            dead_fraction=float((firings == 0).mean()),
            dense_fraction=float((density > DENSE).mean()),
            decoder_cosine=cosines,
            density_edges=DENSITY_EDGES,
            density_count=count,
            firings=firings,
        )


def _ratio(over: float, under: float) -> float:
    return over / under if under else float("nan")


def check_fits(dictionary: Dictionary, store: ActivationStore, site: str | None = None, any_model: bool = False) -> str:
    """The site of `store` whose rows the dictionary takes (of a crosscoder all, joined by `+`). Raises HearsaeError if they, or those that
    it reconstructs, are not what it was trained on."""
    config = dictionary.config
    if site and config.site and site != config.site:
        raise HearsaeError(f"this SAE was trained on {config.site}, not on {site}")
    site = site or config.site
    widths = config.widths or (config.d_in,)
    expected = list(zip(config.sites if config.widths else (site,), widths, strict=True))
    if config.target:
        expected.append((config.target, config.out_width))
    for name, width in expected:
        store.axis(name)  # raises for a site that it does not have
        found = store.sites[name]["width"]
        if found != width:
            does = "reconstructs" if name == config.target else "takes"
            raise HearsaeError(f"this SAE {does} rows of width {width}; {name} in {store.path} has width {found}")
    theirs = store.header.model["sha256"]
    if config.model_sha256 and theirs != config.model_sha256 and not any_model:
        name = f"{store.header.model.get('name')}, {theirs[:12]}"
        raise HearsaeError(f"{store.path} holds activations of another model ({name}) than this SAE was trained on ({config.model_sha256[:12]})")
    if not any_model:
        refuse_other_context(config, store, "this SAE")
    return site


def refuse_other_context(config: SaeConfig, store: ActivationStore, name: str) -> None:
    """Raises HearsaeError if the store's windows are not what the SAE, called `name`, was trained on, as far as it says."""
    context = name_of_context(store.header.context)
    if config.context and config.context != context:
        raise HearsaeError(f"{name} was trained on windows that were {config.context}; those of {store.path} are {context}")
