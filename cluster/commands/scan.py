"""`hearsae scan`."""

import sys
import time
from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass, fields
from typing import Any

from tqdm import tqdm

from analysis.scan import ScanOptions, scan
from cache.location import Location
from cache.store import ActivationStore
from cluster.commands import Output
from cluster.shards import reduce_shards
from cluster.workers import WorkerOptions, session


@dataclass(frozen=True)
class _What:
    store: Location
    """The store to scan."""
    features: str
    """neurons:SITE, sae:DIR, pca:SITE (principal components of the site) or random:SITE (a random orthogonal basis of it)."""
    out: Location
    """Folder for the results."""


@dataclass(frozen=True)
class Scan(Output, WorkerOptions, ScanOptions, _What):
    """Find when every feature of a set is active and how strongly: strongest and most negative moments, examples of every
    level, histogram, how long it lasts, partners."""

    follow: bool = False
    """Scan a store that 'hearsae cache' is still writing, each shard as it is committed, until all are."""
    follow_timeout: float = 600.0
    """Seconds without a new shard after which --follow gives up."""

    def run(self) -> dict[str, Any]:
        return run_scan(self.store, self.features, self.out, self, self, self.follow_timeout if self.follow else None)

    def summary(self, result: dict[str, Any]) -> str:
        return f"{result['dir']}: {result['features']} features over {result['rows']} rows in {result['seconds']:.1f} s"


def run_scan(
    store_path: Location, spec: str, out: Location, options: ScanOptions, workers: WorkerOptions, follow: float | None = None
) -> dict[str, Any]:
    """Scans on workers and returns the summary that `--json` prints. follow: wait so many seconds for each next shard of a growing store."""
    start = time.perf_counter()
    kept = ScanOptions(**{field.name: getattr(options, field.name) for field in fields(ScanOptions)})
    store = ActivationStore.open(store_path.absolute(), patience=follow or 0.0)

    def mapper(function: Callable[[int], Any], merge: Callable[[Any, Any], Any], shards: Iterable[int]) -> Iterable[Any]:
        with tqdm(total=total(shards), desc=next(passes), unit="shard", file=sys.stderr, disable=not sys.stderr.isatty()) as bar:
            merged = reduce_shards(function, merge, shards, workers, bar.update)
        return [] if merged is None else [merged]

    def total(shards: Iterable[int]) -> int | None:
        return len(shards) if isinstance(shards, Sized) else None

    passes = iter(("scan", "phones"))
    with session(workers):
        done = scan(store, spec, out, kept, map_shards=mapper, follow=follow)
    return {"dir": str(out), "features": done.info["count"], "rows": done.info["rows"], "seconds": time.perf_counter() - start}
