"""`hearsae scan`."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from analysis.scan import ScanOptions, ShardScan, scan
from cache.store import ActivationStore
from cluster.commands import Output, progress
from cluster.workers import WorkerOptions, map_shards


@dataclass(frozen=True)
class _What:
    store: Path
    """The store to scan."""
    features: str
    """neurons:SITE, sae:DIR or random:SITE (a random orthogonal basis of the site)."""
    out: Path
    """Folder for the results."""


@dataclass(frozen=True)
class Scan(Output, WorkerOptions, ScanOptions, _What):
    """Find when every feature of a set is active and how strongly: strongest moments, examples of every level, histogram."""

    def run(self) -> dict[str, Any]:
        return run_scan(self.store, self.features, self.out, self, self)

    def summary(self, result: dict[str, Any]) -> str:
        return f"{result['dir']}: {result['features']} features over {result['rows']} rows in {result['seconds']:.1f} s"


def run_scan(store_path: Path, spec: str, out: Path, options: ScanOptions, workers: WorkerOptions) -> dict[str, Any]:
    """Scans on workers and returns the summary that `--json` prints."""
    start = time.perf_counter()
    kept = ScanOptions(**{field.name: getattr(options, field.name) for field in fields(ScanOptions)})

    def mapper(function: Callable[[int], ShardScan], shards: Sequence[int]) -> Iterator[ShardScan]:
        return progress(map_shards(_Constant(function), shards, workers), len(shards), "scan", "shard")

    done = scan(ActivationStore.open(store_path), spec, out, kept, map_shards=mapper)
    return {"dir": str(out), "features": done.info["count"], "rows": done.info["rows"], "seconds": time.perf_counter() - start}


@dataclass(frozen=True)
class _Constant:
    """A worker's function that needs no building."""

    function: Callable[[int], ShardScan]

    def __call__(self) -> Callable[[int], ShardScan]:
        return self.function
