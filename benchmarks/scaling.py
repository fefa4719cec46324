"""Capture with one one-thread worker and with two: frames per second, and their ratio.

    python benchmarks/scaling.py [--model micro] [--dataset micro] [--sites encoder.blocks.2] [--shards 24] [--repeats 5] [--workers 1 2]

Rates are those between the first results and the last ones, when all workers work: what starts first (Ray, processes, models) is shown apart.
`plain` is the same work in as many processes without Ray: what the machine itself gives, whose cores may share parts or be lent to others.
Runs take turns, so that a change of the machine's load meets all alike; medians over the repeats. Prints a table, and one JSON object last.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cache.audio import open_source
from cache.capture import CaptureConfig, Worker, prepare
from cluster.pipeline import PoolOptions, capture_shards
from cluster.workers import session


class Run(NamedTuple):
    """One capture of all shards."""

    first_s: float
    """Until the first shard was done."""
    frames_per_s: float
    """While all workers worked."""


def with_ray(config: CaptureConfig, shards: Sequence[int], workers: int) -> Iterator[int]:
    return (result.frames for result in capture_shards(config, shards, PoolOptions(workers=workers)))


def plain(config: CaptureConfig, shards: Sequence[int], workers: int) -> Iterator[int]:
    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    processes = [context.Process(target=_work, args=(config, list(shards[i::workers]), results)) for i in range(workers)]
    for process in processes:
        process.start()
    for _ in shards:
        yield results.get()
    for process in processes:
        process.join()


def _work(config: CaptureConfig, shards: list[int], results: Any) -> None:
    worker = Worker(config)
    for shard in shards:
        results.put(worker.run(shard).frames)


KINDS: dict[str, Callable[[CaptureConfig, Sequence[int], int], Iterator[int]]] = {"ray": with_ray, "plain": plain}


def run(kind: str, config: CaptureConfig, workers: int) -> Run:
    shards = list(prepare(config).pending)
    start = time.perf_counter()
    done = [(time.perf_counter() - start, frames) for frames in KINDS[kind](config, shards, workers)]
    # Two results of every worker at either end: it may have begun later than the others, or had nothing left to do.
    steady = done[2 * workers : len(done) - 2 * workers]
    seconds = steady[-1][0] - done[2 * workers - 1][0]
    return Run(done[0][0], sum(frames for _, frames in steady) / seconds)


def repeated(dataset: str, split: str | None, shards: int, folder: Path) -> tuple[str, int]:
    """A manifest of the dataset's files, listed so often that there are enough shards; and rows per shard, of about eight clips."""
    files = [item for item in open_source(dataset, split).items() if hasattr(item, "n_samples")]
    root = Path(open_source(dataset, split).root)  # type: ignore[attr-defined]
    wanted = 8 * shards
    lines = [
        json.dumps({"audio": str(root / files[i % len(files)].source), "duration": files[i % len(files)].n_samples / 16000}) for i in range(wanted)
    ]
    (folder / "clips.jsonl").write_text("\n".join(lines))
    frames = [-(-files[i % len(files)].n_samples // 320) for i in range(wanted)]
    return str(folder / "clips.jsonl"), max(max(frames), round(sum(frames) / shards / 256 + 1) * 256) // 256 * 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="micro")
    parser.add_argument("--dataset", default="micro", help="a folder of audio")
    parser.add_argument("--split", default="train")
    parser.add_argument("--sites", nargs="+", default=["encoder.blocks.2"])
    parser.add_argument("--shards", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs=2, default=[1, 2])
    args = parser.parse_args()
    few, many = args.workers
    runs: dict[str, list[Run]] = {f"{kind} {workers}": [] for kind in KINDS for workers in args.workers}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch, session(PoolOptions(workers=many)):
        ray_start = time.perf_counter() - start
        manifest, rows = repeated(args.dataset, args.split, args.shards, Path(scratch))
        load_before = os.getloadavg()[0]
        for repeat in range(args.repeats):
            for kind in KINDS:
                for workers in args.workers:
                    out = Path(scratch) / f"{kind}-{workers}-{repeat}.zarr"
                    config = CaptureConfig(manifest, args.model, tuple(args.sites), out, shard_rows=rows, chunk_rows=256, device="cpu")
                    runs[f"{kind} {workers}"].append(run(kind, config, workers))
    print(f"Ray starts in {ray_start:.1f} s; load before {load_before:.1f}, after {os.getloadavg()[0]:.1f}")
    print(f"{'':10} {'first shard':>12} {'frames/s':>10}   of {args.repeats} runs")
    for name, of_kind in runs.items():
        each = ", ".join(f"{one.frames_per_s:.0f}" for one in of_kind)
        print(f"{name:10} {statistics.median(one.first_s for one in of_kind):10.1f} s {_rate(of_kind):10.0f}   {each}")
    ratios = {kind: _rate(runs[f"{kind} {many}"]) / _rate(runs[f"{kind} {few}"]) for kind in KINDS}
    print(f"{few} -> {many} workers: " + ", ".join(f"{kind} {ratio:.2f}x" for kind, ratio in ratios.items()))
    print(
        json.dumps({"ratios": ratios, "ray_start_s": ray_start, "runs": {name: [one._asdict() for one in of_kind] for name, of_kind in runs.items()}})
    )


def _rate(of_kind: list[Run]) -> float:
    return statistics.median(one.frames_per_s for one in of_kind)


if __name__ == "__main__":
    main()
