"""Word and character error rates, over a whole set."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from whisper.normalizers import BasicTextNormalizer, EnglishTextNormalizer


class TextErrors(NamedTuple):
    """Errors of transcripts, summed over a set: rates are of the sums, not means of rates."""

    words: int
    """In the references."""
    substitutions: int
    deletions: int
    insertions: int
    characters: int
    """In the references, spaces included."""
    character_errors: int

    @property
    def wer(self) -> float | None:
        """Word error rate; above 1 where more was written than said. None without a word in the references."""
        return (self.substitutions + self.deletions + self.insertions) / self.words if self.words else None

    @property
    def cer(self) -> float | None:
        """Character error rate."""
        return self.character_errors / self.characters if self.characters else None

    def __add__(self, other: "TextErrors") -> "TextErrors":  # type: ignore[override]
        return TextErrors(*(a + b for a, b in zip(self, other, strict=True)))

    def to_json(self) -> dict[str, Any]:
        return {"wer": self.wer, "cer": self.cer, **self._asdict()}


def normalise(text: str, language: str | None = "en") -> str:
    """Whisper's own normalisation of transcripts before they are compared (2212.04356, appendix C)."""
    return _normaliser(language in (None, "en"))(text).strip()


@lru_cache
def _normaliser(is_english: bool) -> Any:
    return EnglishTextNormalizer() if is_english else BasicTextNormalizer()


def text_errors(references: Sequence[str], hypotheses: Sequence[str], language: str | None = "en") -> TextErrors:
    """Errors of the hypotheses against the references, both normalised first.

    What is written for a reference without a word counts as insertions.
    """
    import jiwer

    total = TextErrors(0, 0, 0, 0, 0, 0)
    for reference, hypothesis in zip(references, hypotheses, strict=True):
        said, heard = normalise(reference, language), normalise(hypothesis, language)
        if not said:  # which jiwer does not take
            total += TextErrors(0, 0, 0, len(heard.split()), 0, len(heard))
            continue
        words, characters = jiwer.process_words(said, heard), jiwer.process_characters(said, heard)
        wrong = characters.substitutions + characters.deletions + characters.insertions
        total += TextErrors(len(said.split()), words.substitutions, words.deletions, words.insertions, len(said), wrong)
    return total
