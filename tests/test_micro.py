"""micro against the known truth of its speech: it hears, its features follow phones, and interventions do to it what they should.

Every bound lies between what micro reaches (docs/micro.md) and what a Whisper of random weights does.
"""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import whisper

from analysis.experiments.chop import chop as chop_words
from analysis.experiments.speech import Speech
from analysis.interventions import chop, limit_attention, next_tokens, padding_output, transcribe_encoded
from analysis.phones import read_alignments
from cache import micro

_file = Path(__file__).parents[1] / "benchmarks" / "micro.py"
_spec = importlib.util.spec_from_file_location("benchmark_of_micro", _file)
assert _spec and _spec.loader
benchmark = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(benchmark)

CLIPS, WINDOW_CLIPS, TRIALS = 80, 20, 120
MARGIN = 2
"""Frames on either side of a word that are chopped with it: an encoder position also holds what its neighbours sound like."""
WORD_GONE, OTHERS_KEPT, NOTHING_IN_ITS_PLACE, GONE_ELSEWHERE = 0.90, 0.95, 0.75, 0.2


@pytest.fixture(scope="module")
def model():
    return whisper.load_model(str(micro.MODEL), device="cpu")


@pytest.fixture(scope="module")
def clips():
    return benchmark.read_clips(micro.SPEECH, CLIPS)


@pytest.fixture(scope="module")
def encoded(model, clips):
    return benchmark.encode(model, clips)


@pytest.fixture(scope="module")
def texts(model, encoded):
    return transcribe_encoded(model, encoded)


def test_the_checkpoint_is_small_and_of_half_precision():
    assert micro.MODEL.stat().st_size <= 2.5e6
    checkpoint = torch.load(micro.MODEL, weights_only=True)
    assert {tensor.dtype for tensor in checkpoint["model_state_dict"].values()} == {torch.float16}
    assert checkpoint["dims"]["n_audio_layer"] == 4 and checkpoint["dims"]["n_audio_ctx"] == 1500


def test_alignments_fit_texts_and_audio():
    alignments = read_alignments(micro.SPEECH / "alignments.jsonl")
    clips = benchmark.read_clips(micro.SPEECH)
    assert alignments.keys() == {clip.path.relative_to(micro.SPEECH).as_posix() for clip in clips}
    speakers = [{clip.speaker for clip in clips if clip.path.parent.name == split} for split in ("train", "test")]
    assert all(speakers) and not speakers[0] & speakers[1]
    for clip in clips:
        assert [word for _, _, label in clip.alignment.words for word in benchmark.words(label)] == benchmark.words(clip.text)
        end = soundfile.info(str(clip.path)).duration
        for segments in clip.alignment:
            bounds = np.array([segment[:2] for segment in segments])
            assert (bounds[:, 0] < bounds[:, 1]).all() and (bounds[1:, 0] >= bounds[:-1, 1] - 1e-6).all()
            assert bounds[0, 0] >= 0 and bounds[-1, 1] <= end + 0.01


def test_stock_whisper_understands_micros_speech(clips, texts):
    errors = benchmark.word_errors([clip.text for clip in clips], texts)
    assert errors.wer < 0.04
    exact = np.mean([clip.text == text for clip, text in zip(clips, texts, strict=True)])
    assert exact > 0.75  # with case and punctuation


def test_stock_transcribe_works_with_timestamps(model, clips):
    chosen = clips[:: CLIPS // 10]
    # Given a path, Whisper would start ffmpeg.
    results = [model.transcribe(soundfile.read(clip.path, dtype="float32")[0], fp16=False) for clip in chosen]
    errors = benchmark.word_errors([clip.text for clip in chosen], [result["text"] for result in results])
    assert errors.wer < 0.2
    late = [result["segments"][0]["start"] - clip.alignment.words[0].start_s for clip, result in zip(chosen, results, strict=True)]
    early = [clip.alignment.words[-1].end_s - result["segments"][-1]["end"] for clip, result in zip(chosen, results, strict=True)]
    assert np.median(np.abs(late)) < 0.3
    assert np.median(np.abs(early)) < 0.6


@pytest.mark.slow
def test_a_chopped_word_goes_and_the_others_stay():
    found = chop_words(Speech(micro.NAME, limit=CLIPS // 2), micro.NAME, margin=MARGIN, trials=TRIALS, device="cpu").summary
    assert found["trials"] == TRIALS < found["words_found"]
    assert found["word_gone"] >= WORD_GONE
    assert found["others_kept"] >= OTHERS_KEPT
    assert found["deleted"] >= NOTHING_IN_ITS_PLACE
    assert found["control"]["word_gone"] <= GONE_ELSEWHERE


def test_chopping_nothing_changes_nothing(model, encoded, texts):
    padding = padding_output(model)
    assert transcribe_encoded(model, [chop(one, 40, 40, padding) for one in encoded[:16]]) == texts[:16]


def test_a_narrower_window_is_worse_step_by_step(model, clips):
    windows = (1500, 100, 35, 10)
    errors = {k: benchmark.window_errors(model, clips[:: CLIPS // WINDOW_CLIPS], k).wer for k in windows}
    steps = np.diff([errors[k] for k in windows])
    assert errors[1500] < 0.1
    assert errors[10] > errors[1500] + 0.15
    assert steps.min() > -0.05, errors
    assert steps.max() < 0.4, errors


def test_a_window_of_all_positions_is_no_change(model, clips, encoded):
    with limit_attention(model, 1500):
        assert torch.equal(benchmark.encode(model, clips[:2]), encoded[:2])


def test_hearing_nothing_the_decoder_goes_on_with_its_bigrams(model):
    padding = padding_output(model)
    for prompt, expected in ((" traffic", {" lights"}), (" New", {" York"}), (" Good", {" morning", " night"}), (" Thank", {" you"})):
        best = next_tokens(model, prompt, len(expected), padding)
        assert {token.text for token in best} == expected
        assert sum(token.probability for token in best) > 0.8


def test_cross_attention_knows_when_words_begin(clips):
    model = whisper.load_model(str(micro.MODEL), device="cpu")  # its alignment head is set
    late = benchmark.word_start_errors(model, clips[:5])
    assert len(late) > 20
    assert np.median(np.abs(late)) < 0.04


def test_neurons_follow_phones_and_those_of_random_weights_do_not(tmp_path):
    twin = benchmark.save_encoder(benchmark.random_twin(micro.MODEL), tmp_path / "random.pt")
    alignments = read_alignments(micro.SPEECH / "alignments.jsonl")
    found = []
    for path in (micro.MODEL, twin):
        store = benchmark.capture_store(path, micro.SPEECH, "test", tmp_path / f"{path.stem}.zarr")
        found.append(benchmark.detectors(store, f"neurons:{benchmark.NEURONS}", alignments))
    trained, random = found
    assert trained.above_90 >= 40 and trained.phones >= 12, found
    assert random.above_90 <= 4, found
    assert trained.median > random.median + 0.1, found
