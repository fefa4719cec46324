"""What is examined: one interface for the neurons of a site, the latents of an SAE, and two bases to compare them with.

A specification names the features: `neurons:SITE`, `sae:DIR`, `pca:SITE`, `random:SITE`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch

from cache.errors import HearsaeError
from cache.location import Location, location
from cache.model import fast_matmul
from cache.store import ActivationStore
from sae.baselines import moments, random_basis
from sae.metrics import refuse_other_context
from sae.models import Codes, Dictionary, load_dictionary

KINDS = "neurons:SITE, sae:DIR, pca:SITE or random:SITE"


class Features(Protocol):
    """Scalar functions of the rows of one site. Implementations can be pickled, so that workers need not open them again."""

    @property
    def spec(self) -> str:
        """`neurons:SITE`, `sae:DIR` (DIR absolute), `pca:SITE` or `random:SITE`."""

    @property
    def site(self) -> str:
        """The site whose rows are taken."""

    @property
    def count(self) -> int:
        """How many features there are."""

    def dense(self, rows: np.ndarray) -> np.ndarray:
        """Stored rows [n, d] -> the value of every feature, float32 [n, count]."""

    def sparse(self, rows: np.ndarray) -> Codes | None:
        """The same as the nonzero values only; None where most values are nonzero, so that `dense` is the thing to use."""


class Neurons:
    """The units of a site: the stored values themselves."""

    def __init__(self, site: str, width: int) -> None:
        self.spec = f"neurons:{site}"
        self.site = site
        self.count = width

    def dense(self, rows: np.ndarray) -> np.ndarray:
        return torch.from_numpy(rows).float().contiguous().numpy()  # several times faster than numpy's conversion

    def sparse(self, rows: np.ndarray) -> None:
        return None


class Basis:
    """Coordinates of centred rows in an orthonormal basis, (x - mean) @ Q.

    Rows are centred because a site's mean may be far larger than its spread: uncentred, every direction would hold nearly the same sign
    throughout.
    """

    def __init__(self, spec: str, site: str, mean: np.ndarray, basis: np.ndarray) -> None:
        """mean: float64 [d], of the site's rows. basis: float64 [d, d], orthonormal columns."""
        self.spec = spec
        self.site = site
        self.count = len(mean)
        self.basis = basis.astype(np.float32)
        self.mean = mean.astype(np.float32)

    def dense(self, rows: np.ndarray) -> np.ndarray:
        with _reproducible_matmul():
            return (torch.from_numpy(rows.astype(np.float32) - self.mean) @ torch.from_numpy(self.basis)).numpy()

    def sparse(self, rows: np.ndarray) -> None:
        return None


def random_features(store: ActivationStore, site: str, seed: int) -> Basis:
    """The control: a basis that is uniform over the orthogonal group (`sae.baselines.random_basis`). Whatever it shows too is no merit of
    neurons or latents."""
    return Basis(f"random:{site}", site, store.stats(site).mean, random_basis(store.sites[site]["width"], seed))


def principal_components(store: ActivationStore, site: str) -> Basis:
    """The principal axes of all committed rows, by falling variance. Of an axis' two signs the one whose largest coefficient is positive.

    Reads the site once, in this process and on one thread, so that the axes are the same whoever scans: d^2 products in float64 a row.
    """
    with _one_thread():
        found = moments(store, site)
        axes = found.principal_axes()
    largest = np.take_along_axis(axes, np.abs(axes).argmax(axis=0)[None], axis=0)[0]
    return Basis(f"pca:{site}", site, found.mean, axes * np.where(largest < 0, -1.0, 1.0))


class SaeLatents:
    """The latents of a trained dictionary, at inference."""

    def __init__(self, spec: str, dictionary: Dictionary) -> None:
        self.spec = spec
        self.site = dictionary.config.site
        self.count = dictionary.config.d_sae
        self.dictionary = dictionary

    @torch.no_grad()
    def dense(self, rows: np.ndarray) -> np.ndarray:
        with _reproducible_matmul():
            return self.dictionary.encode(torch.from_numpy(rows).float()).numpy()

    def sparse(self, rows: np.ndarray) -> Codes:
        with _reproducible_matmul():
            return self.dictionary.encode_sparse(torch.from_numpy(rows).float())


def open_features(spec: str, store: ActivationStore, seed: int = 0) -> Features:
    """The features that `spec` names, over the rows of `store`.

    seed: of the random basis. For principal components this reads all rows of the site, for a random basis the commit records.
    Raises HearsaeError for a specification that can't be read, a site that the store does not have, and an SAE that was made for
    another model, site or width.
    """
    kind, _, name = spec.partition(":")
    if kind not in ("neurons", "sae", "pca", "random") or not name:
        raise HearsaeError(f"features '{spec}' can't be read: use {KINDS}")
    if kind == "sae":
        return _open_sae(location(name), store)
    store.axis(name)  # refuses a site that is not there
    if kind == "neurons":
        return Neurons(name, store.sites[name]["width"])
    return principal_components(store, name) if kind == "pca" else random_features(store, name, seed)


def _open_sae(folder: Location, store: ActivationStore) -> SaeLatents:
    dictionary = load_dictionary(folder)
    config = dictionary.config
    if config.kind == "crosscoder":
        raise HearsaeError(f"the SAE in {folder} is a crosscoder of {', '.join(config.sites)}: scans of several sites at once are not built yet")
    if config.site not in store.sites:
        raise HearsaeError(f"the SAE in {folder} is for site '{config.site}', which {store.path} lacks; it has: {', '.join(sorted(store.sites))}")
    width, sha256 = store.sites[config.site]["width"], store.header.model["sha256"]
    if config.d_in != width:
        raise HearsaeError(f"the SAE in {folder} takes rows of width {config.d_in}, but {config.site} in {store.path} has width {width}")
    if config.model_sha256 != sha256:
        raise HearsaeError(
            f"the SAE in {folder} was trained on model {config.model_sha256[:12] or 'unknown'}, but {store.path} holds model {sha256[:12]} "
            f"({store.header.model['name']}): scan a store of its own model"
        )
    refuse_other_context(config, store, f"the SAE in {folder}")
    return SaeLatents(f"sae:{folder.absolute()}", dictionary.requires_grad_(False))


@contextmanager
def _reproducible_matmul() -> Iterator[None]:
    with _one_thread(), fast_matmul():
        yield


@contextmanager
def _one_thread() -> Iterator[None]:
    """Whatever the process was given: how a product is split over threads may change its last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
