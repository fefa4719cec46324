"""The pictures of `experiment attention`."""

from collections.abc import Sequence
from functools import reduce
from operator import add
from typing import Any

import numpy as np
from torch import Tensor

from analysis.attention import Locality
from analysis.pictures import new_figure
from cache.header import FRAME_SECONDS

LEAST_SHOWN = 1e-4
"""Of the largest relevance in a map: what is below has the darkest colour."""
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
"""Told apart by colour-blind people too (Okabe and Ito)."""


def whole_block(heads: Sequence[Locality]) -> Locality:
    """The mean of a block's heads; every head counts alike."""
    return reduce(add, heads)


def relevance_map(matrix: Tensor, n_frames: int) -> Any:
    """matrix: [shown, shown], relevance of columns for rows. n_frames: where the clip ends and padding begins."""
    from matplotlib.colors import LogNorm

    figure = new_figure(7.0, 5.8)
    axes = figure.subplots()
    values = matrix.numpy()
    values = values / max(float(values.max()), np.finfo(np.float32).tiny)
    seconds = len(values) * FRAME_SECONDS
    image = axes.imshow(
        np.clip(values, LEAST_SHOWN, 1), norm=LogNorm(LEAST_SHOWN, 1), extent=(0, seconds, seconds, 0), cmap="magma", interpolation="nearest"
    )
    end = n_frames * FRAME_SECONDS
    for line in (axes.axvline, axes.axhline):
        line(end, color="white", linewidth=1, linestyle="--")
    axes.set(xlabel="relevance of this position, s (dashed: the clip ends)", ylabel="for the output at this position, s")
    figure.colorbar(image, ax=axes, label="relevance, of the largest")
    return figure


def relevance_rows(rows: dict[int, Tensor], n_frames: int) -> Any:
    """rows: position -> [shown], relevance for the output at this position alone."""
    figure = new_figure(8.0, 1.6 * max(1, len(rows)) + 0.6)
    for axes, (position, row) in zip(np.atleast_1d(figure.subplots(len(rows), 1, sharex=True)), rows.items(), strict=True):
        share = row.numpy() / max(float(row.sum()), np.finfo(np.float32).tiny)
        axes.fill_between(np.arange(len(share)) * FRAME_SECONDS, share, step="post", color=COLOURS[0], linewidth=0)
        axes.axvline(position * FRAME_SECONDS, color="black", linewidth=1, linestyle=":")
        axes.axvline(n_frames * FRAME_SECONDS, color="0.5", linewidth=1, linestyle="--")
        axes.set(ylabel="share", ylim=(0, None), xlim=(0, len(share) * FRAME_SECONDS), title=f"for the output at {position * FRAME_SECONDS:.2f} s")
        axes.title.set_fontsize(9)
        axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("position, s (dashed: the clip ends)")
    return figure


def mass_curves(attention: Sequence[Sequence[Locality]], relevance: Locality, uniform: Locality, of_random: Locality, ks: Sequence[int]) -> Any:
    """Share of weight within k frames, for the ks asked for."""
    figure = new_figure(8.0, 5.0)
    axes = figure.subplots()
    many = len(attention) > len(COLOURS)
    for layer, heads in enumerate(attention):
        colour = _shade(layer, len(attention)) if many else COLOURS[layer]
        if not many:
            for head in heads:
                axes.plot(ks, [head.within(k) for k in ks], color=colour, linewidth=0.6, alpha=0.5)
        axes.plot(ks, [whole_block(heads).within(k) for k in ks], color=colour, linewidth=2, label=f"block {layer}")
    axes.plot(ks, [relevance.within(k) for k in ks], color="black", linewidth=2, label="relevance, all blocks")
    axes.plot(ks, [of_random.within(k) for k in ks], color="0.5", linewidth=1.5, linestyle="--", label="random weights, relevance")
    axes.plot(ks, [uniform.within(k) for k in ks], color="0.5", linewidth=1.5, linestyle=":", label="uniform attention")
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xticks(list(ks), [str(k) for k in ks])
    axes.minorticks_off()
    axes.set(xlabel="k: frames of 20 ms on either side", ylabel="share of weight within k", ylim=(0, 1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, ncols=1 + len(attention) // 12)
    return figure


def head_grid(attention: Sequence[Sequence[Locality]], of_random: Sequence[Sequence[Locality]], k: int) -> Any:
    """Share of weight within k frames of every block and head: the model's beside the control's, on one scale."""
    figure = new_figure(8.0, max(2.6, 0.35 * len(attention) + 1.2))
    both = figure.subplots(1, 2, sharey=True)
    for axes, ones, name in zip(both, (attention, of_random), ("the model", "random weights"), strict=True):
        values = np.array([[head.within(k) for head in heads] for heads in ones])
        image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        if values.size <= 100:  # more would not be legible
            for (layer, head), value in np.ndenumerate(values):
                axes.text(head, layer, f"{value:.2f}", ha="center", va="center", fontsize=8, color="white" if value < 0.6 else "black")
        axes.set(xlabel="head", title=name)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.yaxis.get_major_locator().set_params(integer=True)
    both[0].set_ylabel("block")
    figure.colorbar(image, ax=both, label=f"share within {k} frames")
    return figure


def _shade(layer: int, layers: int) -> Any:
    from matplotlib import colormaps

    return colormaps["viridis"](layer / max(1, layers - 1))
