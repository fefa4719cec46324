"""Alignment of micro's speech, whose times are known, and what is said of clips that can't be aligned."""

import json

import numpy as np
import pytest
import soundfile
from conftest import asset, fill_store, micro_audio, plan_of

from analysis import sphinx
from analysis.align import Unalignable, align, clips_of
from analysis.letter_to_sound import sounds
from analysis.sphinx import kept_decoder
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


def test_a_clip_does_not_depend_on_those_before():
    clips = [(audio, " ".join(word[2] for word in row["words"])) for audio, row in zip(micro_audio(20), truth(20), strict=True)]
    in_order = [align(*clip) for clip in clips]
    assert [align(*clip) for clip in reversed(clips)] == in_order[::-1]


@pytest.mark.parametrize(
    ("text", "reason"),
    [("...", "no words"), ("hello " * 20000, "too long"), ("\x00\x1b", "no words"), ("привет", "no English")],
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


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("$5", "five dollars"),
        ("$1, or 5%", "one dollar or five percent"),
        ("£1.50", "one pound fifty"),
        ("$3 million", "three million dollars"),
        ("3.14", "three point one four"),
        ("salt & pepper # 7", "salt and pepper seven"),
        ("in the 21st", "in the twenty first"),
    ],
)
def test_signs_and_sums_are_read_aloud(text, said):
    assert " ".join(part for word in words_of(text) for part in word.spoken) == said


def test_a_clip_that_the_beams_lose_is_searched_again_without_them():
    row = next(row for row in map(json.loads, (micro.SPEECH / "alignments.jsonl").read_text().splitlines()) if row["file_name"] == "train/0117.flac")
    audio, _ = soundfile.read(micro.SPEECH / row["file_name"], dtype="float32")
    found = align(audio, " ".join(word[2] for word in row["words"]))
    assert found.retried
    assert len(found.words) == len(row["words"])


def test_a_decoder_that_was_taught_too_much_is_left_for_a_new_one(monkeypatch):
    audio, text = micro_audio(1)[0], "zibbly zabbly zobbly"
    first = align(audio, text)
    assert first.guessed == text.split()
    monkeypatch.setattr(sphinx, "MOST_TAUGHT", 0)
    before = kept_decoder()
    assert align(audio, text) == first
    assert kept_decoder() is not before


def test_pieces_of_a_source_are_aligned_together_whatever_shards_they_are_in(tmp_path):
    plan = plan_of([3.0, 12.0, 4.0], clip_seconds=2.0, shard_rows=128, chunk_rows=64)
    store = fill_store(tmp_path / "s.zarr", plan, {"encoder.blocks.0": 4}, lambda site, clip, n: np.ones((n, 4)))
    shards = range(int(store.clips["shard"].to_numpy().max()) + 1)
    owned = [clips_of(store, shard) for shard in shards]
    assert len(shards) > 3
    assert sorted(clip for clips in owned for clip in clips) == list(range(store.clips.num_rows))
    sources = store.clips["source"].to_pylist()
    for source in set(sources):
        assert sum(any(sources[clip] == source for clip in clips) for clips in owned) == 1
