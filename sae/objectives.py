"""What the architectures do differently in a training step: how values follow from pre-activations, and what keeps them few.

An `Objective` has the parameters that training needs beside those of the `Dictionary`, the forward pass of a step, and the way back to a
`Dictionary` that is used as `sae.models` says. Losses are parts of the variance: a squared error is divided by the energy of the rows, so
that it is an FVU, and penalties are in the same unit.

- batchtopk (2412.06410), topk (2406.04093): the squared error; AuxK, which both have, is the training loop's.
- matryoshka (2503.17547): the mean of the squared errors of prefixes of the latents.
- relu (transformer-circuits.pub, April 2024): the sum of values times the norms of their decoder rows, which are free.
- tied ("Interpreting Whisper", 2023): W_enc is W_dec^T, unit rows, the sum of the values; no bias but the latents' own.
- jumprelu (2407.14435): a threshold for each latent, learnt through a straight-through estimator; the number of values, or how far it is
  from k (the paper's appendix on targeting L0).
- jumprelu-tanh (transformer-circuits.pub, January 2025): the sum of tanh(4 value * norm) instead, whose gradient reaches all parameters, and a
  weak pull on latents that do not fire; free decoder rows.
- gated (2404.16014): one product, shifted for the gate, stretched and shifted for the magnitude; the penalty and an auxiliary
  reconstruction, by a decoder that does not learn from it, fall on the gate's side.
"""

import copy
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sae.models import Dictionary
from sae.ranks import Ranks
from sae.selection import Above, BatchTopK, Keep, SparseRows, TopK, select
from sae.sparse import Encoded, Error, decode_error, decode_error_plain, encode, encode_plain, prefixes_of

PREFIXES = (1 / 32, 3 / 32, 7 / 32, 15 / 32, 1.0)
"""Parts of the latents whose reconstructions a matryoshka SAE is trained on (2503.17547, 4.1)."""
SPARSITY = {"relu": 2.0, "tied": 1.0, "gated": 2.0, "jumprelu": 0.003, "jumprelu-tanh": 0.003}
"""Default coefficients of the penalties."""
TARGET_SPARSITY = 1.0
"""That of jumprelu where it aims at an L0."""
SPARSITY_WARMUP = {"relu": 0.05, "tied": 0.05, "gated": 0.05, "jumprelu": 0.1, "jumprelu-tanh": 1.0}
"""Part of the run over which the coefficient rises from 0."""
JUMP_BANDWIDTH = 0.001
"""Of the estimator, for rows of unit mean squared norm (2407.14435, 4)."""
TANH_BANDWIDTH = 2.0
"""Of the estimator, for rows of mean squared norm d (January 2025)."""
TANH_SCALE = 4.0
PULL = 3e-6
"""Coefficient of the penalty on pre-activations below their threshold (January 2025)."""
TANH_FIRST_THRESHOLD = 0.1
TANH_FIRST_LATENTS = 10_000
"""How many latents of a row jumprelu-tanh starts with, at most `FIRST_L0_SHARE` of them (January 2025)."""
RELU_FIRST_NORM = 0.1
"""Of the decoder rows of relu at first (April 2024)."""
FIRST_L0 = 4
"""Times k: how many latents of a row jumprelu starts with. The paper's start near 0 takes a billion rows to leave."""
FIRST_L0_SHARE = 1 / 16
"""The same as a part of all latents, where there is no k."""
DENSE_SHARE = 1 / 8
"""Of the latents: where more fire than this, dense products are the quicker ones."""


def matryoshka_bounds(d_sae: int) -> list[int]:
    """Where the prefixes of a matryoshka SAE end, the last at `d_sae`."""
    return sorted({max(1, round(part * d_sae)) for part in PREFIXES})


class Forward(NamedTuple):
    """What a step's forward pass gives."""

    error: Tensor
    """[]: squared error as the loss has it, of this rank's rows; differentiable."""
    squared_error: Tensor
    """[]: that of the whole reconstruction."""
    penalty: Tensor
    """[]: this rank's share of the penalty, in units of FVU times the energy; differentiable."""
    residual: Tensor
    """[rows, d_out]"""
    fired: SparseRows
    """Values greater than 0, or some that are 0 among them."""


