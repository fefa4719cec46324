"""A hostile user of the command line: one clear line, exit 1, no traceback, and what was committed before stays good."""

import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import soundfile
import torch

from cluster.cli import main

SITE, NEURONS = "encoder.blocks.0", "encoder.blocks.1.mlp.1"
SMALL_SHARDS = ("--shard-rows", "256", "--chunk-rows", "64")
SMALL_SAE = ("--d-sae", "64", "--k", "4", "--rows", "600", "--batch", "100", "--threads", "1")
CLIPS = 10


class Bench(NamedTuple):
    """What the tests start from. Not to be written to: `copy` what is to be damaged."""

    model: Path
    other_model: Path
    speech: Path
    store: Path
    sae: Path
    scan: Path

    def cache(self, out: Path, *more: str, **changed: Any) -> list[str]:
        """Arguments of a capture like that of `store`."""
        given = {"dataset": self.speech, "model": self.model, "sites": SITE, "out": out} | changed
        return ["cache", *(str(part) for name, value in given.items() for part in (f"--{name}", value)), "--no-ray", *SMALL_SHARDS, *more]


@pytest.fixture(scope="module")
def bench(tmp_path_factory, tiny_whisper) -> Bench:
    root = tmp_path_factory.mktemp("bench")
    speech = root / "speech"
    speech.mkdir()
    for i in range(CLIPS):
        soundfile.write(speech / f"s{i}.wav", 0.1 * np.random.default_rng(i).standard_normal(2 * 16000), 16000)
    other = tiny_whisper(root / "other.pt", encoder_only=True, seed=1)
    bench = Bench(tiny_whisper(root / "m.pt", encoder_only=True), other, speech, root / "store", root / "sae", root / "scan")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert main(bench.cache(bench.store, "--sites", SITE, NEURONS)) == 0
    assert main(["train", "--store", str(bench.store), "--site", SITE, "--out", str(bench.sae), *SMALL_SAE]) == 0
    assert main(["scan", "--store", str(bench.store), "--features", f"neurons:{SITE}", "--out", str(bench.scan), "--no-ray"]) == 0
    torch.set_num_threads(threads)
    return bench


def copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def edit_json(path: Path, **changed: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def contents(store: Path) -> dict[str, str]:
    """Path -> hash of everything but the commit records, which hold times."""
    files = (file for file in sorted(store.rglob("*")) if file.is_file() and not {"commits", "runs"} & set(file.parts))
    return {str(file.relative_to(store)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@contextmanager
def disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of that size at `folder`; skips the test where one can't be mounted."""
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


# Usage


@pytest.mark.parametrize(
    "arguments",
    [
        ["cache"],
        ["info"],
        ["cache", "--bogus"],
        ["scan", "--top", "x"],
        ["train", "--arch", "x"],
        ["cache", "--dtype", "int8"],
        ["query", "--kind", "x"],
    ],
)
def test_wrong_usage_exits_with_2(arguments, capfd):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    out, err = capfd.readouterr()
    assert stopped.value.code == 2 and not out and "--help" in err and "Traceback" not in err


def test_an_unknown_command_exits_with_2_and_names_the_known_ones(capfd):
    assert main(["bogus"]) == 2
    assert "there is no command 'bogus'" in capfd.readouterr().err
    assert main([]) == 2


# What to capture


def test_single_bad_files_are_recorded_and_the_rest_is_captured(bench, tmp_path, succeeds):
    sound = copy(bench.speech, tmp_path / "sound")
    (sound / "empty.wav").write_bytes(b"")
    (sound / "text.wav").write_text("no sound\n" * 50)
    wave = np.zeros(16000, np.float32)
    soundfile.write(sound / "nothing.wav", wave[:0], 16000)
    soundfile.write(sound / "eight.wav", np.tile(wave[:, None], 8), 16000)
    soundfile.write(sound / "fast.wav", np.zeros(192000, np.float32), 192000)
    soundfile.write(sound / "slow.wav", wave[:8000], 8000)
    soundfile.write(sound / "line\nbreak ünï 😀.wav", wave, 16000)
    wave[5] = np.nan
    soundfile.write(sound / "nan.wav", wave, 16000, subtype="FLOAT")
    soundfile.write(sound / "cut.flac", np.random.default_rng(0).standard_normal(48000) / 9, 16000)
    (sound / "cut.flac").write_bytes((sound / "cut.flac").read_bytes()[:20000])
    result = succeeds(*bench.cache(tmp_path / "store", dataset=sound))
    assert (result["clips"], result["skipped"], result["frames"]) == (CLIPS + 4, 5, CLIPS * 100 + 4 * 50)
    assert {reason.split(" (row")[0] for reason in result["skipped_reasons"]} == {"empty.wav", "text.wav", "nothing.wav", "nan.wav", "cut.flac"}
    assert succeeds("verify", tmp_path / "store")["ok"]
    assert succeeds("info", tmp_path / "store")["skipped"] == 5


def test_strict_stops_at_the_first_bad_file(bench, tmp_path, refused):
    sound = copy(bench.speech, tmp_path / "sound")
    (sound / "empty.wav").write_bytes(b"")
    assert "empty.wav (row 0): it can't be decoded" in refused(*bench.cache(tmp_path / "store", "--strict", dataset=sound))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"dataset": "/nonexistent"}, "there is no dataset at /nonexistent"),
        ({"dataset": ""}, "--dataset names nothing"),
        ({"sites": "encoder.block.0.mlp1"}, "close to it: encoder.blocks."),
        ({"sites": ""}, "no site matches ''; there are, for example:"),
        ({"sites": "decoder.*"}, "this checkpoint has no decoder"),
        ({"model": "tinyy"}, "there is no model 'tinyy'"),
        ({"device": "tpu"}, "--device tpu is none of"),
        ({"split": "dev"}, "has no split 'dev'"),
        ({"limit": -3}, "--limit -3 must be at least 1"),
        ({"batch": 0}, "--batch 0 must be at least 1"),
        ({"seed": -1}, "--seed -1 is negative"),
        ({"workers": 0}, "--workers 0 must be at least 1"),
        ({"clip-seconds": "nan"}, "--clip-seconds nan is not between"),
        ({"clip-seconds": 31}, "--clip-seconds 31 is not between"),
    ],
)
def test_settings_that_can_not_work_are_refused(bench, tmp_path, refused, changed, words):
    assert words in refused(*bench.cache(tmp_path / "store", **changed))
    assert not list(tmp_path.glob("store/commits/*/*"))


def test_no_sites_and_rows_that_do_not_divide_are_refused(bench, tmp_path, refused):
    assert "--sites names no site" in refused(*bench.cache(tmp_path / "store", "--sites"))
    assert "not a positive multiple" in refused(*bench.cache(tmp_path / "store", "--shard-rows", "100"))
    assert "--chunk-rows 0" in refused(*bench.cache(tmp_path / "store", "--chunk-rows", "0"))


def test_decoder_sites_need_text(bench, tmp_path, refused, tiny_whisper):
    whole = tiny_whisper(tmp_path / "whole.pt")
    assert "decoder sites need text" in refused(*bench.cache(tmp_path / "store", model=whole, sites="decoder.blocks.0"))


class _Bomb:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def test_a_checkpoint_that_would_run_code_is_not_run(bench, tmp_path, refused):
    bomb = _Bomb(f"touch {tmp_path / 'pwned'}")
    torch.save({"dims": bomb, "model_state_dict": {}}, tmp_path / "zip.pt")
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(bomb, protocol=4))
    for name in ("zip.pt", "bare.pt"):
        assert "is not a checkpoint" in refused(*bench.cache(tmp_path / "store", model=tmp_path / name))
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("dims", "words"),
    [
        ({"n_audio_state": 64}, "do not fit its dims"),
        ({"n_audio_state": 10**7}, "do not fit its dims"),
        ({"n_audio_layer": 10**6}, "do not fit its dims"),
        ({"n_audio_layer": -1}, "no Whisper can have"),
        ({"n_audio_head": 0}, "no Whisper can have"),
        ({"n_audio_head": 5}, "no Whisper can have"),
        ({"n_mels": "80"}, "no Whisper can have"),
    ],
)
def test_a_checkpoint_whose_dims_are_wrong_is_refused(bench, tmp_path, refused, dims, words):
    checkpoint = torch.load(bench.model, weights_only=True)
    torch.save(checkpoint | {"dims": checkpoint["dims"] | dims}, tmp_path / "m.pt")
    assert words in refused(*bench.cache(tmp_path / "store", model=tmp_path / "m.pt"))


