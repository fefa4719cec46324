"""`hearsae experiment ablate`."""

from dataclasses import dataclass

from analysis.experiments.ablate import RANKED, Mode, put_out, rank, remove
from analysis.experiments.changes import Stretch
from analysis.experiments.report import Report
from analysis.experiments.steer import CONTROLS
from cache.errors import HearsaeError
from cluster.commands.experiments import Experiment


@dataclass(frozen=True, kw_only=True)
class Ablate(Experiment):
    """What is lost without some features, without each of them, or without a whole site? Against random features or a random direction."""

    NAME = "ablate"

    features: str | None = None
    """Where the features come from: neurons:SITE, sae:DIR or random:SITE."""
    feature: tuple[int, ...] = ()
    """Numbers of features, removed together."""
    each: bool = False
    """Remove each alone, and rank them by the damage: those of --feature, or the most active ones."""
    top: int = RANKED
    """With --each and without --feature: how many of the most active ones."""
    site: str | None = None
    """In place of features: a whole site, put out."""
    mode: Mode = "zero"
    """What the rows of --site become: zeros, or their mean in this speech."""
    start: float | None = None
    """Ablate from here on, in seconds within each clip; default: its beginning."""
    end: float | None = None
    """Ablate up to here; default: the end of the clip."""
    everywhere: bool = False
    """Ablate in the padding after each clip too."""
    controls: int = CONTROLS
    """Sets of random features that are removed in the same way, where --feature are removed together."""
    seed: int = 0
    """Of the controls, and of a random basis."""
    language: str = "en"
    """That a multilingual Whisper is told it hears."""

    def report(self) -> Report:
        if (self.features is None) == (self.site is None):
            raise HearsaeError("give either --features or --site")
        stretch = Stretch(self.start, self.end, self.everywhere)
        where = (self.language, self.device, self.map_pieces)
        if self.features is None:
            assert self.site
            if self.feature or self.each:
                raise HearsaeError("--feature and --each are of --features, not of --site")
            return put_out(self.speech, self.model, self.site, self.mode, stretch, self.seed, *where)
        if self.each:
            return rank(self.speech, self.model, self.features, self.feature, self.top, stretch, self.seed, *where)
        if not self.feature:
            raise HearsaeError("say which features go: --feature N ..., or --each for each of the most active ones")
        return remove(self.speech, self.model, self.features, self.feature, stretch, self.controls, self.seed, *where)