class Objective:
    """batchtopk, topk and matryoshka; the others build on it."""

    unit_decoder = True
    """Whether decoder rows are kept at unit norm."""
    betas = (0.9, 0.999)

    def __init__(self, sae: Dictionary, sparsity_warmup: float, ranks: Ranks) -> None:
        self.sae, self.ranks, self.warmup = sae, ranks, sparsity_warmup
        config = sae.config
        self.beside: dict[str, nn.Parameter] = {}
        """Parameters that training has and the dictionary has not."""
        self.bounds, self.weights = prefixes_of(config.d_sae, sae.W_dec.device)
        if config.arch == "matryoshka":
            bounds = matryoshka_bounds(config.d_sae)
            self.bounds = torch.tensor(bounds, dtype=torch.int32, device=sae.W_dec.device)
            self.weights = torch.full((len(bounds),), 1 / len(bounds), device=sae.W_dec.device)
        self._keep = BatchTopK(0, ranks)

    def parameters(self) -> list[nn.Parameter]:
        """All that learn."""
        return [*self.sae.parameters(), *self.beside.values()]

    def start(self, x: Tensor) -> None:
        """Called with the first rows of a run, before the first step."""

    def forward(self, x: Tensor, y: Tensor, batch: int, energy: Tensor, progress: float, dense: bool) -> Forward:
        """x: [rows, d_in], y: [rows, d_out], of this rank; batch: rows of all ranks; energy: sum of ||y||^2 over all of them; progress: part of
        the run; dense: most latents fire, so that dense products are the quicker ones."""
        encoded = self._encode(x, self._kept(batch), dense)
        error = self._error(encoded, y, dense)
        return Forward(error.weighted, error.of_prefixes[-1], error.weighted.new_zeros(()), error.residual, encoded.codes)

    def finished(self) -> Dictionary:
        """What was learnt, as it is used, for the rows of training. The BatchTopK threshold is the training loop's to set."""
        return copy.deepcopy(self.sae)

    def _kept(self, batch: int) -> Keep:
        if self.sae.config.arch == "topk":
            return TopK(self.sae.config.k)
        self._keep.n = self.sae.config.k * batch
        return self._keep

    def _encode(self, x: Tensor, keep: Keep, dense: bool) -> Encoded:
        sae = self.sae
        return (encode_plain if dense else encode)(x, None if sae.config.target else sae.b_dec, sae.W_enc, sae.b_enc, keep)

    def _error(self, encoded: Encoded, y: Tensor, dense: bool) -> Error:
        return (decode_error_plain if dense else decode_error)(encoded, self.sae.W_dec, self.sae.b_dec, y, self.bounds, self.weights)

    def _ramp(self, progress: float) -> float:
        """The coefficient of the penalty now."""
        return self.sae.config.sparsity * min(1.0, progress / self.warmup if self.warmup else 1.0)


class Relu(Objective):
    unit_decoder = False

    def __init__(self, sae: Dictionary, sparsity_warmup: float, ranks: Ranks) -> None:
        super().__init__(sae, sparsity_warmup, ranks)
        with torch.no_grad():
            sae.W_dec.mul_(RELU_FIRST_NORM)
            sae.W_enc.mul_(RELU_FIRST_NORM)

    def forward(self, x: Tensor, y: Tensor, batch: int, energy: Tensor, progress: float, dense: bool) -> Forward:
        encoded = self._encode(x, Above(x.new_zeros(())), dense)
        error = self._error(encoded, y, dense)
        codes = encoded.codes
        l1 = (codes.value * self.sae.decoder_norms()[codes.latent.long()]).sum()
        return Forward(error.weighted, error.of_prefixes[-1], self._ramp(progress) * l1, error.residual, codes)

    def finished(self) -> Dictionary:
        sae = copy.deepcopy(self.sae)
        sae.with_unit_decoder()
        return sae


