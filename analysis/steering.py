"""Steering: scaling, setting, adding to or limiting the value of features at one site of a Whisper while it runs.

A feature has a value at every position and a direction in which it writes. An edit changes the value from f(x) to f', and x with it:

    x' = x + sum over features of (f' - f(x)) * direction

What an SAE does not reconstruct of x stays in x' as it is, so an edit that changes no value changes nothing. f' is not always the value that x'
has: the directions of latents are not orthogonal, and a latent may have a threshold.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple, Protocol, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from analysis.interventions import edit_site
from cache.errors import HearsaeError
from cache.location import Location, location
from cache.model import LoadedModel
from cache.sites import Site, match_sites
from sae.baselines import random_basis
from sae.models import Dictionary, SaeConfig, load_dictionary

KINDS = "neurons:SITE, sae:DIR or random:SITE"
How = Literal["scale", "set", "add", "clamp"]
ChangeRows = Callable[[Tensor], Tensor]
"""Rows [rows, d] of a site -> the rows that take their place; the very same tensor where none changes. It must not write into its argument."""


class Edit(NamedTuple):
    """What becomes of the value of some features. Of several edits of one feature each gets what the one before it made."""

    features: tuple[int, ...]
    how: How
    """`scale`: the value times the amount (0 removes the feature, 1 changes nothing); `set`: the amount; `add`: the value plus the amount;
    `clamp`: the value, but at most the amount. `set` and `add` give a feature a value where it had none."""
    amount: float
    """In units of the feature's value; of `scale` a factor."""


class Steerable(Protocol):
    """Features that can be read from the rows of one site of a model, and written into them."""

    @property
    def spec(self) -> str:
        """`neurons:SITE`, `sae:DIR` (DIR absolute) or `random:SITE`."""

    @property
    def site(self) -> str:
        """The site whose rows are read and written."""

    @property
    def axis(self) -> str:
        """`frame` or `token`: what a row of the site is."""

    @property
    def count(self) -> int:
        """How many features there are."""

    def values(self, x: Tensor, features: Sequence[int]) -> Tensor:
        """Rows [rows, d] -> the values of some features, float32 [rows, len(features)]."""

    def directions(self, features: Sequence[int]) -> Tensor:
        """What a value of 1 adds to a row: float32 [len(features), d]."""


class SiteNeurons:
    """The units of a site: a value is a coordinate, a direction a unit vector."""

    def __init__(self, site: Site, device: torch.device) -> None:
        self.spec, self.site, self.axis, self.count = f"neurons:{site.name}", site.name, site.axis, site.width
        self.device = device

    def values(self, x: Tensor, features: Sequence[int]) -> Tensor:
        return x[:, list(features)].float()

    def directions(self, features: Sequence[int]) -> Tensor:
        return F.one_hot(torch.tensor(list(features), dtype=torch.long, device=self.device), self.count).float()


class SiteBasis:
    """A random orthonormal basis, the control: values x @ Q, directions Q^T. Nothing is centred, so all directions together are x itself."""

    def __init__(self, site: Site, seed: int, device: torch.device) -> None:
        self.spec, self.site, self.axis, self.count = f"random:{site.name}", site.name, site.axis, site.width
        self.basis = torch.from_numpy(random_basis(site.width, seed)).float().to(device)

    def values(self, x: Tensor, features: Sequence[int]) -> Tensor:
        return x.float() @ self.basis[:, list(features)]

    def directions(self, features: Sequence[int]) -> Tensor:
        return self.basis[:, list(features)].t()


class SiteLatents:
    """The latents of an SAE at inference; directions are the rows of its decoder."""

    def __init__(self, spec: str, site: Site, dictionary: Dictionary) -> None:
        """dictionary: on the device of the model, for rows as the model has them."""
        self.spec, self.site, self.axis, self.count = spec, site.name, site.axis, dictionary.config.d_sae
        self.dictionary = dictionary

    def values(self, x: Tensor, features: Sequence[int]) -> Tensor:
        chosen, sae = list(features), self.dictionary
        if sae.config.arch == "topk":  # where the others decide too
            return sae.encode(x)[:, chosen]
        pre = sae.shifted(x.float()) @ sae.W_enc[:, chosen] + sae.b_enc[chosen]
        return pre * (pre > sae.threshold.expand(self.count)[chosen].clamp(min=0.0))

    def directions(self, features: Sequence[int]) -> Tensor:
        return self.dictionary.W_dec[list(features)]


def open_steerable(spec: str, model: LoadedModel, seed: int = 0) -> Steerable:
    """The features that `spec` names, on the model's device.

    seed: of the random basis. Raises HearsaeError for a specification that can't be read, a site that the model does not have, a dictionary that
    reads or writes more than one site, and an SAE of another model or width.
    """
    kind, _, name = spec.partition(":")
    if kind not in ("neurons", "sae", "random") or not name:
        raise HearsaeError(f"features '{spec}' can't be steered: use {KINDS}")
    if kind == "sae":
        return _open_sae(name, model)
    site = site_of(name, model)
    return SiteNeurons(site, model.device) if kind == "neurons" else SiteBasis(site, seed, model.device)


def site_of(name: str, model: LoadedModel) -> Site:
    """The one site of that name. Raises HearsaeError for a name that the model does not have, and for a pattern."""
    found = match_sites([name], model.dims_dict, model.has_decoder)
    if [site.name for site in found] != [name]:
        raise HearsaeError(f"'{name}' is a pattern: name one site, such as {found[0].name}")
    return found[0]


