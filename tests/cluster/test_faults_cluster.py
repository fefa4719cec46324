"""A cluster of three nodes that loses workers and a node: the store ends as if nothing had happened, byte for byte."""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import netns
import numpy as np
import pytest
import soundfile
from conftest import write_tiny_whisper
from test_ray import hold_to

from cache.store import ActivationStore
from cluster.cli import main

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

SITES = ("encoder.blocks.0", "encoder.blocks.1.mlp.1")
CLIPS = 200
KILLS = 20


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A folder with `clips`, of which each becomes a shard, and `tiny.pt`."""
    root = tmp_path_factory.mktemp("cluster")
    write_tiny_whisper(root / "tiny.pt", encoder_only=True)
    rng = np.random.default_rng(0)
    (root / "clips").mkdir()
    for i in range(CLIPS):
        soundfile.write(root / "clips" / f"{i:03d}.wav", 0.1 * rng.standard_normal(14000 + 10 * i), 16000)
    return root


def cache_arguments(inputs: str | Path, out: str | Path, *more: str) -> list[str]:
    what = ["--dataset", f"{inputs}/clips", "--model", f"{inputs}/tiny.pt", "--sites", *SITES, "--out", str(out)]
    return ["cache", *what, "--chunk-rows", "64", "--shard-rows", "64", "--clip-seconds", "1.25", "--device", "cpu", "--json", *more]


@pytest.fixture(scope="module")
def undisturbed(inputs, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "acts.zarr"
    assert main(cache_arguments(inputs, out, "--no-ray")) == 0
    return out


def capture_workers() -> list[int]:
    """Pids of the capture workers of all nodes: the namespace has no other processes than ours."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = entry.read_text()
        except OSError:
            continue
        if command.startswith("ray::") and "_CaptureActor" in command:
            found.append(int(entry.parent.name))
    return sorted(found)


def lose(inputs: str, out: str, kills: int, nodes_lost: int, seed: int) -> dict[str, object]:
    """Captures on three nodes, kills random workers with SIGKILL, then whole nodes; what came of it."""
    random.seed(seed)
    commits = Path(out) / "commits" / SITES[-1]

    def committed() -> int:
        return len(list(commits.glob("*.json"))) if commits.is_dir() else 0

    def wait_for_progress(since: int) -> bool:
        while process.poll() is None and committed() <= since:
            time.sleep(0.01)
        return process.poll() is None

    killed: list[int] = []
    lost = 0
    with netns.cluster(3) as cluster, tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as complained:
        command = [sys.executable, "-m", "cluster.cli", *cache_arguments(inputs, out, "--address", cluster.address)]
        process = subprocess.Popen(command, stdout=said, stderr=complained)
        while len(killed) < kills and wait_for_progress(committed()):
            time.sleep(random.uniform(0, 0.3))
            if workers := capture_workers():
                killed.append(random.choice(workers))
                os.kill(killed[-1], signal.SIGKILL)
        at_last_kill = committed()
        for _ in range(nodes_lost):
            if wait_for_progress(committed()):
                cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
                lost += 1
        at_node_loss = committed()
        try:
            status = process.wait(timeout=240)
        except subprocess.TimeoutExpired:
            status = None
        said.seek(0), complained.seek(0)
        return {
            "status": status,
            "killed": len(set(killed)),
            "nodes_lost": lost,
            "committed": [at_last_kill, at_node_loss, committed()],
            "out": said.read(),
            "err": complained.read()[-4000:],
        }


@pytest.mark.parametrize(("kills", "nodes_lost"), [(KILLS, 1)])
def test_workers_and_then_a_node_are_lost_and_the_store_is_the_same(inputs, undisturbed, tmp_path, kills, nodes_lost):
    seen = netns.call(lose, inputs, tmp_path / "acts.zarr", kills, nodes_lost, 0, timeout=500)
    assert seen["status"] == 0, seen
    assert (seen["killed"], seen["nodes_lost"]) == (kills, nodes_lost), seen
    assert seen["committed"][1] < CLIPS  # the node was lost in the middle
    store = ActivationStore.open(tmp_path / "acts.zarr")
    assert store.repair() == []
    assert store.verify() == (CLIPS * len(SITES), [])
    hold_to(tmp_path / "acts.zarr", undisturbed)
