"""`hearsae cache`."""

import sys
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from tqdm import tqdm

from cache.capture import CaptureConfig, Worker, plan_capture, prepare, summarise
from cache.model import load_model
from cluster.commands import Output, size
from cluster.workers import Make, WorkerOptions, map_shards


@dataclass(frozen=True)
class Cache(Output, WorkerOptions, CaptureConfig):
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
        reasons = result["skipped_reasons"]
        skipped = [f"{len(reasons)} skipped:", *(f"  {reason}" for reason in reasons[:10]), *(["  ..."] if len(reasons) > 10 else [])]
        return "\n".join([head, *sites, done, *(skipped if reasons else [])])


def run_capture(config: CaptureConfig, workers: WorkerOptions) -> dict[str, Any]:
    """Plans, captures what is missing on workers, and returns the summary that `--json` prints."""
    start = time.perf_counter()
    prepared = prepare(config)
    shards = list(prepared.pending)
    clips = prepared.store.clips
    frames = np.bincount(clips["shard"].to_numpy(), weights=clips["n_frames"].to_numpy())
    make: Make[Any] = partial(_worker, config)
    results = []
    with tqdm(
        total=int(frames[shards].sum()), desc="capture", unit="frame", unit_scale=True, file=sys.stderr, disable=not sys.stderr.isatty()
    ) as bar:
        for result in map_shards(make, shards, workers, uses_gpu=config.device != "cpu"):
            results.append(result)
            bar.update(int(frames[result.shard]))
    return summarise(prepared, results, time.perf_counter() - start)


def _worker(config: CaptureConfig) -> Any:
    return Worker(config).run
