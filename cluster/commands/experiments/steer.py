"""`hearsae experiment steer`."""

from dataclasses import dataclass
from typing import ClassVar

from analysis.experiments.changes import Stretch
from analysis.experiments.report import Report
from analysis.experiments.steer import CONTROLS, steer
from analysis.steering import How
from cache.errors import HearsaeError
from cluster.commands.experiments import Experiment


@dataclass(frozen=True, kw_only=True)
class Steer(Experiment):
    """What does Whisper write when features are made stronger, weaker or set to a value? Against random features and a random direction."""

    NAME = "steer"
    HOWS: ClassVar[tuple[How, ...]] = ("scale", "set", "add", "clamp")

    features: str
    """Where the features come from: neurons:SITE, sae:DIR or random:SITE."""
    feature: tuple[int, ...]
    """Numbers of the features, all edited at once."""
    scale: tuple[float, ...] = ()
    """Multiply their values: 0 removes them, 1 changes nothing. Here and below several amounts are tried one after the other."""
    set: tuple[float, ...] = ()
    """Set their values."""
    add: tuple[float, ...] = ()
    """Add to their values."""
    clamp: tuple[float, ...] = ()
    """Hold their values at or below."""
    start: float | None = None
    """Edit from here on, in seconds within each clip; default: its beginning."""
    end: float | None = None
    """Edit up to here; default: the end of the clip."""
    everywhere: bool = False
    """Edit the padding after each clip too."""
    controls: int = CONTROLS
    """Sets of random features, as active as these, that are edited in the same way."""
    seed: int = 0
    """Of the controls, and of a random basis."""
    language: str = "en"
    """That a multilingual Whisper is told it hears."""

    def report(self) -> Report:
        given = [(how, getattr(self, how)) for how in self.HOWS if getattr(self, how)]
        if len(given) != 1:
            raise HearsaeError(f"give one of --{', --'.join(self.HOWS)} with its amounts, and no more than one")
        how, amounts = given[0]
        stretch, where = Stretch(self.start, self.end, self.everywhere), (self.language, self.device, self.map_pieces)
        return steer(self.speech, self.model, self.features, self.feature, how, amounts, stretch, self.controls, self.seed, *where)
