"""`hearsae evaluate`."""

import sys
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from cache.location import Location
from cache.store import ActivationStore
from cluster.commands import Output
from sae.metrics import check_fits, evaluate
from sae.models import load_dictionary


@dataclass(frozen=True, kw_only=True)
class Evaluate(Output):
    """L0, FVU, dead and dense latents and densities of trained SAEs, over all rows of a (held-out) store."""

    sae: tuple[Location, ...]
    """Folders of trained SAEs."""
    store: Location
    """The store to evaluate on."""

    def run(self) -> dict[str, Any]:
        store = ActivationStore.open(self.store)
        results = []
        for folder in self.sae:
            dictionary = load_dictionary(folder)
            rows = store.stats(check_fits(dictionary, store)).rows
            with tqdm(total=rows, desc=folder.name, unit="row", unit_scale=True, file=sys.stderr, disable=not sys.stderr.isatty()) as bar:
                results.append({"dir": str(folder), **evaluate(dictionary, store, on_rows=bar.update).to_json()})
        return {"results": results}

    def summary(self, result: dict[str, Any]) -> str:
        lines = []
        for r in result["results"]:
            latents = f"{r['dead_fraction']:.2%} dead, {r['dense_fraction']:.2%} dense"
            lines.append(f"{r['dir']}: {r['site']}, {r['rows']} rows: FVU {r['fvu']:.4f}, L0 {r['l0']:.1f}, {latents}")
        return "\n".join(lines)
