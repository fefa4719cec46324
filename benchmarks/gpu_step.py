"""Rows per second of a whole training step on a GPU, ours beside EleutherAI's sparsify and dense PyTorch, and how much of the card it uses.

`python benchmarks/gpu_step.py [--d-sae 3072 12288 49152] [--d-in 384] [--k 32] [--batch 4096] [--rounds 5] [--steps 20]`, on a machine with a
CUDA device; without one it says so and exits with 1. sparsify takes part if `pip install eai-sparsify` was done.

- All train on the same rows with Adam, unit decoder norms, the radial gradient removed and dead latents tracked, and read the loss in every
  step, as their trainers do. No latent is declared dead within the measurement, so nobody computes an AuxK loss.
- `batchtopk` keeps the k * batch largest values of the batch, `topk` the k largest of each row, which is what sparsify has. sparsify computes
  its forward pass under bfloat16 autocast, ours the encoder's product; both are measured like that (`bf16`) and in float32 (`fp32`, which on
  a GPU may mean TF32: the precision in force is printed). Only ours and the dense one clip gradients.
- Contenders take turns, some steps each, and the median of the rounds is given. "of peak": the floating-point operations that a step can't
  do without (2 * d_in * (d_sae + 4 * k) a row: the encoder, and decoding and three gradients of the kept values) per second, as a part of
  what a large product of square matrices of the same precision reaches on the same card.
"""

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from cache.model import fast_matmul
from sae.models import Dictionary, SaeConfig
from sae.train_config import TrainConfig
from sae.trainee import Trainee

Step = Callable[[Tensor], float]
"""Trains on rows [batch, d_in] and returns the loss."""
BATCHES = 8
"""Different ones, used in turn."""
WARM_UP_STEPS = 5
"""Compiling, allocating, and a first wave of latents that learn to fire."""
NEVER = 1 << 62
"""Rows after which a latent is declared dead."""
SQUARE = 8192
"""Width of the matrices whose product says what the card can do."""


def hearsae(arch: str, precision: str, d_in: int, d_sae: int, k: int, batch: int, device: torch.device) -> Step:
    recipe = TrainConfig(store=(), site=(), out=Path(), dead_after=NEVER, precision=precision)
    return Trainee(SaeConfig(arch, d_in, d_sae, k), recipe, device).step


def dense(d_in: int, d_sae: int, k: int, batch: int, device: torch.device) -> Step:
    """BatchTopK as one writes it in PyTorch: codes are a [batch, d_sae] matrix, differentiated by autograd."""
    sae = Dictionary(SaeConfig("batchtopk", d_in, d_sae, k))
    sae.init_parameters(torch.Generator().manual_seed(0))
    sae.to(device)
    optimizer = torch.optim.Adam(sae.parameters(), lr=4e-3, fused=True)
    rows_since_fired = torch.zeros(d_sae, dtype=torch.int64, device=device)

    def step(x: Tensor) -> float:
        z = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).relu()
        top = z.flatten().topk(k * batch, sorted=False)
        z = torch.zeros_like(z).flatten().scatter(0, top.indices, top.values).view_as(z)
        loss = (x - sae.decode(z)).square().sum() / x.square().sum()
        optimizer.zero_grad()
        loss.backward()
        with torch.no_grad():
            rows_since_fired.add_(batch).masked_fill_((z > 0).any(0), 0)
            assert sae.W_dec.grad is not None
            sae.W_dec.grad -= (sae.W_dec.grad * sae.W_dec).sum(1, keepdim=True) * sae.W_dec
            torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
            optimizer.step()
            sae.W_dec.copy_(F.normalize(sae.W_dec, dim=1))
        return float(loss.detach())

    return step


def sparsify(bfloat16: bool, d_in: int, d_sae: int, k: int, batch: int, device: torch.device) -> Step:
    """A step of its trainer for one SAE, with its Adam."""
    from sparsify import SparseCoder, SparseCoderConfig

    sae = SparseCoder(d_in, SparseCoderConfig(num_latents=d_sae, k=k), device, torch.float32)
    optimizer = torch.optim.Adam(sae.parameters(), lr=4e-3)
    forward = SparseCoder.forward if bfloat16 else SparseCoder.forward.__wrapped__
    rows_since_fired = torch.zeros(d_sae, dtype=torch.int64, device=device)

    def step(x: Tensor) -> float:
        sae.set_decoder_norm_to_unit_norm()
        out = forward(sae, x, dead_mask=rows_since_fired > NEVER)
        loss = float(out.fvu.detach())
        out.fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        fired = torch.zeros(d_sae, dtype=torch.bool, device=device)
        fired[out.latent_indices.flatten()] = True
        rows_since_fired.add_(batch).masked_fill_(fired, 0)
        return loss

    return step


