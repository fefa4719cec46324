"""The products of training on sparse codes.

Of the five matrix products of a training step only the encoder's has to be dense: decoding and both weight gradients touch
`k` latents a row. `encode` and `decode_error` are the two halves of a step, each differentiable, with what an architecture does to the
values between them; each has a plain twin, `*_plain`, that says in dense PyTorch what it must equal. On a CPU the loops are those of
`sae.kernels`, on a GPU `sae.triton_step` takes over.
"""

from collections.abc import Iterator
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sae import kernels
from sae.kernels import spread
from sae.selection import BatchTopK, Keep, SparseRows, on_kernels, on_triton, select, select_plain, select_slices

SLICE_VALUES = 1 << 22
"""Pre-activations of a slice: 16 MiB of float32, which stay near until they are looked through."""
LEAST_SLICE_ROWS = 128
"""Below this the product gets slower than what is gained."""


class ByLatent:
    """The entries of sparse rows in the order of latents, which both weight gradients sum over; made when first asked for."""

    def __init__(self, start: Tensor, latent: Tensor, d_sae: int) -> None:
        self._start, self._latent, self.d_sae = start, latent, d_sae

    @cached_property
    def order(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """int32: bounds of each latent's entries [d_sae + 1]; the row of each entry [nnz]; its place among the rows' entries [nnz]."""
        bounds, row, entry = np.zeros(self.d_sae + 1, np.int32), *(np.empty(len(self._latent), np.int32) for _ in range(2))
        kernels.transpose(self._start.numpy(), self._latent.numpy(), bounds, row, entry)
        return bounds, row, entry

    def add_up(self, factor: Tensor, rows: Tensor, total: Tensor, first: int, last: int) -> None:
        """total[l] = sum over the entries of latent l of factor [nnz] * rows[row], for the latents from first to last."""
        arrays = (*self.order, factor.numpy(), rows.numpy())
        spread(lambda begin, end: kernels.sum_by_latent(*arrays, first + begin, first + end, total.numpy()), last - first)


class Encoded(NamedTuple):
    """What is kept of the pre-activations of rows."""

    codes: SparseRows
    """Their values are differentiable."""
    by_latent: ByLatent


class Error(NamedTuple):
    """What is left of y [rows, d_out] by the reconstructions from each prefix of the latents."""

    weighted: Tensor
    """[]: the weighted sum of the squared errors; differentiable."""
    of_prefixes: Tensor
    """[prefixes]: the squared error of each."""
    residual: Tensor
    """[rows, d_out]: what all latents leave."""


def prefixes_of(d_sae: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Bounds and weights of the one prefix that is the whole dictionary."""
    return torch.tensor([d_sae], dtype=torch.int32, device=device), torch.ones(1, device=device)


def encode(x: Tensor, b_in: Tensor | None, W_enc: Tensor, b_enc: Tensor, keep: Keep) -> Encoded:
    """What `keep` keeps of (x - b_in) @ W_enc + b_enc. Gradients reach the parameters, not `x`.

    x: float32 [rows, d_in]. W_enc: [d_in, d_sae], transposed in memory. b_in: None where x is not shifted.
    """
    if on_triton(x):
        from sae import triton_step

        return triton_step.encode(x, b_in, W_enc, b_enc, keep)
    if not on_kernels(x):
        return encode_plain(x, b_in, W_enc, b_enc, keep)
    out: list[ByLatent] = []
    codes = SparseRows(*_Encode.apply(x, b_in, W_enc, b_enc, keep, out))
    return Encoded(codes, out[0])


def encode_plain(x: Tensor, b_in: Tensor | None, W_enc: Tensor, b_enc: Tensor, keep: Keep) -> Encoded:
    """Twin of `encode`: dense, differentiated by PyTorch."""
    pre = torch.addmm(b_enc, x if b_in is None else x - b_in, W_enc).float()  # autocast may have made it bfloat16
    codes = select_plain(pre.detach(), keep)
    return Encoded(codes._replace(value=pre[codes.rows().long(), codes.latent.long()]), ByLatent(codes.start, codes.latent, len(b_enc)))


def decode_error(encoded: Encoded, W_dec: Tensor, b_dec: Tensor, y: Tensor, bounds: Tensor, weights: Tensor) -> Error:
    """Squared errors of codes @ W_dec + b_dec against y [rows, d_out], and of those from latents below each of the bounds alone.

    Gradients reach the values of the codes and the parameters. bounds: int32 [prefixes], ascending, the last d_sae; weights: float32
    [prefixes], of the errors.
    """
    if on_triton(y):
        from sae import triton_step

        return triton_step.decode_error(encoded, W_dec, b_dec, y, bounds, weights)
    if not on_kernels(y):
        return decode_error_plain(encoded, W_dec, b_dec, y, bounds, weights)
    return Error(*_DecodeError.apply(encoded.codes.value, W_dec, b_dec, y, encoded, bounds, weights))


def decode_error_plain(encoded: Encoded, W_dec: Tensor, b_dec: Tensor, y: Tensor, bounds: Tensor, weights: Tensor) -> Error:
    """Twin of `decode_error`: dense, differentiated by PyTorch."""
    codes = encoded.codes
    z = torch.zeros(len(y), len(W_dec), device=y.device).index_put((codes.rows().long(), codes.latent.long()), codes.value)
    residuals = [y - b_dec - z[:, :bound] @ W_dec[:bound] for bound in bounds.tolist()]
    errors = torch.stack([residual.square().sum() for residual in residuals])
    return Error((errors * weights).sum(), errors.detach(), residuals[-1].detach())


def decode_rows(codes: SparseRows, W_dec: Tensor) -> Tensor:
    """codes @ W_dec: [rows, d_out]."""
    return F.embedding_bag(codes.latent, W_dec, codes.start, mode="sum", per_sample_weights=codes.value, include_last_offset=True)


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, b_in: Tensor | None, W_enc: Tensor, b_enc: Tensor, keep: Keep, out: list[ByLatent]
    ) -> tuple[Tensor, Tensor, Tensor]:
        centred = (x if b_in is None else x - b_in).contiguous()
        if isinstance(keep, BatchTopK) and keep.ranks.world > 1:
            codes = select(torch.addmm(b_enc, centred, W_enc), keep)
        else:
            codes = select_slices(partial(_slices, centred, W_enc), b_enc, keep, len(x))
        out.append(ByLatent(codes.start, codes.latent, len(b_enc)))
        ctx.by_latent, ctx.shifted = out[0], b_in is not None
        ctx.save_for_backward(centred, W_enc, codes.latent)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(codes.start, codes.latent)
        return codes

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        d_value = gradients[2].contiguous()
        centred, W_enc, latent = ctx.saved_tensors
        d_in, d_sae = W_enc.shape
        d_W_enc = torch.empty_strided((d_in, d_sae), (1, d_in))  # as the parameter lies in memory
        ctx.by_latent.add_up(d_value, centred, d_W_enc.t(), 0, d_sae)
        d_b_enc = torch.bincount(latent, weights=d_value, minlength=d_sae).to(d_value.dtype)
        return None, -(W_enc @ d_b_enc) if ctx.shifted else None, d_W_enc, d_b_enc, None, None


def _slices(centred: Tensor, W_enc: Tensor) -> Iterator[Tensor]:
    """The products of some rows after the other, all in the same memory."""
    rows = max(LEAST_SLICE_ROWS, SLICE_VALUES // W_enc.shape[1])
    buffer = torch.empty(min(rows, len(centred)), W_enc.shape[1])
    for part in centred.split(rows):
        yield torch.mm(part, W_enc, out=buffer[: len(part)])


class _DecodeError(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, value: Tensor, W_dec: Tensor, b_dec: Tensor, y: Tensor, encoded: Encoded, bounds: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows, d = y.shape
        E, errors, d_value = torch.empty(len(bounds), rows, d), torch.empty(len(bounds), rows), torch.empty_like(value)
        codes = encoded.codes
        arrays = [tensor.detach().numpy() for tensor in (codes.start, codes.latent, value, W_dec, b_dec, y.contiguous(), bounds, weights)]
        kernel: Any = kernels.decode_error
        spread(lambda first, last: kernel(*arrays, first, last, E.numpy(), errors.numpy(), d_value.numpy()), rows)
        of_prefixes = errors.sum(1, dtype=torch.float64).float()
        residual = E[-1] if float(weights[-1]) == 1.0 else E[-1] / weights[-1]
        ctx.by_latent, ctx.bounds = encoded.by_latent, bounds.tolist()
        ctx.save_for_backward(value, d_value, E)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(of_prefixes, residual)
        return (of_prefixes * weights).sum(), of_prefixes, residual

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        factor = float(gradients[0])
        value, d_value, E = ctx.saved_tensors
        d_W_dec = d_b_dec = None
        if ctx.needs_input_grad[1]:
            d_W_dec = torch.empty(ctx.by_latent.d_sae, E.shape[2])
            for rest, first, last in zip(E, [0, *ctx.bounds], ctx.bounds, strict=False):
                ctx.by_latent.add_up(value * (-2 * factor), rest, d_W_dec, first, last)
        if ctx.needs_input_grad[2]:
            d_b_dec = E[0].sum(0) * (-2 * factor)
        return d_value * factor, d_W_dec, d_b_dec, None, None, None, None
