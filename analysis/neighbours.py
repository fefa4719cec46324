"""Moments like this one: the frames whose rows, or SAE codes, have the highest cosine with those of a given frame.

Exact: every committed row is compared, a pass over the store for each question. There is no index to build, to keep, or to be wrong.

Rows of a site are centred by default: cosines are of x - mean over the site's rows. The mean of Whisper's residual stream is longer than
what varies around it, so that without this all frames are alike (docs/cookbook.md has figures).

Codes are compared as they are: they are sparse, and none below zero. A latent's value does not depend on the other latents (but in the TopK
architecture), so the latents of the given frame alone say how far a cosine can go: z the codes of a row and z' those of them that the given
frame has too, z . q = z' . q and |z'| <= |z|, hence cos(z, q) <= cos(z', q). Whole codes are made only of rows whose bound reaches the
n-th best cosine found so far. `every_code=True` makes those of all rows, the plain twin of this.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from analysis.moments import Stretch, read_stretch
from cache.errors import HearsaeError
from cache.store import ActivationStore

if TYPE_CHECKING:
    from analysis.features import Features, SaeLatents

BLOCK_BYTES = 32 << 20
"""Of rows as float32 that are looked at together, whole chunks."""
REFINED_AT_ONCE = 1024
"""Rows whose whole codes are made together, those of the highest bound first."""
ROUNDING = 1e-5
"""By which a bound may come out below its cosine, and a value on the other side of its threshold: they come from different float32 products."""
TORCH_VALUES = 150_000_000
"""Values from which on loading torch (0.7 s) is won back by its conversion of float16: of values near zero, as most behind a GELU are, it is
eight times as fast as numpy's (300 million: 0.2 s, not 1.7)."""
NOTHING = 1e-12
"""Squared length below which a row has no direction; its cosine counts as 0."""


class _Block(NamedTuple):
    rows: np.ndarray
    """[n, d] as stored."""
    clip: np.ndarray
    """int64 [n]"""
    frame: np.ndarray
    """int64 [n]: frame or token within the clip."""


class _Best:
    """The n best so far, best first; of equal cosines the one with the lower clip and frame."""

    def __init__(self, n: int, one_per_clip: bool) -> None:
        self.n = n
        self.one_per_clip = one_per_clip
        self.cosine, self.clip, self.frame = np.zeros(0), np.zeros(0, np.int64), np.zeros(0, np.int64)

    @property
    def least(self) -> float:
        """What a cosine must reach to be among them."""
        return float(self.cosine[-1]) if len(self.cosine) == self.n else -np.inf

    def add(self, cosine: np.ndarray, clip: np.ndarray, frame: np.ndarray) -> None:
        good = np.flatnonzero(cosine >= self.least)
        columns = [np.concatenate([mine, new[good]]) for mine, new in ((self.cosine, cosine), (self.clip, clip), (self.frame, frame))]
        order = np.lexsort((columns[2], columns[1], -columns[0]))
        if self.one_per_clip:
            _, first = np.unique(columns[1][order], return_index=True)
            order = order[np.sort(first)]
        self.cosine, self.clip, self.frame = (column[order[: self.n]] for column in columns)


def nearest_rows(
    store: ActivationStore,
    site: str,
    where: Stretch,
    n: int = 20,
    *,
    centred: bool = True,
    one_per_clip: bool = False,
    other_clips: bool = False,
) -> list[dict[str, Any]]:
    """The `n` frames most like a given one by the cosine of a site's rows: `cosine, clip, source, frame, start_s, end_s, text`, best first.

    where: one frame, of `analysis.moments.stretch_at`; it is not among the answers.
    centred: subtract the mean of the site's committed rows first.
    one_per_clip: only the best frame of every clip. other_clips: none of the clip itself.
    Raises HearsaeError for a frame whose row is as good as the mean (or zero), and as reading does.
    """
    width = store.sites[site]["width"]
    mean = store.stats(site).mean.astype(np.float32) if centred else np.zeros(width, np.float32)
    query = read_stretch(store, site, where)[0] - mean
    if query @ query < NOTHING:
        raise HearsaeError(f"frame {where.first} of clip {where.clip} has no direction at {site}: nothing is like it")
    query = (query / np.sqrt(query @ query)).astype(np.float32)
    best = _Best(n, one_per_clip)
    buffer = np.empty((0, width), np.float32)
    many = width * store.axis(site).shards * store.axis(site).shard_rows > TORCH_VALUES
    for block in _blocks(store, site):
        if len(buffer) < len(block.rows):
            buffer = np.empty(block.rows.shape, np.float32)  # once: memory that is new costs more than the product
        rows = buffer[: len(block.rows)]
        (_copy_by_torch if many else np.copyto)(rows, block.rows)
        rows -= mean
        squares = np.einsum("ij,ij->i", rows, rows)
        cosine = rows @ query / np.sqrt(np.maximum(squares, NOTHING))
        _keep(best, cosine, block, where, other_clips)
    return _answer(store, site, best)


