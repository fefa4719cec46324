"""`hearsae experiment post`: the whole of the post in one report, on micro and on an encoder alone."""

import json

import pytest

from cluster.cli import main

SECTIONS = ["attention", "window", "chop", "neurons", "latents", "polysemantic", "bigrams", "neighbours", "words"]
SMALL = ["--split", "test", "--limit", "16", "--rows", "50000", "--attention-clips", "2", "--trials", "10", "--no-ray"]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    out = tmp_path_factory.mktemp("post") / "report"
    assert main(["experiment", "post", *SMALL, "--out", str(out)]) == 0
    return out


@pytest.mark.slow
def test_every_section_of_the_post_is_in_the_report(report):
    page = (report / "index.html").read_text()
    for name in SECTIONS:
        assert f"{name}/rows.parquet" in page
        assert "control" in json.dumps(json.loads((report / name / "result.json").read_text())["summary"])
    for file in {part.split('"')[0] for part in page.split('src="')[1:]}:
        assert (report / file).is_file()
    assert (report / "explorer" / "index.html").is_file()


@pytest.mark.slow
def test_it_goes_on_where_it_was_left(report, succeeds):
    (report / "window" / "section.html").unlink()
    kept = (report / "chop" / "rows.parquet").stat().st_mtime_ns
    again = succeeds("experiment", "post", *SMALL, "--out", report)
    assert (list(again["summary"]), again["not_run"]) == (SECTIONS, {})
    assert (report / "chop" / "rows.parquet").stat().st_mtime_ns == kept
    assert (report / "window" / "section.html").is_file()


@pytest.mark.slow
def test_another_experiment_does_not_mix_with_it(report, refused):
    assert "made with --rows 50000" in refused("experiment", "post", *SMALL, "--rows", "60000", "--out", report)


@pytest.mark.slow
def test_of_an_encoder_alone_it_shows_what_there_is(succeeds, tiny_whisper, tmp_path):
    encoder = tiny_whisper(tmp_path / "encoder.pt", encoder_only=True, n_audio_layer=3)
    result = succeeds("experiment", "post", *SMALL, "--limit", "4", "--model", encoder, "--out", tmp_path / "report")
    assert set(result["summary"]) == {"attention", "neurons", "latents", "polysemantic"}
    assert all("encoder without a decoder" in reason for reason in result["not_run"].values())
    assert "encoder without a decoder" in (tmp_path / "report" / "index.html").read_text()
