"""Words and phones at a moment, the stretches in which something is said, and the features that fire there."""

import re
import time
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import fill_store, plan_of
from said import say, segments
from scan_twin import SITE, all_rows, save_sae

from analysis.contrast import MOVED, _place, contrast, top_contrast
from analysis.features import open_features
from analysis.grid import MAGNITUDES, bin_edges, bin_of
from analysis.query import feature_moments, features_of, span_features, top_features
from analysis.scan import Scan, ScanOptions, scan
from analysis.spoken import find_phone, find_text, find_word, frames_of, labels_at
from cache.errors import HearsaeError
from cache.store import ActivationStore

WIDTH = 16
OF_M, SILENT = 3, 7
"""A feature that fires on the phone M; one that never does."""
CLIPS = 12


def m_times(clip: int) -> tuple[float, float]:
    """When M is said in a clip."""
    return 0.2 + 0.04 * (clip % 5), 0.3 + 0.04 * (clip % 5)


def made_up_rows(site: str, clip: int, n: int) -> np.ndarray:
    rows = np.random.Generator(np.random.PCG64(clip)).normal(0, 1, (n, WIDTH))
    start, end = m_times(clip)
    rows[round(start / 0.02) : round(end / 0.02), OF_M] += 4
    rows[:, SILENT] = 0
    return rows


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> ActivationStore:
    plan = plan_of([1.0] * CLIPS, shard_rows=128, chunk_rows=64, shuffle=False)
    made = fill_store(tmp_path_factory.mktemp("said") / "acts.zarr", plan, {SITE: WIDTH}, made_up_rows, skip={5: "unreadable"})
    words, phones = [], []
    for clip in range(CLIPS):
        start, end = m_times(clip)
        words += [(clip, 0.05, 0.15, "The"), (clip, start, end + 0.1, "Mum," if clip % 2 else "mill"), (clip, end + 0.1, end + 0.2, "out")]
        phones += [(clip, 0.0, start, "SIL"), (clip, start, end, "M"), (clip, end, end + 0.1, "AH")]
    say(made, words, phones)
    return made


@pytest.fixture(scope="module", params=["neurons", "sae"])
def scanned(request, store, tmp_path_factory) -> Scan:
    spec = f"neurons:{SITE}" if request.param == "neurons" else f"sae:{save_sae(tmp_path_factory.mktemp('sae'))}"
    return scan(store, spec, tmp_path_factory.mktemp("out") / "scan", ScanOptions(top=3, ranges=4, quantiles=2, per_bin=2))


# At a moment


def test_a_moment_comes_with_the_word_and_the_phone_in_the_middle_of_its_frame(store, scanned):
    for row in feature_moments(scanned, 0):
        start, end = m_times(row["clip"])
        middle = row["start_s"] + 0.01
        assert (row["phone"] == "M") == (start <= middle < end)
        assert (row["word"] == "The") == (0.05 <= middle < 0.15)
    features = open_features(f"neurons:{SITE}", store)
    assert [(row["word"], row["phone"]) for row in top_features(store, features, 1, 0.25, n=1)] == [("Mum,", "M")]
    assert [(row["word"], row["phone"]) for row in top_features(store, features, 1, 0.9, n=1)] == [(None, None)]


def test_a_segment_holds_its_start_and_not_its_end():
    said = segments([(0, 0.1, 0.2, "a"), (0, 0.2, 0.3, "b"), (2, 0.0, 0.1, "c")])
    assert labels_at(said, [0, 0, 0, 0, 1, 2, 2, 0], [0.1, 0.2, 0.3, 0.05, 0.1, 0.0, 0.1, None]) == ["a", "b", None, None, None, "c", None, None]


def test_a_span_comes_with_all_that_is_said_in_it(store):
    features = open_features(f"neurons:{SITE}", store)
    (row,) = span_features(store, features, 0, 0.1, 0.35, n=1)
    assert (row["word"], row["phone"], row["frame"], row["frames"]) == ("The mill", "SIL M AH", 5, 13)


# Stretches


