"""`hearsae experiment bigrams`."""

from dataclasses import dataclass

from analysis.experiments.bigrams import LEAST, PREFIXES, PROMPTS, TOP, bigrams
from analysis.experiments.report import Report
from cache.location import Location
from cluster.commands.experiments import Experiment


@dataclass(frozen=True, kw_only=True)
class Bigrams(Experiment):
    """What does the decoder expect when it hears nothing? Its next tokens after each prompt, and whether a corpus' words follow each other so."""

    NAME = "bigrams"

    prompt: tuple[str, ...] = PROMPTS
    """Prompts. A word begins with a space: ' traffic'."""
    corpus: Location | None = None
    """Text file, a text a line. Default: the texts of the dataset, whose audio is not read."""
    top: int = TOP
    """Tokens after each prompt."""
    prefixes: int = PREFIXES
    """Words of the corpus that are compared: those that are most often followed by another word."""
    least: int = LEAST
    """Of words that are followed so many times or more."""
    seed: int = 0
    """Of the control's order."""
    language: str = "en"
    """That a multilingual Whisper is told it writes."""

    def report(self) -> Report:
        return bigrams(
            self.speech,
            self.model,
            self.prompt,
            self.corpus,
            self.top,
            self.prefixes,
            self.least,
            self.seed,
            self.language,
            self.device,
            self.map_pieces,
        )
