"""`hearsae experiment neighbours`."""

from dataclasses import dataclass

from analysis.experiments.neighbours import NEIGHBOURS, WORDS, Pool, neighbours
from analysis.experiments.report import Report
from cache.location import Location
from cluster.commands.experiments import Experiment


@dataclass(frozen=True, kw_only=True)
class Neighbours(Experiment):
    """Do words with similar token embeddings sound alike or mean alike? The nearest words, scored for both."""

    NAME = "neighbours"

    word: tuple[str, ...] = ()
    """Words whose neighbours are drawn; default: frequent ones of the corpus."""
    corpus: Location | None = None
    """Text file, a text a line. Default: the texts of the dataset, whose audio is not read."""
    vectors: Location | None = None
    """Word vectors of meaning: a text file of word2vec or GloVe, a word and its numbers a line."""
    pool: Pool = "corpus"
    """Where neighbours may come from: the words of the corpus, or all words of the vocabulary."""
    words: int = WORDS
    """Words that are scored: the most frequent of the corpus."""
    k: int = NEIGHBOURS
    """Neighbours of each."""
    seed: int = 0
    """Of the words at random, and of the shuffles."""
    language: str = "en"
    """Of the words, to a multilingual Whisper. Sound and stems are known for English only."""

    def report(self) -> Report:
        return neighbours(
            self.speech, self.model, self.word, self.corpus, self.vectors, self.pool, self.words, self.k, self.seed, self.language, self.device
        )
