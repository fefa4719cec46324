"""Capture on Ray Data: pending shards -> decoded audio (tasks, where that pays) -> a pool of workers that capture, write and commit.

Activations never travel: a worker writes its shard and sends back only what it came to. The driver keeps nothing that matters: whatever
dies, the commit records in the store say what is left to do. A worker that dies is started again and its shard given out again.
"""

import pickle
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from cache import micro
from cache.capture import CaptureConfig, Decoder, ShardAudio, ShardResult, Worker
from cache.errors import HearsaeError
from cache.model import model_names, split_random
from cluster.workers import WorkerOptions, import_ray, session

BLOCKS = 4000
"""Tasks of one run, at most: with more shards a task makes several of them, so that the driver's work does not grow."""
ATTEMPTS = 5
"""Times that a shard may take its worker down with it."""
DECODE_CPUS = 0.99
"""Not what a worker gets: Ray Data joins a task to the worker after it where both ask for the same."""
TRAVELLING_BYTES = 2**31 - 2**20
"""Of the decoded audio of a shard: Arrow's limit."""


class Pool(NamedTuple):
    """How many workers, and what each one gets."""

    smallest: int
    """To begin with."""
    largest: int
    """As the cluster grows."""
    cpus: int
    gpus: float
    decoders: int
    """Tasks that decode for the workers; 0: each worker decodes for itself."""


