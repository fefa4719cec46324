"""`hearsae transcribe` on micro, whose words have known times; and its manifest on the way through `cache` and `scan` of decoder sites."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from conftest import micro_audio, nearly
from whisper.timing import find_alignment
from whisper.tokenizer import get_tokenizer

from analysis.experiments.errors import normalise
from analysis.experiments.speech import Speech
from analysis.query import feature_tokens, features_of, top_features
from analysis.scan_folder import Scan
from analysis.transcribe import Heard, alignment_heads, manifest_lines, token_bounds
from cache import micro
from cache.model import LoadedModel, load_model, log_mel
from cache.store import ActivationStore
from cluster.cli import main

SITE = "decoder.blocks.1.mlp.1"
CLIPS = 24
SCANNED = ("--top", 10, "--ranges", 3, "--quantiles", 3, "--per-bin", 2)
TRUTH = {row["file_name"]: row["words"] for row in map(json.loads, (micro.SPEECH / "alignments.jsonl").read_text().splitlines())}


def run(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0, arguments


def lines(manifest: Path) -> list[dict]:
    return [json.loads(line) for line in manifest.read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of the test split, and a store and scans of decoder neurons made from it."""
    root = tmp_path_factory.mktemp("transcribed")
    run("transcribe", "--dataset", "micro", "--split", "test", "--limit", CLIPS, "--model", "micro", "--out", root / "test.jsonl", "--no-ray")
    run("cache", "--dataset", root / "test.jsonl", "--model", "micro", "--sites", SITE, "--out", root / "acts.zarr", "--no-ray")
    run("scan", "--store", root / "acts.zarr", "--features", f"neurons:{SITE}", "--out", root / "scan", *SCANNED, "--no-ray")
    return root


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load_model("micro", "cpu")


def true_words(line: dict) -> list[tuple[float, float, str]]:
    path = Path(line["audio"])
    return [(start, end, normalise(label)) for start, end, label in TRUTH[f"{path.parent.name}/{path.name}"]]


# The transcripts


def test_transcripts_are_right_and_words_are_where_they_are_said(folder):
    errors = []
    for line in lines(folder / "test.jsonl"):
        truth, heard = true_words(line), [(word["start_s"], word["end_s"], normalise(word["word"])) for word in line["words"]]
        if [label for *_, label in truth] != [label for *_, label in heard]:
            continue
        errors += [(found[0] - true[0], found[1] - true[1]) for true, found in zip(truth, heard, strict=True)]
    start, end = np.abs(errors).T
    assert len(errors) > 100  # most clips are heard without an error
    assert np.median(start) < 0.03 and np.mean(start < 0.1) > 0.85
    assert np.median(end) < 0.06


def test_the_answer_compares_with_the_texts_of_the_dataset(succeeds, tmp_path):
    speech = ("--dataset", "micro", "--split", "test", "--limit", 6)
    result = succeeds("transcribe", *speech, "--model", "micro", "--out", tmp_path / "a.jsonl", "--no-ray")
    assert [set(row) for row in result["rows"]] == [{"clip", "source", "start_s", "before", "after"}] * 6
    summary = result["summary"]
    assert summary["clips"] == summary["compared"] == 6 and summary["skipped"] == 0 and summary["wer"] < 0.1 and summary["cer"] < 0.1
    written = lines(tmp_path / "a.jsonl")
    assert [line["text"] for line in written] == [row["after"] for row in result["rows"]]
    assert [line["reference"] for line in written] == [row["before"] for row in result["rows"]]
    assert all(line["accent"] and line["speaker"] and -1 < line["avg_logprob"] < 0 and 0 <= line["no_speech_prob"] < 0.5 for line in written)


