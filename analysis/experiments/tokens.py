"""Whisper's tokens of a text, and those with which a word begins or that are a whole one."""

import re
from typing import NamedTuple

import numpy as np
from whisper.tokenizer import Tokenizer

_BEGINS_WORD = re.compile(r" [^\W\d_]")
_IS_WORD = re.compile(r" [^\W\d_]+")


class WordTokens(NamedTuple):
    """Tokens of text (none of the special ones) by what they are to words; a word is letters, and a space stands before it."""

    begin: np.ndarray
    """int64, sorted: those with which a word begins."""
    whole: np.ndarray
    """int64, sorted: of these, those that may be a word by themselves, though more letters may follow."""


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokens of a text. What looks like a special token is text too."""
    return list(tokenizer.encode(text, disallowed_special=()))


def word_tokens(tokenizer: Tokenizer) -> WordTokens:
    texts = [tokenizer.encoding.decode_single_token_bytes(token).decode("utf-8", errors="replace") for token in range(tokenizer.eot)]
    begin = [token for token, text in enumerate(texts) if _BEGINS_WORD.match(text)]
    return WordTokens(np.array(begin, np.int64), np.array([token for token in begin if _IS_WORD.fullmatch(texts[token])], np.int64))
