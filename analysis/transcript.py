"""What a transcript sounds like: its words as the pronouncing dictionary spells them."""

import re
import unicodedata
from typing import NamedTuple

ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
ORDINALS = {"one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth", "nine": "ninth", "twelve": "twelfth"}
LARGEST_NUMBER = 999_999
YEARS = range(1100, 2000)
"""Four digits without a comma are read in pairs here, as years are."""
_TOKEN = re.compile(r"\d+(?:,\d{3})+(?:st|nd|rd|th)?|\d+(?:st|nd|rd|th)?|[^\W\d_]+(?:'[^\W\d_]+)*'?|'[^\W\d_]+(?:'[^\W\d_]+)*|[$£€%&@#+=]|\S")
_SILENT = frozenset(".,;:!?\"'()[]{}<>-/*_~`^|\\…–—«»“”‘")
_READ_ALOUD = frozenset("$£€%&@#+=")


class Word(NamedTuple):
    """One word of a transcript."""

    label: str
    """As the transcript spells it."""
    spoken: tuple[str, ...]
    """Lower-case words that are said: several for a number."""


def words_of(text: str) -> list[Word]:
    """The words of a transcript, in order. Raises ValueError naming what can't be read aloud."""
    words = []
    for token in _TOKEN.findall(text.replace("’", "'")):
        if token in _SILENT or not token.isprintable():
            continue
        if token[0].isdigit():
            words.append(Word(token, _number(token)))
            continue
        plain = "".join(c for c in unicodedata.normalize("NFKD", token.lower()) if not unicodedata.combining(c))
        if token in _READ_ALOUD or not re.fullmatch(r"[a-z']+", plain):
            raise ValueError(f"{token[:20]!r} is no English word")
        words.append(Word(token, (plain,)))
    return words


def _number(token: str) -> tuple[str, ...]:
    digits = re.sub(r"\D", "", token)
    if not digits.isascii() or len(digits) > len(str(LARGEST_NUMBER)):
        raise ValueError(f"the number {token[:20]} is above {LARGEST_NUMBER:,}")
    value, ordinal = int(digits), token[-1].isalpha()
    if value in YEARS and token == digits and value % 1000:
        rest = value % 100
        said = [*_cardinal(value // 100), *(["hundred"] if not rest else ["oh"] * (rest < 10) + _cardinal(rest))]
    else:
        said = _cardinal(value)
    if ordinal:
        last = said[-1]
        said[-1] = ORDINALS.get(last) or (f"{last[:-1]}ieth" if last.endswith("y") else f"{last}th")
    return tuple(said)


def _cardinal(value: int) -> list[str]:
    if value < 20:
        return [ONES[value]]
    if value < 100:
        return [TENS[value // 10 - 2], *(_cardinal(value % 10) if value % 10 else [])]
    size, name = (100, "hundred") if value < 1000 else (1000, "thousand")
    return [*_cardinal(value // size), name, *(_cardinal(value % size) if value % size else [])]
