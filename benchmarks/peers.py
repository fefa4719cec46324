"""The SAE trainers of SAELens, sparsify and dictionary_learning, for the benchmarks that time them beside ours; and rows for all of them.

They are not dependencies of the project. What is installed takes part, in an environment that has hearsae's own dependencies too:

    pip install torch sae-lens eai-sparsify
    pip install --no-deps dictionary-learning zstandard

Duties of a training step, which decide what a comparison of times means:

| step of | AuxK | clips to norm 1 | unit decoder rows | radial gradient removed | dead latents | other |
|---|---|---|---|---|---|---|
| hearsae | where latents are dead | yes | after each step | yes | rows since fired | threshold, FVU, L0, loss followed; loss checked |
| SAELens | where latents are dead | yes | no: values times norms | no | steps since fired | firing frequencies, schedules |
| sparsify | none by default | no | before each step | yes | rows since fired | |
| dictionary_learning | where latents are dead | yes | after each step | yes | rows since fired | threshold (BatchTopK), schedule, loss read |

All use Adam. The matrix products of SAELens and dictionary_learning are dense in all three places (encoder, decoder, gradients); those of
sparsify and ours in the encoder alone. Each has its own loss and initial weights and a learning rate of its own, so after some steps their weights
differ; the number of latents kept, and with it the work, does not.
"""

import importlib
import importlib.util
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cache.location import location
from cache.store import ActivationStore
from sae.models import SaeConfig
from sae.stream import RowStream
from sae.train_config import TrainConfig
from sae.trainee import Trainee

Step = Callable[[Tensor], Any]
"""Trains on rows [batch, d_in]."""
NEVER = 1 << 62
"""Rows after which a latent is declared dead, where nobody shall compute an AuxK loss."""
PEER_LR = 3e-4
"""Of SAELens and sparsify; dictionary_learning chooses its own."""
SHUFFLE_SEED = 0


