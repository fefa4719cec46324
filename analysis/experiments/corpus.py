"""The running words of a text: which follows which, in Whisper's tokens."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from analysis.experiments.speech import Speech
from cache.errors import HearsaeError
from cache.location import Location

WORD = re.compile(r"(\W*)([^\W\d_]+(?:['’][^\W\d_]+)*)(\W*)")
"""Between spaces: signs, a word of letters and apostrophes, signs."""


class Bigrams(NamedTuple):
    """How often words follow words in a corpus."""

    words: Counter[str]
    """Every word, as it is written."""
    followers: dict[str, Counter[int]]
    """Word -> first token of the word after it -> how often."""


def texts_of(speech: Speech) -> list[str]:
    """The texts of a dataset, one for each of its rows. Raises HearsaeError where it has none."""
    columns = [speech.plan.clips[name].to_pylist() for name in ("source", "source_row", "source_text")]
    texts = {(source, row): text for source, row, text in zip(*columns, strict=True) if text}
    if not texts:
        raise HearsaeError(f"{speech.dataset} has no texts: give --corpus FILE, or a dataset with a column 'text'")
    return list(texts.values())


def lines_of(file: Location) -> Iterator[str]:
    """The lines of a text file that are not blank. Raises HearsaeError for one that can't be read."""
    try:
        with file.open(encoding="utf-8") as lines:
            yield from (line for line in lines if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise HearsaeError(f"--corpus {file} can't be read as UTF-8 text: {error}") from error


def runs(text: str) -> list[list[str]]:
    """A text's words, in stretches that have nothing but spaces between words, in the case in which they are written.

    A word after a sign ('"Hello') is left out: its token is another than that of a word after a space. So is what has a digit or a hyphen.
    """
    found: list[list[str]] = [[]]
    for piece in text.split():
        match = WORD.fullmatch(piece)
        if match is None or match[1]:
            found.append([])
            continue
        found[-1].append(match[2])
        if match[3]:
            found.append([])
    return [run for run in found if run]


def count_bigrams(texts: Iterable[str], encode: Callable[[str], Sequence[int]]) -> Bigrams:
    """encode: text -> tokens; given words with a space before them."""
    words: Counter[str] = Counter()
    pairs: Counter[tuple[str, str]] = Counter()
    for text in texts:
        for run in runs(text):
            words.update(run)
            pairs.update(pairwise(run))
    first = {word: encode(f" {word}")[0] for word in {second for _, second in pairs}}
    followers: dict[str, Counter[int]] = {}
    for (word, second), n in pairs.items():
        followers.setdefault(word, Counter())[first[second]] += n
    return Bigrams(words, followers)