@dataclass(frozen=True)
class PoolOptions(WorkerOptions):
    """Where and how capture runs."""

    min_workers: int | None = None
    """Capture workers to begin with; more are added as the cluster has room for them, up to --workers. Default: as many as fit now."""
    cpus_per_worker: int = 1
    """Cores, and threads, of each worker. More workers of one core are quicker than few of many; their models need more memory."""
    decoders: int | None = None
    """Tasks that decode audio for the workers; 0: each worker decodes for itself. Default: 0 on CPUs; for GPUs, the cores that are left."""

    def check(self) -> None:
        super().check()
        for name in ("min_workers", "cpus_per_worker"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise HearsaeError(f"--{name.replace('_', '-')} {value} must be at least 1")
        if self.decoders is not None and self.decoders < 0:
            raise HearsaeError(f"--decoders {self.decoders} is negative")
        if self.min_workers and self.workers and self.min_workers > self.workers:
            raise HearsaeError(f"--min-workers {self.min_workers} is more than --workers {self.workers}")

    def pool(self, resources: dict[str, float], tasks: int, uses_gpu: bool = False) -> Pool:
        """The pool for so many tasks on a cluster of these resources. Raises HearsaeError where no worker fits."""
        gpus = self.gpus_per_worker if self.gpus_per_worker is not None else float(uses_gpu and resources.get("GPU", 0) >= 1)
        cores = int(resources.get("CPU", 1))
        fitting = max(1, cores // self.cpus_per_worker)
        if gpus:
            fitting = min(fitting, int(resources.get("GPU", 0) / gpus))
            if not fitting:
                raise HearsaeError(f"there is no GPU on this cluster for --gpus-per-worker {gpus:g}")
        largest = min(tasks, self.workers or max(fitting, self.min_workers or 1))
        smallest = min(largest, self.min_workers or fitting)
        # Workers that hold every core would wait for ever for audio that no core is left to decode.
        left = max(0, cores - min(largest, fitting) * self.cpus_per_worker)
        if self.decoders and not left:
            raise HearsaeError(f"--decoders {self.decoders}: the workers hold all {cores} cores; use fewer --workers")
        decoders = self.decoders if self.decoders is not None else left if gpus else 0
        return Pool(smallest, largest, self.cpus_per_worker, gpus, decoders)


def capture_shards(config: CaptureConfig, shards: Sequence[int], options: PoolOptions) -> Iterator[ShardResult]:
    """Yields the result of every shard as it is committed, in any order.

    Raises the HearsaeError that a shard raised; the other shards in flight are then given up, what they committed stays.
    """
    options.check()
    if not shards:
        return
    if options.no_ray:
        yield from map(Worker(config, options.cpus_per_worker).run, shards)
        return
    with session(options):
        for result in _on_ray(config, shards, options):
            if isinstance(result, HearsaeError):
                raise result
            yield result


def _on_ray(config: CaptureConfig, shards: Sequence[int], options: PoolOptions) -> Iterator[ShardResult | HearsaeError]:
    ray = import_ray()
    data = _ray_data()
    config = _from_anywhere(config)
    pool = options.pool(ray.cluster_resources(), len(shards), uses_gpu=config.device != "cpu")
    ledger = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(_Ledger).remote()
    pending = data.from_items([{"shard": shard} for shard in shards], override_num_blocks=min(len(shards), BLOCKS))
    if pool.decoders:
        pending = pending.map_batches(_Decode(config), batch_size=1, num_cpus=DECODE_CPUS, concurrency=pool.decoders)
    done = pending.map_batches(
        _CaptureActor,
        fn_constructor_args=(config, pool.cpus, ledger),
        batch_size=1,
        compute=data.ActorPoolStrategy(min_size=pool.smallest, max_size=pool.largest, max_tasks_in_flight_per_actor=2),
        num_cpus=pool.cpus,
        num_gpus=pool.gpus or None,
    )
    for batch in done.iter_batches(batch_size=None, prefetch_batches=0):
        yield from map(pickle.loads, batch["result"])


def _from_anywhere(config: CaptureConfig) -> CaptureConfig:
    """The same with full paths: workers of a cluster start in another folder."""

    def full(name: str, known: Sequence[str]) -> str:
        return str(Path(name).absolute()) if name not in known and Path(name).exists() else name

    _, model = split_random(config.model)
    model = config.model.removesuffix(model) + full(model, model_names())
    return replace(config, out=config.out.absolute(), dataset=full(config.dataset, [micro.NAME]), model=model)


class _Decode:
    """A stage of tasks: adds the decoded audio to shards."""

    def __init__(self, config: CaptureConfig) -> None:
        self.config = config

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        audio = [_decode(self.config, int(shard)) for shard in batch["shard"]]
        return {"shard": batch["shard"], "audio": audio}


def _decode(config: CaptureConfig, shard: int) -> bytes:
    try:
        audio: ShardAudio | HearsaeError = _decoder(config).run(shard)
    except HearsaeError as error:
        audio = error
    packed = pickle.dumps(audio, protocol=5)
    return packed if len(packed) < TRAVELLING_BYTES else pickle.dumps(None)  # the worker then decodes it itself


@lru_cache(maxsize=1)
def _decoder(config: CaptureConfig) -> Decoder:
    return Decoder(config)


class _CaptureActor:
    """The body of a capture worker: one process that holds the model."""

    def __init__(self, config: CaptureConfig, threads: int, ledger: Any) -> None:
        self._config, self._threads, self._ledger = config, threads, ledger
        self._worker: Worker | None = None
        self._metrics = _Metrics(str(config.out))
        self._free_since = time.perf_counter()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        audio = batch.get("audio", [pickle.dumps(None)] * len(batch["shard"]))
        return {"result": [pickle.dumps(self._run(int(shard), packed)) for shard, packed in zip(batch["shard"], audio, strict=True)]}

    def _run(self, shard: int, packed: bytes) -> ShardResult | HearsaeError:
        waited = time.perf_counter() - self._free_since
        try:
            audio = pickle.loads(packed)
            if isinstance(audio, HearsaeError):
                return audio
            attempts = import_ray().get(self._ledger.begin.remote(shard))
            if attempts > ATTEMPTS:
                return HearsaeError(f"a worker died {ATTEMPTS} times on shard {shard} (out of memory?): try fewer --workers")
            self._worker = self._worker or Worker(self._config, self._threads)
            result = self._worker.run(shard, audio)
            self._ledger.end.remote(shard)
            result = result._replace(attempts=attempts, seconds=result.seconds | {"wait": waited})
            self._metrics.count(result)
            return result
        except HearsaeError as error:
            return error
        finally:
            self._free_since = time.perf_counter()


class _Ledger:
    """Counts how often a shard was begun and not ended: one that kills every worker must not be tried for ever."""

    def __init__(self) -> None:
        self.begun: dict[int, int] = {}

    def begin(self, shard: int) -> int:
        """Which attempt this is, from 1."""
        self.begun[shard] = self.begun.get(shard, 0) + 1
        return self.begun[shard]

    def end(self, shard: int) -> None:
        self.begun.pop(shard, None)


class _Metrics:
    """What a worker did, as metrics that Ray exports to Prometheus."""

    def __init__(self, store: str) -> None:
        from ray.util.metrics import Counter

        def counter(name: str, what: str, *tags: str) -> Any:
            metric = Counter(f"hearsae_{name}", what, tag_keys=("store", *tags))
            metric.set_default_tags({"store": store})
            return metric

        self.of_result = {
            "clips": counter("clips", "Clips captured"),
            "frames": counter("frames", "Frames (20 ms) captured"),
            "written": counter("bytes_written", "Bytes of shard objects written"),
        }
        self.skipped = counter("skipped_clips", "Clips that could not be read")
        self.seconds = counter("stage_seconds", "Seconds of workers in decode, compute, write, and waiting for shards", "stage")

    def count(self, result: ShardResult) -> None:
        """Adds a shard. Ray's counters refuse to be increased by nothing."""
        for name, metric in self.of_result.items():
            if amount := getattr(result, name):
                metric.inc(amount)
        if result.skipped:
            self.skipped.inc(len(result.skipped))
        for stage, seconds in result.seconds.items():
            if seconds > 0:
                self.seconds.inc(seconds, tags={"stage": stage})


def _ray_data() -> Any:
    """`ray.data`, quiet: progress is shown by the command, and what goes wrong is raised."""
    import logging

    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for handler in logging.getLogger("ray.data").handlers:
        if not isinstance(handler, logging.FileHandler) and "File" not in type(handler).__name__:
            handler.setLevel(logging.CRITICAL)
    return ray.data