def test_times_are_those_of_stock_whisper_token_by_token(model):
    tokenizer = get_tokenizer(False)
    text = "Hot ones. The show where celebrities answer hot questions"
    samples = micro_audio(1)[0]
    ids, mel = model.decoder_input(text), log_mel(samples, model)
    n_frames = -(-len(samples) // 320)
    with torch.no_grad():
        encoded = model.module.encoder(mel[None])[0]
    for heads in (alignment_heads(model), [(0, 1), (1, 0), (1, 2)]):
        model.module.register_buffer("alignment_heads", torch.zeros(2, 3).index_put(tuple(torch.tensor(heads).T), torch.ones(())).to_sparse())
        stock = find_alignment(model.module, tokenizer, ids[2:], mel, 2 * n_frames)
        bounds = token_bounds(model, heads, encoded, ids, tokenizer, n_frames)
        at = np.cumsum([0, *(len(word.tokens) for word in stock)])
        np.testing.assert_allclose([bounds[i] for i in at[:-1]], [word.start for word in stock])
        np.testing.assert_allclose([bounds[i] for i in at[1:]], [word.end for word in stock])
        assert len(bounds) == len(ids) - 2 + 1 and (np.diff(bounds) >= 0).all()


def test_a_clip_of_a_single_frame_has_times_within_it(model):
    tokenizer, encoded = get_tokenizer(False), torch.zeros(1500, 96)
    assert token_bounds(model, [(1, 0)], encoded, model.decoder_input("Hot ones"), tokenizer, 1).tolist() == [0, 0, 0]


def test_heads_are_those_that_are_known_to_align(model, tiny_whisper, tmp_path):
    assert alignment_heads(model) == [(1, 0)]
    other = load_model(str(tiny_whisper(tmp_path / "other.pt")), "cpu")
    assert alignment_heads(other) == [(1, 0), (1, 1)]  # the upper half of two blocks
    other.sha256 = "d3dd57d32accea0b295c96e26691aa14d8822fac7d9d27d5dc00b4ca2826dd03"  # of tiny.en
    other.dims.n_text_layer, other.dims.n_text_head = 4, 6
    assert alignment_heads(other) == [(1, 0), (2, 0), (2, 5), (3, 0), (3, 1), (3, 2), (3, 3), (3, 4)]


# What datasets may be like


def test_long_audio_is_cut_and_its_times_are_within_the_source(succeeds, tmp_path):
    short = micro_audio(5)
    silence = np.zeros(16000, np.float32)
    whole = np.concatenate([part for samples in short * 2 for part in (samples, silence)])
    soundfile.write(tmp_path / "long.wav", whole, 16000)
    result = succeeds("transcribe", "--dataset", tmp_path / "long.wav", "--model", "micro", "--out", tmp_path / "a.jsonl", "--no-ray")
    first, second, *_ = lines(tmp_path / "a.jsonl")
    assert (first["offset"], first["duration"], second["offset"]) == (0, 30, 30)
    assert 30 <= second["words"][0]["start_s"] < second["words"][-1]["end_s"] <= 30 + second["duration"]
    assert result["rows"][1]["before"] is None and "reference" not in second and result["summary"]["wer"] is None


def test_what_cannot_be_read_is_left_out_and_counted(succeeds, tmp_path):
    for name, samples in zip(("a.wav", "b.wav"), micro_audio(2), strict=True):
        soundfile.write(tmp_path / name, samples, 16000)
    soundfile.write(tmp_path / "nan.wav", np.full(8000, np.nan, np.float32), 16000, subtype="FLOAT")
    (tmp_path / "torn.wav").write_bytes(b"RIFF")
    result = succeeds("transcribe", "--dataset", tmp_path, "--model", "micro", "--out", tmp_path / "a.jsonl", "--no-ray")
    assert result["summary"]["clips"] == 2 and result["summary"]["skipped"] == 2
    assert "nan.wav" in result["summary"]["skipped_reasons"][0] and "torn.wav" in result["summary"]["skipped_reasons"][1]
    assert [Path(line["audio"]).name for line in lines(tmp_path / "a.jsonl")] == ["a.wav", "b.wav"]


def test_where_whisper_writes_nothing_no_other_text_takes_its_place(succeeds, tmp_path):
    for name, samples in zip(("quiet.wav", "said.wav"), micro_audio(2), strict=True):
        soundfile.write(tmp_path / name, samples, 16000)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "quiet.wav", "text": "one", "normalized_text": "one"}\n')
    # Whisper is kept from ending a text before it has begun, so it rarely writes nothing.
    heard = [Heard(clip, text, "en", [], [], -0.5, 0.9, False, None) for clip, text in enumerate(("", "Hot ones."))]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in manifest_lines(Speech(str(tmp_path)), heard)))
    succeeds("cache", "--dataset", tmp_path / "a.jsonl", "--model", "micro", "--sites", SITE, "--out", tmp_path / "acts.zarr", "--no-ray")
    clips = {Path(row["source"]).name: row for row in ActivationStore.open(tmp_path / "acts.zarr").clips.to_pylist()}
    assert clips["quiet.wav"]["text"] is None and clips["quiet.wav"]["n_tokens"] is None and clips["quiet.wav"]["reference"] == "one"
    assert clips["said.wav"]["text"] == "Hot ones." and clips["said.wav"]["n_tokens"] > 2