def timings(*sentences: str) -> SimpleNamespace:
    """A word every 100 ms."""
    return SimpleNamespace(
        words=segments([(i, 0.1 * k, 0.1 * k + 0.1, word) for i, said in enumerate(sentences) for k, word in enumerate(said.split())])
    )


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("light things", [(0, 1, 3), (2, 0, 2)]),
        (r"\bthe\b", [(1, 0, 1), (1, 3, 4)]),
        ("^fifty", [(0, 0, 1)]),
        ("ings$", [(0, 2, 3)]),  # part of a word: its time is the whole word's
        ("(?-i)The", [(1, 0, 1)]),
        (r"éc\w+ ", [(3, 1, 2)]),  # the space after it is no word
        ("t|x*", [(0, 0, 1), (0, 1, 2), (0, 2, 3), (1, 0, 1), (1, 1, 2), (1, 2, 3), (1, 3, 4), (2, 0, 1), (2, 1, 2), (3, 2, 3)]),
    ],
)
def test_a_text_is_found_as_the_words_it_touches(pattern, found):
    said = find_text(timings("Fifty light things", "The cat, out: the", "light Things are", "l' école d'été"), pattern)
    found_words = [(int(c), round(a * 10), round(b * 10)) for c, a, b in zip(said.clip, said.start_s, said.end_s, strict=True)]
    assert sorted(set(found_words)) == found


def test_texts_that_are_found_are_those_of_pythons_regular_expressions():
    words = np.random.Generator(np.random.PCG64(0)).choice(["a", "ab", "b", "ba", "abc", "ça"], (50, 9))
    sentences = [" ".join(row) for row in words]
    for pattern in (r"a b", r"\bab+c?\b a", r"b(a| b)+", r"ç."):
        expected = [(i, m.group()) for i, sentence in enumerate(sentences) for m in re.finditer(pattern, sentence) if m.group().strip()]
        said = find_text(timings(*sentences), pattern)
        assert list(zip(said.clip.tolist(), said.label, strict=True)) == [(i, text.strip()) for i, text in expected]


@pytest.mark.parametrize("pattern", ["(", "a{2000}{2000}", r"(a)\1", "(?=a)", "["])
def test_what_is_no_regular_expression_is_refused(pattern):
    with pytest.raises(HearsaeError, match="is no regular expression that RE2 reads"):
        find_text(timings("a b"), pattern)


def test_where_nothing_is_said_nothing_is_found():
    nothing = timings("a")
    nothing.words = nothing.words.slice(0, 0)
    for find in (find_text, find_word):
        with pytest.raises(HearsaeError, match=r"nothing that is said|nobody says"):
            find(nothing, "a")


def test_an_expression_that_stalls_others_takes_no_time():
    start = time.perf_counter()
    with pytest.raises(HearsaeError, match="matches nothing that is said"):
        find_text(timings("a" * 5000), "(a|aa)+$x|(a*)*b")
    assert time.perf_counter() - start < 5


def test_a_word_is_found_whatever_its_case_and_punctuation():
    said = find_word(timings("The cat, out: the", "cat's THE"), "the")
    assert list(zip(said.clip.tolist(), said.label, strict=True)) == [(0, "The"), (0, "the"), (1, "THE")]
    assert find_word(timings("The cat, out: the"), "Cat").label == ["cat,"]
    for word in ("dog", "'; --", "../..", ""):
        with pytest.raises(HearsaeError, match="nobody says the word"):
            find_word(timings("The cat"), word)


def test_a_phone_that_nobody_says_is_refused_with_those_that_there_are(store):
    with pytest.raises(HearsaeError, match="nobody says the phone 'ZH': there are AH, M, SIL"):
        find_phone(SimpleNamespace(phones=segments([(0, 0, 1, p) for p in ("SIL", "M", "AH")])), "ZH")


def test_frames_are_those_whose_middle_lies_inside(store):
    said = find_phone(SimpleNamespace(phones=segments([(0, 0.01, 0.03, "M"), (0, 0.03, 0.031, "M"), (0, 0.9, 7.0, "M")])), "M")
    first, stop = frames_of(said, store)
    assert first.tolist() == [0, 1, 45] and stop.tolist() == [1, 2, 50]


# Features that fire there


def plain_auc(inside: np.ndarray, outside: np.ndarray) -> float:
    """By comparing all pairs, values in the same bin of the grid as equal."""
    a, b = (np.where(bin_of(x) < 0, MAGNITUDES - 0.5, bin_of(x)) for x in (inside, outside))
    return float((a[:, None] > b[None, :]).mean() + (a[:, None] == b[None, :]).mean() / 2)


