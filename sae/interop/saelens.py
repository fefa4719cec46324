"""SAELens: a folder with cfg.json and sae_weights.safetensors, as `sae_lens.SAE.load_from_disk` reads it (format of its version 6).

z = act((x - b_dec) @ W_enc + b_enc)        x_hat = z @ W_dec + b_dec        (b_dec in z only with apply_b_dec_to_input)
"""

from typing import Any

import torch
from torch import Tensor

from cache.errors import HearsaeError
from cache.location import Location
from sae.interop.parts import (
    OURS,
    Named,
    State,
    Weights,
    dictionary_of,
    gated,
    json_bytes,
    our_config,
    read_json,
    read_safetensors,
    safetensors_bytes,
    shifted,
    whole,
)
from sae.models import Dictionary

CONFIG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"
CONFIG_VERSION = "6.0.0"
"""Of SAELens: the first whose configs look like this; it rewrites what is older or does not say."""
SAES = {"topk": "topk", "relu": "standard", "tied": "standard"}
"""arch -> SAELens's name; all others are values above thresholds."""
TRANSCODERS = {"relu": "transcoder", "tied": "transcoder"}
READS = ("standard", "topk", "jumprelu", "gated", "transcoder", "jumprelu_transcoder")


def files(dictionary: Dictionary) -> dict[str, bytes]:
    """Raises HearsaeError for a TopK transcoder, which SAELens does not have."""
    config = dictionary.config
    transcodes = config.kind == "transcoder"
    if transcodes and config.arch == "topk":
        raise HearsaeError("SAELens has no TopK transcoder: use --format sparsify, which has those of one width")
    architecture = TRANSCODERS.get(config.arch, "jumprelu_transcoder") if transcodes else SAES.get(config.arch, "jumprelu")
    metadata = {"sae_lens_version": CONFIG_VERSION, "sae_lens_training_version": None, "hook_name": config.site, OURS: our_config(config)}
    settings: dict[str, Any] = {
        "architecture": architecture,
        "d_in": config.d_in,
        "d_sae": config.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": not transcodes,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": metadata,
    }
    if transcodes:
        settings["d_out"] = config.out_width
        metadata["hook_name_out"] = config.target
    if architecture == "topk":
        settings |= {"k": config.k, "rescale_acts_by_decoder_norm": False}
    tensors: dict[str, Tensor] = {name: getattr(dictionary, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    if architecture.startswith("jumprelu"):
        tensors["threshold"] = dictionary.threshold.expand(config.d_sae)
    return {CONFIG: json_bytes(settings), WEIGHTS: safetensors_bytes(tensors)}


def read(folder: Location, named: Named) -> Dictionary:
    """Raises HearsaeError for what is damaged, for rows that would have to be normalised, and for architectures that hearsae does not have."""
    path = folder / CONFIG
    config = read_json(path)
    metadata = config.get("metadata")
    ours = metadata.get(OURS) if isinstance(metadata, dict) else None
    architecture = _architecture(config, path)
    _check_plain(config, path)
    state = read_safetensors(folder / WEIGHTS)
    _check_no_factor(state)
    d_in, d_sae = whole(config, "d_in", path), whole(config, "d_sae", path)
    transcodes = architecture.endswith("transcoder")
    d_out = whole(config, "d_out", path) if transcodes else d_in
    W_enc, W_dec, b_dec = state.take("W_enc", d_in, d_sae), state.take("W_dec", d_sae, d_out), state.take("b_dec", d_out)
    threshold = None
    if architecture == "gated":
        W_enc, b_enc, threshold = gated(W_enc, *(state.take(name, d_sae) for name in ("b_gate", "b_mag", "r_mag")))
    else:
        b_enc = state.take("b_enc", d_sae)
        if architecture.startswith("jumprelu"):
            threshold = state.take("threshold", d_sae)
    k = 0
    if architecture == "topk":
        k = _k(config, path)
        if config.get("rescale_acts_by_decoder_norm"):
            # Values are chosen by how much they add: those of a decoder of unit norm, with the norms in the encoder.
            norms = W_dec.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
            W_enc, b_enc, W_dec = W_enc * norms, b_enc * norms, W_dec / norms[:, None]
    if not transcodes and not config.get("apply_b_dec_to_input", True):
        b_enc = shifted(W_enc, b_enc, b_dec)
    arch = {"standard": "relu", "transcoder": "relu", "jumprelu_transcoder": "jumprelu"}.get(architecture, architecture)
    return dictionary_of(arch, k, Weights(W_enc, b_enc, W_dec, b_dec, threshold), named, ours, path, transcodes)


def _architecture(config: dict[str, Any], path: Location) -> str:
    """As its version 6 calls it; before, a TopK SAE was a standard one with another activation function."""
    architecture = config.get("architecture", "standard")
    activation = config.get("activation_fn", config.get("activation_fn_str", "relu"))
    if activation == "topk" and architecture in ("standard", "topk"):
        return "topk"
    if architecture not in READS or activation not in ("relu", "topk"):
        what = architecture if architecture not in READS else f"{architecture} with activation {activation}"
        raise HearsaeError(f"{path} is of an architecture that hearsae does not have ('{what!s:.60}'); it reads {', '.join(READS)}")
    return str(architecture)


def _k(config: dict[str, Any], path: Location) -> int:
    settings = config.get("activation_fn_kwargs")
    return whole(settings if "k" not in config and isinstance(settings, dict) else config, "k", path)


def _check_plain(config: dict[str, Any], path: Location) -> None:
    for key in ("normalize_activations", "reshape_activations"):
        value = config.get(key)
        if value not in (None, False, "none"):
            raise HearsaeError(f"{path} has {key} '{value!s:.40}', which hearsae's SAEs don't do: fold it into the weights with SAELens first")
    if config.get("finetuning_scaling_factor"):
        raise HearsaeError(f"{path} has a finetuning_scaling_factor, which hearsae's SAEs don't have: fold it into W_dec first")


def _check_no_factor(state: State) -> None:
    factor = state.tensors.get("scaling_factor")
    if factor is not None and (factor != 1).any():
        raise HearsaeError(f"{state.path} has a scaling_factor, which hearsae's SAEs don't have: fold it into W_dec first")
