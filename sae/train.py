"""Training: one pass over the rows of one or more stores, for one SAE or a grid of them.

`train` is the loop, from top to bottom; `Trainee` is one SAE with all that its training step needs. Nothing draws random numbers once
the SAEs are initialised, and the order of the rows follows from the stream's seed and position, so a checkpoint is weights,
optimiser, counters and one position, and going on from it gives the same bits as never having stopped.
"""

import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import product
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from cache.errors import HearsaeError
from cache.location import Location, put
from cache.model import choose_device, fast_matmul
from cache.store import ActivationStore, SiteStats
from sae.checkpoint import Checkpoint, State, load_checkpoint, refuse_difference, save_checkpoint
from sae.log import open_log
from sae.models import Centre, Dictionary, SaeConfig
from sae.ranks import ALONE, Ranks
from sae.sparse import SparseRows, autoencode, select_above, select_batch_topk, select_batch_topk_of_ranks, select_topk
from sae.stream import RowStream

CHECKPOINT = "checkpoint.safetensors"
RUN = "run.json"
"""What the unfinished run in a folder is."""
RESULT = "train.json"
DECODER_TURN = 0.08
"""Default learning rate times sqrt(d_in): about the angle in radians by which a step of Adam turns a unit decoder row. On tiny.en's
block 2 (d_sae 3072, k 32, 1 M rows) 0.047, 0.067, 0.094 and 0.19 gave test FVU 0.211, 0.192, 0.177 and 0.165; 0, 0, 0.3 and 30 % dead."""
RUNNING_DECAY = 0.9
"""Of the running means of threshold, FVU and L0: they follow about the last ten batches."""
HOW_NOT_WHAT = ("store", "out", "device", "threads", "checkpoint_every", "log_every", "follow_timeout", "quiet")
"""Settings that may differ when a run is continued; that the stores hold the same rows is checked by `RowStream.fingerprint`."""


