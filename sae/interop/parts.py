"""What the formats have in common: reading files that may be damaged or hostile, and hearsae's config that travels along."""

import io
import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import PurePath
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from cache.errors import HearsaeError
from cache.location import Location
from sae.models import THRESHOLDS, WITH_K, Dictionary, SaeConfig, read_config

OURS = "hearsae"
"""Key of hearsae's config in another format's metadata."""
ALIKE = {"jumprelu": ("jumprelu", "jumprelu-tanh", "gated", "batchtopk", "matryoshka"), "relu": ("relu", "tied")}
"""Which architectures are the same function in another format, so that only hearsae's own config tells them apart."""


class Named(NamedTuple):
    """What a format of another library does not say of a dictionary."""

    site: str = ""
    """The site whose rows it takes."""
    target: str = ""
    """The site that it reconstructs, of a transcoder."""
    model_sha256: str = ""
    """Of the Whisper checkpoint."""


class Weights(NamedTuple):
    """A dictionary as another library had it, in hearsae's form: z = act((x - b_dec) @ W_enc + b_enc), without b_dec for a transcoder."""

    W_enc: Tensor
    """[d_in, d_sae]"""
    b_enc: Tensor
    """[d_sae]"""
    W_dec: Tensor
    """[d_sae, d_out]"""
    b_dec: Tensor
    """[d_out]"""
    threshold: Tensor | None = None
    """[] or [d_sae]"""


class State:
    """The tensors of one file, by name."""

    def __init__(self, path: Location, tensors: Mapping[str, Tensor]) -> None:
        self.path = path
        self.tensors = tensors

    def take(self, name: str, *shape: int | None) -> Tensor:
        """float32; None in `shape` stands for any size. Raises HearsaeError for a tensor that is missing, of another shape or not finite."""
        found = self.tensors.get(name)
        if found is None:
            raise HearsaeError(f"{self.path} has no {name}; it has {', '.join(sorted(self.tensors)[:8]) or 'nothing'}")
        fits = found.dim() == len(shape) and all(want in (None, size) for want, size in zip(shape, found.shape, strict=True))
        # Of a sparse tensor, or one that repeats a few numbers, the shape says nothing about the memory it will take.
        dense = found.layout == torch.strided and not found.is_quantized and found.nbytes <= found.untyped_storage().nbytes()
        if not fits or not dense or found.dtype.is_complex or not found.isfinite().all():
            wanted = ["any" if size is None else size for size in shape]
            raise HearsaeError(f"{self.path} is damaged: {name} is {found.dtype} {list(found.shape)}, or not finite; {wanted} was expected")
        return found.float()

    def take_int(self, name: str) -> int:
        """A single number."""
        return int(self.take(name))


def read_json(path: Location) -> dict[str, Any]:
    """Raises HearsaeError if there is no file, or no JSON object in it."""
    try:
        data = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise _missing(path) from None
    except (OSError, ValueError, RecursionError) as error:
        raise HearsaeError(f"{path} is damaged: {error}") from error
    if not isinstance(data, dict):
        raise HearsaeError(f"{path} is damaged: it is no JSON object")
    return data


def read_safetensors(path: Location) -> State:
    """Raises HearsaeError if there is no file, or it is damaged."""
    try:
        return State(path, safetensors.torch.load(path.read_bytes()))
    except (FileNotFoundError, NotADirectoryError):
        raise _missing(path) from None
    except (OSError, ValueError, SafetensorError) as error:
        raise HearsaeError(f"{path} is damaged: {error}") from error


