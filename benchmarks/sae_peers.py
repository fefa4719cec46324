"""One training step of ours beside those of SAELens, sparsify and dictionary_learning, and beside the one product that nobody can do without.

    python benchmarks/sae_peers.py --store STORE --site encoder.blocks.2 [--d-sae 3072 12288] [--k 32] [--batch 4096] [--threads 1]
                                   [--rounds 7] [--precision highest medium] [--json FILE]

or `--rows FILE.npy` in place of a store. What is timed, and the duties of each step, stand in `benchmarks/peers.py`.

- Equal: the rows (real ones, centred and scaled), batch, d_sae, k, float32 parameters, Adam, threads, one process; contenders take turns step by
  step, so a change of the machine's load meets all alike, and the median is given. No latent is declared dead within the measurement, so nobody
  computes an AuxK loss. BatchTopK is compared with BatchTopK, TopK with TopK.
- Not equal: duties differ by a few passes over the parameters; learning rates and losses are each library's own.
- Wall time decides on a quiet machine. CPU time is given beside it: with one thread the two differ by what other work took, and ratios of CPU
  times can be read on a busy one.
- `product`: x [batch, d_in] @ W_enc into a buffer, one call, by the same torch. "of product" is a step's time divided by it.
- `highest` is torch's default. `medium` is torch.set_float32_matmul_precision("medium") for everybody: on CPUs with bf16 matrix units products
  are then rounded to bf16, on others they only go through oneDNN; which of the two is found out and printed.

Wide dictionaries get fewer rounds, at least 3. Peers that are not installed are named and left out.
"""

import argparse
import json
import os
import statistics
import sys
import time
from datetime import date
from typing import Any, NamedTuple

import torch
from peers import CONTENDERS, Step, ours_of, products_are_exact, rows_from, use_threads
from torch import Tensor

PRODUCT = "product"
WARM_UP_ROUNDS = 2
"""Compiling, allocating, and the first guess of where the cut of a batch lies."""
LEAST_ROUNDS = 3
FULL_ROUNDS_UP_TO = 3072
"""Widths up to this get all rounds."""


class Timing(NamedTuple):
    """Of one contender's steps."""

    median_s: float
    least_s: float
    most_s: float
    cpu_s: float
    """Median of the CPU time of the whole process."""


def product(d_in: int, d_sae: int, batch: int) -> Step:
    """The encoder's matrix product alone, W_enc laid out as everybody has it: latent by latent."""
    W_enc, buffer = torch.randn(d_sae, d_in).t(), torch.empty(batch, d_sae)
    return lambda x: torch.mm(x, W_enc, out=buffer)


def contenders(d_in: int, d_sae: int, k: int, batch: int) -> tuple[dict[str, Step], dict[str, str]]:
    """The steps, and why some are missing."""
    steps: dict[str, Step] = {}
    missing: dict[str, str] = {}
    for name, make in CONTENDERS.items():
        try:
            steps[name] = make(d_in, d_sae, k, batch)
        except ImportError as error:
            missing[name] = str(error)
    steps[PRODUCT] = product(d_in, d_sae, batch)
    return steps, missing


def measure(steps: dict[str, Step], batches: list[Tensor], rounds: int) -> dict[str, Timing]:
    wall: dict[str, list[float]] = {name: [] for name in steps}
    cpu: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(WARM_UP_ROUNDS + rounds):
        for name, step in steps.items():
            before, cpu_before = time.perf_counter(), time.process_time()
            step(batches[number % len(batches)])
            wall[name].append(time.perf_counter() - before)
            cpu[name].append(time.process_time() - cpu_before)
    timings = {}
    for name in steps:
        kept = wall[name][WARM_UP_ROUNDS:]
        timings[name] = Timing(statistics.median(kept), min(kept), max(kept), statistics.median(cpu[name][WARM_UP_ROUNDS:]))
    return timings


def report(timings: dict[str, Timing], batch: int) -> list[dict[str, Any]]:
    """Prints a table and returns its figures; ratios are how many times as quick ours is, None for ours and the product."""
    found = []
    of_product = {name: (t.median_s / timings[PRODUCT].median_s, t.cpu_s / timings[PRODUCT].cpu_s) for name, t in timings.items()}
    print(f"  {'':30} {'rows/s':>9} {'ms a step':>10} {'(least, most)':>18} {'of product':>11} {'ours is':>9}    by CPU time: of product, ours is")
    for name, timing in timings.items():
        ours = timings[ours_of(name)]
        peer = name != PRODUCT and not name.startswith("hearsae")
        ratio, cpu_ratio = (timing.median_s / ours.median_s, timing.cpu_s / ours.cpu_s) if peer else (None, None)
        span = f"({1e3 * timing.least_s:.0f}, {1e3 * timing.most_s:.0f})"
        print(
            f"  {name:30} {batch / timing.median_s:9,.0f} {1e3 * timing.median_s:10.1f} {span:>18} {of_product[name][0]:11.2f} {_times(ratio)}"
            f" {of_product[name][1]:26.2f} {_times(cpu_ratio)}"
        )
        ratios = {"of_product": of_product[name][0], "of_product_cpu": of_product[name][1], "ours_is": ratio, "ours_is_cpu": cpu_ratio}
        found.append({"name": name, "rows_per_s": batch / timing.median_s, **ratios, **timing._asdict()})
    return found


def _times(ratio: float | None) -> str:
    return f"{ratio:8.2f}x" if ratio else " " * 9


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store")
    parser.add_argument("--site")
    parser.add_argument("--rows", help="a .npy file [n, d_in] in place of a store")
    parser.add_argument("--d-sae", type=int, nargs="+", default=[3072, 12288])
    parser.add_argument("--precision", nargs="+", choices=["highest", "medium"], default=["highest", "medium"])
    parser.add_argument("--json", help="file for the figures")
    for name, default in {"k": 32, "batch": 4096, "threads": 1, "rounds": 7}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    use_threads(args.threads)

    batches = list(rows_from(args.store, args.site, args.rows, 16 * args.batch).split(args.batch))
    batches = [batch for batch in batches if len(batch) == args.batch]
    if not batches:
        raise SystemExit(f"there are fewer than {args.batch} rows")
    d_in = batches[0].shape[1]
    print(f"{date.today()}, PyTorch {torch.__version__}, {args.threads} thread(s) of {os.cpu_count()}, load before {os.getloadavg()[0]:.1f}")
    figures: list[dict[str, Any]] = []
    for precision in args.precision:
        torch.set_float32_matmul_precision(precision)
        exact, error = products_are_exact()
        kind = "float32" if exact else "rounded to bf16"
        print(f"\nprecision '{precision}': products are {kind} (relative error {error:.1e})")
        for d_sae in args.d_sae:
            rounds = max(LEAST_ROUNDS, args.rounds * FULL_ROUNDS_UP_TO // max(d_sae, FULL_ROUNDS_UP_TO))
            torch.manual_seed(0)
            steps, missing = contenders(d_in, d_sae, args.k, args.batch)
            print(f"d_in {d_in}, d_sae {d_sae}, k {args.k}, batch {args.batch}, {rounds} rounds")
            for name, why in missing.items():
                print(f"  {name:30} not installed: {why}")
            size = {"precision": precision, "exact": exact, "d_in": d_in, "d_sae": d_sae, "k": args.k, "batch": args.batch, "threads": args.threads}
            figures += [size | row for row in report(measure(steps, batches, rounds), args.batch)]
            sys.stdout.flush()
            del steps
    print(f"load after {os.getloadavg()[0]:.1f}")
    if args.json:
        with open(args.json, "w") as file:
            json.dump(figures, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
