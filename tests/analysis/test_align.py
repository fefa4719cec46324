"""Alignment of micro's speech, whose times are known, and what is said of clips that can't be aligned."""

import json

import numpy as np
import pytest
from conftest import asset, micro_audio

from analysis.align import Unalignable, align
from analysis.letter_to_sound import sounds
from analysis.transcript import words_of
from cache import micro
from cache.audio import AudioFolder


def truth(count):
    rows = [json.loads(line) for line in (micro.SPEECH / "alignments.jsonl").read_text().splitlines()]
    return sorted((row for row in rows if row["file_name"].startswith("test/")), key=lambda row: row["file_name"])[:count]


def test_words_of_micro_are_found_where_they_are_spoken():
    off = []
    for audio, row in zip(micro_audio(6), truth(6), strict=True):
        found = align(audio, " ".join(word[2] for word in row["words"]))
        assert [word[2] for word in found.words] == [word[2] for word in row["words"]]
        off += [abs(a[0] - b[0]) for a, b in zip(found.words, row["words"], strict=True)]
    assert np.median(off) < 0.04


def test_a_clip_does_not_depend_on_the_one_before():
    (first, second), rows = micro_audio(2), truth(2)
    texts = [" ".join(word[2] for word in row["words"]) for row in rows]
    alone = align(first, texts[0])
    align(second, texts[1])
    assert align(first, texts[0]) == alone


@pytest.mark.parametrize(
    ("text", "reason"),
    [("...", "no words"), ("hello " * 20000, "too long"), ("\x00\x1b", "no words"), ("привет", "no English"), ("$5", "no English")],
)
def test_what_can_not_be_aligned_says_why(text, reason):
    with pytest.raises(Unalignable, match=reason):
        align(micro_audio(1)[0][:16000], text)


def test_numbers_and_hyphens_are_read_aloud_under_their_own_spelling():
    words = words_of("Twenty-one men, in 1905: 3rd of 1,200. It's")
    assert [word.label for word in words] == ["Twenty", "one", "men", "in", "1905", "3rd", "of", "1,200", "It's"]
    assert words[4].spoken == ("nineteen", "oh", "five")
    assert words[5].spoken == ("third",)
    assert words[7].spoken == ("one", "thousand", "two", "hundred")


def test_unknown_words_are_compounds_endings_or_read_by_rule():
    known = {"work": "W ER K", "house": "HH AW S", "cat": "K AE T"}.get
    assert sounds("workhouse", known) == "W ER K HH AW S"
    assert sounds("cat's", known) == "K AE T S"
    assert sounds("shib", known) == "SH IH B"


@pytest.mark.slow
def test_times_agree_with_those_of_the_assets():
    rows = [json.loads(line) for line in asset("speech/alignments.jsonl").read_text().splitlines()][:5]
    source, off = AudioFolder(asset("speech"), None), []
    lengths = {item.source: item.n_samples for item in source.items() if hasattr(item, "n_samples")}
    for row in rows:
        found = align(source.read(row["file_name"], 0, 0.0, lengths[row["file_name"]]), " ".join(word[2] for word in row["words"]))
        off += [abs(a[0] - b[0]) for a, b in zip(found.words, row["words"], strict=True)]
    assert np.median(off) <= 0.02