def nearest_codes(
    store: ActivationStore,
    latents: "SaeLatents",
    where: Stretch,
    n: int = 20,
    *,
    one_per_clip: bool = False,
    other_clips: bool = False,
    every_code: bool = False,
) -> list[dict[str, Any]]:
    """The same by the cosine of the codes of an SAE; rows that share no latent with the given frame are none of the answers.

    every_code: make the whole codes of every row; the same answers, later.
    Raises HearsaeError for a frame in which no latent is active.
    """
    site = latents.site
    query = latents.dense(read_stretch(store, site, where))[0]
    if query @ query < NOTHING:
        raise HearsaeError(f"no latent is active in frame {where.first} of clip {where.clip}: nothing is like it")
    query /= np.sqrt(query @ query)
    best = _Best(n, one_per_clip)
    plain = every_code or latents.dictionary.config.arch == "topk"
    bound_of = None if plain else _Bound(latents, query)
    for block in _blocks(store, site):
        if bound_of is None:
            _keep(best, _cosines(latents, block.rows, query), block, where, other_clips)
            continue
        bound = bound_of(block.rows)
        order = np.argsort(-bound, kind="stable")
        order = order[bound[order] > 0]
        for first in range(0, len(order), REFINED_AT_ONCE):
            some = order[first : first + REFINED_AT_ONCE]
            some = some[bound[some] >= best.least - ROUNDING]
            if not len(some):
                break
            part = _Block(block.rows[some], block.clip[some], block.frame[some])
            _keep(best, _cosines(latents, part.rows, query), part, where, other_clips)
    return _answer(store, site, best)


def _copy_by_torch(to: np.ndarray, values: np.ndarray) -> None:
    """`np.copyto`, sooner."""
    import torch

    torch.from_numpy(to).copy_(torch.from_numpy(values))


class _Bound:
    """The highest cosine that a row's codes can have with the given ones, from the latents that the given ones have."""

    def __init__(self, latents: "SaeLatents", query: np.ndarray) -> None:
        import torch

        dictionary = latents.dictionary
        active = np.flatnonzero(query)
        self.query = query[active]
        shift = torch.zeros(dictionary.config.d_in) if dictionary.config.target else dictionary.b_dec
        weights = dictionary.W_enc[:, active]
        self.weights = weights.numpy().copy()
        self.bias = (dictionary.b_enc[active] - shift @ weights).numpy()
        threshold = dictionary.threshold if dictionary.threshold.ndim == 0 else dictionary.threshold[active]
        self.threshold = threshold.clamp(min=0.0).numpy()

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        codes = rows.astype(np.float32) @ self.weights + self.bias
        unsure = (np.abs(codes - self.threshold) < ROUNDING).any(axis=1)
        codes *= codes > self.threshold
        squares = np.einsum("ij,ij->i", codes, codes)
        return np.where(unsure, 1.0, codes @ self.query / np.sqrt(np.maximum(squares, NOTHING)))


def _cosines(latents: "SaeLatents", rows: np.ndarray, query: np.ndarray) -> np.ndarray:
    codes = latents.sparse(rows)
    dot = np.bincount(codes.row, codes.value * query[codes.latent], minlength=len(rows))
    squares = np.bincount(codes.row, np.square(codes.value), minlength=len(rows))
    return dot / np.sqrt(np.maximum(squares, NOTHING))


def nearest(
    store: ActivationStore,
    features: "Features",
    where: Stretch,
    n: int = 20,
    *,
    one_per_clip: bool = False,
    other_clips: bool = False,
) -> list[dict[str, Any]]:
    """By codes for the latents of an SAE; for all others, which are the site's rows in another basis, by those, centred."""
    if features.spec.startswith("sae:"):
        return nearest_codes(store, features, where, n, one_per_clip=one_per_clip, other_clips=other_clips)  # type: ignore[arg-type]
    return nearest_rows(store, features.site, where, n, one_per_clip=one_per_clip, other_clips=other_clips)


def _keep(best: _Best, cosine: np.ndarray, block: _Block, where: Stretch, other_clips: bool) -> None:
    itself = block.clip == where.clip
    if not other_clips:
        itself &= block.frame == where.first
    cosine = np.where(itself, -np.inf, cosine)
    found = np.flatnonzero((cosine >= best.least) & ~itself)
    best.add(cosine[found], block.clip[found], block.frame[found])


def _answer(store: ActivationStore, site: str, best: _Best) -> list[dict[str, Any]]:
    clips = store.clips.select(["source", "start_s", "text", "source_text"]).take(pa.array(best.clip)).to_pylist()
    rows = []
    for cosine, clip, frame, row in zip(best.cosine.tolist(), best.clip.tolist(), best.frame.tolist(), clips, strict=True):
        start_s = None if store.sites[site]["axis"] == "token" else row["start_s"] + store.header.frame_seconds * frame
        end_s = None if start_s is None else start_s + store.header.frame_seconds
        text = row["text"] if row["text"] is not None else row["source_text"]
        rows.append({"cosine": cosine, "clip": clip, "source": row["source"], "frame": frame, "start_s": start_s, "end_s": end_s, "text": text})
    return rows


def _blocks(store: ActivationStore, site: str) -> Iterator[_Block]:
    """All committed rows but those of skipped clips, in address order, whole chunks at a time."""
    axis = store.axis(site)
    step = axis.chunk_rows * max(1, BLOCK_BYTES // (4 * store.sites[site]["width"] * axis.chunk_rows))
    for shard in store.committed(site):
        spans = store.spans(shard, site)
        if not spans:
            continue
        address = np.concatenate([np.arange(span.start, span.stop) for span in spans])
        clip = np.repeat([span.clip for span in spans], [span.stop - span.start for span in spans])
        frame = np.concatenate([np.arange(span.stop - span.start) for span in spans])
        for start in range(shard * axis.shard_rows, spans[-1].stop, step):
            stop = min(start + step, spans[-1].stop)
            first, last = np.searchsorted(address, [start, stop])
            if last > first:
                rows = store.read(site, start, stop)
                here = slice(first, last)
                kept = address[here] - start
                yield _Block(rows if len(kept) == len(rows) else rows[kept], clip[here], frame[here])
