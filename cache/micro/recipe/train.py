"""Trains micro from nothing on the training set."""

import json
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor
from whisper.model import ModelDimensions

from cache.errors import HearsaeError
from cache.micro.recipe.batches import IGNORE, Batch, Batches, Vocabulary
from cache.micro.recipe.forward import POSITIONS, LogMel, Outputs, Trainee
from cache.micro.recipe.synthesis import PHONES
from cache.micro.recipe.training_set import read_training_set

DIMS = ModelDimensions(
    n_mels=80, n_audio_ctx=POSITIONS, n_audio_state=96, n_audio_head=3, n_audio_layer=4,
    n_vocab=51864, n_text_ctx=448, n_text_state=96, n_text_head=3, n_text_layer=2,
)  # fmt: skip

WEIGHTS = {"tokens": 1.0, "phones": 0.3, "middle_phones": 0.7, "words": 1.0, "alignment": 0.2}
"""Of the losses. All but `tokens` are help for the start: they make a small model learn in an hour what takes the tokens alone many."""

SAVE_EVERY = 500
"""Steps between two states on disk, from which a run that was cut off goes on."""


@dataclass(frozen=True)
class Recipe:
    """What a training run is made of, beside its speech."""

    steps: int = 7500
    batch: int = 32
    lr: float = 3e-3
    warmup: int = 150
    hold: float = 0.15
    """Share of the steps before the cosine."""
    weight_decay: float = 0.05
    paddings: int = 10
    """K of the forward pass."""
    seed: int = 0


def train(speech: Path, out: Path, recipe: Recipe, processes: int, device: str) -> Path:
    """Trains on `processes` processes of one thread each, or one GPU. Writes out/log.jsonl and out/trainee.pt; goes on from there if cut off.

    Raises HearsaeError if `out` has the state of another recipe.
    """
    out.mkdir(parents=True, exist_ok=True)
    _check_same_recipe(out / "trainee.pt", recipe)
    _rendezvous(out).unlink(missing_ok=True)  # of a run that was cut off
    mp.spawn(_train_rank, (processes, speech, out, recipe, device), nprocs=processes)
    return out / "trainee.pt"


def _train_rank(rank: int, world: int, speech: Path, out: Path, recipe: Recipe, device: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{_rendezvous(out)}", rank=rank, world_size=world)
    _run(rank, world, speech, out, recipe, torch.device(device))
    dist.destroy_process_group()


def _rendezvous(out: Path) -> Path:
    return (out / "rendezvous").resolve()


def _run(rank: int, world: int, speech: Path, out: Path, recipe: Recipe, device: torch.device) -> None:
    torch.manual_seed(recipe.seed)
    vocabulary = Vocabulary()
    batches = Batches(read_training_set(speech), vocabulary, recipe.batch, recipe.steps, recipe.seed)
    model = Trainee(DIMS, len(vocabulary.used), len(PHONES), len(batches.word_index)).to(device)
    log_mel = LogMel().to(device)
    optimizers = _optimizers(model, recipe)
    first = _resume(out / "trainee.pt", model, optimizers)
    progress = _Progress(out / "log.jsonl", recipe.steps) if rank == 0 else None
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for step in range(first, recipe.steps):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, recipe)
        batch = batches(step, rank, world).to(device)
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
        paddings = torch.randint(batch.frames, POSITIONS, (recipe.paddings,), generator=generator).to(device)
        outputs = model(log_mel(batch.samples, batch.warp, batch.equaliser), batch.frames, paddings, batch.tokens, batch.chopped)
        parts = losses(outputs, batch)
        loss = torch.stack([WEIGHTS[name] * part for name, part in parts.items()]).sum()
        model.zero_grad()
        loss.backward()
        _average_gradients(parameters, world)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        model.hold_unused_logits()
        if progress:
            progress.add(step, {**parts, **accuracies(outputs, batch)})
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == recipe.steps:
                _save(out / "trainee.pt", model, optimizers, step + 1, vocabulary, recipe)


