"""`hearsae experiment window`."""

from dataclasses import dataclass

from analysis.experiments.report import Report
from analysis.experiments.window import WINDOWS, window
from cluster.commands.experiments import Experiment


@dataclass(frozen=True, kw_only=True)
class Window(Experiment):
    """How far must the encoder see? Transcripts and error rates when each position attends to at most k frames on either side."""

    NAME = "window"

    k: tuple[int, ...] = WINDOWS
    """Frames of 20 ms on either side; 1500 reaches everywhere."""
    blocks: tuple[int, ...] | None = None
    """Encoder blocks whose attention is limited; default: all."""
    by_block: bool = False
    """Besides, limit each block alone."""

    language: str = "en"
    """That a multilingual Whisper is told it hears."""

    def report(self) -> Report:
        return window(self.speech, self.model, self.k, self.blocks, self.by_block, self.language, self.device, self.map_pieces)
