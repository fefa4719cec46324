"""`hearsae experiment chop` on micro: whose words sit in their own frames, and whose speech has exact times."""

import json
import shutil

import numpy as np
import pytest
from conftest import nearly

from analysis.experiments.bootstrap import ratio_interval
from analysis.experiments.chop import Cut, drawn, elsewhere, find_trials, outcome, rates
from analysis.experiments.chop_report import by_word_report
from analysis.experiments.report import write_report
from analysis.interventions import word_frames
from cache import micro

WORD_GONE, OTHERS_KEPT, CONTROL_GONE = 0.8, 0.9, 0.3


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    from cluster.cli import main

    out = tmp_path_factory.mktemp("chop") / "report"
    assert main(["experiment", "chop", "--split", "test", "--limit", "12", "--margins", "0", "--no-ray", "--out", str(out)]) == 0
    import pyarrow.parquet as pq

    return json.loads((out / "result.json").read_text())["summary"], pq.read_table(out / "rows.parquet").to_pylist()


def test_a_chopped_word_goes_and_the_others_stay(done):
    summary, rows = done
    assert summary["trials"] > 40
    assert summary["word_gone"] >= WORD_GONE
    assert summary["others_kept"] >= OTHERS_KEPT
    assert summary["deleted"] + summary["replaced"] <= 1
    low, high = summary["intervals"]["others_kept"]
    assert low <= summary["others_kept"] <= high
    for row in rows:
        assert row["gone"] == (row["word"] not in row["after"].lower().replace(",", "").replace(".", "").replace("?", "").split())


def test_elsewhere_chopped_the_word_stays(done):
    summary, rows = done
    assert summary["control"]["word_gone"] <= CONTROL_GONE
    for row in rows:
        if row["control_frames"]:
            (a, b), (c, d) = row["frames"], row["control_frames"]
            assert b - a == d - c
            assert d <= a or c >= b


def test_a_margin_widens_the_cut_on_both_sides(done):
    _, rows = done
    wide, narrow = ({(row["clip"], row["word"]): row["frames"] for row in rows if row["margin"] == margin} for margin in (2, 0))
    assert wide.keys() == narrow.keys()
    assert all(wide[key] == [max(0, a - 2), b + 2] for key, (a, b) in narrow.items())
    assert done[0]["by_margin"].keys() == {"0", "2"}


@pytest.mark.parametrize(("by", "at"), [("frame", "40"), ("time", "0.51")])
def test_an_empty_range_changes_no_transcript(succeeds, tmp_path, by, at):
    result = succeeds(
        "experiment", "chop", "--split", "test", "--limit", "8", "--by", by, "--start", at, "--end", at, "--no-ray", "--out", tmp_path / "report"
    )
    assert len(result["rows"]) == 8
    assert all(row["after"] == row["before"] != "" for row in result["rows"])
    assert all(row["frames"][0] == row["frames"][1] for row in result["rows"])
    assert result["summary"]["changed"] == 0 and result["summary"]["words_kept"] == 1


def test_without_all_frames_nothing_is_left_and_without_those_of_no_sound_everything(succeeds, tmp_path):
    common = ("experiment", "chop", "--split", "test", "--limit", "8", "--no-ray", "--out", tmp_path / "report")
    assert succeeds(*common, "--by", "frame", "--start", "0", "--end", "1500")["summary"]["words_kept"] < 0.2
    beyond = succeeds(*common, "--by", "time", "--start", "20", "--end", "30")
    assert beyond["summary"]["clips_reached"] == 0
    assert beyond["summary"]["words_kept"] == 1
    assert beyond["rows"][0]["frames"] == [1000, 1500]


def test_larger_and_multilingual_models_are_chopped_too(succeeds, tiny_whisper, tmp_path):
    model = tiny_whisper(tmp_path / "large.pt", n_mels=128, n_vocab=51866, n_audio_state=48, n_text_state=48, n_audio_head=3, n_text_head=3)
    arguments = ("--by", "time", "--start", "0.2", "--end", "0.6", "--language", "de", "--no-ray", "--out", tmp_path / "report")
    result = succeeds("experiment", "chop", "--model", model, "--split", "test", "--limit", "2", *arguments)
    assert [row["frames"] for row in result["rows"]] == [[10, 30]] * 2


@pytest.mark.cluster
@pytest.mark.slow
def test_on_ray_the_rows_are_the_same(succeeds, tmp_path):
    arguments = ("experiment", "chop", "--split", "test", "--limit", "20", "--trials", "20", "--out", tmp_path / "report")
    here, there = succeeds(*arguments, "--no-ray"), succeeds(*arguments, "--workers", "2")
    assert len(here["rows"]) == 20
    assert here["rows"] == nearly(there["rows"]) and here["summary"] == nearly(there["summary"])


# Where times come from