def test_a_checkpoint_cut_short_is_refused(bench, tmp_path, refused):
    for size in (0, 100, bench.model.stat().st_size // 2):
        (tmp_path / "m.pt").write_bytes(bench.model.read_bytes()[:size])
        assert "is not a checkpoint" in refused(*bench.cache(tmp_path / "store", model=tmp_path / "m.pt"))


# Stores


def test_a_store_made_otherwise_is_left_alone(bench, refused):
    before = contents(bench.store)
    cases = [
        (["--dtype", "float32"], {}, "dtype is float16 there and float32 here"),
        (["--codec", "lz4"], {}, "codec is none there and lz4 here"),
        (["--seed", "1"], {}, "plan.seed is 0 there and 1 here"),
        (["--clip-seconds", "1"], {}, "plan.clips is 10 there and 20 here"),
        (["--limit", "5"], {}, "plan.clips is 10 there and 5 here"),
        (["--chunk-rows", "128"], {}, "axes.frame is"),
        ([], {"model": bench.other_model}, "model.sha256 is"),
    ]
    for more, changed, words in cases:
        line = refused(*bench.cache(bench.store, *more, **changed))
        assert words in line and "use another --out" in line
    assert contents(bench.store) == before


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"attributes":{"hearsae":[]}}', '{"attributes":{"hearsae":{"format":1}}}', "format", "model", "axis", "chunk"]
)
def test_a_header_that_is_damaged_or_of_another_format(bench, tmp_path, capfd, refused, succeeds, text):
    store = copy(bench.store, tmp_path / "store")
    data = json.loads((store / "zarr.json").read_text())
    header = data["attributes"]["hearsae"]
    damage: dict[str, Callable[[], Any]] = {
        "format": lambda: header.update(format=9),
        "model": lambda: header.update(model=3),
        "axis": lambda: header["sites"][SITE].update(axis="x"),
        "chunk": lambda: header["axes"]["frame"].update(chunk_rows=0),
    }
    if text in damage:
        damage[text]()
    (store / "zarr.json").write_text(json.dumps(data) if text in damage else text)
    for command in (["info", store], bench.cache(store)):
        line = refused(*command)
        assert str(store) in line
        assert text != "format" or "store format 9; this hearsae reads format 1" in line
    capfd.readouterr()
    assert main(["verify", str(store)]) == 1
    assert capfd.readouterr().out.startswith("zarr.json: ")
    shutil.copy(store / "zarr.json", store / "header.json")
    for command in (["verify", store], ["repair", store]):  # nothing is left to mend it from
        assert str(store) in refused(*command)
    shutil.copy(bench.store / "header.json", store / "header.json")
    assert [bad["site"] for bad in succeeds("repair", store)["dropped"]] == ["zarr.json"]
    assert contents(store) == contents(bench.store)


def test_verify_names_what_is_damaged_and_repair_and_cache_mend_it(bench, tmp_path, capfd, refused, succeeds):
    store = copy(bench.store, tmp_path / "store")
    (store / "commits" / SITE / "000001.json").write_text("{")
    with open(store / SITE / "c" / "2" / "0", "r+b") as file:
        file.write(b"damage")
    assert "000001.json is damaged" in refused("info", store)
    assert "000001.json is damaged" in refused("train", "--store", store, "--site", SITE, "--out", tmp_path / "sae", *SMALL_SAE)
    capfd.readouterr()
    assert main(["verify", str(store), "--json"]) == 1
    out, err = capfd.readouterr()
    assert [(bad["site"], bad["shard"]) for bad in json.loads(out)["bad"]] == [(SITE, 1), (SITE, 2)]
    assert err.count("\n") == 1 and "2 of 10 objects are damaged" in err
    assert len(succeeds("repair", store)["dropped"]) == 2
    assert succeeds(*bench.cache(store))["shards_computed"] == 2
    assert contents(store) == contents(bench.store)