def test_audio_inside_a_dataset_is_written_beside_the_manifest_to_the_last_bit(succeeds, tmp_path):
    files = sorted((micro.SPEECH / "test").glob("*.flac"))[:3]
    table = pa.table({"audio": [{"bytes": file.read_bytes(), "path": None} for file in files], "text": ["a", "b", "c"]})
    pq.write_table(table, tmp_path / "speech.parquet")
    result = succeeds("transcribe", "--dataset", tmp_path / "speech.parquet", "--model", "micro", "--out", tmp_path / "a.jsonl", "--no-ray")
    assert result["summary"]["audio_written"] == 3
    for line, samples in zip(lines(tmp_path / "a.jsonl"), micro_audio(3), strict=True):
        assert line["audio"].startswith("a-audio/") and line["offset"] == 0
        np.testing.assert_array_equal(soundfile.read(tmp_path / line["audio"], dtype="float32")[0], samples)


def test_what_cannot_be_done_is_refused_before_there_is_work(refused, tiny_whisper, tmp_path):
    encoder, out = tiny_whisper(tmp_path / "encoder.pt", encoder_only=True), tmp_path / "a.jsonl"
    micro_ = ("transcribe", "--dataset", "micro", "--split", "test", "--no-ray")
    assert "encoder without a decoder" in refused(*micro_, "--model", encoder, "--out", out)
    assert "ends in .jsonl" in refused(*micro_, "--model", "micro", "--out", tmp_path / "a.json")
    assert "knows English alone" in refused(*micro_, "--model", "micro", "--out", out, "--language", "de")
    out.write_text("mine")
    assert "--again" in refused(*micro_, "--model", "micro", "--out", out)
    assert "is the dataset itself" in refused("transcribe", "--dataset", out, "--model", "micro", "--out", out, "--again", "--no-ray")
    assert out.read_text() == "mine"


def test_a_multilingual_model_takes_the_language_that_is_named_and_so_does_its_store(succeeds, refused, tiny_whisper, tmp_path):
    model, manifest = tiny_whisper(tmp_path / "many.pt", n_vocab=51866, n_mels=128), tmp_path / "a.jsonl"  # as large-v3
    command = ("transcribe", "--dataset", "micro", "--split", "test", "--limit", 2, "--model", model, "--no-ray", "--out", manifest)
    succeeds(*command, "--language", "German")
    written = lines(manifest)
    assert [line["language"] for line in written] == ["de", "de"]
    assert "does not know the language" in refused(*command, "--language", "Klingon", "--again")
    store, scan = tmp_path / "acts.zarr", tmp_path / "scan"
    succeeds("cache", "--dataset", manifest, "--model", model, "--sites", "decoder.blocks.1", "--out", store, "--no-ray")
    succeeds("scan", "--store", store, "--features", "neurons:decoder.blocks.1", "--out", scan, *SCANNED, "--no-ray")
    examples = pq.read_table(scan / "examples.parquet").to_pylist()
    start = ["<|startoftranscript|>", "<|de|>", "<|transcribe|>", "<|notimestamps|>"]
    assert {row["token"] for row in examples if row["frame"] < 4} <= set(start)
    said = [row for row in examples if row["frame"] >= 4]  # random weights write nonsense, in pieces of characters too
    assert said and all(row["start_s"] is not None and row["token_start"] <= row["token_end"] for row in said)


def test_what_the_dataset_says_of_a_clips_language_holds_where_none_is_named(succeeds, tiny_whisper, tmp_path):
    model = tiny_whisper(tmp_path / "many.pt", n_vocab=51865)
    for name, samples in zip("abc", micro_audio(3), strict=True):
        soundfile.write(tmp_path / f"{name}.wav", samples, 16000)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.wav", "language": "fr"}\n{"file_name": "c.wav", "locale": "pt-BR"}\n')
    succeeds("transcribe", "--dataset", tmp_path, "--model", model, "--out", tmp_path / "a.jsonl", "--no-ray")
    found = [line["language"] for line in lines(tmp_path / "a.jsonl")]
    assert (found[0], found[2]) == ("fr", "pt") and found[1]  # which Whisper found by itself


