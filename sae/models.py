"""The dictionaries: one `Dictionary` for every architecture, which differ in `Dictionary.codes` alone.

    z = act((x - b_dec) @ W_enc + b_enc)        x_hat = z @ W_dec + b_dec

- `batchtopk` (2412.06410): in training the k * rows largest values of a batch are kept, afterwards those above a threshold.
- `topk` (2406.04093): the k largest values of each row.
- `relu`: every positive value; an L1 penalty in training keeps them few.

Units. Training sees rows that are centred and scaled so that mean ||x||^2 = d_in. `folded` moves centre and scale into the biases and
the threshold, so a saved dictionary takes rows as the store has them. Every row of W_dec has unit norm, so the value of a latent is
the length of what it adds to the reconstruction, in the units of the stored activations.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from pathlib import PurePath
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from cache.errors import HearsaeError
from cache.location import Location, location, put
from sae.sparse import Codes, SparseRows, decode_rows, select_above, select_topk

__all__ = ["ARCHS", "Codes", "Dictionary", "SaeConfig", "load_dictionary"]

ARCHS = ("batchtopk", "topk", "relu")
FORMAT = 1
WEIGHTS = "sae.safetensors"
CONFIG = "config.json"
SLICE_ROWS = 1024
"""Rows encoded at once by `encode_sparse`: their pre-activations stay near the cache, and memory does not grow with the rows."""


@dataclass(frozen=True)
class SaeConfig:
    """What a dictionary is and where it comes from; saved beside the weights."""

    arch: str
    """One of `ARCHS`."""
    d_in: int
    d_sae: int
    k: int = 0
    """Mean number of latents kept per row; 0 for `relu`, which has none."""
    seed: int = 0
    site: str = ""
    """The site whose rows it takes."""
    model_sha256: str = ""
    """Of the Whisper checkpoint whose activations it was trained on."""
    store: tuple[str, ...] = ()
    """Names of the stores it was trained on."""
    plan_hash: tuple[str, ...] = ()
    """Of those stores."""
    rows: int = 0
    """Rows seen in training."""
    scale: float = 1.0
    """What training multiplied centred rows with: a value times this is the value in units where mean ||x||^2 = d_in."""
    hearsae: str = ""
    """Version that saved it."""
    format: int = FORMAT

    def __post_init__(self) -> None:
        if self.arch not in ARCHS:
            raise HearsaeError(f"there is no SAE architecture '{self.arch}'; there are: {', '.join(ARCHS)}")
        if self.d_in < 1 or self.d_sae < 1:
            raise HearsaeError(f"an SAE of {self.d_in} -> {self.d_sae} has no sense: both widths must be positive")
        if self.arch == "relu" and self.k:
            raise HearsaeError("k has no effect on a relu SAE: its sparsity comes from the L1 coefficient; leave k at 0")
        if self.arch != "relu" and not 1 <= self.k <= self.d_sae:
            raise HearsaeError(f"k = {self.k} is not between 1 and d_sae = {self.d_sae}")


class Dictionary(nn.Module):
    """A sparse autoencoder. As `load_dictionary` gives it, it takes rows as the store has them.

    Parameters, float32: W_enc [d_in, d_sae], b_enc [d_sae], W_dec [d_sae, d_in], b_dec [d_in]; buffer `threshold` [], used by `batchtopk`.
    """

    threshold: Tensor

    def __init__(self, config: SaeConfig) -> None:
        super().__init__()
        self.config = config
        # Kept transposed in memory: its sparse gradient comes latent by latent.
        self.W_enc = nn.Parameter(torch.zeros(config.d_sae, config.d_in).t())
        self.b_enc = nn.Parameter(torch.zeros(config.d_sae))
        self.W_dec = nn.Parameter(torch.zeros(config.d_sae, config.d_in))
        self.b_dec = nn.Parameter(torch.zeros(config.d_in))
        self.register_buffer("threshold", torch.zeros(()))

    def codes(self, pre: Tensor) -> SparseRows:
        """What is kept of the pre-activations [rows, d_sae] at inference, by architecture."""
        if self.config.arch == "topk":
            return select_topk(pre, self.config.k)
        return select_above(pre, float(self.threshold) if self.config.arch == "batchtopk" else 0.0)

    def encode(self, x: Tensor) -> Tensor:
        """[rows, d_in] -> dense values [rows, d_sae], float32; differentiable. Raises HearsaeError for rows of another width."""
        self._check_width(x)
        pre = (x.float() - self.b_dec) @ self.W_enc + self.b_enc
        if self.config.arch == "topk":
            top = pre.topk(self.config.k, dim=-1)
            return torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())
        return pre * (pre > (self.threshold if self.config.arch == "batchtopk" else 0.0))

    @torch.no_grad()
    def encode_sparse(self, x: Tensor) -> Codes:
        """[rows, d_in] -> the nonzero values. The same as `encode`, without ever holding the dense values of all rows."""
        row, latent, value, first = [], [], [], 0
        for part in self._encode_slices(x):
            row.append(part.rows().cpu().numpy().astype(np.int64) + first)
            latent.append(part.latent.cpu().numpy())
            value.append(part.value.cpu().numpy())
            first += len(part.start) - 1
        if not row:
            return Codes(np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32))
        return Codes(np.concatenate(row), np.concatenate(latent), np.concatenate(value))

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> tuple[Tensor, SparseRows]:
        """[rows, d_in] -> (reconstruction [rows, d_in], codes): encode and decode, sparse all the way."""
        parts = list(self._encode_slices(x))
        counts = torch.cat([part.start.diff() for part in parts])
        codes = SparseRows(F.pad(counts.cumsum(0), (1, 0)).int(), torch.cat([p.latent for p in parts]), torch.cat([p.value for p in parts]))
        return decode_rows(codes, self.W_dec) + self.b_dec, codes

    def decode(self, z: Tensor) -> Tensor:
        """Values [rows, d_sae] -> [rows, d_in]."""
        return z @ self.W_dec + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction of x [rows, d_in]; differentiable."""
        return self.decode(self.encode(x))

    def _encode_slices(self, x: Tensor) -> Iterator[SparseRows]:
        self._check_width(x)
        buffer = torch.empty(min(len(x), SLICE_ROWS), self.config.d_sae, device=x.device)
        for rows in x.split(SLICE_ROWS):
            yield self.codes(torch.addmm(self.b_enc, rows.float() - self.b_dec, self.W_enc, out=buffer[: len(rows)]))

    def _check_width(self, x: Tensor) -> None:
        if x.shape[-1] != self.config.d_in:
            raise HearsaeError(f"this SAE takes rows of width {self.config.d_in} ({self.config.site or 'no site named'}), not {x.shape[-1]}")

    # From training to disk

    @torch.no_grad()
    def init_parameters(self, generator: torch.Generator) -> None:
        """Random unit decoder rows, the encoder their transpose, no biases (2406.04093, A.1): rows are centred, so b_dec starts at their mean."""
        self.W_dec.copy_(F.normalize(torch.randn(self.W_dec.shape, generator=generator), dim=1))
        self.W_enc.copy_(self.W_dec.t())

    @torch.no_grad()
    def folded(self, mean: np.ndarray, scale: float) -> "Dictionary":
        """From one for rows (x - mean) * scale to the same one for rows x.

        mean: float64 [d_in]. Only biases and threshold change: dividing every value by `scale` lets W_enc and W_dec stay as they are.
        """
        raw = Dictionary(replace(self.config, scale=self.config.scale * scale)).to(self.W_dec.device)
        raw.W_enc.copy_(self.W_enc)
        raw.b_enc.copy_(self.b_enc.double() / scale)
        raw.W_dec.copy_(self.W_dec)
        raw.b_dec.copy_(self.b_dec.double() / scale + torch.from_numpy(mean).to(self.b_dec.device))
        raw.threshold.copy_(self.threshold.double() / scale)
        return raw

    def save(self, folder: str | Location) -> None:
        """Writes `sae.safetensors` and `config.json`, each atomically. Raises HearsaeError where that can't be done."""
        folder = location(folder)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        put(folder / WEIGHTS, safetensors.torch.save(tensors))
        put(folder / CONFIG, json.dumps(asdict(replace(self.config, hearsae=version("hearsae"))), indent=1).encode())


