"""`hearsae cache`."""

import sys
import time
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from tqdm import tqdm

from cache.capture import CaptureConfig, plan_capture, prepare, summarise
from cache.model import load_model
from cache.runs import RunLog, live_runs
from cluster.commands import Output, size
from cluster.pipeline import PoolOptions, capture_shards


@dataclass(frozen=True)
class Cache(Output, PoolOptions, CaptureConfig):
    """Run Whisper over a dataset and keep activations in a store. The same command again finishes what is missing."""

    dry_run: bool = False
    """Show what would be captured, and capture nothing."""

    def run(self) -> dict[str, Any]:
        return self._plan() if self.dry_run else run_capture(self, self)

    def _plan(self) -> dict[str, Any]:
        _, plan, sites = plan_capture(self, load_model(self.model, "cpu"))
        item = {"float16": 2, "float32": 4}[self.dtype]
        rows = {"frame": sum(plan.clips["n_frames"].to_pylist()), "token": sum(n or 0 for n in plan.clips["n_tokens"].to_pylist())}
        return {
            "clips": plan.clips.num_rows,
            "skipped": plan.skipped.num_rows,
            "hours": sum(plan.clips["duration_s"].to_pylist()) / 3600,
            "frames": rows["frame"],
            "shards": plan.axes["frame"].shards,
            "sites": {site.name: {"width": site.width, "bytes": rows[site.axis] * site.width * item} for site in sites},
        }

    def summary(self, result: dict[str, Any]) -> str:
        sites = [f"  {name}: width {site['width']}, {size(site['bytes'])}" for name, site in result["sites"].items()]
        if self.dry_run:
            size_of_set = f"{result['clips']} clips, {result['hours']:.2f} hours, {result['frames']} frames"
            head = f"{size_of_set} in {result['shards']} shards; {result['skipped']} skipped"
            return "\n".join([head, *sites])
        head = f"{result['store']}: {result['clips']} clips, {result['frames']} frames"
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