def test_no_store_is_no_store(bench, tmp_path, refused):
    (tmp_path / "file").write_text("")
    for command in ("info", "verify", "repair"):
        for path in ("/nonexistent", bench.speech, tmp_path / "file"):
            assert f"there is no activation store at {path}" in refused(command, path)
    store = copy(bench.store, tmp_path / "store")
    (store / "clips.parquet").write_bytes(b"PAR1")
    assert "clips.parquet can't be read" in refused("info", store)


# Where to write


@pytest.fixture(params=["file", "file/below", "/proc/nonexistent", "/sys/nonexistent", "/dev/full", "other"])
def bad_out(request, bench, tmp_path) -> Path:
    """A place where no folder can be, or one that holds other things."""
    (tmp_path / "file").write_text("mine")
    return bench.speech if request.param == "other" else tmp_path / request.param


def test_places_that_can_not_be_written(bench, bad_out, refused):
    before = sorted(bench.speech.iterdir())
    commands = [
        bench.cache(bad_out),
        ["scan", "--store", bench.store, "--features", f"neurons:{SITE}", "--out", bad_out, "--no-ray"],
        ["explore", bench.scan, "--out", bad_out],
    ]
    if bad_out != bench.speech:
        commands.append(["train", "--store", bench.store, "--site", SITE, "--out", bad_out, *SMALL_SAE])
    for command in commands:
        assert str(bad_out) in refused(*command)
    assert sorted(bench.speech.iterdir()) == before


def test_a_full_disk_keeps_what_was_committed_and_the_same_command_finishes(bench, tmp_path, refused, succeeds):
    with disk(tmp_path / "disk", "80k") as place:
        assert "No space left on device" in refused(*bench.cache(place / "store"))
        committed = succeeds("verify", place / "store")
        assert committed["ok"] and committed["objects"] > 0
        assert not list(place.rglob(".*"))
        subprocess.run(["mount", "-o", "remount,size=10m", place], check=True)
        assert succeeds(*bench.cache(place / "store"))["shards_computed"] == 5 - committed["objects"]
        assert succeeds(*bench.cache(place / "store", "--sites", SITE, NEURONS))["shards_computed"] == 5
        assert contents(place / "store") == contents(bench.store)
    with disk(tmp_path / "small", "8k") as place:
        assert "No space" in refused("train", "--store", bench.store, "--site", SITE, "--out", place / "sae", *SMALL_SAE, "--checkpoint-every", "100")
        assert "No space" in refused("scan", "--store", bench.store, "--features", f"neurons:{SITE}", "--out", place / "scan", "--no-ray")
        assert "No space" in refused("explore", bench.scan, "--out", place / "page")


def test_a_read_only_place_is_read_and_not_written(bench, tmp_path, refused, succeeds):
    with disk(tmp_path / "disk", "10m") as place:
        store = copy(bench.store, place / "store")
        subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        assert succeeds("verify", store)["ok"]
        assert succeeds(*bench.cache(store))["shards_computed"] == 0
        commands = [
            bench.cache(store, sites="encoder.blocks.1"),
            bench.cache(place / "new"),
            ["train", "--store", store, "--site", SITE, "--out", place / "sae", *SMALL_SAE],
            ["scan", "--store", store, "--features", f"neurons:{SITE}", "--out", place / "scan", "--no-ray"],
            ["explore", bench.scan, "--out", place / "page"],
        ]
        for command in commands:
            assert "Read-only file system" in refused(*command)


