"""What runs leave in a store about themselves, and what other runs make of it."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
from conftest import fill_store, plan_of

from cache.capture import ShardResult
from cache.errors import HearsaeError
from cache.runs import SILENT_AFTER_SECONDS, RunLog, live_runs, runs
from cache.store import ActivationStore, Skip

SITE = "encoder.blocks.0"


@pytest.fixture
def store(tmp_path) -> ActivationStore:
    plan = plan_of([1.0, 2.0], chunk_rows=64)
    return fill_store(tmp_path / "acts.zarr", plan, {SITE: 4}, lambda site, clip, n: np.ones((n, 4)))


def file_of(store: ActivationStore, log: RunLog) -> dict:
    return json.loads((store.path / "runs" / f"{log.name}.json").read_bytes())


def rewrite(store: ActivationStore, log: RunLog, **facts) -> None:
    path = store.path / "runs" / f"{log.name}.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | facts))


def test_a_run_says_what_it_came_to(store):
    with RunLog(store, [SITE], pending=3, workers=2) as log:
        before = file_of(store, log)
        log.add(ShardResult(0, True, 1, 5, 700, 11_200, (), {"decode": 0.5, "compute": 4.0, "write": 0.25, "wait": 1.0}))
        log.add(ShardResult(1, True, 2, 4, 600, 9_600, (Skip(8, "noise"),), {"decode": 0.5, "compute": 3.0, "write": 0.25, "wait": 0.0}))
        log.add(ShardResult(2, False))
    assert (before["state"], before["shards_computed"], before["shards_pending"]) == ("running", 0, 3)
    after = file_of(store, log)
    counts = {name: after[name] for name in ("shards_computed", "shards_retried", "clips", "frames", "bytes_written", "skipped_clips")}
    assert counts == {"shards_computed": 2, "shards_retried": 1, "clips": 9, "frames": 1300, "bytes_written": 20_800, "skipped_clips": 1}
    assert after["seconds_by_stage"] == {"decode": 1.0, "compute": 7.0, "write": 0.5, "wait": 1.0}
    assert (after["state"], after["pid"], after["host"], after["workers"]) == ("done", os.getpid(), socket.gethostname(), 2)
    assert after["frames_per_s"] == pytest.approx(1300 / after["seconds"])
    assert log.shares() == "decode 11%, compute 74%, write 5%, wait 11%"


@pytest.mark.parametrize(("error", "state"), [(HearsaeError("the disk is full"), "failed"), (KeyboardInterrupt(), "interrupted")])
def test_a_run_that_ends_badly_says_so(store, error, state):
    with pytest.raises(type(error)), RunLog(store, [SITE], 1) as log:
        raise error
    assert file_of(store, log)["state"] == state
    assert file_of(store, log).get("error") == (str(error) or None)


def test_runs_come_in_order_and_damaged_files_are_left_out(store):
    assert runs(store) == []
    names = []
    for _ in range(3):
        with RunLog(store, [SITE], 1) as log:
            names.append(log.name)
    (store.path / "runs" / "20990101T000000.json").write_text('{"run"')
    (store.path / "runs" / "20990102T000000.json").write_text("[1]")
    assert [facts["run"] for facts in runs(store)] == names
    assert [facts["run"] for facts in runs(store, last=4)] == names[1:]


def test_only_runs_that_go_on_are_live(store):
    with RunLog(store, [SITE], 1):
        pass
    with RunLog(store, [SITE], 1) as running:
        assert [facts["run"] for facts in live_runs(store)] == [running.name]
        rewrite(store, running, updated="2020-01-01T00:00:00+00:00")
        assert live_runs(store) == [], f"silent for more than {SILENT_AFTER_SECONDS} s"
        rewrite(store, running, updated="yesterday")
        assert live_runs(store) == []


def test_a_run_whose_process_is_gone_is_not_live(store):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    with RunLog(store, [SITE], 1) as log:
        rewrite(store, log, pid=gone.pid)
        assert live_runs(store) == []
        rewrite(store, log, host="elsewhere")
        assert [facts["run"] for facts in live_runs(store)] == [log.name], "a process of another machine can't be looked for here"
        rewrite(store, log, host=socket.gethostname(), pid=2**80)
        assert len(live_runs(store)) == 1


def test_a_file_that_cannot_be_written_stops_nothing(store):
    (store.path / "runs").write_text("in the way")
    with RunLog(store, [SITE], 1) as log:
        log.add(ShardResult(0, True))
    assert log.counts["shards_computed"] == 1
