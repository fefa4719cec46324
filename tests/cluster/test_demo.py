"""The demo: one command, no network, a page at the end."""

import json
from pathlib import Path

import pytest

from cluster.cli import main


@pytest.mark.slow
def test_the_demo_ends_with_a_page(tmp_path, capsys):
    assert main(["demo", "--no-ray", "--rows", "200000", "--out", str(tmp_path / "demo"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    page = Path(said["page"])
    assert page == tmp_path / "demo" / "page" / "index.html" and page.is_file()
    assert said["features"] == 384 + 768
    assert 0 < said["fvu"] < 0.2 and 16 < said["l0"] < 48 and said["dead_fraction"] < 0.1


def test_the_demo_says_what_is_not_there(tmp_path, capsys, tiny_whisper):
    model = tiny_whisper(tmp_path / "tiny.pt", n_audio_layer=3)
    assert main(["demo", "--no-ray", "--model", str(model), "--dataset", "/nonexistent", "--out", str(tmp_path / "demo")]) == 1
    assert "there is no dataset at /nonexistent" in capsys.readouterr().err
