"""Training on Ray Train: what one process learns, whatever happens to a worker or to the driver."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import netns
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path.append(str(Path(__file__).parents[1] / "sae"))
from planted_rows import OTHER, SITE, planted_store

from cache.errors import HearsaeError
from cluster.training import RankOptions, train_on
from cluster.workers import session
from sae.train import train
from sae.train_config import TrainConfig

pytestmark = pytest.mark.cluster

BATCH, STEPS, CHECKPOINT = 512, 200, 8192
WIDTH = 256


def config_for(store: str, out: Path, **settings) -> TrainConfig:
    small = {"d_sae": (WIDTH,), "k": (3,), "batch": BATCH, "rows": BATCH * STEPS, "lr": 2e-3, "threads": 1, "plots": False, "quiet": True}
    often = {"log_every": BATCH, "checkpoint_every": CHECKPOINT, "dead_after": 4000}
    return TrainConfig(**{"store": (Path(store),), "site": (SITE,), "out": out} | small | often | settings)


def command_for(config: TrainConfig, *more: str) -> list[str]:
    """The same as a command."""
    flags = [sys.executable, "-m", "cluster.cli", "train"]
    for name, value in asdict(config).items():
        if value is not None and not isinstance(value, bool):
            flags += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else (value,))]
    return [*flags, *more]


# In the namespace


def train_workers() -> list[int]:
    """Pids of the processes that train."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            command = Path(f"/proc/{entry}/cmdline").read_text()
        except OSError:
            continue
        if command.startswith("ray::") and "TrainWorker" in command:
            found.append(int(entry))
    return sorted(found)


def position_of(checkpoint: Path) -> int:
    with safe_open(checkpoint, "pt") as file:
        return json.loads(file.metadata()["hearsae"])["position"]


def first_checkpoint(out: Path) -> Path:
    deadline = time.monotonic() + 120
    while not (found := list(out.rglob("checkpoint.safetensors"))):
        assert time.monotonic() < deadline, "no checkpoint"
        time.sleep(0.01)
    return found[0]


class Killer(threading.Thread):
    """Kills a worker at the first checkpoint, as often as asked."""

    def __init__(self, out: Path, times: int = 1) -> None:
        super().__init__(daemon=True)
        self.out, self.times, self.killed_at = out, times, []

    def run(self) -> None:
        seen: set[int] = set()
        for _ in range(self.times):
            checkpoint = first_checkpoint(self.out)
            while not (workers := [pid for pid in train_workers() if pid not in seen]):
                time.sleep(0.05)
            seen.update(train_workers())
            self.killed_at.append(position_of(checkpoint))
            os.kill(workers[-1], signal.SIGKILL)


def scene_undisturbed(store: str, root: Path) -> Any:
    return [result._asdict() for result in train_on(config_for(store, root / "undisturbed"), RankOptions(workers=2))]


def scene_killed_worker(store: str, root: Path) -> Any:
    killer = Killer(root / "killed-worker")
    killer.start()
    train_on(config_for(store, root / "killed-worker"), RankOptions(workers=2))
    return killer.killed_at


def scene_parts_of_a_grid(store: str, root: Path) -> Any:
    config = config_for(store, root / "grid", site=(SITE, OTHER), seed=(0, 1), d_sae=(64,), rows=BATCH * 50)
    return [result._asdict() for result in train_on(config, RankOptions(workers=2, spread="saes"))]


def scene_refusal(store: str, root: Path) -> Any:
    train_on(config_for(store, root / "refusal", lr=1e30), RankOptions(workers=2))


def scene_too_many_failures(store: str, root: Path) -> Any:
    Killer(root / "failures").start()
    train_on(config_for(store, root / "failures"), RankOptions(workers=2, max_failures=0))


SCENES: list[Callable[[str, Path], Any]] = [scene_undisturbed, scene_killed_worker, scene_parts_of_a_grid, scene_refusal, scene_too_many_failures]


def play(store: str, root: str) -> dict[str, Any]:
    """Name of a scene -> what it returned or refused, and the seconds that it took; all on one Ray."""
    played = {}
    with session(RankOptions(workers=2)):
        for scene in SCENES:
            started = time.monotonic()
            try:
                outcome = scene(store, Path(root))
            except HearsaeError as error:
                outcome = str(error)
            played[scene.__name__] = [outcome, time.monotonic() - started]
    return played


def kill_the_driver(command: list[str], out: str) -> None:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    first_checkpoint(Path(out))
    process.kill()
    process.wait()


# Here


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> str:
    """6,000 rows. Read only."""
    return str(planted_store(tmp_path_factory.mktemp("planted") / "acts.zarr", 120.0).path)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def played(store, root) -> dict[str, Any]:
    outcome = netns.call(play, store, str(root), timeout=400)
    for scene, (what, seconds) in outcome.items():
        print(f"{scene}: {seconds:.1f} s, {str(what)[:200]}")
    return {scene: what for scene, (what, _) in outcome.items()}


def attempts(folder: Path) -> Iterator[dict[int, float]]:
    """The loss curve that each attempt at a run logged, in their order."""
    for file in sorted((folder / "tb").glob("events*")):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0})
        events.Reload()
        yield {event.step: event.value for event in events.Scalars("loss")}


def curve(folder: Path) -> list[float]:
    """As TensorBoard shows it: what a later attempt logged again replaces what was logged before."""
    merged: dict[int, float] = {}
    for of_attempt in attempts(folder):
        merged = {step: value for step, value in merged.items() if step < min(of_attempt)} | of_attempt
    assert list(merged) == list(range(BATCH, BATCH * STEPS + 1, BATCH)), "the curve has holes"
    return list(merged.values())