class Tied(Objective):
    def parameters(self) -> list[nn.Parameter]:
        return [self.sae.b_enc, self.sae.W_dec]

    def forward(self, x: Tensor, y: Tensor, batch: int, energy: Tensor, progress: float, dense: bool) -> Forward:
        sae = self.sae
        encoded = (encode_plain if dense else encode)(x, None, sae.W_dec.t(), sae.b_enc, Above(x.new_zeros(())))
        decode = decode_error_plain if dense else decode_error
        error = decode(encoded, sae.W_dec, sae.b_dec.detach(), y, self.bounds, self.weights)
        return Forward(error.weighted, error.of_prefixes[-1], self._ramp(progress) * encoded.codes.value.sum(), error.residual, encoded.codes)

    def finished(self) -> Dictionary:
        sae = copy.deepcopy(self.sae)
        with torch.no_grad():
            sae.W_enc.copy_(sae.W_dec.t())
        return sae


class JumpRelu(Objective):
    betas = (0.0, 0.999)
    """2407.14435, appendix on training."""

    def __init__(self, sae: Dictionary, sparsity_warmup: float, ranks: Ranks) -> None:
        super().__init__(sae, sparsity_warmup, ranks)
        self.bandwidth = JUMP_BANDWIDTH * math.sqrt(sae.config.d_in)
        first = torch.full((sae.config.d_sae,), math.log(self.bandwidth), device=sae.W_dec.device)
        self.beside["log_threshold"] = nn.Parameter(first)

    @torch.no_grad()
    def start(self, x: Tensor) -> None:
        """One threshold for all, at which a moderate number of latents fire."""
        config = self.sae.config
        pre = self.sae.shifted(x) @ self.sae.W_enc + self.sae.b_enc
        n = min(FIRST_L0 * config.k or config.d_sae, round(FIRST_L0_SHARE * config.d_sae) + 1)
        threshold = pre.topk(min(n, config.d_sae), dim=1).values[:, -1].mean().clamp(min=self.bandwidth)
        self.ranks.copy_first([threshold])
        self.beside["log_threshold"].fill_(float(threshold.log()))

    def forward(self, x: Tensor, y: Tensor, batch: int, energy: Tensor, progress: float, dense: bool) -> Forward:
        threshold = self.beside["log_threshold"].exp()
        # Those that are nearly above it have a part in the threshold's gradient.
        encoded = self._encode(x, Above(threshold.detach() - self.bandwidth / 2), dense)
        codes = encoded.codes
        value, active = _Jump.apply(codes.value, threshold[codes.latent.long()], self.bandwidth)
        encoded = encoded._replace(codes=codes._replace(value=value))
        error = self._error(encoded, y, dense)
        penalty = self._l0_penalty(active.sum() / batch, progress) * energy
        return Forward(error.weighted, error.of_prefixes[-1], penalty, error.residual, encoded.codes)

    def _l0_penalty(self, l0: Tensor, progress: float) -> Tensor:
        """l0: this rank's share of the mean number of values of a row."""
        coefficient, k = self._ramp(progress), self.sae.config.k
        if not k:
            return coefficient * l0
        whole = l0.detach().clone()
        self.ranks.sum(whole)
        off = whole / k - 1
        return coefficient * (off.square() / self.ranks.world + 2 * off / k * (l0 - l0.detach()))

    @torch.no_grad()
    def finished(self) -> Dictionary:
        sae = copy.deepcopy(self.sae)
        sae.threshold.copy_(self.beside["log_threshold"].exp())
        return sae


