"""`hearsae experiment hallucination`."""

from dataclasses import dataclass

from analysis.experiments.hallucination import ADDED, KINDS, NS, PER_KIND, SCALED, WER_BUDGET, hallucination
from analysis.experiments.report import Report
from analysis.experiments.speech import Speech
from analysis.hearing import Rule
from cluster.commands.experiments import Experiment


@dataclass(frozen=True, kw_only=True)
class Hallucination(Experiment):
    """What does Whisper write where nobody speaks, and how much of it goes when features are steered? Against random features and a vector."""

    NAME = "hallucination"

    features: str
    """Where the features come from: neurons:SITE, sae:DIR or random:SITE, of the encoder."""
    nonspeech: str | None = None
    """Recordings in which nobody speaks, a dataset as in --dataset, instead of made sounds."""
    kinds: tuple[str, ...] = KINDS
    """Made sounds: silence, white, pink, brown, hum, tones, clicks, chirps, modulated, buzz, reversed, scrambled."""
    per_kind: int = PER_KIND
    """Sounds of each kind, half of them held out."""
    n: tuple[int, ...] = NS
    """Features that are steered. Here and below several numbers are tried one after the other."""
    add: tuple[float, ...] = ADDED
    """Add to each so many times its difference between the means of sounds and of speech."""
    scale: tuple[float, ...] = SCALED
    """Multiply those that are stronger in the sounds."""
    wer_budget: float = WER_BUDGET
    """How much the word error rate of speech may rise on the training half: 0.01 is one point."""
    no_speech: float = Rule().no_speech
    """A transcript counts as silence if the no-speech token is likelier than this ..."""
    logprob: float = Rule().logprob
    """... and the mean log probability of the text is below this. 0: the no-speech token alone decides."""
    seed: int = 0
    """Of the sounds, the halves, the random features and a random basis."""

    def report(self) -> Report:
        return hallucination(
            self.speech,
            self.model,
            self.features,
            Speech(self.nonspeech, decode_first=True) if self.nonspeech else None,
            self.kinds,
            self.per_kind,
            self.n,
            self.add,
            self.scale,
            self.wer_budget,
            Rule(self.no_speech, self.logprob),
            self.seed,
            self.device,
            self.map_pieces,
        )
