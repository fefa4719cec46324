"""Training on Ray Train: every worker is a rank that computes its part of each batch, or trains its part of a grid alone.

Nothing is remembered here or in Ray: a run is its folder. Workers that start, for the first time, after a failure, or in another
number, go on from the checkpoints in it.
"""

import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from importlib import import_module
from typing import Any, Literal

from tqdm import tqdm

from cache.errors import HearsaeError
from cluster.workers import WorkerOptions, import_ray, session
from sae.ranks import Ranks
from sae.train import RESULT, lanes_of_run, progress_bar, train
from sae.train_config import TrainConfig, check_config, grid_size

TELL_EVERY_S = 1.0
"""Between two reports of a worker's progress."""
HUNG_AFTER_S = 1800
"""A rank waits so long for the others: Ray sees a dead one much earlier."""
A_DAY_S = 86_400
"""The same where a rank may be waiting for a shard."""


@dataclass(frozen=True)
class RankOptions(WorkerOptions):
    """Where and how training runs. Without --workers and --address: in this process."""

    min_workers: int | None = None
    """Start, and go on after a loss, with as few workers as this; more join as the cluster has room for them. Default: --workers."""
    spread: Literal["data", "saes"] = "data"
    """What workers share: data, each batch; saes, the SAEs of a grid, with no traffic between workers."""
    max_failures: int = 5
    """Times that the workers are started again, from the last checkpoint, after one of them died."""

    def check(self) -> None:
        super().check()
        if self.min_workers is not None and not 1 <= self.min_workers <= (self.workers or self.min_workers):
            raise HearsaeError(f"--min-workers {self.min_workers} must be at least 1 and at most --workers")
        if self.max_failures < 0:
            raise HearsaeError(f"--max-failures {self.max_failures} is negative")

    @property
    def in_this_process(self) -> bool:
        return self.no_ray or (self.address is None and (self.workers or 1) == 1)


def train_on(config: TrainConfig, options: RankOptions) -> list[Any]:
    """`sae.train.train` in this process or on workers, as `options` say. Raises HearsaeError, also where workers died too often."""
    options.check()
    config = TrainConfig(**{field.name: getattr(config, field.name) for field in fields(TrainConfig)})
    check_config(config)
    if not options.in_this_process and not (config.out / RESULT).exists():
        with session(options):
            _fit(config, options)
    return train(config)  # on workers, this only gathers what they left


def _fit(config: TrainConfig, options: RankOptions) -> None:
    """Returns when every SAE is trained: saved with its results, or, spread over workers, as a checkpoint at its end."""
    ray = import_ray()
    ray_train: Any = import_module("ray.train")
    ray_torch: Any = import_module("ray.train.torch")

    workers, gpus = _fitting(config, options, ray.cluster_resources())
    fewest = min(workers, options.min_workers or workers)
    device = config.device if gpus or config.device != "auto" else "cpu"
    # Workers have another working directory.
    shared = replace(config, device=device, quiet=True, store=tuple(path.absolute() for path in config.store), out=config.out.absolute())
    board = ray.remote(num_cpus=0)(_Board).remote()

    class StopOnRefusal(ray_train.UserCallback):
        """What hearsae refuses, it would refuse again: no other attempt."""

        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            refusal = ray.get(board.refusal.remote())
            if refusal is not None:
                raise refusal

    with tempfile.TemporaryDirectory(prefix="hearsae-train-") as folder:
        trainer = ray_torch.TorchTrainer(
            _work,
            train_loop_config={"config": shared, "spread": options.spread, "board": board},
            torch_config=ray_torch.TorchConfig(timeout_s=A_DAY_S if config.follow else HUNG_AFTER_S),
            scaling_config=ray_train.ScalingConfig(
                num_workers=workers if fewest == workers else (fewest, workers),
                use_gpu=gpus > 0,
                resources_per_worker={"CPU": 1} | ({"GPU": gpus} if gpus else {}),
            ),
            run_config=ray_train.RunConfig(
                name="hearsae",
                storage_path=folder,  # nothing is kept there: checkpoints are ours
                failure_config=ray_train.FailureConfig(max_failures=options.max_failures, controller_failure_limit=options.max_failures),
                callbacks=[StopOnRefusal()],
                logging_config=ray_train.LoggingConfig(log_level="CRITICAL"),
                # An embedded Ray's workers are all on this machine: what they tell each other stays in it.
                worker_runtime_env={"env_vars": {} if options.address else {"GLOO_SOCKET_IFNAME": "lo"}},
            ),
        )
        with progress_bar(config, 0) as bar:
            error = _while_it_runs(trainer.fit, lambda: _show(ray, bar, board, workers if options.spread == "saes" else 1))
    if error is None:
        return
    if not isinstance(error, ray_train.TrainingFailedError):
        raise error
    refusal = ray.get(board.refusal.remote())
    if refusal is not None:
        raise refusal
    reason = str(error).strip().splitlines()[-1].split(". ")[0]
    raise HearsaeError(
        f"training workers failed {options.max_failures + 1} times (--max-failures {options.max_failures}), at last with: {reason}; "
        "the same command goes on from the last checkpoint"
    ) from error


