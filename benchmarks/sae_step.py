"""One training step of ours, with all its duties, to be timed beside other trainers' steps on the same rows.

Duties: encode, exact batch top-k, decode, gradients, AuxK where latents are dead, removal of the radial decoder gradient,
clipping, Adam, unit decoder norms, dead-latent and threshold tracking.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from sae.models import SaeConfig
from sae.train_config import TrainConfig
from sae.trainee import Trainee


def make(d_in: int, d_sae: int, k: int, batch: int) -> Callable[[torch.Tensor], float]:
    """A function that trains on float32 rows [batch, d_in], centred and of mean squared norm d_in, and returns the loss."""
    recipe = TrainConfig(store=(), site=(), out=Path())
    trainee = Trainee(SaeConfig("batchtopk", d_in, d_sae, k), recipe, torch.device("cpu"))
    return trainee.step
