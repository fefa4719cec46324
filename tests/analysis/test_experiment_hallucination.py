"""`hearsae experiment hallucination`: what is chosen is chosen on one half and within the budget; micro's false detections are what they are."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
import whisper

from analysis.experiments.hallucination import at_random, best_of, candidates, hallucination, of_vector, rank_features
from analysis.experiments.hallucination_report import Candidate
from analysis.experiments.speech import Speech, worker_model
from analysis.hearing import Rule, Sounds, Steer, hear, means
from analysis.nonspeech import make_sound
from analysis.steering import Edit, open_steerable, steering
from cache.errors import HearsaeError
from cache.model import fast_matmul, log_mel
from cache.plan import SAMPLES_PER_FRAME
from cluster.cli import main

SITE = "encoder.blocks.2"
NEURONS = f"neurons:{SITE}"
RULE = Rule(0.9998, 0.0)
"""Nearly all that micro gives noise: so some brown noise is a false detection, and a small push decides."""


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    out = tmp_path_factory.mktemp("hallucination") / "report"
    how = [
        "--features",
        NEURONS,
        "--n",
        "20",
        "--add",
        "0",
        "0.25",
        "--scale",
        "1",
        "--no-speech",
        "0.9998",
        "--logprob",
        "0",
        "--wer-budget",
        "0.05",
    ]
    arguments = ["--split", "test", "--limit", "12", "--kinds", "brown", "white", "--per-kind", "12", *how, "--no-ray", "--out", str(out)]
    assert main(["experiment", "hallucination", *arguments]) == 0
    summary = json.loads((out / "result.json").read_text())["summary"]
    return summary, pq.read_table(out / "rows.parquet").to_pylist(), out


def of(summary, **wanted):
    return [one for one in summary["training"]["candidates"] if all(one[key] == value for key, value in wanted.items())]


def test_edits_that_change_nothing_leave_all_as_it_was(ran):
    summary, _, _ = ran
    nothing = [*of(summary, how="add", amount=0.0), *of(summary, how="scale", amount=1.0)]
    assert len(nothing) == 3  # features and vector; features
    assert {one["false_detections"] for one in nothing} == {summary["training"]["unsteered"]}
    assert {one["wer"] for one in nothing} == {summary["training"]["most_wer"] - 0.05}


def test_what_is_chosen_has_the_fewest_false_detections_within_the_budget(ran):
    summary, _, _ = ran
    for basis in ("features", "vector"):
        within = [one for one in of(summary, basis=basis) if one["wer"] <= summary["training"]["most_wer"]]
        assert summary["chosen"][basis]["false_detections"] == min(one["false_detections"] for one in within)


def test_a_push_towards_what_is_no_speech_makes_micro_surer_that_noise_is_none(ran):
    summary, rows, _ = ran
    assert summary["chosen"]["features"]["amount"] == 0.25
    assert summary["chosen"]["features"]["false_detections"] < summary["training"]["unsteered"]
    brown = [row for row in rows if row["kind"] == "brown" and row["held_out"]]

    def doubt(key):
        return np.median([1 - row[key] for row in brown])

    assert doubt("no_speech_after") < 0.9 * doubt("no_speech_before")


def test_rows_say_what_became_of_each_item_and_what_steering_did_of_the_held_out_half_alone(ran):
    summary, rows, out = ran
    assert len(rows) == 12 + 2 * 12 == sum(sum(half.values()) for half in summary["items"].values())
    assert all((row["after"] is not None) == row["held_out"] for row in rows)
    sounds = [row for row in rows if row["held_out"] and row["kind"] != "speech"]
    assert summary["before"]["false_detections"] == np.mean([not row["is_silent_before"] for row in sounds])
    assert summary["after"]["false_detections"] == np.mean([not row["is_silent_after"] for row in sounds])
    assert summary["control"]["vector"]["false_detections"] == np.mean([not row["is_silent_after_vector"] for row in sounds])
    assert len(summary["control"]["random_draws"]) == 3
    assert {"kinds.png", "candidates.svg", "index.html"} <= {path.name for path in out.iterdir()}
    assert len(list(out.glob("*.flac"))) == 2


@pytest.fixture(scope="module")
def sounds():
    return Sounds(Speech("micro", "test", 24), None, ("silence", "scrambled"), 6, 0)


def test_halves_share_no_speaker_and_no_sound_is_made_of_the_other_halfs_speech(sounds):
    items, clips = sounds.items(), sounds.speech.clips
    halves = [[item for item in items if item.held_out == half] for half in (False, True)]
    assert len(items) == 24 + 12 and all(len(half) > 10 for half in halves)
    speakers = [{clips[item.number].speaker for item in half if item.is_speech} for half in halves]
    assert speakers[0] and speakers[1] and not speakers[0] & speakers[1]
    lengths = [{round(clips[item.number].duration_s * 16000) for item in half if item.is_speech} for half in halves]
    for half, own in zip(halves, lengths, strict=True):
        assert all(len(sounds.audio(item)) in own for item in half if item.kind == "scrambled")


def some_steers():
    edits = tuple(Edit((i,), "add", 0.3 * (-1) ** i) for i in range(0, 96, 3))
    return [Steer("features", NEURONS, "add", 32, 1.0, edits), None]


def test_hearing_steered_from_the_site_on_is_hearing_with_the_whole_encoder_steered(sounds):
    items = [sounds.items()[i] for i in (0, 1, -1)]
    found = hear(sounds, "micro", "cpu", RULE, SITE, 0, some_steers(), items)
    model = worker_model("micro", "cpu")
    steerable = open_steerable(NEURONS, model)
    options = whisper.DecodingOptions(without_timestamps=True, fp16=False, language="en")
    for (steered, plain), item in zip(found, items, strict=True):
        audio = sounds.audio(item)
        mel = log_mel(audio, model)[None]
        with torch.no_grad(), fast_matmul():
            with steering(model.module, steerable, some_steers()[0].edits, [(0, -(-len(audio) // SAMPLES_PER_FRAME))]):
                wanted = model.module.encoder(mel)
            unsteered = model.module.encoder(mel)
        for one, encoded in ((steered, wanted), (plain, unsteered)):
            (twin,) = model.module.decode(encoded, options)
            assert one.text == twin.text
            assert (one.no_speech, one.logprob) == pytest.approx((twin.no_speech_prob, twin.avg_logprob), abs=1e-4)
        assert steered.logprob != plain.logprob


def test_all_neurons_by_their_difference_are_the_vector(sounds):
    items = [sounds.items()[i] for i in (0, 1, -1)]
    values = means(sounds, "micro", "cpu", NEURONS, 0, items)
    difference = values[2].activations - values[0].activations
    np.testing.assert_allclose(values[0].values, values[0].activations, atol=1e-5)
    every = candidates(NEURONS, np.arange(96)[::-1], difference, [96], [0.5], [])
    found = hear(sounds, "micro", "cpu", RULE, SITE, 0, [*every, of_vector(SITE, difference, 0.5)], items)
    for by_features, by_vector in found:
        assert by_features.text == by_vector.text
        assert by_features.no_speech == pytest.approx(by_vector.no_speech, abs=1e-4)


def test_micro_writes_something_for_silence_and_is_too_sure_of_it_for_whispers_own_rule():
    sounds = Sounds(Speech("micro", "test", 4), None, ("silence", "hum"), 2, 0)
    *_, silence, _, hum, _ = (one for (one,) in hear(sounds, "micro", "cpu", Rule(), SITE, 0, [None], sounds.items()))
    assert silence.no_speech > 0.99 and silence.logprob > -1 and not silence.is_silent
    assert Rule(logprob=0.0).is_silent(silence.text, silence.no_speech, silence.logprob)
    assert hum.no_speech < 0.01 and not hum.is_silent


def test_a_transcript_is_silence_without_a_word_or_where_both_thresholds_are_passed():
    rule = Rule()
    assert rule.is_silent("", 0.0, 0.0) and rule.is_silent(" ,.", 0.0, 0.0)
    assert rule.is_silent("it is", 0.7, -1.1)
    assert not rule.is_silent("it is", 0.7, -0.9) and not rule.is_silent("it is", 0.5, -1.1)


def test_features_are_ranked_by_how_well_they_tell_sounds_from_speech():
    random = np.random.default_rng(0)
    speech, noise = random.standard_normal((30, 4)), random.standard_normal((30, 4))
    noise[:, 2] += 5
    noise[:, 1] -= 2
    noise[:, 3] = speech[:, 3] = 0
    ranked = rank_features(noise, speech)
    assert ranked[:2].tolist() == [2, 1] and 3 not in ranked
    added, louder = candidates("x", ranked, noise.mean(0) - speech.mean(0), [2], [0.5], [2.0])
    assert [edit.features for edit in added.edits] == [(2,), (1,)] and added.edits[0].amount > 2 > 0 > added.edits[1].amount
    assert 2 in louder.edits[0].features and 1 not in louder.edits[0].features


def test_the_control_edits_as_many_others_of_like_size_in_the_same_way_or_there_is_none():
    steer = some_steers()[0]
    sizes = np.random.default_rng(0).permutation(np.arange(1.0, 97.0))
    drawn = at_random(steer, sizes, 0)
    old, new = ([feature for edit in one.edits for feature in edit.features] for one in (steer, drawn))
    assert len(set(new)) == len(old) and not set(new) & set(old)
    assert [edit.amount for edit in drawn.edits] == [edit.amount for edit in steer.edits]
    assert np.abs(sizes[new] - sizes[old]).mean() < 16  # a third of what others at random would have
    assert at_random(steer, sizes, 1) != drawn
    assert at_random(steer, np.where(np.arange(96) < 40, sizes, 0), 0) is None


def test_the_best_is_within_the_budget_or_there_is_none():
    a, b, c = (Candidate(some_steers()[0]._replace(n=n), *figures) for n, figures in enumerate([(0.5, 0.1), (0.2, 0.3), (0.5, 0.05)]))
    assert best_of([a, b, c], 0.3) is b
    assert best_of([a, b, c], 0.2) is c
    assert best_of([a, b, c], 0.01) is None


def test_recordings_take_the_place_of_made_sounds(tmp_path):
    (tmp_path / "noise").mkdir()
    for number in range(4):
        soundfile.write(tmp_path / "noise" / f"{number}.wav", make_sound("tones", number, 3).audio, 16000)
    arguments = {"nonspeech": Speech(str(tmp_path / "noise")), "ns": [2], "added": [1.0], "scaled": [], "wer_budget": -1.0}
    report = hallucination(Speech("micro", "test", 4), "micro", NEURONS, **arguments)
    assert report.summary["kinds"] == ["recorded"] and report.summary["items"]["held_out"]["sounds"] == 2
    assert report.summary["chosen"] == {"features": None, "vector": None} and report.summary["after"] is None  # nobody is within that budget
    assert any("nothing that was tried is within the budget" in line for line in report.lines)
    with pytest.raises(HearsaeError, match="at least 2"):
        hallucination(Speech("micro", "test", 4), "micro", NEURONS, nonspeech=Speech(str(tmp_path / "noise" / "0.wav")))


def test_what_cannot_be_done_is_refused_in_a_line(refused, tiny_whisper, tmp_path):
    def says(*arguments, features=NEURONS):
        return refused("experiment", "hallucination", "--split", "test", "--limit", "4", "--features", features, "--no-ray", "--out",
                       tmp_path / "r", *arguments)  # fmt: skip

    encoder = tiny_whisper(tmp_path / "encoder.pt", encoder_only=True)
    assert "needs a whole Whisper" in says("--model", encoder, features="neurons:encoder.blocks.0")
    assert "no kind 'rain'" in says("--kinds", "rain")
    assert "at least 2" in says("--per-kind", "1")
    assert "at least 1" in says("--n", "0")
    assert "not a finite number" in says("--add", "nan")
    assert "site of the decoder" in says(features="neurons:decoder.blocks.0")
    assert "there is nothing to suppress" in says("--kinds", "silence", "--per-kind", "2", "--logprob", "0")
    assert not (tmp_path / "r").exists()
