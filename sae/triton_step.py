"""The two halves of a training step, `encode` and `decode_error` of `sae.sparse`, on a GPU with the Triton programs.

Pre-activations are computed for the whole batch, in the precision that autocast says; everything after them is float32. Twins: `encode_plain`
and `decode_error_plain` of `sae.sparse`. Tested in Triton's interpreter, not on a GPU: see `sae.triton_kernels`.
"""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sae.selection import Above, Keep, SparseRows, TopK, select_batch_topk_of_ranks
from sae.sparse import ByLatent, Encoded, Error
from sae.triton_kernels import LatentOrder, forward_error, latent_order, select_above, select_batch_topk, select_topk, sum_by_latent


class TritonByLatent(ByLatent):
    """The entries of sparse rows on a GPU in the order of latents; made when first asked for."""

    @cached_property
    def on_device(self) -> LatentOrder:
        return latent_order(self._start, self._latent, self.d_sae)


def select(pre: Tensor, keep: Keep) -> SparseRows:
    """What is kept of pre-activations, float32 or bfloat16 [rows, d_sae]; values are float32."""
    if isinstance(keep, Above):
        return select_above(pre, keep.threshold.contiguous())
    if isinstance(keep, TopK):
        return select_topk(pre, keep.k)
    if keep.ranks.world > 1:
        return select_batch_topk_of_ranks(pre.float(), keep.n, keep.ranks)
    return select_batch_topk(pre, keep.n)


def encode(x: Tensor, b_in: Tensor | None, W_enc: Tensor, b_enc: Tensor, keep: Keep) -> Encoded:
    """What `keep` keeps of (x - b_in) @ W_enc + b_enc. Gradients reach the parameters, not `x`. As `sae.sparse.encode`."""
    out: list[ByLatent] = []
    codes = SparseRows(*_Encode.apply(x, b_in, W_enc, b_enc, keep, out))
    return Encoded(codes, out[0])


def decode_error(encoded: Encoded, W_dec: Tensor, b_dec: Tensor, y: Tensor, bounds: Tensor, weights: Tensor) -> Error:
    """Squared errors against y of what each prefix of the latents reconstructs, as `sae.sparse.decode_error`. Gradients reach values, parameters."""
    return Error(*_DecodeError.apply(encoded.codes.value, W_dec, b_dec, y, encoded, bounds, weights))


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, b_in: Tensor | None, W_enc: Tensor, b_enc: Tensor, keep: Keep, out: list[ByLatent]
    ) -> tuple[Tensor, Tensor, Tensor]:
        centred = (x if b_in is None else x - b_in).contiguous()
        codes = select(torch.addmm(b_enc, centred, W_enc), keep)
        ctx.by_latent, ctx.shifted = TritonByLatent(codes.start, codes.latent, len(b_enc)), b_in is not None
        out.append(ctx.by_latent)
        ctx.save_for_backward(centred, W_enc)
        ctx.mark_non_differentiable(codes.start, codes.latent)
        return codes

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        centred, W_enc = ctx.saved_tensors
        d_W_enc_T, d_b_enc = sum_by_latent(ctx.by_latent.on_device, gradients[2].contiguous(), centred, factor_sums=True)
        return None, -(W_enc @ d_b_enc) if ctx.shifted else None, d_W_enc_T.t(), d_b_enc, None, None


class _DecodeError(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, value: Tensor, W_dec: Tensor, b_dec: Tensor, y: Tensor, encoded: Encoded, bounds: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        codes = encoded.codes._replace(value=value.contiguous())
        residuals = forward_error(codes, W_dec, b_dec, y.contiguous(), bounds, weights)
        own = isinstance(encoded.by_latent, TritonByLatent)
        ctx.by_latent = encoded.by_latent if own else TritonByLatent(codes.start, codes.latent, len(W_dec))
        ctx.save_for_backward(codes.value, residuals.d_value, residuals.E, bounds)
        of_prefixes = residuals.errors.float()
        ctx.mark_non_differentiable(of_prefixes, residuals.e_last)
        return (residuals.errors * weights).sum().float(), of_prefixes, residuals.e_last  # autocast would round `@`

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        factor = gradients[0]
        value, d_value, E, bounds = ctx.saved_tensors
        d_W_dec = sum_by_latent(ctx.by_latent.on_device, value * factor, E, bounds, scale=-2.0)[0] if ctx.needs_input_grad[1] else None
        d_b_dec = E[0].sum(0) * (-2 * factor) if ctx.needs_input_grad[2] else None
        return d_value * factor, d_W_dec, d_b_dec, None, None, None, None
