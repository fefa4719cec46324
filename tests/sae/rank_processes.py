"""Processes that are the ranks of a training run, on this machine and without Ray."""

import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist

from sae.ranks import Ranks

START = multiprocessing.get_context("forkserver")
START.set_forkserver_preload(["sae.train", "torch.distributed", "torch.utils.tensorboard"])
LONGEST_S = 120


def as_rank(rank: int, world: int, meeting: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls `function(ranks, *arguments)` as one of `world` processes that meet at the file `meeting`."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world, timeout=timedelta(seconds=LONGEST_S))
    try:
        return function(Ranks.of_process_group(), *arguments)
    finally:
        dist.destroy_process_group()


class RankPool:
    """Processes that stay: calling it runs a function on each of the first `world`, and returns what each returned."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self._pool = pool

    def __call__(self, world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        with tempfile.TemporaryDirectory() as folder:
            done: list[Future[Any]] = [self._pool.submit(as_rank, rank, world, f"{folder}/meeting", function, *arguments) for rank in range(world)]
            return [future.result(LONGEST_S) for future in done]


@contextmanager
def rank_pool(most: int) -> Iterator[RankPool]:
    with ProcessPoolExecutor(most, START) as pool:
        yield RankPool(pool)


def start_ranks(world: int, meeting: str, function: Callable[..., Any], *arguments: Any) -> list[BaseProcess]:
    """Processes of their own, to be killed."""
    processes: list[BaseProcess] = [START.Process(target=as_rank, args=(rank, world, meeting, function, *arguments)) for rank in range(world)]
    for process in processes:
        process.start()
    return processes
