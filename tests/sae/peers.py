"""Runs in the peers' interpreter (HEARSAE_PEERS), which has SAELens, dictionary_learning and sparsify, and not hearsae.

    peers.py load FORMAT FOLDER ROWS OUT        codes and reconstruction of ROWS by what FOLDER holds, as their own loader reads it
    peers.py make FORMAT ARCH FOLDER ROWS OUT   makes one there with their own classes, saved as they save it, and gives its codes and reconstruction

ROWS: .npy [n, d_in]. OUT: .npz of z [n, d_sae], x_hat [n, d_out].
"""

import json
import sys
import types
from pathlib import Path

import numpy as np
import torch

nnsight = types.ModuleType("nnsight")  # dictionary_learning imports it for its language models only
nnsight.LanguageModel = object
sys.modules["nnsight"] = nnsight

D_IN, D_OUT, D_SAE, K = 12, 9, 40, 5


def load_saelens(folder):
    from sae_lens import SAE

    return SAE.load_from_disk(folder)


def load_dictionary_learning(folder):
    from dictionary_learning.utils import load_dictionary

    return load_dictionary(folder, "cpu")[0]


def load_sparsify(folder):
    from sparsify import SparseCoder

    return SparseCoder.load_from_disk(folder)


def run(sae, x):
    if hasattr(sae, "num_latents"):  # sparsify
        found = sae.encode(x)
        z = torch.zeros(len(x), sae.num_latents).scatter(1, found.top_indices, found.top_acts)
        return z, sae.decode(found.top_acts, found.top_indices)
    z = sae.encode(x)
    return z, sae.decode(z)


def randomise(sae):
    """Every parameter, with norms of decoder rows that are not 1; thresholds that make a difference."""
    generator = torch.Generator().manual_seed(5)
    for name, tensor in sae.state_dict().items():
        if name == "threshold":
            tensor.copy_(torch.linspace(-0.5, 3.0, D_SAE) if tensor.dim() else torch.tensor(1.5))
        elif tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.7)


def make_saelens(arch, folder):
    from sae_lens.saes import gated_sae, jumprelu_sae, standard_sae, topk_sae, transcoder

    sizes = {"d_in": D_IN, "d_sae": D_SAE}
    sae = {
        "standard": lambda: standard_sae.StandardSAE(standard_sae.StandardSAEConfig(**sizes)),
        "standard-unshifted": lambda: standard_sae.StandardSAE(standard_sae.StandardSAEConfig(**sizes, apply_b_dec_to_input=False)),
        "layer-norm": lambda: standard_sae.StandardSAE(standard_sae.StandardSAEConfig(**sizes, normalize_activations="layer_norm")),
        "topk": lambda: topk_sae.TopKSAE(topk_sae.TopKSAEConfig(**sizes, k=K)),
        "topk-rescaled": lambda: topk_sae.TopKSAE(topk_sae.TopKSAEConfig(**sizes, k=K, rescale_acts_by_decoder_norm=True)),
        "jumprelu": lambda: jumprelu_sae.JumpReLUSAE(jumprelu_sae.JumpReLUSAEConfig(**sizes)),
        "gated": lambda: gated_sae.GatedSAE(gated_sae.GatedSAEConfig(**sizes)),
        "transcoder": lambda: transcoder.Transcoder(transcoder.TranscoderConfig(**sizes, d_out=D_OUT, apply_b_dec_to_input=False)),
        "jumprelu_transcoder": lambda: transcoder.JumpReLUTranscoder(
            transcoder.JumpReLUTranscoderConfig(**sizes, d_out=D_OUT, apply_b_dec_to_input=False)
        ),
        "skip_transcoder": lambda: transcoder.SkipTranscoder(transcoder.SkipTranscoderConfig(**sizes, d_out=D_OUT, apply_b_dec_to_input=False)),
    }[arch]()
    randomise(sae)
    sae.save_model(folder)
    return sae


def make_dictionary_learning(arch, folder):
    from dictionary_learning import dictionary
    from dictionary_learning.trainers import batch_top_k, matryoshka_batch_top_k, top_k

    sae = {
        "AutoEncoder": lambda: dictionary.AutoEncoder(D_IN, D_SAE),
        "AutoEncoderNew": lambda: dictionary.AutoEncoderNew(D_IN, D_SAE),
        "AutoEncoderTopK": lambda: top_k.AutoEncoderTopK(D_IN, D_SAE, K),
        "BatchTopKSAE": lambda: batch_top_k.BatchTopKSAE(D_IN, D_SAE, K),
        "MatryoshkaBatchTopKSAE": lambda: matryoshka_batch_top_k.MatryoshkaBatchTopKSAE(D_IN, D_SAE, K, [10, 30]),
        "JumpReluAutoEncoder": lambda: dictionary.JumpReluAutoEncoder(D_IN, D_SAE),
        "GatedAutoEncoder": lambda: dictionary.GatedAutoEncoder(D_IN, D_SAE),
    }[arch]()
    randomise(sae)
    Path(folder).mkdir()
    torch.save(sae.state_dict(), Path(folder, "ae.pt"))  # as its training saves it
    config = {"trainer": {"dict_class": arch, "activation_dim": D_IN, "dict_size": D_SAE, "k": K, "lm_name": "x", "layer": 3}}
    Path(folder, "config.json").write_text(json.dumps(config))
    return load_dictionary_learning(folder)


def make_sparsify(arch, folder):
    from sparsify import SparseCoder, SparseCoderConfig

    settings = {"topk": {}, "transcoder": {"transcode": True}, "skip": {"skip_connection": True}, "groupmax": {"activation": "groupmax"}}[arch]
    sae = SparseCoder(D_IN, SparseCoderConfig(num_latents=D_SAE, k=K, **settings))
    randomise(sae)
    sae.save_to_disk(folder)
    return sae


def main(action, form, *rest):
    if action == "load":
        folder, rows, out = rest
        sae = globals()[f"load_{form}"](folder)
    else:
        arch, folder, rows, out = rest
        sae = globals()[f"make_{form}"](arch, folder)
    z, x_hat = run(sae, torch.from_numpy(np.load(rows)))
    np.savez(out, z=z.numpy(), x_hat=x_hat.numpy())


if __name__ == "__main__":
    with torch.no_grad():
        for line in sys.stdin.read().splitlines():  # importing them takes seconds: many calls, one interpreter
            main(*json.loads(line))