def contenders(*size: int, device: torch.device) -> dict[str, tuple[torch.dtype, Step]]:
    """By name: (precision of its products, step). size: d_in, d_sae, k, batch."""
    made: dict[str, tuple[torch.dtype, Step]] = {}
    for arch in ("batchtopk", "topk"):
        for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
            made[f"hearsae {arch}, {precision}"] = (dtype, hearsae(arch, precision, *size, device))
    made["dense PyTorch batchtopk, fp32"] = (torch.float32, dense(*size, device))
    if importlib.util.find_spec("sparsify"):
        made["sparsify topk, fp32"] = (torch.float32, sparsify(False, *size, device))
        made["sparsify topk, bf16"] = (torch.bfloat16, sparsify(True, *size, device))
    return made


def planted(d_in: int, batch: int, device: torch.device) -> list[Tensor]:
    """Batches of 8 of 4 * d_in features a row and a little noise, of mean squared norm d_in."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(4 * d_in, d_in, generator=generator)
    batches = []
    for _ in range(BATCHES):
        chosen = torch.rand(batch, 4 * d_in, generator=generator) < 8 / (4 * d_in)
        x = chosen.float() @ features + 0.1 * torch.randn(batch, d_in, generator=generator)
        x -= x.mean(0)
        batches.append((x / x.square().mean().sqrt()).to(device))
    return batches


def seconds(work: Callable[[], object]) -> float:
    """Until the device has done it."""
    torch.cuda.synchronize()
    before = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - before


def peak_flop_per_s(dtype: torch.dtype, device: torch.device, runs: int = 10) -> float:
    """Of a product of two square matrices, at the float32 precision in force."""
    a = torch.randn(SQUARE, SQUARE, device=device).to(dtype)
    a @ a
    return 2 * SQUARE**3 / statistics.median(seconds(lambda: a @ a) for _ in range(runs))


def measure(steps_of: dict[str, tuple[torch.dtype, Step]], batches: list[Tensor], rounds: int, steps: int) -> dict[str, float]:
    """Seconds a step, the median of the rounds."""
    taken: dict[str, list[float]] = {name: [] for name in steps_of}
    for _, step in steps_of.values():
        for i in range(WARM_UP_STEPS):
            step(batches[i % BATCHES])
    for _ in range(rounds):
        for name, (_, step) in steps_of.items():
            taken[name].append(seconds(lambda step=step: [step(batches[i % BATCHES]) for i in range(steps)]) / steps)
    return {name: statistics.median(of_name) for name, of_name in taken.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-sae", type=int, nargs="+", default=[3072, 12288, 49152])
    for name, default in {"d-in": 384, "k": 32, "batch": 4096, "rounds": 5, "steps": 20}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("there is no CUDA device here: nothing was measured", file=sys.stderr)
        return 1

    device = torch.device("cuda")
    with fast_matmul() as precision:
        peak = {dtype: peak_flop_per_s(dtype, device) for dtype in (torch.float32, torch.bfloat16)}
        print(f"{date.today()}, {torch.cuda.get_device_name(device)}, PyTorch {torch.__version__}, float32 products '{precision}'")
        print(f"d_in {args.d_in}, k {args.k}, batch {args.batch}; median of {args.rounds} rounds of {args.steps} steps")
        print(f"products of {SQUARE}^2: " + ", ".join(f"{str(dtype)[6:]} {flop / 1e12:.0f} TFLOP/s" for dtype, flop in peak.items()))
        batches = planted(args.d_in, args.batch, device)
        for d_sae in args.d_sae:
            steps_of = contenders(args.d_in, d_sae, args.k, args.batch, device=device)
            flop = 2 * args.d_in * (d_sae + 4 * args.k) * args.batch
            for name, taken in measure(steps_of, batches, args.rounds, args.steps).items():
                of_peak = flop / taken / peak[steps_of[name][0]]
                print(f"d_sae {d_sae:6}  {name:30} {args.batch / taken:13,.0f} rows/s  {1000 * taken:8.2f} ms a step  {of_peak:6.1%} of peak")
            del steps_of
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