def losses(outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
    """Cross-entropies of tokens, phones and words, and minus the log attention on the frames in which a token is said. Means over what counts."""

    def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)

    said = batch.spans.any(-1)
    on_word = outputs.alignment[..., : batch.frames].masked_fill(~batch.spans, -1e9).logsumexp(-1)
    return {
        "tokens": cross_entropy(outputs.tokens, batch.targets),
        "phones": cross_entropy(outputs.phones, batch.phones),
        "middle_phones": cross_entropy(outputs.middle_phones, batch.phones),
        "words": cross_entropy(outputs.words, batch.words),
        "alignment": -on_word[said].mean(),
    }


@torch.no_grad()
def accuracies(outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
    asked = batch.targets != IGNORE
    spoken = batch.phones > 0
    return {
        "token_accuracy": (outputs.tokens.argmax(-1) == batch.targets)[asked].float().mean(),
        "phone_accuracy": (outputs.middle_phones.argmax(-1) == batch.phones)[spoken].float().mean(),
        "word_accuracy": (outputs.words.argmax(-1) == batch.words)[batch.words > 0].float().mean(),
    }


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, constant, then a cosine to a hundredth."""
    done = max(0.0, step / recipe.steps - recipe.hold) / (1 - recipe.hold)
    return recipe.lr * min(1.0, (step + 1) / recipe.warmup) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def _optimizers(model: Trainee, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices (ahead of AdamW alone from the first hundred steps on), AdamW for all else."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    matrices = {name: parameter for name, parameter in trained.items() if parameter.ndim == 2 and ".blocks." in name}
    decayed = [parameter for name, parameter in trained.items() if parameter.ndim > 1 and name not in matrices and name != "embedding"]
    rest = [parameter for name, parameter in trained.items() if parameter.ndim <= 1 or name == "embedding"]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return [
        torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.98), fused=True),
        torch.optim.Muon(list(matrices.values()), lr=recipe.lr, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"),
    ]


def _average_gradients(parameters: list[torch.nn.Parameter], world: int) -> None:
    if world == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= world
    for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def _save(path: Path, model: Trainee, optimizers: list[torch.optim.Optimizer], step: int, vocabulary: Vocabulary, recipe: Recipe) -> None:
    state: dict[str, Any] = {"model": model.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in optimizers]}
    state |= {"step": step, "used": vocabulary.used, "recipe": asdict(recipe)}
    torch.save(state, f"{path}.partial")
    os.replace(f"{path}.partial", path)


def _check_same_recipe(path: Path, recipe: Recipe) -> None:
    if path.exists() and torch.load(path, map_location="cpu", weights_only=True).get("recipe") != asdict(recipe):
        raise HearsaeError(f"{path} is the state of another recipe: remove it, or choose another --work")


def _resume(path: Path, model: Trainee, optimizers: list[torch.optim.Optimizer]) -> int:
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return int(state["step"])


class _Progress:
    """A line of log for every 50 steps: means of what was added."""

    EVERY = 50

    def __init__(self, path: Path, steps: int) -> None:
        self.path, self.steps, self.start = path, steps, time.perf_counter()
        self.sums: dict[str, float] = {}

    def add(self, step: int, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value.detach()) / self.EVERY
        if (step + 1) % self.EVERY == 0:
            self._write(step + 1)
            self.sums = {}

    def _write(self, step: int) -> None:
        row: dict[str, Any] = {"step": step, "minutes": round((time.perf_counter() - self.start) / 60, 2)}
        row |= {name: round(value, 4) for name, value in self.sums.items()}
        with open(self.path, "a") as log:
            log.write(json.dumps(row) + "\n")
        print(f"step {step} of {self.steps}", " ".join(f"{name} {value}" for name, value in row.items() if name != "step"), flush=True)