@dataclass(frozen=True)
class TrainConfig:
    """Train sparse autoencoders on stored activations. Several sites, widths, sparsities or seeds make a grid, trained in one pass.

    The same command again continues from the last checkpoint; a finished run is left alone.
    """

    store: tuple[Location, ...]
    """Activation stores to train on, captured from the same Whisper."""
    site: tuple[str, ...]
    """Sites whose rows to learn, one SAE each."""
    out: Location
    """Folder for the SAE (of a grid: one folder per SAE in it), train.json and TensorBoard logs."""
    d_sae: tuple[int, ...] = (3072,)
    """Numbers of latents."""
    k: tuple[int, ...] = (32,)
    """Latents kept per row (batchtopk: on average). Not for relu."""
    arch: Literal["batchtopk", "topk", "relu"] = "batchtopk"
    """Architecture."""
    seed: tuple[int, ...] = (0,)
    """Seeds of the initial weights."""
    rows: int = 4_000_000
    """Rows to train on; a store with fewer is read several times."""
    batch: int = 4096
    """Rows per step."""
    lr: float | None = None
    """Highest learning rate of Adam. Default: 0.08 / sqrt(d_in)."""
    warmup: float = 0.02
    """First part of the run, over which the learning rate rises from 0."""
    decay: float = 0.3
    """Last part of the run, over which the learning rate falls to 0."""
    l1: float = 2.0
    """Coefficient of the L1 norm beside the squared error, for rows of mean squared norm d_in (relu only)."""
    aux: float = 1 / 32
    """Coefficient of the AuxK loss, which brings dead latents back (2406.04093)."""
    dead_after: int = 100_000
    """Rows after which a latent that did not fire counts as dead."""
    clip_norm: float = 1.0
    """Largest norm of the gradient of one SAE."""
    stream_seed: int = 0
    """Seed of the order of the rows, the same for every SAE of a grid."""
    buffer_mib: int = 256
    """Size of the buffer in which rows are mixed; two of them are in memory."""
    lanes: int | None = None
    """Independent parts of the row stream, each a part of every batch: as many workers as this can share the work, and any number of
    them learns the same. Default: the number of workers at the first start."""
    follow: bool = False
    """Start while the stores are still being written: wait for shards as they are needed. The first epoch takes them in order."""
    follow_timeout: float = 600.0
    """Seconds to wait for any new shard before giving up (with --follow)."""
    checkpoint_every: int = 1_000_000
    """Rows between checkpoints."""
    log_every: int = 50_000
    """Rows between entries of the TensorBoard log."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes a GPU if there is one."""
    threads: int | None = None
    """CPU threads. Default: as PyTorch chooses."""
    quiet: bool = False
    """Shows no progress bar."""


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
    wait_fraction: float
    """Part of the time in which the loop waited for rows."""
    fvu: float
    l0: float
    dead_fraction: float


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
    with stream, _threads(config.threads), fast_matmul():
        stats = {site: stream.stats(site) for site in config.site}
        for site, stat in stats.items():
            if stat.mean_sq_dist <= 1e-12 * float(stat.mean @ stat.mean):
                raise HearsaeError(f"all {stat.rows} rows of {site} are equal: there is nothing to learn")
        centre = {site: torch.from_numpy(stats[site].mean).float().to(device) for site in config.site}
        scale = {site: math.sqrt(len(centre[site]) / stats[site].mean_sq_dist) for site in config.site}
        grid = _grid(config, stores)
        trainees = [Trainee(sae, config, device, ranks) for sae in (grid if only is None else grid[only])]
        folders = _folders(config.out, grid)[only or slice(None)]
        buffer = torch.empty(config.batch * max(config.d_sae), device=device)
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
        with progress_bar(config, first) as bar, ExitStack() as stack:
            logs = [stack.enter_context(open_log(folder, done.position)) for folder, done in zip(folders, earlier, strict=True) if ranks.first]
            for step in range(first // config.batch, steps):
                rows = {site: (x.to(device) - centre[site]) * scale[site] for site, x in next(stream).rows.items()}
                rate = learning_rate_factor(step, steps, config.warmup, config.decay)
                behind = [i for i, checkpoint in enumerate(earlier) if checkpoint.position < stream.position]
                for i in behind:
                    trainees[i].step(rows[trainees[i].sae.config.site], rate, buffer)

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
        return ranks.once(partial(_finish, config, identity, folders, trainees, checkpoints(), stats, scale))


def learning_rate_factor(step: int, steps: int, warmup: float, decay: float) -> float:
    """Rises linearly over the first part of the run, stays at 1, falls linearly over the last part; never 0 in a step."""
    rising = (step + 1) / max(1.0, warmup * steps)
    falling = (steps - step) / max(1.0, decay * steps)
    return min(1.0, rising, falling)


class Trainee:
    """One SAE in training, on rows that are centred and scaled so that mean ||x||^2 = d_in."""

    def __init__(self, sae: SaeConfig, recipe: TrainConfig, device: torch.device, ranks: Ranks = ALONE) -> None:
        self.recipe = recipe
        self.ranks = ranks
        self.sae = Dictionary(sae)
        self.sae.init_parameters(torch.Generator().manual_seed(sae.seed))
        self.sae.to(device)
        self.lr = recipe.lr or DECODER_TURN / math.sqrt(sae.d_in)
        self.optimizer = torch.optim.Adam(self.sae.parameters(), lr=self.lr, fused=True)
        self.rows_since_fired = torch.zeros(sae.d_sae, dtype=torch.int64, device=device)
        self.running = dict.fromkeys(("weight", "threshold", "loss", "fvu", "l0", "aux_loss"), 0.0)
        """Exponential sums; divided by `weight` they are running means without the bias of starting at 0."""

    def step(self, x: Tensor, rate: float, buffer: Tensor) -> float:
        """One step on x [rows, d_in], this rank's part of the batch, with `rate` times the learning rate. Returns the loss of the batch.

        Every rank's loss is its share of that of the batch, so gradients, like losses, are sums over ranks.
        buffer: float32 with at least rows * d_sae elements, overwritten.
        """
        sae, recipe, ranks = self.sae, self.recipe, self.ranks
        energy, n_rows = x.square().sum(), torch.tensor(len(x), device=x.device)
        ranks.sum(energy, n_rows)
        batch = int(n_rows)
        x_hat, codes, l1_norm = self._forward(x, batch, buffer)
        residual = x - x_hat
        fvu = residual.square().sum() / energy
        aux = self._aux_loss(x, residual.detach())
        loss = fvu + recipe.aux * aux + recipe.l1 * l1_norm / energy
        batch_loss = self._count(codes, batch, loss, fvu, aux)
        if not math.isfinite(batch_loss):
            raise HearsaeError(f"training on {sae.config.site} diverged (its loss is not finite): use a lower learning rate than {self.lr:g}")

        self.optimizer.zero_grad()
        loss.backward()
        ranks.sum(*(parameter.grad for parameter in sae.parameters() if parameter.grad is not None))
        self._keep_decoder_gradient_tangent()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), recipe.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * rate
        self.optimizer.step()
        with torch.no_grad():
            sae.W_dec.copy_(F.normalize(sae.W_dec, dim=1))
        return batch_loss

    def _forward(self, x: Tensor, batch: int, buffer: Tensor) -> tuple[Tensor, SparseRows, Tensor]:
        """(reconstruction, codes, sum of the values that the L1 penalty falls on)."""
        sae = self.sae
        if sae.config.arch == "relu":
            pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
            z = pre.relu()
            return sae.decode(z), select_above(pre.detach(), 0.0), z.sum()
        pre_buffer = buffer[: len(x) * sae.config.d_sae].view(len(x), -1)
        x_hat, codes = autoencode(x, sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, partial(self._select, batch=batch), pre_buffer)
        return x_hat, codes, x.new_zeros(())

    def _select(self, pre: Tensor, batch: int) -> SparseRows:
        k = self.sae.config.k
        if self.sae.config.arch == "topk":
            return select_topk(pre, k)
        return select_batch_topk(pre, k * batch) if self.ranks.world == 1 else select_batch_topk_of_ranks(pre, k * batch, self.ranks)

    def _aux_loss(self, x: Tensor, residual: Tensor) -> Tensor:
        """AuxK (2406.04093, A.2): how much of the residual the d_in / 2 strongest dead latents of each row leave unexplained."""
        dead = torch.nonzero(self.rows_since_fired >= self.recipe.dead_after)[:, 0]
        if not len(dead) or not self.recipe.aux or self.sae.config.arch == "relu":
            return x.new_zeros(())
        sae = self.sae
        pre = (x - sae.b_dec.detach()) @ sae.W_enc[:, dead] + sae.b_enc[dead]
        top = pre.topk(min(max(1, sae.config.d_in // 2), len(dead)), dim=1, sorted=False)
        z = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
        unexplained = residual.square().sum()
        self.ranks.sum(unexplained)
        return (residual - z @ sae.W_dec[dead]).square().sum() / unexplained

    @torch.no_grad()
    def _keep_decoder_gradient_tangent(self) -> None:
        """Takes from the decoder's gradient what would only change norms, which stay 1."""
        W_dec, grad = self.sae.W_dec, self.sae.W_dec.grad
        assert grad is not None
        grad -= (grad * W_dec).sum(1, keepdim=True) * W_dec

    @torch.no_grad()
    def _count(self, codes: SparseRows, batch: int, loss: Tensor, fvu: Tensor, aux: Tensor) -> float:
        """Which latents fired, and the running means, both over all ranks. Returns the loss of the batch."""
        fired = torch.zeros(self.sae.config.d_sae, device=codes.value.device)
        fired[codes.latent.long()] = 1.0
        self.ranks.sum(fired)
        self.rows_since_fired += batch
        self.rows_since_fired[fired > 0] = 0
        smallest = codes.value.min() if len(codes.value) else loss.new_tensor(math.inf)
        number = loss.new_tensor(len(codes.value), dtype=torch.float64)
        of_ranks = self.ranks.table(torch.stack([value.double() for value in (loss, fvu, aux, number, smallest)]))
        (batch_loss, fvu_sum, aux_sum, kept, _), smallest_of_all = of_ranks.sum(0).tolist(), float(of_ranks[:, 4].min())
        seen = {
            "weight": 1.0,
            "threshold": smallest_of_all if kept else 0.0,
            "loss": batch_loss,
            "fvu": fvu_sum,
            "l0": kept / batch,
            "aux_loss": aux_sum,
        }
        self.running = {name: RUNNING_DECAY * self.running[name] + (1 - RUNNING_DECAY) * value for name, value in seen.items()}
        return batch_loss

    def mean(self, name: str) -> float:
        """Running mean of `loss`, `fvu`, `l0`, `aux_loss` or `threshold` (the smallest value kept in a batch)."""
        return self.running[name] / (self.running["weight"] or 1.0)

    @property
    def dead_fraction(self) -> float:
        """Part of the latents that did not fire in the last `dead_after` rows."""
        return float((self.rows_since_fired >= self.recipe.dead_after).double().mean())

    def scalars(self, rate: float) -> dict[str, float]:
        """What is logged."""
        return {name: self.mean(name) for name in ("loss", "fvu", "l0", "aux_loss")} | {"dead": self.dead_fraction, "lr": self.lr * rate}

    def dictionary(self, rows: int) -> Dictionary:
        """What was learnt from so many rows, for centred and scaled rows, with the inference threshold of BatchTopK (2412.06410)."""
        if self.sae.config.arch == "batchtopk":
            self.sae.threshold.fill_(self.mean("threshold"))
        self.sae.config = replace(self.sae.config, rows=rows)
        return self.sae

    def state(self) -> State:
        """Everything that the next step depends on."""
        tensors = {f"sae.{name}": tensor for name, tensor in self.sae.state_dict().items()} | {"rows_since_fired": self.rows_since_fired}
        for number, of_parameter in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{name}": tensor for name, tensor in of_parameter.items()}
        return State(tensors, self.running)

    @torch.no_grad()
    def load_state(self, state: State) -> None:
        """Takes up what `state` gave."""
        tensors = state.tensors
        self.sae.load_state_dict({name: tensors[f"sae.{name}"] for name in self.sae.state_dict()})
        self.rows_since_fired.copy_(tensors["rows_since_fired"])
        self.running = dict(state.running)
        for number, parameter in enumerate(self.sae.parameters()):
            # The moments lie in memory as their parameter does, which the fused step relies on.
            moments = {name: torch.zeros_like(parameter).copy_(tensors[f"optimizer.{number}.{name}"]) for name in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[parameter] = {"step": tensors[f"optimizer.{number}.step"].to(parameter.device), **moments}


# The grid


def _grid(config: TrainConfig, stores: Sequence[ActivationStore]) -> list[SaeConfig]:
    source = {
        "model_sha256": stores[0].header.model["sha256"],
        "store": tuple(store.path.name for store in stores),
        "plan_hash": tuple(store.header.plan["hash"] for store in stores),
    }
    ks = (0,) if config.arch == "relu" else config.k
    return [
        SaeConfig(arch=config.arch, d_in=stores[0].sites[site]["width"], d_sae=d_sae, k=k, seed=seed, site=site, **source)
        for site, d_sae, k, seed in product(config.site, config.d_sae, ks, config.seed)
    ]


def grid_size(config: TrainConfig) -> int:
    """How many SAEs are to be trained."""
    return len(config.site) * len(config.d_sae) * (1 if config.arch == "relu" else len(config.k)) * len(config.seed)


def _folders(out: Location, grid: Sequence[SaeConfig]) -> list[Location]:
    if len(grid) == 1:
        return [out]
    return [out / f"{sae.site}-{sae.arch}-{sae.d_sae}{f'-k{sae.k}' if sae.k else ''}-seed{sae.seed}" for sae in grid]


def check_config(config: TrainConfig) -> None:
    """Raises HearsaeError for settings that can't work, whatever is in the stores."""
    for name in ("site", "d_sae", "k", "seed"):
        values = getattr(config, name)
        if not values or len(set(values)) < len(values):
            raise HearsaeError(f"--{name.replace('_', '-')}: give at least one value, and none twice")
    if not config.store:
        raise HearsaeError("--store: give at least one activation store")
    for site in config.site:
        if not re.fullmatch(r"\w[\w.-]*", site):
            raise HearsaeError(f"'{site}' is no name of a site")
    if not all(0 <= seed < 2**63 for seed in config.seed):
        raise HearsaeError("--seed: each must be between 0 and 2^63 - 1")
    if config.arch == "relu" and len(config.k) > 1:
        raise HearsaeError("k has no effect on a relu SAE: leave --k out, and set --l1")
    if config.batch < 1 or config.rows < config.batch:
        raise HearsaeError(f"--rows {config.rows} is less than one batch of {config.batch} rows")
    if not (0 <= config.warmup <= 1 and 0 <= config.decay <= 1):
        raise HearsaeError(f"--warmup {config.warmup:g} and --decay {config.decay:g} are parts of the run: between 0 and 1")
    for name in ("lr", "clip_norm", "dead_after", "checkpoint_every", "log_every", "buffer_mib", "lanes", "follow_timeout"):
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            raise HearsaeError(f"--{name.replace('_', '-')} {value} is not a positive number")
    for name in ("l1", "aux", "stream_seed", *(("threads",) if config.threads is not None else ())):
        if not 0 <= getattr(config, name) < math.inf:
            raise HearsaeError(f"--{name.replace('_', '-')} {getattr(config, name)} is negative or no number")


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
        config.site,
        config.batch,
        config.stream_seed,
        buffer_bytes=config.buffer_mib << 20,
        lanes=lanes,
        only=ranks.part(lanes),
        follow_timeout_s=timeout_s,
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
    stats: dict[str, SiteStats],
    scale: dict[str, float],
) -> list[RunResult]:
    for folder, trainee, end in zip(folders, trainees, ends, strict=True):
        site = trainee.sae.config.site
        trainee.dictionary(rows=end.position).folded(Centre.of(stats[site].mean, scale[site])).save(folder)
    results = [_result(folder, trainee, end) for folder, trainee, end in zip(folders, trainees, ends, strict=True)]
    put(config.out / RESULT, _to_json({"identity": identity, "config": _settings(config), "runs": [result._asdict() for result in results]}))
    for path in (config.out / RUN, *(folder / CHECKPOINT for folder in folders)):
        path.unlink(missing_ok=True)
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
