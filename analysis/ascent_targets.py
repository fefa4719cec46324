"""Single features as functions that gradients go through: a neuron of an encoder site, an SAE's latent, a direction.

Each has a value, which is what scans and pages show of it, and a score to climb. They are the same but where the value is flat, or worse: a latent
below its threshold is 0 whatever the input, and a GELU falls as its input rises to -0.75. There the score is what goes into the nonlinearity.
"""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from analysis.steering import site_of
from cache.errors import HearsaeError
from cache.location import location
from cache.model import LoadedModel
from cache.sites import Site
from sae.models import Dictionary, load_dictionary


class Probe(Protocol):
    """A scalar function of the rows of one site."""

    @property
    def site(self) -> str:
        """Whose rows it takes."""

    def score(self, rows: Tensor) -> Tensor:
        """[..., d] -> [...]: what to climb; differentiable."""

    def value(self, rows: Tensor) -> Tensor:
        """[..., d] -> [...]: what is reported."""


class Neuron:
    """A unit of a site. Of one behind a GELU the rows taken are those before it."""

    def __init__(self, site: str, number: int) -> None:
        self.is_behind_gelu = site.endswith(".mlp.1")
        self.site = site.removesuffix("1") + "0" if self.is_behind_gelu else site
        self.number = number

    def score(self, rows: Tensor) -> Tensor:
        return rows[..., self.number]

    def value(self, rows: Tensor) -> Tensor:
        return F.gelu(self.score(rows)) if self.is_behind_gelu else self.score(rows)


class Latent:
    """A latent of a dictionary. Its score is its pre-activation."""

    def __init__(self, dictionary: Dictionary, number: int) -> None:
        self.site = dictionary.config.site
        self.dictionary = dictionary
        self.number = number

    def score(self, rows: Tensor) -> Tensor:
        return self.dictionary.shifted(rows) @ self.dictionary.W_enc[:, self.number] + self.dictionary.b_enc[self.number]

    def value(self, rows: Tensor) -> Tensor:
        return self.dictionary.encode(rows.flatten(0, -2))[:, self.number].unflatten(0, rows.shape[:-1])


class Direction:
    """(x - origin) . weight: the control of the other two."""

    def __init__(self, site: str, weight: Tensor, origin: Tensor | float = 0.0) -> None:
        self.site = site
        self.weight = weight
        self.origin = origin

    def score(self, rows: Tensor) -> Tensor:
        return (rows - self.origin) @ self.weight

    value = score


class Negated:
    """The feature's negative."""

    def __init__(self, probe: Probe) -> None:
        self.site = probe.site
        self.probe = probe

    def score(self, rows: Tensor) -> Tensor:
        return -self.probe.score(rows)

    def value(self, rows: Tensor) -> Tensor:
        return -self.probe.value(rows)


def open_probe(spec: str, number: int, model: LoadedModel, of_its_model: bool = True) -> Neuron | Latent:
    """Feature `number` of `neurons:SITE` or `sae:DIR`, on the model's device.

    of_its_model: an SAE must have been trained on this very model; the control with random weights is none of its models.
    Raises HearsaeError for a specification that can't be read, a number that there is not, sites of a decoder, and an SAE of something else.
    """
    kind, _, name = spec.partition(":")
    if kind not in ("neurons", "sae") or not name:
        raise HearsaeError(f"features '{spec}' can't be read: use neurons:SITE or sae:DIR")
    if kind == "neurons":
        site = _encoder_site(name, model)
        _check_number(number, site.width, f"{site.name} has neurons")
        return Neuron(site.name, number)
    dictionary = load_dictionary(location(name))
    config = dictionary.config
    if config.kind == "crosscoder":
        raise HearsaeError(f"the SAE in {name} is a crosscoder of {', '.join(config.sites)}: only those of one site can be climbed")
    site = _encoder_site(config.site, model)
    if config.d_in != site.width:
        raise HearsaeError(f"the SAE in {name} takes rows of width {config.d_in}, but {site.name} of {model.name} has width {site.width}")
    if of_its_model and config.model_sha256 != model.sha256:
        raise HearsaeError(
            f"the SAE in {name} was trained on model {config.model_sha256[:12] or 'unknown'}, and {model.name} is {model.sha256[:12]}: "
            "give the --model that it was trained on"
        )
    _check_number(number, config.d_sae, f"the SAE in {name} has latents")
    return Latent(dictionary.to(model.device), number)


def random_direction(probe: Neuron | Latent, neuron_site: str, width: int, seed: int) -> Direction:
    """A direction drawn uniformly, at the feature's site and as long as the feature's own: 1 of a neuron, the norm of a latent's encoder column.

    neuron_site, width: of a neuron as it was asked for, behind the nonlinearity.
    """
    generator = torch.Generator().manual_seed(seed)
    if isinstance(probe, Neuron):
        return Direction(neuron_site, F.normalize(torch.randn(width, generator=generator), dim=0))
    column = probe.dictionary.W_enc[:, probe.number]
    drawn = F.normalize(torch.randn(len(column), generator=generator), dim=0).to(column.device)
    return Direction(probe.site, drawn * column.norm(), probe.dictionary.b_dec)


def _encoder_site(name: str, model: LoadedModel) -> Site:
    site = site_of(name, model)
    if site.needs_decoder:
        raise HearsaeError(f"{name} is a site of the decoder, whose rows are of words, not of sound: choose a site of the encoder")
    return site


def _check_number(number: int, count: int, what: str) -> None:
    if not 0 <= number < count:
        raise HearsaeError(f"--feature {number}: {what} 0 to {count - 1}")
