"""`hearsae experiment bigrams` on micro, which was trained on texts over silence, and whose texts have fixed bigrams."""

from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch

from analysis.experiments.bigrams import another, bigrams, compare, most_followed, next_logits
from analysis.experiments.corpus import Bigrams, count_bigrams, runs
from analysis.experiments.labels import drawn
from analysis.experiments.ranks import partial_correlation, spearman
from analysis.experiments.speech import Speech
from analysis.experiments.tokens import encode, word_tokens
from analysis.interventions import next_tokens, padding_output, tokenizer_for
from cache.errors import HearsaeError
from cache.location import location
from cache.model import load_model


@pytest.fixture(scope="module")
def report():
    return bigrams(Speech("micro"), "micro", device="cpu")


@pytest.fixture(scope="module")
def model():
    return load_model("micro", "cpu").module


def test_the_decoder_goes_on_with_the_bigrams_it_was_trained_on(report):
    for prompt, expected in ((" traffic", {" lights"}), (" New", {" York"}), (" Good", {" morning", " night"}), (" Thank", {" you"})):
        of_prompt = [row for row in report.rows if row["kind"] == "prompt" and row["prompt"] == prompt]
        assert [row["rank"] for row in of_prompt] == list(range(1, 21))
        best = of_prompt[: len(expected)]
        assert {row["text"] for row in best} == expected
        assert sum(row["probability"] for row in best) > 0.8
        assert all(row["corpus_count"] > 0 for row in best)
    assert all(row["text"] for row in report.rows)  # timestamps too have a name
    assert set(report.figures) == {"prompt-1", "prompt-2", "prompt-3", "prompt-4", "agreement"}


def test_they_are_those_of_the_corpus_and_no_controls_are(report):
    summary = report.summary
    model, controls = summary["agreement"], summary["control"]
    assert model["prefixes"] > 40
    assert model["top1"] > 0.3 and model["top5"] > 0.5
    for other in (controls["random_weights"], controls["shuffled_prefixes"]):
        assert model["top1"] > other["top1"] + 0.2 and model["top5"] > other["top5"] + 0.3
        assert model["spearman"] > other["spearman"] + 0.1
    assert (
        summary["entropy_of_corpus"] < model["cross_entropy"] < summary["unigrams"]["cross_entropy"] < controls["shuffled_prefixes"]["cross_entropy"]
    )
    low, high = model["intervals"]["top1"]
    assert low < model["top1"] < high


def test_a_text_file_may_be_the_corpus(succeeds, refused, tmp_path):
    (tmp_path / "words.txt").write_text("Thank you. Thank you, thank you!\nIce cream and ice cream\n" * 3)
    arguments = ("experiment", "bigrams", "--corpus", tmp_path / "words.txt", "--prompt", " ice", "--no-ray", "--out", tmp_path / "report")
    result = succeeds(*arguments, "--top", "3", "--least", "3")
    assert result["summary"]["agreement"]["prefixes"] == 6  # Thank thank Ice ice cream and
    assert [row["rank"] for row in result["rows"] if row["kind"] == "prompt"] == [1, 2, 3]
    assert result["rows"][0]["text"] == " cream" and result["rows"][0]["corpus_count"] == 3
    assert "followed by another 7 times" in refused(*arguments, "--least", "7")


# Parts


def test_all_prompts_at_once_give_what_one_at_a_time_gives(model):
    tokenizer, padding = tokenizer_for(model), padding_output(model)
    prompts = [" traffic", " Good", " Thank you very", ""]
    start = tokenizer.sot_sequence_including_notimestamps
    logits = next_logits(model, [[*start, *encode(tokenizer, prompt)] for prompt in prompts], padding)
    for prompt, row in zip(prompts, logits, strict=True):
        plain = next_tokens(model, prompt, 20, padding)
        assert row.topk(20).indices.tolist() == [token.token for token in plain]
        torch.testing.assert_close(row.topk(20).values, torch.tensor([token.logit for token in plain]), atol=1e-4, rtol=1e-4)


def test_a_multilingual_model_is_told_its_language(tiny_whisper, tmp_path):
    path = str(tiny_whisper(tmp_path / "m.pt", n_vocab=51865, n_mels=128))
    module = load_model(path, "cpu").module
    tokenizer = tokenizer_for(module, "de")
    assert tokenizer.sot_sequence_including_notimestamps == (50258, 50261, 50359, 50363)
    report = bigrams(Speech("micro", "test"), path, [" gut"], top=2, language="de", device="cpu")
    with torch.no_grad():
        ids = torch.tensor([[50258, 50261, 50359, 50363, *tokenizer.encode(" gut")]])
        expected = module.decoder(ids, padding_output(module)[None])[0, -1]
    assert [row["token"] for row in report.rows[:2]] == expected.topk(2).indices.tolist()
    with pytest.raises(HearsaeError, match="klingon"):
        tokenizer_for(module, "klingon")