@pytest.mark.cluster
@pytest.mark.slow
def test_workers_write_the_same_manifest(folder, tmp_path):
    run("transcribe", "--dataset", "micro", "--split", "test", "--limit", CLIPS, "--model", "micro", "--out", tmp_path / "a.jsonl", "--workers", 2)
    lines = [[json.loads(line) for line in path.read_text().splitlines()] for path in (tmp_path / "a.jsonl", folder / "test.jsonl")]
    assert lines[0] == nearly(lines[1])


def test_a_manifest_may_lie_in_an_object_store(succeeds, s3):
    place = f"s3://{s3.bucket}/speech/a.jsonl"
    speech = ("--dataset", "micro", "--split", "test", "--limit", 2)
    succeeds("transcribe", *speech, "--model", "micro", "--out", place, "--no-ray")
    found = succeeds("cache", "--dataset", place, "--model", "micro", "--sites", SITE, "--out", f"s3://{s3.bucket}/acts.zarr", "--no-ray")
    assert found["clips"] == 2 and found["skipped"] == 0


# From the manifest to words that drive neurons


def test_a_store_of_the_manifest_has_whispers_text_and_the_times_of_its_tokens(folder):
    store = ActivationStore.open(folder / "acts.zarr")
    written = {line["audio"]: line for line in lines(folder / "test.jsonl")}
    for clip in store.clips.to_pylist():
        line = written[clip["source"]]
        assert clip["text"] == line["text"] and clip["reference"] == line["reference"]
        assert clip["tokens"][2:] == [token["id"] for token in line["token_times"]]
        assert clip["token_times"] == line["token_times"] and clip["words"] == line["words"]


def test_examples_are_tokens_in_their_transcripts_at_the_time_when_they_are_said(folder):
    store, examples = ActivationStore.open(folder / "acts.zarr"), pq.read_table(folder / "scan" / "examples.parquet").to_pylist()
    clips, decode = store.clips.to_pylist(), get_tokenizer(False).decode
    values = {number: store.read_clip(SITE, number) for number in range(len(clips))}
    late = []
    for row in examples:
        clip = clips[row["clip"]]
        ids = clip["tokens"]
        assert row["value"] == values[row["clip"]][row["frame"], row["feature"]]
        assert row["token"] == decode([ids[row["frame"]]])
        assert row["next_token"] == (decode([ids[row["frame"] + 1]]) if row["frame"] + 1 < len(ids) else None)
        if row["frame"] < 2:  # of the start sequence
            assert row["start_s"] is row["end_s"] is row["token_start"] is row["token_end"] is None
            continue
        assert row["text"][row["token_start"] : row["token_end"]] == row["token"].strip()
        word = next(i for i, (start, end) in enumerate(spans(clip["text"])) if start <= row["token_start"] < end)
        line = {"audio": clip["source"]}
        if clip["text"] == clip["reference"] and row["token"].strip().isalpha():
            start, end, _ = true_words(line)[word]
            late.append(max(0, start - row["end_s"], row["start_s"] - end))
    assert len(late) > 1000 and np.mean(np.array(late) < 0.05) > 0.95


def test_the_features_at_a_token_come_with_it(folder):
    store = ActivationStore.open(folder / "acts.zarr")
    features = features_of(Scan.open(folder / "scan"), store)
    clip = store.clips.slice(0, 1).to_pylist()[0]
    for frame in (0, 4):
        row = top_features(store, features, 0, frame=frame, n=1)[0]
        assert row["token"] == get_tokenizer(False).decode([clip["tokens"][frame]])
        times = clip["token_times"][frame - 2] if frame >= 2 else {"start_s": None, "end_s": None}
        assert (row["start_s"], row["end_s"]) == (times["start_s"], times["end_s"])


