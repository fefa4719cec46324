"""What is to be trained: the settings of a run, and the grid of SAEs that they make."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

from cache.errors import HearsaeError
from cache.header import name_of_context
from cache.location import Location
from cache.store import ActivationStore
from sae.log import import_wandb
from sae.models import ARCHS, WITH_K, SaeConfig
from sae.objectives import SPARSITY, TARGET_SPARSITY

DEAD_AFTER_SHARE, DEAD_AFTER = 0.02, (10_000, 100_000)
"""Of a run's rows, and within these bounds: where the default of `dead_after` lies. Short runs can't wait long for latents that AuxK would bring
back (docs/ground_truth.md); beyond 100,000 rows nothing is gained."""


@dataclass(frozen=True)
class TrainConfig:
    """Train sparse autoencoders on stored activations. Several sites, architectures, widths, sparsities or seeds make a grid, trained in one pass.

    The same command again continues from the last checkpoint; a finished run is left alone.
    """

    store: tuple[Location, ...]
    """Activation stores to train on, captured from the same Whisper."""
    site: tuple[str, ...]
    """Sites whose rows to learn, one SAE for each."""
    out: Location
    """Folder for the SAE (of a grid: one folder per SAE in it), train.json and TensorBoard logs."""
    d_sae: tuple[int, ...] = (3072,)
    """Numbers of latents."""
    k: tuple[int, ...] = (32,)
    """Latents kept per row (topk), or per row on average (batchtopk, matryoshka)."""
    arch: tuple[Literal["batchtopk", "topk", "matryoshka", "relu", "tied", "jumprelu", "jumprelu-tanh", "gated"], ...] = ("batchtopk",)
    """Architectures."""
    sparsity: tuple[float, ...] = ()
    """Coefficients of the penalty of relu, tied, gated, jumprelu and jumprelu-tanh, which have no k. Default: one for each architecture;
    for jumprelu k, as the L0 that it aims at."""
    target: str | None = None
    """Train transcoders: reconstruct the rows of this site from those of each --site."""
    crosscoder: bool = False
    """Train one dictionary on all sites together instead of one on each."""
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
    sparsity_warmup: float | None = None
    """First part of the run, over which the coefficient of the penalty rises from 0. Default: by architecture."""
    aux: float = 1 / 32
    """Coefficient of the AuxK loss, which brings dead latents back (2406.04093)."""
    dead_after: int | None = None
    """Rows after which a latent that did not fire counts as dead. Default: 2 % of the run, but 10,000 to 100,000."""
    clip_norm: float = 1.0
    """Largest norm of the gradient of one SAE."""
    stream_seed: int = 0
    """Seed of the order of the rows, the same for every SAE of a grid."""
    buffer_mib: int = 256
    """Size of the buffer in which rows are mixed; two of them are in memory."""
    not_finite: Literal["refuse", "skip"] = "refuse"
    """What to do with rows that have NaN or infinite values: end with an error, or let other rows take their place."""
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
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the encoder's products; auto: bf16 on a GPU, fp32 on a CPU. On CPUs without bf16 matrix units bf16 changes nothing."""
    threads: int | None = None
    """CPU threads. Default: as PyTorch chooses. The SAEs of a grid share them out."""
    wandb: str | None = None
    """Log to this project of Weights & Biases too (pip install wandb)."""
    plots: bool = True
    """Draw the curves of the run, and a grid's FVU against L0, into the folder plots."""
    quiet: bool = False
    """Shows no progress bar."""

    @property
    def rows_until_dead(self) -> int:
        """`dead_after`, or its default."""
        fewest, most = DEAD_AFTER
        return self.dead_after or min(most, max(fewest, round(DEAD_AFTER_SHARE * self.rows)))


def make_grid(config: TrainConfig, stores: Sequence[ActivationStore]) -> list[SaeConfig]:
    """Every SAE that is to be trained on these stores."""
    widths = {site: stores[0].sites[site]["width"] for site in sites_of(config)}
    source = {
        "model_sha256": stores[0].header.model["sha256"],
        "store": tuple(store.path.name for store in stores),
        "plan_hash": tuple(store.header.plan["hash"] for store in stores),
        "context": name_of_context(stores[0].header.context),
    }
    groups = [config.site] if config.crosscoder else [(site,) for site in config.site]
    return [
        SaeConfig(
            arch=arch,
            d_in=sum(widths[site] for site in sites),
            d_sae=d_sae,
            k=k,
            seed=seed,
            site="+".join(sites),
            target=config.target or "",
            d_out=widths[config.target] if config.target else 0,
            widths=tuple(widths[site] for site in sites) if config.crosscoder else (),
            sparsity=sparsity,
            **source,
        )
        for sites, arch, d_sae in product(groups, config.arch, config.d_sae)
        for k, sparsity in sparsities_of(config, arch)
        for seed in config.seed
    ]


