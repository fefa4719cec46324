"""Training: one pass over the rows of one or more stores, for one SAE or a grid of them.

`train` is the loop, from top to bottom; `sae.trainee.Trainee` is one SAE with all that its training step needs. Nothing draws random numbers once
the SAEs are initialised, and the order of the rows follows from the stream's seed and position, so a checkpoint is weights,
optimiser, counters and one position, and going on from it gives the same bits as never having stopped.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, fields
from functools import partial, reduce
from operator import add
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from cache.errors import HearsaeError
from cache.location import Location, put
from cache.model import choose_device, fast_matmul
from cache.store import ActivationStore
from sae.checkpoint import Checkpoint, load_checkpoint, refuse_difference, save_checkpoint
from sae.log import Log, open_log
from sae.metrics import EQUAL
from sae.models import Centre
from sae.plots import save_run_plots
from sae.ranks import ALONE, Ranks
from sae.stream import RowStream
from sae.train_config import TrainConfig, check_config, folders_of, make_grid, name_of, sites_of
from sae.trainee import Trainee

CHECKPOINT = "checkpoint.safetensors"
RUN = "run.json"
"""What the unfinished run in a folder is."""
RESULT = "train.json"
HOW_NOT_WHAT = ("store", "out", "device", "threads", "checkpoint_every", "log_every", "follow_timeout", "wandb", "plots", "quiet")
"""Settings that may differ when a run is continued; that the stores hold the same rows is checked by `RowStream.fingerprint`."""


class RunResult(NamedTuple):
    """One trained SAE. FVU, L0 and dead fraction are those of the last training batches: `evaluate` gives those of held-out rows."""

    dir: str
    site: str
    arch: str
    d_sae: int
    k: int
    seed: int
    rows: int
    seconds: float
    rows_per_s: float
    """Of the run, all its SAEs at once."""
    wait_fraction: float
    """Part of the time in which the loop waited for rows."""
    fvu: float
    l0: float
    dead_fraction: float
    target: str = ""
    sparsity: float = 0.0
    skipped_rows: int = 0
    """Rows that were not finite, counted each time they were read, since the last start."""


def train(
    config: TrainConfig,
    stores: Sequence[ActivationStore] | None = None,
    ranks: Ranks = ALONE,
    only: slice | None = None,
    on_rows: Callable[[int], None] = lambda position: None,
) -> list[RunResult]:
    """Trains every SAE of the grid and saves it; writes `train.json` with the config and the results, which it returns.

    stores: already open, in place of `config.store`.
    ranks: the processes that call this together. Each reads and computes a part of every batch; the first one writes.
    only: trains these SAEs of the grid and leaves them as checkpoints, returning nothing: once all are there, a call without it finishes.
    on_rows: called after each step with the rows consumed so far.
    Raises HearsaeError for settings that can't work, stores that can't be read, and another run's output in `config.out`.
    """
    check_config(config)
    device = choose_device(config.device)
    stores = _open_stores(config) if stores is None else stores
    lanes = ranks.once(partial(lanes_of_run, config, ranks.world))
    stream = _stream(config, stores, lanes, ranks)
    identity = _identity(config, stream)
    finished = ranks.once(partial(_begin, config.out, identity))
    if finished is not None:
        return finished

    started = time.perf_counter()
    with stream, _threads(config.threads), _matmul(config.precision, device), ExitStack() as stack:
        stream.start()
        centres = {site: _centre(stream, site) for site in stream.sites}
        centring = {site: (torch.from_numpy(centre.mean).float().to(device), float(centre.scale[0])) for site, centre in centres.items()}
        grid = make_grid(config, stores)
        trainees = [Trainee(sae, config, device, ranks) for sae in (grid if only is None else grid[only])]
        folders = folders_of(config.out, grid)[only or slice(None)]
        for_each = stack.enter_context(_side_by_side(len(trainees), device, ranks))
        steps = config.rows // config.batch

        earlier = [ranks.once(partial(load_checkpoint, folder / CHECKPOINT, identity)) or Checkpoint(0, 0.0, 0.0, ()) for folder in folders]
        for trainee, checkpoint in zip(trainees, earlier, strict=True):
            for state in checkpoint.states:
                trainee.load_state(state)
        first = min(checkpoint.position for checkpoint in earlier)
        stream.seek(first)

        def checkpoints() -> list[Checkpoint]:
            """Of each SAE, now, with the state of the first rank, which all ranks take up."""
            seconds, waited = time.perf_counter() - started, float(ranks.table(torch.tensor([stream.wait_seconds], device=device)).max())
            for trainee in trainees:
                ranks.copy_first(trainee.state().tensors.values())
            return [
                Checkpoint(stream.position, before.seconds + seconds, before.waited + waited, [trainee.state()])
                for before, trainee in zip(earlier, trainees, strict=True)
            ]

        def save() -> None:
            for folder, checkpoint in zip(folders, checkpoints(), strict=True):
                if ranks.first:
                    save_checkpoint(folder / CHECKPOINT, identity, checkpoint)

        checkpoints()
        with progress_bar(config, first) as bar:
            logs = [stack.enter_context(_log(config, *one)) for one in zip(folders, trainees, earlier, strict=True) if ranks.first]
            for step in range(first // config.batch, steps):
                rows = Rows(next(stream).rows, centring)
                rate = learning_rate_factor(step, steps, config.warmup, config.decay)
                behind = [i for i, checkpoint in enumerate(earlier) if checkpoint.position < stream.position]
                for_each(partial(_step, rows=rows, rate=rate, progress=step / steps), [trainees[i] for i in behind])

                bar.update(config.batch)
                on_rows(stream.position)
                last = step + 1 == steps
                if last or _passes(stream.position, config.batch, config.log_every):
                    bar.set_postfix(fvu=f"{trainees[0].mean('fvu'):.3f}")
                    rows_per_s = (stream.position - first) / (time.perf_counter() - started)
                    for i in behind if logs else ():
                        for name, value in (trainees[i].scalars(rate) | {"rows_per_s": rows_per_s}).items():
                            logs[i].add_scalar(name, value, stream.position)
                if not last and _passes(stream.position, config.batch, config.checkpoint_every):
                    for log in logs:
                        log.flush()
                    save()

        if only is not None:
            save()
            return []
        return ranks.once(partial(_finish, config, identity, folders, trainees, checkpoints(), centres, stream.skipped_rows))


def learning_rate_factor(step: int, steps: int, warmup: float, decay: float) -> float:
    """Rises linearly over the first part of the run, stays at 1, falls linearly over the last part; never 0 in a step."""
    rising = (step + 1) / max(1.0, warmup * steps)
    falling = (steps - step) / max(1.0, decay * steps)
    return min(1.0, rising, falling)


# Rows


class Rows:
    """A batch as training sees it: centred and scaled so that mean ||x||^2 = d, site by site."""

    def __init__(self, stored: dict[str, Tensor], centring: dict[str, tuple[Tensor, float]]) -> None:
        """stored: site -> float32 [rows, d], overwritten. centring: site -> (float32 [d] on the device to train on, scale)."""
        self._of: dict[tuple[str, ...], Tensor] = {}
        for site, x in stored.items():
            mean, scale = centring[site]
            self._of[(site,)] = x.to(mean.device).sub_(mean).mul_(scale)

    def of(self, sites: tuple[str, ...]) -> Tensor:
        """[rows, d]: those of several sites one beside the other."""
        if sites not in self._of:
            self._of[sites] = torch.cat([self._of[(site,)] for site in sites], dim=1)
        return self._of[sites]


def _centre(stream: RowStream, site: str) -> Centre:
    stats = stream.stats(site)
    if stats.mean_sq_dist <= EQUAL * float(stats.mean @ stats.mean):
        raise HearsaeError(f"all {stats.rows} rows of {site} are equal: there is nothing to learn")
    return Centre.of(stats.mean, math.sqrt(len(stats.mean) / stats.mean_sq_dist))


def _step(trainee: Trainee, rows: Rows, rate: float, progress: float) -> None:
    sae = trainee.sae.config
    trainee.step(rows.of(sae.sites), rows.of(sae.targets), rate, progress)


@contextmanager
def _side_by_side(saes: int, device: torch.device, ranks: Ranks) -> Iterator[Callable[[Callable[[Trainee], None], Sequence[Trainee]], None]]:
    """How to step the SAEs of a grid: on a CPU side by side, each in a thread of its own, which takes less time than sharing out each product."""

    def in_turn(step: Callable[[Trainee], None], trainees: Sequence[Trainee]) -> None:
        for trainee in trainees:
            step(trainee)

    threads = min(torch.get_num_threads(), saes)
    if threads == 1 or device.type != "cpu" or ranks.world > 1:
        yield in_turn
        return
    with _threads(1), ThreadPoolExecutor(threads, "sae") as pool:

        def side_by_side(step: Callable[[Trainee], None], trainees: Sequence[Trainee]) -> None:
            for _ in pool.map(step, trainees):
                pass

        yield side_by_side


def _log(config: TrainConfig, folder: Location, trainee: Trainee, earlier: Checkpoint) -> Log:
    settings = _settings(config) | asdict(trainee.sae.config)
    return open_log(folder, earlier.position, config.wandb, name_of(trainee.sae.config), settings)


# Where a run begins and ends


def _open_stores(config: TrainConfig) -> list[ActivationStore]:
    """Following, waits for each to be made."""
    return [ActivationStore.open(path, patience=config.follow_timeout if config.follow else 0.0) for path in config.store]


def lanes_of_run(config: TrainConfig, workers: int) -> int:
    """As many as asked for, or as the run in `out` has, or else one a worker."""
    for name in (RESULT, RUN):
        if config.lanes is None and (config.out / name).exists():
            return _read_identity(config.out / name).get("lanes", 1)
    return config.lanes or workers


def _stream(config: TrainConfig, stores: Sequence[ActivationStore], lanes: int, ranks: Ranks) -> RowStream:
    """The lanes of this rank: consecutive ones, so that the rows of all ranks, one after the other, are those of one process."""
    if ranks.world > lanes:
        raise HearsaeError(f"{ranks.world} workers can't share {lanes} lanes: use {lanes} --workers, or another --out with more --lanes")
    timeout_s = config.follow_timeout if config.follow else None
    return RowStream(
        stores,
        sites_of(config),
        config.batch,
        config.stream_seed,
        buffer_bytes=config.buffer_mib << 20,
        lanes=lanes,
        only=ranks.part(lanes),
        follow_timeout_s=timeout_s,
        skip_not_finite=config.not_finite == "skip",
    )


def _begin(out: Location, identity: dict[str, Any]) -> list[RunResult] | None:
    """Says in `out` which run this is. The results if it is finished."""
    if (out / RESULT).exists():
        refuse_difference(out / RESULT, _read_identity(out / RESULT), identity)
        return _read_results(out / RESULT)
    if (out / RUN).exists():
        refuse_difference(out / RUN, _read_identity(out / RUN), identity)
    else:
        put(out / RUN, _to_json({"identity": identity}))
    return None


def _finish(
    config: TrainConfig,
    identity: dict[str, Any],
    folders: Sequence[Location],
    trainees: Sequence["Trainee"],
    ends: Sequence[Checkpoint],
    centres: dict[str, Centre],
    skipped_rows: int,
) -> list[RunResult]:
    for folder, trainee, end in zip(folders, trainees, ends, strict=True):
        sae = trainee.sae.config
        read, wanted = (reduce(add, [centres[site] for site in sites]) for sites in (sae.sites, sae.targets))
        trainee.dictionary(rows=end.position).folded(read, wanted).save(folder)
    results = [
        _result(folder, trainee, end)._replace(skipped_rows=skipped_rows) for folder, trainee, end in zip(folders, trainees, ends, strict=True)
    ]
    put(config.out / RESULT, _to_json({"identity": identity, "config": _settings(config), "runs": [result._asdict() for result in results]}))
    for path in (config.out / RUN, *(folder / CHECKPOINT for folder in folders)):
        path.unlink(missing_ok=True)
    if config.plots:
        save_run_plots(config.out)
    return results


# Settings, results


def _identity(config: TrainConfig, stream: RowStream) -> dict[str, Any]:
    """What must agree for two runs to be one, as JSON gives it back."""
    settings = {name: value for name, value in _settings(config).items() if name not in HOW_NOT_WHAT}
    return json.loads(_to_json(settings | {"lanes": stream.lanes, "stored rows": stream.fingerprint()}))


def _settings(config: TrainConfig) -> dict[str, Any]:
    """The config's own fields: a command may have added to them."""
    return {field.name: getattr(config, field.name) for field in fields(TrainConfig)}