def test_the_contrast_is_that_of_all_rows_compared_the_plain_way(store, scanned):
    from cache.timings import read_timings

    features = features_of(scanned, store)
    said = find_phone(read_timings(store), "M")
    found = contrast(scanned, store, features, said)
    rows = all_rows(store, SITE)
    values = features.dense(rows.values.astype(np.float16))
    middle = rows.frame * 0.02 + 0.01
    inside = np.array([m_times(c)[0] <= t < m_times(c)[1] for c, t in zip(rows.clip, middle, strict=True)])
    assert (found.occurrences, found.clips, found.frames) == (CLIPS - 1, CLIPS - 1, inside.sum())
    for i in range(features.count):
        column = values[:, i]
        assert found.auc[i] == pytest.approx(plain_auc(column[inside], column[~inside]), abs=1e-6)
        assert found.mean_inside[i] == pytest.approx(column[inside].mean(dtype=np.float64), abs=1e-6)
        assert found.mean_outside[i] == pytest.approx(column[~inside].mean(dtype=np.float64), abs=1e-6)
        assert found.rate_inside[i] == pytest.approx((column[inside] > 0).mean())
        assert found.rate_outside[i] == pytest.approx((column[~inside] > 0).mean())


def test_the_feature_of_a_phone_comes_first_and_beyond_chance(store, tmp_path):
    from cache.timings import read_timings

    scanned = scan(store, f"neurons:{SITE}", tmp_path / "scan")
    neurons, said = features_of(scanned, store), read_timings(store)
    found = contrast(scanned, store, neurons, find_phone(said, "M"))
    rows = top_contrast(scanned, found, n=4)
    assert rows[0]["feature"] == OF_M and rows[0]["auc"] > 0.95 and rows[0]["auc"] > found.chance_auc and rows[0]["log_odds"] > 2
    assert all(row["auc"] < found.chance_auc for row in rows[1:])
    assert found.auc[SILENT] == found.auc_moved[SILENT] == 0.5
    assert contrast(scanned, store, neurons, find_word(said, "mill")).clips == 6


def test_of_one_short_word_nothing_is_beyond_chance(store, tmp_path):
    """One stretch of two frames, hundreds of features without any meaning: some look perfect, and the control says so."""
    plan = plan_of([1.0] * 4, chunk_rows=64)
    noise = fill_store(
        tmp_path / "n.zarr", plan, {SITE: 400}, lambda site, clip, n: np.random.Generator(np.random.PCG64(clip)).normal(0, 1, (n, 400))
    )
    scanned = scan(noise, f"neurons:{SITE}", tmp_path / "scan")
    word = find_word(SimpleNamespace(words=segments([(2, 0.4, 0.44, "once")])), "once")
    found = contrast(scanned, noise, features_of(scanned, noise), word)
    assert found.frames == 2 and found.auc.max() > 0.95
    assert (found.auc > found.chance_auc).sum() <= 1 and MOVED == 20


def test_the_places_of_values_are_the_bins_of_the_grid_with_zero_between():
    values = np.concatenate([bin_edges(), -bin_edges() * 1.01, [0.0, -0.0, 1e9, -1e9, 1e-30, -1e-30]]).astype(np.float32)
    bins = bin_of(values)
    assert (_place(values) == np.where(bins < 0, MAGNITUDES, bins + (bins >= MAGNITUDES))).all()


def test_a_store_that_grew_or_is_another_is_refused(store, tmp_path):
    plan = plan_of([1.0] * 4, shard_rows=64, chunk_rows=64, shuffle=False)
    partly = fill_store(tmp_path / "a.zarr", plan, {SITE: WIDTH}, made_up_rows, shards=[0, 1])
    scanned = scan(partly, f"neurons:{SITE}", tmp_path / "scan")
    whole = fill_store(tmp_path / "a.zarr", plan, {SITE: WIDTH}, made_up_rows)
    word = find_word(SimpleNamespace(words=segments([(0, 0.4, 0.44, "once")])), "once")
    with pytest.raises(HearsaeError, match=r"has 4 shards of encoder.blocks.0, the scan .* saw 2: run 'hearsae scan' again"):
        contrast(scanned, whole, features_of(scanned, whole), word)
    one = fill_store(tmp_path / "b.zarr", plan_of([0.5], chunk_rows=64), {SITE: WIDTH}, made_up_rows)
    with pytest.raises(HearsaeError, match="is not the store of the scan"):
        contrast(scanned, one, features_of(scanned, one), word)
