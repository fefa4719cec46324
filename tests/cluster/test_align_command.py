"""`hearsae align` on a store of the embedded speech."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from cache.store import ActivationStore
from cache.timings import FILES, RECORD, has_timings, read_timings
from cluster.cli import main

CLIPS = 12


def capture(out, *more, dataset="micro"):
    arguments = ["cache", "--dataset", str(dataset), "--model", "micro", "--sites", "encoder.blocks.0", "--out", str(out), "--no-ray", *more]
    assert main([*arguments, "--chunk-rows", "64"]) == 0
    return out


@pytest.fixture(scope="module")
def captured(tmp_path_factory):
    return capture(tmp_path_factory.mktemp("align") / "acts.zarr", "--limit", str(CLIPS), "--shard-rows", "512")


@pytest.fixture
def store(captured, tmp_path) -> Path:
    return Path(shutil.copytree(captured, tmp_path / "acts.zarr"))


def spoken(store):
    """The bytes of a store's times."""
    return [(store / name).read_bytes() for name in FILES]


def test_every_clip_is_aligned_close_to_the_times_that_are_known(store, succeeds):
    said = succeeds("align", "--store", store, "--no-ray")
    assert (said["method"], said["clips"], said["aligned"], said["failed"]) == ("pocketsphinx", CLIPS, CLIPS, 0)
    found = read_timings(ActivationStore.open(store))
    succeeds("align", "--store", store, "--import", "micro", "--again", "--no-ray")
    known = read_timings(ActivationStore.open(store))
    assert found.words["label"].to_pylist() == known.words["label"].to_pylist()
    assert np.median(np.abs(found.words["start_s"].to_numpy() - known.words["start_s"].to_numpy())) < 0.04
    assert known.info["method"] == "micro"
    assert known.info["phone_set"] == found.info["phone_set"] == "arpabet"


def test_the_summary_says_how_many_and_what_failed(store, capsys):
    assert main(["align", "--store", str(store), "--import", "micro"]) == 0
    assert f"{CLIPS} of {CLIPS} clips have times" in capsys.readouterr().out


def test_the_same_bytes_come_from_any_grouping_of_clips(store, succeeds, tmp_path):
    succeeds("align", "--store", store, "--no-ray")
    other = capture(tmp_path / "other.zarr", "--limit", str(CLIPS), "--shard-rows", "4096")
    assert len(list(other.glob("commits/*/*"))) < len(list(store.glob("commits/*/*")))
    succeeds("align", "--store", other, "--no-ray")
    assert spoken(other) == spoken(store)


@pytest.mark.cluster
@pytest.mark.slow
def test_the_same_bytes_come_from_ray(store, succeeds, tmp_path):
    on_ray = Path(shutil.copytree(store, tmp_path / "ray.zarr"))
    succeeds("align", "--store", store, "--no-ray")
    assert main(["align", "--store", str(on_ray), "--workers", "2"]) == 0
    assert [(on_ray / name).read_bytes() for name in (*FILES, RECORD)] == [(store / name).read_bytes() for name in (*FILES, RECORD)]


def test_times_are_replaced_only_when_asked(store, succeeds, refused):
    succeeds("align", "--store", store, "--import", "micro")
    before = spoken(store)
    assert "--again" in refused("align", "--store", store, "--no-ray")
    assert spoken(store) == before


def test_a_bad_file_leaves_the_times_that_were_there(store, succeeds, refused, tmp_path):
    succeeds("align", "--store", store, "--import", "micro")
    before = spoken(store)
    (tmp_path / "bad.ctm").write_text("a 1 0 -3 x\n")
    assert "bad.ctm:1" in refused("align", "--store", store, "--again", "--import", tmp_path / "bad.ctm")
    assert spoken(store) == before


@pytest.mark.parametrize("had_times", [False, True])
def test_an_interrupted_run_leaves_what_was_there(store, succeeds, had_times):
    if had_times:
        succeeds("align", "--store", store, "--import", "micro")
        before = spoken(store)
    code = "import sys; from cluster.cli import main; sys.exit(main())"
    arguments = [sys.executable, "-c", code, "align", "--store", str(store), "--no-ray", "--again"]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while "sendump" not in Path(f"/proc/{process.pid}/maps").read_text():  # PocketSphinx's model: it has begun
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert "interrupted" in err
    assert has_timings(ActivationStore.open(store)) == had_times
    if had_times:
        assert spoken(store) == before


def test_what_is_exported_comes_back(store, succeeds, refused, tmp_path):
    made = succeeds("align", "--store", store, "--import", "micro", "--export", tmp_path / "grids")
    assert made["sources"] == CLIPS
    before = spoken(store)
    assert "not empty" in refused("align", "--store", store, "--export", tmp_path / "grids")
    assert "clips" not in succeeds("align", "--store", store, "--export", tmp_path / "ctm", "--format", "ctm")
    back = succeeds("align", "--store", store, "--again", "--import", tmp_path / "ctm" / "words.ctm", tmp_path / "ctm" / "phones.ctm")
    assert (back["method"], back["unmatched"], back["failed"]) == ("ctm", 0, 0)
    assert spoken(store)[0] == before[0]


HOSTILE = {
    "control": "one \x00two\x1b[31m three",
    "long": "word " * 20000,
    "foreign": "привет мир",
    "empty": "...",
    "letters": "a" * 3000,
    "quotes": "' '' ''' '",
    "option": "-hmm /etc/passwd </s> <s> <sil> [NOISE]",
    "fine": "hello",
}


def test_no_transcript_stops_the_others(tmp_path, succeeds):
    speech = tmp_path / "speech"
    speech.mkdir()
    for name in HOSTILE:
        soundfile.write(speech / f"{name}.wav", 0.1 * np.random.default_rng(0).standard_normal(16000), 16000)
    rows = [json.dumps({"file_name": f"{name}.wav", "text": text}) for name, text in HOSTILE.items()]
    (speech / "metadata.jsonl").write_text("\n".join(rows))
    store = capture(tmp_path / "acts.zarr", dataset=speech)
    begin = time.perf_counter()
    said = succeeds("align", "--store", store, "--no-ray")
    assert time.perf_counter() - begin < 10
    timings = read_timings(ActivationStore.open(store))
    sources = ActivationStore.open(store).clips["source"].to_pylist()
    reasons = {Path(sources[row["clip"]]).stem: row["reason"] for row in timings.unaligned.to_pylist()}
    assert said["failed"] == len(reasons)
    assert {"long", "foreign", "empty", "letters", "quotes"} <= reasons.keys()
    assert "fine" not in reasons
    assert "too long" in reasons["long"]
    assert all(reason.isprintable() for reason in reasons.values())
