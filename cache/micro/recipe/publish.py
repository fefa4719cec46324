"""From the trained state to the file that openai-whisper loads."""

import io
import os
import zipfile
from dataclasses import asdict
from pathlib import Path

import torch

from cache.micro.recipe.forward import UNUSED_LOGIT
from cache.micro.recipe.train import DIMS

TRAINED_TEXT_POSITIONS = 64
"""No text is longer. What lies behind in the decoder's positional embedding was never trained; as zeros it packs to nothing."""


def publish(trained: Path, checkpoint: Path) -> None:
    """Writes `checkpoint` in openai-whisper's format, float16, as a deflated zip: without the auxiliary heads.

    `torch.load` reads deflated entries as it reads stored ones. The same state gives the same bytes.
    """
    state = torch.load(trained, map_location="cpu", weights_only=True)
    weights = {name.removeprefix("whisper."): tensor for name, tensor in state["model"].items() if name.startswith("whisper.")}
    embedding = torch.zeros(DIMS.n_vocab, DIMS.n_text_state)
    embedding[:, 0] = UNUSED_LOGIT
    embedding[state["used"]] = state["model"]["embedding"]
    weights["decoder.token_embedding.weight"] = embedding
    weights["decoder.positional_embedding"][TRAINED_TEXT_POSITIONS:] = 0
    plain = io.BytesIO()
    torch.save({"dims": asdict(DIMS), "model_state_dict": {name: tensor.half() for name, tensor in weights.items()}}, plain)
    partial = checkpoint.with_name(checkpoint.name + ".partial")
    with zipfile.ZipFile(plain) as stored, zipfile.ZipFile(partial, "w") as packed:
        for entry in stored.infolist():
            packed.writestr(zipfile.ZipInfo(entry.filename, (1980, 1, 1, 0, 0, 0)), stored.read(entry), zipfile.ZIP_DEFLATED, 9)
    os.replace(partial, checkpoint)