def sites_of(config: TrainConfig) -> list[str]:
    """All that are read."""
    return list(dict.fromkeys([*config.site, *([config.target] if config.target else [])]))


def sparsities_of(config: TrainConfig, arch: str) -> list[tuple[int, float]]:
    """The values of k and of the penalty's coefficient with which to train an architecture."""
    if arch in WITH_K:
        return [(k, 0.0) for k in config.k]
    if arch == "jumprelu" and not config.sparsity:
        return [(k, TARGET_SPARSITY) for k in config.k]
    return [(0, sparsity) for sparsity in config.sparsity or (SPARSITY[arch],)]


def grid_size(config: TrainConfig) -> int:
    """How many SAEs are to be trained."""
    groups = 1 if config.crosscoder else len(config.site)
    return groups * len(config.d_sae) * len(config.seed) * sum(len(sparsities_of(config, arch)) for arch in config.arch)


def folders_of(out: Location, grid: Sequence[SaeConfig]) -> list[Location]:
    """Where each goes: one alone into `out` itself."""
    if len(grid) == 1:
        return [out]
    return [out / name_of(sae) for sae in grid]


def name_of(sae: SaeConfig) -> str:
    """Tells it from the others of a grid."""
    sparsity = [f"k{sae.k}"] if sae.k else [f"s{sae.sparsity:g}"] if sae.sparsity else []
    target = [f"to-{sae.target}"] if sae.target else []
    return "-".join([sae.site, *target, sae.arch, str(sae.d_sae), *sparsity, f"seed{sae.seed}"])


def check_config(config: TrainConfig) -> None:
    """Raises HearsaeError for settings that can't work, whatever is in the stores."""
    for name in ("site", "arch", "d_sae", "k", "seed", "sparsity"):
        values = getattr(config, name)
        if (not values and name != "sparsity") or len(set(values)) < len(values):
            raise HearsaeError(f"--{name.replace('_', '-')}: give at least one value, and none twice")
    if config.wandb:
        import_wandb()
    if not config.store:
        raise HearsaeError("--store: give at least one activation store")
    for site in sites_of(config):
        if not re.fullmatch(r"\w[\w.-]*", site):
            raise HearsaeError(f"'{site}' is no name of a site")
    if not all(0 <= seed < 2**63 for seed in config.seed):
        raise HearsaeError("--seed: each must be between 0 and 2^63 - 1")
    unknown = [arch for arch in config.arch if arch not in ARCHS]
    if unknown:
        raise HearsaeError(f"--arch: there is no SAE architecture '{unknown[0]}'; there are: {', '.join(ARCHS)}")
    uses_k = any(k for arch in config.arch for k, _ in sparsities_of(config, arch))
    if len(config.k) > 1 and not uses_k:
        raise HearsaeError(f"k has no effect on {', '.join(config.arch)}: leave --k out, and set --sparsity")
    if config.sparsity and all(arch in WITH_K for arch in config.arch):
        raise HearsaeError(f"--sparsity has no effect on {', '.join(config.arch)}: set --k")
    for d_sae, k in product(config.d_sae, config.k):
        if uses_k and d_sae > 0 and not 1 <= k <= d_sae:
            raise HearsaeError(f"k = {k} is not between 1 and d_sae = {d_sae}")
    if config.target and (config.crosscoder or config.target in config.site):
        raise HearsaeError(f"--target {config.target}: a transcoder reads one site and reconstructs another; a crosscoder has no target")
    if config.crosscoder and len(config.site) < 2:
        raise HearsaeError("--crosscoder: give two sites or more")
    if config.batch < 1 or config.rows < config.batch:
        raise HearsaeError(f"--rows {config.rows} is less than one batch of {config.batch} rows")
    if not (0 <= config.warmup <= 1 and 0 <= config.decay <= 1):
        raise HearsaeError(f"--warmup {config.warmup:g} and --decay {config.decay:g} are parts of the run: between 0 and 1")
    for name in ("lr", "clip_norm", "dead_after", "checkpoint_every", "log_every", "buffer_mib", "lanes", "follow_timeout"):
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            raise HearsaeError(f"--{name.replace('_', '-')} {value} is not a positive number")
    if config.sparsity_warmup is not None and not 0 <= config.sparsity_warmup <= 1:
        raise HearsaeError(f"--sparsity-warmup {config.sparsity_warmup:g} is a part of the run: between 0 and 1")
    if not all(0 <= sparsity < math.inf for sparsity in config.sparsity):
        raise HearsaeError("--sparsity: each must be a number that is not negative")
    for name in ("aux", "stream_seed", *(("threads",) if config.threads is not None else ())):
        if not 0 <= getattr(config, name) < math.inf:
            raise HearsaeError(f"--{name.replace('_', '-')} {getattr(config, name)} is negative or no number")
