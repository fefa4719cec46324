"""How often and how strongly features are active in some speech, and random features that match them: the control of edits."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from analysis.experiments.changes import worker_steerable
from analysis.experiments.speech import Clip, Mapper, Speech, clip_mel, worker_model
from analysis.steering import site_of
from cache.errors import HearsaeError
from cache.model import LoadedModel, capture, fast_matmul
from cache.sites import Site

NEAREST = 20
"""A control is drawn from so many features, those that match best."""
TINY = 1e-12


class _Sums(NamedTuple):
    """Of one piece of the speech."""

    rows: int
    fired: np.ndarray
    absolute: np.ndarray
    row: np.ndarray


class Activity(NamedTuple):
    """Of every feature of a site, over all rows of the clips' own frames or tokens."""

    rows: int
    density: np.ndarray
    """float64 [count]: part of the rows in which the value is not 0; of neurons and directions 1."""
    mean_abs: np.ndarray
    """float64 [count]: mean of |value| over all rows."""
    mean_row: np.ndarray
    """float64 [d]: of the site's rows themselves."""

    def most_active(self, n: int) -> tuple[int, ...]:
        """The n features with the largest mean |value| that are active at all, from the largest on."""
        order = np.argsort(-self.mean_abs, kind="stable")
        return tuple(int(feature) for feature in order[:n] if self.density[feature] > 0)

    def matched(self, features: Sequence[int], sets: int, seed: int) -> list[tuple[int, ...]]:
        """`sets` controls: in place of each feature another one, drawn from those that come closest to it in mean |value| and in density.

        Distances are of logarithms. Within a set no feature stands twice, and none of `features` in any, as long as there are enough others
        that are active. Raises HearsaeError where there are not.
        """
        generator = np.random.default_rng(seed)
        place = np.log(np.stack([self.mean_abs, self.density], axis=1) + TINY)
        others = np.setdiff1d(np.flatnonzero(self.density > 0), features)
        if len(others) < len(features):
            raise HearsaeError(f"{len(features)} features are edited and only {len(others)} others are active here: too few for a random control")
        found = []
        for _ in range(sets):
            left, chosen = others, []
            for feature in features:
                near = left[np.argsort(((place[left] - place[feature]) ** 2).sum(1), kind="stable")[:NEAREST]]
                chosen.append(int(generator.choice(near)))
                left = left[left != chosen[-1]]
            found.append(tuple(chosen))
        return found

    def random(self, but: Sequence[int], n: int, seed: int) -> tuple[int, ...]:
        """n other features that are active, at random; fewer where there are fewer."""
        others = np.setdiff1d(np.flatnonzero(self.density > 0), but)
        return tuple(np.random.default_rng(seed).permutation(others)[:n].tolist())


def activity(speech: Speech, name: str, device: str, spec: str, seed: int, language: str, map_pieces: Mapper) -> Activity:
    """Runs the model over all clips once. Raises HearsaeError where a site of the decoder is asked for and no clip has text."""
    sums = map_pieces(partial(_sums, speech, name, device, spec, seed, language), speech.pieces())
    rows = sum(one.rows for one in sums)
    if not rows:
        raise HearsaeError(f"{speech.dataset} has no text, without which the decoder has nothing to be shown: give the dataset a column 'text'")
    fired, absolute, row = (np.sum(parts, axis=0) / rows for parts in zip(*(one[1:] for one in sums), strict=True))
    return Activity(rows, fired, absolute, row)


def _sums(speech: Speech, name: str, device: str, spec: str, seed: int, language: str, clips: Sequence[Clip]) -> _Sums:
    model = worker_model(name, device)
    features = worker_steerable(spec, name, device, seed)
    site = site_of(features.site, model)
    rows, sums = 0, [np.zeros(features.count), np.zeros(features.count), np.zeros(site.width)]
    for clip in clips:
        x = own_rows(model, speech, clip, site, language)
        values = features.values(x, range(features.count))
        rows += len(x)
        for total, part in zip(sums, ((values != 0), values.abs(), x), strict=True):
            total += part.double().sum(0).cpu().numpy()
    return _Sums(rows, *sums)


@torch.no_grad()
def own_rows(model: LoadedModel, speech: Speech, clip: Clip, site: Site, language: str) -> torch.Tensor:
    """The site's rows of one clip, without padding: [n_frames, d], or teacher-forced on its text [tokens, d]; of a clip without text none."""
    if site.needs_decoder and not clip.text:
        return torch.zeros(0, site.width, device=model.device)
    tokens = model.decoder_input(clip.text or "", language) if site.needs_decoder else []
    with fast_matmul():
        found = capture(model, clip_mel(model, speech, clip)[None], [site], [tokens] if tokens else ())[site.name][0]
    return found[: clip.n_frames] if site.axis == "frame" else found[: len(tokens)]
