"""dictionary_learning: a folder with ae.pt and config.json, as its `load_dictionary` reads it. Autoencoders only.

Its classes name their tensors in two ways, and two of them don't take the decoder's bias from the rows:

- AutoEncoder, AutoEncoderTopK, BatchTopKSAE: encoder.weight [d_sae, d_in], encoder.bias, decoder.weight [d_in, d_sae], bias or b_dec
- GatedAutoEncoder: the same with gate_bias, mag_bias, r_mag, decoder_bias
- MatryoshkaBatchTopKSAE, JumpReluAutoEncoder: W_enc [d_in, d_sae], b_enc, W_dec [d_sae, d_in], b_dec
- JumpReluAutoEncoder, AutoEncoderNew: z = act(x @ W_enc + b_enc)
"""

import io
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from cache.errors import HearsaeError
from cache.location import Location
from sae.interop.parts import OURS, Named, State, Weights, dictionary_of, gated, json_bytes, our_config, read_json, read_pt, shifted, without_shift
from sae.models import Dictionary
from sae.objectives import matryoshka_bounds

CONFIG = "config.json"
WEIGHTS = "ae.pt"
NORM_TOLERANCE = 1e-5
"""Of decoder norms around 1, within which dictionary_learning takes an AutoEncoder as it is."""


def files(dictionary: Dictionary) -> dict[str, bytes]:
    """Raises HearsaeError for a transcoder."""
    config = dictionary.config
    if config.kind != "sae":
        raise HearsaeError(f"dictionary_learning has autoencoders only: this is a {config.kind} from {config.site} to {config.target}")
    dict_class, tensors = _written(dictionary)
    trainer: dict[str, Any] = {"dict_class": dict_class, "activation_dim": config.d_in, "dict_size": config.d_sae, "seed": config.seed}
    trainer |= {"submodule_name": config.site} | ({"k": config.k} if "k" in tensors else {})
    data = io.BytesIO()
    torch.save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, data)
    return {WEIGHTS: data.getvalue(), CONFIG: json_bytes({"trainer": trainer, OURS: our_config(config)})}


def _written(dictionary: Dictionary) -> tuple[str, dict[str, Tensor]]:
    """Its class, and that class's tensors."""
    config = dictionary.config
    W_enc, b_enc, W_dec, b_dec = dictionary.W_enc, dictionary.b_enc, dictionary.W_dec, dictionary.b_dec
    linear = {"encoder.weight": W_enc.t(), "encoder.bias": b_enc, "decoder.weight": W_dec.t()}
    direct = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
    kept = {"k": torch.tensor(config.k, dtype=torch.int), "threshold": dictionary.threshold}
    if config.arch == "topk":
        never = torch.tensor(-1.0)  # as the class has it before training gave it a threshold, which it uses on request only
        return "AutoEncoderTopK", linear | {"b_dec": b_dec} | kept | {"threshold": never}
    if config.arch == "batchtopk":
        return "BatchTopKSAE", linear | {"b_dec": b_dec} | kept
    if config.arch == "matryoshka":
        # Which prefixes it was trained on is known of hearsae's own; all of them count when it is used, so values don't depend on it.
        bounds = matryoshka_bounds(config.d_sae) if config.rows else [config.d_sae]
        return "MatryoshkaBatchTopKSAE", direct | kept | {"group_sizes": torch.tensor([0, *bounds]).diff()}
    if config.arch in ("relu", "tied") and _has_unit_decoder(W_dec):
        return "AutoEncoder", linear | {"bias": b_dec}
    # An AutoEncoder of other norms would be given unit norm when it is loaded, and with it other values.
    return "JumpReluAutoEncoder", direct | {"b_enc": without_shift(dictionary), "threshold": dictionary.threshold.expand(config.d_sae)}