def test_an_answer_that_can_not_be_printed_is_no_traceback(bench):
    command = [sys.executable, "-m", "cluster.cli", "info", str(bench.store)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and done.stderr == "hearsae: the system refused: No space left on device\n"


# Ctrl-C


def interrupt_when(seen: Callable[[], bool], arguments: list[str]) -> str:
    """Starts a command, presses Ctrl-C once `seen`, and returns its stderr."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "cluster.cli", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    deadline = time.monotonic() + 60
    while not seen() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    return err


def test_ctrl_c_in_cache_keeps_the_committed_shards(bench, tmp_path, succeeds):
    store = tmp_path / "store"
    arguments = bench.cache(store, "--clip-seconds", "0.5", "--shard-rows", "64")
    err = interrupt_when(lambda: len(list(store.glob("commits/*/*.json"))) >= 2, arguments)
    assert err.startswith("hearsae: interrupted") and err.count("\n") == 1
    before = succeeds("verify", store)
    assert before["ok"] and before["objects"] >= 2
    result = succeeds(*arguments)
    assert result["shards_computed"] == result["shards"] - before["objects"] > 0
    succeeds(*bench.cache(tmp_path / "undisturbed", "--clip-seconds", "0.5", "--shard-rows", "64"))
    assert contents(store) == contents(tmp_path / "undisturbed")


def test_ctrl_c_in_train_goes_on_to_the_same_sae(bench, tmp_path, succeeds):
    def arguments(out: str) -> list[str]:
        settings = ["--d-sae", "64", "--k", "4", "--rows", "20000", "--batch", "100", "--checkpoint-every", "2000", "--threads", "1"]
        return ["train", "--store", str(bench.store), "--site", SITE, "--out", str(tmp_path / out), *settings]

    err = interrupt_when((tmp_path / "sae" / "checkpoint.safetensors").exists, arguments("sae"))
    assert err.startswith("hearsae: interrupted") and err.count("\n") == 1
    assert not (tmp_path / "sae" / "sae.safetensors").exists()
    succeeds(*arguments("sae"))
    succeeds(*arguments("undisturbed"))
    assert (tmp_path / "sae" / "sae.safetensors").read_bytes() == (tmp_path / "undisturbed" / "sae.safetensors").read_bytes()


# Training and its SAEs


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--d-sae", "8", "--k", "9"], "k = 9 is not between 1 and d_sae = 8"),
        (["--batch", "2000", "--rows", "4000"], "1000 committed rows of encoder.blocks.0, fewer than one batch of 2000"),
        (["--site", "encoder.blocks.9"], "has no site 'encoder.blocks.9'; it has: encoder.blocks.0, encoder.blocks.1.mlp.1"),
        (["--site", "../../x"], "is no name of a site"),
        (["--site"], "--site: give at least one value"),
        (["--d-sae", "0"], "both widths must be positive"),
        (["--d-sae", "64", "64"], "--d-sae: give at least one value, and none twice"),
        (["--seed", "-1"], "--seed: each must be between 0"),
        (["--seed", str(2**70)], "--seed: each must be between 0"),
        (["--rows", "-1"], "--rows -1 is less than one batch"),
        (["--lr", "nan"], "--lr nan is not a positive number"),
        (["--lr", "1e30"], "diverged"),
        (["--store", "/nonexistent"], "there is no activation store at /nonexistent"),
    ],
)
def test_training_that_can_not_work_is_refused(bench, tmp_path, refused, more, words):
    assert words in refused("train", "--store", bench.store, "--site", SITE, "--out", tmp_path / "sae", *SMALL_SAE, *more)
    assert not (tmp_path / "sae" / "sae.safetensors").exists()


def test_another_runs_sae_is_left_alone(bench, tmp_path, refused, succeeds):
    sae = copy(bench.sae, tmp_path / "sae")
    before = (sae / "sae.safetensors").read_bytes()
    arguments = ["train", "--store", bench.store, "--site", SITE, "--out", sae, *SMALL_SAE]
    assert "is of another run: k is [4] there and [5] here" in refused(*arguments, "--k", "5")
    assert succeeds(*arguments)["runs"][0]["rows"] == 600
    assert (sae / "sae.safetensors").read_bytes() == before


DAMAGED_SAES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda sae: (sae / "config.json").unlink(), "there is no SAE in"),
    "no weights": (lambda sae: (sae / "sae.safetensors").unlink(), "there is no SAE in"),
    "empty config": (lambda sae: (sae / "config.json").write_text(""), "is damaged"),
    "a list": (lambda sae: (sae / "config.json").write_text("[]"), "is no SAE config"),
    "weights cut short": (lambda sae: (sae / "sae.safetensors").write_bytes((sae / "sae.safetensors").read_bytes()[:3000]), "is damaged"),
    "another width": (lambda sae: edit_json(sae / "config.json", d_sae=65), "is damaged"),
    "a width beyond all memory": (lambda sae: edit_json(sae / "config.json", d_sae=10**12), "is damaged"),
    "a width of text": (lambda sae: edit_json(sae / "config.json", d_in="32"), "is damaged"),
    "an unknown arch": (lambda sae: edit_json(sae / "config.json", arch="new"), "no SAE architecture 'new'"),
    "a later format": (lambda sae: edit_json(sae / "config.json", format=2), "no SAE config of format 1"),
    "a site that is a number": (lambda sae: edit_json(sae / "config.json", site=5), "is damaged"),
    "a model that is a number": (lambda sae: edit_json(sae / "config.json", model_sha256=5), "is damaged"),
    "another site": (lambda sae: edit_json(sae / "config.json", site="encoder.blocks.9"), "encoder.blocks.9"),
    "a site of another width": (lambda sae: edit_json(sae / "config.json", site=NEURONS), "has width 128"),
    "another model": (lambda sae: edit_json(sae / "config.json", model_sha256="0" * 64), "000000000000"),
}


@pytest.mark.parametrize("case", DAMAGED_SAES)
def test_an_sae_that_is_damaged_or_made_for_something_else(bench, tmp_path, refused, case):
    damage, words = DAMAGED_SAES[case]
    damage(copy(bench.sae, tmp_path / "sae"))
    assert words in refused("evaluate", "--store", bench.store, "--sae", tmp_path / "sae")
    assert words in refused("scan", "--store", bench.store, "--features", f"sae:{tmp_path / 'sae'}", "--out", tmp_path / "scan", "--no-ray")
    assert not (tmp_path / "scan").exists()


# Scans, queries, pages


@pytest.mark.parametrize(
    ("features", "words"),
    [
        ("neurons", "can't be read: use neurons:SITE"),
        ("", "can't be read: use neurons:SITE"),
        ("neurons:encoder.blocks.9", "has no site"),
        ("random:encoder.blocks.9", "has no site"),
        ("sae:/nonexistent", "there is no SAE in /nonexistent"),
    ],
)
def test_features_that_are_not_there(bench, tmp_path, refused, features, words):
    assert words in refused("scan", "--store", bench.store, "--features", features, "--out", tmp_path / "scan", "--no-ray")


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ([], "ask for --feature N, or for --clip C --time T"),
        (["--feature", "1", "--clip", "0"], "ask for --feature N, or for --clip C --time T"),
        (["--feature", "32"], "it has features 0 to 31"),
        (["--feature", "-1"], "it has features 0 to 31"),
        (["--clip", "0"], "--clip needs --time"),
        (["--clip", "10", "--time", "0"], "it has clips 0 to 9"),
        (["--clip", "²", "--time", "0"], "has no clip of a source '²'"),
        (["--clip", "0", "--time", "2"], "outside clip 0, which goes from 0 to 2 s"),
        (["--clip", "0", "--time", "nan"], "nan s is outside clip 0"),
        (["--clip", "0", "--time", "0", "--n", "0"], "--n 0 must be at least 1"),
        (["--feature", "1", "--store", "/nonexistent"], "there is no activation store at /nonexistent"),
    ],
)
def test_questions_that_have_no_answer(bench, refused, asked, words):
    assert words in refused("query", "--scan", bench.scan, *asked)


def test_another_store_than_the_scanned_one_is_noticed(bench, tmp_path, refused, succeeds):
    succeeds(*bench.cache(tmp_path / "store", "--limit", "2"))
    assert "is not the store of the scan" in refused("query", "--scan", bench.scan, "--feature", "1", "--store", tmp_path / "store")
    assert "is not the store of the scan" in refused("explore", bench.scan, "--out", tmp_path / "page", "--store", tmp_path / "store")


DAMAGED_SCANS: dict[str, Callable[[Path], Any]] = {
    "no scan.json": lambda scan: (scan / "scan.json").unlink(),
    "empty scan.json": lambda scan: (scan / "scan.json").write_text(""),
    "a list": lambda scan: (scan / "scan.json").write_text("[]"),
    "a format and nothing else": lambda scan: (scan / "scan.json").write_text('{"format": 2}'),
    "a later format": lambda scan: edit_json(scan / "scan.json", format=9),
    "a count of text": lambda scan: edit_json(scan / "scan.json", count="32"),
    "another count": lambda scan: edit_json(scan / "scan.json", count=500),
    "a model that is a number": lambda scan: edit_json(scan / "scan.json", model=3),
    "features that are not there": lambda scan: edit_json(scan / "scan.json", features="neurons:encoder.blocks.9", site="encoder.blocks.9"),
    "a store that is gone": lambda scan: edit_json(scan / "scan.json", store="/nonexistent"),
    "no features": lambda scan: (scan / "features.parquet").unlink(),
    "damaged features": lambda scan: (scan / "features.parquet").write_bytes(b"PAR1"),
    "examples for features": lambda scan: shutil.copy(scan / "examples.parquet", scan / "features.parquet"),
}


@pytest.mark.parametrize("case", DAMAGED_SCANS)
def test_a_scan_that_is_damaged(bench, tmp_path, refused, case):
    scan = copy(bench.scan, tmp_path / "scan")
    DAMAGED_SCANS[case](scan)
    refused("query", "--scan", scan, "--clip", "0", "--time", "0")
    refused("explore", scan, "--out", tmp_path / "page")
    assert not (tmp_path / "page" / "index.html").exists()


@pytest.mark.parametrize("data", [None, b"PAR1", "features.parquet"])
def test_a_scan_whose_examples_are_damaged(bench, tmp_path, refused, data):
    scan = copy(bench.scan, tmp_path / "scan")
    (scan / "examples.parquet").unlink()
    if data:
        (scan / "examples.parquet").write_bytes(data if isinstance(data, bytes) else (scan / data).read_bytes())
    assert "run 'hearsae scan' again" in refused("query", "--scan", scan, "--feature", "1")
    assert "run 'hearsae scan' again" in refused("explore", scan, "--out", tmp_path / "page")


def test_pages_of_nothing_are_refused(bench, tmp_path, refused):
    page = ["--out", tmp_path / "page"]
    assert "name at least one scan" in refused("explore", *page)
    assert "there is no scan at" in refused("explore", bench.store, *page)
    assert "there is no feature 0-32" in refused("explore", bench.scan, *page, "--features", "0-32")
    assert "names no features" in refused("explore", bench.scan, *page, "--features", "x")
    assert "a context of nan s" in refused("explore", bench.scan, *page, "--context-s", "nan")
    assert not (tmp_path / "page").exists()


def test_every_command_answers_with_one_json_object(bench, tmp_path, succeeds):
    assert succeeds(*bench.cache(tmp_path / "store", "--dry-run"))["clips"] == CLIPS
    assert succeeds("info", bench.store)["clips"] == CLIPS
    assert succeeds("verify", bench.store) == {"ok": True, "objects": 10, "bad": []}
    assert succeeds("repair", bench.store) == {"dropped": []}
    assert succeeds("evaluate", "--store", bench.store, "--sae", bench.sae)["results"][0]["rows"] == 1000
    assert succeeds("query", "--scan", bench.scan, "--feature", "0")["rows"]
    assert succeeds("explore", bench.scan, "--out", tmp_path / "page", "--features", "0-3")["features"] == 4
