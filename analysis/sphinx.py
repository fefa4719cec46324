"""PocketSphinx, with the English model and the pronouncing dictionary that its wheel brings."""

import warnings
from functools import lru_cache
from typing import Any

from analysis.letter_to_sound import sounds
from cache.audio import SAMPLE_RATE

UNPRUNED = {"beam": 0.0, "pbeam": 0.0, "wbeam": 0.0}
"""Settings of a search that gives nothing up on the way. PocketSphinx's own beams are 1e-48, 1e-48 and 7e-29."""
MOST_TAUGHT = 5_000
"""Words that are added to a decoder before it is left for a new one (0.1 s)."""
GUESSED = "~"
"""Ends the entries that we add to a decoder's dictionary, so that guesses do not pass for its own words."""


class Decoder:
    """What aligns words to audio. Nothing of what it finds depends on what it searched before."""

    def __init__(self, **settings: float) -> None:
        import pocketsphinx

        # Batch normalisation of the cepstra: each clip's own mean, not one that goes on from the clip before.
        self._sphinx = pocketsphinx.Decoder(samprate=SAMPLE_RATE, loglevel="FATAL", lm=None, bestpath=False, dither=False, cmn="batch", **settings)
        self.taught = 0
        """Words added to its dictionary."""

    def phones(self, entry: str) -> str | None:
        """The dictionary's ARPAbet phones of an entry."""
        return self._sphinx.lookup_word(entry)

    def entries(self, said: list[str]) -> tuple[list[str], list[str]]:
        """The dictionary's entries for lower-case words, and those it lacks: they are added, as `sounds` makes them.

        Raises ValueError for a word without sound.
        """
        entries, guessed = [], []
        for word in said:
            entry = next((own for own in (word, word.strip("'")) if own and self.phones(own) is not None), None)
            if entry is None:
                entry = f"{word}{GUESSED}"
                guessed.append(word)
                self._teach(entry, word)
            entries.append(entry)
        return entries, guessed

    def _teach(self, entry: str, word: str) -> None:
        if self.phones(entry) is not None:
            return
        phones = sounds(word, self.phones)
        if not phones:
            raise ValueError(f"the word '{word[:40]}' has no sound")
        self._sphinx.add_word(entry, phones, False)
        self.taught += 1

    def search(self, entries: list[str], samples: bytes) -> Any:
        """PocketSphinx's alignment of entries to 16-bit samples; None where its beams lose them.

        Two passes: the words, with silence where it fits between them and the dictionary's best variant of each; then their phones.
        """
        try:
            self._sphinx.set_align_text(" ".join(entries))
            self._pass(samples)
            if self._sphinx.hyp() is None:
                return None
            self._sphinx.set_alignment()
            self._pass(samples)
            return self._sphinx.get_alignment()
        except RuntimeError:  # the second pass refuses what the first left without frames
            return None

    def _pass(self, samples: bytes) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            # The only way to forget the noise of what was heard before: the model's own settings turn its removal on, whatever ours are.
            self._sphinx.start_stream()
        self._sphinx.start_utt()
        try:
            self._sphinx.process_raw(samples, full_utt=True)
        finally:
            self._sphinx.end_utt()


def kept_decoder() -> Decoder:
    """The one that a process goes on with; a new one where the last was taught too much."""
    if _kept().taught > MOST_TAUGHT:
        _kept.cache_clear()
    return _kept()


@lru_cache(maxsize=1)
def _kept() -> Decoder:
    return Decoder()
