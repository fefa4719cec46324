"""What every experiment leaves behind, and how its errors are counted."""

import json

import pyarrow.parquet as pq
import pytest

from analysis.experiments.errors import text_errors
from analysis.experiments.report import Report, write_report
from analysis.pictures import new_figure
from cache.errors import HearsaeError


def a_report(text="plain", wer=0.5):
    figure = new_figure(2, 1)
    figure.subplots().plot([0, 1])
    rows = [{"clip": 0, "before": text, "after": None}]
    return Report("A title", "What.", rows, {"wer": wer}, {"curve": figure}, {"curve": "A curve."}, {"Rows": rows}, {"a.wav": b"RIFF"})


def test_a_report_is_rows_numbers_pictures_and_a_page(tmp_path):
    page = write_report(a_report(), tmp_path / "report", {"k": 3})
    assert sorted(file.name for file in page.parent.iterdir()) == ["a.wav", "curve.png", "curve.svg", "index.html", "result.json", "rows.parquet"]
    record = json.loads((page.parent / "result.json").read_text())
    assert (record["summary"], record["settings"]) == ({"wer": 0.5}, {"k": 3})
    assert pq.read_table(page.parent / "rows.parquet").to_pylist() == [{"clip": 0, "before": "plain", "after": None}]
    assert all(name in page.read_text() for name in ("curve.png", "a.wav", "A curve."))


def test_no_text_of_the_data_becomes_markup(tmp_path):
    page = write_report(a_report("<script>alert(1)</script>"), tmp_path / "report", {}).read_text()
    assert "<script" not in page and "&lt;script&gt;" in page


def test_a_report_replaces_an_earlier_one_and_nothing_else(tmp_path):
    out = tmp_path / "report"
    write_report(a_report(wer=0.1), out, {})
    write_report(a_report(wer=0.2), out, {})
    assert json.loads((out / "result.json").read_text())["summary"] == {"wer": 0.2}
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "result.json").write_text('{"of": "something else"}')
    with pytest.raises(HearsaeError, match="holds other things"):
        write_report(a_report(), mine, {})
    assert [file.name for file in mine.iterdir()] == ["result.json"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["mine", "report"]


def test_errors_are_summed_over_a_set_and_case_and_punctuation_do_not_count():
    errors = text_errors(["The cat sat.", "RED FISH", ""], ["the cat sat", "red dog house", "thank you"])
    assert (errors.words, errors.substitutions, errors.deletions, errors.insertions) == (5, 1, 0, 3)
    assert errors.wer == 4 / 5
    assert text_errors(["abc"], ["abd"]).cer == 1 / 3
    assert text_errors([], []).wer is None
