"""`hearsae experiment neighbours` on micro, whose words are few and each heard: its embeddings go with sound."""

import numpy as np
import pytest
import torch

from analysis.experiments.neighbours import Likeness, Vocabulary, _nearest, correlations, neighbours, scores
from analysis.experiments.speech import Speech
from analysis.experiments.word_likeness import company, edit_similarity, pronunciation, read_vectors, same_stem
from cache.errors import HearsaeError
from cache.location import location


@pytest.fixture(scope="module")
def report():
    return neighbours(Speech("micro"), "micro", words=80, device="cpu")


def test_micros_words_that_sound_alike_have_similar_embeddings(report):
    found, control = report.summary, report.summary["control"]["random_weights"]
    sound = found["correlation"]["sound"]
    assert sound["words"] == 80 and sound["pairs"] == 80 * 79 / 2
    assert sound["rho"] > sound["shuffled"][1] + 0.1
    assert abs(control["correlation"]["sound"]["rho"]) < 0.1
    assert found["nearest"]["sound"]["closer"] > 0.65 > 0.57 > control["nearest"]["sound"]["closer"] > 0.43
    assert found["nearest"]["sound"]["other_stems"] > 0.65
    assert found["correlation"]["sound_given_spelling"] > found["correlation"]["spelling_given_sound"]
    assert found["correlation"]["company"] is None  # too small a corpus
    assert "vectors" not in found["correlation"]


def test_neighbours_are_the_nearest_by_cosine_and_never_the_word_itself(report):
    from whisper.tokenizer import get_tokenizer

    from cache.model import load_model

    tokenizer, weight = get_tokenizer(False), load_model("micro", "cpu").module.decoder.token_embedding.weight

    def cosine(a, b):
        a, b = (weight[tokenizer.encode(f" {word}")[0]] for word in (a, b))
        return float(torch.nn.functional.cosine_similarity(a, b, dim=0))

    by_word: dict[str, list] = {}
    for row in report.rows:
        by_word.setdefault(row["word"], []).append(row)
    words = sorted({row["neighbour"] for row in report.rows})
    for word, rows in list(by_word.items())[:10]:
        assert [row["rank"] for row in rows] == list(range(1, len(rows) + 1))
        assert len([row for row in rows if not row["case_variant"]]) == 10
        assert word not in {row["neighbour"] for row in rows}
        for row in rows:
            assert row["cosine"] == pytest.approx(cosine(word, row["neighbour"]), abs=1e-5)
        farther = set(words) - {row["neighbour"] for row in rows} - {word}
        assert max(cosine(word, other) for other in farther) <= rows[-1]["cosine"] + 1e-6


def test_tokens_that_are_not_in_use_are_no_neighbours(report, succeeds, refused, tmp_path):
    common = ("experiment", "neighbours", "--words", "20", "--no-ray", "--out", tmp_path / "report")
    result = succeeds(*common, "--pool", "vocabulary", "--word", "traffic", "reading")
    assert 500 < result["summary"]["pool"] < 1072  # of 32,105 tokens that are words by their letters
    assert [line.split(":")[0].strip() for line in result["lines"][:2]] == ["traffic", "reading"]
    assert {"traffic", "reading"} <= {row["word"] for row in result["rows"]}
    variants = [row for row in result["rows"] if row["case_variant"]]
    assert variants and all(row["word"].lower() == row["neighbour"].lower() for row in variants)
    assert "'xylophone' is " in refused(*common, "--word", "xylophone")
    assert "not in use" in refused(*common, "--word", "government")


# Parts


def test_a_planted_sound_or_meaning_is_found_and_tells_itself_from_the_other():
    """Embeddings made of what words mean: their neighbours are close in meaning, and in sound by chance alone."""
    generator = np.random.Generator(np.random.PCG64(0))
    words = "bat cat hat mat rat sat fat pat ball call fall hall mall tall wall small bed fed led red shed wed bread head".split()
    meaning = generator.standard_normal((len(words), 8)).astype(np.float32)
    meaning /= np.linalg.norm(meaning, axis=1, keepdims=True)
    likeness = Likeness(None, dict(zip(words, meaning, strict=True)), True)
    among = Vocabulary(words, np.arange(len(words)))
    pairs = {name: np.array([[measure(a, b) for b in words] for a in words]) for name, measure in likeness.measures.items()}
    found = correlations(meaning @ meaning.T, pairs, words, 0)
    assert found["vectors"]["rho"] == pytest.approx(1)
    assert found["sound"]["shuffled"][0] - 0.05 < found["sound"]["rho"] < found["sound"]["shuffled"][1] + 0.05
    closer = scores(_nearest(meaning, among, words, likeness, 3, 0))
    assert closer["vectors"]["closer"] > 0.9
    assert 0.35 < closer["sound"]["closer"] < 0.65

    by_sound = np.linalg.eigh(pairs["sound"])  # rows whose products are the similarities of sound, as nearly as can be
    embedding = (by_sound.eigenvectors * np.sqrt(np.maximum(by_sound.eigenvalues, 0))).astype(np.float32)
    embedding /= np.linalg.norm(embedding, axis=1, keepdims=True)
    assert correlations(embedding @ embedding.T, pairs, words, 0)["sound"]["rho"] > 0.8
    assert scores(_nearest(embedding, among, words, likeness, 3, 0))["sound"]["closer"] > 0.9