def use_threads(n: int) -> None:
    """For all that is imported after this: call it first."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ.setdefault(name, str(n))
    torch.set_num_threads(n)


def rows_from(store: str | None, site: str | None, npy: str | None, n: int) -> Tensor:
    """float32 [n or fewer, d]: shuffled rows of a store, or of a .npy file, centred and scaled so that mean ||x||^2 = d."""
    if npy:
        rows = torch.from_numpy(np.load(npy)).float()
        rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(SHUFFLE_SEED))[:n]]
    else:
        if not store or not site:
            raise SystemExit("give --store and --site, or --rows")
        opened = ActivationStore.open(location(store))
        with RowStream([opened], [site], batch=1) as stream:
            n = min(n, stream.rows)
        with RowStream([opened], [site], batch=n, seed=SHUFFLE_SEED) as stream:
            rows = next(stream).rows[site]
    rows = rows - rows.mean(0)
    return rows / rows.square().mean().sqrt()


def hearsae(arch: str, d_in: int, d_sae: int, k: int, batch: int) -> Step:
    """Ours, with no latent ever declared dead: within a short measurement the peers declare none either."""
    recipe = TrainConfig(store=(), site=(), out=Path(), dead_after=NEVER)
    return Trainee(SaeConfig(arch, d_in, d_sae, k), recipe, torch.device("cpu")).step


def saelens_trainer(arch: str, d_in: int, d_sae: int, k: int, batch: int, rows: int = 10**9, data: Any = ()) -> Any:
    """Its SAETrainer of a `topk` or `batchtopk` SAE; `fit` trains on so many rows that come from `data`, an iterator of batches."""
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes import batchtopk_sae, topk_sae
    from sae_lens.training.sae_trainer import SAETrainer

    sae_class, config_class = {
        "topk": (topk_sae.TopKTrainingSAE, topk_sae.TopKTrainingSAEConfig),
        "batchtopk": (batchtopk_sae.BatchTopKTrainingSAE, batchtopk_sae.BatchTopKTrainingSAEConfig),
    }[arch]
    sae = sae_class(config_class(d_in=d_in, d_sae=d_sae, k=k, device="cpu", dtype="float32"))
    config = SAETrainerConfig(total_training_samples=rows, train_batch_size_samples=batch, lr=PEER_LR, lr_end=PEER_LR / 10)
    return SAETrainer(config, sae, data)


def saelens(arch: str, d_in: int, d_sae: int, k: int, batch: int) -> Step:
    trainer = saelens_trainer(arch, d_in, d_sae, k, batch)
    return lambda x: trainer._train_step(trainer.sae, x)


def sparsify(d_in: int, d_sae: int, k: int, batch: int) -> Step:
    """A step of its trainer, which is tied to a language model, so the loop is here; with its Adam."""
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    from sparsify import SparseCoder, SparseCoderConfig

    sae = SparseCoder(d_in, SparseCoderConfig(num_latents=d_sae, k=k))
    optimizer = torch.optim.Adam(sae.parameters(), lr=PEER_LR)
    rows_since_fired = torch.zeros(d_sae, dtype=torch.int64)

    def step(x: Tensor) -> Tensor:
        sae.set_decoder_norm_to_unit_norm()
        out = sae(x)
        out.fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        fired = torch.zeros(d_sae, dtype=torch.bool)
        fired[out.latent_indices.flatten()] = True
        rows_since_fired.add_(batch).masked_fill_(fired, 0)
        return out.fvu

    return step


def dictionary_learning_config(arch: str, d_in: int, d_sae: int, k: int, steps: int) -> dict[str, Any]:
    """As its `trainSAE` takes it."""
    # It imports nnsight for its language-model buffers only.
    if "nnsight" not in sys.modules and importlib.util.find_spec("nnsight") is None:
        stub: Any = types.ModuleType("nnsight")
        stub.LanguageModel = object
        sys.modules["nnsight"] = stub
    module, trainer = {"topk": ("top_k", "TopKTrainer"), "batchtopk": ("batch_top_k", "BatchTopKTrainer")}[arch]
    trainer_class = getattr(importlib.import_module(f"dictionary_learning.trainers.{module}"), trainer)
    warmup = min(1000, steps // 10)
    return {
        "trainer": trainer_class,
        "steps": steps,
        "activation_dim": d_in,
        "dict_size": d_sae,
        "k": k,
        "layer": 0,
        "lm_name": "whisper",
        "device": "cpu",
        "warmup_steps": warmup,
    }


def dictionary_learning(arch: str, d_in: int, d_sae: int, k: int, batch: int) -> Step:
    config = dictionary_learning_config(arch, d_in, d_sae, k, 10**6)
    trainer = config.pop("trainer")(**config)
    count = [0]

    def step(x: Tensor) -> float:
        count[0] += 1  # never 0, where it computes a median
        return trainer.update(count[0], x)

    return step


CONTENDERS: dict[str, Callable[[int, int, int, int], Step]] = {
    "hearsae batchtopk": lambda *size: hearsae("batchtopk", *size),
    "hearsae topk": lambda *size: hearsae("topk", *size),
    "SAELens BatchTopK": lambda *size: saelens("batchtopk", *size),
    "SAELens TopK": lambda *size: saelens("topk", *size),
    "sparsify TopK, Adam": sparsify,
    "dictionary_learning BatchTopK": lambda *size: dictionary_learning("batchtopk", *size),
    "dictionary_learning TopK": lambda *size: dictionary_learning("topk", *size),
}
"""By name: what makes the step, from d_in, d_sae, k, batch."""


def ours_of(peer: str) -> str:
    """Which of ours a peer is compared with: the one that keeps the same latents."""
    return "hearsae batchtopk" if "batchtopk" in peer.lower() else "hearsae topk"


def products_are_exact() -> tuple[bool, float]:
    """Whether float32 products, at the precision in force, are float32; and their relative error against double precision."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(256, 384, generator=generator), torch.randn(384, 512, generator=generator)
    exact = a.double() @ b.double()
    error = float(((a @ b).double() - exact).norm() / exact.norm())
    return error < 1e-5, error
