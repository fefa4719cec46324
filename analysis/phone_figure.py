"""The picture of a feature's phones: what is said while its activation is in each of equally wide ranges, beside what is said at any time."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from analysis.arpabet import SILENCE, manner
from analysis.evidence import PhoneMix
from analysis.pictures import new_figure, picture
from cache.errors import HearsaeError
from cache.location import put

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GROUPS: dict[str | None, tuple[str, str]] = {
    "vowel": ("#0072B2", "vowels"),
    "glide": ("#56B4E9", "glides"),
    "liquid": ("#009E73", "liquids"),
    "nasal": ("#CC79A7", "nasals"),
    "fricative": ("#E69F00", "fricatives"),
    "affricate": ("#882255", "affricates"),
    "stop": ("#D55E00", "stops"),
    None: ("#777777", "outside ARPAbet"),
    SILENCE: ("#CFCFCF", "silence"),
}
"""Colour, of Okabe and Ito and one of Paul Tol's, and name, from the top of a bar to its foot. The colours differ in lightness too."""
TINTS = (0.0, 0.28)
"""How much white is in the colour of a group's phones, in turn."""
NAMED_FROM = 0.035
"""Of a bar: the least height in which a name can be read."""
FEW_FRAMES = 30
"""Below so many, a bar is drawn pale: its shares are chance."""
PALE = 0.45
DARK = 0.55
"""Luminance below which a name is written in white."""
FORMATS = (".png", ".svg")


def save_mix(mix: PhoneMix, title: str, path: Path) -> None:
    """Draws `mix` into a file. Raises HearsaeError for another ending than those of FORMATS, and where the file can't be written."""
    if path.suffix.lower() not in FORMATS:
        raise HearsaeError(f"can't draw {path}: its name must end in {' or '.join(FORMATS)}")
    put(path, picture(draw_mix(mix, title), path.suffix[1:].lower()))


def draw_mix(mix: PhoneMix, title: str) -> "Figure":
    """Stacked shares of the phones in each range, grouped by manner; the number of frames over each bar, the base rates in a bar beside them."""
    figure = new_figure(11, 6.4)
    axes = figure.subplots()
    frames = mix.frames.sum(axis=1)
    order = stacking(mix.phones)
    base_at = len(frames) + 0.5
    for i, n in enumerate(frames.tolist()):
        if n:
            _bar(axes, i, mix.frames[i] / n, mix.phones, order, PALE if n < FEW_FRAMES else 1.0)
        axes.text(i, 1.01, f"{n:,}", ha="center", va="bottom", fontsize=8)
    _bar(axes, base_at, mix.base, mix.phones, order, 1.0)
    axes.text(base_at, 1.01, "base rate", ha="center", va="bottom", fontsize=8)
    ends = [f"{low:.3g}\nto {high:.3g}" for low, high in zip(mix.edges, mix.edges[1:], strict=False)]
    axes.set_xticks([*range(len(frames)), base_at], [*ends, "any value"], fontsize=8)
    some_are_few = bool(((frames > 0) & (frames < FEW_FRAMES)).any())
    below = f"activation (pale: fewer than {FEW_FRAMES} frames)" if some_are_few else "activation"
    axes.set(xlim=(-0.6, base_at + 0.6), ylim=(0, 1), xlabel=below, ylabel="share of the labelled frames")
    axes.set_title(title.replace("$", r"\$"), fontsize=10, pad=20)
    axes.text(-0.65, 1.01, "frames", ha="right", va="bottom", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    _legend(figure, mix.phones)
    return figure


def group_of(phone: str) -> str | None:
    """The key of GROUPS that a phone has."""
    return SILENCE if phone == SILENCE else manner(phone)


def stacking(phones: tuple[str, ...]) -> list[int]:
    """From the foot of a bar to its top: groups together, phones in the order of the alphabet."""
    rank = {group: i for i, group in enumerate(GROUPS)}
    return sorted(range(len(phones)), key=lambda i: (-rank[group_of(phones[i])], phones[i]))


def _bar(axes: "Axes", x: float, shares: np.ndarray, phones: tuple[str, ...], order: list[int], alpha: float) -> None:
    foot, in_group, last = 0.0, 0, object()
    for i in order:
        group = group_of(phones[i])
        in_group, last = (in_group + 1, group) if group == last else (0, group)
        colour = _tinted(GROUPS[group][0], 1 - alpha * (1 - TINTS[in_group % len(TINTS)]))
        if shares[i] > 0:
            axes.bar(x, shares[i], bottom=foot, width=0.86, color=colour, edgecolor="white", linewidth=0.4)
        if shares[i] >= NAMED_FROM:
            luminance = float(np.dot(colour, (0.299, 0.587, 0.114)))
            axes.text(
                x, foot + shares[i] / 2, f"{phones[i]} {100 * shares[i]:.0f}%", ha="center", va="center", fontsize=7.5,
                color="white" if luminance < DARK else "black",
            )  # fmt: skip
        foot += shares[i]


def _tinted(colour: str, white: float) -> tuple[float, float, float]:
    from matplotlib.colors import to_rgb

    red, green, blue = (1 - (1 - white) * (1 - channel) for channel in to_rgb(colour))
    return red, green, blue


def _legend(figure: "Figure", phones: tuple[str, ...]) -> None:
    from matplotlib.patches import Patch

    there = {group_of(phone) for phone in phones}
    handles = [Patch(color=colour, label=name) for group, (colour, name) in GROUPS.items() if group in there]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False)