def same_sae(folder: Path, reference: Path) -> bool:
    a, b = (load_file(path / "sae.safetensors") for path in (folder, reference))
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
def test_two_workers_learn_what_one_process_learns(played, store, root, tmp_path):
    (alone,) = train(config_for(store, tmp_path / "alone", lanes=2))
    (result,) = played["scene_undisturbed"]
    assert (result["rows"], result["d_sae"]) == (BATCH * STEPS, WIDTH)
    np.testing.assert_allclose(curve(root / "undisturbed")[:100], curve(tmp_path / "alone")[:100], rtol=1e-3)
    assert result["fvu"] == pytest.approx(alone.fvu, rel=0.02)


@pytest.mark.slow
def test_a_killed_worker_costs_the_steps_since_the_last_checkpoint_and_nothing_else(played, root):
    (killed_at,) = played["scene_killed_worker"]
    before, after = attempts(root / "killed-worker")
    went_on_from = min(after) - BATCH
    assert went_on_from % CHECKPOINT == 0 and went_on_from >= killed_at > 0
    assert max(before) - went_on_from <= CHECKPOINT
    assert curve(root / "killed-worker") == curve(root / "undisturbed")
    assert same_sae(root / "killed-worker", root / "undisturbed")


@pytest.mark.slow
def test_a_grid_spread_over_workers_is_that_of_one_process(played, store, tmp_path):
    config = config_for(store, tmp_path / "grid", site=(SITE, OTHER), seed=(0, 1), d_sae=(64,), rows=BATCH * 50)
    alone, spread = train(config), played["scene_parts_of_a_grid"]
    timed = ("dir", "seconds", "rows_per_s", "wait_fraction")
    for ours, theirs in zip(spread, (result._asdict() for result in alone), strict=True):
        assert {name: value for name, value in ours.items() if name not in timed} == {n: v for n, v in theirs.items() if n not in timed}
        assert Path(ours["dir"]).name == Path(theirs["dir"]).name and same_sae(Path(ours["dir"]), Path(theirs["dir"]))


@pytest.mark.slow
def test_what_a_worker_refuses_is_one_line_at_once(played, root):
    assert played["scene_refusal"].startswith("training on encoder.blocks.0 diverged") and "\n" not in played["scene_refusal"]
    assert not list((root / "refusal").rglob("train.json"))


@pytest.mark.slow
def test_too_many_failures_are_one_line(played, root):
    line = played["scene_too_many_failures"]
    # Ray may notice the dead worker first, or the other worker its closed connection.
    assert re.match(
        r"training workers failed 1 times \(--max-failures 0\), at last with: (The actor is dead|.*Connection (closed|reset) by peer)", line
    )
    assert "goes on from the last checkpoint" in line and "\n" not in line
    assert (root / "failures" / "checkpoint.safetensors").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"workers": 0}, "--workers 0 must be at least 1"),
        ({"workers": 2, "min_workers": 3}, "--min-workers 3 must be at least 1 and at most --workers"),
        ({"min_workers": 0}, "--min-workers 0 must be at least 1"),
        ({"workers": 2, "max_failures": -1}, "--max-failures -1 is negative"),
    ],
)
def test_options_that_can_not_be_are_refused_before_anything_starts(store, tmp_path, settings, message):
    with pytest.raises(HearsaeError, match=message):
        train_on(config_for(store, tmp_path / "sae"), RankOptions(**settings))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_following_a_capture_from_before_its_store_exists_gives_what_the_finished_store_gives(tmp_path):
    store, site = tmp_path / "acts.zarr", "encoder.blocks.0"
    capture = [sys.executable, "-m", "cluster.cli", "cache", "--dataset", "micro", "--split", "test", "--model", "micro", "--no-ray"]
    capture += ["--sites", site, "--chunk-rows", "512", "--shard-rows", "1024", "--out", str(store)]
    settings = {"site": (site,), "d_sae": (64,), "batch": 256, "rows": 256 * 40, "follow": True, "buffer_mib": 1}
    live, later = (config_for(str(store), tmp_path / name, **settings) for name in ("live", "later"))
    following = subprocess.Popen(command_for(live, "--follow", "--json"), stdout=subprocess.PIPE, text=True)
    capturing = subprocess.Popen(capture, stdout=subprocess.DEVNULL)
    out, _ = following.communicate(timeout=240)
    assert following.returncode == 0 and capturing.wait(60) == 0
    (run,) = json.loads(out)["runs"]
    assert run["wait_fraction"] > 0 and run["rows"] == 256 * 40
    train(later)
    assert same_sae(live.out, later.out)


@pytest.mark.slow
def test_after_a_killed_driver_the_command_goes_on_with_any_number_of_workers(played, store, root, tmp_path):
    config = config_for(store, tmp_path / "sae")
    netns.call(kill_the_driver, command_for(config, "--workers", "2"), str(config.out), timeout=200)
    assert not (config.out / "train.json").exists()
    went_on_from = position_of(config.out / "checkpoint.safetensors")
    done = subprocess.run(command_for(config, "--json"), capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert json.loads(done.stdout)["runs"][0]["rows"] == BATCH * STEPS
    _, after = attempts(config.out)
    assert min(after) == went_on_from + BATCH
    np.testing.assert_allclose(curve(config.out), curve(root / "undisturbed"), rtol=0.02)
    assert not [*config.out.rglob("checkpoint.safetensors"), *config.out.glob("run.json")]
