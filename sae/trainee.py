"""`Trainee`: one SAE in training, with its optimiser, its counters and its step."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn

from cache.errors import HearsaeError
from sae import kernels
from sae.checkpoint import State
from sae.models import ONE_THRESHOLD, WITH_AUX, WITH_K, Dictionary, SaeConfig
from sae.objectives import DENSE_SHARE, OBJECTIVES, SPARSITY_WARMUP, Objective
from sae.ranks import ALONE, Ranks
from sae.selection import SparseRows, on_kernels

DECODER_TURN = 0.08
"""Default learning rate times sqrt(d_in): about the angle in radians by which a step of Adam turns a unit decoder row. On tiny.en's
block 2 (d_sae 3072, k 32, 1 M rows) 0.047, 0.067, 0.094 and 0.19 gave test FVU 0.211, 0.192, 0.177 and 0.165; 0, 0, 0.3 and 30 % dead."""
RUNNING_DECAY = 0.9
"""Of the running means of threshold, FVU and L0: they follow about the last ten batches."""
START_ROWS = 1024
"""Rows from which an objective may set its first thresholds."""


class Recipe(Protocol):
    """What of a `TrainConfig` a step depends on."""

    @property
    def lr(self) -> float | None: ...
    @property
    def aux(self) -> float: ...
    @property
    def rows_until_dead(self) -> int: ...
    @property
    def clip_norm(self) -> float: ...
    @property
    def sparsity_warmup(self) -> float | None: ...
    @property
    def precision(self) -> str: ...


class Trainee:
    """One SAE in training, on rows that are centred and scaled so that mean ||x||^2 = d_in."""

    def __init__(self, sae: SaeConfig, recipe: Recipe, device: torch.device, ranks: Ranks = ALONE) -> None:
        self.recipe = recipe
        self.ranks = ranks
        self.sae = Dictionary(sae)
        self.sae.init_parameters(torch.Generator().manual_seed(sae.seed))
        self.sae.to(device)
        warmup = SPARSITY_WARMUP.get(sae.arch, 0.0) if recipe.sparsity_warmup is None else recipe.sparsity_warmup
        self.objective = OBJECTIVES.get(sae.arch, Objective)(self.sae, warmup, ranks)
        self.parameters = self.objective.parameters()
        self.autocast = device.type == "cuda" and recipe.precision != "fp32"
        self.lr = recipe.lr or DECODER_TURN / math.sqrt(sae.d_in)
        self._updated = [in_order_of_memory(parameter) for parameter in self.parameters]
        self.optimizer = torch.optim.Adam(self._updated, lr=self.lr, betas=self.objective.betas, fused=True)
        self.rows_since_fired = torch.zeros(sae.d_sae, dtype=torch.int64, device=device)
        self.running = dict.fromkeys(("weight", "threshold", "loss", "fvu", "l0", "aux_loss"), 0.0)
        """Exponential sums; divided by `weight` they are running means without the bias of starting at 0."""

    def step(self, x: Tensor, y: Tensor | None = None, rate: float = 1.0, progress: float = 1.0) -> float:
        """One step on this rank's part of the batch, x [rows, d_in] and, if that is not x itself, what to reconstruct, y [rows, d_out].

        Every rank's loss is its share of that of the batch, so gradients, like losses, are sums over ranks.
        rate: times the learning rate. progress: part of the run that lies behind. Returns the loss of the batch.
        """
        sae, recipe, ranks = self.sae, self.recipe, self.ranks
        y = x if y is None else y
        energy, n_rows = torch.linalg.vector_norm(y).square(), torch.tensor(len(x), device=x.device)
        ranks.sum(energy, n_rows)
        batch = int(n_rows)
        if not self.running["weight"]:
            self.objective.start(x[:START_ROWS])
        with _autocast(self.autocast):
            forward = self.objective.forward(x, y, batch, energy, progress, self._fires_densely)
        fvu = forward.squared_error.detach() / energy
        aux = self._aux_loss(x, forward.residual)
        loss = (forward.error + forward.penalty) / energy + recipe.aux * aux
        batch_loss = self._count(forward.fired, batch, loss, fvu, aux)
        if not math.isfinite(batch_loss):
            raise HearsaeError(f"training on {sae.config.site} diverged (its loss is not finite): use a lower learning rate than {self.lr:g}")

        for parameter in self.parameters:
            parameter.grad = None
        loss.backward()
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        ranks.sum(*gradients)
        if self.objective.unit_decoder:
            self._keep_decoder_gradient_tangent()
        norm = torch.nn.utils.get_total_norm(gradients)
        if norm.is_cuda or norm > recipe.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, recipe.clip_norm, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * rate
        for updated, parameter in zip(self._updated, self.parameters, strict=True):
            updated.grad = parameter.grad.t() if updated is not parameter and parameter.grad is not None else parameter.grad
        self.optimizer.step()
        if self.objective.unit_decoder:
            self._make_decoder_unit()
        return batch_loss

    @property
    def _fires_densely(self) -> bool:
        """At the start, and as long as most latents fire: then dense products are the quicker ones."""
        sae = self.sae.config
        return sae.arch not in WITH_K and (not self.running["weight"] or self.mean("l0") > DENSE_SHARE * sae.d_sae)

    def _aux_loss(self, x: Tensor, residual: Tensor) -> Tensor:
        """AuxK (2406.04093, A.2): how much of the residual the d_in / 2 strongest dead latents of each row leave unexplained."""
        dead = torch.nonzero(self.rows_since_fired >= self.recipe.rows_until_dead)[:, 0]
        if not len(dead) or not self.recipe.aux or self.sae.config.arch not in WITH_AUX:
            return x.new_zeros(())
        sae = self.sae
        pre = (x if sae.config.target else x - sae.b_dec.detach()) @ sae.W_enc[:, dead] + sae.b_enc[dead]
        top = pre.topk(min(max(1, sae.config.d_in // 2), len(dead)), dim=1, sorted=False)
        z = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
        unexplained = residual.square().sum()
        self.ranks.sum(unexplained)
        return (residual - z @ sae.W_dec[dead]).square().sum() / unexplained

    @torch.no_grad()
    def _keep_decoder_gradient_tangent(self) -> None:
        """Takes from the decoder's gradient what would only change norms, which stay 1; of a crosscoder the sum of its sites' norms."""
        W_dec, grad = self.sae.W_dec, self.sae.W_dec.grad
        assert grad is not None
        if on_kernels(W_dec) and not self.sae.config.widths:
            W, g = W_dec.detach().numpy(), grad.numpy()
            kernels.spread(lambda first, last: kernels.make_tangent(W, g, first, last), len(W))
        else:
            parts = W_dec.split(self.sae.config.widths or W_dec.shape[1], dim=1)
            normal = torch.cat([torch.nn.functional.normalize(part, dim=1) for part in parts], dim=1)
            grad -= (grad * normal).sum(1, keepdim=True) * normal / len(parts)

    @torch.no_grad()
    def _make_decoder_unit(self) -> None:
        if on_kernels(self.sae.W_dec) and not self.sae.config.widths:
            W = self.sae.W_dec.detach().numpy()
            kernels.spread(lambda first, last: kernels.make_unit(W, first, last), len(W))
        else:
            self.sae.normalize_decoder()

    @torch.no_grad()
    def _count(self, codes: SparseRows, batch: int, loss: Tensor, fvu: Tensor, aux: Tensor) -> float:
        """Which latents fired, and the running means, both over all ranks. Returns the loss of the batch."""
        latent, value = codes.latent, codes.value
        if self.sae.config.arch not in WITH_K:
            latent, value = latent[value > 0], value[value > 0]
        fired = torch.zeros(self.sae.config.d_sae, device=value.device)
        fired[latent.long()] = 1.0
        self.ranks.sum(fired)
        self.rows_since_fired += batch
        self.rows_since_fired[fired > 0] = 0
        smallest = value.min() if len(value) else loss.new_tensor(math.inf)
        number = loss.new_tensor(len(value), dtype=torch.float64)
        of_ranks = self.ranks.table(torch.stack([value.double() for value in (loss, fvu, aux, number, smallest)]))
        (batch_loss, fvu_sum, aux_sum, kept, _), smallest_of_all = of_ranks.sum(0).tolist(), float(of_ranks[:, 4].min())
        seen = {
            "weight": 1.0,
            "threshold": smallest_of_all if kept else 0.0,
            "loss": batch_loss,
            "fvu": fvu_sum,
            "l0": kept / batch,
            "aux_loss": aux_sum,
        }
        self.running = {name: RUNNING_DECAY * self.running[name] + (1 - RUNNING_DECAY) * value for name, value in seen.items()}
        return batch_loss

    def mean(self, name: str) -> float:
        """Running mean of `loss`, `fvu`, `l0`, `aux_loss` or `threshold` (the smallest value kept in a batch)."""
        return self.running[name] / (self.running["weight"] or 1.0)

    @property
    def dead_fraction(self) -> float:
        """Part of the latents that did not fire in the last `rows_until_dead` rows."""
        return float((self.rows_since_fired >= self.recipe.rows_until_dead).double().mean())

    def scalars(self, rate: float) -> dict[str, float]:
        """What is logged."""
        return {name: self.mean(name) for name in ("loss", "fvu", "l0", "aux_loss")} | {"dead": self.dead_fraction, "lr": self.lr * rate}

    def dictionary(self, rows: int) -> Dictionary:
        """What was learnt from so many rows, for centred and scaled rows, with the inference threshold of BatchTopK (2412.06410)."""
        sae = self.objective.finished()
        if sae.config.arch in ONE_THRESHOLD:
            sae.threshold.fill_(self.mean("threshold"))
        sae.config = replace(sae.config, rows=rows)
        return sae

    def state(self) -> State:
        """Everything that the next step depends on."""
        tensors = {f"sae.{name}": tensor for name, tensor in self.sae.state_dict().items()} | {"rows_since_fired": self.rows_since_fired}
        tensors |= {f"beside.{name}": parameter.detach() for name, parameter in self.objective.beside.items()}
        for number, of_parameter in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{name}": tensor for name, tensor in of_parameter.items()}
        return State(tensors, self.running)

    @torch.no_grad()
    def load_state(self, state: State) -> None:
        """Takes up what `state` gave."""
        tensors = state.tensors
        self.sae.load_state_dict({name: tensors[f"sae.{name}"] for name in self.sae.state_dict()})
        self.rows_since_fired.copy_(tensors["rows_since_fired"])
        for name, parameter in self.objective.beside.items():
            parameter.copy_(tensors[f"beside.{name}"])
        self.running = dict(state.running)
        for number, parameter in enumerate(self._updated):
            moments = {name: torch.zeros_like(parameter).copy_(tensors[f"optimizer.{number}.{name}"]) for name in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[parameter] = {"step": tensors[f"optimizer.{number}.step"].to(parameter.device), **moments}


def in_order_of_memory(parameter: nn.Parameter) -> nn.Parameter:
    """The same memory as a contiguous parameter, the transpose where that is it: the fused optimiser would copy another."""
    return parameter if parameter.is_contiguous() else nn.Parameter(parameter.detach().t())


@contextmanager
def _autocast(on: bool) -> Iterator[None]:
    """Matrix products of a GPU in bfloat16."""
    if not on:
        yield
        return
    with torch.autocast("cuda", torch.bfloat16):
        yield
