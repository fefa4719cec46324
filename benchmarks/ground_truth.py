"""What every architecture finds of features that are known, at the true L0, trained by `sae.train.train` on the same rows.

`python benchmarks/ground_truth.py [--models plain both] [--archs batchtopk relu] [--rows 2000000] [--seeds 3] [--json FILE]`. What has no k is first
trained with several coefficients, side by side, and then with that at which its L0 should be the true one; the L0 it really has is in the table.
Figures are means over the seeds, of rows that are in no store. `--large` takes the sizes of SynthSAEBench-16k (2602.14687), for a machine with a GPU.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from sae.models import ARCHS, WITH_K, load_dictionary
from sae.recovery import Recovery, recovery
from sae.synthetic import SITE, SyntheticConfig, SyntheticModel, write_store
from sae.train import train
from sae.train_config import TrainConfig

PLAIN = SyntheticConfig(d_in=96, features=256, l0=6.0, max_cosine=0.4)
CORRELATED = {"correlation": 0.25, "factors": 8}
FAMILIES = {"children": 0.6, "exclusive": True, "scale_children": True}
MODELS = {
    "plain": PLAIN,
    "correlated": replace(PLAIN, **CORRELATED),
    "families": replace(PLAIN, **FAMILIES),
    "both": replace(PLAIN, **CORRELATED, **FAMILIES),
}
LARGE = {"d_in": 768, "features": 16_384, "l0": 34.0, "max_cosine": 1.0, "factors": 25}
LARGE_D_SAE = 4096
"""As the paper trains: fewer latents than features."""
FIRST_SPARSITIES = {
    "relu": (0.5, 1.0, 2.0, 4.0),
    "tied": (1.0, 2.0, 4.0, 8.0),
    "gated": (0.5, 1.0, 2.0, 4.0),
    "jumprelu-tanh": (0.001, 0.003, 0.01, 0.03),
}
"""Coefficients that are tried first."""
STORE_ROWS = 1_000_000
"""Rows of a store; more are read from it in several epochs."""
COLUMNS = {"l0": ".2f", "fvu": ".4f", "mcc": ".3f", "recovered": ".3f", "uniqueness": ".3f", "precision": ".3f", "recall": ".3f", "f1": ".3f",
           "dead_fraction": ".3f", "absorption": ".3f"}  # fmt: skip


class Bench:
    """One synthetic model, its store and the recipe."""

    def __init__(self, config: SyntheticConfig, options: argparse.Namespace, folder: Path) -> None:
        self.model = SyntheticModel(config)
        self.options = options
        self.folder = folder
        self.d_sae = options.d_sae or (LARGE_D_SAE if options.large else config.features)
        # With fewer latents than features at most that many can be found: their L0 is the true one.
        self.true_l0 = float(self.model.probability[: self.d_sae].sum())
        self.store = folder / "acts.zarr"
        write_store(self.store, config, min(options.rows, options.store_rows))
        self.trained = 0

    def learn(self, arch: str, sparsities: Sequence[float], seeds: Sequence[int]) -> list[tuple[float, int, Recovery]]:
        """(coefficient or 0, seed, score) of each SAE."""
        self.trained += 1
        options = self.options
        given = {name: getattr(options, name) for name in ("lr", "aux", "dead_after") if getattr(options, name) is not None}
        config = TrainConfig(
            store=(self.store,),
            site=(SITE,),
            out=self.folder / f"run{self.trained}",
            d_sae=(self.d_sae,),
            k=(round(self.true_l0),),
            arch=(arch,),
            sparsity=tuple(sparsities),
            seed=tuple(seeds),
            rows=options.rows,
            batch=options.batch,
            threads=options.threads,
            quiet=True,
            **given,
        )
        runs = train(config)
        return [(run.sparsity, run.seed, recovery(load_dictionary(run.dir), self.model, options.evaluation_rows)) for run in runs]

    def at_true_l0(self, arch: str) -> list[tuple[float, int, Recovery]]:
        """One of each seed."""
        seeds = range(self.options.seeds)
        if arch in WITH_K or arch == "jumprelu":
            return self.learn(arch, (), seeds)
        tried = {sparsity: score.l0 for sparsity, _, score in self.learn(arch, FIRST_SPARSITIES[arch], (0,))}
        between = self._interpolated(tried)
        if between not in tried:
            tried |= {sparsity: score.l0 for sparsity, _, score in self.learn(arch, (between,), (0,))}
        return self.learn(arch, (self._interpolated(tried),), seeds)

    def _interpolated(self, tried: dict[float, float]) -> float:
        """The coefficient for the true L0, from (coefficient -> L0), in logarithms; beyond those tried, the outermost one twice or half."""
        log_l0, log_sparsity = np.log([(max(l0, 1e-3), sparsity) for sparsity, l0 in tried.items()]).T
        order = np.argsort(log_l0)
        log_l0, log_sparsity = log_l0[order], log_sparsity[order]
        wanted = np.log(self.true_l0)
        beyond = np.log(2.0) if wanted < log_l0[0] else -np.log(2.0) if wanted > log_l0[-1] else 0.0
        return float(f"{np.exp(np.interp(wanted, log_l0, log_sparsity) + beyond):.4g}")


def line(name: str, arch: str, sparsity: float, scores: Sequence[dict[str, float]], seconds: float) -> str:
    """One row of the table, the means over the seeds."""
    means = {column: np.mean([np.nan if score[column] is None else score[column] for score in scores]) for column in COLUMNS}
    figures = " | ".join("-" if np.isnan(value) else format(value, COLUMNS[column]) for column, value in means.items())
    return f"| {name} | {arch} | {sparsity:g} | {figures} | {seconds:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["plain", "both"])
    parser.add_argument("--archs", nargs="+", choices=ARCHS, default=list(ARCHS))
    parser.add_argument("--rows", type=int, default=2_000_000, help="rows of training")
    parser.add_argument("--store-rows", type=int, default=STORE_ROWS)
    parser.add_argument("--evaluation-rows", type=int, default=50_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--d-sae", type=int, help="latents; default: as many as features")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--aux", type=float)
    parser.add_argument("--dead-after", type=int)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--large", action="store_true", help="768 dimensions, 16,384 features, 4096 latents")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    results = []
    print(f"| model | architecture | sparsity | {' | '.join(COLUMNS)} | seconds |\n|{'---|' * (len(COLUMNS) + 4)}")
    for name in options.models:
        config = replace(MODELS[name], **(LARGE if options.large else {}))
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(config, options, Path(folder))
            ideal = recovery(bench.model.true_dictionary(), bench.model, options.evaluation_rows)
            print(f"| {name} | the model | 0 | {ideal.true_l0:.2f} | {ideal.best_fvu:.4f} | {' | ' * (len(COLUMNS) - 2)} |")
            for arch in options.archs:
                started = time.perf_counter()
                found = bench.at_true_l0(arch)
                scores = [score.to_json() for _, _, score in found]
                seconds = time.perf_counter() - started
                print(line(name, arch, found[0][0], scores, seconds), flush=True)
                runs = [{"sparsity": sparsity, "seed": seed} | score.to_json() for sparsity, seed, score in found]
                results.append({"model": name, "config": asdict(config), "arch": arch, "seconds": seconds, "runs": runs})
                if options.json:  # after each, so that a run that is cut short leaves what it has
                    options.json.write_text(json.dumps({"options": vars(options) | {"json": str(options.json)}, "results": results}, indent=1))


if __name__ == "__main__":
    main()