def _result(folder: Location, trainee: Trainee, end: Checkpoint) -> RunResult:
    sae = trainee.sae.config
    return RunResult(
        dir=str(folder),
        site=sae.site,
        arch=sae.arch,
        d_sae=sae.d_sae,
        k=sae.k,
        seed=sae.seed,
        rows=end.position,
        seconds=end.seconds,
        rows_per_s=end.position / end.seconds,
        wait_fraction=end.waited / end.seconds,
        fvu=trainee.mean("fvu"),
        l0=trainee.mean("l0"),
        dead_fraction=trainee.dead_fraction,
        target=sae.target,
        sparsity=sae.sparsity,
    )


def _read_results(path: Location) -> list[RunResult]:
    try:
        return [RunResult(**run) for run in json.loads(path.read_bytes())["runs"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HearsaeError(f"{path} is damaged ({error}): remove it to train again") from error


def _read_identity(path: Location) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_bytes())["identity"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HearsaeError(f"{path} is damaged ({error}): remove it to train again") from error


def _to_json(data: Any) -> bytes:
    return json.dumps(data, indent=1, default=str).encode()


# Round about the loop


@contextmanager
def _matmul(precision: str, device: torch.device) -> Iterator[None]:
    """On a CPU: bf16 matrix units where they may be used, else as fast as exact products are."""
    with fast_matmul():
        if precision == "bf16" and device.type == "cpu":
            torch.set_float32_matmul_precision("medium")
        yield


@contextmanager
def _threads(n: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def progress_bar(config: TrainConfig, done: int) -> "tqdm[Any]":
    """Of rows, on stderr where that is a terminal."""
    shown = sys.stderr.isatty() and not config.quiet
    return tqdm(total=config.rows // config.batch * config.batch, initial=done, unit="row", unit_scale=True, disable=not shown)


def _passes(position: int, batch: int, every: int) -> bool:
    """Whether the last batch reached or passed a multiple of `every`."""
    return position // every > (position - batch) // every