def test_likeness_counts_what_must_be_changed():
    assert edit_similarity("kitten", "sitting") == pytest.approx(1 - 3 / 7)
    assert edit_similarity("", "abc") == 0 and edit_similarity("abc", "abc") == 1 == edit_similarity("", "")
    assert pronunciation("Lights") == ("L", "AY", "T", "S")
    assert pronunciation("blorf") is not None and pronunciation("Straße") is None
    assert edit_similarity(pronunciation("right"), pronunciation("write")) == 1


def test_inflections_are_kin():
    for a, b in (
        ("answer", "answers"),
        ("make", "Making"),
        ("hot", "hotter"),
        ("run", "running"),
        ("baby", "babies"),
        ("watch", "watches"),
        ("try", "tried"),
    ):
        assert same_stem(a, b) and same_stem(b, a), (a, b)
    for a, b in (("hope", "hop"), ("rate", "rat"), ("ice", "nice"), ("glass", "glad"), ("sing", "sed"), ("bus", "but")):
        assert not same_stem(a, b), (a, b)


def test_words_in_the_same_company_are_alike_and_small_corpora_say_nothing():
    texts = ["the cat drinks warm milk", "the dog drinks warm milk", "a rocket leaves this planet", "a comet leaves this planet"] * 1200
    found = company(texts, ["cat", "dog", "rocket", "comet", "absent"])
    assert set(found) == {"cat", "dog", "rocket", "comet"}
    assert found["cat"] @ found["dog"] > 0.9 and found["rocket"] @ found["comet"] > 0.9
    assert found["cat"] @ found["rocket"] < 0.1
    assert company(texts[:100], ["cat"]) is None


def test_company_is_counted_as_one_by_one():
    """The plain twin of the counts: every pair of words at most four apart in one line."""
    generator = np.random.Generator(np.random.PCG64(1))
    letters = list("abcdefgh")
    texts = [" ".join(generator.choice(letters, 12)) for _ in range(2000)]
    found = company(texts, letters)
    counts = {a: dict.fromkeys(letters, 0) for a in letters}
    often = dict.fromkeys(letters, 0)
    for text in texts:
        line = text.split()
        for i, a in enumerate(line):
            often[a] += 1
            for j in range(max(0, i - 4), min(len(line), i + 5)):
                if j != i:
                    counts[a][line[j]] += 1
    order = sorted(letters, key=lambda letter: -often[letter])
    expected = np.array([often[letter] for letter in order]) ** 0.75
    for a in letters:
        row = np.array([counts[a][b] for b in order])
        ppmi = np.maximum(np.log(row / row.sum() / (expected / expected.sum())), 0)
        if a in found:
            np.testing.assert_allclose(found[a], ppmi / np.linalg.norm(ppmi), atol=1e-5)
    assert len(found) > 4


def test_vectors_of_meaning_are_read_and_what_is_none_is_named(tmp_path):
    file = tmp_path / "vectors.txt"
    file.write_text("3 2\nNew 9 9\nnew 3 4\nunknown 1 1\nYork 0 2\n")
    found = read_vectors(location(str(file)), ["new", "York", "traffic"])
    assert found.keys() == {"new", "york"}
    np.testing.assert_allclose(found["new"], [0.6, 0.8], rtol=1e-6)
    for text, reason in (
        ("new 1 2\nyork 1\n", "vectors.txt:2: .*1 numbers where others have 2"),
        ("new 1 x\n", ":1: "),
        ("other 1 2\n", "none of the words"),
    ):
        file.write_text(text)
        with pytest.raises(HearsaeError, match=reason):
            read_vectors(location(str(file)), ["new", "york"])


def test_given_vectors_are_scored(succeeds, tmp_path, report):
    words = sorted({row["word"].lower() for row in report.rows})
    generator = np.random.Generator(np.random.PCG64(0))
    (tmp_path / "v.txt").write_text("".join(f"{word} {' '.join(map(str, generator.standard_normal(5)))}\n" for word in words))
    arguments = ("--words", "40", "--vectors", tmp_path / "v.txt", "--no-ray", "--out", tmp_path / "report")
    found = succeeds("experiment", "neighbours", *arguments)["summary"]
    assert abs(found["correlation"]["vectors"]["rho"]) < 0.15  # they are noise
    assert 0.3 < found["nearest"]["vectors"]["closer"] < 0.7


def test_what_cannot_be_compared_is_refused(refused, tiny_whisper, tmp_path):
    common = ("experiment", "neighbours", "--no-ray", "--out", tmp_path / "a")
    assert "encoder without a decoder" in refused(*common, "--model", tiny_whisper(tmp_path / "encoder.pt", encoder_only=True))
    (tmp_path / "few.txt").write_text("hot cold xylophone\n")
    assert "only 2 words of the corpus" in refused(*common, "--corpus", tmp_path / "few.txt")
    assert "nowhere.txt" in refused(*common, "--vectors", tmp_path / "nowhere.txt")
    assert "at least 1" in refused(*common, "--k", "0")
    assert not (tmp_path / "a").exists()