@pytest.fixture(scope="module")
def truth():
    """micro's first clips of `test`, with their words."""
    lines = map(json.loads, (micro.SPEECH / "alignments.jsonl").read_text().splitlines())
    return {line["file_name"]: line for line in lines if line["file_name"] in ("test/0001.flac", "test/0002.flac")}


def trials(result):
    return {(row["source"].split("/")[-1], row["word"], round(row["start_s"], 3), tuple(row["frames"])) for row in result["rows"]}


def test_times_come_from_files_a_store_or_a_manifest_too(succeeds, refused, tmp_path, truth):
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in truth:
        shutil.copy(micro.SPEECH / name, folder)
    arguments = ("--no-ray", "--out", tmp_path / "report")
    expected = {one for one in trials(succeeds("experiment", "chop", "--split", "test", "--limit", "3", *arguments)) if one[0] != "0000.flac"}
    assert len(expected) > 5

    assert "'hearsae align'" in (said := refused("experiment", "chop", "--dataset", folder, *arguments))
    assert "--times" in said and "'hearsae transcribe'" in said and "--store" in said

    times = tmp_path / "times.jsonl"
    times.write_text("".join(json.dumps({**line, "file_name": name.split("/")[-1]}) + "\n" for name, line in truth.items()))
    assert trials(succeeds("experiment", "chop", "--dataset", folder, "--times", times, *arguments)) == expected

    manifest = tmp_path / "manifest.jsonl"
    for of_word in (list, lambda word: dict(zip(("start_s", "end_s", "word"), word, strict=True))):
        rows = [{"audio": str(micro.SPEECH / name), "words": [of_word(word) for word in line["words"]]} for name, line in truth.items()]
        manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert trials(succeeds("experiment", "chop", "--dataset", manifest, *arguments)) == expected
    captured = tmp_path / "captured.zarr"
    succeeds("cache", "--dataset", manifest, "--model", "micro", "--sites", "encoder.blocks.0", "--out", captured, "--no-ray")
    assert trials(succeeds("experiment", "chop", "--store", captured, *arguments)) == expected

    store = tmp_path / "acts.zarr"
    succeeds("cache", "--dataset", folder, "--model", "micro", "--sites", "encoder.blocks.0", "--out", store, "--no-ray")
    assert "'hearsae align" in refused("experiment", "chop", "--store", store, *arguments)
    succeeds("align", "--store", store, "--import", times, "--no-ray")
    assert trials(succeeds("experiment", "chop", "--store", store, *arguments)) == expected


def test_times_are_of_the_file_though_the_clip_begins_later(succeeds, tmp_path, truth):
    words = truth["test/0002.flac"]["words"]
    manifest = tmp_path / "late.jsonl"
    manifest.write_text(json.dumps({"audio": str(micro.SPEECH / "test/0002.flac"), "offset": 0.1, "words": words}) + "\n")
    rows = succeeds("experiment", "chop", "--dataset", manifest, "--no-ray", "--out", tmp_path / "report")["rows"]
    assert len(rows) > 2
    for row in rows:
        start, end = next((start, end) for start, end, label in words if label.lower().strip(",.?") == row["word"])
        assert row["frames"] == list(word_frames(max(0.1, start) - 0.1, end - 0.1, 2))


@pytest.mark.slow
def test_the_times_that_transcribe_finds_are_good_enough(succeeds, tmp_path):
    manifest = tmp_path / "heard.jsonl"
    succeeds("transcribe", "--dataset", "micro", "--split", "test", "--limit", "12", "--model", "micro", "--out", manifest, "--no-ray")
    summary = succeeds("experiment", "chop", "--dataset", manifest, "--no-ray", "--out", tmp_path / "chop")["summary"]
    assert summary["trials"] > 30
    assert summary["word_gone"] > 0.65 and summary["others_kept"] > 0.9
    assert summary["control"]["word_gone"] < 0.2


# Which words


def test_only_words_that_can_be_looked_for_are_trials():
    times = [[(0.0, 0.5, "Hot"), (0.5, 1.0, "hot"), (1.0, 1.5, "soup,"), (1.5, 1.59, "with"), (1.6, 2, "an"), (2, 2.5, "onion"), (2.5, 3, "pie")]]
    found = find_trials(["Hot hot soup with an onion bun."], times)
    assert [trial.word for trial in found] == ["soup", "onion"]  # twice, twice; too short in time; two letters; not written
    assert find_trials(["Hot hot soup with an onion bun."], times, "onion") == found[1:]
    assert find_trials(["Soup onion"], times) == []  # too few words


def test_what_became_of_a_transcript():
    assert outcome("soup", "Hot soup, and bread.", "hot and bread") == (True, 1.0, True, False)
    assert outcome("soup", "Hot soup, and bread.", "Hot soap and bread.") == (True, 1.0, False, True)
    assert outcome("soup", "Hot soup and bread.", "Hot soup.") == (False, 1 / 3, False, False)
    assert outcome("soup", "Hot soup and bread.", "bread and hot") == (True, 1.0, False, False)