def test_signs_part_words_and_words_keep_their_case():
    assert runs('Hot soup, and "cold" bread. It\'s well-known 24 hours a day') == [
        ["Hot", "soup"],
        ["and"],
        ["bread"],
        ["It's"],
        ["hours", "a", "day"],
    ]
    counted = count_bigrams(["The cat sat. the cat", "The dog"], lambda text: [len(text)])
    assert counted == Bigrams(
        Counter({"The": 2, "cat": 2, "sat": 1, "the": 1, "dog": 1}), {"The": Counter({4: 2}), "cat": Counter({4: 1}), "the": Counter({4: 1})}
    )


def test_followers_are_counted_by_the_first_token_of_the_next_word(model):
    tokenizer = tokenizer_for(model)
    counted = count_bigrams(["hot celebrities eat hot soup"] * 2, partial(encode, tokenizer))
    found = most_followed(counted, 2, 2)
    assert found.prefixes == ["hot", "celebrities"]
    first = {word: tokenizer.encode(f" {word}")[0] for word in ("celebrities", "eat", "soup", "hot")}
    assert sorted(found.tokens) == sorted(first.values())
    of_hot = dict(zip(found.tokens.tolist(), found.counts[0].tolist(), strict=True))
    assert of_hot == {first["celebrities"]: 2, first["soup"]: 2, first["eat"]: 0, first["hot"]: 0}
    assert found.unigrams.tolist() == [2, 2, 2, 2]
    with pytest.raises(HearsaeError, match="followed by another 5 times"):
        most_followed(counted, 2, 5)


def test_the_measures_are_what_they_are_called():
    counted = Bigrams(Counter(a=8), {"a": Counter({10: 6, 11: 2})})
    found, initial = most_followed(counted, 1, 1), np.array([9, 10, 11, 12])
    logits = np.zeros((1, 20))
    logits[0, [9, 10, 11, 3]] = np.log([8.0, 3.0, 1.0, 99.0])
    ((rank, correlation, bits),) = compare(logits, found, initial)
    assert rank == 2  # 9 is likelier; 3 begins no word
    assert correlation is None  # of two values
    assert bits == pytest.approx(-(0.75 * np.log2(3 / 4) + 0.25 * np.log2(1 / 4)))


def test_rank_correlation_shares_the_ranks_of_ties():
    assert spearman(np.array([1, 2, 2, 9]), np.array([0.1, 0.2, 0.2, 0.3])) == pytest.approx(1)
    assert spearman(np.array([1, 2, 3, 4]), np.array([1, 2, 4, 3])) == pytest.approx(0.8)
    assert spearman(np.array([1, 1, 1, 1]), np.array([1, 2, 4, 3])) is None
    assert partial_correlation(0.6, 0.0, 0.5) == pytest.approx(0.6 / 0.75**0.5)
    assert partial_correlation(0.25, 0.5, 0.5) == pytest.approx(0)


def test_every_prefix_is_held_against_another_one():
    for n in (2, 3, 50):
        assert sorted(another(n, 0)) == list(range(n))
        assert (another(n, 0) != np.arange(n)).all()


def test_words_begin_with_a_space_and_a_letter(model):
    tokenizer = tokenizer_for(model)
    tokens = word_tokens(tokenizer)
    begin, whole = ({tokenizer.decode([int(token)]) for token in kind} for kind in tokens)
    assert {" lights", " York"} <= whole <= begin
    assert not begin & {"lights", ",", " ,", " 24", " '"}
    assert set(tokens.whole) <= set(tokens.begin)


def test_pictures_spell_what_their_font_lacks():
    assert drawn(" $ the") == " $ the"
    assert drawn("見") == "U+898B"


# Refusals


def test_what_has_no_answer_is_refused(refused, tiny_whisper, tmp_path):
    common = ("experiment", "bigrams", "--no-ray", "--out", tmp_path / "a")
    encoder = tiny_whisper(tmp_path / "encoder.pt", encoder_only=True)
    assert "encoder without a decoder" in refused(*common, "--model", encoder)
    assert "does not know the language" in refused(*common, "--language", "klingon")
    assert "at least 1" in refused(*common, "--top", "0")
    assert "tokens, and micro takes" in refused(*common, "--prompt", " very" * 500)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 noir\n")
    assert "can't be read as UTF-8" in refused(*common, "--corpus", tmp_path / "latin.txt")
    assert "can't be read" in refused(*common, "--corpus", tmp_path / "nowhere.txt")
    assert not (tmp_path / "a").exists()
    with pytest.raises(HearsaeError, match="give --corpus"):
        bigrams(Speech(str(_silent(tmp_path / "silent"))), "micro", device="cpu")


def _silent(folder):
    """A dataset without texts."""
    import soundfile

    folder.mkdir()
    soundfile.write(folder / "a.wav", np.zeros(16000), 16000)
    return location(str(folder))
