"""How alike two words are: in sound, in spelling, by their stems, by the company they keep in a corpus, by vectors of meaning that others made."""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence

import numpy as np

from analysis.experiments.corpus import runs
from analysis.letter_to_sound import sounds
from analysis.sphinx import kept_decoder
from cache.errors import HearsaeError
from cache.location import Location

WINDOW = 4
"""Words on either side within a line that are a word's company."""
CONTEXTS = 2000
"""The most frequent words are what company is told by; rarer ones say little and cost memory."""
SMOOTHING = 0.75
"""Exponent of the contexts' frequencies: rare contexts have too high PPMI without it (Levy, Goldberg and Dagan 2015)."""
ENOUGH_WORDS = 20_000
"""Running words of a corpus below which nothing is said about company."""
ENOUGH_TIMES = 20
"""Times that a word must be in it."""
SHORTEST_STEM = 3
ENDINGS = (("ies", "y"), ("ied", "y"), ("ing", ""), ("est", ""), ("ed", ""), ("er", ""), ("es", ""), ("s", ""))
"""Of English inflection, and what they become."""


def edit_similarity(a: Sequence[str], b: Sequence[str]) -> float:
    """1 - (insertions + deletions + substitutions that turn one into the other) / (length of the longer). 1: the same; 0: nothing in its place."""
    if len(a) < len(b):
        a, b = b, a
    if not a:
        return 1.0
    above = list(range(len(b) + 1))
    for i, one in enumerate(a, start=1):
        diagonal, above[0] = above[0], i
        for j, other in enumerate(b, start=1):
            diagonal, above[j] = above[j], min(above[j] + 1, above[j - 1] + 1, diagonal + (one != other))
    return 1 - above[-1] / len(a)


def pronunciation(word: str) -> tuple[str, ...] | None:
    """ARPAbet phones of an English word, without stress: of PocketSphinx's dictionary, or as `analysis.letter_to_sound` guesses them.

    None for a word with other letters than a to z.
    """
    plain = word.lower()
    if not (plain.isascii() and plain.isalpha()):
        return None
    decoder = kept_decoder()
    return tuple((decoder.phones(plain) or sounds(plain, decoder.phones)).split())


def same_stem(a: str, b: str) -> bool:
    """Whether two English words may be one word inflected, by a few rules of spelling: answer and answers, make and making, hot and hotter.

    Irregular forms (have, had) are missed, and some strangers taken for kin (numb, number).
    """
    return bool(_stems(a.lower()) & _stems(b.lower()))


def _stems(word: str) -> set[str]:
    """The word, and all that it may be an inflection of."""
    found = {word}
    for ending, instead in ENDINGS:
        if word.endswith(ending) and not (ending == "s" and word.endswith("ss")):
            left = word.removesuffix(ending) + instead
            found |= {left, f"{left}e"} if not instead and ending != "s" else {left}
            if len(left) > 1 and left[-1] == left[-2] and left[-1] not in "aeiou":
                found.add(left[:-1])
    return {one for one in found if len(one) >= SHORTEST_STEM or one == word}


def company(texts: Iterable[str], words: Collection[str]) -> dict[str, np.ndarray] | None:
    """Of each word that is often enough in a corpus, what stands around it: float32 [contexts], of length 1.

    Positive pointwise mutual information with the words within WINDOW on either side in the same line (Levy, Goldberg and Dagan 2015), all in lower
    case. None for a corpus that is too small to tell.
    """
    lines = [[word.lower() for run in runs(text) for word in run] for text in texts]
    counts = Counter(word for line in lines for word in line)
    if counts.total() < ENOUGH_WORDS:
        return None
    context = {word: number for number, (word, _) in enumerate(counts.most_common(CONTEXTS))}
    wanted = sorted({word.lower() for word in words if counts[word.lower()] >= ENOUGH_TIMES})
    row = {word: number for number, word in enumerate(wanted)}
    rows = np.array([row.get(word, -1) for line in lines for word in line])
    columns = np.array([context.get(word, -1) for line in lines for word in line])
    line_of = np.repeat(np.arange(len(lines)), [len(line) for line in lines])
    together = np.zeros(len(wanted) * len(context))
    for distance in range(1, WINDOW + 1):
        near = line_of[distance:] == line_of[:-distance]
        for a, b in ((rows[distance:], columns[:-distance]), (rows[:-distance], columns[distance:])):
            both = near & (a >= 0) & (b >= 0)
            together += np.bincount(a[both] * len(context) + b[both], minlength=len(together))
    table = together.reshape(len(wanted), len(context))
    expected = np.array([counts[word] for word in context], float) ** SMOOTHING
    with np.errstate(divide="ignore", invalid="ignore"):
        ppmi = np.maximum(np.log(table / table.sum(1, keepdims=True) / (expected / expected.sum())), 0)
    ppmi = np.nan_to_num(ppmi, nan=0.0, posinf=0.0)
    length = np.linalg.norm(ppmi, axis=1, keepdims=True)
    return {
        word: one for word, one, size in zip(wanted, (ppmi / np.maximum(length, 1e-12)).astype(np.float32), length[:, 0], strict=True) if size > 0
    }


def read_vectors(file: Location, words: Collection[str]) -> dict[str, np.ndarray]:
    """The vectors of these words in a text file of word2vec or GloVe (a word and its numbers a line), by their lower case: float32 [d], of length 1.

    A spelling in lower case goes before others. Raises HearsaeError, with the line, for what is no such file, and where none of the words is in it.
    """
    wanted = {word.lower() for word in words}
    found: dict[str, np.ndarray] = {}
    number = width = 0
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                word, _, numbers = line.rstrip().partition(" ")
                if (number == 1 and len(line.split()) == 2) or word.lower() not in wanted or (word.lower() in found and word != word.lower()):
                    continue
                vector = np.array(numbers.split(), np.float32)
                width = width or len(vector)
                size = float(np.linalg.norm(vector))
                if len(vector) != width or not np.isfinite(size):
                    raise ValueError(f"{len(vector)} numbers where others have {width}" if len(vector) != width else "a number that is not finite")
                if size > 0:
                    found[word.lower()] = vector / size
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise HearsaeError(f"--vectors {file}:{number + isinstance(error, UnicodeDecodeError)}: not a text file of word vectors: {error}") from error
    if not found:
        raise HearsaeError(f"--vectors {file} has none of the words that are compared")
    return found
