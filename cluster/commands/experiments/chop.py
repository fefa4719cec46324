"""`hearsae experiment chop`."""

from dataclasses import dataclass

from analysis.experiments.chop import MARGIN, By, chop
from analysis.experiments.report import Report
from analysis.experiments.speech import Speech
from analysis.experiments.word_times import StoredSpeech
from cache.errors import HearsaeError
from cache.location import Location
from cluster.commands.experiments import Experiment


@dataclass(frozen=True, kw_only=True)
class Chop(Experiment):
    """Where in the encoder's output is a word? Transcripts when some of its frames are replaced by those of silence."""

    NAME = "chop"

    by: By = "word"
    """word: each word by itself. time, frame: in every clip what lies between --start and --end."""
    start: float | None = None
    """With --by time: seconds from the clip's start. With --by frame: the first frame of 20 ms."""
    end: float | None = None
    """Where the range ends; this frame is not chopped."""
    store: Location | None = None
    """Take the clips, and the times of their words, from this store instead of --dataset; 'hearsae align' makes the times."""
    times: tuple[str, ...] = ()
    """Files of word times, as in `hearsae align --import`: TextGrids or folders of them, .ctm, .jsonl. Default: those of micro, of the store, or of
    the dataset's column 'words'."""
    word: str | None = None
    """Chop this word only."""
    margin: int = MARGIN
    """Frames on either side that are chopped with a word."""
    margins: tuple[int, ...] = ()
    """Besides, these margins: how wide must the cut be?"""
    trials: int | None = None
    """Draw so many of all words."""
    seed: int = 0
    """Of the draw, and of the control's places."""
    language: str = "en"
    """That a multilingual Whisper is told it hears."""

    @property
    def speech(self) -> Speech:
        if self.store is None:
            return super().speech
        if self.split is not None:
            raise HearsaeError("--split belongs to --dataset: a store has the clips that it has")
        return StoredSpeech(str(self.store.absolute()), None, self.limit)

    def report(self) -> Report:
        return chop(
            self.speech,
            self.model,
            self.by,
            self.start,
            self.end,
            self.times,
            self.word,
            self.margin,
            self.margins,
            self.trials,
            self.seed,
            self.language,
            self.device,
            self.map_pieces,
        )
