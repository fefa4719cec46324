"""Sparse codes of rows: which latents are kept, and the sparse products of training.

Of the five matrix products of a training step only the encoder's has to be dense: decoding and both weight gradients touch
`k` latents a row. Each fast path here has a plain twin, `*_plain`, that says in dense PyTorch what it must equal.
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sae.ranks import Ranks

BOUND_SAMPLE_ROWS = 128
"""Rows from which `select_batch_topk` guesses where the cut lies."""
BOUND_SLACK = 1.25
"""It guesses low, for this many times the values wanted: a guess that is too high costs a second pass."""
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
        return torch.repeat_interleave(torch.arange(n, dtype=torch.int32, device=self.start.device), self.start.diff())


Select = Callable[[Tensor], SparseRows]
"""Pre-activations [rows, d_sae] -> the values that are kept."""


# Which values are kept


def select_above(pre: Tensor, threshold: Tensor | float) -> SparseRows:
    """The values greater than the threshold and 0. pre: float32 [rows, d_sae]; threshold: one, or [d_sae]."""
    if isinstance(threshold, Tensor) and threshold.ndim:
        index = (pre > threshold.clamp(min=0.0)).flatten().nonzero()[:, 0]
    else:
        index = _above(pre.flatten(), max(float(threshold), 0.0))
    return _from_flat(index, pre)


def select_topk(pre: Tensor, k: int) -> SparseRows:
    """The k largest positive values of each row. pre: float32 [rows, d_sae]."""
    latent = pre.topk(k, sorted=False).indices.sort(dim=1).values
    value = pre.gather(1, latent)
    kept = value > 0
    start = F.pad(kept.sum(1).cumsum(0), (1, 0)).int()
    return SparseRows(start, latent[kept].int(), value[kept])


def select_batch_topk(pre: Tensor, n: int) -> SparseRows:
    """The n largest positive values of the whole batch; of equal values at the cut those of the first rows and latents.

    Exact without sorting rows * d_sae values: only those above a bound that is surely low enough are looked at twice.
    pre: float32 [rows, d_sae].
    """
    if pre.is_cuda:
        return select_batch_topk_plain(pre, n)
    flat = pre.numpy().reshape(-1)
    bound = _low_bound(pre.numpy(), n)
    index = np.flatnonzero(flat > bound)
    if len(index) < n and bound > 0:
        index = np.flatnonzero(flat > 0)
    if len(index) > n:
        value = flat[index]
        cut = np.partition(value, len(value) - n)[len(value) - n]
        keep = value > cut
        ties = np.flatnonzero(value == cut)
        keep[ties[: n - np.count_nonzero(keep)]] = True
        index = index[keep]
    return _from_flat(torch.from_numpy(index), pre)


def select_batch_topk_plain(pre: Tensor, n: int) -> SparseRows:
    """Twin of `select_batch_topk`: sorts everything."""
    value, index = pre.flatten().sort(descending=True, stable=True)
    return _from_flat(index[:n][value[:n] > 0].sort().values, pre)


def select_batch_topk_of_ranks(pre: Tensor, n: int, ranks: Ranks) -> SparseRows:
    """This rank's part of what `select_batch_topk` selects from the rows of all ranks, one rank's after the other's.

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
    codes = select_batch_topk_plain(everything, n)
    start = codes.start[first : first + len(pre) + 1]
    return SparseRows(start - start[0], codes.latent[start[0] : start[-1]], codes.value[start[0] : start[-1]])


def _digit_counts(bits: Tensor, digit: int, ranks: Ranks) -> Tensor:
    """int64 [ranks, 2^width]: how many of each rank's values have which digit."""
    shift, width = DIGITS[digit]
    return ranks.table(torch.bincount(bits >> shift & (1 << width) - 1, minlength=1 << width))


def _above(flat: Tensor, bound: float) -> Tensor:
    """int64: where the values are greater than the bound."""
    return torch.nonzero(flat > bound)[:, 0] if flat.is_cuda else torch.from_numpy(np.flatnonzero(flat.numpy() > bound))


