"""Ray, embedded: the same bytes as without it, whatever happens to a worker, and nothing left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import write_tiny_whisper

from cluster.cli import main
from cluster.workers import WorkerOptions, session

pytestmark = pytest.mark.cluster

SITES = ("encoder.blocks.0", "encoder.blocks.1.mlp.1", "decoder.blocks.1")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A folder with `clips` (24 of about a second, with texts, and one whose samples are no numbers) and `tiny.pt`."""
    root = tmp_path_factory.mktemp("inputs")
    write_tiny_whisper(root / "tiny.pt")
    rng, lines = np.random.default_rng(0), []
    (root / "clips").mkdir()
    for i in range(24):
        tone = 0.3 * np.sin(2 * np.pi * (150 + 40 * i) * np.arange(14000 + 300 * i) / 16000)
        soundfile.write(root / "clips" / f"{i:02d}.wav", tone + 0.01 * rng.standard_normal(len(tone)), 16000)
        lines.append(json.dumps({"file_name": f"{i:02d}.wav", "text": f"tone {i}"}))
    (root / "clips" / "metadata.jsonl").write_text("\n".join(lines))
    soundfile.write(root / "clips" / "nan.wav", np.full(9000, np.nan, np.float32), 16000, subtype="FLOAT")
    return root


def cache_command(inputs: Path, out: Path, *more: str) -> list[str]:
    command = ["cache", "--dataset", str(inputs / "clips"), "--model", str(inputs / "tiny.pt"), "--sites", *SITES, "--out", str(out)]
    return [*command, "--chunk-rows", "64", "--shard-rows", "128", "--device", "cpu", "--json", *more]


def scan_command(store: Path, features: str, out: Path, *more: str) -> list[str]:
    return ["scan", "--store", str(store), "--features", features, "--out", str(out), "--json", *more]


@pytest.fixture(scope="module")
def without_ray(inputs, tmp_path_factory) -> Path:
    """The store that one process makes. Read only."""
    out = tmp_path_factory.mktemp("without-ray") / "acts.zarr"
    assert main(cache_command(inputs, out, "--no-ray")) == 0
    return out


@pytest.fixture(scope="module")
def ray_of_two():
    """One embedded Ray for the tests that only need one."""
    with session(WorkerOptions(workers=2)):
        yield


def contents(folder: Path, *but: str) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part in but for part in path.relative_to(folder).parts)
    }


def hold_to(store: Path, reference: Path) -> None:
    """Two stores have the same objects, clips and header, and records that differ only in the time they took."""
    assert contents(store, "commits", "runs") == contents(reference, "commits", "runs")
    ours, theirs = (contents(path / "commits") for path in (store, reference))
    assert ours.keys() == theirs.keys() and ours
    for name in ours:
        own_to_a_run = {"seconds": 0, "crc32c": 0}
        assert json.loads(ours[name]) | own_to_a_run == json.loads(theirs[name]) | own_to_a_run


def test_capture_on_ray_gives_the_bytes_of_one_process(ray_of_two, inputs, without_ray, tmp_path, capsys):
    assert main(cache_command(inputs, tmp_path / "acts.zarr", "--workers", "2")) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["shards_computed"] == summary["shards"] > 10
    assert summary["skipped"] == 1 and "nan.wav (row 0): it has NaN or infinite samples" in summary["skipped_reasons"]
    hold_to(tmp_path / "acts.zarr", without_ray)


def test_scan_on_ray_gives_the_bytes_of_one_process(ray_of_two, without_ray, tmp_path, capsys):
    features = "neurons:encoder.blocks.1.mlp.1"
    assert main(scan_command(without_ray, features, tmp_path / "with", "--workers", "2")) == 0
    assert main(scan_command(without_ray, features, tmp_path / "without", "--no-ray")) == 0
    with_ray, alone = map(json.loads, capsys.readouterr().out.splitlines())
    assert (with_ray["features"], with_ray["rows"]) == (alone["features"], alone["rows"])
    assert contents(tmp_path / "with") == contents(tmp_path / "without")
    assert {"scan.json", "features.parquet", "examples.parquet"} <= contents(tmp_path / "with").keys()


def test_an_error_in_a_worker_is_one_line(ray_of_two, inputs, tmp_path, capsys):
    assert main(cache_command(inputs, tmp_path / "acts.zarr", "--workers", "2", "--strict")) == 1
    out, err = capsys.readouterr()
    assert out == "" and err == "hearsae: nan.wav (row 0): it has NaN or infinite samples\n"


# A command of its own, that starts Ray and stops it


def descendants(root: int) -> dict[int, str]:
    """Pid -> command line of every living process below `root`."""
    parents, commands = {}, {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                parents[int(entry)] = int(Path(f"/proc/{entry}/stat").read_text().rsplit(")", 1)[1].split()[1])
                commands[int(entry)] = Path(f"/proc/{entry}/cmdline").read_text().replace("\0", " ")
            except (OSError, ValueError):
                continue
    below, grown = {root}, True
    while grown:
        more = {pid for pid, parent in parents.items() if parent in below} - below
        below |= more
        grown = bool(more)
    return {pid: commands[pid] for pid in below - {root}}


def living(pids: dict[int, str]) -> dict[int, str]:
    """Those that still run the command they ran."""
    found = {}
    for pid, command in pids.items():
        try:
            now = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
        if now and (now == command or now.startswith("ray::")):
            found[pid] = now
    return found


@pytest.mark.slow
def test_a_worker_that_is_killed_is_replaced_and_nothing_is_left_behind(inputs, without_ray, tmp_path):
    code = "import sys, cluster.cli; sys.exit(cluster.cli.main())"
    arguments = cache_command(inputs, tmp_path / "acts.zarr", "--workers", "2")
    with open(tmp_path / "out", "wb") as out, open(tmp_path / "err", "wb") as err:
        process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=out, stderr=err)
        started: dict[int, str] = {}
        workers: set[int] = set()
        killed = None
        records = tmp_path / "acts.zarr" / "commits" / SITES[-1]
        while process.poll() is None:
            now = descendants(process.pid)
            started |= {pid: command for pid, command in now.items() if command}  # the dying have none
            busy = {pid for pid, command in now.items() if command.startswith("ray::MapWorker")}
            workers |= busy
            if killed is None and len(busy) == 2 and records.is_dir() and list(records.glob("0*.json")):
                killed = min(busy)
                os.kill(killed, signal.SIGKILL)
            time.sleep(0.01)
    assert process.returncode == 0, (tmp_path / "err").read_text()
    assert killed is not None and len(workers) == 3
    assert (tmp_path / "err").read_text() == ""
    summary = json.loads((tmp_path / "out").read_text())
    assert summary["shards_computed"] >= summary["shards"] - 1  # the one that was killed may just have committed
    hold_to(tmp_path / "acts.zarr", without_ray)
    assert any("raylet" in command for command in started.values())
    deadline = time.monotonic() + 15
    while living(started) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert living(started) == {}