def read_pt(path: Location) -> State:
    """A PyTorch file of tensors. Raises HearsaeError if there is none, it is damaged, or it holds anything that would have to be unpickled."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of unusual pickles: what can't be read is refused below
            data = torch.load(io.BytesIO(path.read_bytes()), map_location="cpu", weights_only=True)
    except (FileNotFoundError, NotADirectoryError):
        raise _missing(path) from None
    except Exception as error:  # a damaged file makes the reader fail in any way
        raise HearsaeError(f"{path} is damaged or holds more than tensors, which is not read from files of others") from error
    if not isinstance(data, dict) or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in data.items()):
        raise HearsaeError(f"{path} is no PyTorch file of named tensors")
    return State(path, data)


def _missing(path: Location) -> HearsaeError:
    return HearsaeError(f"there is no such dictionary in {path.parent}: {PurePath(path.name)} is missing")


def whole(data: Mapping[str, Any], key: str, path: Location) -> int:
    """A positive whole number of a config. Raises HearsaeError where it is anything else."""
    value = data.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise HearsaeError(f"{path} is damaged: {key} is {value!r:.50}, and should be a positive whole number")
    return value


def safetensors_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """A file of them."""
    return safetensors.torch.save({name: tensor.detach().cpu().float().contiguous() for name, tensor in tensors.items()})


def json_bytes(data: Mapping[str, Any]) -> bytes:
    """A file of it."""
    return json.dumps(data, indent=1).encode()


def our_config(config: SaeConfig) -> dict[str, Any]:
    """What travels along."""
    return asdict(replace(config, hearsae=version("hearsae")))


def without_shift(dictionary: Dictionary) -> Tensor:
    """b_enc [d_sae] for a library that does not take b_dec from the rows: z = act(x @ W_enc + b_enc)."""
    W_enc, b_enc, b_dec = (part.detach().cpu().double() for part in (dictionary.W_enc, dictionary.b_enc, dictionary.b_dec))
    return (b_enc - b_dec @ W_enc).float()


def shifted(W_enc: Tensor, b_enc: Tensor, b_dec: Tensor) -> Tensor:
    """The b_enc [d_sae] of hearsae's form, from that of a library that does not take b_dec from the rows."""
    return (b_enc.double() + b_dec.double() @ W_enc.double()).float()


def gated(W_enc: Tensor, b_gate: Tensor, b_mag: Tensor, r_mag: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(W_enc, b_enc, threshold) of the JumpReLU SAE that a gated one is (2404.16014).

    With p = x @ W_enc, the magnitude m = exp(r_mag) * p + b_mag grows with p, so the gate p + b_gate > 0 is m > b_mag - exp(r_mag) * b_gate.
    """
    gain = r_mag.double().exp()
    return (W_enc.double() * gain).float(), b_mag, (b_mag.double() - gain * b_gate.double()).float()


def dictionary_of(arch: str, k: int, weights: Weights, named: Named, ours: object, path: Location, transcodes: bool = False) -> Dictionary:
    """The dictionary, and where it comes from: as `named` says, and as hearsae's config in the metadata of `path` (`ours`) does where there is one.

    Raises HearsaeError where the two disagree, and where neither names the site.
    """
    d_in, d_sae, d_out = *weights.W_enc.shape, weights.W_dec.shape[1]
    then = None if ours is None else read_config(path, ours)
    if then is not None and (then.d_in, then.d_sae, then.out_width, bool(then.target)) != (d_in, d_sae, d_out, transcodes):
        raise HearsaeError(f"{path} is damaged: hearsae's config in it is that of another dictionary ({then.d_in} -> {then.d_sae})")
    known = {} if then is None else asdict(then)
    for name, value in named._asdict().items():
        if value and known.get(name) and value != known[name]:
            raise HearsaeError(f"{path} says that its {name} is {known[name]!r:.80}, not {value!r:.80}")
        known[name] = value or known.get(name, "")
    if not known["site"]:
        raise HearsaeError(f"{path} does not say which site's rows it takes: name it with --site")
    if transcodes and not known["target"]:
        raise HearsaeError(f"{path} is a transcoder: name the site that it reconstructs with --target")
    if not transcodes and known["target"]:
        raise HearsaeError(f"{path} is no transcoder: leave --target out")
    arch = _arch(arch, then, weights)
    k = k or (known.get("k", 0) if arch in (*WITH_K, "jumprelu") else 0)
    sizes = {"d_in": d_in, "d_sae": d_sae, "d_out": d_out if transcodes else 0, "k": k, "widths": ()}
    dictionary = Dictionary(SaeConfig(**known | sizes | {"arch": arch}))
    with torch.no_grad():
        for name, tensor in weights._asdict().items():
            if tensor is not None:
                own = getattr(dictionary, name)
                own.copy_(tensor if own.dim() or not tensor.dim() else tensor[0])
    return dictionary


def _arch(arch: str, then: SaeConfig | None, weights: Weights) -> str:
    """What hearsae called it, where the weights can be that."""
    if then is None or then.arch not in ALIKE.get(arch, ()):
        return arch
    threshold = weights.threshold
    if arch == "jumprelu" and then.arch not in THRESHOLDS and (threshold is None or (threshold != threshold.flatten()[0]).any()):
        return arch
    if then.arch == "tied" and not torch.equal(weights.W_enc, weights.W_dec.t()):
        return arch
    return then.arch