def _open_sae(folder: str, model: LoadedModel) -> SiteLatents:
    place = location(folder)
    dictionary = load_dictionary(place)
    site = check_sae(place, dictionary.config, model)
    return SiteLatents(f"sae:{place.absolute()}", site, dictionary.requires_grad_(False).to(model.device))


def check_sae(place: Location, config: SaeConfig, model: LoadedModel) -> Site:
    """The site that an SAE reads and writes. place: where it is, for messages. Raises HearsaeError for a transcoder or crosscoder, and for an SAE of
    another model, site or width."""
    if config.kind != "sae":
        raise HearsaeError(f"the dictionary in {place} is a {config.kind}: only an SAE reads and writes one and the same site of a running model")
    if config.model_sha256 != model.sha256:
        theirs = config.model_sha256[:12] or "unknown"
        raise HearsaeError(f"the SAE in {place} was trained on model {theirs}, and {model.name} is {model.sha256[:12]}: give its own --model")
    site = site_of(config.site, model)
    if config.d_in != site.width:
        raise HearsaeError(f"the SAE in {place} takes rows of width {config.d_in}, but {site.name} of {model.name} has width {site.width}")
    return site


@contextmanager
def steering(model: nn.Module, steerable: Steerable, edits: Sequence[Edit], spans: Sequence[tuple[int, int]] | None = None) -> Iterator[None]:
    """While it lasts, the edits hold in all that is computed from the site.

    spans: for each clip of the batch the frames [start, stop) where they hold; None: at every position, padding included. Rows whose values no
    edit changes stay as they are, bit for bit. Composes with other edits of sites, and undoes itself however it is left.
    Raises HearsaeError for features that are not there, an edit that can't be, and spans of a site whose rows are tokens: Whisper decodes them
    one by one, so a position's number is not known there. While it lasts, a batch that is not one of len(spans) clips raises it too.
    """
    change = edit_rows(steerable, edits)
    if spans is not None and steerable.axis != "frame":
        raise HearsaeError(f"{steerable.site} has tokens, not frames: edits hold at all of them, not in stretches of time")
    for start, stop in spans or ():
        if not 0 <= start <= stop:
            raise HearsaeError(f"frames {start}:{stop} are no stretch of time")
    with edit_site(model, steerable.site, at_positions(change, spans)):
        yield


def edit_rows(steerable: Steerable, edits: Sequence[Edit]) -> ChangeRows:
    """What the edits make of rows. Raises HearsaeError for features that are not there, an unknown kind of edit, and an amount that is not finite."""
    for edit in edits:
        if edit.how not in get_args(How):
            raise HearsaeError(f"features can't be edited by '{edit.how}': use {', '.join(get_args(How))}")
        if not math.isfinite(edit.amount):
            raise HearsaeError(f"{edit.how} {edit.amount}: the amount must be a finite number")
        for feature in edit.features:
            if not 0 <= feature < steerable.count:
                raise HearsaeError(f"there is no feature {feature}: {steerable.spec} has 0 to {steerable.count - 1}")
    features = list(dict.fromkeys(feature for edit in edits for feature in edit.features))
    directions = steerable.directions(features)

    def change(rows: Tensor) -> Tensor:
        values = steerable.values(rows, features)
        delta = edited(values, features, edits) - values
        moved = (delta != 0).any(1)
        if not moved.any():
            return rows
        out = rows.clone()
        out[moved] += (delta[moved] @ directions).to(rows.dtype)
        return out

    return change


def edited(values: Tensor, features: Sequence[int], edits: Sequence[Edit]) -> Tensor:
    """What the edits make of the values [rows, len(features)] of these features."""
    out = values.clone()
    column = {feature: number for number, feature in enumerate(features)}
    for edit in edits:
        at = [column[feature] for feature in dict.fromkeys(edit.features)]
        if edit.how == "scale":
            out[:, at] *= edit.amount
        elif edit.how == "add":
            out[:, at] += edit.amount
        elif edit.how == "set":
            out[:, at] = edit.amount
        else:
            out[:, at] = out[:, at].clamp(max=edit.amount)
    return out


def at_positions(change: ChangeRows, spans: Sequence[tuple[int, int]] | None) -> Callable[[Tensor], Tensor]:
    """For `edit_site`: `change` of the rows in each clip's frames [start, stop), or of all (None). What it gives back as it was stays the same
    tensor. While in force, raises HearsaeError for a batch of another number of clips, and for frames beyond the window."""

    def change_site(x: Tensor) -> Tensor:
        """[batch, positions, d] -> the same shape."""
        if spans is None:
            rows = x.flatten(0, 1)
            changed = change(rows)
            return x if changed is rows else changed.view(x.shape)
        where = _within(x, spans)
        rows = x[where]
        changed = change(rows)
        if changed is rows:
            return x
        out = x.clone()
        out[where] = changed
        return out

    return change_site


def _within(x: Tensor, spans: Sequence[tuple[int, int]]) -> Tensor:
    """Which positions of x [batch, positions, d] lie in the span of their clip: bool [batch, positions]."""
    if len(spans) != len(x):
        raise HearsaeError(f"there are stretches of time for {len(spans)} clips, and the batch has {len(x)}")
    longest = max(stop for _, stop in spans)
    if longest > x.shape[1]:
        raise HearsaeError(f"frames up to {longest} were to be edited, and Whisper's window has {x.shape[1]}")
    position = torch.arange(x.shape[1], device=x.device)
    start, stop = torch.tensor(spans, device=x.device).t()[:, :, None]
    return (start <= position) & (position < stop)
