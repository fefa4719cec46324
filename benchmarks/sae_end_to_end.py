"""Rows per second of whole training runs from stored activations: ours from its store and from memory, and the peers' from what they offer.

    python benchmarks/sae_end_to_end.py --store STORE --site encoder.blocks.2 [--d-sae 3072] [--k 32] [--batch 4096] [--threads 1]
                                        [--rows 400000] [--peer-rows 65536] [--rounds 3] [--json FILE]

- `store`: `sae.train.train`, all of it, after a short run that imports and compiles: opening the stream, reading, checking, shuffling, centring,
  steps, log, saving the SAE.
- `memory`: the same batches in the same order, centred before the clock starts, through the same steps. Both end with the same bits, which is
  checked. store / memory is what reading and everything round about the step leave of the speed of training. "loop's CPU" is the same by the
  CPU time of the training thread, which a busy machine changes little: all but the reading, which has a thread of its own and wants a core
  beside those that train.
- `SAELens, cached`: its SAETrainer.fit from its ActivationsStore on cached activations, in the format that its CacheActivationsRunner writes
  (a Hugging Face dataset of float32 arrays [context, d_in]), mixed in its buffer of 32,768 rows (n_batches_in_buffer 64, context 512);
  `SAELens, memory`: the same from shuffled tensors.
- `dictionary_learning, memory`: its trainSAE. Its own buffers all need a language model; its README allows any iterator of batches in
  their place, and this is shuffled slices of a tensor in memory, with nothing read from a disk.
- sparsify's Trainer needs a model and text; it has no way to train from stored activations, so it is left out.

Equal: rows, batch, d_sae, k, BatchTopK, float32, threads, one process; runs take turns and the median of the rounds is given. Not equal: the peers
train on fewer rows (their steps take longer), dead latents take part in AuxK where a library's own default finds some (ours after 2 % of
the rows, 10,000 at least, the peers' later than these runs end), and only ours writes what it learnt. Writing the peers' cache is not timed.
"""

import argparse
import contextlib
import io
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import peers
import torch
from torch import Tensor

from cache.location import location
from cache.store import ActivationStore
from sae.models import Centre, SaeConfig, load_dictionary
from sae.stream import RowStream
from sae.train import learning_rate_factor, train
from sae.train_config import TrainConfig
from sae.trainee import Trainee

CONTEXT = 512
"""Rows of one array in SAELens's cache; with `BUFFER_CONTEXTS` and `READ_CONTEXTS` as in its tutorials."""
BUFFER_CONTEXTS = 64
READ_CONTEXTS = 16
HOOK = "whisper"


class Run(NamedTuple):
    """One run from start to end."""

    rows_per_s: float
    cpu_rows_per_s: float
    """Rows per second of CPU time of the whole process: what the busy machine did not take away."""
    loop_rows_per_s: float
    """Rows per second of CPU time of this thread."""
    wait_fraction: float | None = None


def timed(rows: int, work: Callable[[], Any]) -> tuple[Run, Any]:
    clocks = (time.perf_counter, time.process_time, time.thread_time)
    before = [clock() for clock in clocks]
    result = work()
    return Run(*(rows / (clock() - started) for clock, started in zip(clocks, before, strict=True))), result


# Ours