def test_where_no_word_went_and_no_control_fitted_the_report_says_so(tmp_path):
    common = {"start_s": 0.0, "end_s": 0.5, "margin": 2, "frames": [0, 25], "others_kept": 1.0, "gone": False, "deleted": False, "replaced": False}
    without = dict.fromkeys(("control_frames", "control_after", "control_gone", "control_others_kept"))
    texts = {"source": "a.wav", "word": "soup", "before": "hot soup now", "after": "hot soup now"}
    rows = [{"clip": clip, **common, **texts, **without} for clip in (0, 0, 1)]
    found = rates(rows)
    assert (found["trials"], found["word_gone"], found["deleted"], found["control"]["trials"], found["control"]["word_gone"]) == (3, 0, None, 0, None)
    report = by_word_report(rows, {**found, "margin": 2, "clips": 2, "words_found": 3, "by_margin": {"0": found, "2": found}})
    write_report(report, tmp_path / "report", {})
    assert any("gone: 0.0%" in line for line in report.lines)


def test_trials_are_drawn_with_a_seed():
    every = find_trials(["one two three four five six seven eight nine ten"], [[(i, i + 0.5, w) for i, w in enumerate("one two three four".split())]])
    assert len(every) == 4 == len(drawn(every, 9, 0))
    first = drawn(every, 2, 0)
    assert first == drawn(every, 2, 0) == sorted(first, key=lambda trial: trial.start_s)
    assert len({tuple(drawn(every, 2, seed)) for seed in range(20)}) > 3


def test_a_place_elsewhere_shares_no_frame_and_may_be_any_that_fits():
    generator = np.random.Generator(np.random.PCG64(0))
    places = {elsewhere(Cut(0, 4, 7), 12, generator) for _ in range(200)}
    assert places == {Cut(0, 0, 3), Cut(0, 1, 4), Cut(0, 7, 10), Cut(0, 8, 11), Cut(0, 9, 12)}
    assert elsewhere(Cut(0, 2, 8), 9, generator) is None


def test_an_interval_of_a_rate_is_as_wide_as_its_units_differ():
    heads = np.array([1, 0] * 50, float)
    low, high = ratio_interval(heads, np.ones(100))
    assert low == pytest.approx(0.5 - 1.96 * 0.05, abs=0.02) and high == pytest.approx(0.5 + 1.96 * 0.05, abs=0.02)
    assert ratio_interval(heads, 2 * heads) == (0.5, 0.5)
    assert ratio_interval(heads, np.zeros(100)) is None


# Refusals


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--by", "time", "--start", "0.5"], "needs --start and --end"),
        (["--by", "time", "--start", "2", "--end", "1"], "no range of the model's window"),
        (["--by", "frame", "--start", "1400", "--end", "1501"], "frames 0 to 1500"),
        (["--by", "time", "--start", "31", "--end", "32"], "seconds 0 to 30"),
        (["--by", "time", "--start", "0", "--end", "31"], "seconds 0 to 30"),
        (["--by", "frame", "--start", "nan", "--end", "3"], "no range"),
        (["--by", "time", "--start", "0", "--end", "inf"], "no range"),
        (["--by", "time", "--start", "0", "--end", "1", "--seed", "-1"], "can't be negative"),
        (["--by", "frame", "--start", "1.5", "--end", "3"], "whole numbers"),
        (["--by", "frame", "--start", "1", "--end", "3", "--word", "hot"], "belong to --by word"),
        (["--start", "1", "--end", "3"], "belong to --by time"),
        (["--margin", "-1"], "can't be negative"),
        (["--trials", "0"], "at least 1"),
        (["--word", "xylophone"], "'xylophone' is not among the words"),
        (["--language", "klingon"], "does not know the language 'klingon'"),
        (["--times", "nowhere.ctm"], "nowhere.ctm"),
    ],
)
def test_what_cannot_be_chopped_is_refused(refused, tmp_path, arguments, reason):
    assert reason in refused("experiment", "chop", "--no-ray", "--out", tmp_path / "a", *arguments)
    assert not (tmp_path / "a").exists()


def test_an_encoder_alone_and_words_of_no_clip_are_refused(refused, tiny_whisper, tmp_path):
    encoder = tiny_whisper(tmp_path / "encoder.pt", encoder_only=True)
    assert "encoder without a decoder" in refused("experiment", "chop", "--model", encoder, "--out", tmp_path / "a")
    (tmp_path / "other.ctm").write_text("another 1 0.5 0.5 word\n")
    assert "are of no clip" in refused("experiment", "chop", "--times", tmp_path / "other.ctm", "--out", tmp_path / "a")
    (tmp_path / "bad.jsonl").write_text(json.dumps({"audio": str(micro.SPEECH / "test/0001.flac"), "words": [[2, 1, "back"]]}) + "\n")
    assert "runs backwards" in refused("experiment", "chop", "--dataset", tmp_path / "bad.jsonl", "--out", tmp_path / "a")
