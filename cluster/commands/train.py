"""`hearsae train`."""

from dataclasses import dataclass
from typing import Any

from cluster.commands import Output
from cluster.training import RankOptions, train_on
from sae.train_config import TrainConfig


@dataclass(frozen=True)
class Train(Output, RankOptions, TrainConfig):
    __doc__ = TrainConfig.__doc__

    def run(self) -> dict[str, Any]:
        return {"runs": [result._asdict() for result in train_on(self, self)]}

    def summary(self, result: dict[str, Any]) -> str:
        lines = []
        for run in result["runs"]:
            sites = f"{run['site']} -> {run['target']}" if run["target"] else run["site"]
            few = f"k {run['k']}" if run["k"] else f"sparsity {run['sparsity']:g}"
            lines.append(f"{run['dir']}: {run['arch']} of {sites}, {run['d_sae']} latents, {few}, seed {run['seed']}")
            speed = f"{run['rows']} rows in {run['seconds']:.0f} s ({run['rows_per_s']:.0f} rows/s, {run['wait_fraction']:.1%} waiting)"
            lines.append(f"  {speed}; last batches: FVU {run['fvu']:.3f}, L0 {run['l0']:.1f}, {run['dead_fraction']:.1%} dead")
            if run["skipped_rows"]:
                lines.append(f"  {run['skipped_rows']} rows that were not finite left their place to others")
        return "\n".join(lines)
