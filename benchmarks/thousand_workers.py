"""What a store of 100,000 shards asks of the driver: time and peak memory of every step that is not capture itself.

    python benchmarks/thousand_workers.py --out DIR|s3://BUCKET/NAME [--clips 1000000] [--shards 100000] [--pipeline 2000] [--steps plan ...]

Capture is made up: a worker writes a commit record with the store's own code, as if every row were zero, and no object. All else is
real: a manifest is planned, the store created, commits listed, the run resumed after half, summed up, and read by `info`, statistics,
the stream of training and the merging of scans. `--pipeline N` sends that many of the shards through the real Ray Data pipeline, whose
workers are made up too. Each step is a process of its own; memory is its largest resident set, of which what `imports` shows is there
before it does anything; CPU time, its start included, is what a busy machine leaves comparable. Prints a table, and one JSON object as the last line.
"""

import argparse
import functools
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

SITE, WIDTH = "encoder.blocks.0", 384
CHUNK_ROWS = 256
CLIP_SECONDS = (2.0, 8.0)
FEATURES = 8


class Case:
    """One run of this benchmark: where things are and how many."""

    def __init__(self, out: str, inputs: str, clips: int, shards: int, pipeline: int) -> None:
        from cache.location import location

        self.out, self.inputs = location(out), Path(inputs)
        self.clips, self.shards, self.pipeline = clips, shards, pipeline

    @property
    def config(self) -> Any:
        from cache.capture import CaptureConfig

        # Frames of a shard so that there are about as many shards as wanted: clips are whole, so some of it stays free.
        frames = self.clips / self.shards * 50 * sum(CLIP_SECONDS) / 2 + 50 * CLIP_SECONDS[1] / 2
        rows = max(1, round(frames / CHUNK_ROWS)) * CHUNK_ROWS
        model, dataset = str(self.inputs / "model.pt"), str(self.inputs / "clips.jsonl")
        return CaptureConfig(dataset, model, (SITE,), self.out, shard_rows=rows, chunk_rows=CHUNK_ROWS, device="cpu")

    def open(self) -> Any:
        from cache.store import ActivationStore

        return ActivationStore.open(self.out)


class MadeUpWorker:
    """In the place of `cache.capture.Worker`."""

    def __init__(self, config: Any, threads: int = 1) -> None:
        from cache.store import ActivationStore

        self.store = ActivationStore.open(config.out)

    def run(self, shard: int, audio: Any = None) -> Any:
        from cache.capture import ShardResult
        from cache.header import software
        from cache.store import CommitRecord, put

        spans = [self.store.planned_span("frame", clip) for clip in self.store.shard_clips(shard)]
        rows = sum(span.stop - span.start for span in spans)
        total = np.random.default_rng(shard).standard_normal(WIDTH)  # a record is as long as a real one
        seconds = {"decode": 0.1, "compute": 1.0, "write": 0.1}
        record = CommitRecord(SITE, shard, rows, 0, "00000000", total, float(rows), (), seconds, "made-up", software())
        put(self.store._record_path(SITE, shard), record.to_json())
        return ShardResult(shard, True, clips=len(spans), frames=rows)


def write_inputs(case: Case) -> dict[str, Any]:
    """A manifest with durations, and a Whisper of one block."""
    import torch
    from whisper.model import AudioEncoder, ModelDimensions

    case.inputs.mkdir(parents=True, exist_ok=True)
    seconds = np.random.default_rng(0).uniform(*CLIP_SECONDS, case.clips).round(2)
    with open(case.inputs / "clips.jsonl", "w") as file:
        for i, duration in enumerate(seconds.tolist()):
            file.write(json.dumps({"audio": f"speaker{i % 2000}/{i:07d}.flac", "duration": duration, "speaker": f"s{i % 2000}"}) + "\n")
    dims = ModelDimensions(80, 1500, WIDTH, 6, 1, 51864, 448, WIDTH, 6, 1)
    encoder = AudioEncoder(80, 1500, WIDTH, 6, 1)
    data = io.BytesIO()
    torch.save({"dims": vars(dims), "model_state_dict": {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}}, data)
    (case.inputs / "model.pt").write_bytes(data.getvalue())
    return {"manifest_bytes": (case.inputs / "clips.jsonl").stat().st_size}


def imports(case: Case) -> dict[str, Any]:
    for module in ("cache.capture", "cluster.pipeline", "sae.stream"):
        import_module(module)
    return {}


def plan(case: Case) -> dict[str, Any]:
    from cache.capture import plan_capture
    from cache.model import load_model

    _, planned, _ = plan_capture(case.config, load_model(case.config.model, "cpu"))
    return {"shards": planned.axes["frame"].shards, "hash": planned.summary()["hash"]}


def prepare(case: Case) -> dict[str, Any]:
    from cache.capture import prepare

    return {"pending": len(prepare(case.config).pending)}