def test_the_command_counts_tokens_and_shows_them_in_context(succeeds, refused, capfd, folder):
    scan = folder / "scan"
    examples = [row for row in pq.read_table(scan / "examples.parquet").to_pylist() if row["kind"] == "top"]
    best = succeeds("query", "--scan", scan, "--tokens", "--n", 5)["rows"]
    assert len(best) == 5 and [row["count"] for row in best] == sorted((row["count"] for row in best), reverse=True)
    for row in best:
        at = [one["value"] for one in examples if one["feature"] == row["feature"] and one["token"].strip().lower() == row["token"]]
        assert (row["count"], row["max"]) == (len(at), max(at)) and row["mean"] == pytest.approx(np.mean(at))
        assert row["token"].isalpha() and row["examples"] == sum(one["feature"] == row["feature"] for one in examples)
        of_it = succeeds("query", "--scan", scan, "--tokens", "--feature", row["feature"], "--n", 99)["rows"]
        assert of_it[0] == row and sum(one["count"] for one in of_it) == row["examples"]
    following = succeeds("query", "--scan", scan, "--tokens", "--following", "--feature", best[0]["feature"])["rows"]
    assert {one["next_token"] for one in following} <= {(one["next_token"] or "").strip().lower() for one in examples}
    run("query", "--scan", scan, "--feature", best[0]["feature"], "--kind", "top")
    shown = capfd.readouterr().out
    strongest = next(one for one in examples if one["feature"] == best[0]["feature"] and one["token_start"] is not None)
    assert f"[{strongest['text'][strongest['token_start'] : strongest['token_end']]}]" in shown
    assert "--kind has no part in a question of --tokens" in refused("query", "--scan", scan, "--tokens", "--kind", "top")
    assert "there is no feature 384" in refused("query", "--scan", scan, "--tokens", "--feature", 384)


def spans(text: str) -> list[tuple[int, int]]:
    """First and last + 1 character of each word between spaces."""
    ends = np.cumsum([len(word) + 1 for word in text.split(" ")])
    return [(int(end) - len(word) - 1, int(end) - 1) for end, word in zip(ends, text.split(" "), strict=True)]


def test_a_store_of_another_text_has_tokens_without_times(succeeds, folder, tmp_path):
    other = [line | {"text": line["text"] + " Yes"} for line in lines(folder / "test.jsonl")[:3]]
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(line) + "\n" for line in other))
    succeeds("cache", "--dataset", tmp_path / "other.jsonl", "--model", "micro", "--sites", SITE, "--out", tmp_path / "acts.zarr", "--no-ray")
    succeeds("scan", "--store", tmp_path / "acts.zarr", "--features", f"neurons:{SITE}", "--out", tmp_path / "scan", "--no-ray")
    examples = pq.read_table(tmp_path / "scan" / "examples.parquet")
    assert examples["start_s"].null_count == examples["end_s"].null_count == examples.num_rows
    assert examples["token"].null_count == 0 and " Yes" in examples["token"].to_pylist()


# Which words drive which neurons


@pytest.fixture(scope="module")
def trained_and_random(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scan]:
    """Scans of the same decoder neurons, on the same texts, of micro and of micro with weights drawn anew."""
    root = tmp_path_factory.mktemp("words")
    scans = {}
    for name in ("micro", "random:0:micro"):
        place = root / name.replace(":", "-")
        speech = ("--dataset", "micro", "--split", "train")
        run("cache", *speech, "--model", name, "--sites", SITE, "--out", place / "acts.zarr", "--no-ray")
        run("scan", "--store", place / "acts.zarr", "--features", f"neurons:{SITE}", "--out", place / "scan", "--top", 10, "--no-ray")
        scans[name] = Scan.open(place / "scan")
    return scans


def most_of_one(scan: Scan, following: bool) -> dict[int, str]:
    """Neuron -> the word that at least nine of its ten strongest examples are, or are before."""
    name = "next_token" if following else "token"
    return {row["feature"]: row[name] for row in feature_tokens(scan, 384, following=following) if row["count"] >= 9 and row["examples"] == 10}


@pytest.mark.slow
def test_micro_has_neurons_before_one_word_and_random_weights_have_none(trained_and_random):
    found = most_of_one(trained_and_random["micro"], following=True)
    assert len(found) >= 3 and len(set(found.values())) >= 3
    assert not most_of_one(trained_and_random["random:0:micro"], following=True)


@pytest.mark.slow
def test_the_token_that_is_read_is_told_by_neurons_of_random_weights_too(trained_and_random):
    """It is in the decoder's input: neurons at one token show nothing that was learnt, and only what comes next does."""
    assert len(set(most_of_one(trained_and_random["random:0:micro"], following=False).values())) >= 5
