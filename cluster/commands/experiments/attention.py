"""`hearsae experiment attention`."""

from dataclasses import dataclass
from typing import Literal

from analysis.experiments.attention import KS, attention
from analysis.experiments.report import Report
from cluster.commands.experiments import Experiment


@dataclass(frozen=True, kw_only=True)
class Attention(Experiment):
    """How local is the encoder's attention? Its weights by distance, head by head, and relevance propagated through all blocks."""

    NAME = "attention"

    k: tuple[int, ...] = KS
    """Distances in frames of 20 ms: the share of weight within each is reported."""
    target: Literal["output", "transcript"] = "output"
    """What relevance is for: the encoder's own output at the clip's frames, or the log-probability of Whisper's own transcript."""
    maps: int = 2
    """Draw relevance maps of the first so many clips."""
    control_seed: int = 0
    """Of the control's random weights."""

    def report(self) -> Report:
        return attention(self.speech, self.model, self.k, self.target, self.maps, self.control_seed, self.device, self.map_pieces)