class JumpReluTanh(Objective):
    unit_decoder = False

    def __init__(self, sae: Dictionary, sparsity_warmup: float, ranks: Ranks) -> None:
        super().__init__(sae, sparsity_warmup, ranks)
        first = torch.full((sae.config.d_sae,), math.log(TANH_FIRST_THRESHOLD), device=sae.W_dec.device)
        self.beside["log_threshold"] = nn.Parameter(first)
        with torch.no_grad():
            sae.W_dec.mul_(3**-0.5)  # the norm of entries drawn evenly from +-1 / sqrt(d)
            sae.W_enc.mul_(3**-0.5 * min(1.0, sae.config.d_in / sae.config.d_sae))

    @torch.no_grad()
    def start(self, x: Tensor) -> None:
        """Biases with which every latent fires in the same part of the rows."""
        config = self.sae.config
        share = min(TANH_FIRST_LATENTS / config.d_sae, FIRST_L0_SHARE)
        pre = self.sae.shifted(x) @ self.sae.W_enc
        level = pre.topk(max(1, round(share * len(pre))), dim=0).values[-1]
        self.sae.b_enc.copy_(TANH_FIRST_THRESHOLD - level)
        self.ranks.copy_first([self.sae.b_enc])

    def forward(self, x: Tensor, y: Tensor, batch: int, energy: Tensor, progress: float, dense: bool) -> Forward:
        """Dense always: the estimator's band and the pull take in most pre-activations."""
        sae, threshold = self.sae, self.beside["log_threshold"].exp()
        pre = torch.addmm(sae.b_enc, sae.shifted(x), sae.W_enc)
        z, _ = _Jump.apply(pre, threshold.expand_as(pre), TANH_BANDWIDTH)
        residual = y - sae.decode(z)
        norms = sae.decoder_norms()
        few = (z * norms * TANH_SCALE).tanh().sum() / batch
        pull = ((threshold - pre).relu() * norms).sum()
        fired = select(pre.detach(), Above(threshold.detach()))
        squared_error = residual.square().sum()
        return Forward(squared_error, squared_error.detach(), self._ramp(progress) * few * energy + PULL * pull, residual.detach(), fired)

    @torch.no_grad()
    def finished(self) -> Dictionary:
        sae = copy.deepcopy(self.sae)
        sae.threshold.copy_(self.beside["log_threshold"].exp())
        sae.with_unit_decoder()
        return sae


class Gated(Objective):
    def __init__(self, sae: Dictionary, sparsity_warmup: float, ranks: Ranks) -> None:
        super().__init__(sae, sparsity_warmup, ranks)
        # sae.b_enc is the gate's bias; the magnitude's is beside it.
        for name in ("log_stretch", "b_magnitude"):
            self.beside[name] = nn.Parameter(torch.zeros(sae.config.d_sae, device=sae.W_dec.device))

    def forward(self, x: Tensor, y: Tensor, batch: int, energy: Tensor, progress: float, dense: bool) -> Forward:
        sae = self.sae
        gate = self._encode(x, Above(x.new_zeros(())), dense)
        latent = gate.codes.latent.long()
        magnitude = ((gate.codes.value - sae.b_enc[latent]) * self.beside["log_stretch"].exp()[latent] + self.beside["b_magnitude"][latent]).relu()
        open_ = gate._replace(codes=gate.codes._replace(value=magnitude))
        error = self._error(open_, y, dense)
        frozen = (decode_error_plain if dense else decode_error)(gate, sae.W_dec.detach(), sae.b_dec.detach(), y, self.bounds, self.weights)
        penalty = self._ramp(progress) * gate.codes.value.sum()
        return Forward(error.weighted + frozen.weighted, error.of_prefixes[-1], penalty, error.residual, open_.codes)

    @torch.no_grad()
    def finished(self) -> Dictionary:
        sae = copy.deepcopy(self.sae)
        stretch, shift = self.beside["log_stretch"].exp(), self.beside["b_magnitude"]
        # pre + b_gate > 0 exactly where stretch * pre + b_magnitude > b_magnitude - stretch * b_gate
        sae.threshold.copy_((shift - stretch * sae.b_enc).clamp(min=0.0))
        sae.W_enc.mul_(stretch)
        sae.b_enc.copy_(shift)
        return sae


OBJECTIVES: dict[str, type[Objective]] = {
    "relu": Relu,
    "tied": Tied,
    "jumprelu": JumpRelu,
    "jumprelu-tanh": JumpReluTanh,
    "gated": Gated,
}
"""Those of the other architectures are `Objective`'s own."""


class _Jump(torch.autograd.Function):
    """(pre where it exceeds the threshold, whether it does), with the derivatives by the threshold of 2407.14435, eqs. 11 and 12."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
        active = (pre > threshold).to(pre.dtype)
        ctx.bandwidth = bandwidth
        ctx.save_for_backward(pre, threshold, active)
        return pre * active, active

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        d_value, d_active = gradients
        pre, threshold, active = ctx.saved_tensors
        near = ((pre - threshold).abs() < ctx.bandwidth / 2).to(pre.dtype)
        return d_value * active, -near / ctx.bandwidth * (threshold * d_value + d_active), None
