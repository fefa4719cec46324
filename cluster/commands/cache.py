"""`hearsae cache`."""

import sys
import time
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from tqdm import tqdm

from cache.capture import CaptureConfig, prepare, summarise
from cache.runs import RunLog, live_runs
from cluster.commands import Output, context_text, deviation_text, size
from cluster.pipeline import PoolOptions, capture_shards
from cluster.price import price, price_text


@dataclass(frozen=True)
class Cache(Output, PoolOptions, CaptureConfig):
    """Run Whisper over a dataset and keep activations in a store. The same command again finishes what is missing."""

    dry_run: bool = False
    """Say what would be captured, how large it gets and how long it takes, and capture nothing."""

    calibrate: float = 10.0
    """Seconds for which --dry-run times the first clips on this machine, to estimate the whole; 0: no estimate."""
    price_per_hour: float | None = None
    """What a worker costs an hour (a machine's price over the workers that it runs): --dry-run prices the estimate."""

    def run(self) -> dict[str, Any]:
        if self.dry_run:
            return price(self, self.calibrate, self, self.price_per_hour)
        return run_capture(self, self)

    def summary(self, result: dict[str, Any]) -> str:
        if self.dry_run:
            return price_text(result)
        sites = [
            f"  {name}: width {site['width']}, {size(site['bytes'])}{deviation_text(result['deviation'].get(name))}"
            for name, site in result["sites"].items()
        ]
        head = f"{result['store']}: {result['clips']} clips, {result['frames']} frames{context_text(result['context'])}"
        done = f"{result['shards_computed']} of {result['shards']} shards computed in {result['seconds']:.1f} s"
        done += f"; {n} were given out again because their worker died" if (n := result["shards_retried"]) else ""
        reasons = result["skipped_reasons"]
        skipped = [f"{len(reasons)} skipped:", *(f"  {reason}" for reason in reasons[:10]), *(["  ..."] if len(reasons) > 10 else [])]
        return "\n".join([head, *sites, done, *(skipped if reasons else [])])


def run_capture(config: CaptureConfig, workers: PoolOptions) -> dict[str, Any]:
    """Plans, captures what is missing on workers, and returns the summary that `--json` prints."""
    start = time.perf_counter()
    workers.check()
    prepared = prepare(config)
    store, names = prepared.store, [site.name for site in prepared.sites]
    shards = list(prepared.pending)
    if not shards:
        return summarise(prepared, {"shards_computed": 0, "shards_retried": 0}, time.perf_counter() - start)
    kept = CaptureConfig(**{field.name: getattr(config, field.name) for field in fields(CaptureConfig)})
    frames = np.bincount(store.clips["shard"].to_numpy(), weights=store.clips["n_frames"].to_numpy())
    with RunLog(store, names, len(shards)) as log, _bar(int(frames[shards].sum())) as bar:
        others = [run for run in live_runs(store) if run["run"] != log.name]
        if others:
            print(_about_others(others), file=sys.stderr)
        if any(run["run"] < log.name for run in others):
            shards.reverse()  # the two meet in the middle
        for result in capture_shards(kept, shards, workers):
            log.add(result)
            bar.set_postfix_str(log.shares())
            bar.update(int(frames[result.shard]))
    of_run = {name: log.counts[name] for name in ("shards_computed", "shards_retried")}
    return summarise(prepared, of_run | {"run": log.name, "seconds_by_stage": dict(log.seconds)}, time.perf_counter() - start)


def _bar(frames: int) -> "tqdm[Any]":
    return tqdm(total=frames, desc="capture", unit="frame", unit_scale=True, file=sys.stderr, disable=not sys.stderr.isatty())


def _about_others(runs: list[dict[str, Any]]) -> str:
    who = ", ".join(f"process {run.get('pid')} on {run.get('host')} since {run.get('started')}" for run in runs)
    return f"hearsae: this store is being captured by {who} too: what one of the runs commits, the others leave alone"