def _low_bound(pre: np.ndarray, n: int) -> float:
    """A guess, rather too low than too high, of the n-th largest value; at least 0."""
    sample = pre[:: max(1, len(pre) // BOUND_SAMPLE_ROWS)].reshape(-1)
    wanted = int(n / pre.size * sample.size * BOUND_SLACK) + 1
    return 0.0 if wanted >= sample.size else max(0.0, float(np.partition(sample, sample.size - wanted)[sample.size - wanted]))


def _from_flat(index: Tensor, pre: Tensor) -> SparseRows:
    """index: int64 [nnz], ascending, into `pre` flattened."""
    rows, d_sae = pre.shape
    row = index // d_sae
    start = F.pad(torch.bincount(row, minlength=rows).cumsum(0), (1, 0)).int()
    return SparseRows(start, (index - row * d_sae).int(), pre.flatten()[index])


# Products


def decode_rows(codes: SparseRows, W_dec: Tensor) -> Tensor:
    """codes @ W_dec: [rows, d_in]."""
    return F.embedding_bag(codes.latent, W_dec, codes.start, mode="sum", per_sample_weights=codes.value, include_last_offset=True)


def autoencode(x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, select: Select, buffer: Tensor) -> tuple[Tensor, SparseRows]:
    """Encodes, keeps what `select` keeps, decodes: (reconstruction [rows, d_in], codes). Gradients reach the four parameters, not `x`.

    buffer: float32 [rows, d_sae], overwritten with the pre-activations: fresh memory of that size costs as much as the selection.
    """
    if x.is_cuda or not torch.backends.mkl.is_available():
        return autoencode_plain(x, W_enc, b_enc, W_dec, b_dec, select)
    x_hat, *codes = _Autoencode.apply(x, W_enc, b_enc, W_dec, b_dec, select, buffer)
    return x_hat, SparseRows(*codes)


def autoencode_plain(x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, select: Select) -> tuple[Tensor, SparseRows]:
    """Twin of `autoencode`: dense, differentiated by PyTorch."""
    pre = (x - b_dec) @ W_enc + b_enc
    codes = select(pre.detach())
    mask = torch.zeros_like(pre)
    mask[codes.rows().long(), codes.latent.long()] = 1.0
    return (pre * mask) @ W_dec + b_dec, codes


class _Autoencode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, select: Select, buffer: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        centred = x - b_dec
        codes = select(torch.addmm(b_enc, centred, W_enc, out=buffer))
        ctx.save_for_backward(centred, W_enc, W_dec, *codes)
        ctx.mark_non_differentiable(*codes)
        return decode_rows(codes, W_dec).add_(b_dec), *codes

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        centred, W_enc, W_dec, *saved = ctx.saved_tensors
        codes = SparseRows(*saved)
        shape = (len(centred), len(W_dec))
        d_value = torch.sparse.sampled_addmm(_csr(codes, shape), grad, W_dec.t(), beta=0.0).values()

        # The transposed codes, latent by latent: what both weight gradients sum over.
        order = codes.latent.argsort(stable=True)
        start = F.pad(torch.bincount(codes.latent, minlength=shape[1]).cumsum(0), (1, 0)).int()
        row = codes.rows()[order]
        d_W_dec = _csr(SparseRows(start, row, codes.value[order]), shape[::-1]) @ grad
        d_W_enc = (_csr(SparseRows(start, row, d_value[order]), shape[::-1]) @ centred).t()
        d_b_enc = torch.bincount(codes.latent, weights=d_value, minlength=shape[1]).to(d_value.dtype)
        d_b_dec = grad.sum(0) - W_enc @ d_b_enc
        return None, d_W_enc, d_b_enc, d_W_dec, d_b_dec, None, None


def _csr(codes: SparseRows, shape: tuple[int, ...]) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(*codes, size=shape, check_invariants=False)
