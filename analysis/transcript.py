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
CURRENCIES = {"$": "dollar", "£": "pound", "€": "euro", "¥": "yen"}
UNCHANGED = frozenset(("yen",))
"""Currencies that are the same in the plural."""
MAGNITUDES = frozenset("hundred thousand million billion trillion".split())
"""Words between a sum's number and its currency: $5 million is five million dollars."""
SIGNS = {"%": "percent", "&": "and", "@": "at", "+": "plus", "=": "equals"}
"""Other signs and punctuation are not read."""
LETTERS = str.maketrans({"æ": "ae", "œ": "oe", "ß": "ss", "ø": "o", "ł": "l", "đ": "d", "ð": "th", "þ": "th"})
"""Of names, besides English letters with accents."""
LONGEST_FRACTION = 12
"""Decimals that are read."""
_INTEGER = r"(?:[0-9]+(?:,[0-9]{3})+|[0-9]+)"
_DIGITS = rf"{_INTEGER}(?:\.[0-9]+)?"
_TOKEN = re.compile(
    rf"(?P<sum>[$£€¥] ?{_DIGITS})|(?P<number>{_INTEGER}(?:st|nd|rd|th)|{_DIGITS}%?)|"
    r"(?P<word>'?[^\W\d_]+(?:'[^\W\d_]+)*'?)|(?P<sign>[%&@+=])|(?P<other>[^\W_])"
)


class Word(NamedTuple):
    """One word of a transcript."""

    label: str
    """As the transcript spells it."""
    spoken: tuple[str, ...]
    """Lower-case words that are said: several for a number."""


def words_of(text: str) -> list[Word]:
    """The words of a transcript, in order. Raises ValueError naming what can't be read aloud."""
    words: list[Word] = []
    unit: tuple[str, ...] = ()  # a sum's currency, until it is known whether "million" follows
    for match in _TOKEN.finditer(unicodedata.normalize("NFC", text).replace("’", "'")):
        token, kind = match[0], match.lastgroup
        if unit and token.lower() not in MAGNITUDES:
            words[-1] = _with(words[-1], unit)
            unit = ()
        if kind == "sum":
            said, unit = _sum(token)
        elif kind == "number":
            said = _number(token.removesuffix("%")) + (("percent",) if token.endswith("%") else ())
        elif kind == "sign":
            said = (SIGNS[token],)
        else:
            said, unit = (_letters(token), *unit), ()
        words.append(Word(token, said))
    return [*words[:-1], _with(words[-1], unit)] if unit else words


def _with(word: Word, more: tuple[str, ...]) -> Word:
    return word._replace(spoken=word.spoken + more)


def _sum(token: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What is said of a sum of money, and what of it is said last."""
    number = token[1:].strip()
    whole, _, cents = number.partition(".")
    currency = CURRENCIES[token[0]]
    unit = currency if whole == "1" or currency in UNCHANGED else f"{currency}s"
    if len(cents) == len("99"):
        return (*_number(whole), unit, *(_cardinal(int(cents)) if int(cents) else ())), ()
    return _number(number), (unit,)


def _letters(token: str) -> str:
    decomposed = unicodedata.normalize("NFKD", token.lower().translate(LETTERS))
    letters = "".join(c for c in decomposed if not unicodedata.combining(c))
    if not re.fullmatch(r"[a-z']+", letters):
        raise ValueError(f"{token[:20]!r} is no English word")
    return letters


def _number(token: str) -> tuple[str, ...]:
    token, point, fraction = token.partition(".")
    if point:
        return (*_number(token), "point", *(_cardinal(int(digit))[0] for digit in fraction[:LONGEST_FRACTION]))
    digits = re.sub(r"\D", "", token)
    if len(digits) > len(str(LARGEST_NUMBER)):
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
