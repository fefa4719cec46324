"""sparsify: a folder with cfg.json and sae.safetensors, as its `SparseCoder.load_from_disk` reads it. TopK only, of one width.

z = topk(relu((x - b_dec) @ encoder.weight^T + encoder.bias))        x_hat = z @ W_dec + b_dec        (a transcoder: without b_dec in z)
"""

from cache.errors import HearsaeError
from cache.location import Location
from sae.interop.parts import OURS, Named, Weights, dictionary_of, json_bytes, our_config, read_json, read_safetensors, safetensors_bytes, whole
from sae.models import Dictionary

CONFIG = "cfg.json"
WEIGHTS = "sae.safetensors"
REFUSED = {"skip_connection": "a skip connection", "signed": "values of both signs"}
"""Settings that change the function, and what they mean."""


def files(dictionary: Dictionary) -> dict[str, bytes]:
    """Raises HearsaeError for all but TopK, and for a transcoder between sites of different widths."""
    config = dictionary.config
    if config.arch != "topk":
        raise HearsaeError(
            f"sparsify keeps the k largest values of each row and nothing else: a {config.arch} SAE can't be one of its; use --format saelens"
        )
    if config.out_width != config.d_in:
        raise HearsaeError(f"sparsify has transcoders of one width only, not from {config.d_in} to {config.out_width}")
    settings = {
        "activation": "topk",
        "expansion_factor": max(1, config.d_sae // config.d_in),
        "normalize_decoder": True,
        "num_latents": config.d_sae,
        "k": config.k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": config.kind == "transcoder",
        "d_in": config.d_in,
        OURS: our_config(config),
    }
    tensors = {"encoder.weight": dictionary.W_enc.t(), "encoder.bias": dictionary.b_enc, "W_dec": dictionary.W_dec, "b_dec": dictionary.b_dec}
    return {CONFIG: json_bytes(settings), WEIGHTS: safetensors_bytes(tensors)}


def read(folder: Location, named: Named) -> Dictionary:
    """Raises HearsaeError for what is damaged, and for skip connections and other activations than TopK."""
    path = folder / CONFIG
    config = read_json(path)
    if config.get("activation", "topk") != "topk":
        raise HearsaeError(f"{path} has the activation '{config['activation']!s:.40}': hearsae reads topk of sparsify and nothing else")
    for key, meaning in REFUSED.items():
        if config.get(key):
            raise HearsaeError(f"{path} has {meaning} ({key}), which hearsae's dictionaries don't have")
    state = read_safetensors(folder / WEIGHTS)
    d_in, k = whole(config, "d_in", path), whole(config, "k", path)
    d_sae = whole(config, "num_latents", path) if config.get("num_latents") else d_in * whole(config, "expansion_factor", path)
    W_enc, b_enc = state.take("encoder.weight", d_sae, d_in).t(), state.take("encoder.bias", d_sae)
    weights = Weights(W_enc, b_enc, state.take("W_dec", d_sae, d_in), state.take("b_dec", d_in))
    return dictionary_of("topk", k, weights, named, config.get(OURS), path, transcodes=bool(config.get("transcode")))