def commit_half(case: Case) -> dict[str, Any]:
    return _commit(case, case.open().axis(SITE).shards // 2)


def commit_rest(case: Case) -> dict[str, Any]:
    return _commit(case, case.open().axis(SITE).shards)


def _commit(case: Case, stop: int) -> dict[str, Any]:
    worker, done = MadeUpWorker(case.config), set(case.open().committed(SITE))
    with ThreadPoolExecutor(16) as pool:
        return {"made": sum(result.computed for result in pool.map(worker.run, [shard for shard in range(stop) if shard not in done]))}


def pipeline(case: Case) -> dict[str, Any]:
    """Some of the shards through the real pipeline, on an embedded Ray."""
    import ray

    from cluster.pipeline import PoolOptions, capture_shards

    if not case.pipeline:
        return {}
    shards = list(case.open().pending([SITE]))[: case.pipeline]
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=256 << 20, log_to_driver=False,
             runtime_env={"worker_process_setup_hook": make_up_workers})  # fmt: skip
    start = time.perf_counter()
    made = sum(result.computed for result in capture_shards(case.config, shards, PoolOptions(workers=2)))
    return {"made": made, "shards_per_s": round(made / (time.perf_counter() - start), 1)}


def make_up_workers() -> None:
    import cluster.pipeline

    cluster.pipeline.Worker = MadeUpWorker  # type: ignore[misc, assignment]


def list_commits(case: Case) -> dict[str, Any]:
    store = case.open()
    return {"committed": len(store.committed(SITE)), "pending": len(store.pending([SITE]))}


def summary(case: Case) -> dict[str, Any]:
    from cache.capture import Prepared, summarise
    from cache.sites import Site

    return {"frames": summarise(Prepared(case.open(), [Site(SITE, "frame", WIDTH, 0)], {}), {}, 0.0)["frames"]}


def info(case: Case) -> dict[str, Any]:
    from cluster.commands.info import Info

    return {"rows": Info(store=case.out).run()["sites"][SITE]["rows"]}


def stats(case: Case) -> dict[str, Any]:
    return {"rows": case.open().stats(SITE).rows}


def stream(case: Case) -> dict[str, Any]:
    from sae.stream import RowStream

    with RowStream([case.open()], [SITE], batch=4096) as rows:
        return {"chunks": len(rows.chunks), "rows": rows.rows}


def merge_scans(case: Case) -> dict[str, Any]:
    """A tree of merges of as many ShardScans as there are shards, as the driver without Ray does it."""
    from analysis.scan import ScanOptions
    from cluster.shards import reduce_shards
    from cluster.workers import WorkerOptions

    merged = reduce_shards(functools.partial(made_up_scan, ScanOptions()), merge_two, range(case.shards), WorkerOptions(no_ray=True))
    assert merged is not None
    return {"shards": len(merged.shards), "rows": merged.rows}


def merge_two(a: Any, b: Any) -> Any:
    from analysis.scan import merge

    return merge(a, b)


def made_up_scan(options: Any, shard: int) -> Any:
    """The scan of a shard of 100 active frames."""
    from dataclasses import replace

    from analysis.grid import BINS
    from analysis.scan import Counts, empty

    rng = np.random.default_rng(shard)
    bins, counts = np.unique(rng.integers(0, FEATURES * BINS, 100), return_counts=True)
    none = empty(_Features(), options)
    top = none.top.copy()
    top["clip"][:, 0], top["value"][:, 0] = shard, rng.random(FEATURES)
    return replace(none, shards=(shard,), rows=100, bins=Counts(bins, counts), top=top)


class _Features:
    count = FEATURES


STEPS: dict[str, Callable[[Case], dict[str, Any]]] = {
    "inputs": write_inputs,
    "imports": imports,
    "plan": plan,
    "prepare": prepare,
    "commit_half": commit_half,
    "resume": prepare,
    "pipeline": pipeline,
    "commit_rest": commit_rest,
    "list": list_commits,
    "nothing_left": prepare,
    "summary": summary,
    "info": info,
    "stats": stats,
    "stream": stream,
    "merge_scans": merge_scans,
}


def run_step(name: str, case: Case) -> dict[str, Any]:
    start = time.perf_counter()
    found = STEPS[name](case)
    seconds, used = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    return {"seconds": round(seconds, 1), "cpu_s": round(used.ru_utime + used.ru_stime, 1), "peak_mb": round(used.ru_maxrss / 1024), **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="store to make; a folder or an address")
    parser.add_argument("--inputs", default=str(Path(tempfile.gettempdir()) / "thousand_workers"), help="folder for the manifest")
    parser.add_argument("--clips", type=int, default=1_000_000)
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--pipeline", type=int, default=2000, help="shards to send through Ray")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    case = Case(args.out, args.inputs, args.clips, args.shards, args.pipeline)
    if args.step:
        print(json.dumps(run_step(args.step, case)))
        return
    results = {}
    print(f"{'step':14} {'seconds':>8} {'CPU s':>8} {'peak MB':>8}   (load {os.getloadavg()[0]:.1f})", flush=True)
    for step in args.steps:
        sizes = ["--inputs", args.inputs, "--clips", str(args.clips), "--shards", str(args.shards), "--pipeline", str(args.pipeline)]
        done = subprocess.run([sys.executable, __file__, "--out", args.out, *sizes, "--step", step], stdout=subprocess.PIPE, text=True, check=True)
        results[step] = json.loads(done.stdout.splitlines()[-1])
        more = {key: value for key, value in results[step].items() if key not in ("seconds", "cpu_s", "peak_mb")}
        print(f"{step:14} {results[step]['seconds']:8.1f} {results[step]['cpu_s']:8.1f} {results[step]['peak_mb']:8}   {more}", flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