def read(folder: Location, named: Named) -> Dictionary:
    """Raises HearsaeError for what is damaged and for other classes than the seven."""
    path = folder / CONFIG
    config = read_json(path)
    trainer = config.get("trainer")
    trainer = trainer if isinstance(trainer, dict) else {}
    dict_class = str(trainer.get("dict_class"))
    if dict_class not in _READERS:
        raise HearsaeError(f"{path} is of a class that hearsae does not read ('{dict_class:.60}'); it reads {', '.join(_READERS)}")
    state = read_pt(folder / WEIGHTS)
    arch, k, weights = _READERS[dict_class](state)
    said = trainer.get("k")
    if k and said is not None and said != k:
        raise HearsaeError(f"{path} is damaged: it says k = {said!s:.20}, and {WEIGHTS} has k = {k}")
    dictionary = dictionary_of(arch, k, weights, named, config.get(OURS), path)
    if dict_class == "AutoEncoder" and not _has_unit_decoder(dictionary.W_dec):
        dictionary.with_unit_decoder()  # as its own loader does
    return dictionary


def _has_unit_decoder(W_dec: Tensor) -> bool:
    return bool(((W_dec.norm(dim=1) - 1).abs() <= NORM_TOLERANCE).all())


def _linear(state: State, bias: str) -> Weights:
    W_enc = state.take("encoder.weight", None, None).t()
    d_in, d_sae = W_enc.shape
    b_enc = state.take("encoder.bias", d_sae)
    return Weights(W_enc, b_enc, state.take("decoder.weight", d_in, d_sae).t(), state.take(bias, d_in))


def _direct(state: State) -> Weights:
    W_enc = state.take("W_enc", None, None)
    d_in, d_sae = W_enc.shape
    return Weights(W_enc, state.take("b_enc", d_sae), state.take("W_dec", d_sae, d_in), state.take("b_dec", d_in))


def _relu(state: State) -> tuple[str, int, Weights]:
    return "relu", 0, _linear(state, "bias")


def _relu_new(state: State) -> tuple[str, int, Weights]:
    weights = _linear(state, "decoder.bias")
    return "relu", 0, weights._replace(b_enc=shifted(weights.W_enc, weights.b_enc, weights.b_dec))


def _gated(state: State) -> tuple[str, int, Weights]:
    W_enc = state.take("encoder.weight", None, None).t()
    d_in, d_sae = W_enc.shape
    W_enc, b_enc, threshold = gated(W_enc, *(state.take(name, d_sae) for name in ("gate_bias", "mag_bias", "r_mag")))
    return "gated", 0, Weights(W_enc, b_enc, state.take("decoder.weight", d_in, d_sae).t(), state.take("decoder_bias", d_in), threshold)


def _topk(state: State) -> tuple[str, int, Weights]:
    return "topk", state.take_int("k"), _linear(state, "b_dec")


def _batchtopk(state: State) -> tuple[str, int, Weights]:
    return "batchtopk", state.take_int("k"), _linear(state, "b_dec")._replace(threshold=state.take("threshold"))


def _matryoshka(state: State) -> tuple[str, int, Weights]:
    return "matryoshka", state.take_int("k"), _direct(state)._replace(threshold=state.take("threshold"))


def _jumprelu(state: State) -> tuple[str, int, Weights]:
    weights = _direct(state)
    b_enc = shifted(weights.W_enc, weights.b_enc, weights.b_dec)
    return "jumprelu", 0, weights._replace(b_enc=b_enc, threshold=state.take("threshold", len(b_enc)))


_READERS: Mapping[str, Callable[[State], tuple[str, int, Weights]]] = {
    "AutoEncoder": _relu,
    "AutoEncoderNew": _relu_new,
    "AutoEncoderTopK": _topk,
    "BatchTopKSAE": _batchtopk,
    "MatryoshkaBatchTopKSAE": _matryoshka,
    "JumpReluAutoEncoder": _jumprelu,
    "GatedAutoEncoder": _gated,
}
