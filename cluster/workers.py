"""Maps a function over shards: on Ray, embedded or of a cluster, or in this process. Results are the same either way.

A worker is one process with one thread that builds its function once (a loaded model, say) and is then handed shards. Nothing is
remembered here: a worker that dies is started again and its shard given out again.
"""

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from cache.errors import HearsaeError

Result = TypeVar("Result")
Make = Callable[[], Callable[[int], Result]]
"""Builds, in the worker, the function that makes one shard. Must be picklable."""

OBJECT_STORE_BYTES = 512 << 20
"""Of an embedded Ray: only small results travel through it."""
RETRIES = 3
"""Times that a shard is given out again after its worker died."""


@dataclass(frozen=True)
class WorkerOptions:
    """Where the work runs."""

    address: str | None = None
    """Ray cluster to use; default: an embedded local Ray that starts and stops by itself."""
    no_ray: bool = False
    """Work in this process, without Ray."""
    workers: int | None = None
    """Worker processes; default: one per core (or per GPU)."""
    gpus_per_worker: float | None = None
    """GPUs that each worker gets; default: one for a worker that can use it, where there are any."""


def map_shards(make: Make[Result], shards: Sequence[int], options: WorkerOptions, uses_gpu: bool = False) -> Iterator[Result]:
    """Yields the result of every shard as it is done, in any order.

    uses_gpu: a worker can make use of a GPU.
    Raises the HearsaeError that a shard raised; the other shards in flight are then given up, what they committed stays.
    """
    if options.workers is not None and options.workers < 1:
        raise HearsaeError(f"--workers {options.workers} must be at least 1")
    if not shards:
        return
    if options.no_ray:
        function = make()
        for shard in shards:
            yield function(shard)
    else:
        with session(options):
            yield from _on_ray(make, shards, options, uses_gpu)


class _ShardWorker:
    """The body of a Ray actor."""

    def __init__(self, make: Make[Any]) -> None:
        self._make = make
        self._function: Callable[[int], Any] | None = None

    def run(self, shard: int) -> Any:
        """The function's result, or the HearsaeError that it raised."""
        try:
            self._function = self._function or self._make()
            return self._function(shard)
        except HearsaeError as error:
            return error


@contextmanager
def session(options: WorkerOptions) -> Iterator[None]:
    """Keeps one Ray for several calls of `map_shards`; starts it if it does not run yet, and then stops it at the end."""
    if options.no_ray:
        yield
        return
    ray = _import_ray()
    starts_here = not ray.is_initialized()
    try:
        if starts_here:
            _start(ray, options)
        yield
    finally:
        if starts_here:
            ray.shutdown()


def _on_ray(make: Make[Result], shards: Sequence[int], options: WorkerOptions, uses_gpu: bool) -> Iterator[Result]:
    ray = _import_ray()
    resources = ray.cluster_resources()
    gpus = options.gpus_per_worker if options.gpus_per_worker is not None else float(uses_gpu and resources.get("GPU", 0) >= 1)
    actor = ray.remote(num_cpus=1, num_gpus=gpus)(_ShardWorker)
    shared = ray.put(make)
    waiting, deaths = list(reversed(shards)), Counter[int]()
    running: dict[Any, tuple[int, Any]] = {}

    def give(worker: Any) -> None:
        if waiting:
            shard = waiting.pop()
            running[worker.run.remote(shard)] = (shard, worker)

    for _ in range(min(len(shards), options.workers or _slots(resources, gpus))):
        give(actor.remote(shared))
    while running:
        (done,), _ = ray.wait(list(running), num_returns=1)
        shard, worker = running.pop(done)
        try:
            result = ray.get(done)
        except ray.exceptions.RayActorError as error:
            deaths[shard] += 1
            if deaths[shard] > RETRIES:
                raise HearsaeError(f"a worker died {deaths[shard]} times on shard {shard} (out of memory?): try fewer --workers") from error
            waiting.append(shard)
            give(actor.remote(shared))
            continue
        if isinstance(result, HearsaeError):
            raise result
        give(worker)
        yield result


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else Ray warns of a coming default at every start
    os.environ.setdefault("RAY_DISABLE_IMPORT_WARNING", "1")
    import ray

    return ray


def _start(ray: Any, options: WorkerOptions) -> None:
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    if options.address is None:
        cores = max(options.workers or 0, len(os.sched_getaffinity(0)))
        settings |= {"num_cpus": cores, "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES, "_node_ip_address": "127.0.0.1"}
    try:
        ray.init(address=options.address or "local", **settings)
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
        where = f"the Ray cluster at {options.address} can't be reached" if options.address else "an embedded Ray can't be started here"
        raise HearsaeError(f"{where} ({str(error).splitlines()[0]}); --no-ray works in this process") from error


def _slots(resources: dict[str, float], gpus: float) -> int:
    """How many workers fit into the cluster at once."""
    slots = int(resources.get("CPU", 1))
    if gpus:
        slots = min(slots, int(resources.get("GPU", 0) / gpus))
        if not slots:
            raise HearsaeError(f"there is no GPU on this cluster for --gpus-per-worker {gpus:g}")
    return max(1, slots)
