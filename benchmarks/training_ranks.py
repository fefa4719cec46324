"""Rows per second of training with one and with two one-thread ranks, and how much of the time they wait for rows.

`python benchmarks/training_ranks.py [--d-in 384] [--d-sae 3072] [--rows 200000] [--runs 3]`, on a machine with two idle cores. No Ray:
two processes and gloo on loopback, which is what Ray Train sets up. Both learn the same from the same two lanes. Runs are interleaved,
and every figure is given, because a shared machine's speed wanders. Rows per CPU second of the busier rank do not depend on what else
runs: they are what two idle cores could reach if no rank ever waited for the other.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from cache.header import Header
from cache.plan import SourceItem, make_plan
from cache.sites import Site
from cache.store import ActivationStore
from sae.ranks import Ranks
from sae.train import train
from sae.train_config import TrainConfig

SITE = "encoder.blocks.0"


def made_up_store(path: Path, d_in: int, hours: float = 1.0) -> Path:
    """Gaussian rows: speed does not depend on what they are."""
    plan = make_plan([SourceItem(f"s{i}.wav", 0, 30 * 16000) for i in range(round(hours * 120))])
    model = {"name": "made-up", "sha256": "0" * 64, "dims": {}, "has_decoder": False}
    site = Site(SITE, "frame", d_in, 0)
    store = ActivationStore.create(path, Header(model=model, dataset={}, axes=plan.axes, plan=plan.summary()), plan, [site])
    rng = np.random.default_rng(0)
    for shard in range(plan.axes["frame"].shards):
        store.write_shard(SITE, shard, rng.standard_normal((plan.axes["frame"].shard_rows, d_in), np.float32).astype(np.float16), [], {})
    return path


def rank(number: int, world: int, meeting: str, config: TrainConfig) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=number, world_size=world)
    before = time.process_time()
    train(config, ranks=Ranks(number, world))
    Path(f"{meeting}-{number}.json").write_text(json.dumps(config.rows / (time.process_time() - before)))
    if world > 1:
        dist.destroy_process_group()


def measure(world: int, config: TrainConfig, folder: Path) -> dict[str, float]:
    start = multiprocessing.get_context("spawn")
    processes = [
        start.Process(target=rank, args=(number, world, str(folder / "meeting"), replace(config, out=folder / "sae"))) for number in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    run = json.loads((folder / "sae" / "train.json").read_text())["runs"][0]
    per_cpu_s = min(json.loads((folder / f"meeting-{number}.json").read_text()) for number in range(world))
    return {name: run[name] for name in ("rows_per_s", "wait_fraction", "fvu")} | {"rows_per_cpu_s": per_cpu_s}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--d-in", type=int, default=384)
    parser.add_argument("--d-sae", type=int, default=3072)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        store = made_up_store(Path(root) / "acts.zarr", options.d_in)
        config = TrainConfig((store,), (SITE,), Path(), (options.d_sae,), rows=options.rows, batch=options.batch, lanes=2, threads=1, quiet=True)
        figures: dict[int, list[dict[str, float]]] = {1: [], 2: []}
        for number in range(options.runs):
            for world, found in figures.items():
                folder = Path(root) / f"{number}-{world}"
                folder.mkdir()
                found.append(measure(world, config, folder))
                print(world, "ranks:", ", ".join(f"{name} {value:.4g}" for name, value in found[-1].items()), flush=True)
        for name in ("rows_per_s", "rows_per_cpu_s"):
            print(f"2 ranks / 1 rank, {name}:", ", ".join(f"{two[name] / one[name]:.2f}" for one, two in zip(*figures.values(), strict=True)))


if __name__ == "__main__":
    main()
