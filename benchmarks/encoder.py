"""The encoder with all four residual sites kept, as `hearsae cache` runs it for a clip that fills its window.

To be timed beside other implementations on the same windows.

From the project's root, beside openai-whisper (and transformers, where installed):

    python peers_encoder.py --checkpoint tiny.en.encoder.pt --threads 1 --ours benchmarks.encoder:make
"""

from collections.abc import Callable

import torch

from cache.encoder import best_arithmetic, encode
from cache.model import fast_matmul, load_model
from cache.sites import match_sites


def make(checkpoint: str) -> Callable[[torch.Tensor], dict[str, torch.Tensor]]:
    """A function from log-mel windows [batch, n_mels, 3000] to the residual stream after each block, site -> [batch, 1500, width]."""
    model = load_model(checkpoint, "cpu")
    encoder, arithmetic = model.module.get_submodule("encoder"), best_arithmetic(model.device)
    sites = [site.name for site in match_sites(["encoder.blocks.?"], model.dims_dict, model.has_decoder)]

    def run(mel: torch.Tensor) -> dict[str, torch.Tensor]:
        with fast_matmul():
            return encode(encoder, mel, sites, arithmetic=arithmetic)

    return run