def from_store(config: TrainConfig) -> Run:
    run, results = timed(config.rows // config.batch * config.batch, lambda: train(config))
    return run._replace(wait_fraction=results[0].wait_fraction)


def batches_in_memory(config: TrainConfig) -> tuple[list[Tensor], Centre]:
    """What `train` would see, in its order, centred and scaled; and how it was centred."""
    stores = [ActivationStore.open(path) for path in config.store]
    (site,) = config.site
    with RowStream(stores, [site], config.batch, config.stream_seed, buffer_bytes=config.buffer_mib << 20) as stream:
        stats = stream.stats(site)
        centre = Centre.of(stats.mean, (len(stats.mean) / stats.mean_sq_dist) ** 0.5)
        mean, scale = torch.from_numpy(centre.mean).float(), float(centre.scale[0])
        return [next(stream).rows[site].sub_(mean).mul_(scale) for _ in range(config.rows // config.batch)], centre


def from_memory(config: TrainConfig, batches: list[Tensor]) -> tuple[Run, Trainee]:
    sae = SaeConfig("batchtopk", batches[0].shape[1], config.d_sae[0], config.k[0])
    trainee = Trainee(sae, config, torch.device("cpu"))

    def steps() -> None:
        for step, x in enumerate(batches):
            trainee.step(x, x, learning_rate_factor(step, len(batches), config.warmup, config.decay), step / len(batches))

    return timed(len(batches) * config.batch, steps)[0], trainee


# The peers


def write_saelens_cache(rows: Tensor, folder: Path) -> None:
    """As its CacheActivationsRunner leaves it: one column named after the hook, arrays [context, d_in] of its default dtype."""
    from datasets import Array2D, Dataset, Features

    arrays = rows[: len(rows) // CONTEXT * CONTEXT].view(-1, CONTEXT, rows.shape[1])
    features = Features({HOOK: Array2D(shape=arrays.shape[1:], dtype="float32")})
    with contextlib.redirect_stderr(io.StringIO()):
        Dataset.from_dict({HOOK: arrays.numpy()}, features=features).save_to_disk(str(folder))


def saelens_store(folder: Path, config: TrainConfig, d_in: int, rows: int) -> Any:
    from sae_lens.training.activations_store import ActivationsStore

    return ActivationsStore(
        model=None,
        dataset=None,
        streaming=False,
        hook_name=HOOK,
        hook_head_index=None,
        context_size=CONTEXT,
        d_in=d_in,
        n_batches_in_buffer=BUFFER_CONTEXTS,
        total_training_tokens=rows,
        store_batch_size_prompts=READ_CONTEXTS,
        train_batch_size_tokens=config.batch,
        prepend_bos=False,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float32",
        cached_activations_path=str(folder),
    )


def shuffled(rows: Tensor, batch: int) -> Iterator[Tensor]:
    """Batches for ever, every epoch in a new order."""
    while True:
        for chosen in torch.randperm(len(rows)).split(batch):
            if len(chosen) == batch:
                yield rows[chosen]


def saelens(config: TrainConfig, rows: int, d_in: int, data: Callable[[], Any]) -> Run:
    """data: makes what is trained from, which is part of the run."""
    return timed(rows, lambda: peers.saelens_trainer("batchtopk", d_in, config.d_sae[0], config.k[0], config.batch, rows, data()).fit())[0]


def dictionary_learning(config: TrainConfig, rows: int, held: Tensor) -> Run:
    trainer = peers.dictionary_learning_config("batchtopk", held.shape[1], config.d_sae[0], config.k[0], rows // config.batch)
    from dictionary_learning.training import trainSAE

    return timed(rows, lambda: trainSAE(shuffled(held, config.batch), [trainer], steps=rows // config.batch, device="cpu"))[0]


def peers_of(config: TrainConfig, rows: int, held: Tensor, scratch: Path) -> tuple[dict[str, Callable[[], Run]], dict[str, str]]:
    """Runs by name, and why some are missing."""
    d_in = held.shape[1]
    runs: dict[str, Callable[[], Run]] = {}
    missing = {"sparsify": "its Trainer needs a model and text, it can't train from stored activations"}
    try:
        import sae_lens  # noqa: F401

        write_saelens_cache(held, scratch / "saelens")
        runs["SAELens, cached"] = lambda: saelens(config, rows, d_in, lambda: saelens_store(scratch / "saelens", config, d_in, rows))
        runs["SAELens, memory"] = lambda: saelens(config, rows, d_in, lambda: shuffled(held, config.batch))
    except ImportError as error:
        missing["SAELens"] = f"not installed: {error}"
    try:
        peers.dictionary_learning_config("batchtopk", d_in, config.d_sae[0], config.k[0], 10)
        runs["dictionary_learning, memory"] = lambda: dictionary_learning(config, rows, held)
    except ImportError as error:
        missing["dictionary_learning"] = f"not installed: {error}"
    return runs, missing


def quietly(run: Callable[[], Run]) -> Run:
    """Without the progress bars and warnings of others."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return run()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", required=True)
    parser.add_argument("--site", required=True)
    parser.add_argument("--json", help="file for the figures")
    for name, default in {"d-sae": 3072, "k": 32, "batch": 4096, "threads": 1, "rows": 400_000, "peer-rows": 65_536, "rounds": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    peers.use_threads(args.threads)
    print(f"{date.today()}, PyTorch {torch.__version__}, {args.threads} thread(s) of {os.cpu_count()}, load before {os.getloadavg()[0]:.1f}")

    peer_rows = args.peer_rows // args.batch * args.batch
    found: dict[str, list[Run]] = {}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        store, sizes = (location(args.store),), ((args.d_sae,), (args.k,))
        config = TrainConfig(store, (args.site,), scratch, *sizes, rows=args.rows, batch=args.batch, threads=args.threads, plots=False, quiet=True)
        batches, centre = batches_in_memory(config)
        peer_runs, missing = peers_of(config, peer_rows, torch.cat(batches[: peer_rows // args.batch]), scratch)
        for name, why in missing.items():
            print(f"{name}: left out: {why}")
        from_store(replace(config, out=scratch / "first", rows=4 * args.batch))  # imports, compiles
        for number in range(args.rounds):
            out = scratch / f"sae-{number}"
            found.setdefault("hearsae, store", []).append(from_store(replace(config, out=out)))
            run, trainee = from_memory(config, batches)
            found.setdefault("hearsae, memory", []).append(run)
            same = torch.equal(load_dictionary(out).W_dec, trainee.dictionary(args.rows).folded(centre).W_dec)
            if not same:
                raise SystemExit("the runs from the store and from memory did not learn the same: they can't be compared")
            for name, peer in peer_runs.items():
                found.setdefault(name, []).append(quietly(peer))

    store, memory = found["hearsae, store"], found["hearsae, memory"]
    print(f"{'':30} {'rows/s':>9}  {'ours from the store is':>22}   {'by CPU time':>11}   each run")
    for name, runs in found.items():
        wall, cpu = (median(store, field) / median(runs, field) for field in ("rows_per_s", "cpu_rows_per_s"))
        each = ", ".join(f"{run.rows_per_s:,.0f}" for run in runs)
        print(f"{name:30} {median(runs, 'rows_per_s'):9,.0f}  {wall:21.2f}x   {cpu:10.2f}x   {each}")
    ratios = {what: median(store, field) / median(memory, field) for what, field in (("wall", "rows_per_s"), ("loop's CPU", "loop_rows_per_s"))}
    waiting = median(store, "wait_fraction")
    print(f"store / memory: {', '.join(f'{ratio:.3f} ({what})' for what, ratio in ratios.items())}; waiting for rows {waiting:.1%} of the time")
    print(f"load after {os.getloadavg()[0]:.1f}")
    if args.json:
        Path(args.json).write_text(json.dumps({name: [run._asdict() for run in runs] for name, runs in found.items()}, indent=1))
    return 0


def median(runs: list[Run], field: str) -> float:
    return statistics.median(getattr(run, field) for run in runs)


if __name__ == "__main__":
    sys.exit(main())
