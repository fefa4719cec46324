"""The dictionaries: one `Dictionary` for every architecture. As they are used, they differ in `Dictionary.codes` alone.

    z = act((x - b_dec) @ W_enc + b_enc)        x_hat = z @ W_dec + b_dec

- `batchtopk` (2412.06410): values above one threshold; in training the k * rows largest values of a batch are kept.
- `matryoshka` (2503.17547): the same, trained so that the first latents alone reconstruct too.
- `topk` (2406.04093): the k largest values of each row.
- `relu`: every positive value; an L1 penalty in training keeps them few. `tied`: the same with W_enc = W_dec^T, as in "Interpreting Whisper".
- `jumprelu` (2407.14435) and `jumprelu-tanh` (the same with the losses of transformer-circuits.pub, January 2025): values above a threshold
  for each latent.
- `gated` (2404.16014): a latent's gate and its magnitude are increasing functions of the same product, so once trained it is a JumpReLU SAE,
  and is kept as one.

Sites. An SAE reconstructs the rows of the site that it reads. A transcoder reads one site and reconstructs another, `target`: there x is not
shifted by b_dec. A crosscoder reads several sites, one beside the other, and reconstructs them all from the same latents.

Units. Training sees rows that are centred and scaled so that mean ||x||^2 = d, site by site. `folded` moves centres and scales into the
parameters, so a saved dictionary takes rows as the store has them. Every row of W_dec has unit norm, so the value of a latent is the length of
what it adds to the reconstruction, in the units of the stored activations. In a crosscoder it is the norms of the sites' parts that add up to
1, while the rows are scaled; its values are in the mean unit of its sites.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from pathlib import PurePath
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from cache.errors import HearsaeError
from cache.location import Location, location, put
from sae.selection import Above, Codes, SparseRows, TopK, select
from sae.sparse import decode_rows

__all__ = ["ARCHS", "Codes", "Dictionary", "SaeConfig", "load_dictionary"]

ARCHS = ("batchtopk", "topk", "matryoshka", "relu", "tied", "jumprelu", "jumprelu-tanh", "gated")
WITH_K = ("batchtopk", "topk", "matryoshka")
"""Those whose sparsity is a number of latents. `jumprelu` may be trained towards one."""
WITH_AUX = (*WITH_K, "jumprelu", "jumprelu-tanh")
"""Those whose dead latents are brought back by AuxK. The JumpReLU papers have none; without it a fifth of the latents die (docs/ground_truth.md)."""
ONE_THRESHOLD = ("batchtopk", "matryoshka")
THRESHOLDS = ("jumprelu", "jumprelu-tanh", "gated")
"""Those with a threshold for each latent."""
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
    """Mean number of latents kept per row, of `jumprelu` the number aimed at; 0 where a penalty decides."""
    seed: int = 0
    site: str = ""
    """The site whose rows it takes; of a crosscoder all of them, joined by `+`."""
    target: str = ""
    """The site that a transcoder reconstructs."""
    d_out: int = 0
    """Width of what is reconstructed; 0: that of the input."""
    widths: tuple[int, ...] = ()
    """Of a crosscoder: the width of each of its sites, which add up to d_in."""
    model_sha256: str = ""
    """Of the Whisper checkpoint whose activations it was trained on."""
    store: tuple[str, ...] = ()
    """Names of the stores it was trained on."""
    plan_hash: tuple[str, ...] = ()
    """Of those stores."""
    context: str = ""
    """What Whisper heard behind the clips it was trained on: `padded`, or `trimmed with a margin of 1 s`; empty: not known."""
    sparsity: float = 0.0
    """Coefficient of the penalty it was trained with, where it has one."""
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
        if self.k and self.arch not in (*WITH_K, "jumprelu"):
            raise HearsaeError(f"k has no effect on a {self.arch} SAE: its sparsity comes from a penalty; leave k at 0")
        if not (1 if self.arch in WITH_K else 0) <= self.k <= self.d_sae:
            raise HearsaeError(f"k = {self.k} is not between 1 and d_sae = {self.d_sae}")
        if self.d_out < 0 or (self.d_out and not self.target) or (self.target and self.widths):
            raise HearsaeError(
                f"an SAE from '{self.site}' to '{self.target}' of widths {self.d_in} and {self.d_out} is neither transcoder nor crosscoder"
            )
        if self.widths and (min(self.widths) < 1 or sum(self.widths) != self.d_in or len(self.widths) != len(self.sites)):
            raise HearsaeError(f"the widths {list(self.widths)} of a crosscoder do not fit its sites {self.site} of {self.d_in} columns in all")

    @property
    def sites(self) -> tuple[str, ...]:
        """Those whose rows it takes, one beside the other."""
        return tuple(self.site.split("+")) if self.widths else (self.site,)

    @property
    def targets(self) -> tuple[str, ...]:
        """Those whose rows it reconstructs, one beside the other."""
        return (self.target,) if self.target else self.sites

    @property
    def out_width(self) -> int:
        """Width of what it reconstructs."""
        return self.d_out or self.d_in

    @property
    def kind(self) -> str:
        """`sae`, `transcoder` or `crosscoder`."""
        return "transcoder" if self.target else "crosscoder" if self.widths else "sae"


class Centre(NamedTuple):
    """What training does to rows x of width d: (x - mean) * scale."""

    mean: np.ndarray
    """float64 [d]"""
    scale: np.ndarray
    """float64 [d]; the same for all columns of a site."""

    @classmethod
    def of(cls, mean: np.ndarray, scale: float) -> "Centre":
        """With one scale for all columns."""
        return cls(mean, np.full(len(mean), float(scale)))

    def __add__(self, other: "Centre") -> "Centre":  # type: ignore[override]
        """Of the columns of one beside those of the other."""
        return Centre(np.concatenate([self.mean, other.mean]), np.concatenate([self.scale, other.scale]))


class Dictionary(nn.Module):
    """A sparse autoencoder, transcoder or crosscoder. As `load_dictionary` gives it, it takes rows as the store has them.

    Parameters, float32: W_enc [d_in, d_sae], b_enc [d_sae], W_dec [d_sae, d_out], b_dec [d_out]; buffer `threshold`: [], or [d_sae] where
    each latent has its own.
    """

    threshold: Tensor

    def __init__(self, config: SaeConfig) -> None:
        super().__init__()
        self.config = config
        # Kept transposed in memory: its sparse gradient comes latent by latent.
        self.W_enc = nn.Parameter(torch.zeros(config.d_sae, config.d_in).t())
        self.b_enc = nn.Parameter(torch.zeros(config.d_sae))
        self.W_dec = nn.Parameter(torch.zeros(config.d_sae, config.out_width))
        self.b_dec = nn.Parameter(torch.zeros(config.out_width))
        self.register_buffer("threshold", torch.zeros(config.d_sae if config.arch in THRESHOLDS else ()))

    def codes(self, pre: Tensor) -> SparseRows:
        """What is kept of the pre-activations [rows, d_sae] at inference, by architecture."""
        return select(pre, TopK(self.config.k) if self.config.arch == "topk" else Above(self.threshold))

    def encode(self, x: Tensor) -> Tensor:
        """[rows, d_in] -> dense values [rows, d_sae], float32; differentiable. Raises HearsaeError for rows of another width."""
        self._check_width(x)
        pre = self.shifted(x.float()) @ self.W_enc + self.b_enc
        if self.config.arch == "topk":
            top = pre.topk(self.config.k, dim=-1)
            return torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())
        return pre * (pre > self.threshold.clamp(min=0.0))

    def shifted(self, x: Tensor) -> Tensor:
        """What W_enc is multiplied with: x - b_dec, of a transcoder x."""
        return x if self.config.target else x - self.b_dec

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
        """[rows, d_in] -> (reconstruction [rows, d_out], codes): encode and decode, sparse all the way."""
        parts = list(self._encode_slices(x))
        counts = torch.cat([part.start.diff() for part in parts])
        codes = SparseRows(F.pad(counts.cumsum(0), (1, 0)).int(), torch.cat([p.latent for p in parts]), torch.cat([p.value for p in parts]))
        return decode_rows(codes, self.W_dec) + self.b_dec, codes

    def decode(self, z: Tensor) -> Tensor:
        """Values [rows, d_sae] -> [rows, d_out]."""
        return z @ self.W_dec + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction [rows, d_out] from x [rows, d_in]; differentiable."""
        return self.decode(self.encode(x))

    def _encode_slices(self, x: Tensor) -> Iterator[SparseRows]:
        self._check_width(x)
        buffer = torch.empty(min(len(x), SLICE_ROWS), self.config.d_sae, device=x.device)
        for rows in x.split(SLICE_ROWS):
            yield self.codes(torch.addmm(self.b_enc, self.shifted(rows.float()), self.W_enc, out=buffer[: len(rows)]))

    def _check_width(self, x: Tensor) -> None:
        if x.shape[-1] != self.config.d_in:
            raise HearsaeError(
                f"this {self.config.kind} takes rows of width {self.config.d_in} ({self.config.site or 'no site named'}), not {x.shape[-1]}"
            )

    # From training to disk

    @torch.no_grad()
    def init_parameters(self, generator: torch.Generator) -> None:
        """Random unit decoder rows, the encoder their transpose, no biases (2406.04093, A.1): rows are centred, so b_dec starts at their mean.

        Of a transcoder the encoder is random too, with columns of unit norm.
        """
        self.W_dec.copy_(F.normalize(torch.randn(self.W_dec.shape, generator=generator), dim=1))
        self.W_enc.copy_(F.normalize(torch.randn(self.W_enc.shape[::-1], generator=generator), dim=1).t() if self.config.target else self.W_dec.t())
        self.normalize_decoder()

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Scales each row of W_dec to unit norm; of a crosscoder so that the norms of its sites' parts add up to 1."""
        self.W_dec.div_(self.decoder_norms()[:, None].clamp(min=torch.finfo(torch.float32).tiny))

    def decoder_norms(self) -> Tensor:
        """[d_sae]: what `normalize_decoder` makes 1; differentiable."""
        if not self.config.widths:
            return self.W_dec.norm(dim=1)
        return torch.stack([part.norm(dim=1) for part in self.W_dec.split(self.config.widths, dim=1)]).sum(0)

    @torch.no_grad()
    def with_unit_decoder(self) -> None:
        """Moves the norms of W_dec's rows into the encoder and the thresholds: the same function, for architectures in which that is so."""
        if self.config.arch in WITH_K:
            raise ValueError(f"the choice of latents of {self.config.arch} depends on their norms")
        norms = self.decoder_norms()
        self.W_enc.mul_(norms)
        self.b_enc.mul_(norms)
        self.threshold = self.threshold * norms if self.config.arch in THRESHOLDS else self.threshold
        self.normalize_decoder()

    @torch.no_grad()
    def folded(self, centre: "Centre", target: "Centre | None" = None) -> "Dictionary":
        """From one for rows (x - mean) * scale to the same one for rows x.

        centre: of what it reads; target: of what it reconstructs, where that is something else. With one scale for all columns only biases
        and thresholds change: dividing every value by it lets W_enc and W_dec stay as they are.
        """
        out = target or centre
        device = self.W_dec.device
        mean_in, mean_out = (torch.from_numpy(part.mean).to(device) for part in (centre, out))
        scale_in, scale_out = (torch.from_numpy(part.scale).to(device) for part in (centre, out))
        unit = scale_out[0] + (scale_out - scale_out[0]).mean()  # exactly the scale where there is one
        raw = Dictionary(replace(self.config, scale=self.config.scale * float(unit))).to(device)
        raw.W_enc.copy_(self.W_enc.double() * (scale_in / unit)[:, None])
        b_enc = self.b_enc.double() - (mean_in * scale_in) @ self.W_enc.double() if self.config.target else self.b_enc.double()
        raw.b_enc.copy_(b_enc / unit)
        raw.W_dec.copy_(self.W_dec.double() * (unit / scale_out))
        raw.b_dec.copy_(self.b_dec.double() / scale_out + mean_out)
        raw.threshold.copy_(self.threshold.double() / unit)
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
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise HearsaeError(f"the SAE in {folder} is damaged: {error}") from error
    config = read_config(folder / CONFIG, data)
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


def read_config(path: Location, data: object) -> SaeConfig:
    """A config from what JSON gave of it. path: where it was, for messages. Raises HearsaeError for what can't be one."""
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise HearsaeError(f"{path} is no SAE config of format {FORMAT}")
    known = {field.name for field in fields(SaeConfig)}
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items() if key in known}
    try:
        config = SaeConfig(**values)
        numbers = (config.d_in, config.d_sae, config.k, config.d_out, config.seed, config.rows, *config.widths)
        whole = all(isinstance(n, int) for n in numbers) and math.isfinite(config.scale) and math.isfinite(config.sparsity)
        texts = (config.site, config.target, config.model_sha256, config.context, config.hearsae, *config.store, *config.plan_hash)
        named = all(isinstance(text, str) for text in texts)
    except TypeError as error:
        raise HearsaeError(f"{path} is damaged: {error}") from None
    if not whole:
        raise HearsaeError(f"{path} is damaged: its widths, seed or rows are no whole numbers, or its scale or sparsity is not finite")
    if not named:
        raise HearsaeError(f"{path} is damaged: its site, its model or its stores are no text")
    return config
