"""`hearsae info --follow`: what it says of a store that grows, how little it reads, and how it ends."""

import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import fill_store, plan_of

from cache.progress import RECORDS_PER_LOOK, StoreProgress
from cache.store import ActivationStore
from cluster.cli import main

WIDTHS = {"encoder.blocks.0": 4, "encoder.blocks.1": 4}
PLAN = plan_of([1.28] * 10, shard_rows=64, chunk_rows=64)  # a clip of 64 frames in each of ten shards
FIRST = ["encoder.blocks.0"]


def commit(path: Path, shards: list[int], sites: list[str] | None = None, skip: dict[int, str] | None = None) -> ActivationStore:
    return fill_store(path, PLAN, {site: WIDTHS[site] for site in sites or WIDTHS}, lambda site, clip, n: 1.0, skip=skip, shards=shards)


def test_it_counts_what_is_committed_and_how_fast(tmp_path):
    now = [0.0]
    progress = StoreProgress(commit(tmp_path / "s", [0, 1]), clock=lambda: now[0])
    first = progress.look()
    assert (first["objects"], first["committed"], first["clips"], first["clips_complete"]) == (20, 4, 10, 2)
    assert (first["rows"], first["rows_planned"], first["rows_per_s"], first["seconds_left"]) == (256, 1280, None, None)
    commit(tmp_path / "s", [2], FIRST)
    now[0] = 8.0
    second = progress.look()
    assert (second["committed"], second["clips_complete"], second["rows"]) == (5, 2, 320)
    assert second["sites"] == {"encoder.blocks.0": {"shards": 10, "committed": 3}, "encoder.blocks.1": {"shards": 10, "committed": 2}}
    assert second["rows_per_s"] == pytest.approx(8.0) and second["seconds_left"] == pytest.approx(120.0)
    now[0] = 32.0  # nothing new: slower than it seemed
    assert progress.look()["rows_per_s"] == pytest.approx(2.0)
    commit(tmp_path / "s", [2, 3])
    now[0] = 100.0
    assert progress.look()["rows_per_s"] == pytest.approx(192 / 92)  # from the last commit before the minute, not from the beginning
    commit(tmp_path / "s", list(range(10)))
    assert progress.look()["committed"] == 20


def test_records_are_read_once_and_a_few_at_a_time(tmp_path, monkeypatch):
    store = commit(tmp_path / "s", [0, 1, 2], skip={1: "it is broken"})
    reads: list[tuple[str, int]] = []
    read = ActivationStore.record
    monkeypatch.setattr(ActivationStore, "record", lambda self, site, shard: (reads.append((site, shard)), read(self, site, shard))[1])
    monkeypatch.setattr("cache.progress.RECORDS_PER_LOOK", 4)
    progress = StoreProgress(store)
    assert progress.look()["records_read"] == len(reads) == 4 < RECORDS_PER_LOOK
    now = progress.look()
    assert now["records_read"] == 6 and now["skipped"] == 1
    progress.look()
    assert len(reads) == len(set(reads)) == 6


def test_sites_that_are_added_later_are_counted(tmp_path):
    progress = StoreProgress(commit(tmp_path / "s", [0], FIRST))
    assert progress.look()["objects"] == 10
    commit(tmp_path / "s", [0])
    now = progress.look()
    assert (now["objects"], now["committed"]) == (20, 2)


def test_it_says_each_change_and_ends_when_all_is_committed(tmp_path, capsys):
    commit(tmp_path / "s", [0])
    (tmp_path / "s" / "runs").mkdir()
    run: dict[str, Any] = {
        "state": "running",
        "host": "here",
        "started": "2026-01-01T00:00:00+00:00",
        "seconds_by_stage": {"compute": 3.0, "write": 1.0},
    }
    (tmp_path / "s" / "runs" / "20260101.json").write_text(json.dumps(run))

    def others() -> None:
        for shard in range(1, 10):
            time.sleep(0.05)
            commit(tmp_path / "s", [shard])

    thread = threading.Thread(target=others)
    thread.start()
    assert main(["info", str(tmp_path / "s"), "--follow", "--interval", "0.02", "--json"]) == 0
    thread.join()
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    counts = [line["committed"] for line in said]
    assert len(counts) > 2 and counts == sorted(set(counts)) and counts[-1] == said[-1]["objects"] == 20
    assert said[-1]["run"] == run and said[-1]["rows_per_s"] > 0
    assert main(["info", str(tmp_path / "s"), "--follow"]) == 0
    out = capsys.readouterr().out
    assert "20 of 20 shards and sites committed, 10 of 10 clips complete" in out and "running on here since" in out and "compute 75%" in out
    assert main(["info", str(tmp_path / "s")]) == 0
    assert "latest run: running on here" in capsys.readouterr().out


def test_ctrl_c_ends_it_without_a_word(tmp_path):
    commit(tmp_path / "s", [0])
    command = [sys.executable, "-m", "cluster.cli", "info", str(tmp_path / "s"), "--follow", "--interval", "0.1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        first = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        rest, err = process.communicate(timeout=30)
    assert first.startswith("2 of 20 shards and sites committed") and (process.returncode, rest, err) == (0, "", "")


def test_on_a_terminal_a_line_renews_itself(tmp_path):
    commit(tmp_path / "s", [0])
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "cluster.cli", "info", str(tmp_path / "s"), "--follow", "--interval", "0.05"]
    with subprocess.Popen(command, stdout=theirs, env=os.environ | {"COLUMNS": "60"}) as process:
        os.close(theirs)
        said = ""
        while said.count("\n") < 3:
            said += os.read(ours, 4096).decode()
        commit(tmp_path / "s", list(range(10)))
        while process.poll() is None or "20 of 20" not in said:
            try:
                said += os.read(ours, 4096).decode()
            except OSError:  # the other side is closed
                break
    os.close(ours)
    assert process.returncode == 0
    lines = said.replace("\r", "").splitlines()
    assert not lines[0].startswith("\x1b") and all(line.startswith("\x1b[1A\x1b[2K") for line in lines[1:])
    assert all(len(line.removeprefix("\x1b[1A\x1b[2K")) <= 59 for line in lines) and "20 of 20 shards" in lines[-1]


@pytest.mark.parametrize("interval", ["0", "-1"])
def test_an_interval_is_more_than_nothing(interval, tmp_path, capsys):
    commit(tmp_path / "s", [0])
    assert main(["info", str(tmp_path / "s"), "--follow", "--interval", interval]) == 1
    assert "--interval" in capsys.readouterr().err
