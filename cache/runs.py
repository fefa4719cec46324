"""`STORE/runs/`: what every capture run did, for people, for `hearsae info`, and for other runs on the same store to see.

One JSON file a run, written when it starts, every few seconds while it goes on, and when it ends. Nothing depends on it: what is in a
store is told by its commit records alone, so a run that is killed leaves only a file that says it was running.
"""

import json
import os
import socket
import threading
import uuid
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any

from cache.errors import HearsaeError
from cache.header import software
from cache.location import put
from cache.store import ActivationStore

if TYPE_CHECKING:  # who only reads what runs did needs no PyTorch
    from cache.capture import ShardResult

WRITE_EVERY_SECONDS = 10
SILENT_AFTER_SECONDS = 60
"""A run that did not write for so long has ended, whatever its file says."""
LOOK_AT = 50
"""Most recent runs that `live_runs` reads."""
STAGES = ("decode", "compute", "write", "wait")


class RunLog:
    """Keeps the file of one run: `with RunLog(store, sites, pending) as log: log.add(result)`.

    A file that can't be written is no error: where the disk is full, the run itself says so.
    """

    def __init__(self, store: ActivationStore, sites: Sequence[str], pending: int, workers: int | None = None) -> None:
        now = datetime.now(UTC)
        self.name = f"{now:%Y%m%dT%H%M%S.%f}-{uuid.uuid4().hex[:8]}"
        self.facts: dict[str, Any] = {
            "run": self.name,
            "state": "running",
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": now.isoformat(timespec="seconds"),
            "sites": list(sites),
            "workers": workers,
            "shards_pending": pending,
            "software": software(),
        }
        self.counts = Counter[str](dict.fromkeys(("shards_computed", "shards_retried", "clips", "frames", "bytes_written", "skipped_clips"), 0))
        self.seconds = Counter[str](dict.fromkeys(STAGES, 0.0))
        self._path = store.path / "runs" / f"{self.name}.json"
        self._started = now
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._writer = threading.Thread(target=self._keep_writing, name="run-log", daemon=True)

    def add(self, result: "ShardResult") -> None:
        """Counts a shard. One that had been committed meanwhile, and so was left alone, counts for nothing."""
        with self._lock:
            of_shard = {"clips": result.clips, "frames": result.frames, "bytes_written": result.written, "skipped_clips": len(result.skipped)}
            self.counts.update(of_shard | {"shards_computed": int(result.computed), "shards_retried": int(result.attempts > 1)})
            self.seconds.update(result.seconds)

    def shares(self) -> str:
        """What the workers spent their time on: `compute 93 %, write 4 %, ...`."""
        total = sum(self.seconds.values()) or 1.0
        return ", ".join(f"{stage} {self.seconds[stage] / total:.0%}" for stage in STAGES)

    def summary(self) -> dict[str, Any]:
        """The file's content as of now."""
        now = datetime.now(UTC)
        seconds = (now - self._started).total_seconds()
        with self._lock:
            counts, by_stage = dict(self.counts), dict(self.seconds)
        rates = {f"{name}_per_s": counts[name] / max(seconds, 1e-9) for name in ("clips", "frames", "bytes_written")}
        when = {"updated": now.isoformat(timespec="seconds"), "seconds": seconds}
        return self.facts | when | counts | rates | {"seconds_by_stage": by_stage}

    def __enter__(self) -> "RunLog":
        self._write()
        self._writer.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._ended.set()
        self._writer.join()
        self.facts["state"] = "done" if kind is None else "failed" if issubclass(kind, Exception) else "interrupted"
        if isinstance(error, HearsaeError):
            self.facts["error"] = str(error)
        self._write()

    def _keep_writing(self) -> None:
        while not self._ended.wait(WRITE_EVERY_SECONDS):
            self._write()

    def _write(self) -> None:
        with suppress(HearsaeError):
            put(self._path, json.dumps(self.summary(), indent=1).encode())


def runs(store: ActivationStore, last: int = LOOK_AT) -> list[dict[str, Any]]:
    """The contents of the store's most recent run files, oldest first. Files that can't be read are left out."""
    folder = store.path / "runs"
    if not folder.is_dir():
        return []
    found = []
    names = sorted(path.name for path in folder.iterdir() if path.suffix == ".json" and not path.name.startswith("."))
    for path in (folder / name for name in names[-last:]):
        try:
            facts = json.loads(path.read_bytes())
        except (OSError, ValueError):
            continue
        if isinstance(facts, dict):
            found.append(facts)
    return found


def live_runs(store: ActivationStore) -> list[dict[str, Any]]:
    """Those of `runs` that are going on, as far as can be told."""
    return [facts for facts in runs(store) if facts.get("state") == "running" and _is_recent(facts) and not _has_died_here(facts)]


def _is_recent(facts: dict[str, Any]) -> bool:
    try:
        return (datetime.now(UTC) - datetime.fromisoformat(facts["updated"])).total_seconds() < SILENT_AFTER_SECONDS
    except (KeyError, TypeError, ValueError):
        return False


def _has_died_here(facts: dict[str, Any]) -> bool:
    if facts.get("host") != socket.gethostname() or not isinstance(facts.get("pid"), int):
        return False
    try:
        os.kill(facts["pid"], 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        pass
    return False