def load_dictionary(folder: str | Location) -> Dictionary:
    """Reads a saved dictionary. Raises HearsaeError if there is none in `folder`, or if it is damaged or of another format."""
    folder = location(folder)
    try:
        data = json.loads((folder / CONFIG).read_bytes())
        state = safetensors.torch.load((folder / WEIGHTS).read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise HearsaeError(f"there is no SAE in {folder}: {PurePath(error.filename).name} is missing") from None
    except (OSError, ValueError, SafetensorError) as error:
        raise HearsaeError(f"the SAE in {folder} is damaged: {error}") from error
    config = _read_config(folder, data)
    with torch.device("meta"):  # names and shapes, without the memory: a damaged config may name any width
        expected_state = Dictionary(config).state_dict()
    for name, expected in expected_state.items():
        found = state.get(name)
        if found is None or found.shape != expected.shape or not found.is_floating_point() or not found.isfinite().all():
            what = "is missing" if found is None else f"is {found.dtype} {list(found.shape)}, or not finite; {list(expected.shape)} was expected"
            raise HearsaeError(f"the SAE in {folder} is damaged: {name} in {WEIGHTS} {what}")
    dictionary = Dictionary(config)
    dictionary.load_state_dict({name: state[name].float() for name in expected_state})
    return dictionary.requires_grad_(False)


def _read_config(folder: Location, data: object) -> SaeConfig:
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise HearsaeError(f"{folder / CONFIG} is no SAE config of format {FORMAT}")
    known = {field.name for field in fields(SaeConfig)}
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items() if key in known}
    try:
        config = SaeConfig(**values)
        whole = all(isinstance(n, int) for n in (config.d_in, config.d_sae, config.k)) and math.isfinite(config.scale)
        named = isinstance(config.site, str) and isinstance(config.model_sha256, str)
    except TypeError as error:
        raise HearsaeError(f"{folder / CONFIG} is damaged: {error}") from None
    if not whole:
        raise HearsaeError(f"{folder / CONFIG} is damaged: its widths are no whole numbers or its scale is not finite")
    if not named:
        raise HearsaeError(f"{folder / CONFIG} is damaged: its site or its model is no text")
    return config
