"""`hearsae experiment sonify`."""

from dataclasses import dataclass
from typing import Literal

from analysis.ascent import AscentSettings
from analysis.experiments.report import Report
from analysis.experiments.sonify import sonify
from cluster.commands.experiments import Experiment

DEFAULT = AscentSettings()


@dataclass(frozen=True, kw_only=True)
class Sonify(Experiment):
    """What does a feature listen for? The input that excites it most, by gradient ascent, as a spectrogram and as sound."""

    NAME = "sonify"

    features: str
    """neurons:SITE or sae:DIR, of the encoder."""
    feature: tuple[int, ...]
    """Numbers of the features to climb."""
    negate: bool = False
    """Look for the lowest value instead."""
    seconds: float = DEFAULT.seconds
    """Length of the sound."""
    span: int = DEFAULT.span
    """Frames of 20 ms in its middle over which the feature is to be high."""
    steps: int = DEFAULT.steps
    """Steps of gradient ascent."""
    rate: float = DEFAULT.rate
    """Step size, in units of Whisper's log-mel scale, of which a spectrogram spans 2."""
    smooth_time: float = DEFAULT.smooth_time
    """Weight of total variation over time, against standard deviations of the feature on real speech."""
    smooth_mel: float = DEFAULT.smooth_mel
    """Weight of total variation over mel bands."""
    quiet: float = DEFAULT.quiet
    """Weight of the mean squared distance from silence."""
    jitter: int = DEFAULT.jitter
    """At every step the sound is shifted at random by up to this many frames."""
    starts: int = DEFAULT.starts
    """Random beginnings; the strongest real moment is one more."""
    context: Literal["trimmed", "padded"] = "trimmed"
    """Climb with a few positions of the padding (fast) or all (padded). Results are measured with all."""
    seed: int = 0
    """Of the random beginnings, shifts, phases, and controls."""

    def report(self) -> Report:
        settings = AscentSettings(
            self.seconds, self.span, self.steps, self.rate, self.smooth_time, self.smooth_mel, self.quiet, self.jitter, self.starts, self.context
        )
        return sonify(self.speech, self.model, self.features, self.feature, settings, self.negate, self.seed, self.device, self.map_pieces)
