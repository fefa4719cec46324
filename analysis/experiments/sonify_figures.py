"""The pictures of `experiment sonify`."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from whisper.audio import mel_filters

from analysis.pictures import new_figure
from cache.header import FRAME_SECONDS, SAMPLE_RATE

HZ = (200, 500, 1000, 2000, 4000, 7000)


class Heard(NamedTuple):
    """An input and what the feature does on it."""

    name: str
    mel: np.ndarray
    """[n_mels, 2 * frames], in Whisper's log-mel scale."""
    values: np.ndarray
    """[frames]"""


def band_of(hz: Sequence[float], n_mels: int) -> np.ndarray:
    """Where frequencies stand on the axis of mel bands, whose first is 0."""
    filters = mel_filters("cpu", n_mels).numpy()
    frequency = np.linspace(0, SAMPLE_RATE / 2, filters.shape[1])
    total = filters.sum(1)
    centres = (filters @ frequency)[total > 0] / total[total > 0]
    return np.interp(hz, centres, np.flatnonzero(total > 0))


def feature_figure(heard: Sequence[Heard], first: int, span: int) -> Any:
    """Spectrograms side by side, on one scale of loudness, and below each what the feature does over time. first, span: frames that were climbed."""
    figure = new_figure(3.4 * len(heard), 4.6)
    axes = figure.subplots(2, len(heard), sharex=True, sharey="row", height_ratios=(2, 1), squeeze=False)
    top = max(float(one.mel.max()) for one in heard)
    for (above, below), one in zip(axes.T, heard, strict=True):
        seconds = len(one.values) * FRAME_SECONDS
        n_mels = len(one.mel)
        image = above.imshow(
            one.mel,
            origin="lower",
            aspect="auto",
            extent=(0, seconds, -0.5, n_mels - 0.5),
            vmin=top - 2,
            vmax=top,
            cmap="magma",
            interpolation="nearest",
        )
        above.set_yticks(band_of(HZ, n_mels), [f"{hz:,}" for hz in HZ])
        above.set_title(one.name, fontsize=10)
        below.axvspan(first * FRAME_SECONDS, (first + span) * FRAME_SECONDS, color="#E69F00", alpha=0.3, linewidth=0)
        below.plot((np.arange(len(one.values)) + 0.5) * FRAME_SECONDS, one.values, color="#0072B2")
        below.axhline(0, color="0.7", linewidth=0.8)
        below.set(xlabel="s", xlim=(0, seconds))
        below.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("Hz")
    axes[1, 0].set_ylabel("value")
    figure.colorbar(image, ax=axes[0], label="log-mel")
    return figure


def gains_figure(rows: Sequence[dict[str, Any]], word: str) -> Any:
    """Gains of every climb: of the input, its sound, and silence."""
    figure = new_figure(8.0, max(2.4, 0.32 * len(rows) + 1.0))
    axes = figure.subplots()
    marks = (("gain", "the input found", "o", "#0072B2"), ("gain_audio", "its sound", "s", "#E69F00"), ("gain_silence", "silence", "x", "0.4"))
    for key, label, marker, colour in marks:
        known = [(row[key], at) for at, row in enumerate(rows) if row[key] is not None]
        axes.plot([value for value, _ in known], [at for _, at in known], marker, color=colour, label=label, linestyle="none")
    axes.axvline(1, color="0.5", linewidth=1, linestyle="--", label="strongest real moment")
    axes.axvline(0, color="0.8", linewidth=1)
    axes.set_yticks(range(len(rows)), [f"{word} {row['feature']}" if row["of"] == "feature" else row["of"] for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("gain: 0 is the mean on real speech, 1 its strongest moment")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure
