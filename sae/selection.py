"""Which pre-activations of a batch are kept: those above a threshold, the largest of each row, the largest of all.

On a CPU the loops are those of `sae.kernels`, which look through pre-activations slice by slice, while they are near, so that those of a whole
batch are never held; on a GPU those of `sae.triton_kernels`. Each has a plain twin, `*_plain`. HEARSAE_PLAIN=1 in the environment switches to
the twins, here and in `sae.sparse`.
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sae import kernels
from sae.ranks import ALONE, Ranks

PLAIN = os.environ.get("HEARSAE_PLAIN", "") not in ("", "0")
"""Chosen once: dense PyTorch in place of the kernels."""
BOUND_SAMPLE_ROWS = 128
"""Rows from which a batch top-k guesses where the cut lies."""
BOUND_SLACK = 1.25
"""It guesses low, for this many times the values wanted: a guess that is too high costs a second pass."""
HINT = 0.9
"""Times the last batch's cut: a bound that is surely low enough for this batch, or almost surely."""
FIRST_ROOM = 64
"""Values a row for which there is room at first; what has more is looked through again."""
DIGITS = ((20, 11), (10, 10), (0, 10))
"""A positive float32 as three digits, from the highest on: how far right it lies, how many bits it has. As a whole, bits order like values."""


class Codes(NamedTuple):
    """Sparse codes of n rows: entries sorted by (row, latent), nonzero values only."""

    row: np.ndarray
    """int64 [nnz]"""
    latent: np.ndarray
    """int32 [nnz]"""
    value: np.ndarray
    """float32 [nnz]"""


class SparseRows(NamedTuple):
    """The same in compressed rows, as the products want it: entries sorted by (row, latent), positive values only."""

    start: Tensor
    """int32 [rows + 1]: the entries of row i are `start[i]:start[i + 1]`."""
    latent: Tensor
    """int32 [nnz]"""
    value: Tensor
    """float32 [nnz]"""

    def rows(self) -> Tensor:
        """int32 [nnz]: the row of each entry."""
        n = len(self.start) - 1
        row = torch.arange(n, dtype=torch.int32, device=self.start.device)
        return torch.repeat_interleave(row, self.start.diff(), output_size=len(self.latent))  # or it would wait for the device


@dataclass(frozen=True)
class Above:
    """Keep the values greater than a threshold and than 0."""

    threshold: Tensor
    """float32 [] or [d_sae]"""


@dataclass(frozen=True)
class TopK:
    """Keep the k largest positive values of each row; of equal values at the cut those of the first latents."""

    k: int


@dataclass
class BatchTopK:
    """Keep the n largest positive values of the whole batch; of equal values at the cut those of the first rows and latents."""

    n: int
    """Of the rows of all ranks."""
    ranks: Ranks = ALONE
    hint: float | None = None
    """A bound that the cut is thought to lie above; brought up to date by each selection. It changes how long that takes, nothing else."""


Keep = Above | TopK | BatchTopK


def select(pre: Tensor, keep: Keep) -> SparseRows:
    """What is kept of pre-activations, float32 [rows, d_sae]."""
    if isinstance(keep, BatchTopK) and keep.ranks.world > 1:
        return select_batch_topk_of_ranks(pre, keep.n, keep.ranks)
    if on_triton(pre):
        from sae import triton_step

        return triton_step.select(pre, keep)
    return select_slices(lambda: [pre], pre.new_zeros(pre.shape[1]), keep, len(pre)) if on_kernels(pre) else select_plain(pre, keep)


def select_plain(pre: Tensor, keep: Keep) -> SparseRows:
    """Twin of `select`, on any device."""
    if isinstance(keep, Above):
        return _from_flat((pre > keep.threshold.clamp(min=0.0)).flatten().nonzero()[:, 0], pre)
    if isinstance(keep, BatchTopK):
        if keep.ranks.world > 1:
            return select_batch_topk_of_ranks_plain(pre, keep.n, keep.ranks)
        value, index = pre.flatten().sort(descending=True, stable=True)
        return _from_flat(index[: keep.n][value[: keep.n] > 0].sort().values, pre)
    latent = pre.sort(dim=1, descending=True, stable=True).indices[:, : keep.k].sort(dim=1).values
    value = pre.gather(1, latent)
    kept = value > 0
    return SparseRows(F.pad(kept.sum(1).cumsum(0), (1, 0)).int(), latent[kept].int(), value[kept])