def _work(loop: dict[str, Any]) -> None:
    """The body of a worker."""
    ranks, config, board = Ranks.of_process_group(), loop["config"], loop["board"]
    told = 0.0

    def tell(position: int) -> None:
        nonlocal told
        if time.monotonic() - told >= TELL_EVERY_S:
            told = time.monotonic()
            board.tell.remote(ranks.rank, position)

    try:
        if loop["spread"] == "saes":
            train(config, only=slice(ranks.rank, None, ranks.world), on_rows=tell)
        else:
            train(config, ranks=ranks, on_rows=tell if ranks.first else lambda position: None)
    except HearsaeError as error:
        import_ray().get(board.refuse.remote(error))
        raise


class _Board:
    """The body of an actor that workers tell how far they are, and what they refuse to do."""

    def __init__(self) -> None:
        self._positions: dict[int, int] = {}
        self._refusal: HearsaeError | None = None

    def tell(self, rank: int, position: int) -> None:
        self._positions[rank] = position

    def refuse(self, error: HearsaeError) -> None:
        self._refusal = self._refusal or error

    def position(self) -> int:
        return sum(self._positions.values())

    def refusal(self) -> HearsaeError | None:
        return self._refusal


def _fitting(config: TrainConfig, options: RankOptions, resources: dict[str, float]) -> tuple[int, float]:
    """How many workers to start, and the GPUs of each. Raises HearsaeError where none fits."""
    gpus = options.gpus_per_worker
    if gpus is None:
        gpus = float(config.device != "cpu" and resources.get("GPU", 0) >= (options.workers or 1))
    fitting = int(resources.get("GPU", 0) / gpus) if gpus else int(resources.get("CPU", 1))
    if gpus and not fitting:
        raise HearsaeError(f"there is no GPU on this cluster for --gpus-per-worker {gpus:g}")
    workers = options.workers or max(1, fitting, options.min_workers or 1)
    most = grid_size(config) if options.spread == "saes" else lanes_of_run(config, workers)
    return min(workers, most), gpus


def _while_it_runs(function: Callable[[], Any], look: Callable[[], None]) -> Exception | None:
    """Calls a function in a thread, where Ray Train leaves Ctrl-C alone, and `look` meanwhile. Returns what it raised."""
    raised: list[Exception] = []

    def run() -> None:
        try:
            function()
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(TELL_EVERY_S)
        look()
    return raised[0] if raised else None


def _show(ray: Any, bar: "tqdm[Any]", board: Any, parts: int) -> None:
    if not bar.disable:
        bar.update(ray.get(board.position.remote()) / parts - bar.n)
