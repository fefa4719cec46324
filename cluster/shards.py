"""Maps a function over shards and merges what comes out: as Ray tasks with a tree of merges, or in this process. The result is the same."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import reduce
from typing import Any, TypeVar

from cache.errors import HearsaeError
from cluster.workers import WorkerOptions, import_ray, session

Result = TypeVar("Result")

FAN_IN = 8
"""Results that are merged at once."""
RETRIES = 5
"""Times that a shard may take its worker down with it."""


def reduce_shards(
    function: Callable[[int], Result],
    merge: Callable[[Result, Result], Result],
    shards: Iterable[int],
    options: WorkerOptions,
    done: Callable[[int], object] = lambda shards: None,
) -> Result | None:
    """merge(function(shard), ...) over all shards; None without any.

    merge: associative and commutative. On Ray only the last merge's result comes to the driver: its memory does not grow with the shards.
    shards: taken as workers become free, so that an iterator may wait for shards that are not there yet.
    done: told how many shards were just finished.
    Raises the HearsaeError that a shard or a merge raised.
    """
    with session(options):
        if options.no_ray:
            return _here(function, merge, shards, done)
        return _on_ray(function, merge, iter(shards), options, done)


def _here(function: Callable[[int], Any], merge: Callable[[Any, Any], Any], shards: Iterable[int], done: Callable[[int], object]) -> Any:
    merged = None
    for shard in shards:
        result = function(shard)
        merged = result if merged is None else merge(merged, result)
        done(1)
    return merged


def _on_ray(
    function: Callable[[int], Any], merge: Callable[[Any, Any], Any], shards: Iterator[int], options: WorkerOptions, done: Callable[[int], object]
) -> Any:
    ray = import_ray()
    scan = ray.remote(num_cpus=1, num_returns=2, max_retries=RETRIES)(_one)
    join = ray.remote(num_cpus=1, num_returns=2, max_retries=RETRIES)(_join)
    shared_function, shared_merge = ray.put(function), ray.put(merge)
    at_once = options.workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
    running: dict[Any, tuple[int, Any]] = {}  # error of a task -> how deep in the tree it is, and its result
    waiting: dict[int, list[Any]] = defaultdict(list)  # depth -> results to be merged
    more = True
    while True:
        while more and len(running) < at_once:
            shard = next(shards, None)
            more = shard is not None
            if more:
                error, result = scan.remote(shared_function, shard)
                running[error] = (0, result)
        if not running and (last := _last_merge(waiting)):
            depth, results = last
            error, result = join.remote(shared_merge, *results)
            running[error] = (depth + 1, result)
        if not running:
            break
        (finished,), _ = ray.wait(list(running), num_returns=1)
        depth, result = running.pop(finished)
        _raise(ray, finished)
        done(int(depth == 0))
        waiting[depth].append(result)
        if len(waiting[depth]) == FAN_IN:
            error, result = join.remote(shared_merge, *waiting.pop(depth))
            running[error] = (depth + 1, result)
    return next((ray.get(results[0]) for results in waiting.values() if results), None)


def _last_merge(waiting: dict[int, list[Any]]) -> tuple[int, list[Any]] | None:
    """What is left to be merged once all shards are done: everything, in pieces that a task can take. None if it is one result."""
    left = [(depth, result) for depth in sorted(waiting) for result in waiting[depth]]
    if len(left) < 2:
        return None
    waiting.clear()
    for depth, result in left[FAN_IN:]:
        waiting[depth].append(result)
    return left[:FAN_IN][-1][0], [result for _, result in left[:FAN_IN]]


def _one(function: Callable[[int], Any], shard: int) -> tuple[HearsaeError | None, Any]:
    try:
        return None, function(shard)
    except HearsaeError as error:
        return error, None


def _join(merge: Callable[[Any, Any], Any], *results: Any) -> tuple[HearsaeError | None, Any]:
    try:
        return None, reduce(merge, results)
    except HearsaeError as error:
        return error, None


def _raise(ray: Any, finished: Any) -> None:
    """Raises what a task that has finished has to say."""
    try:
        error = ray.get(finished)
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError, ray.exceptions.NodeDiedError) as crash:
        raise HearsaeError(f"a worker died {RETRIES + 1} times on the same shard (out of memory?): try fewer --workers") from crash
    if error is not None:
        raise error
