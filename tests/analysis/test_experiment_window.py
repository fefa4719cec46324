"""`hearsae experiment window` on micro, whose transcripts are right when nothing is limited."""

import json

import pyarrow.parquet as pq
import pytest


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    from cluster.cli import main

    out = tmp_path_factory.mktemp("window") / "report"
    speech = ["--split", "test", "--limit", "10", "--no-ray"]
    assert main(["experiment", "window", *speech, "--k", "1500", "50", "10", "--by-block", "--out", str(out)]) == 0
    return json.loads((out / "result.json").read_text())["summary"], pq.read_table(out / "rows.parquet").to_pylist()


def test_a_window_of_all_positions_is_exactly_the_model_as_it_is(done):
    summary, rows = done
    assert summary["by_k"]["1500"] == summary["unlimited"]
    whole = [row for row in rows if row["k"] == 1500]
    assert len(whole) == 10 * 5
    assert all(row["after"] == row["before"] for row in whole)


def test_the_narrower_the_worse_down_to_what_is_not_understood(done):
    by_k = done[0]["by_k"]
    assert by_k["1500"]["wer"] < 0.05
    assert by_k["1500"]["wer"] <= by_k["50"]["wer"] + 0.01
    assert by_k["10"]["wer"] > by_k["50"]["wer"] + 0.1
    assert done[0]["control"]["wer"] > by_k["10"]["wer"] + 0.2


def test_one_block_alone_does_less_harm_than_all(done):
    summary, _ = done
    assert set(summary["by_block"]["10"]) == {"0", "1", "2", "3"}
    assert max(one["wer"] for one in summary["by_block"]["10"].values()) < summary["by_k"]["10"]["wer"]


def test_a_single_file_is_enough(succeeds, tmp_path):
    from cache import micro

    file = sorted((micro.SPEECH / "test").glob("*.flac"))[0]
    result = succeeds("experiment", "window", "--dataset", file, "--k", "1500", "--out", tmp_path / "report")
    assert [row["source"] for row in result["rows"]] == [file.name]
    assert result["rows"][0]["text"] and result["summary"]["control"] is None


def test_a_clip_that_cannot_be_decoded_is_left_out_and_named(succeeds, tmp_path):
    from cache import micro

    files = sorted((micro.SPEECH / "test").glob("*.flac"))[:3]
    lines = [json.dumps({"file_name": file.name, "text": "words"}) + "\n" for file in files]
    (tmp_path / "speech").mkdir()
    (tmp_path / "speech" / "metadata.jsonl").write_text("".join(lines))
    for file in files:
        data = file.read_bytes()
        (tmp_path / "speech" / file.name).write_bytes(data if file != files[1] else data[: len(data) // 2])
    result = succeeds("experiment", "window", "--dataset", tmp_path / "speech", "--k", "1500", "--no-ray", "--out", tmp_path / "report")
    assert [row["source"] for row in result["rows"]] == [files[0].name, files[2].name]
    assert len(result["skipped"]) == 1 and files[1].name in result["skipped"][0]


def test_what_cannot_be_done_is_refused_before_there_is_work(refused, tiny_whisper, tmp_path):
    encoder = tiny_whisper(tmp_path / "encoder.pt", encoder_only=True)
    assert "encoder without a decoder" in refused("experiment", "window", "--model", encoder, "--out", tmp_path / "a")
    assert "no encoder block 9" in refused("experiment", "window", "--blocks", "9", "--out", tmp_path / "a")
    assert "at least 0" in refused("experiment", "window", "--k", "-1", "--out", tmp_path / "a")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    assert "holds other things" in refused("experiment", "window", "--out", tmp_path / "mine")
    assert not (tmp_path / "a").exists()
