"""A grid of SAEs trained in one pass, against as many `train` commands one after the other: wall and CPU seconds of whole processes.

    python benchmarks/sae_grid.py --store STORE --site encoder.blocks.2 [--k 16 32] [--seed 0 1 2 3] [--d-sae 3072] [--arch batchtopk]
                                  [--rows 40000 160000] [--threads default 1] [--repeats 1] [--json FILE]

- Equal: the SAEs, the rows and their order, all settings. Every command is a process of its own, as a user starts it. That both ways learn
  the same is checked: FVU and L0 of the last batches, to a part in a thousand, because sums may be taken in another order.
- `--threads default` leaves the number of threads to PyTorch, which takes all cores: alone, an SAE shares each product out over them; in a grid
  each SAE has a thread of its own. `1` gives every command one thread.
- A command needs some time whatever the number of its rows (imports, opening the store, compiled code from its cache, the first block of rows),
  which separate commands need again and again. It weighs less the more rows there are, so each way is run with fewer and with more rows: "each
  further row" is the ratio of what the additional rows cost, which is what long runs come to.
- The separate commands run around the grid, the first half before and the rest after, so that a machine whose load drifts is seen from both sides.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

CLOSE = 1e-3
"""How far FVU and L0 of the two ways may lie apart, as a part."""


class Cost(NamedTuple):
    """Of one command or several."""

    wall_s: float
    cpu_s: float

    def __add__(self, other: "Cost") -> "Cost":  # type: ignore[override]
        return Cost(self.wall_s + other.wall_s, self.cpu_s + other.cpu_s)

    def __sub__(self, other: "Cost") -> "Cost":
        return Cost(self.wall_s - other.wall_s, self.cpu_s - other.cpu_s)

    def __truediv__(self, other: "Cost") -> "Cost":
        return Cost(self.wall_s / other.wall_s, self.cpu_s / other.cpu_s)


NOTHING = Cost(0.0, 0.0)
Learnt = dict[tuple[str, int, int, int], tuple[float, float]]
"""(arch, d_sae, k, seed) -> (FVU, L0)"""


def command(arguments: Sequence[str], out: Path) -> tuple[Cost, Learnt]:
    """Runs one `train` and waits for it. Raises SystemExit with what it said if it fails."""
    started = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen([sys.executable, "-m", "cluster.cli", "train", *arguments, "--out", str(out), "--quiet"], stdout=said, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise SystemExit(said.read().decode())
    wall_s = time.perf_counter() - started
    runs = json.loads((out / "train.json").read_text())["runs"]
    learnt = {(run["arch"], run["d_sae"], run["k"], run["seed"]): (run["fvu"], run["l0"]) for run in runs}
    return Cost(wall_s, usage.ru_utime + usage.ru_stime), learnt


def compare(common: Sequence[str], options: argparse.Namespace, folder: Path) -> tuple[Cost, Cost]:
    """What the grid cost, and the separate commands together."""
    axes = {"--arch": options.arch, "--d-sae": options.d_sae, "--k": options.k, "--seed": options.seed}
    singles = [[part for name, value in zip(axes, values, strict=True) for part in (name, str(value))] for values in product(*axes.values())]
    half = len(singles) // 2
    separate, learnt = NOTHING, {}
    for number, single in enumerate(singles[:half]):
        cost, found = command([*common, *single], folder / f"single-{number}")
        separate, learnt = separate + cost, learnt | found
    grid, together = command([*common, *(part for name, values in axes.items() for part in (name, *map(str, values)))], folder / "grid")
    for number, single in enumerate(singles[half:], half):
        cost, found = command([*common, *single], folder / f"single-{number}")
        separate, learnt = separate + cost, learnt | found
    for sae, (fvu, l0) in learnt.items():
        if abs(together[sae][0] / fvu - 1) > CLOSE or abs(together[sae][1] / l0 - 1) > CLOSE:
            raise SystemExit(f"{sae} did not learn the same in the grid (FVU, L0: {together[sae]}) as alone ({fvu}, {l0}): they can't be compared")
    return grid, separate


def line(what: str, threads: str, grid: Cost, separate: Cost) -> dict[str, Any]:
    """Prints a line and returns its figures."""
    ratio = grid / separate
    seconds = f"{separate.wall_s:12.1f} {separate.cpu_s:8.1f} {grid.wall_s:14.1f} {grid.cpu_s:8.1f}"
    print(f"  {what:18}{seconds} {ratio.wall_s:14.2f} {ratio.cpu_s:8.2f}", flush=True)
    return {"what": what, "threads": threads, "grid": grid._asdict(), "commands": separate._asdict(), "ratio": ratio._asdict()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", required=True)
    parser.add_argument("--site", required=True)
    parser.add_argument("--arch", nargs="+", default=["batchtopk"])
    parser.add_argument("--d-sae", type=int, nargs="+", default=[3072])
    parser.add_argument("--k", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--threads", nargs="+", default=["default", "1"], help="'default' or a number")
    parser.add_argument("--rows", type=int, nargs="+", default=[40_000, 160_000])
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--json", help="file for the figures")
    options = parser.parse_args()
    size = len(options.arch) * len(options.d_sae) * len(options.k) * len(options.seed)
    print(f"{date.today()}, {size} SAEs, {os.cpu_count()} cores, load before {os.getloadavg()[0]:.1f}")
    figures = []
    for threads in options.threads:
        print(f"\nthreads: {threads:10} {f'{size} commands':>12} {'CPU s':>8} {'one grid':>14} {'CPU s':>8} {'ratio':>14} {'CPU':>8}")
        of_rows = []
        for rows in options.rows:
            common = ["--store", options.store, "--site", options.site, "--rows", str(rows), "--batch", str(options.batch), "--device", "cpu"]
            common += [] if threads == "default" else ["--threads", threads]
            found = []
            for _ in range(options.repeats):
                with tempfile.TemporaryDirectory() as folder:
                    found.append(compare(common, options, Path(folder)))
            of_rows.append(tuple(Cost(*(statistics.median(values) for values in zip(*costs, strict=True))) for costs in zip(*found, strict=True)))
            figures.append(line(f"{rows:,} rows", threads, *of_rows[-1]))
        if len(of_rows) > 1:
            (grid, separate), (more_grid, more_separate) = of_rows[0], of_rows[-1]
            figures.append(line("each further row", threads, more_grid - grid, more_separate - separate))
    print(f"load after {os.getloadavg()[0]:.1f}")
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