def on_kernels(x: Tensor) -> bool:
    """Whether the kernels are to be used for it."""
    return x.device.type == "cpu" and not PLAIN


def on_triton(x: Tensor) -> bool:
    """Whether the Triton programs are to be used for it."""
    return x.is_cuda and not PLAIN and _triton_is_available()


@cache
def _triton_is_available() -> bool:
    from sae.triton_kernels import is_available

    return is_available()


def select_slices(slices: Callable[[], Iterable[Tensor]], bias: Tensor, keep: Keep, rows: int) -> SparseRows:
    """What is kept of pre-activations that come slice by slice, without their bias [d_sae], each slice gone when the next one comes.

    slices: gives them all whenever it is called, float32 [some rows, d_sae] on the CPU. rows: of all slices.
    """
    b = bias.detach().numpy()
    if isinstance(keep, TopK):
        return _gather(slices(), kernels.topk, b, lambda product: keep.k, 2 * keep.k)
    if isinstance(keep, Above):
        bound = keep.threshold.clamp(min=0.0).expand(len(b)).contiguous().numpy()
        return _gather(slices(), kernels.above, b, lambda product: bound, FIRST_ROOM)

    low = keep.hint

    def low_enough(product: np.ndarray) -> np.ndarray:
        nonlocal low
        low = _low_bound(product, round(keep.n * len(product) / rows), b) if low is None else low
        return np.full(len(b), low, np.float32)

    found = _gather(slices(), kernels.above, b, low_enough, 2 * -(-keep.n // max(rows, 1)))
    if len(found.value) < keep.n and low:
        low = 0.0
        found = _gather(slices(), kernels.above, b, low_enough, FIRST_ROOM)
    if len(found.value) <= keep.n:
        keep.hint = 0.0
        return found
    value = found.value.numpy()
    cut = np.partition(value, len(value) - keep.n)[len(value) - keep.n] if keep.n else np.float32(np.inf)
    keep.hint = HINT * float(cut)
    kept = SparseRows(torch.empty_like(found.start), *(torch.empty(keep.n, dtype=part.dtype) for part in found[1:]))
    equal = keep.n - int(np.count_nonzero(value > cut))
    kernels.drop_below(cut, equal, *(part.numpy() for part in (*found, *kept)))
    return kept


def _gather(
    slices: Iterable[Tensor], kernel: Callable[..., int], bias: np.ndarray, argument_for: Callable[[np.ndarray], object], per_row: int
) -> SparseRows:
    """Runs a kernel, with its argument, over each slice; joins what it finds. per_row: values for which to make room."""
    counts, latents, values = [], [], []
    for product in slices:
        array, count = product.numpy(), np.empty(len(product), np.int32)
        part = partial(_gather_part, kernel, array, bias, argument_for(array), count, per_row)
        for latent, value in kernels.spread(part, len(product)):
            latents.append(latent)
            values.append(value)
        counts.append(count)
    none = [np.empty(0, np.int32)]
    start = F.pad(torch.from_numpy(np.concatenate(counts or none)).cumsum(0), (1, 0)).int()
    latent, value = np.concatenate(latents or none), np.concatenate(values or [np.empty(0, np.float32)])
    return SparseRows(start, torch.from_numpy(latent), torch.from_numpy(value))


def _gather_part(
    kernel: Callable[..., int], product: np.ndarray, bias: np.ndarray, argument: object, count: np.ndarray, per_row: int, first: int, last: int
) -> tuple[np.ndarray, np.ndarray]:
    room = (last - first) * per_row + product.shape[1] + kernels.WORD
    while True:
        latent, value = np.empty(room, np.int32), np.empty(room, np.float32)
        n = kernel(product, bias, argument, first, last, count, latent, value)
        if n >= 0:
            return latent[:n], value[:n]
        room = min(4 * room, (last - first + 1) * (product.shape[1] + kernels.WORD))


# Over ranks


def select_batch_topk_of_ranks(pre: Tensor, n: int, ranks: Ranks) -> SparseRows:
    """This rank's part of what a `BatchTopK` keeps from the rows of all ranks, one rank's after the other's.

    Exact: the n-th largest value is found digit by digit from counts that are summed over the ranks (a radix selection), so that only
    counters travel. pre: float32 [rows, d_sae], of this rank; the number of rows may differ between ranks. n: of all ranks.
    """
    flat = pre.flatten()
    bounds = ranks.table(torch.tensor([0.0 if pre.is_cuda else _low_bound(pre.numpy(), n // ranks.world)], device=pre.device))
    for bound in dict.fromkeys((float(bounds.min()), 0.0)):
        index = _above(flat, bound)
        counts = _digit_counts(flat[index].view(torch.int32), 0, ranks)
        if counts.sum() >= n:
            break
    else:
        return _from_flat(index, pre)  # all positive values of all ranks are too few

    bits, prefix, wanted = flat[index].view(torch.int32), 0, n
    for digit, (_shift, width) in enumerate(DIGITS):
        if digit:
            counts = _digit_counts(bits[bits >> DIGITS[digit - 1][0] == prefix], digit, ranks)
        larger = counts.sum(0).flip(0).cumsum(0).flip(0)  # how many have this digit or a larger one
        value = int((larger >= wanted).nonzero()[-1])
        wanted -= int(larger[value + 1]) if value + 1 < len(larger) else 0
        prefix = prefix << width | value
    before = int(counts[: ranks.rank, value].sum())
    ties = (bits == prefix).nonzero()[:, 0][: max(0, wanted - before)]
    keep = bits > prefix
    keep[ties] = True
    return _from_flat(index[keep], pre)


def select_batch_topk_of_ranks_plain(pre: Tensor, n: int, ranks: Ranks) -> SparseRows:
    """Twin of `select_batch_topk_of_ranks`: every rank gets all rows, selects, and keeps its own."""
    rows = [int(count) for count in ranks.table(torch.tensor([len(pre)]))]
    everything = torch.zeros(sum(rows), pre.shape[1])
    first = sum(rows[: ranks.rank])
    everything[first : first + len(pre)] = pre
    ranks.sum(everything)
    codes = select_plain(everything, BatchTopK(n))
    start = codes.start[first : first + len(pre) + 1]
    return SparseRows(start - start[0], codes.latent[start[0] : start[-1]], codes.value[start[0] : start[-1]])


def _digit_counts(bits: Tensor, digit: int, ranks: Ranks) -> Tensor:
    """int64 [ranks, 2^width]: how many of each rank's values have which digit."""
    shift, width = DIGITS[digit]
    return ranks.table(torch.bincount(bits >> shift & (1 << width) - 1, minlength=1 << width))


def _above(flat: Tensor, bound: float) -> Tensor:
    """int64: where the values are greater than the bound."""
    return torch.nonzero(flat > bound)[:, 0] if flat.is_cuda else torch.from_numpy(np.flatnonzero(flat.numpy() > bound))


def _low_bound(product: np.ndarray, n: int, bias: np.ndarray | float = 0.0) -> float:
    """A guess, rather too low than too high, of the n-th largest value; at least 0."""
    sample = (product[:: max(1, len(product) // BOUND_SAMPLE_ROWS)] + bias).reshape(-1)
    wanted = int(n / product.size * sample.size * BOUND_SLACK) + 1
    return 0.0 if wanted >= sample.size else max(0.0, float(np.partition(sample, sample.size - wanted)[sample.size - wanted]))


def _from_flat(index: Tensor, pre: Tensor) -> SparseRows:
    """index: int64 [nnz], ascending, into `pre` flattened."""
    rows, d_sae = pre.shape
    row = index // d_sae
    start = F.pad(torch.bincount(row, minlength=rows).cumsum(0), (1, 0)).int()
    return SparseRows(start, (index - row * d_sae).int(), pre.flatten()[index])
